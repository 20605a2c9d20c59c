"""Documents on disk: manifests, the file formats they name, and random access to the records.

A manifest is a TOML file that says where a data set lies and what it is:

    format = "arrayrecord"                           # or "jsonl"
    files = ["train-*.arrayrecord"]                  # relative to the manifest; globs allowed
    kind = "text"                                    # or "multimodal": documents may carry pictures
    lang = "en"                                      # or "python", ...
    documents = 12_345                               # optional, checked against the files
    tokens = 6_789_012                               # optional: BPE tokens of the text; pictures come on top
    learnt = ["assistant"]                           # optional, of conversations: the roles whose messages are learnt

or a TOML file with a [tasks] table (tasks/source.py): documents that are made as they are read.

A record is `{"pieces": [{"text": str} | {"image": ...} | {"video": ...}, ...], "id": str, "meta": {...}}`, or in short
`{"text": str}`; "id" and "meta" are optional. A text may have a weight, `{"text": str, "weight": 0.5}`: what its tokens
weigh in the loss, 1 if it is not stated, 0 for what is read and not learnt. In ArrayRecord files a record is a msgpack
map and pictures are encoded bytes (PNG, ...); in JSONL files it is a line and pictures are paths relative to the file.
Text that spells a special token is plain text. A record may be a conversation, too, or answers that are compared
(talk_read.py).

A record that is damaged, in its content or as a whole, becomes a document with `skip` set to one of `SKIP_REASONS`,
which the packer leaves out and counts. A manifest that is wrong, a file that cannot be opened and storage that fails
are a ConfigError.
"""

from __future__ import annotations

import array
import difflib
import glob
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import grain
import msgpack
import numpy as np

from llamax.config import ConfigError
from llamax.data import talk_read
from llamax.data.chat_check import ROLES
from llamax.data.document import Document, Picture
from llamax.data.encoded import LEARNT
from llamax.data.tasks.source import Exams, read_table
from llamax.data.tasks.tokens import Tokens

KINDS = ("text", "multimodal")
SKIP_REASONS = {
    "malformed": "the record is damaged, or no map with pieces of text, image or video, or no conversation",
    "empty": "the document has neither a picture nor a character that is not white space",
    "invalid_utf8": "a text is not valid UTF-8",
    "unexpected_picture": 'a picture in a source whose manifest says kind = "text"',
    "image_missing": "a picture's file does not exist",
    "image_unreadable": "a picture cannot be decoded",
    "image_too_many_pixels": "a picture or clip has too many pixels or bytes to be decoded safely",
    "image_too_large": "one picture alone needs more tokens or tiles than a row holds",
    "too_large": "the document has more text or pictures than one document may",
    "task": "the text of a task has all the words in it that could be keys, or no room for a question",
    "no_answer": "an answer that is to be learnt or compared says nothing, or there is none",
    "identical": "the chosen and the rejected answer are the same",
    "too_long": "the conversation is longer than a row, or the two of a comparison are",
    "unexpected_comparison": "answers are compared, and data.comparisons_per_row = 0",
    "window_full": "the documents that are packed together with it fill the memory that they may take",
}
CUTS = {
    "cut_begin": "lost their oldest turns, to fit into a row",
    "cut_end": "lost their ends, to fit into a row",
}
MAX_TEXT_BYTES = 2**24  # of one document, as UTF-8: a window of documents is held in memory, 24 bytes a token
MAX_LINE_BYTES = 8 * MAX_TEXT_BYTES  # of a JSONL record; JSON may spell a byte with six
MAX_MANIFEST_BYTES = 2**24
STORAGE = "See that the file is where it was and can be read, then start again: a run goes on from its checkpoint."
BLOCK = 2**20  # bytes read at once in the search for the ends of lines


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
    learnt: tuple[str, ...] = LEARNT
    sha256: dict[str, str] = field(default_factory=dict)  # file name -> hash
    tasks: dict[str, Any] = field(
        default_factory=dict
    )  # the table of a manifest of tasks, whose files are the filler's


