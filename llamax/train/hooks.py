"""What happens around the steps: logging, checkpoints, evaluations. (Health has a file of its own.)"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from llamax import config
from llamax.checkpoint.manager import Checkpoints
from llamax.config import ConfigError
from llamax.data import schedule
from llamax.data.sources import CUTS, SKIP_REASONS
from llamax.evals import EVALS, Report
from llamax.evals.report import Context
from llamax.model import count
from llamax.observe import metrics
from llamax.observe.goodput import Goodput, Ledger
from llamax.observe.log import MetricsFile
from llamax.observe.progress import Progress
from llamax.observe.tensorboard import TensorBoard
from llamax.parallel import processes
from llamax.train import blocks
from llamax.train.loop import Event, Stopped, due, fetched
from llamax.train.state import COUNTS, State
from llamax.train.step_log import StepLog


@dataclass
class Log:
    """Fetches what the steps returned, now and then, for the live line, metrics.jsonl and TensorBoard."""

    run: config.Run
    langs: list[str]  # of the sources, in the order of their ids
    patch_id: int
    clock: metrics.Clock
    goodput: Goodput
    progress: Progress
    file: MetricsFile
    board: TensorBoard
    each_step: StepLog
    left_out: Callable[[], Mapping[str, Mapping[str, int]]]  # documents skipped so far: source -> reason -> count
    cut: Callable[[], Mapping[str, Mapping[str, int]]]  # conversations cut so far: source -> how -> count
    warn: Callable[[str], None]
    every: Sequence[int]  # when it fetches: loop.fetched
    window: metrics.Window = field(default_factory=metrics.Window)
    steps: int = 0
    tokens: np.ndarray | int = 0  # of this process's rows, without padding, by source
    tiles: int = 0  # of this process's rows
    rows: int = 0  # of this process, in one batch
    warned: set[str] = field(default_factory=set)  # "source/reason" of skips that were mentioned

    def __call__(self, event: Event) -> None:
        got = event.metrics
        values = {"loss": got.by_source, "optim/grad_norm": got.grad_norm, "optim/lr": got.lr}
        values |= {f"loss/{name}": term for name, term in got.terms.items()}
        values |= {f"preference/{name}": value for name, value in (got.compared or {}).items()}
        self.window.add(values)
        self.each_step.add(event)
        self.steps += 1
        self.rows = len(event.batch.tokens)
        self.tokens = self.tokens + self.by_source(event)
        self.tiles += self.tiles_of(event)
        self.progress.step(event.step)
        self.goodput.reached = event.step
        if fetched(event, self.every):
            self.log(event)

    def tiles_of(self, event: Event) -> int:
        """Picture tiles in this process's rows; empty slots are work, but not the model's."""
        vision = self.run.model.vision
        if vision is None or not event.batch.tiles.shape[1]:
            return 0
        return int((event.batch.tokens == self.patch_id).sum()) // vision.tokens_per_tile

    def by_source(self, event: Event) -> np.ndarray:
        """Tokens of each source in this process's rows, without padding."""
        batch, n = event.batch, len(self.run.data.sources)
        return np.bincount(batch.source_ids[batch.segment_ids > 0], minlength=n)

    def mixture(self, read: Sequence[float], step: int) -> dict[str, float]:
        """The share of each source in the tokens read since the last log, beside what the schedule asks for by now."""
        names, data = sorted(self.run.data.sources), self.run.data
        asked = schedule.shares(data.sources, (step - self.run.optim.begins) * data.batch_tokens)
        shown = {f"data/share/{name}": n / max(sum(read), 1) for name, n in zip(names, read, strict=True)}
        return shown | {f"data/share_asked/{name}": asked[name] for name in names}

    def log(self, event: Event) -> None:
        values = self.window.fetch()
        tiles, of_step, tiles_of_step, *read = self.of_all_rows(
            self.tiles, np.count_nonzero(event.batch.segment_ids), self.tiles_of(event), *np.asarray(self.tokens)
        )
        tokens = sum(read)
        flops = self.steps * count.step_flops(self.run) + tiles * count.tile_flops_of(self.run)
        speed = self.clock.lap(steps=self.steps, tokens=tokens, flops=flops)
        shown = metrics.scalars({name: value for name, value in values.items() if name != "loss"})
        shown |= metrics.by_source("loss", values["loss"], sorted(self.run.data.sources), self.langs)
        shown |= self.each_step.fetch(event.last)
        weights = dataclasses.asdict(self.run.losses)
        shown["loss/total"] = sum(weight * shown.get(f"loss/{name}", 0.0) for name, weight in weights.items())
        shown["steps/skipped"] = float(jax.device_get(event.metrics.skipped))
        shown |= (
            self.mixture(read, event.step) | self.documents_left_out(last=event.last) | speed | self.goodput.shares()
        )
        if due(event, self.run.health.norms_every_steps):
            shown |= blocks.norms(event.metrics, round(of_step), round(tiles_of_step))
        self.progress.log(event.step, shown)
        self.file.write(event.step, shown)
        self.board.scalars(shown, event.step)
        self.goodput.write()
        self.steps, self.tokens, self.tiles = 0, 0, 0

    def of_all_rows(self, *counts: float) -> list[float]:
        """Counts of this process's rows -> those of the whole batch; a row that several processes share counts once."""
        *sums, rows = processes.summed([*counts, self.rows])
        return [n * self.run.data.rows / rows for n in sums]

    def flush(self) -> None:
        """The lines of the steps since the last fetch, when a stop comes between."""
        self.each_step.fetch(last=False)

    def rewind(self, step: int) -> None:
        """The run has gone back to step `step`: forget what was not logged, hide what was."""
        self.window.fetch()
        self.steps, self.tokens, self.tiles = 0, 0, 0
        self.clock.lap(steps=0, tokens=0, flops=0)
        for written in (self.file, self.board, self.each_step):
            written.rewind(step)

    def documents_left_out(self, last: bool) -> dict[str, float]:
        """Counts for the log, of those that were cut too; a warning at a reason's first document of a source, and with
        the total at the end."""
        left_out, cut = (
            {f"{source}/{why}": n for source, of in counted().items() for why, n in of.items()}
            for counted in (self.left_out, self.cut)
        )
        for name, n in (left_out | cut).items():
            if last or name not in self.warned:
                source, why = name.split("/")
                what = f"left out so far: {SKIP_REASONS[why]}" if name in left_out else f"{CUTS[why]} so far"
                self.warn(f"{n} documents of {source} {what}")
        self.warned |= left_out.keys() | cut.keys()
        shown = {f"data/left_out/{name}": float(n) for name, n in left_out.items()}
        return shown | {f"data/cut/{name}": float(n) for name, n in cut.items()}


