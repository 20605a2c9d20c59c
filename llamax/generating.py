"""Text from a model in any folder that holds one: `llamax generate` continues a prompt, `llamax chat` talks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llamax import loading
from llamax.config import ConfigError
from llamax.data import chat as template
from llamax.data.encode import Encoder
from llamax.data.sources import SKIP_REASONS, Document, Picture
from llamax.data.tokenizer import Tokenizer
from llamax.loading import Loaded
from llamax.observe import log
from llamax.sample.conversation import Conversation
from llamax.sample.engine import Prompt, Sampling, check
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
    check(max_tokens, sampling, n)
    if any("\ud800" <= char <= "\udfff" for char in prompt):
        raise ConfigError(f"--prompt {prompt!r}", "it is no valid Unicode", "Give text.")
    model, tokenizer = _load(folder, dtype)
    for image in images:
        _check_image(image, model)
    if not images and model.model.vision is not None and template.PLACEHOLDER in prompt:
        true = f"the prompt has {prompt.count(template.PLACEHOLDER)} places for them ({template.PLACEHOLDER})"
        raise ConfigError("0 images", true, "Give an image for every place, in order.")
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
    """A conversation with a model: messages in, streamed text out. Nothing is read or tokenized twice."""

    def __init__(self, model: Loaded, tokenizer: Tokenizer, system: str | None = None):
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system's message."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        weights = (self.model.skeleton, self.model.params, self.model.router_bias)
        self._talk = Conversation(*weights, stop=self.tokenizer.stop)
        self._told, self._first = 0, 0  # parts of the template that were told; the answer's first place in the tokens

    def ask(self, text: str, images: Sequence[str | Path], max_tokens: int, sampling: Sampling) -> Iterator[str]:
        """The answer as it comes. What was said of it is in the conversation, even if nobody listens to its end.

        ConfigError if a picture cannot be used; the message is then forgotten.
        """
        self._tell(text, images)
        try:
            yield from self.tokenizer.decode_each(self._said(max_tokens, sampling))
        finally:
            self._write_down()

    def _tell(self, text: str, images: Sequence[str | Path]) -> None:
        self._write_down()
        pictures = [{"type": "image", "image": Path(image).read_bytes()} for image in images]
        asked = {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}
        spans = template.render([*self.messages, asked], prompt=True)
        # The first that is new is the answer before, with the end of turn if that was not said.
        new = template.encode(spans[self._told :], self.tokenizer, self.model.model.vision)
        said = len(self._talk.tokens) - self._first
        assert new.tokens[:said].tolist() == self._talk.tokens[self._first :]
        before = len(self._talk.tokens)
        try:
            self._talk.tell(Prompt(new.tokens[said:].tolist(), new.tiles))
        finally:
            if len(self._talk.tokens) > before:
                self.messages += [asked, {"role": "assistant", "content": "", "token_ids": []}]
                self._told, self._first = len(spans), len(self._talk.tokens)

    def _said(self, max_tokens: int, sampling: Sampling) -> Iterator[int]:
        """New ids as they come, but for the stop id."""
        return (token for token in self._talk.say(max_tokens, sampling) if token not in self.tokenizer.stop)

    def _write_down(self) -> None:
        """The last message is what was said of the answer."""
        if self._first:
            ids = self._talk.tokens[self._first :]
            text = self.tokenizer.decode(token for token in ids if token not in self.tokenizer.stop)
            self.messages[-1] |= {"content": text, "token_ids": ids}


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
    check(max_tokens, sampling)
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
                _check_image(argument.strip(), talk.model)
                waiting.append(argument.strip())
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
