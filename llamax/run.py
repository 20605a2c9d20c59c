"""The composition root: recipe -> config -> mesh -> model -> data -> step -> loop -> checkpoint + metrics.

`train` reads as that sentence, one line per arrow; each returns a value that the next takes, and nothing reaches back.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

from llamax import config, preflight, stripes
from llamax.checkpoint.manager import Checkpoints
from llamax.data import pipeline
from llamax.data.sources import read_manifest
from llamax.data.tokenizer import Tokenizer
from llamax.evals import Report
from llamax.evals.report import Context
from llamax.model.seam import make_seam
from llamax.model.skeleton import skeleton
from llamax.observe import log, metrics, provenance
from llamax.observe.goodput import Goodput, Ledger
from llamax.observe.progress import Progress, duration
from llamax.observe.tensorboard import TensorBoard
from llamax.observe.watchdog import Watchdog
from llamax.optim.build import optimizer
from llamax.parallel import place, processes, rules
from llamax.parallel.mesh import make_mesh
from llamax.parallel.pipeline import Schedule
from llamax.train import hooks
from llamax.train.health import Health
from llamax.train.loop import RollBack, StopRequest, fit
from llamax.train.programs import Programs, abstract_batch, build
from llamax.train.state import COUNTS, State, init
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
    tokenizer, run, files = processes.together(partial(look, run, workdir, asked))
    preflight.check_same({"its data": files})
    mesh = make_mesh(config.check_devices(run, len(devices)), devices)
    cut = stripes.of(run.model, run.data.seq_len, mesh.shape["context"])
    run = preflight.aligned(run, mesh.shape["context"])
    share = place.rows_here(mesh, run.data.rows)
    data = processes.together(partial(pipeline.build, run.data, run.model.vision, run.seed, share))
    bones, sampler = (
        skeleton(run.model, make_seam(mesh, how, cut_into), patch_id=tokenizer.patch, train=how)
        for how, cut_into in ((run.train, cut), (replace(run.train, expert_capacity=0.0), place.WHOLE))
    )
    if mesh.shape["pipeline"] > 1:
        logger.info("%s", Schedule.of(mesh.shape["pipeline"], run.model.plan[0][1], run.train.pipeline_microbatches))
    tx = optimizer(run.optim, run.train.steps, bones.kinds)
    step, shapes = build(run, bones, tx, mesh)
    processes.together(partial(preflight.check_evals, run))
    fresh = partial(init, bones, tx, run.seed, run.health.spike_window)
    kinds = [abstract_batch(run, n, place.batch_shardings(mesh)) for n in pipeline.tile_slots(run.data)]
    peak = metrics.peak(devices)  # measured on a CPU, so before compiling keeps the cores busy
    with ExitStack() as open_things:
        done = take_workdir(run, workdir, asked, overrides, files, open_things)
        checkpoints = open_things.enter_context(Checkpoints(workdir / "checkpoints", run.checkpoint))
        programs = open_things.enter_context(Programs(step, shapes, [] if done else kinds, ledger, stop))
        batches = iter(data)
        open_things.callback(batches.close)
        state, first = start(fresh, shapes, checkpoints, batches)
        put = partial(place.put_batch, mesh=mesh, n_rows=run.data.rows, stripes=cut)
        row_multiple = rules.ways(rules.ACTIVATIONS["flat"], mesh)
        clock = metrics.Clock(peak.flops_per_s, ledger)
        goodput = Goodput(workdir / "goodput.json", ledger, first, written=processes.is_first())
        open_things.callback(goodput.write, now=True)
        put_whole = partial(place.put_whole_batch, mesh=mesh, stripes=cut)
        context = Context(run, bones, sampler, tokenizer, put_whole, row_multiple, check_stop=stop.check)
        around = make_hooks(run, workdir, context, checkpoints, batches, first, clock, goodput, open_things)
        stop.at_once = False  # from here on there is something to save
        finished = around.evaluate.at_start(first, state.params, state.router_bias)
        if finished:
            state, finished = fit(
                state,
                lambda state, batch: programs(state, put(batch)),
                batches,
                first=first,
                steps=run.train.steps,
                ledger=ledger,
                stop=stop,
                hooks=around,
                leave=partial(leave, around),
                go_back=partial(go_back, shapes, checkpoints, around.log, ledger),
            )
        with ledger.during("save"):
            checkpoints.wait()
        ledger.enter("idle")
    if processes.is_first():
        report(run, workdir, around.evaluate.reports, finished, goodput)
    goodput.write(now=True)
    return Result(state, around.evaluate.reports, finished, stop.signal)


# ------------------------------------------------------------------------------------------------- one arrow at a time


def look(run: config.Run, workdir: Path, asked: dict[str, Any]) -> tuple[Tokenizer, config.Run, dict[str, str]]:
    """What this machine's files have to say: the tokenizer, the run with its paths resolved, hashes of the data."""
    provenance.check_same_run(workdir, asked)
    tokenizer = preflight.check_tokenizer(run)
    run = preflight.with_paths(run)
    files = preflight.data_files(run)
    provenance.check_same_files(workdir, files)
    return tokenizer, run, files


