"""The training step: jitted with its places pinned, compiled ahead of time for each kind of batch while a run starts.

A batch has picture slots or none, and each kind has a program of its own. A program refuses arrays of another shape or
sharding, so a run cannot compile a second time without anyone noticing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamax import config
from llamax.batch import Batch
from llamax.model.skeleton import Skeleton
from llamax.observe.goodput import Ledger
from llamax.parallel import place, processes, rules
from llamax.train.loop import StopRequest
from llamax.train.state import State, init
from llamax.train.step import make_step

logger = logging.getLogger("llamax")

PATIENCE_S = 0.2  # how often a wait for the compiler looks whether a stop was asked for


class Programs:
    """Called like the step; waits for the program that a batch needs. A context manager: leaving drops what waits."""

    def __init__(self, step: Any, state: State, batches: Iterable[Batch], ledger: Ledger, stop: StopRequest):
        """`step` is a jitted step(state, batch); `state` and `batches` hold ShapeDtypeStructs with their shardings."""
        self._ledger, self._stop = ledger, stop
        self._pool = ThreadPoolExecutor(1, "compile")  # compiling releases the interpreter: the start goes on beside it
        self._programs = {slots(batch): self._pool.submit(_compile, step, state, batch) for batch in batches}

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)  # a compile under way may take longer than a stop allows

    def __call__(self, state: State, batch: Batch) -> tuple[State, Any]:
        """Raises Stopped if a stop is asked for while the program is still being compiled."""
        program = self._programs[slots(batch)]
        if not program.done():
            with self._ledger.during("compile"):
                while not wait([program], PATIENCE_S).done:
                    self._stop.check_alone()
        return program.result()(state, batch)


def build(run: config.Run, bones: Skeleton, tx: optax.GradientTransformation, mesh: Mesh) -> tuple[Any, State]:
    """The jitted step(state, batch) -> (state, Metrics), and the state's shapes, dtypes and places. Nothing is
    allocated: the mesh may be of devices that are not here."""
    shapes = jax.eval_shape(partial(init, bones, tx, run.seed, run.health.spike_window))
    shardings = places_of(bones, shapes, mesh)
    step = jax.jit(
        make_step(run, bones, tx),
        in_shardings=(shardings, place.batch_shardings(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    return step, jax.tree.map(shape_at, shapes, shardings)


def state_shardings(bones: Skeleton, tx: optax.GradientTransformation, run: config.Run, mesh: Mesh) -> State:
    """`places_of` the state of a run."""
    return places_of(bones, jax.eval_shape(partial(init, bones, tx, run.seed, run.health.spike_window)), mesh)


def places_of(bones: Skeleton, shapes: State, mesh: Mesh) -> State:
    """Where every array of the state lives: the optimizer's moments with their parameters, the rest everywhere."""
    params = rules.shardings(bones.axes, shapes.params, mesh)
    for line in rules.unsharded(bones.axes, shapes.params, mesh) if processes.is_first() else ():
        logger.warning(line)
    everywhere = NamedSharding(mesh, PartitionSpec())
    whole = jax.tree.map(lambda _: everywhere, shapes)
    structure = jax.tree.structure(shapes.params)

    def like_params(tree: Any) -> bool:
        return jax.tree.structure(tree) == structure

    opt = jax.tree.map(lambda tree: params if like_params(tree) else everywhere, shapes.opt, is_leaf=like_params)
    return whole._replace(params=params, opt=opt)


def shape_at(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def slots(batch: Batch) -> int:
    """Picture tiles that a row can hold."""
    return batch.tiles.shape[1]


def _compile(step: Any, state: State, batch: Batch) -> Callable:
    return step.lower(state, batch).compile()


def abstract_batch(run: config.Run, tiles_per_row: int, shardings: Batch) -> Batch:
    """The shapes of a run's batch with so many picture slots a row."""
    vision = run.model.vision
    side = vision.tile_px if vision else 0
    text = (run.data.rows, run.data.seq_len)
    shapes = {name: text for name in Batch._fields} | {"tiles": (text[0], tiles_per_row, side, side, 3)}
    kinds = {name: np.int32 for name in Batch._fields} | {"loss_weights": np.float32, "tiles": np.uint8}
    structs = {
        name: jax.ShapeDtypeStruct(shape, kinds[name], sharding=getattr(shardings, name))
        for name, shape in shapes.items()
    }
    return Batch(**structs)
