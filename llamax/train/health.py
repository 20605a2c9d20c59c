"""The run's health, judged on the host: spikes and steps that are not finite, told, gone back from, or the end.

The step itself leaves a bad update out (train/step.py); what a run does beyond that is decided here, whenever the
steps' results are fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from llamax import config
from llamax.config import ConfigError
from llamax.train.loop import Event, RollBack, due


class Diverged(ConfigError):
    """Too many bad steps in a row, or too many roll-backs to one checkpoint."""

    exit_code = 3


class Sign(NamedTuple):
    """What one step tells of its health; arrays on the device until they are fetched."""

    loss: jax.Array
    finite: jax.Array
    spike: jax.Array
    bad_in_row: jax.Array


@dataclass
class Health:
    """Looks at the steps since the last log. Raises RollBack where the run asks for it, Diverged at its limits."""

    cfg: config.Health
    every: int  # steps between two looks: those of the log
    newest_before: Callable[[int], int | None]  # the newest checkpoint before a step
    where: str  # the checkpoints' folder
    warn: Callable[[str], None]
    signs: list[Sign] = field(default_factory=list)
    went_back: list[int] = field(default_factory=list)  # the checkpoints that the run rolled back to

    def __call__(self, event: Event) -> None:
        got = event.metrics
        self.signs.append(Sign(got.loss, got.finite, got.spike, got.bad_in_row))
        if due(event, self.every):
            self.look(event.step)

    def look(self, step: int) -> None:
        """At the steps up to `step`."""
        signs, self.signs = jax.device_get(self.signs), []
        numbered = list(enumerate(signs, start=step - len(signs) + 1))
        for number, sign in numbered:
            if sign.finite and sign.spike:
                done = "its update was left out" if self.cfg.on_spike != "warn" else "it was applied (health.on_spike)"
                self.warn(f"loss spike at step {number}: {sign.loss:.4f}; {done}")
        last, worst = max(numbered, key=lambda item: item[1].bad_in_row)
        if worst.bad_in_row >= self.cfg.max_bad_steps:
            self.diverged(int(worst.bad_in_row), last)
        first_bad = next((number for number, sign in numbered if self.goes_back(sign)), None)
        if first_bad is not None:
            self.roll_back(first_bad, step)

    def goes_back(self, sign: Sign) -> bool:
        on_spike, on_nonfinite = self.cfg.on_spike == "roll_back", self.cfg.on_nonfinite == "roll_back"
        return bool((on_nonfinite and not sign.finite) or (on_spike and sign.finite and sign.spike))

    def roll_back(self, first_bad: int, step: int) -> None:
        good = self.newest_before(first_bad)
        if good is None:
            self.warn(f"step {first_bad} was bad, and no checkpoint was saved before it to roll back to; going on")
            return
        if self.went_back.count(good) >= self.cfg.max_roll_backs:
            raise Diverged(
                f"--config.health.max_roll_backs={self.cfg.max_roll_backs}",
                f"step {first_bad} was bad again after as many roll-backs to step {good}",
                f"Look at the data, or lower --config.optim.peak_lr in another --workdir. {self.last_good(first_bad)}",
            )
        self.went_back.append(good)
        raise RollBack(good, first_bad, step)

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
