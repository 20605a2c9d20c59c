"""What every step logs: a line of `steps.jsonl` with its loss and its routing; curves and heat maps of the experts.

    {"step": 7, "time": 1.7e9, "loss": 3.2, "grad_norm": 0.8, "applied": 1.0,
     "load": [[...E] ...L], "max_over_mean": [...L], "entropy": [...L], "dead": [...L], "logit_norm": [...L]}

and, with a capacity, "dropped": [...L]; for L MoE layers of E experts (metrics.Experts says what they are). A model
without experts has the first line alone.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from llamax import config
from llamax.losses.router import Stats
from llamax.observe import metrics
from llamax.observe.log import MetricsFile
from llamax.observe.tensorboard import TensorBoard
from llamax.train.loop import Event

MAP_EVERY = 10  # fetches between two heat maps
REMEMBERED = 600  # steps in the heat map over time: when there are more, every second one of them, and so on
RECALLED = 20_000  # lines that a start reads for it
DIGITS = 4  # of a share in steps.jsonl


class Note(NamedTuple):
    """Of one step; arrays on the device until they are fetched."""

    loss: jax.Array
    grad_norm: jax.Array
    bad_in_row: jax.Array
    routing: Stats | None


@dataclass
class StepLog:
    model: config.Model
    file: MetricsFile
    board: TensorBoard
    notes: list[tuple[int, Note]] = field(default_factory=list)
    history: list[tuple[int, np.ndarray]] = field(default_factory=list)  # (step, load [L, E]), oldest first
    stride: int = 1  # steps between two of them
    maps: int = 0  # fetches so far

    def __post_init__(self) -> None:
        self.layers = [i for i, kind in enumerate(self.model.layers) if kind.endswith("+moe")]
        if self.layers:
            self._recall()

    def add(self, event: Event) -> None:
        """Notes a step; waits for nothing."""
        got = event.metrics
        self.notes.append((event.step, Note(got.loss, got.grad_norm, got.bad_in_row, got.routing)))

    def rewind(self, step: int) -> None:
        """The run has gone back to step `step`."""
        self.notes = []
        self.file.rewind(step)
        self.history = [item for item in self.history if item[0] <= step]

    def fetch(self, last: bool) -> dict[str, float]:
        """Writes the lines of the steps since the last fetch; returns the experts' curves over all of them, and shows
        heat maps now and then."""
        notes, self.notes = jax.device_get(self.notes), []
        for step, note in notes:
            values = {"loss": note.loss, "grad_norm": note.grad_norm, "applied": not note.bad_in_row}
            if note.routing is not None:
                experts = self._experts(note.routing)
                self._remember(step, experts.load)
                values |= {name: np.round(x, DIGITS).tolist() for name, x in experts._asdict().items() if x is not None}
            self.file.write(step, values)
        stats = [note.routing for _, note in notes if note.routing is not None]
        if not stats:
            return {}
        window = self._experts(jax.tree.map(lambda *parts: np.sum(parts, axis=0), *stats))
        if self.maps % MAP_EVERY == 0 or last:
            self.board.expert_loads(window.load, self.layers, notes[-1][0])
        nth, rest = divmod(self.maps, MAP_EVERY)
        if last or (rest == 0 and nth & (nth - 1) == 0):  # rarer and rarer: 0, 1, 2, 4, 8, ... times MAP_EVERY
            steps, history = zip(*self.history, strict=True)
            self.board.expert_loads_over_time(np.array(history), steps, self.layers)
        self.maps += 1
        return metrics.expert_scalars(window, self.layers)

    def _experts(self, stats: Stats) -> metrics.Experts:
        return metrics.experts(stats.loads, stats.squares, self.model.top_k, stats.dropped)

    def _remember(self, step: int, load_LE: np.ndarray) -> None:
        if (step - 1) % self.stride:
            return
        self.history.append((step, load_LE))
        if len(self.history) > REMEMBERED:
            self.stride *= 2
            self.history = [item for item in self.history if (item[0] - 1) % self.stride == 0]

    def _recall(self) -> None:
        """What the starts before have written, thinned as it would have been; of a very long run, the newest part."""
        newest = next(self.file.backwards(), None)
        while newest and newest["step"] > REMEMBERED * self.stride:
            self.stride *= 2
        for line in itertools.islice(self.file.backwards(), RECALLED):
            if (line["step"] - 1) % self.stride == 0 and "load" in line:
                self.history.append((line["step"], np.array(line["load"], np.float64)))
        self.history.reverse()
