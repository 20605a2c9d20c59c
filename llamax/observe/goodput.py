"""Where a run's wall time goes, over all of its starts: the ledger behind `goodput.json`.

At any moment the process is in one phase, so the phases' seconds sum to the wall time:

    start       until the loop: imports of jax, reading data, restoring
    compile     waiting for a program to be compiled
    data        waiting for the next batch (the devices may still be busy meanwhile: an upper bound of their idleness)
    step        taking steps, and waiting for them; goodput is this share
    save        what a checkpoint keeps the loop waiting for
    evaluate
    roll_back   going back to a checkpoint, and the steps that were lost by that or by a death before the next save
    idle        after the loop, and between the death of one start and the next
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamax.observe.provenance import write_whole

WRITE_EVERY_S = 20.0
MARKS = 64  # newest safe steps that a start keeps in mind

PHASES = ("start", "compile", "data", "step", "save", "evaluate", "roll_back", "idle")
FACTS = {"began", "ended", "reached", "seconds", "stepping_at"}  # of a start in `goodput.json`


class Ledger:
    """The seconds of one start of a run, by phase. `began`: when the process did, by `time.time()`."""

    def __init__(self, began: float | None = None):
        now = time.time()
        self.began = now if began is None else began
        self.phase = "start"
        self.entered = time.perf_counter() - (now - self.began)  # when this phase began, or last gave a sign of life
        self._counted = self.entered
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._stepping_at: dict[int, float] = {}  # seconds of `step` when that step was saved, or begun from
        self._lock = threading.Lock()  # the watchdog reads from another thread

    def enter(self, phase: str) -> str:
        """Begins a phase; returns the one that ends."""
        assert phase in PHASES, phase
        with self._lock:
            now = time.perf_counter()
            self._seconds[self.phase] += now - self._counted
            self._counted = self.entered = now
            ended, self.phase = self.phase, phase
        return ended

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase inside another one."""
        outer = self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def seconds(self) -> dict[str, float]:
        """By phase, up to now."""
        with self._lock:
            running = time.perf_counter() - self._counted
            return self._seconds | {self.phase: self._seconds[self.phase] + running}

    def wall(self) -> float:
        """Seconds since the process began."""
        return time.time() - self.began

    def mark(self, step: int) -> None:
        """Step `step` is safe: saved, or restored from."""
        self._stepping_at[step] = self.seconds()["step"]
        self._stepping_at = dict(list(self._stepping_at.items())[-MARKS:])

    def lose_steps_after(self, step: int) -> None:
        """The run goes back to step `step`: what was spent on steps since then is lost."""
        self.enter(self.phase)
        lost = self._seconds["step"] - self._stepping_at.get(step, 0.0)
        self._seconds["step"] -= lost
        self._seconds["roll_back"] += lost
        self._stepping_at = {s: seconds for s, seconds in self._stepping_at.items() if s <= step}

    def record(self, step: int) -> dict[str, Any]:
        """What `goodput.json` holds of this start; `step`: the last one taken."""
        return {
            "began": self.began,
            "ended": time.time(),
            "reached": step,
            "seconds": self.seconds(),
            "stepping_at": self._stepping_at,
        }


class Goodput:
    """All starts of a run: those before, read from `goodput.json`, and the present one, written to it."""

    def __init__(self, path: str | Path, ledger: Ledger, first: int, written: bool = True):
        """`first`: the step that this start goes on from; what earlier ones did beyond it is lost. `written` False:
        `path` is only read (another process writes it)."""
        self._writes = written
        self.path, self.ledger, self.reached = Path(path), ledger, first  # reached: the last step taken
        self.before = [_lose(start, first) for start in self._read()]
        self._written = -math.inf
        ledger.mark(first)
        self.write()

    def _read(self) -> list[dict[str, Any]]:
        try:
            starts = json.loads(self.path.read_text())["starts"]
            return [start for start in starts if start["seconds"].keys() == set(PHASES) and start.keys() >= FACTS]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []  # a figure for people; a run does not stop for it

    def write(self, now: bool = False) -> None:
        """Unless that was a moment ago, and it need not be `now`."""
        if not self._writes or not now and time.monotonic() < self._written + WRITE_EVERY_S:
            return
        self._written = time.monotonic()
        starts = [*self.before, self.ledger.record(self.reached)]
        with contextlib.suppress(OSError):  # a full disk: a figure for people is no reason to stop
            write_whole(self.path, json.dumps({"seconds": self.total(), "starts": starts}, indent=1) + "\n")

    def total(self) -> dict[str, float]:
        """Seconds by phase since the first start began; they sum to the wall time."""
        present = self.ledger.seconds()
        out = {phase: present[phase] + sum(start["seconds"][phase] for start in self.before) for phase in PHASES}
        begins = [start["began"] for start in self.before[1:]] + [self.ledger.began]
        gaps = (begin - start["ended"] for begin, start in zip(begins, self.before, strict=False))
        out["idle"] += sum(max(gap, 0.0) for gap in gaps)
        return out

    def shares(self) -> dict[str, float]:
        """goodput/PHASE as shares of the wall time."""
        total = self.total()
        whole = max(sum(total.values()), 1e-9)
        return {f"goodput/{phase}": seconds / whole for phase, seconds in total.items()}


def _lose(start: dict[str, Any], first: int) -> dict[str, Any]:
    """An earlier start's record when the run goes on from step `first`."""
    if start["reached"] <= first:
        return start
    kept = [seconds for step, seconds in start["stepping_at"].items() if int(step) <= first]
    seconds = dict(start["seconds"])
    lost = seconds["step"] - max(kept, default=0.0)
    seconds["step"] -= lost
    seconds["roll_back"] += lost
    return start | {"seconds": seconds, "reached": first}
