"""The rules of placement: two tables, logical axis -> mesh axes. A new rule is a row here.

Every dimension of a parameter or activation has a logical name, such as ("layers", "embed", "heads", "head_dim"), or
None. A table maps a name to the mesh axis, or axes, along which that dimension is split; None means each device has it
whole. FSDP is the row "embed": parameters and optimizer state are split over `fsdp` at rest; activations are split by
rows over the same axis, so the compiler gathers a weight where it is used (kernels run per shard gather theirs in
`place.py`).
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
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ffn": "tensor",
    "experts": "expert",
    "norm": None,
}

ACTIVATIONS: Table = {
    "rows": ROWS,
    "tokens": "context",
    "flat": (*ROWS, "context"),  # rows x tokens, or rows x tile slots, as one dimension: shard after shard
    "heads": "tensor",
}


def spec(axes: Axes, table: Table) -> PartitionSpec:
    """The rows of `table` for `axes`. A mesh axis splits one dimension only: the first that asks for it."""
    taken: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = []
    for name in axes:
        wanted = None if name is None else table[name]
        parts = set((wanted,) if isinstance(wanted, str) else wanted or ())
        granted = not parts & taken
        entries.append(wanted if granted else None)
        taken |= parts if granted else set()
    return PartitionSpec(*entries)


def ways(entry: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    """Parts that one entry of a PartitionSpec splits a dimension into."""
    size = 1
    for axis in (entry,) if isinstance(entry, str) else entry or ():
        size *= mesh.shape[axis]
    return size


def shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """Where each parameter lives: a tree of NamedSharding like `shapes`.

    `shapes` is a tree of arrays or `jax.ShapeDtypeStruct`s, `axes` the same tree with a tuple of logical names for
    each. A dimension that does not divide by its mesh axis stays whole on every device; `unsharded` lists those.
    """

    def place(x, names: Axes) -> NamedSharding:
        entries = spec(names, PARAMETERS)
        fit = (None if size % ways(entry, mesh) else entry for size, entry in zip(x.shape, entries, strict=True))
        return NamedSharding(mesh, PartitionSpec(*fit))

    return jax.tree.map(place, shapes, axes)


def unsharded(axes: Any, shapes: Any, mesh: Mesh) -> list[str]:
    """One line for each dimension that a rule would split and whose size forbids it, for the log."""
    lines = []

    def check(path, x, names: Axes) -> None:
        for name, size, entry in zip(names, x.shape, spec(names, PARAMETERS), strict=True):
            if size % ways(entry, mesh):
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                lines.append(f"{where}: {name}={size} stays whole, not divisible by {entry}={ways(entry, mesh)}")

    jax.tree_util.tree_map_with_path(check, shapes, axes)
    return lines
