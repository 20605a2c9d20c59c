"""Texts that tasks draw their distractors from."""

from __future__ import annotations

from collections.abc import Sequence

from llamax.config import ConfigError
from llamax.data.document import Document

MAX_TRIES = 1_000  # documents without text in a row


class Texts(Sequence[str]):
    """The texts of a source's documents. One that has none, or cannot be used, gives the text of the next that has."""

    def __init__(self, documents: Sequence[Document]):
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self):
            raise IndexError(number)
        for i in range(number, number + min(MAX_TRIES, len(self))):
            document = self.documents[i % len(self)]
            text = "".join(piece for piece in document.pieces if isinstance(piece, str))
            if not document.skip and text.strip():
                return text
        where = self.documents[number].where
        true = f"{min(MAX_TRIES, len(self))} documents in a row, from {where} on, have no text"
        raise ConfigError("documents as filler for tasks", true, "Name a manifest of text.")