def take_workdir(
    run: config.Run,
    workdir: Path,
    asked: dict[str, Any],
    overrides: Sequence[str],
    files: dict[str, str],
    open_things: ExitStack,
) -> bool:
    """Whether all steps are taken. The first process holds the workdir, looks at its checkpoints, writes run.json."""

    def take() -> bool:
        open_things.enter_context(provenance.alone(workdir))
        done = preflight.check_steps_left(run, preflight.sound_step(workdir))
        provenance.record(workdir, asked, overrides, files)
        return done

    return processes.from_first(take)


def start(fresh: Callable[[], State], shapes: State, checkpoints: Checkpoints, batches: Any) -> tuple[State, int]:
    """The newest checkpoint's state, and the data iterator moved to it; a fresh state where there is none."""
    latest = checkpoints.latest()  # preflight.sound_step has compared its files with their sums
    if latest is None:
        # Random numbers take long to compile well, and this program runs once.
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        platform = next(iter(shapes.step.sharding.device_set)).platform
        options = {"xla_backend_optimization_level": 0} if platform == "cpu" else None
        return jax.jit(fresh, out_shardings=shardings, compiler_options=options)(), 0
    state = restore(shapes, checkpoints, latest, batches, checked=True)
    logger.info("resumed from step %d in %s", latest, checkpoints.folder)
    return state, latest


def restore(shapes: State, checkpoints: Checkpoints, step: int | None, batches: Any, *, checked: bool = False) -> State:
    """The state of a step's checkpoint; the data iterator is moved to where it stood, if there is one.

    `step` None and `checked` are those of `Checkpoints.restore`.
    """
    found = checkpoints.restore(
        step,
        params=shapes.params,
        router_bias=shapes.router_bias,
        opt=shapes.opt,
        rng={"key": shapes.rng, "recent": shapes.recent},
        data_iterator=batches,
        checked=checked,
    )
    counts = {name: jax.device_put(np.int32(found["extra"][name]), shapes.step.sharding) for name in COUNTS}
    trees = {name: found[name] for name in ("params", "router_bias", "opt")}
    return State(rng=found["rng"]["key"], recent=found["rng"]["recent"], **trees, **counts)


def go_back(shapes: State, checkpoints: Checkpoints, written: hooks.Log, ledger: Ledger, back: RollBack) -> State:
    """The state to go on from after a roll-back. The data stays where it is: past the batches that did harm."""
    logger.log(logging.WARNING if processes.is_first() else logging.DEBUG, "%s, past the batches in between", back)
    for step in reversed(checkpoints.steps()):  # the newest first: a death in between leaves no gap
        if step > back.to:
            checkpoints.set_aside(step, "rolled-back")
    state = restore(shapes, checkpoints, None, None)  # the one before, should its files be damaged by now
    to = int(jax.device_get(state.step))
    written.rewind(to)
    ledger.lose_steps_after(to)
    written.file.write(to, {"health/rolled_back_from": back.now, "health/bad_step": back.bad})
    return state


def leave(around: Hooks, step: int, state: State) -> None:
    """What a stop between two steps must not lose: the lines of the steps before, a checkpoint if they were good."""
    around.log.flush()
    try:
        around.health.look(step)
    except RollBack:
        return  # the newest checkpoint is from before the bad step: whoever goes on comes here again
    around.save.save(step, state)


class Hooks(NamedTuple):
    """In the order in which they are called after every step."""

    log: hooks.Log
    health: Health
    save: hooks.Save
    evaluate: hooks.Evaluate


def make_hooks(
    run: config.Run,
    workdir: Path,
    context: Context,
    checkpoints: Checkpoints,
    batches: Any,
    first: int,
    clock: metrics.Clock,
    goodput: Goodput,
    open_things: ExitStack,
) -> Hooks:
    """The files that the hooks write are closed with `open_things`. Only the first process writes them, and warns of
    what all of them see."""
    writes = processes.is_first()

    def written(name: str) -> Path | None:
        return workdir / name if writes else None

    file = open_things.enter_context(log.MetricsFile(written("metrics.jsonl"), first))
    board = open_things.enter_context(TensorBoard(written("tensorboard"), first))
    progress = open_things.enter_context(Progress(run.train.steps, first, shown=writes))
    board.config(config.to_dict(run), first)
    langs = [read_manifest(run.data.sources[name].path).lang for name in sorted(run.data.sources)]

    def newest_before(step: int) -> int | None:
        return max((saved for saved in checkpoints.steps() if saved < step), default=None)

    combine = processes.largest if run.data.lanes > 1 else None  # else each process has seen all
    left_out, patch_id = partial(pipeline.skipped, batches, run.data, combine), context.tokenizer.patch
    each_step = StepLog(run.model, open_things.enter_context(log.MetricsFile(written("steps.jsonl"), first)), board)
    warn, ledger = logger.warning if writes else logger.debug, goodput.ledger
    every = (run.train.log_every_steps, run.checkpoint.every_steps, run.health.norms_every_steps)
    return Hooks(
        hooks.Log(run, langs, patch_id, clock, goodput, progress, file, board, each_step, left_out, warn, every),
        Health(run.health, every, newest_before, f"{checkpoints.folder}", warn),
        hooks.Save(checkpoints, run.checkpoint.every_steps, batches, ledger),
        hooks.Evaluate(run, context, ledger, file, board, logger.info),
    )


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
