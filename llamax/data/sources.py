"""Documents on disk: manifests, the file formats they name, and random access to the records.

A manifest is a TOML file that says where a data set lies and what it is:

    format = "arrayrecord"                           # or "jsonl"
    files = ["train-*.arrayrecord"]                  # relative to the manifest; globs allowed
    kind = "text"                                    # or "multimodal": documents may carry pictures
    lang = "en"                                      # or "python", ...
    documents = 12_345                               # optional, checked against the files
    tokens = 6_789_012                               # optional: BPE tokens of the text; pictures come on top

A record is `{"pieces": [{"text": str} | {"image": ...} | {"video": ...}, ...], "id": str, "meta": {...}}`, or in short
`{"text": str}`; "id" and "meta" are optional. In ArrayRecord files a record is a msgpack map and pictures are encoded
bytes (PNG, ...); in JSONL files it is a line and pictures are paths relative to the file. Text that spells a special
token is plain text.

A record that is damaged in content (`SKIP_REASONS`) becomes a document with `skip` set, which the packer leaves out
and counts. A record that is no such map is a ConfigError, like a wrong manifest: then the file is not what it says.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import grain
import msgpack
import numpy as np

from llamax.config import ConfigError

KINDS = ("text", "multimodal")
SKIP_REASONS = {
    "empty": "the document has neither a picture nor a character that is not white space",
    "invalid_utf8": "a text is not valid UTF-8",
    "image_missing": "a picture's file does not exist",
    "image_unreadable": "a picture cannot be decoded",
    "image_too_large": "one picture alone needs more tokens or tiles than a row holds",
}


class Picture(NamedTuple):
    """An encoded picture or clip: its bytes, or the path of its file."""

    data: bytes | Path
    video: bool = False


class Document(NamedTuple):
    """What one record holds: texts and pictures in reading order."""

    pieces: tuple[str | Picture, ...]
    lang: str = ""
    id: str = ""
    meta: dict[str, Any] = {}  # never changed
    skip: str = ""  # a key of SKIP_REASONS where the record cannot be used


@dataclass(frozen=True)
class Manifest:
    """A manifest's fields, with `files` resolved to existing paths. Zero or empty: not stated."""

    path: Path
    format: str
    files: tuple[Path, ...]
    kind: str = "text"
    lang: str = ""
    licence: str = ""
    description: str = ""
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    sha256: dict[str, str] = field(default_factory=dict)  # file name -> hash


