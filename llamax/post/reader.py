"""A model that reads data: opened from a folder, with a name for people and an identity for what it finds out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamax import config, loading
from llamax.checkpoint import sums
from llamax.checkpoint.hf_read import Source
from llamax.config import ConfigError
from llamax.data import chat
from llamax.data.document import Answer, Message, Talk
from llamax.data.encoded import ENDLESS, LEARNT, Encoded
from llamax.data.talk_encode import How, encode_talk
from llamax.data.tokenizer import Tokenizer
from llamax.loading import Found, Loaded
from llamax.observe.progress import waiting
from llamax.sample.reading import Prompt

MAX_TOKENS = 8192  # of a conversation with its answer, unless more is asked for


class Described(NamedTuple):
    """A model that is not loaded yet."""

    folder: str
    name: str  # the folder, and the step of a run
    identity: str  # SHA-256 of its weights' sums, its tokenizer, the chat template and the precision
    dtype: str
    step: int | None
    vision: bool
    reward: bool = False  # it has a head that scores answers, as reward models do
    compare_marks: bool = True  # that head learnt to score behind an answer's marks, not before them

    def tokenizer(self) -> Tokenizer:
        tokenizer = loading.tokenizer_of(loading.find(self.folder, self.step).said)
        assert tokenizer is not None  # `describe` has found it
        return tokenizer

    def load(self) -> Reader:
        with waiting(f"loading {self.folder}"):
            model = loading.load(self.folder, dtype=self.dtype, step=self.step)
        assert model.tokenizer is not None  # `describe` has found it
        return Reader(model, model.tokenizer, self)


class Reader(NamedTuple):
    model: Loaded
    tokenizer: Tokenizer
    about: Described

    @property
    def weights(self) -> tuple[Any, Any, Any]:
        return self.model.skeleton, self.model.params, self.model.router_bias

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), prompt: bool = False) -> Encoded:
        """ConfigError: see chat.encode."""
        spans = chat.render(messages, tools=tools or None, prompt=prompt)
        return chat.encode(spans, self.tokenizer, self.model.model.vision)

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> Prompt:
        """Up to where the assistant is to speak."""
        encoded = self.encode(messages, tools, prompt=True)
        return Prompt(encoded.tokens.tolist(), encoded.tiles)

    def answered(self, prompt: Sequence[Message], answer: Message, tools: Sequence[Any] = ()) -> Encoded:
        """An answer as training compares it, `sides` 1 at the tokens that it is judged by. Unfit: see encode_talk."""
        row = ENDLESS._replace(compare_marks=self.about.compare_marks)
        how = How(self.tokenizer, self.model.model.vision, config.Data.video_frames, row, LEARNT)
        judged = {key: value for key, value in answer.items() if key not in ("train", "weight")}
        return encode_talk(Talk(tuple(prompt), tuple(tools), (Answer(1, (judged,)),)), how)


def describe(
    folder: str | Path, *, step: int | None = None, dtype: str = "float32", option: str = "--judge"
) -> Described:
    """ConfigError if there is no model, or none that can be talked with; before any weight is read."""
    found = loading.find(folder, step)
    tokenizer = loading.tokenizer_of(found.said)
    if tokenizer is None:
        change = "Put the model's tokenizer.model (tiktoken's format) or tokenizer.json beside it."
        raise ConfigError(f"{option} {folder}", "it has no tokenizer that can be read", change)
    if not tokenizer.has("header_start"):
        true = f"its tokenizer, {tokenizer.path}, has no marks for turns"
        raise ConfigError(f"{option} {folder}", true, "Take a model with the special tokens of Llama 3 or 4.")
    digest = hashlib.sha256(f"{weights_identity(found)} {dtype}".encode())
    digest.update(Path(tokenizer.path).read_bytes() + chat.template().encode())
    name = f"{folder}" if found.step is None else f"{folder}@{found.step}"
    model = found.said.model
    of_head = dict(reward=model.reward_head, compare_marks=getattr(found.said, "compare_marks", True))
    return Described(str(folder), name, digest.hexdigest(), dtype, found.step, model.vision is not None, **of_head)


def weights_identity(found: Found) -> str:
    """Of ours the sums of the checkpoint's files, wherever the folder lies; of a folder in Hugging Face's format its
    files' sizes and times, for hundreds of gigabytes are not read twice."""
    said = found.said
    if isinstance(said, Source):
        files = sorted((*said.folder.glob("*.safetensors"), *said.folder.glob("*.json")))
        return " ".join(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files)
    folder = said.checkpoints / str(found.step or 0)
    listed = folder / sums.SUMS
    if listed.exists():
        return hashlib.sha256(listed.read_bytes()).hexdigest()
    return " ".join(f"{path}:{size}" for path, size in sums.files(folder).items())
