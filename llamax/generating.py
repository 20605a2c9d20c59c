"""Text from a model in any folder that holds one: `llamax generate` continues a prompt, `llamax chat` talks."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llamax import loading
from llamax.config import ConfigError
from llamax.data import chat as template
from llamax.data.encode import Encoded, Encoder
from llamax.data.sources import SKIP_REASONS, Document, Picture
from llamax.data.tokenizer import Tokenizer
from llamax.loading import Loaded
from llamax.observe import log
from llamax.sample.engine import Conversation, Prompt, Sampling
from llamax.sample.engine import generate as complete

HELP = "/image FILE  show a picture with what you say next\n/reset  forget all\n/exit  leave (so does Ctrl-D)"


def generate(
    folder: str | Path,
    prompt: str,
    *,
    images: Sequence[str | Path] = (),
    n: int = 1,
    max_tokens: int = 64,
    sampling: Sampling = Sampling(),  # noqa: B008, it is immutable
    dtype: str = "float32",
) -> list[str]:
    """`n` continuations of a prompt. Pictures take the places of `<|image|>` in it; without any, they come before it.

    Raises:
        ConfigError: no model is there, or a picture, a number or the prompt cannot be used.
    """
    log.setup()
    _check(max_tokens, sampling)
    if n < 1:
        raise ConfigError(f"-n {n}", "that is no continuation", "Give 1 or more.")
    model, tokenizer = _load(folder, dtype)
    encoded = Encoder(tokenizer.path, model.model.vision, where="the prompt")(Document(_pieces(prompt, images)))
    if encoded.skip:
        shown = " ".join(f"--image {image}" for image in images)
        raise ConfigError(f"{shown} --prompt {prompt!r}".strip(), SKIP_REASONS[encoded.skip], "Give another.")
    asked = Prompt(encoded.tokens[:-1].tolist(), encoded.tiles)  # without the end of text
    how = dict(max_tokens=max_tokens, stop=tokenizer.stop, n=n, sampling=sampling)
    (found,) = complete(model.skeleton, model.params, model.router_bias, [asked], **how)
    return [tokenizer.decode(completion.text) for completion in found]


def _pieces(prompt: str, images: Sequence[str | Path]) -> tuple[str | Picture, ...]:
    pictures = [Picture(Path(image)) for image in images]
    texts = prompt.split(template.PLACEHOLDER) if images else [prompt]
    if len(texts) == 1:
        return (*pictures, prompt)
    if len(texts) - 1 != len(pictures):
        true = f"the prompt has {len(texts) - 1} places for them ({template.PLACEHOLDER})"
        raise ConfigError(f"{len(pictures)} images", true, "Give an image for every place, in order.")
    rest = [piece for pair in zip(pictures, texts[1:], strict=True) for piece in pair]
    return (texts[0], *rest)


class Chat:
    """A conversation with a model: messages in, streamed text out. Nothing said is ever tokenized again."""

    def __init__(self, model: Loaded, tokenizer: Tokenizer, system: str | None = None):
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system's message."""
        self.messages: list[dict] = [{"role": "system", "content": self.system}] if self.system else []
        weights = (self.model.skeleton, self.model.params, self.model.router_bias)
        self._talk = Conversation(*weights, stop=self.tokenizer.stop)

    def ask(self, text: str, images: Sequence[str | Path], max_tokens: int, sampling: Sampling) -> Iterator[str]:
        """The answer as it comes. What was heard of it is in the conversation, even if nobody listens to its end.

        ConfigError if a picture cannot be used; the message is then forgotten.
        """
        pictures = [{"type": "image", "image": image} for image in images]
        asked = {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}
        self._tell(self._encoded([*self.messages, asked]))
        self.messages.append(asked)
        answer: dict[str, Any] = {"role": "assistant", "content": "", "token_ids": []}
        self.messages.append(answer)
        for piece in self.tokenizer.decode_each(self._said(answer["token_ids"], max_tokens, sampling)):
            answer["content"] += piece
            yield piece

    def _said(self, heard: list[int], max_tokens: int, sampling: Sampling) -> Iterator[int]:
        """New ids but for the stop id, as they come; all of them go into `heard`."""
        for token in self._talk.say(max_tokens, sampling):
            heard.append(token)
            if token not in self.tokenizer.stop:
                yield token

    def _encoded(self, messages: Sequence[dict]) -> Encoded:
        return template.encode(template.render(messages, prompt=True), self.tokenizer, self.model.model.vision)

    def _tell(self, whole: Encoded) -> None:
        """What of the whole conversation has not been read yet: the template keeps what was said as a prefix."""
        known = len(self._talk.tokens)
        assert whole.tokens[:known].tolist() == self._talk.tokens
        tiles = sum(int(count) for first, _, count in whole.pictures if first < known)
        self._talk.tell(Prompt(whole.tokens[known:].tolist(), whole.tiles[tiles:]))


