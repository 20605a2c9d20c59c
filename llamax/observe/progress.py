"""The live line of a run: step, loss, tokens/s, MFU, data wait, time left.

On a terminal it is one line that renews itself below the log; elsewhere (CI, a redirected output) a plain line for
each logged step.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Live

from llamax.observe.log import CONSOLE, is_terminal

T = TypeVar("T")


class Progress:
    """The line of a run from step `start` to step `steps`; a context manager."""

    def __init__(self, steps: int, start: int = 0, shown: bool = True):
        """`shown` False: not a word (another process says it)."""
        self._steps, self._start, self._shown = steps, start, shown
        self._values: Mapping[str, float] = {}
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._shown and is_terminal():
            columns = (BarColumn(bar_width=20), TextColumn("{task.fields[line]}", markup=False))
            self._live = Live(*columns, console=CONSOLE, refresh_per_second=4)
            line = "compiling the first step"
            self._task = self._live.add_task("train", total=self._steps, completed=self._start, line=line)
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, step: int) -> None:
        """After every step: moves the bar; needs nothing from the device."""
        if self._live is not None and self._values:
            self._live.update(self._task, completed=step, line=line(step, self._steps, self._values))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Every `log_every_steps`: renews loss and speed, or prints a plain line."""
        self._values = values
        if self._live is None and self._shown:
            print(line(step, self._steps, values), flush=True)
        self.step(step)


LEARNT = ("preference", "reward", "next_token")  # the first of them that a run has is what it is about


def line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """One line of text; what `values` lacks is left out.

    Reads the loss that is learnt (loss/preference, loss/reward or loss/next_token), how often the better answer is
    preferred, speed/tokens_per_s, speed/mfu, speed/data_wait and speed/step_s (for the time left).
    """
    learnt = next((f"loss/{name}" for name in LEARNT if f"loss/{name}" in values), "")
    parts = [f"step {step:{len(str(steps))}d}/{steps}"]
    for name, show in (
        (learnt, lambda x: f"loss {x:.4f}"),
        (f"preference/{'reward_' * (learnt == 'loss/reward')}accuracy", lambda x: f"preferred {x:.0%}"),
        ("speed/tokens_per_s", lambda x: f"{quantity(x)} tokens/s"),
        ("speed/mfu", lambda x: f"MFU {x:.1%}"),
        ("speed/data_wait", lambda x: f"data wait {x:.1%}"),
        ("speed/step_s", lambda x: f"ETA {duration(x * (steps - step))}"),
    ):
        if name in values:
            parts.append(show(values[name]))
    return "  ".join(parts)


def quantity(x: float) -> str:
    """12345.0 as "12.3k"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= size:
            return f"{x / size:.1f}{unit}"
    return f"{x:.0f}"


def size(n_bytes: float) -> str:
    """1.5 GiB"""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.4g} TiB"


def duration(seconds: float) -> str:
    """3725 s as "1:02:05", 65 s as "1:05", more than two days as "3d 4h"."""
    if not math.isfinite(seconds):
        return "?"
    s = round(max(seconds, 0))
    if s >= 172_800:
        return f"{s // 86_400}d {s % 86_400 // 3600}h"
    hours, minutes = s // 3600, s % 3600 // 60
    return f"{hours}:{minutes:02d}:{s % 60:02d}" if hours else f"{minutes}:{s % 60:02d}"


@contextlib.contextmanager
def transfer(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes: yields a function that is told how many more are done, from any thread. Elsewhere than on a
    terminal one plain line at the end."""
    start = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn())
    with Live(*columns, TimeRemainingColumn(), console=CONSOLE, transient=True, disable=not is_terminal()) as live:
        task = live.add_task(description, total=total)
        yield lambda n: live.advance(task, n)
    print(f"{description}: {quantity(total)}B in {duration(time.monotonic() - start)}", flush=True)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields `items`, showing how far it is: a bar on a terminal, elsewhere one plain line at the end."""
    if total is None and isinstance(items, Collection):
        total = len(items)
    start, done = time.monotonic(), 0
    if is_terminal():
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.completed}"))
        with Live(*columns, TimeElapsedColumn(), console=CONSOLE, transient=True) as live:
            yield from live.track(items, total=total, description=description)
        return
    for item in items:
        yield item
        done += 1
    print(f"{description}: {done} in {duration(time.monotonic() - start)}", flush=True)


@contextlib.contextmanager
def waiting(description: str) -> Iterator[None]:
    """Shows that something of unknown length goes on, on stderr: a spinner with its time on a terminal, else a line at
    the start. What the work prints on stdout stays as it is."""
    start = time.monotonic()
    console = Console(stderr=True, highlight=False)
    if not sys.stderr.isatty():
        print(f"{description} ...", file=sys.stderr, flush=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Live(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as live:
        live.add_task(description, total=None)
        yield
    print(f"{description}: {duration(time.monotonic() - start)}", file=sys.stderr, flush=True)
