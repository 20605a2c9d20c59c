"""A document as every source gives it: texts and pictures in reading order, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Message = Mapping[str, Any]


class Picture(NamedTuple):
    """An encoded picture or clip: its bytes, or the path of its file."""

    data: bytes | Path
    video: bool = False


class Answer(NamedTuple):
    """What is said behind a prompt, and whether it is the better (or a good) answer: 1, or -1."""

    side: int
    messages: tuple[Message, ...]


class Talk(NamedTuple):
    """A conversation or, with answers, the prompt that they answer. Messages are chat.py's."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()
    answers: tuple[Answer, ...] = ()  # of a comparison the chosen one, then the rejected one; or one that is labelled
    margin: float = 0.0  # how much better the chosen answer is


class Document(NamedTuple):
    """What one record holds."""

    pieces: tuple[str | Picture, ...]
    lang: str = ""
    id: str = ""
    meta: dict[str, Any] = {}  # never changed
    skip: str = ""  # a key of sources.SKIP_REASONS where the record cannot be used
    where: str = ""  # record and file, for messages
    detail: str = ""  # what is wrong with it, where `skip` does not say all
    weights: tuple[float, ...] = ()  # of each piece's tokens in the loss; empty: 1. A picture is never learnt
    talk: Talk | None = None  # then there are no pieces
    ref_logp: np.ndarray | None = None  # float32: what a reference gives the tokens by which its answers are judged
