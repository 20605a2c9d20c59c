"""The run's health, judged on the host: spikes and steps that are not finite, told, gone back from, or the end.

The step itself leaves a bad update out (train/step.py); what a run does beyond that is decided here, whenever the
steps' results are fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from llamax import config
from llamax.config import ConfigError
from llamax.train.loop import Event, RollBack, fetched


class Diverged(ConfigError):
    """Too many bad steps in a row, or too many roll-backs without progress."""

    exit_code = 3


class Sign(NamedTuple):
    """What one step tells of its health; arrays on the device until they are fetched."""

    loss: jax.Array
    finite: jax.Array
    spike: jax.Array
    bad_in_row: jax.Array


@dataclass
class Health:
    """Looks at the steps since the last look. Raises RollBack where the run asks for it, Diverged at its limits."""

    cfg: config.Health
    every: Sequence[int]  # when it looks: loop.fetched
    newest_before: Callable[[int], int | None]  # the newest checkpoint before a step
    where: str  # the checkpoints' folder
    warn: Callable[[str], None]
    signs: list[Sign] = field(default_factory=list)
    went_back: list[int] = field(default_factory=list)  # to these checkpoints, since the run last made progress
    furthest: int = 0  # the step of the last roll-back

    def __call__(self, event: Event) -> None:
        got = event.metrics
        self.signs.append(Sign(got.loss, got.finite, got.spike, got.bad_in_row))
        if fetched(event, self.every):
            self.look(event.step)

    def look(self, step: int) -> None:
        """At the steps up to `step`."""
        signs, self.signs = jax.device_get(self.signs), []
        numbered = list(enumerate(signs, start=step - len(signs) + 1))
        self.tell([(number, float(sign.loss)) for number, sign in numbered if sign.finite and sign.spike])
        first_bad = next((number for number, sign in numbered if self.goes_back(sign)), None)
        if first_bad is not None:
            self.roll_back(first_bad, step)
        last, worst = max(numbered, key=lambda item: item[1].bad_in_row, default=(step, None))
        if worst is not None and worst.bad_in_row >= self.cfg.max_bad_steps:
            self.diverged(int(worst.bad_in_row), last)

    def tell(self, spikes: Sequence[tuple[int, float]]) -> None:
        """Of the spikes since the last look, in one line: a mixture that changes from step to step may have many."""
        if not spikes:
            return
        number, loss = max(spikes, key=lambda spike: spike[1])
        done = "left out" if self.cfg.on_spike != "warn" else "applied (health.on_spike)"
        more = f" (and {len(spikes) - 1} smaller ones since step {spikes[0][0]})" if len(spikes) > 1 else ""
        self.warn(f"loss spike at step {number}: {loss:.4f}{more}; {done}")

    def goes_back(self, sign: Sign) -> bool:
        on_spike, on_nonfinite = self.cfg.on_spike == "roll_back", self.cfg.on_nonfinite == "roll_back"
        return bool((on_nonfinite and not sign.finite) or (on_spike and sign.finite and sign.spike))

    def roll_back(self, first_bad: int, step: int) -> None:
        """To the newest checkpoint from before; where that did not help, to the one before that: it may be the ruin."""
        if first_bad > self.furthest:
            self.went_back = []
        self.furthest = max(self.furthest, step)
        good = self.newest_before(min([first_bad, *self.went_back]))
        if good is not None and len(self.went_back) < self.cfg.max_roll_backs:
            self.went_back.append(good)
            raise RollBack(good, first_bad, step)
        if self.went_back:
            limit = len(self.went_back) == self.cfg.max_roll_backs
            raise Diverged(
                f"--config.health.max_roll_backs={self.cfg.max_roll_backs}",
                f"step {first_bad} was bad again after roll-backs to {', '.join(map(str, self.went_back))}"
                + ("" if limit else ", and no checkpoint is older"),
                f"Look at the data, or lower --config.optim.peak_lr in another --workdir. {self.last_good(first_bad)}",
            )
        self.warn(f"step {first_bad} was bad, and no checkpoint was saved before it to roll back to; going on")

    def diverged(self, bad: int, last: int) -> None:
        raise Diverged(
            f"--config.health.max_bad_steps={self.cfg.max_bad_steps}",
            f"{bad} steps in a row, {last - bad + 1} to {last}, were not finite, or spikes",
            # The step before the first bad one gave the parameters that made it bad.
            f"{self.last_good(last - bad)} Look at the data, or start anew in another --workdir with a lower "
            "--config.optim.peak_lr.",
        )

    def last_good(self, before: int) -> str:
        good = self.newest_before(before)
        return f"The last good checkpoint is step {good} in {self.where}." if good else "None was saved before."
