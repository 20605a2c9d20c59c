"""Expert parallelism: each device along the mesh axis `expert` holds its part of the experts; tokens travel to them.

Rows of a batch are split over `expert` too. A device sorts its assignments (tokens times experts a token) by expert,
which orders them by the device that holds it, and sends every other device its share; that one runs its own experts on
what came, and sends the results back. All tell each other first how many assignments each has for every expert, from
which everyone knows who sends what where, and what it will be given: tokens travel once there and once back, and
nothing travels with them.

Nothing is dropped. What is for a device stands in a queue, device after device, expert after expert, of which it takes
the first R; a queue that is longer takes further passes, each skipped by all unless one has something left; so memory
is bounded and the result is exact.

Letters: N tokens, K experts a token, M = N K assignments of a device, D model width, E experts, e devices along the
axis (s where they send, d where they are sent to), R rows that a device takes in a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from llamax.parallel import tensor
from llamax.parallel.place import FLAT, PerShard

AXIS = "expert"
Weights = tuple[Array, ...]  # gate_EDF, up_EDF, down_EFD


# ------------------------------------------------------------------------------------------------- rows that travel


class Route(NamedTuple):
    """Row stretches that travel along the axis: `size[s, d]` rows of device s's array from `at[s, d]` on go to those of
    d's from `to[s, d]` on. int32 [e, e], the same on every device."""

    at_sd: Array
    size_sd: Array
    to_sd: Array

    def back(self) -> Route:
        return Route(self.to_sd.T, self.size_sd.T, self.at_sd.T)


def padded(x_SD: Array, rows: int, route: Route) -> Array:
    """[rows, D]: what arrives on this device, zeros where nothing does; by an `all_to_all` of stretches of one length,
    that of the longest there can be. The plain one, and the only one that works on CPU."""
    me, most = jax.lax.axis_index(AXIS), min(len(x_SD), rows)
    place_P = jnp.arange(most)
    sent_dP = place_P < route.size_sd[me][:, None]
    x_dPD = jnp.where(sent_dP[..., None], x_SD[jnp.where(sent_dP, route.at_sd[me][:, None] + place_P, 0)], 0)
    x_sPD = jax.lax.all_to_all(x_dPD, AXIS, 0, 0)
    place_sR = jnp.arange(rows) - route.to_sd[:, me][:, None]
    come_sR = (place_sR >= 0) & (place_sR < route.size_sd[:, me][:, None])
    source_R = jnp.argmax(come_sR, axis=0)
    place_R = jnp.take_along_axis(jnp.where(come_sR, place_sR, 0), source_R[None], axis=0)[0]
    return jnp.where(come_sR.any(0)[:, None], x_sPD[source_R, place_R], 0)


def ragged(x_SD: Array, rows: int, route: Route) -> Array:
    """`padded` on TPU and GPU: only what travels is sent."""
    me = jax.lax.axis_index(AXIS)
    from_d, size_d, to_d = (x_sd[me] for x_sd in route)
    nothing_RD = jnp.zeros((rows, x_SD.shape[1]), x_SD.dtype)
    return jax.lax.ragged_all_to_all(x_SD, nothing_RD, from_d, size_d, to_d, route.size_sd[:, me], axis_name=AXIS)


def pick_exchange(platform: str) -> Callable:
    """`ragged` where XLA has it."""
    return {"gpu": ragged, "tpu": ragged}.get(platform, padded)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def travel(exchange: Callable, rows: tuple[int, int], x_SD: Array, route: Route) -> Array:
    """`exchange` of an array of rows[0] rows to one of rows[1]; its gradient travels back the same way."""
    return exchange(x_SD, rows[1], route)


travel.defvjp(
    lambda exchange, rows, x_SD, route: (exchange(x_SD, rows[1], route), route),
    lambda exchange, rows, route, dy_RD: (exchange(dy_RD, rows[0], route.back()), None),
)


# -------------------------------------------------------------------------------------------------- experts, split


@dataclass(frozen=True)
class SplitExperts:
    """Experts `(x_ND, experts, index_NK, gate_NK, *, gate_on) -> y_ND`, split over `expert`, and by their hidden width
    over `tensor`. `axes`: the logical axes of the weights; of the first, the hidden width is the last.

    `buffer`: assignments that a device takes at once, as a multiple of an even share. `exchange`: how rows travel.
    """

    run_experts: Callable
    mesh: Mesh
    axes: Any
    buffer: float = 2.0
    exchange: Callable = padded

    def __call__(self, x_ND: Array, experts: Weights, index_NK: Array, gate_NK: Array, **how: Any) -> Array:
        e, t = (self.mesh.shape[axis] for axis in (AXIS, tensor.AXIS))
        E, _, F = experts[0].shape
        run: Callable = self.run_experts
        keep: tuple[str, ...] = ()
        if e > 1 and E % e == 0:
            run, keep = Exchanged(run, e, self.buffer, self.exchange), (*keep, AXIS)
        if t > 1 and F % t == 0:
            run, keep = tensor.Summed(run), (*keep, tensor.AXIS)
        return PerShard(run, self.mesh, (None, self.axes), keep, FLAT)(x_ND, experts, index_NK, gate_NK, **how)


