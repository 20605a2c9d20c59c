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
from llamax.data.pipeline import lacking
from llamax.model.remat import HOST
from llamax.model.skeleton import Skeleton
from llamax.observe.goodput import Ledger
from llamax.parallel import expert, place, processes, rules
from llamax.train.loop import StopRequest
from llamax.train.state import State, init
from llamax.train.step import make_step

logger = logging.getLogger("llamax")

EXACT = ("router",)  # parameters that are read in float32 whatever the computation's dtype (model/moe.py)
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
    shapes = state_shapes(run, bones, tx)
    shardings = places_of(bones, shapes, mesh, run.mesh.rules)
    check_memories(run, mesh)
    step = jax.jit(
        make_step(run, bones, tx, copies(run, bones, shardings.params, shapes.params)),
        in_shardings=(shardings, place.batch_shardings(mesh, lacking(run.data))),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )
    return step, jax.tree.map(shape_at, shapes, shardings)


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """On TPU, tokens travel to their experts while the shared expert computes; on GPU XLA does so unasked.

    The first option lets exchanges run beside other work at all; without the second, v5p and v6e end them before any.
    """
    several = mesh.shape[expert.AXIS] > 1 and mesh.devices.flat[0].platform == "tpu"
    names = ("xla_tpu_enable_async_ragged_all_to_all", "xla_tpu_use_aggressive_scheduling")
    return dict.fromkeys(names, "true") if several else None


def state_shardings(bones: Skeleton, tx: optax.GradientTransformation, run: config.Run, mesh: Mesh) -> State:
    """`places_of` the state of a run."""
    return places_of(bones, state_shapes(run, bones, tx), mesh, run.mesh.rules)


def state_shapes(run: config.Run, bones: Skeleton, tx: optax.GradientTransformation) -> State:
    """With a live reference's, if the run has one: of what is trained, in the dtypes that the step computes with."""
    shapes = jax.eval_shape(partial(init, bones, tx, run.seed, run.health.spike_window))
    if run.reference.source != "live":
        return shapes
    dtypes = computed_dtypes(run, bones)
    params = jax.tree.map(lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype), shapes.params, dtypes)
    return shapes._replace(reference=(bones.own(params), shapes.router_bias))


def computed_shapes(run: config.Run, bones: Skeleton, mesh: Mesh) -> tuple[Any, Any]:
    """(params, router_bias) of a model that is only computed with, in the dtypes and places in which the step does."""
    params, bias = bones.shapes()
    dtypes, places = computed_dtypes(run, bones), rules.shardings(bones.axes, params, mesh)
    params = jax.tree.map(
        lambda x, dtype, at: jax.ShapeDtypeStruct(x.shape, dtype, sharding=at), params, dtypes, places
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    return params, jax.tree.map(lambda x: shape_at(x, everywhere), bias)


def places_of(bones: Skeleton, shapes: State, mesh: Mesh, preset: str = "fsdp") -> State:
    """Where every array of the state rests, by a preset of `rules.RESTING`: the optimizer's moments with their
    parameters, what is no parameter everywhere."""
    table = rules.RESTING[preset]
    params = rules.shardings(bones.axes, shapes.params, mesh, table)
    for line in rules.unsharded(bones.axes, shapes.params, mesh, table) if processes.is_first() else ():
        logger.warning(line)
    everywhere = NamedSharding(mesh, PartitionSpec())
    whole = jax.tree.map(lambda _: everywhere, shapes)
    trained, _ = bones.split(params)
    structure = jax.tree.structure(trained)

    def like_params(tree: Any) -> bool:
        return jax.tree.structure(tree) == structure

    opt = jax.tree.map(lambda tree: trained if like_params(tree) else everywhere, shapes.opt, is_leaf=like_params)
    if shapes.reference is not None:  # where it is computed with
        computing = bones.own(rules.shardings(bones.axes, shapes.params, mesh))
        whole = whole._replace(reference=(computing, whole.reference[1]))
    return whole._replace(params=params, opt=opt)


def copies(run: config.Run, bones: Skeleton, resting: Any, shapes: Any) -> place.Copies | None:
    """What the step makes of parameters that rest elsewhere than they are computed with; None if all are there.

    Matrices are copied in the dtype of the computation, but for the router. Embeddings are looked up, and their
    gradient is a long sum for a frequent token: both stay float32.

    Gradients of what runs per shard come summed along the fast axes (place.gather). The compiler would sum those of
    other matrices along all axes at once, and the slow one would carry as much as the fast: those go to where the copy
    is first, and the slow axis is left the parts of that.
    """
    mesh = jax.tree.leaves(resting)[0].mesh
    computing = rules.shardings(bones.axes, shapes, mesh)
    if jax.tree.all(jax.tree.map(lambda x, a, b: a.is_equivalent_to(b, x.ndim), shapes, resting, computing)):
        return None

    def summed(x: Any, names: rules.Axes, at_rest: Any, computed: Any) -> Any:
        return at_rest if {"experts", "vocab"} & set(names) else computed

    where = jax.tree.map(summed, shapes, bones.axes, resting, computing)
    return place.Copies(resting, computing, where, computed_dtypes(run, bones))


def computed_dtypes(run: config.Run, bones: Skeleton) -> Any:
    """Of the parameters as the step computes with them: see `copies`."""

    def dtype(path: tuple, kind: str) -> str:
        return run.train.compute_dtype if kind == "matrix" and path[-1].key not in EXACT else "float32"

    return jax.tree.map_with_path(dtype, bones.kinds)


def check_memories(run: config.Run, mesh: Mesh) -> None:
    """Raises ConfigError if what is to wait in the host's memory cannot."""
    if run.train.remat != "offload":
        return
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        true = f"a {device.device_kind} reaches memories {', '.join(kinds)}, but no {HOST}"
        raise config.ConfigError("--config.train.remat=offload", true, "Set --config.train.remat=period.")


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
    tiles = (text[0], tiles_per_row, side, side, 3)
    floats = dict.fromkeys(("loss_weights", "ref_logp", "margins"), np.float32)
    dtypes = dict.fromkeys(Batch._fields, np.int32) | floats | {"tiles": np.uint8}
    structs = {
        name: jax.ShapeDtypeStruct(tiles if name == "tiles" else text, dtypes[name], sharding=sharding)
        for name, sharding in shardings._asdict().items()
        if sharding is not None
    }
    return Batch(**structs)
