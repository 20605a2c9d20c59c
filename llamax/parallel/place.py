"""Placing arrays on a mesh: the seam's `constrain`, kernels run per shard of rows, batches from host to devices.

The seam's values are frozen dataclasses: equal ones hash alike, so that two models on one mesh share a program. On a
mesh of one device each steps aside and leaves the plain function.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamax.batch import COMPARING, Batch
from llamax.parallel import rules
from llamax.stripes import Stripes

WHOLE = Stripes()  # rows that are not cut
FLAT = ("flat",)  # the first dimension of what has rows x tokens as one


@dataclass(frozen=True)
class Constrain:
    """`constrain(x, names)`: fix the sharding of an activation by the rules, as at every block boundary.

    `whole_rows`: no row is cut; what is alike to each other along `context` are devices with other rows (sampling).
    """

    mesh: Mesh
    whole_rows: bool = False

    def __call__(self, x: jax.Array, names: rules.Axes) -> jax.Array:
        if self.mesh.size == 1:
            return x
        assert len(names) == x.ndim, f"{names} does not name the {x.ndim} dimensions of {x.shape}"
        if self.whole_rows:
            names = tuple({"rows": "flat", "tokens": None}.get(name, name) for name in names)
        if "kv_heads" in names and x.shape[names.index("kv_heads")] % self.mesh.shape["tensor"]:
            names = tuple(None if name == "kv_heads" else name for name in names)
        here = seen_here(self.mesh)
        return jax.lax.with_sharding_constraint(x, NamedSharding(here, left_here(rules.spec(names, rules.ACTIVATIONS))))


def split_already() -> frozenset[str]:
    """Mesh axes that are split by hand around the code that asks: inside of a stage (pipeline.py), `pipeline`."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def seen_here(mesh: Mesh) -> Any:
    """The mesh, as shardings have to name it here."""
    return jax.sharding.get_abstract_mesh() if split_already() else mesh


def left_here(spec: PartitionSpec) -> PartitionSpec:
    """What is left to be split here of a PartitionSpec."""
    taken = split_already()

    def left(entry: Any) -> Any:
        axes = (entry,) if isinstance(entry, str) else entry or ()
        return tuple(axis for axis in axes if axis not in taken) or None

    return PartitionSpec(*map(left, spec)) if taken else spec


@dataclass(frozen=True)
class PerShard:
    """A kernel run by every device on its own rows, where the compiler could not split by itself: loops, sorts, custom
    gradients, fused kernels.

    Positional arguments (arrays or trees of them) and keyword arguments (arrays) have rows as dimension 0, or rows x
    tokens flattened; each device gets its share. The kernel sees weights whole: `weights` holds, for each positional
    argument that is one, its logical axes (a tuple, or a tree of tuples like the argument), and None for rows:
    `PerShard(cross_entropy, mesh, (None, ("embed", "vocab")))`. Their gradient is summed over devices. Keywords that
    are no array (`local_len=64`, None) are static. Outputs are split like rows.

    What is split over a mesh axis in `keep` is not gathered: the kernel works on its part of the weights and combines
    what the devices along that axis found (parallel/tensor.py). `rows` names the dimensions of positional arguments
    that are no weights, and of the output, where more than rows is split; keyword arguments have the first of these.
    """

    fn: Callable
    mesh: Mesh
    weights: tuple[Any, ...] = ()
    keep: tuple[str, ...] = ()
    rows: rules.Axes = ("rows",)

    def __call__(self, *args, **kwargs):
        if self.mesh.size == 1:
            return self.fn(*args, **kwargs)
        static = {name: x for name, x in kwargs.items() if not hasattr(x, "shape")}
        arrays = {name: x for name, x in kwargs.items() if name not in static}
        rows = {name: left_here(rules.spec(self.rows[: x.ndim], rules.ACTIVATIONS)) for name, x in arrays.items()}
        axes = self.weights + (None,) * (len(args) - len(self.weights))
        split_rows = left_here(rules.spec(self.rows, rules.ACTIVATIONS))
        specs = tuple(
            split_rows
            if names is None
            else jax.tree.map(lambda s: left_here(s.spec), rules.shardings(names, x, self.mesh))
            for x, names in zip(args, axes, strict=True)
        )

        def local(args, arrays):
            whole = (
                x if names is None else jax.tree.map(partial(gather, keep=self.keep), x, s)
                for x, names, s in zip(args, axes, specs, strict=True)
            )
            return self.fn(*whole, **arrays, **static)

        # check_vma would have every kernel declare the mesh axes over which its loop carries and custom gradients vary;
        # fused kernels that are not ours cannot. The tests compare every gradient with one device's instead.
        split = partial(
            jax.shard_map, mesh=seen_here(self.mesh), axis_names=set(self.mesh.axis_names) - split_already()
        )
        return split(local, in_specs=(specs, rows), out_specs=split_rows, check_vma=False)(args, arrays)