def read_manifest(path: str | Path) -> Manifest:
    """Reads and checks a manifest. ConfigError if it, or a file that it names, is missing or malformed."""
    path = Path(path)
    asked = f"data manifest {path}"
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], 1)
        hint = f"Did you mean {path.parent / near[0]}?" if near else "`llamax data build` makes the embedded data."
        raise ConfigError(asked, "there is no such file", hint)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(asked, f"it is not TOML: {error}", "Correct the file.") from None
    types = {f.name: f.type for f in fields(Manifest) if f.name != "path"} | {"files": "list", "sha256": "dict"}
    for key, value in table.items():
        if key not in types:
            near = difflib.get_close_matches(key, types, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"The keys are {', '.join(types)}."
            raise ConfigError(asked, f"it has an unknown key {key!r}", hint)
        if type(value).__name__ != types[key]:
            raise ConfigError(asked, f"its {key} is {value!r}, not a {types[key]}", f"Give {key} as a {types[key]}.")
        if types[key] == "int" and value < 0:
            raise ConfigError(asked, f"its {key} is {value}", f"Correct {key}, or leave it out.")
    for key, allowed in (("format", tuple(FORMATS)), ("kind", KINDS)):
        if table.get(key, "text") not in allowed:
            raise ConfigError(asked, f"its {key} is {table.get(key)!r}", f"Use one of {', '.join(allowed)}.")
    return Manifest(path=path, **(table | {"files": _resolve(path, table.get("files", []))}))


def _resolve(manifest: Path, patterns: Sequence[str]) -> tuple[Path, ...]:
    """The files that the patterns name, in order; each must match something."""
    found: list[Path] = []
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(f"data manifest {manifest}", f"one of its files is {pattern!r}", "Give names as strings.")
        names = sorted(manifest.parent / name for name in glob.glob(pattern, root_dir=manifest.parent))
        matches = [path for path in names if path.is_file() and path not in found]
        if not matches:
            raise ConfigError(
                f"data manifest {manifest}",
                f"it names {pattern!r} and {manifest.parent} has no such file that is not named before",
                "Correct the name, copy the file there, or build the data again.",
            )
        found += matches
    if not found:
        raise ConfigError(f"data manifest {manifest}", "it names no files", 'Add files = ["..."].')
    return tuple(found)


def verify(manifest: Manifest) -> None:
    """Compares every file with the manifest's sha256. ConfigError at the first that differs or is not listed."""
    for path in manifest.files:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        stated = manifest.sha256.get(path.name)
        if digest != stated:
            raise ConfigError(
                f"data manifest {manifest.path}",
                f"{path.name} has sha256 {digest} and the manifest says {stated}",
                "Copy or build the file again.",
            )


def parse(record: Any, lang: str, where: str, folder: Path | None = None) -> Document:
    """A decoded record to a Document; with a folder, pictures are paths in it. ConfigError if it is no such record."""
    parts = record.get("pieces", [{"text": record.get("text")}]) if isinstance(record, dict) else None
    if not isinstance(parts, list) or {"text", "pieces"} <= record.keys():
        raise _malformed(record, where)
    pieces: list[str | Picture] = []
    for piece in parts:
        kind, value = next(iter(piece.items())) if isinstance(piece, dict) and len(piece) == 1 else ("", None)
        if kind == "text" and isinstance(value, str):
            pieces.append(value)
        elif kind in ("image", "video") and isinstance(value, bytes) and folder is None:
            pieces.append(Picture(value, kind == "video"))
        elif kind in ("image", "video") and isinstance(value, str) and folder is not None:
            pieces.append(Picture(folder / value, kind == "video"))
        else:
            raise _malformed(record, where)
    document = Document(tuple(pieces), lang, str(record.get("id", "")), record.get("meta") or {})
    texts = [piece for piece in pieces if isinstance(piece, str)]
    if len(texts) == len(pieces) and not any(text.strip() for text in texts):
        return document._replace(skip="empty")
    try:
        for text in texts:
            text.encode()  # a JSON escape can spell half a surrogate pair
    except UnicodeEncodeError:
        return document._replace(skip="invalid_utf8")
    return document


def _malformed(record: Any, where: str) -> ConfigError:
    return ConfigError(
        where,
        f"the record is not a map with pieces of text, image or video: {str(record)[:80]!r}",
        "Correct the record; the format is described in llamax/data/sources.py.",
    )


class Shards(Sequence[Document]):
    """Records of several files as one sequence. A format says how to open a file and how to decode a record."""

    pictures_inside: bool  # pictures are bytes in the record, not paths beside the file
    open: Callable[[Path], Sequence[bytes]]
    decode: Callable[[bytes], Any]

    def __init__(self, files: Sequence[Path], lang: str):
        self.files, self.lang = tuple(files), lang
        self._shards = [self.open(path) for path in files]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Document:
        """A Document, with `skip` where the record is damaged in content; ConfigError if it is malformed."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        i = int(np.searchsorted(self._ends, number, side="right"))
        shard, path = self._shards[i], self.files[i]
        number += len(shard) - int(self._ends[i])
        where = f"record {number} of {path}"
        try:
            record = self.decode(shard[number])
        except UnicodeDecodeError:
            return Document((), self.lang, skip="invalid_utf8")
        except (ValueError, RuntimeError, OSError, msgpack.UnpackException) as error:  # RuntimeError: array_record's
            raise ConfigError(where, f"it cannot be decoded: {error}", "Correct or build the file again.") from None
        return parse(record, self.lang, where, None if self.pictures_inside else path.parent)


class ArrayRecord(Shards):
    """Records are msgpack maps."""

    pictures_inside = True
    decode = staticmethod(msgpack.unpackb)

    @staticmethod
    def open(path: Path) -> Sequence[bytes]:
        try:
            return grain.sources.ArrayRecordDataSource(str(path))
        except Exception as error:  # array_record's own errors are bare RuntimeErrors
            raise ConfigError(
                f"ArrayRecord file {path}", f"it cannot be opened: {error}", "Build or copy it again."
            ) from None


class JsonLines(Shards):
    """Records are lines that are not blank. Opening scans for them and keeps 16 bytes each."""

    pictures_inside = False

    @staticmethod
    def decode(line: bytes) -> Any:
        return json.loads(line.decode("utf-8-sig"))  # some editors put a mark before the first line

    @staticmethod
    def open(path: Path) -> Sequence[bytes]:
        return Lines(path)


class Lines(Sequence[bytes]):
    """The lines of a file that are not blank, by random access."""

    def __init__(self, path: Path):
        self.path = path
        self._spans = _line_spans(path)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, number: int) -> bytes:
        start, end = self._spans[number].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)


def _line_spans(path: Path) -> np.ndarray:
    """Byte spans int64 [lines, 2] of the lines that are not blank."""
    spans, start = [], 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                spans.append((start, start + len(line)))
            start += len(line)
    return np.array(spans, np.int64).reshape(-1, 2)


FORMATS = {"arrayrecord": ArrayRecord, "jsonl": JsonLines}


def open_source(manifest: Manifest) -> Sequence[Document]:
    """Random access to a manifest's documents. ConfigError if it is empty, or holds another number than stated."""
    source = FORMATS[manifest.format](manifest.files, manifest.lang)
    if not len(source) or manifest.documents not in (0, len(source)):
        raise ConfigError(
            f"data manifest {manifest.path}",
            f"its files hold {len(source)} documents" + (f", not {manifest.documents}" if len(source) else ""),
            "Build or copy the files again, or correct `documents`.",
        )
    return source


def write_arrayrecord(path: str | Path, records: Iterable[dict[str, Any]]) -> int:
    """Writes records (maps as in this module's docstring) as one ArrayRecord file and returns their number.

    The same records give the same bytes. ConfigError if a record is malformed.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")  # one record a group: the fastest random access
    n = 0
    for n, record in enumerate(records, start=1):
        parse(record, "", f"record {n - 1} for {path}")
        writer.write(msgpack.packb(record))
    writer.close()
    return n
