"""Tensor parallelism: heads, hidden widths and the vocabulary split over the mesh axis `tensor`.

Projections are left to the compiler, which multiplies with its columns of one matrix, its rows of the next, and sums
once (Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053). What runs per shard (place.py) is split here; experts in
expert.py. A size that does not divide by the axis stays whole on every device, which then all do the same work.

Letters: N tokens, D model width, F hidden width, V vocabulary, H heads, K heads of keys and values, t devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from llamax.parallel import rules
from llamax.parallel.place import FLAT, PerShard

AXIS = "tensor"
HEADS = ("rows", "tokens", "heads", None)  # of queries, keys, values and what attention gives: [B, T, H, Dh]
WHOLE_HEADS = ("flat", None, "heads", None)  # where no row is cut


@dataclass(frozen=True)
class SplitHeads:
    """Attention `(q_BTHDh, k_BTKDh, v_BTKDh, **rows) -> o_BTHDh`, each device on its own heads.

    Where there are fewer heads of keys and values than devices, each is copied to the devices whose queries read it.
    """

    attention: Callable
    mesh: Mesh
    dims: rules.Axes = HEADS

    def __call__(self, q_BTHDh: Array, k_BTKDh: Array, v_BTKDh: Array, **rows: Any) -> Array:
        t, H, K = self.mesh.shape[AXIS], q_BTHDh.shape[2], k_BTKDh.shape[2]
        if t == 1 or H % t or (K % t and t % K):
            return PerShard(self.attention, self.mesh, rows=self.dims[:2])(q_BTHDh, k_BTKDh, v_BTKDh, **rows)
        if K % t:
            k_BTKDh, v_BTKDh = (jnp.repeat(x, t // K, axis=2) for x in (k_BTKDh, v_BTKDh))
        return PerShard(self.attention, self.mesh, rows=self.dims)(q_BTHDh, k_BTKDh, v_BTKDh, **rows)


@dataclass(frozen=True)
class Summed:
    """Inside shard_map: a function whose results are parts of a sum over the axis."""

    fn: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        part = self.fn(*args, **kwargs)
        return jax.lax.psum(part.astype(jnp.float32), AXIS).astype(part.dtype)


@dataclass(frozen=True)
class SplitVocabulary:
    """Cross-entropy `(hidden_ND, head_DV, targets_N) -> (nll_N, logz_N)`, each device on its part of the vocabulary."""

    cross_entropy: Callable
    mesh: Mesh
    axes: Any

    def __call__(self, hidden_ND: Array, head_DV: Array, targets_N: Array) -> tuple[Array, Array]:
        t, V = self.mesh.shape[AXIS], head_DV.shape[-1]
        if t == 1 or V % t:
            return PerShard(self.cross_entropy, self.mesh, (None, self.axes), rows=FLAT)(hidden_ND, head_DV, targets_N)
        parts = PerShard(PartsOfVocabulary(self.cross_entropy), self.mesh, (None, self.axes), (AXIS,), FLAT)
        return parts(hidden_ND, head_DV, targets_N)


@dataclass(frozen=True)
class PartsOfVocabulary:
    """Inside shard_map: logz = log sum_t exp(logz_t), and the target's logit from the device that has its column."""

    cross_entropy: Callable

    def __call__(self, hidden_ND: Array, head_DV: Array, targets_N: Array) -> tuple[Array, Array]:
        here_N = targets_N - jax.lax.axis_index(AXIS) * head_DV.shape[1]
        mine_N = (here_N >= 0) & (here_N < head_DV.shape[1])
        nll_N, part_N = self.cross_entropy(hidden_ND, head_DV, jnp.where(mine_N, here_N, 0))
        top_N = jax.lax.pmax(jax.lax.stop_gradient(part_N), AXIS)
        logz_N = top_N + jnp.log(jax.lax.psum(jnp.exp(part_N - top_N), AXIS))
        logit_N = jax.lax.psum(jnp.where(mine_N, part_N - nll_N, 0), AXIS)
        return logz_N - logit_N, logz_N