@dataclass(frozen=True)
class Exchanged:
    """Inside shard_map: experts of all devices for the tokens of this one, given the weights of its own."""

    run_experts: Callable
    devices: int
    buffer: float
    exchange: Callable

    def __call__(self, x_ND: Array, experts: Weights, index_NK: Array, gate_NK: Array, *, gate_on: str) -> Array:
        (N, D), K, own = x_ND.shape, index_NK.shape[1], len(experts[0])
        one_NKD = jnp.broadcast_to(x_ND[:, None], (N, K, D))
        z_NKD = (gate_NK[..., None] * one_NKD).astype(x_ND.dtype) if gate_on == "input" else one_NKD
        index_M = index_NK.reshape(-1)
        order_M = jnp.argsort(index_M, stable=True)
        rank_M = jnp.zeros_like(order_M).at[order_M].set(jnp.arange(N * K, dtype=order_M.dtype), unique_indices=True)
        count_E = (index_M[:, None] == jnp.arange(self.devices * own)).sum(0, dtype=jnp.int32)
        count_sE = jax.lax.all_gather(count_E, AXIS)
        y_MD = self._passes(permuted(z_NKD.reshape(N * K, D), order_M), experts, count_sE)
        y_NKD = permuted(y_MD, rank_M).reshape(N, K, D)
        return (y_NKD if gate_on == "input" else gate_NK[..., None] * y_NKD).sum(1).astype(x_ND.dtype)

    def _passes(self, z_MD: Array, experts: Weights, count_sE: Array) -> Array:
        """What the experts give, for assignments sorted by expert; zeros for those of no expert."""
        M, e = len(z_MD), self.devices
        room = min(e * M, math.ceil(self.buffer * M))
        longest = count_sE.sum(0).reshape(e, -1).sum(1).max()  # of all queues: all devices go on, or none

        def run(n: Array | int, z_MD: Array, experts: Weights) -> Array:
            return self._once(n * room, room, z_MD, experts, count_sE)

        def further(y_MD: Array, n: Array) -> tuple[Array, None]:
            nothing = lambda n, z_MD, experts: jnp.zeros_like(z_MD)  # noqa: E731
            with jax.named_scope("rarely"):  # for plan/hlo.py
                rest_MD = jax.lax.cond(longest > n * room, jax.checkpoint(run), nothing, n, z_MD, experts)
            return y_MD + rest_MD, None

        first_MD, passes = run(0, z_MD, experts), math.ceil(e * M / room)
        return first_MD if passes == 1 else jax.lax.scan(further, first_MD, jnp.arange(1, passes))[0]

    def _once(self, at: Any, room: int, z_MD: Array, experts: Weights, count_sE: Array) -> Array:
        """The assignments at places `at` to `at + room` of every device's queue; zeros for all others."""
        route = route_of(at, room, count_sE.reshape(self.devices, self.devices, -1).sum(-1))
        z_RD = travel(self.exchange, (len(z_MD), room), z_MD, route)
        expert_R = expert_of(at + jnp.arange(room), count_sE, len(experts[0]))
        one_R1 = jnp.ones((room, 1), z_MD.dtype)
        with jax.named_scope(f"filled_{len(z_MD) / room:.4f}"):  # when balanced: for whoever counts FLOPs (plan/hlo.py)
            y_RD = self.run_experts(z_RD, experts, expert_R[:, None], one_R1, gate_on="input")
        return travel(self.exchange, (room, len(z_MD)), y_RD, route.back())


def permuted(x_MD: Array, order_M: Array) -> Array:
    """x[order]; that no row is taken twice makes its gradient no sum."""
    return x_MD.at[order_M].get(unique_indices=True, mode="promise_in_bounds")


def route_of(at: Array | int, room: int, count_sd: Array) -> Route:
    """Of what stands at places `at` to `at + room` of the queues, given how much each device has for each."""
    start_sd = jnp.cumsum(count_sd, axis=1) - count_sd  # in the sender's array
    place_sd = jnp.cumsum(count_sd, axis=0) - count_sd  # in the queue
    first_sd, end_sd = (jnp.clip(edge - place_sd, 0, count_sd) for edge in (at, at + room))
    return Route(start_sd + first_sd, end_sd - first_sd, jnp.clip(place_sd + first_sd - at, 0, room))


def expert_of(place_R: Array, count_sE: Array, own: int) -> Array:
    """int32 [R]: which of its own experts this device runs on what stands at these places of its queue; `own`, which is
    none of them and which kernels leave alone, behind its end."""
    count_s = jax.lax.dynamic_slice_in_dim(count_sE, jax.lax.axis_index(AXIS) * own, own, axis=1).reshape(-1)
    run_R = (jnp.cumsum(count_s)[:, None] <= place_R).sum(0, dtype=jnp.int32)  # of one sender's tokens for one expert
    return jnp.where(run_R < len(count_s), run_R % own, own)