def everything(params: Any) -> Any:
    return params


@dataclass
class Save:
    """A checkpoint every `every_steps` and at the end, written while training goes on; none after a bad step.

    What made a step bad may be in the parameters already: a stop then goes back to the checkpoint before.
    """

    checkpoints: Checkpoints
    every: int
    batches: Any  # the data iterator, which stands after the last batch taken
    ledger: Ledger
    kept: Callable[[Any], Any] = everything  # what a checkpoint holds of the parameters

    def __call__(self, event: Event) -> None:
        if due(event, self.every):
            self.save(event.step, event.state)

    def save(self, step: int, state: State) -> None:
        jax.block_until_ready(state.bad_in_row)  # else waiting for the step would count as saving
        with self.ledger.during("save"):
            counts = {
                name: int(n) for name, n in jax.device_get({name: getattr(state, name) for name in COUNTS}).items()
            }
            if counts["bad_in_row"]:
                return
            saved = self.checkpoints.save(
                step,
                params=self.kept(state.params),
                router_bias=state.router_bias,
                opt=state.opt,
                rng={"key": state.rng, "recent": state.recent},
                data_iterator=self.batches,
                extra=counts,
            )
        if saved:
            self.ledger.mark(step)


@dataclass
class Evaluate:
    """The run's evaluations, each at its own pace and all of them after the last step of a run that was not stopped."""

    run: config.Run
    context: Context  # without weights
    ledger: Ledger
    file: MetricsFile
    board: TensorBoard
    say: Callable[[str], None]
    warn: Callable[[str], None]
    end: int  # the last step of the run, whose stages may end before
    reports: dict[str, Report] = field(default_factory=dict)  # the newest of each

    def __call__(self, event: Event) -> None:
        names = [name for name, cfg in self.run.evals.items() if self.wanted(event, cfg.every_steps)]
        if not names:
            return
        jax.block_until_ready(event.state.params)  # else waiting for the step would count as evaluation
        with self.ledger.during("evaluate"), jax.transfer_guard("allow"):
            for name in names:
                self.evaluate(name, event.step, event.state)

    def at_start(self, step: int, state: State) -> bool:
        """What a death or a stop cut off: evaluations of this step's checkpoint that `metrics.jsonl` does not have.

        A run that has taken all its steps is evaluated again, and only shown what is known. False if it was stopped.
        """
        known = processes.from_first(lambda: sorted({name for line in self.file.of_step(step) for name in line}))
        try:
            with self.ledger.during("evaluate"):
                for name, cfg in self.run.evals.items():
                    new = not any(key.startswith(f"eval/{name}/") for key in known)
                    missed = new and step > 0 and cfg.every_steps > 0 and step % cfg.every_steps == 0
                    if missed or step == self.end:
                        self.evaluate(name, step, state, write=new)
        except Stopped:
            return False
        return True

    def wanted(self, event: Event, every: int) -> bool:
        return event.step == self.end or (every > 0 and event.step % every == 0)

    def evaluate(self, name: str, step: int, state: State, write: bool = True) -> None:
        cfg = self.run.evals[name]
        self.say(f"evaluating {name}")
        try:
            weights = dict(params=state.params, router_bias=state.router_bias, reference=state.reference)
            report = EVALS[cfg.kind](self.context._replace(**weights), cfg)
        except ConfigError as error:  # its data cannot be used: no reason to end a run that has steps to take
            if step == self.end:
                raise
            self.say(f"evaluation {name} left out: {error}")
            return
        self.reports[name] = report
        if not write:
            return
        values = {f"eval/{name}/{key}": value for key, value in report.scalars.items()}
        self.file.write(step, values)
        for key in report.rises:
            self.look_back(f"eval/{name}/{key}", cfg.patience)
        self.board.scalars(values, step)
        if report.pictures:
            images, captions = zip(*report.pictures, strict=True)
            self.board.pictures(f"eval/{name}", [np.asarray(i) for i in images], captions, step)
        for plot, image in report.plots.items():
            self.board.picture(f"eval/{name}/{plot}", image, step)

    def look_back(self, key: str, patience: int) -> None:
        """Warns of a figure that fell at each of the last `patience` evaluations."""
        lines = (line for line in self.file.backwards() if line.get(key) is not None)
        newest = [line[key] for line in itertools.islice(lines, patience + 1)]
        if len(newest) > patience and all(now < before for now, before in itertools.pairwise(newest)):
            values = ", ".join(f"{value:.4f}" for value in reversed(newest))
            self.warn(f"{key} fell at {patience} evaluations in a row: {values}")


def table(reports: Mapping[str, Report]) -> list[tuple[str, str, str, str]]:
    """(evaluation, what, figure, compared with) of every report."""
    return [(name, *row) for name, report in reports.items() for row in report.rows]
