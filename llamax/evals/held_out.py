"""The documents that an evaluation looks at."""

from __future__ import annotations

from pathlib import Path

from llamax.data.sources import Document, open_source, read_manifest


def documents(path: str | Path, max_docs: int) -> list[Document]:
    """At most `max_docs` (0: all) usable documents of a manifest, spread evenly: the ones that `HeldOut` packs."""
    reader = open_source(read_manifest(path))
    n = min(max_docs or len(reader), len(reader))
    found = [reader[i * len(reader) // n] for i in range(n)]
    return [document for document in found if not document.skip]
