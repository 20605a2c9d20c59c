"""Writes documents as ArrayRecord shards with a manifest beside them (formats: `sources.py`)."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llamax.data.sources import write_arrayrecord
from llamax.data.tokenizer import Tokenizer

DOCUMENTS_PER_SHARD = 8192


def write(
    folder: Path, name: str, documents: Iterable[dict], n_documents: int, tokenizer: Tokenizer | None, **about: str
) -> dict:
    """Writes `n_documents` records to folder/name-*.arrayrecord and the manifest folder/name.toml; returns the latter.

    `about` goes into the manifest as it is (lang, kind, licence, description). `bytes` counts the documents' text in
    UTF-8. `tokens` is stated for text and with a tokenizer only: what a picture takes depends on the model's patches.
    """
    n_shards = max(1, -(-n_documents // DOCUMENTS_PER_SHARD))
    files = [f"{name}-{i:05d}-of-{n_shards:05d}.arrayrecord" for i in range(n_shards)]
    totals = {"documents": 0, "bytes": 0, "tokens": 0}
    if about["kind"] != "text":
        tokenizer = None
    counted = _counted(documents, tokenizer, totals)
    for i, file in enumerate(files):
        share = n_documents * (i + 1) // n_shards - n_documents * i // n_shards
        write_arrayrecord(folder / file, itertools.islice(counted, share))
    assert totals["documents"] == n_documents and next(counted, None) is None, f"{name}: not {n_documents} documents"
    manifest = {"format": "arrayrecord", "files": files, **about, **totals}
    if not tokenizer:
        del manifest["tokens"]
    write_manifest(folder / f"{name}.toml", manifest)
    return manifest


def write_union(folder: Path, name: str, manifests: Sequence[dict], **about: str) -> dict:
    """Writes the manifest folder/name.toml over the files of several, which stay where they are; returns it.

    `about` replaces what the first of them says.
    """
    files = [file for manifest in manifests for file in manifest["files"]]
    totals = {key: sum(m[key] for m in manifests) for key in ("documents", "bytes", "tokens") if key in manifests[0]}
    manifest = {**manifests[0], **about, "files": files, **totals}
    write_manifest(folder / f"{name}.toml", manifest)
    return manifest


def _counted(documents: Iterable[dict], tokenizer: Tokenizer | None, totals: dict[str, int]) -> Iterator[dict]:
    for document in documents:
        texts = list(_texts(document))
        totals["documents"] += 1
        totals["bytes"] += sum(len(text.encode()) for text in texts)
        if tokenizer:
            totals["tokens"] += sum(len(tokenizer.encode_array(text)) for text in texts)
        yield document


def _texts(record: dict) -> Iterator[str]:
    """Those of its pieces, or of its messages."""
    answers = [record[key] for key in ("chosen", "rejected") if key in record]
    for message in [*record.get("messages", ()), *record.get("prompt", ()), *answers]:
        content = message["content"]
        yield from [content] if isinstance(content, str) else (p["text"] for p in content if p["type"] == "text")
    yield from (piece["text"] for piece in record.get("pieces", ()) if "text" in piece)


def write_manifest(path: Path, manifest: dict) -> None:
    """Writes a manifest, with the SHA-256 of each of its files."""
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in manifest.items()]  # also valid TOML
    lines += ["", "[sha256]"]
    lines += [f'"{file}" = "{sha256(path.parent / file)}"' for file in manifest["files"]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
