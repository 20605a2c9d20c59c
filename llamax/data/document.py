"""A document as every source gives it: texts and pictures in reading order."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple


class Picture(NamedTuple):
    """An encoded picture or clip: its bytes, or the path of its file."""

    data: bytes | Path
    video: bool = False


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
