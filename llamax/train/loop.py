"""The training loop: next batch -> step -> hooks. It knows nothing of what the hooks do.

The data iterator stands right after the batch of the step just taken whenever hooks run, so a checkpoint written by one
of them resumes with the next batch.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from llamax.batch import Batch
from llamax.observe.metrics import Clock
from llamax.train.state import State
from llamax.train.step import Metrics


class Event(NamedTuple):
    """What a hook sees after a step."""

    step: int  # steps taken so far
    last: bool  # the run ends after this one: all steps done, or a stop was asked for
    state: State
    batch: Batch  # on the host
    metrics: Metrics


Hook = Callable[[Event], None]


class StopRequest:
    """Ctrl-C or SIGTERM asks the loop to stop after the step under way; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopRequest:
        self._old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def fit(
    state: State,
    step: Callable[[State, Batch], tuple[State, Metrics]],
    batches: Iterator[Batch],
    *,
    first: int,
    steps: int,
    clock: Clock,
    hooks: Sequence[Hook],
) -> tuple[State, bool]:
    """Takes the steps `first` + 1 ... `steps`; returns the state, and whether all were taken (not stopped before)."""
    with StopRequest() as stop:
        for number in range(first + 1, steps + 1):
            with clock.waiting():
                batch = next(batches)
            state, metrics = step(state, batch)
            event = Event(number, number == steps or stop.asked, state, batch, metrics)
            for hook in hooks:
                hook(event)
            if event.last:
                return state, number == steps
    return state, True
