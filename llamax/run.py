"""The composition root: recipe -> config -> mesh -> model -> data -> step -> loop -> checkpoint + metrics.

`train` reads as that sentence, one line per arrow; each returns a value that the next takes, and nothing reaches back.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from rich.table import Table

from llamax import config, loading, preflight, stages, starting, stripes
from llamax.checkpoint import found as folders
from llamax.checkpoint.manager import Checkpoints
from llamax.data import pipeline
from llamax.data.sources import read_manifest
from llamax.data.tokenizer import Tokenizer
from llamax.evals import Report
from llamax.evals.report import Context
from llamax.loading import Found
from llamax.model.seam import make_seam
from llamax.model.skeleton import Skeleton, skeleton
from llamax.observe import log, metrics, provenance
from llamax.observe.goodput import Goodput, Ledger
from llamax.observe.progress import Progress, duration
from llamax.observe.tensorboard import TensorBoard
from llamax.observe.watchdog import Watchdog
from llamax.optim.build import optimizer
from llamax.parallel import place, processes, rules
from llamax.parallel.mesh import make_mesh
from llamax.parallel.pipeline import Schedule
from llamax.post import reference
from llamax.stages import Part
from llamax.train import hooks
from llamax.train.health import Health
from llamax.train.loop import RollBack, StopRequest, fit
from llamax.train.programs import Programs, abstract_batch, build, computed_shapes
from llamax.train.state import State, init
from llamax.train.step_log import StepLog

logger = logging.getLogger("llamax")


class Result(NamedTuple):
    state: State
    reports: dict[str, Report]
    finished: bool  # False: a stop was asked for; the same command goes on
    signal: int | None  # which asked for it


def train(
    run: config.Run,
    workdir: str | Path,
    *,
    overrides: Sequence[str] = (),
    devices: Sequence[jax.Device] | None = None,
    began: float | None = None,
) -> Result:
    """Trains `run` in `workdir`, or goes on where it stopped, on all devices unless told otherwise.

    One process, or each of several that the environment joins (parallel/processes.py): all call this.

    `began`: when the process did, by `time.time()`, if its start is to count in the ledger of wall time.

    Raises:
        ConfigError: a person's input is wrong. What can be known beforehand is told before anything is compiled,
            allocated or written; a checkpoint of other shapes, or a file that can no longer be read, is met later.
        Diverged: too many bad steps in a row.
        Stopped: a stop was asked for before the first step; nothing is lost.
    """
    log.setup()
    processes.start()
    log.setup(process=processes.number())
    ledger, workdir = Ledger(began), Path(workdir)
    agree = processes.Agreement() if processes.several() else None
    with StopRequest(agree) as stop, Watchdog(ledger, run.health.stall_s, workdir, logger.error):
        return _train(run, workdir, overrides, devices, ledger, stop)


def _train(
    run: config.Run,
    workdir: Path,
    overrides: Sequence[str],
    devices: Sequence[jax.Device] | None,
    ledger: Ledger,
    stop: StopRequest,
) -> Result:
    asked, devices = config.to_dict(run), list(devices or jax.devices())
    preflight.check_processes(asked, workdir, jax.local_device_count())
    tokenizer, parts, files = processes.together(partial(look, stages.parts(run), workdir, asked))
    preflight.check_same({"its data": files})
    ready = [make_ready(part, devices) for part in parts]
    weights, beside = starting.find(run, workdir, tokenizer), starting.find_reference(run, workdir, tokenizer)
    peak = metrics.peak(devices)  # measured on a CPU, so before compiling keeps the cores busy
    with ExitStack() as open_things:
        first = take_workdir(parts, workdir, asked, overrides, files, (weights, beside), open_things)
        ends = [part.end for part in parts]
        checkpoints = open_things.enter_context(Checkpoints(workdir / "checkpoints", run.checkpoint, ends[:-1]))
        goodput = Goodput(workdir / "goodput.json", ledger, first, written=processes.is_first())
        open_things.callback(goodput.write, now=True)
        written = open_written(workdir, asked, first, ends[-1], open_things)
        clock = metrics.Clock(peak.flops_per_s, ledger)
        house = House(tokenizer, checkpoints, written, goodput, clock, ledger, stop, ends[-1], beside)
        for one in ready:
            if first <= one.part.end:
                result = train_part(one, house, weights)
                if not result.finished:
                    break
        with ledger.during("save"):
            checkpoints.wait()
        ledger.enter("idle")
    if processes.is_first():
        report(run, workdir, result.reports, result.finished, goodput)
    goodput.write(now=True)
    return result


def train_part(ready: Ready, house: House, weights: Found | None) -> Result:
    """The steps that are left of a part of a run."""
    part, mesh, cut, data = ready
    run, tokenizer, stop = part.run, house.tokenizer, house.stop
    bones, scorer, sampler = skeletons(run, mesh, cut, tokenizer.patch)
    if mesh.shape["pipeline"] > 1:
        logger.info("%s", Schedule.of(mesh.shape["pipeline"], run.model.plan[0][1], run.train.pipeline_microbatches))
    tx = optimizer(run.optim, run.train.steps, bones.split(bones.kinds)[0])
    step, shapes = build(run, bones, tx, mesh)
    fresh = partial(init, bones, tx, run.seed, run.health.spike_window)
    lacking = pipeline.lacking(run.data)
    kinds = [abstract_batch(run, n, place.batch_shardings(mesh, lacking)) for n in pipeline.tile_slots(run.data)]
    done = house.checkpoints.latest() == part.end
    with ExitStack() as open_things:
        programs = open_things.enter_context(Programs(step, shapes, [] if done else kinds, house.ledger, stop))
        if run.reference.source == "cache":  # of a run that is done too: what it learnt is evaluated once more
            keep_reference(run, mesh, cut, house)
        batches = iter(data)
        open_things.callback(batches.close)
        state, first = starting.start(part, fresh, shapes, house.checkpoints, batches, weights, bones)
        state = starting.with_reference(state, shapes, bones, house.reference)
        put = partial(place.put_batch, mesh=mesh, n_rows=run.data.rows, stripes=cut)
        row_multiple = rules.ways(rules.ACTIVATIONS["flat"], mesh)
        put_whole = partial(place.put_whole_batch, mesh=mesh, stripes=cut)
        context = Context(run, scorer, sampler, tokenizer, put_whole, row_multiple, check_stop=stop.check)
        around = make_hooks(run, house, context, batches, bones)
        stop.at_once = False  # from here on there is something to save
        finished = around.evaluate.at_start(first, state)
        if finished:
            state, finished = fit(
                state,
                lambda state, batch: programs(state, put(batch)),
                batches,
                first=first,
                steps=run.train.steps,
                ledger=house.ledger,
                stop=stop,
                hooks=around,
                leave=partial(leave, around),
                go_back=partial(back, part, shapes, bones, house, weights, around.log),
            )
    return Result(state, around.evaluate.reports, finished, stop.signal)


# ------------------------------------------------------------------------------------------------- one arrow at a time


def skeletons(run: config.Run, mesh: Mesh, cut: stripes.Stripes, patch_id: int) -> tuple[Skeleton, Skeleton, Skeleton]:
    """The model of the training step; the one that scores rows cut like the step's; the one that samples, from whole
    rows. The first may lack the temperature that is for inference only."""
    whole = replace(run.train, expert_capacity=0.0)
    seam, uncut = make_seam(mesh, run.train, cut), make_seam(mesh, whole, place.WHOLE)
    how = dict(patch_id=patch_id, tune=run.tune)
    step = skeleton(run.model.in_training, seam, train=run.train, **how)
    scorer = step
    if run.model.in_training != run.model:
        scorer = skeleton(run.model, seam, train=run.train, **how)
    return step, scorer, skeleton(run.model, uncut, train=whole, **how)


def keep_reference(run: config.Run, mesh: Mesh, cut: stripes.Stripes, house: House) -> None:
    """What the reference gives the answers of the run's comparisons is on disk, from here on."""
    assert house.reference is not None
    tasks = processes.together(partial(reference.left, run, folders.fingerprint(house.reference)))
    if not tasks:
        return
    with house.ledger.during("evaluate"):
        whole = replace(run, tune=config.Tune())
        _, bones, _ = skeletons(whole, mesh, cut, house.tokenizer.patch)
        weights = loading.read(house.reference, *computed_shapes(whole, bones, mesh))
        put = partial(place.put_whole_batch, mesh=mesh, stripes=cut)
        order = np.argsort(cut.places(run.data.seq_len))
        reference.fill(run, tasks, reference.Scorer(bones, put, lambda x: x[:, order]), weights, house.stop.check)