def gather(x: jax.Array, spec: PartitionSpec, *, keep: tuple[str, ...] = ()) -> jax.Array:
    """Inside shard_map: the whole of a weight that lives split by `spec`, but for mesh axes in `keep`.

    Its gradient is a reduce-scatter back to where the weight lives. Left to the compiler, the same was an all-reduce of
    the whole gradient, then a slice: twice the traffic, and every device holding all of it.
    """
    for dim, axes in enumerate(spec):
        if axes is not None and axes not in keep:
            x = jax.lax.all_gather(x, axes, axis=dim, tiled=True)
    return x


@dataclass(frozen=True)
class Gathered:
    """`gathered(w, names)`: a weight for the compiler to multiply with, whole but for what `tensor` splits.

    Left to itself the compiler gathers for every product, so where a layer is computed again, once for that and once
    more for the gradient of what was multiplied. The gradient is summed to where the weight lives.
    """

    mesh: Mesh

    def __call__(self, w: jax.Array, names: rules.Axes) -> jax.Array:
        lives = rules.fitting(names, w.shape, rules.PARAMETERS, self.mesh)
        whole = PartitionSpec(*(entry if entry == "tensor" else None for entry in lives))
        if self.mesh.size == 1 or lives == whole:
            return w
        here = seen_here(self.mesh)
        return _gathered(NamedSharding(here, left_here(whole)), NamedSharding(here, left_here(lives)), w)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(whole: NamedSharding, lives: NamedSharding, w: jax.Array) -> jax.Array:
    del lives
    w = jax.lax.optimization_barrier(w)  # else the compiler may cast what it gathered, and gather the wider numbers
    return jax.lax.with_sharding_constraint(w, whole)


_gathered.defvjp(
    lambda whole, lives, w: (_gathered(whole, lives, w), None),
    lambda whole, lives, _, dw: (jax.lax.with_sharding_constraint(dw, lives),),
)


@dataclass(frozen=True, eq=False)
class Copies:
    """What a step computes with, where master weights rest split over more axes than that (rules.RESTING).

    Called once a step, before the first micro-batch: so whatever their number, a weight crosses the axes that only its
    master is split by (`data`, which may be slow) once, and in the dtype of the computation. Leaves of the trees
    belong together; a weight that rests where it is computed with goes through as it is.
    """

    resting: Any  # NamedSharding
    computing: Any  # NamedSharding
    summed: Any  # NamedSharding: where gradients are first summed to, on their way to where they rest
    dtypes: Any  # of the copies

    def __call__(self, params: Any) -> Any:
        def copy(x, resting: NamedSharding, computing: NamedSharding, dtype: Any):
            if resting.is_equivalent_to(computing, x.ndim):
                return x
            small = jax.lax.with_sharding_constraint(x.astype(dtype), resting)  # else the wide numbers may travel
            return jax.lax.with_sharding_constraint(small, computing)

        return jax.tree.map(copy, params, self.resting, self.computing, self.dtypes)

    def standing_for(self, params: Any, copies: Any) -> Any:
        """The copies, whose gradient is that of `params`: float32, and scattered to where they rest."""
        return jax.tree.map(_standing_for, self.resting, self.summed, params, copies)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _standing_for(resting: NamedSharding, summed: NamedSharding, x: jax.Array, copy: jax.Array) -> jax.Array:
    del resting, summed, x
    return copy