def chat(
    folder: str | Path,
    *,
    system: str | None = None,
    images: Sequence[str | Path] = (),
    max_tokens: int = 512,
    sampling: Sampling = Sampling(0.6, 0.9),  # noqa: B008, it is immutable
    dtype: str = "float32",
    read: Callable[[str], str] = input,
) -> None:
    """Talks until the input ends. `images` go with the first message. Ctrl-C ends an answer, or the conversation.

    Every answer has a seed of its own, counted up from that of `sampling`.
    """
    log.setup()
    _check(max_tokens, sampling)
    talk, waiting = Chat(*_load(folder, dtype), system), list(images)
    for image in waiting:
        _check_image(image, talk.model)
    at_terminal = sys.stdin.isatty()
    print(HELP if at_terminal else "", end="\n" if at_terminal else "")
    for number in range(sys.maxsize):
        try:
            said = read("> " if at_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, argument = said.partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            talk.reset()
        elif command == "/image":
            try:
                _check_image(argument, talk.model)
                waiting.append(argument)
            except ConfigError as error:
                print(error)
        elif command.startswith("/"):
            print(HELP if command == "/help" else f"{command} is no command\n{HELP}")
        elif said:
            _answer(talk, said, waiting, max_tokens, sampling._replace(seed=sampling.seed + number))
            waiting = []


def _answer(talk: Chat, said: str, images: Sequence[str | Path], max_tokens: int, sampling: Sampling) -> None:
    try:
        for piece in talk.ask(said, images, max_tokens, sampling):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass  # what was heard stays
    except ConfigError as error:
        print(error, end="")
    print(flush=True)


def _check_image(image: str | Path, model: Loaded) -> None:
    if model.model.vision is None:
        raise ConfigError(f"image {image}", "the model has no vision encoder", "Leave it out, or take another model.")
    if not Path(image).is_file():
        raise ConfigError(f"image {image}", "there is no such file", "Name a picture's file.")


def _load(folder: str | Path, dtype: str) -> tuple[Loaded, Tokenizer]:
    model = loading.load(folder, dtype=dtype)
    if model.tokenizer is None:
        change = "Put the model's tokenizer.model (tiktoken's format) or tokenizer.json beside it."
        raise ConfigError(f"Text from the model in {folder}", "it has no tokenizer that can be read", change)
    return model, model.tokenizer


def _check(max_tokens: int, sampling: Sampling) -> None:
    if max_tokens < 1:
        raise ConfigError(f"--max-tokens {max_tokens}", "that leaves nothing to say", "Give 1 or more.")
    if not 0 <= sampling.temperature < math.inf:
        true = "it is a number from 0 up"
        raise ConfigError(f"--temperature {sampling.temperature:g}", true, "Give 0 for the likeliest text.")
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"--top-p {sampling.top_p:g}", "it is a probability above 0", "Give 1 for all tokens.")