def look(parts: Sequence[Part], workdir: Path, asked: dict[str, Any]) -> tuple[Tokenizer, list[Part], dict[str, str]]:
    """What this machine's files have to say: the tokenizer, the parts with their paths resolved, hashes of the data."""
    provenance.check_same_run(workdir, asked)
    tokenizer = preflight.check_tokenizer(parts[0].run)
    parts = [part._replace(run=preflight.with_paths(part.run, workdir)) for part in parts]
    files = preflight.data_files(parts)
    provenance.check_same_files(workdir, files)
    preflight.check_tune(parts[-1].run)
    preflight.check_pairs(parts)
    preflight.check_evals(parts[-1].run)  # they are the same in all; what a row takes of the cache is most in the last
    return tokenizer, parts, files


class Ready(NamedTuple):
    """A part of a run that has been found fit for the devices and for its data."""

    part: Part
    mesh: Mesh
    cut: stripes.Stripes
    data: grain.IterDataset


def make_ready(part: Part, devices: Sequence[jax.Device]) -> Ready:
    with stages.in_stage(part.name):
        mesh = make_mesh(config.check_devices(part.run, len(devices)), devices)
    cut = stripes.of(part.run.model, part.run.data.seq_len, mesh.shape["context"])
    run = preflight.aligned(part.run, mesh.shape["context"])
    share = place.rows_here(mesh, run.data.rows)
    data = processes.together(partial(pipeline.build, run.data, run.model.vision, part.data_seed, share))
    return Ready(part._replace(run=run), mesh, cut, data)


