"""What a folder of checkpoints holds: steps, items, sizes, and whether each is still what was written. No jax."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import NamedTuple

from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
from rich.progress import Progress as Live
from rich.table import Table

from llamax.checkpoint import sums
from llamax.config import ConfigError
from llamax.observe.log import CONSOLE, is_terminal
from llamax.observe.progress import quantity
from llamax.observe.provenance import read

SOUND, DAMAGED = "sound", "damaged: "
SET_ASIDE = re.compile(r"(\d+)\.(.+)")  # what sums.set_aside makes


class Row(NamedTuple):
    """One folder below a checkpoints folder."""

    name: str
    step: int
    written: datetime.datetime
    items: dict[str, int]  # bytes of each, by name
    bytes: int
    health: str  # "sound", "damaged: ...", "no checksums", "set aside (WHY)", "unfinished"


def inspect(folder: str | Path) -> bool:
    """Prints a table of the checkpoints in `folder`, a workdir or what is in it; whether the newest is sound.

    Raises:
      ConfigError: there are no checkpoints.
    """
    workdir, checkpoints = places(Path(folder))
    rows = look(checkpoints)
    if not rows:
        change = "Give the --workdir of a run that has saved."
        raise ConfigError(f"Checkpoints in {folder}", "there are none", change)
    name = name_of_run(workdir)
    shown = Table(title=f"Checkpoints in {checkpoints}" + (f", a run of {name}" if name else ""), title_justify="left")
    for heading, justify in (
        ("step", "right"),
        ("written", "left"),
        ("items", "left"),
        ("total", "right"),
        ("health", "left"),
    ):
        shown.add_column(heading, justify=justify, no_wrap=heading != "items")
    for row in rows:
        items = ", ".join(f"{item} {size(n)}" for item, n in row.items.items())
        shown.add_row(
            row.name,
            f"{row.written:%Y-%m-%d %H:%M:%S}",
            items,
            size(row.bytes),
            row.health.split(":")[0],
            style=colour(row),
        )
    CONSOLE.print(shown)
    if beneath := what_adapters_stand_beside(workdir):
        CONSOLE.print(beneath, soft_wrap=True, markup=False)
    for row in rows:
        if row.health.startswith(DAMAGED):  # long names of files: below the table
            CONSOLE.print(f"Step {row.name} is {row.health}.", soft_wrap=True, markup=False)
    steps = [row for row in rows if row.name.isdecimal()]
    sound = max((row.step for row in steps if row.health == SOUND), default=None)
    CONSOLE.print("No checkpoint is sound." if sound is None else f"The newest sound checkpoint is step {sound}.")
    return bool(steps) and steps[-1].health == SOUND


def colour(row: Row) -> str:
    """Green for what a run would go on from, red for what it would not, dim for what it does not look at."""
    return ("green" if row.health == SOUND else "red") if row.name.isdecimal() else "dim"


def name_of_run(workdir: Path) -> str | None:
    """From run.json, if it is there and can be read."""
    try:
        run = read(workdir)
    except ConfigError:
        return None
    return run["config"].get("name") if run else None


def what_adapters_stand_beside(workdir: Path) -> str:
    """A line about what a run's checkpoints do not hold; "" if they hold all of the model."""
    try:
        run = read(workdir)
        tune, began = (run["config"].get("tune") or {}, run["init"]) if run else ({}, None)
    except (ConfigError, KeyError):
        return ""
    if not tune.get("lora_rank") or not began:
        return ""
    step = f", step {began['step']}" if began.get("step") else ""
    rank = tune["lora_rank"]
    return f"They hold adapters of rank {rank}, which stand beside the weights in {began['path']}{step}."


def places(folder: Path) -> tuple[Path, Path]:
    """(workdir, checkpoints folder), given either."""
    return (folder, folder / "checkpoints") if (folder / "checkpoints").is_dir() else (folder.parent, folder)


def look(checkpoints: Path) -> list[Row]:
    """A row for each checkpoint, whole or not, by step; hashes all files, with a bar on a terminal."""
    found = [path for path in checkpoints.glob("[0-9]*") if path.is_dir() and step_of(path) is not None]
    found.sort(key=lambda path: (step_of(path), not path.name.isdecimal(), path.name))
    to_read = [
        n for path in found if path.name.isdecimal() for file, n in sums.files(path).items() if file != sums.SUMS
    ]
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn())
    with Live(*columns, console=CONSOLE, transient=True, disable=not is_terminal()) as live:
        task = live.add_task("comparing files with their sums", total=sum(to_read))
        return [row(path, lambda n: live.advance(task, n)) for path in found]


def step_of(path: Path) -> int | None:
    """The step of a folder, by its name: 200, 200.damaged-2, 200.orbax-checkpoint-tmp."""
    first, _, _ = path.name.partition(".")
    return int(first) if first.isdecimal() else None


def row(path: Path, progress: sums.Progress) -> Row:
    sizes = sums.files(path)
    items: dict[str, int] = {}
    for name, n in sizes.items():
        item, _, inside = name.partition("/")
        if inside:
            items[item] = items.get(item, 0) + n
    return Row(path.name, step_of(path) or 0, written(path), items, sum(sizes.values()), state(path, progress))


def state(path: Path, progress: sums.Progress) -> str:
    if sums.is_unfinished(path):
        return "unfinished"
    aside = SET_ASIDE.fullmatch(path.name)
    if aside:
        return f"set aside ({aside[2]})"
    problems = sums.check(path, progress)
    if not problems:
        return SOUND
    return "no checksums" if problems == [sums.NO_SUMS] else f"{DAMAGED}{sums.summary(problems)}"


def written(path: Path) -> datetime.datetime:
    """When a checkpoint was complete, as Orbax noted it; else when its folder last changed. Local time."""
    try:
        when = json.loads((path / "_CHECKPOINT_METADATA").read_text())["commit_timestamp_nsecs"] / 1e9
    except (OSError, ValueError, KeyError, TypeError):
        when = path.stat().st_mtime
    return datetime.datetime.fromtimestamp(when)


def size(n: int) -> str:
    return f"{quantity(n)}B"
