"""What happens around the steps: logging, checkpoints, evaluations, and the halt of a run that only produces NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from llamax import config
from llamax.checkpoint.manager import Checkpoints
from llamax.config import ConfigError
from llamax.data.sources import SKIP_REASONS
from llamax.evals import EVALS, Report
from llamax.evals.report import Context
from llamax.model import count
from llamax.observe import metrics
from llamax.observe.log import MetricsFile
from llamax.observe.progress import Progress
from llamax.observe.tensorboard import TensorBoard
from llamax.train.loop import Event

LOAD_EVERY = 10  # logged steps between two heat maps of the experts


class Diverged(ConfigError):
    """Too many non-finite steps in a row."""

    exit_code = 3


def due(event: Event, every: int) -> bool:
    """Every `every` steps (0: never), and after the last one."""
    return event.last or (every > 0 and event.step % every == 0)


@dataclass
class Log:
    """Fetches what the steps returned, every `log_every_steps`, for the live line, metrics.jsonl and TensorBoard."""

    run: config.Run
    langs: list[str]  # of the sources, in the order of their ids
    patch_id: int
    clock: metrics.Clock
    progress: Progress
    file: MetricsFile
    board: TensorBoard
    last_good: Callable[[int], str]  # says which checkpoint before a step to go back to
    left_out: Callable[[], Mapping[str, Mapping[str, int]]]  # documents skipped so far: source -> reason -> count
    warn: Callable[[str], None]
    window: metrics.Window = field(default_factory=metrics.Window)
    bad_in_row: list[jax.Array] = field(default_factory=list)  # after each step since the last log
    steps: int = 0
    tokens: int = 0  # without padding
    flops: float = 0.0
    logged: int = 0
    warned: set[str] = field(default_factory=set)  # "source/reason" of skips that were mentioned

    def __call__(self, event: Event) -> None:
        got = event.metrics
        values = {"loss": got.by_source, "optim/grad_norm": got.grad_norm, "optim/lr": got.lr}
        values |= {f"loss/{name}": term for name, term in got.terms.items()}
        values |= {"loads": got.loads} if got.loads is not None else {}
        self.window.add(values)
        self.bad_in_row.append(got.bad_in_row)
        self.steps += 1
        self.tokens += int(np.count_nonzero(event.batch.segment_ids))
        self.flops += count.step_flops(self.run, self.tiles(event))
        self.progress.step(event.step)
        # The first step of a process stands alone: compiling it must not spoil the speed of those after it.
        if not self.logged or due(event, self.run.train.log_every_steps):
            self.log(event)

    def tiles(self, event: Event) -> int:
        """Picture tiles in the batch; empty slots are work, but not the model's."""
        vision = self.run.model.vision
        if vision is None or not event.batch.tiles.shape[1]:
            return 0
        return int((event.batch.tokens == self.patch_id).sum()) // vision.tokens_per_tile

    def log(self, event: Event) -> None:
        values = self.window.fetch()
        shown = metrics.scalars({name: value for name, value in values.items() if name not in ("loss", "loads")})
        shown |= metrics.by_source("loss", values["loss"], sorted(self.run.data.sources), self.langs)
        layers = [i for i, kind in enumerate(self.run.model.layers) if kind.endswith("moe")]
        if "loads" in values:
            shown |= metrics.expert_load(values["loads"], layers)
            if self.logged % LOAD_EVERY == 0 or event.last:
                self.board.expert_loads(values["loads"], layers, event.step)
        weights = dataclasses.asdict(self.run.losses)
        shown["loss/total"] = sum(weight * shown.get(f"loss/{name}", 0.0) for name, weight in weights.items())
        shown["steps/skipped"] = float(event.metrics.skipped)
        shown |= self.documents_left_out(last=event.last)
        shown |= self.clock.lap(steps=self.steps, tokens=self.tokens, flops=self.flops)
        self.progress.log(event.step, shown)
        self.file.write(event.step, shown)
        self.board.scalars(shown, event.step)
        self.steps, self.tokens, self.flops, self.logged = 0, 0, 0.0, self.logged + 1
        self.check_finite(event.step)

    def check_finite(self, step: int) -> None:
        """Raises Diverged if too many steps in a row, of those up to `step` and since the last call, were bad."""
        bad_in_row, self.bad_in_row = [int(n) for n in jax.device_get(self.bad_in_row)], []
        bad = max(bad_in_row)
        if bad >= self.run.train.max_bad_steps:
            last = step - len(bad_in_row) + 1 + bad_in_row.index(bad)
            raise Diverged(
                f"--config.train.max_bad_steps={self.run.train.max_bad_steps}",
                f"{bad} steps in a row, {last - bad + 1} to {last}, were not finite",
                # The step before the first bad one gave the parameters that made it bad.
                self.last_good(last - bad),
            )

    def documents_left_out(self, last: bool) -> dict[str, float]:
        """Counts for the log; a warning at a reason's first document of a source, and with the total at the end."""
        counts = {f"{source}/{why}": n for source, of in self.left_out().items() for why, n in of.items()}
        for name, n in counts.items():
            if last or name not in self.warned:
                source, why = name.split("/")
                self.warn(f"{n} documents of {source} left out so far: {SKIP_REASONS[why]}")
        self.warned |= counts.keys()
        return {f"data/left_out/{name}": float(n) for name, n in counts.items()}