def read_manifest(path: str | Path) -> Manifest:
    """Reads and checks a manifest. ConfigError if it, or a file that it names, is missing or malformed."""
    path = Path(path)
    asked = f"data manifest {path}"
    if not _is_file(path):
        hint = f"Did you mean {like}?" if (like := _nearest(path)) else "`llamax data build` makes the embedded data."
        raise ConfigError(asked, "there is no such file", hint)
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"it has more than {MAX_MANIFEST_BYTES} bytes")
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(asked, f"it cannot be read: {error}", "Correct the file's permissions, or copy it.") from None
    except (ValueError, RecursionError) as error:  # besides TOMLDecodeError: no UTF-8, numbers or nesting without end
        raise ConfigError(asked, f"it is not TOML: {_one_line(error)}", "Correct the file.") from None
    types = {f.name: f.type for f in fields(Manifest) if f.name != "path"} | {
        "files": "list",
        "learnt": "list",
        "sha256": "dict",
        "tasks": "dict",
    }
    for key, value in table.items():
        if key not in types:
            near = difflib.get_close_matches(key, types, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"The keys are {', '.join(types)}."
            raise ConfigError(asked, f"it has an unknown key {key!r}", hint)
        if type(value).__name__ != types[key]:
            true = f"its {key} is {_one_line(value)}, not a {types[key]}"
            raise ConfigError(asked, true, f"Give {key} as a {types[key]}.")
        if types[key] == "int" and not 0 <= value < 2**63:
            raise ConfigError(asked, f"its {key} is {_one_line(value)}", f"Correct {key}, or leave it out.")
    for key, allowed in (("format", (*FORMATS, TASKS)), ("kind", KINDS)):
        if table.get(key, "text") not in allowed:
            raise ConfigError(asked, f"its {key} is {table.get(key)!r}", f"Use one of {', '.join(allowed)}.")
    wrong = [role for role in table.get("learnt", LEARNT) if role not in ROLES]
    if wrong or not table.get("learnt", LEARNT):
        true = f"its learnt is {_one_line(table['learnt'])}"
        raise ConfigError(asked, true, f"Name some of {', '.join(ROLES[:-1])}, or leave it out.")
    table |= {"learnt": tuple("tool" if role == "ipython" else role for role in table.get("learnt", LEARNT))}
    if table.get("format") == TASKS:
        return _of_tasks(path, table)
    if "tasks" in table:
        raise ConfigError(asked, "it has a [tasks] table and is of another format", f'Say format = "{TASKS}".')
    return Manifest(path=path, **(table | {"files": _resolve(path, table.get("files", []))}))


def _of_tasks(path: Path, table: dict[str, Any]) -> Manifest:
    """A manifest of tasks: its files are its filler's."""
    asked = f"data manifest {path}"
    stray = [key for key in ("files", "sha256", "bytes", "tokens") if key in table]
    if stray:
        raise ConfigError(asked, f"it is of tasks and has {stray[0]}", f"Leave {stray[0]} out.")
    if not table.get("documents"):
        raise ConfigError(asked, "it does not say how many documents it is of", "Add documents = 10_000.")
    tasks = read_table(table.get("tasks", {}), asked, table.get("kind", "text"))
    filler = read_manifest(path.parent / tasks.filler)
    if filler.format == TASKS:
        raise ConfigError(asked, f"its filler {tasks.filler} is of tasks too", "Name a manifest of text.")
    tokens = int(table["documents"] * tasks.mean_tokens)
    return Manifest(path=path, **(table | {"files": filler.files, "sha256": filler.sha256, "tokens": tokens}))


def _is_file(path: Path) -> bool:
    """Whether it is one that exists; False for what can be no path (too long, a NUL character)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _nearest(path: Path) -> Path | None:
    """The manifest beside it whose name is most like its own."""
    try:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], 1)
    except (OSError, ValueError):
        return None
    return path.parent / near[0] if near else None


def _one_line(value: Any) -> str:
    """A value, or an exception, as a message can hold it: one line, 120 characters at most."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except (ValueError, RecursionError):  # a number of more digits, or lists deeper, than Python writes
        text = f"a {type(value).__name__} that is too large to show"
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return text if len(text) <= 120 else f"{text[:120]}..."


def _resolve(manifest: Path, patterns: Sequence[str]) -> tuple[Path, ...]:
    """The files that the patterns name, in order; each must match something."""
    found: list[Path] = []
    for pattern in patterns:
        if not isinstance(pattern, str):
            true = f"one of its files is {_one_line(pattern)}"
            raise ConfigError(f"data manifest {manifest}", true, "Give names as strings.")
        try:
            exact = _is_file(manifest.parent / pattern)  # its name may have brackets in it
            names = [pattern] if exact else glob.glob(pattern, root_dir=manifest.parent)
        except (OSError, ValueError, re.error):  # a NUL character, a pattern that is none
            names = []
        paths = sorted(manifest.parent / name for name in names)
        matches = [path for path in paths if _is_file(path) and path not in found]
        if not matches:
            raise ConfigError(
                f"data manifest {manifest}",
                f"it names {_one_line(pattern)} and {manifest.parent} has no such file that is not named before",
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
    if talk_read.is_talk(record):
        return talk_read.read(record, lang, where, folder, MAX_TEXT_BYTES)
    parts = record.get("pieces", [_short_form(record)]) if isinstance(record, dict) else None
    if not isinstance(parts, list) or {"text", "pieces"} <= record.keys():
        raise _malformed(record, where)
    if not isinstance(record.get("meta") or {}, dict):
        raise _malformed(record, where)
    pieces: list[str | Picture] = []
    weights: list[float] = []
    for piece in parts:
        content = {k: v for k, v in piece.items() if k != "weight"} if isinstance(piece, dict) else {}
        kind, value = next(iter(content.items())) if len(content) == 1 else ("", None)
        weights.append(_weight(piece, kind, record, where))
        if kind == "text" and isinstance(value, str):
            pieces.append(value)
        elif kind in ("image", "video") and isinstance(value, bytes) and folder is None:
            pieces.append(Picture(value, kind == "video"))
        elif kind in ("image", "video") and isinstance(value, str) and folder is not None:
            pieces.append(Picture(folder / value, kind == "video"))
        else:
            raise _malformed(record, where)
    document = Document(tuple(pieces), lang, str(record.get("id", "")), record.get("meta") or {}, where=where)
    if any(weight != 1 for weight in weights):
        document = document._replace(weights=tuple(weights))
    texts = [piece for piece in pieces if isinstance(piece, str)]
    if len(texts) == len(pieces) and not any(text.strip() for text in texts):
        return document._replace(skip="empty")
    try:
        size = sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError:  # a JSON escape can spell half a surrogate pair
        return document._replace(skip="invalid_utf8")
    return document._replace(pieces=(), skip="too_large") if size > MAX_TEXT_BYTES else document


def _short_form(record: dict) -> dict:
    """The one piece of a record that has none."""
    return {key: record[key] for key in ("text", "weight") if key in record}


def _weight(piece: Any, kind: str, record: Any, where: str) -> float:
    """What a piece weighs in the loss. ConfigError if that is no weight, or a picture has one."""
    if not isinstance(piece, dict) or "weight" not in piece:
        return 1.0
    weight = piece["weight"]
    if kind != "text" or type(weight) not in (int, float) or not 0 <= weight < math.inf:
        raise _malformed(record, where)
    return float(weight)


def _malformed(record: Any, where: str) -> ConfigError:
    return ConfigError(
        where,
        f"the record is not a map with pieces of text, image or video: {_one_line(record)}",
        "Correct the record; the format is described in llamax/data/sources.py.",
    )


class Shards(Sequence[Document]):
    """Records of several files as one sequence. A format says how to open a file and how to decode a record."""

    pictures_inside: bool  # pictures are bytes in the record, not paths beside the file
    open: Callable[[Path], Sequence[bytes | None]]  # None: a record that is too large to be read
    decode: Callable[[bytes], Any]

    def __init__(self, files: Sequence[Path], lang: str):
        self.files, self.lang = tuple(files), lang
        self._shards = [self.open(path) for path in files]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Document:
        """A Document, with `skip` where the record is damaged; ConfigError if the storage fails."""
        shard, path, number = self._place(number)
        where = f"record {number} of {path}"
        try:
            encoded = shard[number]
            if encoded is None:
                return Document((), self.lang, skip="too_large", where=where)
            return parse(self.decode(encoded), self.lang, where, None if self.pictures_inside else path.parent)
        except UnicodeDecodeError:
            return Document((), self.lang, skip="invalid_utf8", where=where)
        except ConfigError as error:
            return Document((), self.lang, skip="malformed", where=where, detail=error.true)
        except Exception as error:  # damaged bytes raise nearly anything; array_record's own are bare RuntimeErrors
            true = _one_line(error) or type(error).__name__
            if isinstance(error, (OSError, MemoryError)) or not _is_file(path):  # no fault of the record's
                raise ConfigError(where, f"it cannot be read: {true}", STORAGE) from None
            return Document((), self.lang, skip="malformed", where=where, detail=f"it cannot be decoded: {true}")

    def raw(self, number: int) -> tuple[Any, Path | None]:
        """A record, which gave a document, as it is written down; where its pictures' paths begin, None: inside."""
        shard, path, number = self._place(number)
        encoded = shard[number]
        assert encoded is not None, "a line that is too long gives no document"
        return self.decode(encoded), None if self.pictures_inside else path.parent

    def _place(self, number: int) -> tuple[Sequence[bytes | None], Path, int]:
        """(file's records, its path, number among them)."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        i = int(np.searchsorted(self._ends, number, side="right"))
        return self._shards[i], self.files[i], number + len(self._shards[i]) - int(self._ends[i])


class ArrayRecord(Shards):
    """Records are msgpack maps."""

    pictures_inside = True
    decode = staticmethod(msgpack.unpackb)

    @staticmethod
    def open(path: Path) -> Sequence[bytes]:
        try:
            return grain.sources.ArrayRecordDataSource(str(path))
        except Exception as error:  # array_record's own errors are bare RuntimeErrors
            true = f"it cannot be opened: {_one_line(error) or 'it is cut short'}"
            raise ConfigError(f"ArrayRecord file {path}", true, "Build or copy it again.") from None


class JsonLines(Shards):
    """Records are lines that are not blank. Opening scans for them and keeps 16 bytes each."""

    pictures_inside = False

    @staticmethod
    def decode(line: bytes) -> Any:
        return json.loads(line.decode("utf-8-sig"))  # some editors put a mark before the first line

    @staticmethod
    def open(path: Path) -> Sequence[bytes | None]:
        try:
            return Lines(path)
        except OSError as error:
            raise ConfigError(f"JSONL file {path}", f"it cannot be read: {error}", "Copy it again.") from None


class Lines(Sequence[bytes | None]):
    """The lines of a file that are not blank, by random access; None for one of more than MAX_LINE_BYTES."""

    def __init__(self, path: Path):
        self.path = path
        self._spans = _line_spans(path)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, number: int) -> bytes | None:
        start, end = self._spans[number].tolist()
        if end - start > MAX_LINE_BYTES:
            return None
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)


def _line_spans(path: Path) -> np.ndarray:
    """Byte spans int64 [lines, 2] of the lines that are not blank. No line is held whole, however long it is."""
    spans, start, end, blank = array.array("q"), 0, 0, True
    with path.open("rb") as file:
        while part := file.readline(BLOCK):
            end += len(part)
            blank = blank and not part.strip()
            if part.endswith(b"\n") or len(part) < BLOCK:
                if not blank:
                    spans.extend((start, end))
                start, blank = end, True
    if not blank:
        spans.extend((start, end))
    return np.array(spans, np.int64).reshape(-1, 2)


TASKS = "tasks"
FORMATS = {"arrayrecord": ArrayRecord, "jsonl": JsonLines}


def open_source(manifest: Manifest, tokens: Tokens | None = None) -> Sequence[Document]:
    """Random access to a manifest's documents. ConfigError if it is empty, or holds another number than stated.

    `tokens` counts those of tasks, which are made to a length; other formats do without it.
    """
    if manifest.format == TASKS:
        return _exams(manifest, tokens)
    source = FORMATS[manifest.format](manifest.files, manifest.lang)
    if not len(source) or manifest.documents not in (0, len(source)):
        raise ConfigError(
            f"data manifest {manifest.path}",
            f"its files hold {len(source)} documents" + (f", not {manifest.documents}" if len(source) else ""),
            "Build or copy the files again, or correct `documents`.",
        )
    return source


def _exams(manifest: Manifest, tokens: Tokens | None) -> Exams:
    asked = f"data manifest {manifest.path}"
    if tokens is None:
        true = "it is of tasks, which are made for a tokenizer, and nothing here names one"
        raise ConfigError(asked, true, "Name a manifest of documents that are written down.")
    table = read_table(manifest.tasks, asked, manifest.kind)
    filler = open_source(read_manifest(manifest.path.parent / table.filler))
    return Exams(table, manifest.documents, manifest.lang, filler, tokens, manifest.path)


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
