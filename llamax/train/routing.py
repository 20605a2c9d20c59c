"""What every step logs of its routing: a line of `experts.jsonl`; curves, and heat maps of the experts' loads."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import jax
import numpy as np

from llamax import config
from llamax.losses.router import Stats
from llamax.observe import metrics
from llamax.observe.log import MetricsFile
from llamax.observe.tensorboard import TensorBoard

MAP_EVERY = 10  # fetches between two heat maps
REMEMBERED = 600  # steps in the heat map over time, evenly spread once there are more
DIGITS = 4  # of a share in experts.jsonl


@dataclass
class RoutingLog:
    """Keeps the steps' statistics on the device until `fetch`."""

    model: config.Model
    file: MetricsFile
    board: TensorBoard
    steps: list[tuple[int, Stats]] = field(default_factory=list)
    history: deque[tuple[int, np.ndarray]] = field(default_factory=deque)  # (step, load [L, E])
    fetched: int = 0

    def __post_init__(self) -> None:
        self.layers = [i for i, kind in enumerate(self.model.layers) if kind.endswith("+moe")]
        for line in self.file.read():  # of the starts before
            self._remember(line["step"], np.array(line["load"], np.float64))

    def add(self, step: int, stats: Stats) -> None:
        self.steps.append((step, stats))

    def rewind(self, step: int) -> None:
        """The run has gone back to step `step`."""
        self.steps = []
        self.file.rewind(step)
        self.history = deque(item for item in self.history if item[0] <= step)

    def fetch(self, last: bool) -> dict[str, float]:
        """Curves over the steps since the last fetch; writes a line for each of them, and now and then a picture."""
        if not self.steps:
            return {}
        got, self.steps = jax.device_get(self.steps), []
        for step, stats in got:
            experts = metrics.experts(stats.loads, stats.squares, self.model.top_k)
            self.file.write(step, {name: np.round(x, DIGITS).tolist() for name, x in experts._asdict().items()})
            self._remember(step, experts.load)
        loads, squares = (np.sum(parts, axis=0) for parts in zip(*(stats for _, stats in got), strict=True))
        window = metrics.experts(loads, squares, self.model.top_k)
        if self.fetched % MAP_EVERY == 0 or last:
            self.board.expert_loads(window.load, self.layers, got[-1][0])
            steps, history = zip(*self.history, strict=True)
            self.board.expert_loads_over_time(np.array(history), steps, self.layers)
        self.fetched += 1
        return metrics.expert_scalars(window, self.layers)

    def _remember(self, step: int, load_LE: np.ndarray) -> None:
        self.history.append((step, load_LE))
        if len(self.history) > REMEMBERED:  # every second one of what is there
            self.history = deque(list(self.history)[::2])
