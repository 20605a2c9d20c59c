"""Conversations in a JSONL file, by random access, each with a key that stands for its content.

    {"messages": [...], "tools": [...], "id": "...", "meta": {"domain": "sums", "verify": "math", "answer": "4", ...}}

`meta` may say what a record is about ("domain", "tags") and how answers to it are judged (llamax/rewards). Pictures are
paths relative to the file. Lines that are no such record are counted and left out.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamax import rewards
from llamax.config import ConfigError
from llamax.data import chat_check
from llamax.data.sources import JsonLines, Lines

FORM = 'Give a file of {"messages": [...]} in lines; docs/how-to/chat.md says what a message is.'
PICTURES = ("image", "video")


class Record(NamedTuple):
    """A conversation. Messages name pictures by paths that can be opened from here."""

    number: int
    raw: dict[str, Any]  # as it stands in the file
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    meta: dict[str, Any]
    where: str
    key: str  # SHA-256 of all that a model or a rule is shown of it, pictures by their bytes

    @property
    def id(self) -> str:
        return str(self.raw.get("id", ""))

    @property
    def domain(self) -> str:
        return str(self.meta.get("domain", ""))

    @property
    def tags(self) -> frozenset[str]:
        tags = self.meta.get("tags") or ()
        return frozenset(map(str, (tags,) if isinstance(tags, str) else tags))

    @property
    def prompt(self) -> tuple[dict[str, Any], ...]:
        """All before the last turn of the assistant; all, if somebody else has the last word."""
        return self.messages[:-1] if self.answer is not None else self.messages

    @property
    def answer(self) -> dict[str, Any] | None:
        """The assistant's message that ends the conversation, if it does."""
        return self.messages[-1] if self.messages[-1]["role"] == "assistant" else None


class Records(Sequence[Record]):
    """The records of a file. Opening reads all of it once, and keeps 100 bytes of each.

    ConfigError if it cannot be read, or holds no conversation.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lines = _lines(self.path)
        self.skipped: Counter[str] = Counter()  # what is wrong -> how many lines
        self.keys: list[str] = []
        self._places: list[int] = []
        for place in range(len(self._lines)):
            try:
                self.keys.append(self._read(place, len(self._places)).key)
                self._places.append(place)
            except ConfigError as error:
                self.skipped[str(error) if not self.skipped else "others"] += 1
        if not self._places:
            first = next(iter(self.skipped), "it is empty")
            true = f"none of its {len(self._lines)} lines is a conversation: {first}" if self.skipped else first
            raise ConfigError(f"{self.path}", true, FORM)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Record:  # no slices
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._read(self._places[number], number)

    def line(self, number: int) -> bytes:
        """The record as it stands in the file, with its end of line."""
        line = self._lines[self._places[number]]
        assert line is not None
        return line.rstrip(b"\r\n") + b"\n"

    def size(self, number: int) -> int:
        """Bytes of its line: about how long it is."""
        return len(self._lines[self._places[number]] or b"")

    def _read(self, place: int, number: int) -> Record:
        line, where = self._lines[place], f"record {place} of {self.path}"
        if line is None:
            raise ConfigError(where, "its line is too long", "Split it.")
        try:
            raw = JsonLines.decode(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(where, f"it is no JSON: {error}", "Correct the line.") from None
        return parse(raw, number, where, self.path.parent)


def _lines(path: Path) -> Lines:
    if path.suffix == ".toml":
        raise ConfigError(f"{path}", "it is a manifest", "Name the JSONL file that it is of.")
    try:
        return Lines(path)
    except OSError as error:
        raise ConfigError(f"{path}", f"it cannot be read: {error.strerror}", FORM) from None


def parse(raw: Any, number: int, where: str, folder: Path) -> Record:
    """A decoded line. ConfigError if it is no conversation in which somebody asks something."""
    if not isinstance(raw, dict) or not isinstance(raw.get("messages"), list):
        raise ConfigError(where, "it has no messages", FORM)
    meta, tools = raw.get("meta") or {}, raw.get("tools") or []
    if not isinstance(meta, dict) or not isinstance(tools, list):
        raise ConfigError(where, "its meta is no map, or its tools are no list", "Correct the record.")
    rewards.check(meta, where)
    try:
        chat_check.check(raw["messages"], tools)
    except ConfigError as error:
        raise ConfigError(where, f"{error.asked}: {error.true}", error.change) from None
    located = [_located(message, folder, where) for message in raw["messages"]]
    messages = tuple(message for message, _ in located)
    if next((m["role"] for m in messages if m["role"] != "system"), "assistant") == "assistant":
        raise ConfigError(where, "nobody asks anything before the assistant speaks", "Let the user speak first.")
    shown: dict[str, Any] = {"messages": [hashed for _, hashed in located], "tools": tools}
    shown["judged"] = {key: meta.get(key) for key in ("verify", "answer", "options")}
    key = hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()
    return Record(number, raw, messages, tuple(tools), meta, where, key)


def _located(message: Mapping[str, Any], folder: Path, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A message with its pictures as paths in the folder, and with their hashes in these places."""
    content = message.get("content")
    if message["role"] in ("tool", "ipython") or not isinstance(content, list):
        return dict(message), dict(message)
    parts, hashed = [], []
    for part in content:
        kind, found = part["type"], part
        if kind in PICTURES and isinstance(part.get(kind), str):
            path = folder / part[kind]
            try:
                found, part = {**part, kind: path}, {**part, kind: hashlib.sha256(path.read_bytes()).hexdigest()}
            except OSError as error:
                raise ConfigError(where, f"{path} cannot be read: {error.strerror}", "Bring the file.") from None
        parts.append(found)
        hashed.append(part)
    return {**message, "content": parts}, {**message, "content": hashed}