@dataclass
class Save:
    """A checkpoint every `every_steps` and at the end, written while training goes on; none after a non-finite step.

    What made a step non-finite may be in the parameters already: a stop then goes back to the checkpoint before.
    """

    checkpoints: Checkpoints
    every: int
    batches: Any  # the data iterator, which stands after the last batch taken
    clock: metrics.Clock

    def __call__(self, event: Event) -> None:
        if not due(event, self.every):
            return
        state = event.state
        jax.block_until_ready(state.bad_in_row)  # else waiting for the step would count as saving
        with self.clock.aside():
            if int(state.bad_in_row):
                return
            self.checkpoints.save(
                event.step,
                params=state.params,
                router_bias=state.router_bias,
                opt=state.opt,
                rng={"key": state.rng},
                data_iterator=self.batches,
                extra={"step": event.step, "bad_in_row": int(state.bad_in_row), "skipped": int(state.skipped)},
            )


@dataclass
class Evaluate:
    """The run's evaluations, each at its own pace and all of them after the last step of a run that was not stopped."""

    run: config.Run
    context: Context  # without weights
    clock: metrics.Clock
    file: MetricsFile
    board: TensorBoard
    say: Callable[[str], None]
    reports: dict[str, Report] = field(default_factory=dict)  # the newest of each

    def __call__(self, event: Event) -> None:
        names = [name for name, cfg in self.run.evals.items() if self.wanted(event, cfg.every_steps)]
        if not names:
            return
        jax.block_until_ready(event.state.params)  # else waiting for the step would count as evaluation
        with self.clock.aside():
            for name in names:
                self.evaluate(name, event.step, event.state.params, event.state.router_bias)

    def all(self, step: int, params: Any, router_bias: Any) -> None:
        """Every evaluation: a run that has taken all its steps is started once more."""
        for name in self.run.evals:
            self.evaluate(name, step, params, router_bias)

    def wanted(self, event: Event, every: int) -> bool:
        return event.step == self.run.train.steps or (every > 0 and event.step % every == 0)

    def evaluate(self, name: str, step: int, params: Any, router_bias: Any) -> None:
        cfg = self.run.evals[name]
        self.say(f"evaluating {name}")
        report = EVALS[cfg.kind](self.context._replace(params=params, router_bias=router_bias), cfg)
        self.reports[name] = report
        values = {f"eval/{name}/{key}": value for key, value in report.scalars.items()}
        self.file.write(step, values)
        self.board.scalars(values, step)
        if report.pictures:
            images, captions = zip(*report.pictures, strict=True)
            self.board.pictures(f"eval/{name}", [np.asarray(i) for i in images], captions, step)


def table(reports: Mapping[str, Report]) -> list[tuple[str, str, str, str]]:
    """(evaluation, what, figure, compared with) of every report."""
    return [(name, *row) for name, report in reports.items() for row in report.rows]
