"""The rules of placement: tables, logical axis -> mesh axes. A new rule is a row here.

Every dimension of a parameter or activation has a logical name, such as ("layers", "embed", "heads", "head_dim"), or
None. A table maps a name to the mesh axis, or axes, along which that dimension is split; None means each device has it
whole. FSDP is the row "embed": parameters are split over `fsdp`, and over every other axis that splits tokens and does
not cross slow links; activations are split by rows and tokens over the same axes, so the compiler gathers a weight
where it is used (kernels run per shard gather theirs in `place.py`). Of experts, which `expert` splits already, the
others split the rest.

A step computes with weights that are placed by PARAMETERS. Where master weights and the optimizer's state rest from
step to step is a preset of its own (`mesh.rules`): RESTING.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamax import config

Axes = tuple[str | None, ...]  # a logical name for every dimension
Table = Mapping[str, str | tuple[str, ...] | None]

ROWS = config.ROW_AXES

PARAMETERS: Table = {
    "layers": "pipeline",
    "vision_layers": None,
    "embed": ("fsdp", "expert", "context"),  # an axis further left is granted first
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ffn": "tensor",
    "experts": "expert",
    "norm": None,
}

# ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): what a step only updates is split over `data` too, the slow
# axis, and what it computes with is gathered over it once a step (place.Copies).
RESTING: Mapping[str, Table] = {
    "fsdp": PARAMETERS,
    "zero": {**PARAMETERS, "embed": ("fsdp", "expert", "context", "data")},
}

# TPUs keep 16 rows of bfloat16 together. To gather parts that are less, their compiler fills the whole with zeros on
# every device and sums: twice the bytes. So of a dimension from WIDE on, parts are multiples of TILE, or its first axis
# alone splits it.
TILE, WIDE = 16, 1024

ACTIVATIONS: Table = {
    "rows": ROWS,
    "tokens": "context",
    "flat": (*ROWS, "context"),  # rows x tokens, or rows x tile slots, as one dimension: shard after shard
    "heads": "tensor",
    "kv_heads": "tensor",  # of a cache; where there are more devices than kv heads, each has all (place.Constrain)
}


def spec(axes: Axes, table: Table) -> PartitionSpec:
    """The rows of `table` for `axes`. A mesh axis splits one dimension only: the first that asks for it."""
    taken: set[str] = set()
    return PartitionSpec(*(_granted(name, table, taken) for name in axes))


def fitting(axes: Axes, shape: tuple[int, ...], table: Table, mesh: Mesh) -> PartitionSpec:
    """The same for an array of that shape: an axis that does not divide what the ones before it leave is not granted,
    and free for another dimension. So what a longer row of the table adds splits the same parts further."""
    taken: set[str] = set()
    entries = zip(axes, shape, strict=True)
    return PartitionSpec(*(_granted(name, table, taken, size, mesh) for name, size in entries))


def _granted(name: str | None, table: Table, taken: set[str], size: int = 0, mesh: Mesh | None = None) -> Any:
    """One entry of a PartitionSpec; its axes go to `taken`."""
    wanted = None if name is None else table[name]
    granted: tuple[str, ...] = ()
    for axis in (wanted,) if isinstance(wanted, str) else wanted or ():
        if axis not in taken and (mesh is None or _splits(size, granted, axis, mesh)):
            granted = (*granted, axis)
    taken.update(granted)
    return granted if len(granted) > 1 else granted[0] if granted else None


def _splits(size: int, granted: tuple[str, ...], axis: str, mesh: Mesh) -> bool:
    """Whether an axis splits a dimension further: evenly and, of a wide one, into whole tiles."""
    part, rest = divmod(size, ways((*granted, axis), mesh))
    alone = ways(granted, mesh) == 1 or mesh.shape[axis] == 1
    return not rest and (alone or size < WIDE or part % TILE == 0)


def ways(entry: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    """Parts that one entry of a PartitionSpec splits a dimension into."""
    size = 1
    for axis in (entry,) if isinstance(entry, str) else entry or ():
        size *= mesh.shape[axis]
    return size


def shardings(axes: Any, shapes: Any, mesh: Mesh, table: Table = PARAMETERS) -> Any:
    """Where each parameter lives: a tree of NamedSharding like `shapes`.

    `shapes` is a tree of arrays or `jax.ShapeDtypeStruct`s, `axes` the same tree with a tuple of logical names for
    each. A dimension that does not divide by its mesh axes is split by fewer; `unsharded` lists those.
    """

    def place(x, names: Axes) -> NamedSharding:
        return NamedSharding(mesh, fitting(names, x.shape, table, mesh))

    return jax.tree.map(place, shapes, axes)


def unsharded(axes: Any, shapes: Any, mesh: Mesh, table: Table = PARAMETERS) -> list[str]:
    """One line for each dimension that a rule would split and whose size forbids it, for the log."""
    lines = []

    def check(path, x, names: Axes) -> None:
        for name, size, entry, got in zip(
            names, x.shape, spec(names, table), fitting(names, x.shape, table, mesh), strict=True
        ):
            if ways(got, mesh) < ways(entry, mesh) and size % ways(entry, mesh):
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                split = f"is split by {_named(got, mesh)}" if ways(got, mesh) > 1 else "stays whole"
                lines.append(f"{where}: {name}={size} {split}, not divisible by {_named(entry, mesh)}")

    jax.tree_util.tree_map_with_path(check, shapes, axes)
    return lines


def _named(entry: Any, mesh: Mesh) -> str:
    """An entry's axes with their sizes, those of size 1 left out."""
    names = (entry,) if isinstance(entry, str) else entry or ()
    return " * ".join(f"{axis}={mesh.shape[axis]}" for axis in names if mesh.shape[axis] > 1)
