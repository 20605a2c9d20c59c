"""Documents with what a reference model gives their answers, which `llamax/post/reference.py` has written beside.

A folder of ArrayRecord files, one record a document in the order of the source: float32 log-probabilities of the
tokens by which its answers are judged (`sides` of its encoding is not 0), in their order; none of one that is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from llamax import config
from llamax.config import ConfigError
from llamax.data.document import Document
from llamax.data.encoded import Encoded, row_of

PATTERN = "*.arrayrecord"


def with_logps(
    reader: Sequence[Document], path: Path, data: config.Data, vision: config.Vision | None
) -> Sequence[Document]:
    """The documents of the manifest at `path` with what `data.ref_logp` has of them, if the run keeps such."""
    return Referenced(reader, folder_of(path, data, vision)) if data.ref_logp else reader


def folder_of(path: Path, data: config.Data, vision: config.Vision | None) -> Path:
    """Where a manifest's numbers lie; rows that take documents in another way have another folder."""
    return Path(data.ref_logp) / f"{path.stem}-{digest([str(path.absolute()), reading(data, vision)])[:8]}"


def reading(data: config.Data, vision: config.Vision | None) -> dict[str, Any]:
    """The settings that decide which tokens a document becomes."""
    rows = [row_of(data, of)._asdict() for of in (None, vision)]
    return dict(rows=rows, vision=vision and config.to_dict(vision), video_frames=data.video_frames)


def digest(value: Any) -> str:
    """Of anything JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Referenced(Sequence[Document]):
    """A source's documents, each with its `ref_logp`. The files are opened when one is first asked for."""

    def __init__(self, reader: Sequence[Document], folder: Path):
        self.reader, self.folder = reader, folder
        self._records: Sequence[bytes] | None = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, number: int) -> Document:
        if self._records is None:
            self._records = grain.sources.ArrayRecordDataSource(sorted(map(str, self.folder.glob(PATTERN))))
        document = self.reader[number]
        if document.talk is None or not document.talk.answers:
            return document
        return document._replace(ref_logp=np.frombuffer(self._records[number], np.float32))


def put(encoded: Encoded, ref_logp: np.ndarray) -> Encoded:
    """The log-probabilities at their tokens. ConfigError if there is another number of them."""
    assert encoded.sides is not None, "a document that compares nothing"
    judged = encoded.sides != 0
    if judged.sum() != len(ref_logp):
        true = f"a reference has {len(ref_logp)} log-probabilities for its {judged.sum()} tokens that are judged"
        raise ConfigError(encoded.where, true, "Delete the reference's folder; the same command computes it again.")
    whole = np.zeros(len(encoded.tokens), np.float32)
    whole[judged] = ref_logp
    return encoded._replace(ref_logp=whole)