def _scattered(resting: NamedSharding, summed: NamedSharding, _: None, dcopy: jax.Array) -> tuple[jax.Array, None]:
    dcopy = jax.lax.with_sharding_constraint(dcopy, summed)
    return jax.lax.with_sharding_constraint(dcopy, resting).astype(np.float32), None


_standing_for.defvjp(lambda resting, summed, x, copy: (copy, None), _scattered)


def batch_shardings(mesh: Mesh, lacking: Collection[str] = COMPARING) -> Batch:
    """Where a batch lives: rows over rules.ROWS, tokens over context, pictures with their row. `lacking`: what it has
    not got."""
    text = NamedSharding(mesh, rules.spec(("rows", "tokens"), rules.ACTIVATIONS))
    tiles = NamedSharding(mesh, rules.spec(("rows", None, None, None, None), rules.ACTIVATIONS))
    return Batch(**dict.fromkeys(Batch._fields, text) | dict.fromkeys(lacking) | dict(tiles=tiles))


def rows_here(mesh: Mesh, n_rows: int) -> tuple[int, ...]:
    """Those of a global batch's rows that this process's devices need, ascending: its share. Processes along `context`
    or `tensor` have the same share; on one process it is all of them.

    They need not stand together: on a torus the chips of one host may be neighbours along several mesh axes.
    """
    sharding = batch_shardings(mesh).tokens
    where = sharding.addressable_devices_indices_map((n_rows, mesh.shape["context"]))
    return tuple(sorted({row for rows, _ in where.values() for row in range(*rows.indices(n_rows))}))


def put_batch(batch: Batch, mesh: Mesh, n_rows: int | None = None, stripes: Stripes = WHOLE) -> Batch:
    """The global batch on the devices, from the rows that this process read: `rows_here`, all of their tokens.

    This is where tokens leave the row order: on the devices they stand in the shard order of `stripes`, and
    `context.SplitTokens.row_order` is the way back.

    Args:
      n_rows: of the global batch; None: this process has read them all. It must divide by the axes of rules.ROWS
        (`config.check_devices` sees to it).
    """
    n_rows = len(batch.tokens) if n_rows is None else n_rows
    mine = rows_here(mesh, n_rows)
    assert len(mine) == len(batch.tokens), f"{len(batch.tokens)} rows where {len(mine)} of {n_rows} are needed"
    place_of = {row: at for at, row in enumerate(mine)}

    def put(sharding: NamedSharding, x: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            rows = range(*index[0].indices(n_rows))
            return x[(slice(place_of[rows[0]], place_of[rows[-1]] + 1), *index[1:])]

        return jax.make_array_from_callback((n_rows, *x.shape[1:]), sharding, part)

    if stripes.n > 1:
        places = stripes.places(batch.tokens.shape[1])
        batch = batch._replace(**{name: x[:, places] for name, x in batch.of_tokens().items()})
    with jax.transfer_guard_host_to_device("allow"):  # it counts this way of putting, by name, as none by name
        return jax.tree.map(put, batch_shardings(mesh, batch.lacking()), batch)


def put_whole_batch(batch: Batch, mesh: Mesh, stripes: Stripes = WHOLE) -> Batch:
    """The same from all rows, which every process has read."""
    mine = rows_here(mesh, len(batch.tokens))
    return put_batch(jax.tree.map(lambda x: x[list(mine)], batch), mesh, len(batch.tokens), stripes)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every leaf on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def fetch(tree: Any) -> Any:
    """The tree as numpy arrays on every host; all processes must call it together."""

    def whole(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)
