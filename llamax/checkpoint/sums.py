"""Whether a checkpoint is still what was written: a sum for each file, the check, and setting aside what fails it.

FOLDER/STEP/checksums.json is written before the step's folder takes its name, so every whole checkpoint has one:

    {"files": {"params/d/0123abc": {"bytes": 10, "sha256": "..."}, ...}, "sha256": "..."}

The last sum is of the others, so a damaged checksums.json is noticed too. No jax: it runs before a start, and for
`llamax inspect`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llamax.config import ConfigError

logger = logging.getLogger("llamax")
SUMS = "checksums.json"
NO_SUMS = f"no {SUMS}"  # the whole problem of a checkpoint of before there were sums, or of one that lost them
UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of Orbax's folders until they are complete
DAMAGED = "damaged"
SHOWN = 4  # problems that a message names
CHUNK = 4 * 2**20  # bytes read at once
REST_S = 0.3  # seconds without a write after which a file may be whole

Progress = Callable[[int], Any]  # is told how many bytes more were read


# ------------------------------------------------------------------------------------------------- sums of one folder


def write(step_folder: Path, known: Mapping[str, tuple[int, str]] | None = None) -> None:
    """Writes the sums of all files below `step_folder`, to the disk itself. `known`: those that `Ahead` has taken."""
    found = files(step_folder)
    paths = [path for path in found if path != SUMS]

    def digest(path: str) -> tuple[int, str]:
        taken = (known or {}).get(Path(path).name)
        return taken if taken is not None and taken[0] == found[path] else _digest(step_folder / path)

    with _pool() as pool:
        sums = {
            path: {"bytes": n, "sha256": text} for path, (n, text) in zip(paths, pool.map(digest, paths), strict=True)
        }
    with (step_folder / SUMS).open("w") as file:
        file.write(_render(sums))
        file.flush()
        os.fsync(file.fileno())


class Ahead:
    """Takes the sums of a save's data files while others are being written.

    Orbax's data files (in folders named `d`) have random names and grow at their end until they are whole. One that has
    rested for a moment is summed, and the sum counts only if the file still has the same size at the end.
    """

    def __init__(self, folder: Path):
        self.known: dict[str, tuple[int, str]] = {}  # by the file's own name: bytes, SHA-256
        self._folder, self._stop = folder, threading.Event()
        self._thread = threading.Thread(target=self._run, name="checksums", daemon=True)

    def __enter__(self) -> Ahead:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends; a file in the middle is left to the end."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            for parent, _, names in os.walk(self._folder):
                for name in names if Path(parent).name == "d" else ():
                    with contextlib.suppress(OSError):  # renamed with its folder; or it is time to stop
                        self._look(Path(parent, name))

    def _look(self, path: Path) -> None:
        self._go_on(0)
        status = path.stat()
        if time.time() - status.st_mtime > REST_S and self.known.get(path.name, (-1,))[0] != status.st_size:
            self.known[path.name] = _digest(path, self._go_on)

    def _go_on(self, _: int) -> None:
        if self._stop.is_set():
            raise InterruptedError


def check(step_folder: Path, progress: Progress = lambda n: None) -> list[str]:
    """One line for each file that is missing, cut short or longer, changed, unreadable, or not of the checkpoint.

    Sizes are compared first, so what is cut short costs no reading. An empty list is a sound checkpoint.
    """
    try:
        sums = _parse((step_folder / SUMS).read_bytes())
    except FileNotFoundError:
        return [NO_SUMS]
    except OSError as error:
        return [f"{SUMS} cannot be read: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{SUMS} changed"]
    found = files(step_folder)
    problems = [f"{path} missing" for path in sums.keys() - found]
    problems += [f"{path} unknown" for path in found.keys() - sums.keys() - {SUMS}]
    whole = []
    for path in sums.keys() & found.keys():
        was, now = sums[path]["bytes"], found[path]
        if now == was:
            whole.append(path)
        else:
            problems.append(f"{path} {'truncated' if now < was else 'grown'} {was} -> {now} bytes")

    def problem(path: str) -> str | None:
        try:
            _, digest = _digest(step_folder / path, progress)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        return None if digest == sums[path]["sha256"] else f"{path} changed"

    with _pool() as pool:
        problems += [line for line in pool.map(problem, sorted(whole)) if line]
    return sorted(problems)


def files(folder: Path) -> dict[str, int]:
    """All files below a folder, as relative path -> bytes."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            found[path.relative_to(folder).as_posix()] = path.lstat().st_size
    return dict(sorted(found.items()))