def take_workdir(
    parts: Sequence[Part],
    workdir: Path,
    asked: dict[str, Any],
    overrides: Sequence[str],
    files: dict[str, str],
    models: tuple[Found | None, Found | None],
    open_things: ExitStack,
) -> int:
    """The step to go on from. The first process holds the workdir, looks at its checkpoints, writes run.json.

    `models`: whose weights it begins with, and what it is measured against."""

    def take() -> int:
        open_things.enter_context(provenance.alone(workdir))
        latest = preflight.check_steps_left(parts[-1].end, preflight.sound_step(workdir))
        for change in provenance.changes(workdir, asked, latest):
            logger.info(
                "from step %d on, %s is %s and no longer %s", *(change[k] for k in ("step", "key", "new", "old"))
            )
        init, beside = map(starting.about, models)
        provenance.record(workdir, asked, overrides, files, init, latest, reference=beside)
        return latest

    return processes.from_first(take)


class Written(NamedTuple):
    """The files that a run writes for people while it goes on; a process that is not the first keeps nothing."""

    metrics: log.MetricsFile
    steps: log.MetricsFile
    board: TensorBoard
    progress: Progress


def open_written(workdir: Path, asked: dict[str, Any], first: int, steps: int, open_things: ExitStack) -> Written:
    """Closed with `open_things`."""
    writes = processes.is_first()

    def named(name: str) -> Path | None:
        return workdir / name if writes else None

    written = Written(
        log.MetricsFile(named("metrics.jsonl"), first),
        log.MetricsFile(named("steps.jsonl"), first),
        TensorBoard(named("tensorboard"), first),
        Progress(steps, first, shown=writes),
    )
    for one in written:
        open_things.enter_context(one)
    written.board.config(asked, first)
    return written


class House(NamedTuple):
    """What all parts of a run share."""

    tokenizer: Tokenizer
    checkpoints: Checkpoints
    written: Written
    goodput: Goodput
    clock: metrics.Clock
    ledger: Ledger
    stop: StopRequest
    end: int  # the last step
    reference: Found | None  # the model that the run is measured against