def text_of(message: Mapping[str, Any]) -> str:
    """What a message says, without its pictures."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):  # of a tool: any JSON value
        return json.dumps(content, ensure_ascii=False)
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))


def pictured(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a message shows a picture."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any(part.get("type") in (*PICTURES, "image_url") for part in parts)


# -------------------------------------------------------------------------------------------------------------- writing


def moved(raw: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
    """A record of a file in the folder `old` for a file in `new`: its pictures stay where they are."""
    old, new = old.resolve(), new.resolve()
    return raw if old == new else _moved(copy.deepcopy(raw), old, new)


def _moved(value: Any, old: Path, new: Path) -> Any:
    if isinstance(value, list):
        return [_moved(part, old, new) for part in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    if kind in PICTURES and isinstance(value.get(kind), str):
        return value | {kind: os.path.relpath(old / value[kind], new)}
    return {key: _moved(part, old, new) for key, part in value.items()}


def check_new(out: str | Path, option: str = "--out") -> Path:
    """The file that will be written. ConfigError if it, or its manifest, is there, or has no folder to be in."""
    out = Path(out)
    if out.suffix != ".jsonl":
        raise ConfigError(f"{option} {out}", "it is a file of records", "Give it a name that ends in .jsonl.")
    for path in (out, out.with_suffix(".toml")):
        if path.exists():
            raise ConfigError(f"{option} {out}", f"{path} is there already", "Choose another name, or move it away.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):
            raise PermissionError(13, "no right to write in its folder")
    except OSError as error:
        true = f"it cannot be written there: {error.strerror}"
        raise ConfigError(f"{option} {out}", true, "Choose another folder.") from None
    return out


def write(
    out: Path,
    lines: Iterable[bytes],
    *,
    pictures: bool,
    description: str,
    said: Mapping[str, Any] | None = None,
    settle: Callable[[], Any] = lambda: None,
) -> int:
    """Writes records and, beside them, a manifest that recipes can name; both as a whole or not at all. How many.

    `said`: what else the manifest says. `settle` is called when all is written and nothing has its name yet.
    """
    part, manifest = (out.with_name(f"{name}.{os.getpid()}.tmp") for name in (out.name, f"{out.stem}.toml"))
    digest, n = hashlib.sha256(), 0
    try:
        with part.open("wb") as file:
            for n, line in enumerate(lines, 1):  # noqa: B007
                file.write(line)
                digest.update(line)
            file.flush()
            os.fsync(file.fileno())
        kind = "multimodal" if pictures else "text"
        table = {"format": "jsonl", "files": [out.name], "kind": kind, "description": description, "documents": n}
        told = [f"{key} = {json.dumps(value)}" for key, value in {**table, **(said or {})}.items()]  # also valid TOML
        told += ["", "[sha256]", f'{json.dumps(out.name)} = "{digest.hexdigest()}"']
        manifest.write_text("\n".join(told) + "\n")
        settle()
        part.replace(out)
        manifest.replace(out.with_suffix(".toml"))
    except OSError as error:
        raise ConfigError(f"{out}", f"it cannot be written: {error.strerror}", "Make room, then start again.") from None
    finally:
        part.unlink(missing_ok=True)
        manifest.unlink(missing_ok=True)
    return n


def as_line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
