"""The training loop: next batch -> step -> hooks. It knows nothing of what the hooks do.

The data iterator stands right after the batch of the step just taken whenever hooks run, so a checkpoint written by one
of them resumes with the next batch.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from llamax.batch import Batch
from llamax.observe.goodput import Ledger
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


def due(event: Event, every: int) -> bool:
    """Every `every` steps (0: never), and after the last one."""
    return event.last or (every > 0 and event.step % every == 0)


def fetched(event: Event, every: Sequence[int]) -> bool:
    """Whether the results since the last such step are fetched, logged and judged.

    After the first step, so that compiling it does not spoil the speed of those after it; every so many steps; after
    the last one. Where a checkpoint is written is among them: a run that goes on from it logs and judges by the same
    windows as one that was never interrupted, and no checkpoint lies beyond a step that nobody has looked at.
    """
    return event.step == 1 or any(due(event, n) for n in every)


class RollBack(Exception):
    """Asks the loop to go back to the checkpoint of step `to`, and on with the batches that no step has seen."""

    def __init__(self, to: int, bad: int, now: int):
        super().__init__(f"step {bad} was bad: back from step {now} to step {to}")
        self.to, self.bad, self.now = to, bad, now


class Stopped(Exception):
    """A stop was asked for, and what was under way had better be left than waited for."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class StopRequest:
    """Ctrl-C or SIGTERM asks the loop to stop after the step under way; a second Ctrl-C interrupts at once.

    `at_once`: while there is nothing to save yet, a signal raises Stopped wherever the main thread is.
    `agree`: of several processes; gives, at the same call in all, the largest number that one of them gave (0: none).
    They stop together then, whichever of them got the signal.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.signal: int | None = None  # the first one received, or agreed on
        self.at_once = True
        self._agree, self._agreed = agree, 0

    @property
    def asked(self) -> bool:
        return self.signal is not None if self._agree is None else self._agreed > 0

    def check(self) -> None:
        """Raises Stopped if a stop was asked for: called where something long can be left, by all processes."""
        if self._agree is not None and not self._agreed:
            self._agreed = self._agree(self.signal or 0)
            self.signal = self._agreed or self.signal
        if self.asked:
            raise Stopped(self.signal or signal.SIGTERM)

    def check_alone(self) -> None:
        """The same where processes cannot agree, each being somewhere else: one of several goes on."""
        if self._agree is None:
            self.check()

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
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
            if self.at_once:
                raise Stopped(number)


def next_batch(batches: Any, stop: StopRequest) -> Batch:
    """Stopped instead of an error if a stop was asked for: a signal to the whole group may have ended the loaders."""
    try:
        return next(batches)
    except Exception:
        stop.check_alone()
        raise


def fit(
    state: State,
    step: Callable[[State, Batch], tuple[State, Metrics]],
    batches: Any,
    *,
    first: int,
    steps: int,
    ledger: Ledger,
    stop: StopRequest,
    hooks: Sequence[Hook],
    leave: Callable[[int, State], None],
    go_back: Callable[[RollBack], State],
) -> tuple[State, bool]:
    """Takes the steps `first` + 1 ... `steps`; returns the state, and whether all was done (not stopped before).

    Args:
      step: may raise Stopped instead of taking the step.
      batches: a Grain iterator.
      leave: what has to be kept of the state after a step, when a stop leaves no time for the hooks.
      go_back: the state that a RollBack asks for.
    """
    number = first
    ledger.enter("step")
    # Nothing but batches, metrics and checkpoints crosses between host and devices, and each of them by name.
    with jax.transfer_guard("disallow"):
        while number < steps:
            place = batches.get_state()
            try:
                stop.check()
                with ledger.during("data"):
                    batch = next_batch(batches, stop)
                state, metrics = step(state, batch)
            except Stopped:  # before the step was taken
                if number > first:
                    batches.set_state(place)
                    leave(number, state)
                return state, False
            number += 1
            event = Event(number, number == steps or stop.asked, state, batch, metrics)
            back = None
            try:
                for hook in hooks:
                    hook(event)
            except RollBack as asked:
                back = asked.with_traceback(None)  # its frames hold the state
            except Stopped:  # by an evaluation
                leave(number, state)
                return state, False
            if back is not None:
                if stop.asked:  # the checkpoint is from before the bad step: whoever goes on comes here again
                    return state, False
                del state, event, metrics  # there may be no room for two
                with ledger.during("roll_back"):
                    state = go_back(back)
                    number = int(jax.device_get(state.step))
                continue
            if event.last:
                return state, number == steps
    return state, True