def leave(around: Hooks, step: int, state: State) -> None:
    """What a stop between two steps must not lose: the lines of the steps before, a checkpoint if they were good."""
    around.log.flush()
    try:
        around.health.look(step)
    except RollBack:
        return  # the newest checkpoint is from before the bad step: whoever goes on comes here again
    around.save.save(step, state)


def back(
    part: Part,
    shapes: State,
    bones: Skeleton,
    house: House,
    weights: Found | None,
    written: hooks.Log,
    asked: RollBack,
) -> State:
    """The state that a roll-back asks for."""
    state = starting.go_back(part, shapes, house.checkpoints, weights, bones, written, house.ledger, asked)
    return starting.with_reference(state, shapes, bones, house.reference)


class Hooks(NamedTuple):
    """In the order in which they are called after every step."""

    log: hooks.Log
    health: Health
    save: hooks.Save
    evaluate: hooks.Evaluate


def make_hooks(run: config.Run, house: House, context: Context, batches: Any, bones: Skeleton) -> Hooks:
    """Only the first process writes files, and warns of what all of them see."""
    checkpoints, goodput, (file, steps, board, progress) = house.checkpoints, house.goodput, house.written
    langs = [read_manifest(run.data.sources[name].path).lang for name in sorted(run.data.sources)]

    def newest(before: int) -> int | None:
        return newest_between(checkpoints.steps(), run.optim.begins, before)

    combine = processes.largest if run.data.lanes > 1 else None  # else each process has seen all
    patch_id = context.tokenizer.patch
    left_out, cut = (partial(of, batches, run.data, combine) for of in (pipeline.skipped, pipeline.cut))
    each_step = StepLog(run.model, steps, board)
    warn = logger.warning if processes.is_first() else logger.debug
    every = (run.train.log_every_steps, run.checkpoint.every_steps, run.health.norms_every_steps)
    return Hooks(
        hooks.Log(
            run, langs, patch_id, house.clock, goodput, progress, file, board, each_step, left_out, cut, warn, every
        ),
        Health(run.health, every, newest, f"{checkpoints.folder}", warn),
        hooks.Save(checkpoints, run.checkpoint.every_steps, batches, house.ledger, bones.kept),
        hooks.Evaluate(run, context, house.ledger, file, board, logger.info, warn, house.end),
    )


def newest_between(saved: Sequence[int], first: int, before: int) -> int | None:
    """Of saved steps the newest before a step, none that is of a stage before `first`'s."""
    return max((step for step in saved if first <= step < before), default=None)


def report(run: config.Run, workdir: Path, reports: dict[str, Report], finished: bool, goodput: Goodput) -> None:
    """What was learnt, where the time went, and how to look at it."""
    logger.info("%s", time_line(goodput.total()))
    if not finished:
        newest = provenance.latest_step(workdir)
        logger.info("stopped; the newest checkpoint is step %d, and the same command goes on from it", newest)
        return
    rows = hooks.table(reports)
    if rows:
        shown = Table(title=f"What {run.name} learnt, on held-out data")
        for heading in ("evaluation", "what", "model", "compared with"):
            shown.add_column(heading)
        for row in rows:
            shown.add_row(*row)
        log.CONSOLE.print(shown)
    log.CONSOLE.print(f"Learning curves and pictures: {tensorboard()} --logdir {workdir}, then http://localhost:6006")


def time_line(seconds: dict[str, float]) -> str:
    """Where a run's wall time went, the largest part first."""
    whole = sum(seconds.values())
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{phase.replace('_', '-')} {s / whole:.1%}" for phase, s in parts if s >= 5e-4 * whole)
    return f"{duration(whole)} of wall time: {shares}"


def tensorboard() -> str:
    """The command as it can be typed here: an environment's own need not be on the path."""
    if shutil.which("tensorboard"):
        return "tensorboard"
    return os.path.relpath(Path(sys.executable).with_name("tensorboard"))
