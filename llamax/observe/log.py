"""Logging for people (one handler, quiet libraries) and for programs (`metrics.jsonl`)."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import math
import mmap
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from absl import logging as absl_logging
from rich.console import Console
from rich.logging import RichHandler

# One console: the live line and the log have to know of each other. A file has no width; tables take this one.
CONSOLE = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
FULL = (errno.ENOSPC, errno.EDQUOT)  # a full disk, a used-up quota
LOUD = ("jax", "orbax", "grain", "etils", "tensorboardX", "PIL", "asyncio", "fsspec")  # libraries that chat at INFO


def is_terminal() -> bool:
    """Whether a person watches. Stricter than rich, which takes FORCE_COLOR in a CI for a terminal."""
    return sys.stdout.isatty() and not CONSOLE.is_dumb_terminal


def setup(level: int = logging.INFO, process: int = 0) -> None:
    """Shows llamax's messages from `level` up, and from libraries only warnings. Calling it again is harmless.

    Of several processes, those beside the first (`process` > 0) show warnings alone, with their number.
    """
    level, mark = (max(level, logging.WARNING), f"process {process}: ") if process else (level, "")
    logger = logging.getLogger("llamax")
    handler: logging.Handler
    if is_terminal():
        handler = RichHandler(console=CONSOLE, show_path=False, log_time_format="[%X]")
        handler.setFormatter(logging.Formatter(f"{mark}%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {mark}%(message)s", "%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.WARNING)
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax and Grain log through absl


class MetricsFile:
    """`metrics.jsonl`: one JSON object a logged step, `{"step": 10, "time": 1.7e9, "loss/next_token": 3.2, ...}`.

    `steps.jsonl` is another. What is not finite is written as null, for JSON has no NaN.
    """

    def __init__(self, path: str | Path | None, start_step: int = 0):
        """Opens PATH to append; None: nothing is kept (another process writes).

        Lines beyond `start_step`, written by a run that got further before it died and will be written again, are
        dropped first, and so is a line that was cut short; a run from step 0 begins anew.
        """
        self.path = Path(os.devnull if path is None else path)
        self._keeps = path is not None
        self._open(start_step)

    def _open(self, start_step: int) -> None:
        if self._keeps and self.path.exists():
            ends = (end for end, line in _backwards(self.path) if _upto(line, start_step))
            os.truncate(self.path, next(ends, 0) if start_step > 0 else 0)
        self._file = self.path.open("ab", buffering=0)
        self._waiting = bytearray()  # what has not been written yet
        self._warned = False

    def rewind(self, step: int) -> None:
        """The run has gone back to step `step`: the lines beyond it will be written again."""
        self.close()
        self._open(step)

    def of_step(self, step: int) -> list[dict]:
        """The lines of the newest step, if it is this one."""
        return list(itertools.takewhile(lambda line: line["step"] == step, self.backwards()))

    def backwards(self) -> Iterator[dict]:
        """The lines, the last one first."""
        for _, line in _backwards(self.path) if self._keeps else ():
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, float | list]) -> None:
        """Appends one line, on disk when it returns; where the disk is full, when there is room again.

        Values are numbers, or (nested) lists of them.
        """
        shown = {name: _finite(x) for name, x in values.items()}
        self._waiting += json.dumps({"step": step, "time": round(time.time(), 3), **shown}).encode() + b"\n"
        self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not self._warned:
                logging.getLogger("llamax").warning("the disk is full: %s waits for space", self.path)
            self._warned = True


def _backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """(place of its end, line), the last one first: the file may be too large to be read whole."""
    end = path.stat().st_size
    if not end:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while end:
            begin = data.rfind(b"\n", 0, end - 1) + 1
            yield end, data[begin:end]
            end = begin


def _finite(x: float | list) -> float | list | None:
    if isinstance(x, list):
        return [_finite(part) for part in x]
    return float(x) if math.isfinite(x) else None


def _upto(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):  # cut short
        return False
