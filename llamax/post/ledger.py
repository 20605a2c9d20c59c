"""What was found out about records and is never to be found out twice: an append-only JSONL file, looked up by key.

A row is one write at the end of the file, so whatever ends the process, what stands in it is whole rows but perhaps for
the last one, which is cut off when the file is opened again. One process writes at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamax.config import ConfigError


def key_of(*parts: Any) -> str:
    """SHA-256 of JSON values, in hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class Ledger:
    """A context manager. Rows are dicts with a "key"; of two with one key the newer counts."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __enter__(self) -> Ledger:
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            true = f"it cannot be opened to write: {error.strerror}"
            raise ConfigError(f"{self.path}", true, "Name another file.") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            true = "another process is writing to it"
            raise ConfigError(f"{self.path}", true, "Wait for it, end it, or name another file.") from None
        except OSError:
            pass  # a file system without locks
        self._spans: dict[str, tuple[int, int]] = {}
        self._end = 0
        for row, begin, end in _rows(self.path):
            self._spans[row["key"]], self._end = (begin, end), end
        os.ftruncate(self._file, self._end)
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._file)

    def __contains__(self, key: str) -> bool:
        return key in self._spans

    def __getitem__(self, key: str) -> dict[str, Any]:
        begin, end = self._spans[key]
        return json.loads(os.pread(self._file, end - begin, begin))

    def add(self, row: Mapping[str, Any]) -> None:
        """On the disk when it returns."""
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(28, "no space left")
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._end)
            true = f"it cannot be written: {error.strerror}"
            raise ConfigError(f"{self.path}", true, "Make room; the same command goes on.") from None
        self._spans[row["key"]] = (self._end, self._end + len(line))
        self._end += len(line)


def rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a file, oldest first. ConfigError if it cannot be read."""
    try:
        yield from (row for row, _, _ in _rows(Path(path)))
    except OSError as error:
        raise ConfigError(f"{path}", f"it cannot be read: {error.strerror}", "Name the file of grades.") from None


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], int, int]]:
    """(row, its begin, its end) up to an end that was cut off. ConfigError if more than that is damaged."""
    begin = 0
    with path.open("rb") as file:
        for line in file:
            end = begin + len(line)
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                row = ""
            if row is None:
                return
            if not isinstance(row, dict) or not isinstance(row.get("key"), str):
                true = f"its line at byte {begin} is no row"
                raise ConfigError(f"{path}", true, "Remove that line, or name another file.")
            yield row, begin, end
            begin = end
