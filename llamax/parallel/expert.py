"""Expert parallelism: each device along the mesh axis `expert` holds its part of the experts; tokens travel to them.

Rows of a batch are split over `expert` too. A device sorts its assignments (tokens times experts a token) by expert,
which orders them by the device that holds it, sends every other device its share by an `all_to_all`, runs its own
experts on what came, and sends the results back the same way. Nothing is dropped: a share that is larger than a buffer
takes further passes, each skipped by all unless one has something left; so memory is bounded and the result is exact.

Letters: N tokens, K experts a token, M = N K assignments of a device, D model width, E experts, e devices along the
axis, P places of a buffer for each pair of devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from llamax.parallel import tensor
from llamax.parallel.place import FLAT, PerShard

AXIS = "expert"
Weights = tuple[Array, ...]  # gate_EDF, up_EDF, down_EFD


@dataclass(frozen=True)
class SplitExperts:
    """Experts `(x_ND, experts, index_NK, gate_NK, *, gate_on) -> y_ND`, split over `expert`, and by their hidden width
    over `tensor`. `axes`: the logical axes of the weights; of the first, the hidden width is the last.

    `buffer`: assignments that a device takes from another at once, as a multiple of an even share.
    """

    run_experts: Callable
    mesh: Mesh
    axes: Any
    buffer: float = 2.0

    def __call__(self, x_ND: Array, experts: Weights, index_NK: Array, gate_NK: Array, **how: Any) -> Array:
        e, t = (self.mesh.shape[axis] for axis in (AXIS, tensor.AXIS))
        E, _, F = experts[0].shape
        run: Callable = self.run_experts
        keep: tuple[str, ...] = ()
        if e > 1 and E % e == 0:
            run, keep = Exchanged(run, e, self.buffer), (*keep, AXIS)
        if t > 1 and F % t == 0:
            run, keep = tensor.Summed(run), (*keep, tensor.AXIS)
        return PerShard(run, self.mesh, (None, self.axes), keep, FLAT)(x_ND, experts, index_NK, gate_NK, **how)


@dataclass(frozen=True)
class Exchanged:
    """Inside shard_map: experts of all devices for the tokens of this one, given the weights of its own."""

    run_experts: Callable
    devices: int
    buffer: float

    def __call__(self, x_ND: Array, experts: Weights, index_NK: Array, gate_NK: Array, *, gate_on: str) -> Array:
        (N, D), K, own = x_ND.shape, index_NK.shape[1], len(experts[0])
        one_NKD = jnp.broadcast_to(x_ND[:, None], (N, K, D))
        z_NKD = (gate_NK[..., None] * one_NKD).astype(x_ND.dtype) if gate_on == "input" else one_NKD
        index_M = index_NK.reshape(-1)
        order_M = jnp.argsort(index_M, stable=True)
        rank_M = jnp.zeros_like(order_M).at[order_M].set(jnp.arange(N * K, dtype=order_M.dtype), unique_indices=True)
        y_MD = self._passes(z_NKD.reshape(N * K, D)[order_M], experts, index_M[order_M], own)
        y_NKD = y_MD[rank_M].reshape(N, K, D)
        return (y_NKD if gate_on == "input" else gate_NK[..., None] * y_NKD).sum(1).astype(x_ND.dtype)

    def _passes(self, z_MD: Array, experts: Weights, index_M: Array, own: int) -> Array:
        """What the experts give, for assignments sorted by expert."""
        M = len(z_MD)
        places = min(M, math.ceil(self.buffer * M / self.devices))
        to_M = index_M // own
        count_e = (to_M[:, None] == jnp.arange(self.devices)).sum(0, dtype=jnp.int32)
        start_e = jnp.cumsum(count_e) - count_e
        most = jax.lax.pmax(count_e.max(), AXIS)  # of any pair of devices: all go on, or none

        @jax.checkpoint
        def run(n: Array | int, z_MD: Array, experts: Weights) -> Array:
            return self._once(n * places, places, z_MD, experts, index_M, (to_M, count_e, start_e))

        def further(y_MD: Array, n: Array) -> tuple[Array, None]:
            rest = jax.lax.cond(most > n * places, run, lambda n, z, experts: jnp.zeros_like(z), n, z_MD, experts)
            return y_MD + rest, None

        first = run(0, z_MD, experts)
        passes = math.ceil(M / places)
        return first if passes == 1 else jax.lax.scan(further, first, jnp.arange(1, passes))[0]

    def _once(self, at: Any, places: int, z_MD: Array, experts: Weights, index_M: Array, queues: tuple) -> Array:
        """The assignments at places `at` to `at + places` of the queue for each device; zeros for all others."""
        to_M, count_e, start_e = queues
        place_eP = at + jnp.arange(places) + jnp.zeros_like(count_e)[:, None]
        sent_eP = place_eP < count_e[:, None]
        source_eP = jnp.where(sent_eP, start_e[:, None] + place_eP, 0)
        z_ePD = jnp.where(sent_eP[..., None], z_MD[source_eP], 0)
        none = len(experts[0])  # of no expert: a kernel leaves these rows alone
        expert_eP = jnp.where(sent_eP, index_M[source_eP] % none, none)
        z_ePD, expert_eP = (jax.lax.all_to_all(x, AXIS, 0, 0) for x in (z_ePD, expert_eP))
        z_RD, one_R1 = z_ePD.reshape(-1, z_MD.shape[1]), jnp.ones((expert_eP.size, 1), z_MD.dtype)
        y_RD = self.run_experts(z_RD, experts, expert_eP.reshape(-1, 1), one_R1, gate_on="input")
        y_ePD = jax.lax.all_to_all(y_RD.reshape(z_ePD.shape), AXIS, 0, 0)
        mine_M = jnp.arange(len(z_MD)) - start_e[to_M] - at
        here_M = (mine_M >= 0) & (mine_M < places)
        return jnp.where(here_M[:, None], y_ePD[to_M, jnp.where(here_M, mine_M, 0)], 0)
