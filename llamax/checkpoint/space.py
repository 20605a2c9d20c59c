"""Room on the disk for a checkpoint: how much it needs, how much is free, and the error of a full disk."""

from __future__ import annotations

import gc
import logging
import math
import shutil
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llamax.config import ConfigError
from llamax.observe.log import FULL
from llamax.observe.progress import quantity

MARGIN, MARGIN_BYTES = 0.01, 2**20  # beside the arrays: shapes and shardings, the index, the data's position, the sums
FULL_TEXTS = ("No space left on device", "Disk quota exceeded")  # what other libraries keep of the error's number


class NotSaved(ConfigError):
    """The disk is full."""

    exit_code = 4


class Quiet(logging.Filter):
    """Drops a library's traceback of a full disk: one message tells a person, and Orbax logs a dozen."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and is_full(record.exc_info[1]))


QUIET = Quiet()


def quiet() -> None:
    """Keeps libraries from burying the one message of a full disk under their tracebacks; once is enough."""
    for name in ("absl", "asyncio"):  # through these Orbax logs
        logging.getLogger(name).addFilter(QUIET)
    if not getattr(sys.excepthook, "quiet", False):
        hook, unraisable = sys.excepthook, sys.unraisablehook

        # TensorStore's threads report each write that ends after Orbax gave up on its save, in one way or the other.
        def but_for_closed_loops(kind: type, error: BaseException, trace: Any) -> None:
            if not of_closed_loop(error):
                hook(kind, error, trace)

        def unraisable_but_for_closed_loops(told: Any) -> None:
            if not of_closed_loop(told.exc_value):
                unraisable(told)

        but_for_closed_loops.quiet = True  # type: ignore[attr-defined]
        sys.excepthook, sys.unraisablehook = but_for_closed_loops, unraisable_but_for_closed_loops


def of_closed_loop(error: BaseException | None) -> bool:
    return type(error) is RuntimeError and str(error) == "Event loop is closed"


def forget(error: BaseException) -> None:
    """Lets go of the writes that a failed save had not begun; Python says a dozen lines of each unless told not to."""
    old, level = sys.unraisablehook, logging.getLogger("asyncio").level
    sys.unraisablehook = lambda _: None
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        chain: BaseException | None = error
        while chain is not None:
            traceback.clear_frames(chain.__traceback__)
            chain = chain.__cause__ or chain.__context__
        gc.collect()
    finally:
        sys.unraisablehook = old
        logging.getLogger("asyncio").setLevel(level)


def not_saved(folder: Path, step: int, bytes_needed: int, last_good: int | None, *, begun: bool) -> NotSaved:
    """The error of a step that a full disk kept from being saved; `begun`: it was met while writing."""
    last = "none was saved before" if last_good is None else f"the last good checkpoint is step {last_good}"
    met, now = ("the disk was full before all was written: ", " now that the rest is removed") if begun else ("", "")
    return NotSaved(
        f"Saving step {step} in {folder}",
        f"{met}it needs {quantity(bytes_needed)}B, and {quantity(free(folder))}B are free{now}; {last}",
        "Free some space (`llamax inspect` shows what each checkpoint takes), or start with a larger disk.",
    )


def needed(leaves: Iterable[Any]) -> int:
    """Bytes that arrays (anything with shape and dtype) take as a checkpoint, uncompressed, with a margin."""
    arrays = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
    return math.ceil(arrays * (1 + MARGIN)) + MARGIN_BYTES


def free(folder: Path) -> int:
    """Bytes that can be written to the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that of a full disk or a used-up quota."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(text in str(error) for text in FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def remove(folder: Path, attempts: int = 20) -> None:
    """Removes a folder that a failed save may still be adding files to."""
    for attempt in range(attempts):
        try:
            return shutil.rmtree(folder)
        except FileNotFoundError:
            if not folder.exists():
                return
        except OSError:
            if attempt == attempts - 1:
                raise
        time.sleep(0.1)
