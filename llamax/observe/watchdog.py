"""A thread that notices when a run stands still, says in which phase, and writes down where every thread stands."""

from __future__ import annotations

import datetime
import faulthandler
import threading
import time
from collections.abc import Callable
from pathlib import Path

from llamax.observe.goodput import Ledger


class Watchdog:
    """Warns when the ledger's phase has not changed for `stall_s` seconds, and again after twice, four times as long.

    A context manager. It never ends the run: what stands still may be a compiler or a file system that takes long.
    """

    def __init__(self, ledger: Ledger, stall_s: float, workdir: str | Path, say: Callable[[str], None]):
        self._ledger, self._stall_s, self._folder, self._say = ledger, stall_s, Path(workdir), say
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        seen, limit = self._ledger.entered, self._stall_s
        while not self._done.wait(min(self._stall_s / 4, 5.0)):
            if self._ledger.entered != seen:
                seen, limit = self._ledger.entered, self._stall_s
            elif time.perf_counter() - seen > limit:
                self._report(time.perf_counter() - seen)
                limit *= 2

    def _report(self, seconds: float) -> None:
        phase, now = self._ledger.phase, datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S-%f")
        path = self._folder / f"stall-{now}.txt"
        try:
            with path.open("w") as file:
                file.write(f"{seconds:.0f} s without progress in phase {phase!r}. Stacks, newest call first:\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"where every thread stands is in {path}"
        except OSError as error:
            where = f"where every thread stands could not be written: {error}"
        self._say(f"no progress for {seconds:.0f} s in phase {phase!r} (health.stall_s={self._stall_s:g}); {where}")
