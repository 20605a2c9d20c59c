"""Looking tokens up in an embedding whose width is split over the axes that split tokens, its vocabulary over `tensor`.

The table is by far larger than what a device looks up, so it stays where it is: a device looks its slice of the width
up for the tokens of all devices that have the other slices, and an all-to-all turns slices of the width of many tokens
into the whole width of its own. Its gradient goes the same way back, to where the table is. Left to the compiler, both
were copied to every device first.

Letters: B rows, T tokens, V vocabulary, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from llamax.parallel import rules, tensor

TOKENS, WHOLE_ROWS = ("rows", "tokens"), ("flat", None)  # how tokens [B, T] are split


def lookup(table_VD: Array, tokens_BT: Array, dtype: Any) -> Array:
    return table_VD[tokens_BT].astype(dtype)


@dataclass(frozen=True)
class SplitLookup:
    """`lookup` on a mesh. `axes`: the logical axes of the table; `tokens`: of what is looked up."""

    mesh: Mesh
    axes: rules.Axes
    tokens: rules.Axes = TOKENS

    def __call__(self, table_VD: Array, tokens_BT: Array, dtype: Any) -> Array:
        if self.mesh.size == 1:
            return lookup(table_VD, tokens_BT, dtype)
        table = rules.fitting(self.axes, table_VD.shape, rules.PARAMETERS, self.mesh)
        tokens = rules.spec(self.tokens, rules.ACTIVATIONS)
        local = partial(_local, dtype=dtype, table=table, tokens=tokens)
        out = PartitionSpec(*tokens, None)
        split = jax.shard_map(local, mesh=self.mesh, in_specs=(table, tokens), out_specs=out, check_vma=False)
        return split(table_VD, tokens_BT)


def _local(table_VD: Array, tokens_BT: Array, *, dtype: Any, table: PartitionSpec, tokens: PartitionSpec) -> Array:
    vocab, width = (_names(entry) for entry in table)
    # Of the axes that split the width: those that split rows, and those that split the tokens of a row.
    exchanged = [tuple(axis for axis in width if axis in _names(entry)) for entry in tokens]
    assert width == (*exchanged[0], *exchanged[1]), f"slices of the width come in another order: {width}"
    for dim, axes in enumerate(exchanged):
        if axes:
            tokens_BT = jax.lax.all_gather(tokens_BT, axes, axis=dim, tiled=True)
    if vocab:
        assert vocab == (tensor.AXIS,), vocab
        here_BT = tokens_BT - jax.lax.axis_index(vocab) * len(table_VD)
        mine_BT = (here_BT >= 0) & (here_BT < len(table_VD))
        x_BTD = lookup(table_VD, jnp.where(mine_BT, here_BT, 0), dtype)
        x_BTD = jax.lax.psum(jnp.where(mine_BT[..., None], x_BTD, 0), vocab)
    else:
        x_BTD = lookup(table_VD, tokens_BT, dtype)
    for dim in (1, 0):  # the last axis of the width varies fastest
        if exchanged[dim]:
            x_BTD = jax.lax.all_to_all(x_BTD, exchanged[dim], dim, 2, tiled=True)
    return x_BTD


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()
