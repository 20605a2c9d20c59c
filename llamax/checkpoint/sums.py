"""Whether a checkpoint is still what was written: a sum for each file, the check, and setting aside what fails it.

FOLDER/STEP/checksums.json is written before the step's folder takes its name, so every whole checkpoint has one:

    {"files": {"params/d/0123abc": {"bytes": 10, "sha256": "..."}, ...}, "sha256": "..."}

The last sum is of the others, so a damaged checksums.json is noticed too. No jax: it runs before a start, and for
`llamax inspect`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
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

Progress = Callable[[int], Any]  # is told how many bytes more were read


# ------------------------------------------------------------------------------------------------- sums of one folder


def write(step_folder: Path) -> None:
    """Writes the sums of all files below `step_folder`, to the disk itself."""
    paths = [path for path in files(step_folder) if path != SUMS]
    with _pool() as pool:
        digests = pool.map(lambda path: _digest(step_folder / path), paths)
        sums = {path: {"bytes": n, "sha256": digest} for path, (n, digest) in zip(paths, digests, strict=True)}
    with (step_folder / SUMS).open("w") as file:
        file.write(_render(sums))
        file.flush()
        os.fsync(file.fileno())


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