def whole(step_folder: Path) -> str:
    """The sum of a checkpoint's sums: the same for the same files."""
    return json.loads((step_folder / SUMS).read_text())["sha256"]


def summary(problems: list[str]) -> str:
    """The first problems in one line."""
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "checksums")  # hashing and reading release the interpreter


def _digest(path: Path, progress: Progress = lambda n: None) -> tuple[int, str]:
    """(bytes, SHA-256 in hex) of a file."""
    digest, total, buffer = hashlib.sha256(), 0, memoryview(bytearray(min(CHUNK, max(1, path.stat().st_size))))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
            progress(n)
            total += n
    return total, digest.hexdigest()


def _render(sums: Mapping[str, Any]) -> str:
    whole = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": sums, "sha256": whole}, indent=1, sort_keys=True) + "\n"


def _parse(text: bytes) -> dict[str, Any]:
    """The inverse of `_render`; ValueError for anything that it would not have written."""
    sums = json.loads(text)["files"]
    if _render(sums).encode() != text:
        raise ValueError("not as it was written")
    return sums


# ---------------------------------------------------------------------------------------- the checkpoints of a folder


def steps(folder: Path) -> list[int]:
    """The steps that have a folder of their own, in order; nothing is said of their health."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def set_aside(step_folder: Path, why: str) -> Path:
    """Renames STEP to STEP.WHY, or STEP.WHY-2 and so on where that is taken: Orbax sees it no more, a person does.

    Raises:
      ConfigError: it cannot be renamed.
    """
    names = (f"{step_folder.name}.{why}{n}" for n in ("", *(f"-{n}" for n in range(2, 1_000_000))))
    to = next(to for to in map(step_folder.with_name, names) if not to.exists())
    try:
        return step_folder.rename(to)
    except OSError as error:
        asked = f"Setting {step_folder} aside as {to.name}"
        raise ConfigError(asked, f"it cannot be renamed: {error}", "Rename or delete it by hand.") from error


def newest_sound(folder: Path, *, rename: bool) -> int:
    """The newest step whose files are what was written; 0 if there is no checkpoint at all.

    Those newer than it are damaged: each is warned of by name, and set aside if `rename`.

    Raises:
      ConfigError: there are only damaged ones, now or from an earlier start: to begin at step 0 without a word would
        throw away what was learnt.
    """
    for step in reversed(steps(folder)):
        problems = check(folder / str(step))
        if not problems:
            return step
        what = f"the checkpoint of step {step} is damaged ({summary(problems)})"
        if rename:
            to = set_aside(folder / str(step), DAMAGED)
            logger.warning("%s: set aside as %s; taking the one before", what, to)
        else:
            logger.warning("%s: %s is left as it is; taking the one before", what, folder / str(step))
    damaged = sorted(path.name for path in folder.glob(f"*.{DAMAGED}*")) or [str(step) for step in steps(folder)]
    if damaged:
        raise ConfigError(
            f"A sound checkpoint in {folder}",
            f"all that are there are damaged ({', '.join(damaged)})",
            "Bring one back from a copy, or move these away to start afresh. `llamax inspect` says what is wrong.",
        )
    return 0


def is_unfinished(path: Path) -> bool:
    """Whether a save is writing this folder, or was killed while it did."""
    return UNFINISHED in path.name
