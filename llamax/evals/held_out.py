"""The documents that an evaluation looks at."""

from __future__ import annotations

from pathlib import Path

from llamax.data.sources import Document, open_source, read_manifest


def documents(path: str | Path, max_docs: int) -> list[Document]:
    """At most `max_docs` (0: all) documents of a manifest, spread evenly, also damaged ones: those `HeldOut` reads."""
    reader = open_source(read_manifest(path))
    n = min(max_docs or len(reader), len(reader))
    return [reader[i * len(reader) // n] for i in range(n)]
