"""Context parallelism: the tokens of a row split over the mesh axis `context`, in stripes (llamax/stripes.py).

What a token does by itself needs nothing of this. Three things look at several tokens of a row: attention, the running
count by which pictures find their places, and the balance of a document's routing. Local layers see chunks of C tokens,
and no chunk lies in two stripes: each device attends to its own tokens with the kernel of one device, and exchanges
nothing. Layers that see the whole row pass keys and values round a ring (kernels/ring.py).

Letters: B rows, T tokens a row, N = B T, R ways in which rows are split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from llamax.parallel import rules
from llamax.parallel.place import FLAT, left_here, seen_here, split_already
from llamax.stripes import Stripes

AXIS = "context"


@dataclass(frozen=True)
class LocalOrRing:
    """Inside shard_map: attention of a device's own tokens; to a whole row by `ring_attention`, for which `ring` is."""

    local: Callable
    ring_attention: Callable
    ring: Any

    def __call__(self, *qkv: Array, local_len: int | None = None, **ids: Array) -> Array:
        if local_len is not None:
            return self.local(*qkv, local_len=local_len, **ids)
        return self.ring_attention(*qkv, ring=self.ring, **ids)


@dataclass(frozen=True)
class Tokens:
    """What the model asks about the tokens of a row, where rows are whole."""

    def flat(self, x_BT: Array) -> Array:
        """[B, T, ...] -> [N, ...]."""
        return x_BT.reshape(-1, *x_BT.shape[2:])

    def unflat(self, x_N: Array, rows: int) -> Array:
        """[N, ...] -> [B, T, ...], the inverse of `flat`."""
        return x_N.reshape(rows, -1, *x_N.shape[1:])

    def row_order(self, x: Array, dim: int = 1) -> Array:
        """x with the tokens along `dim` as they stand in the row."""
        del dim
        return x

    def running(self, x_BT: Array) -> Array:
        """Running sums over the tokens as they stand in the row."""
        return jnp.cumsum(x_BT, axis=1)


@dataclass(frozen=True)
class SplitTokens(Tokens):
    """The same where rows are cut: arrays [B, T, ...] are in shard order, split over rows and tokens."""

    mesh: Mesh
    stripes: Stripes

    def flat(self, x_BT: Array) -> Array:
        """Each device flattens its own part: in plain row-major order no split of N would be the one of B and T."""
        spec, flat = (rules.spec(names, rules.ACTIVATIONS) for names in (("rows", "tokens"), FLAT))
        return self._by_hand(super().flat, spec, flat)(x_BT)

    def unflat(self, x_N: Array, rows: int) -> Array:
        spec, flat = (rules.spec(names, rules.ACTIVATIONS) for names in (("rows", "tokens"), FLAT))
        own = rows // rules.ways(left_here(spec)[0], self.mesh)
        return self._by_hand(lambda x: Tokens.unflat(self, x, own), flat, spec)(x_N)

    def _by_hand(self, fn: Callable, came: PartitionSpec, goes: PartitionSpec) -> Callable:
        axes = set(self.mesh.axis_names) - split_already()
        here = partial(jax.shard_map, mesh=seen_here(self.mesh), axis_names=axes)
        return here(fn, in_specs=left_here(came), out_specs=left_here(goes))

    def row_order(self, x: Array, dim: int = 1) -> Array:
        return jnp.take(x, np.argsort(self.stripes.places(x.shape[dim])), axis=dim)

    def running(self, x_BT: Array) -> Array:
        return jnp.take(super().running(self.row_order(x_BT)), self.stripes.places(x_BT.shape[1]), axis=1)
