"""Ring attention: causal attention over rows whose tokens are split over devices, a shard each.

Every device keeps its queries. Keys and values, with the positions and segments that decide who sees whom, go round the
ring, from each device to the next, and are looked at as they pass by: sums of the online softmax are kept until the
last has been seen. A shard is on its way to the next device while this one looks at it. (Liu et al. 2023,
arXiv:2310.01889; the order of tokens: stripes.py.)

Backward goes round again. From o and the logarithm of the normaliser z,

    p = exp(q . k - log z)    dv = p^T do    ds = p (do . v - do . o)    dq = ds k    dk = ds^T q,

dq adds up at home, dk and dv travel with their keys and come home with the last turn. No device ever holds more than
two shards, or a [T, T] of anything; a step looks at tiles of C queries by C keys, one pair after the other.

Which pairs can see each other at all is known from the order of the shards alone, so every loop has a fixed length. In
zigzag, shard i being stripes i and 2c - 1 - i, a visitor from before i has its early stripe seen by all queries and its
late one by none, a visitor from behind i has both seen by the late queries only: half of all pairs either way, and no
device waits for another. With one stripe a shard there is nothing to do for visitors from behind.

Letters: B rows, T tokens of a shard, H query heads, K kv heads, G = H // K, Dh head dim; n tiles of C tokens; c shards.
Scores and sums are float32; what is multiplied is of the inputs' dtype.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from llamax.kernels.attention import ATTENDED, MASKED


class Ring(NamedTuple):
    """Static: how rows are cut, and how many tokens a tile has."""

    axis: str  # of the mesh
    shards: int
    each: int  # stripes of a shard
    tile: int

    def pass_on(self, tree: Any) -> Any:
        """What the device before has; it gets what is given here to the one behind."""
        return jax.lax.ppermute(tree, self.axis, [(i, (i + 1) % self.shards) for i in range(self.shards)])

    def meet(self, turn: Array | int, tiles: int, look, sums: Any) -> Any:
        """look(sums, pairs) at what came here in this turn from so many shards before: pairs of (query, key) tiles."""
        earlier = jax.lax.axis_index(self.axis) >= turn
        if self.each == 1:
            return jax.lax.cond(earlier, lambda sums: look(sums, rectangle(0, tiles, tiles)), lambda sums: sums, sums)
        half = tiles // 2
        pairs = jnp.where(earlier, rectangle(0, tiles, half), rectangle(half, tiles, tiles))
        return look(sums, pairs)


def rectangle(first: int, queries: int, keys: int) -> np.ndarray:
    """int32 [pairs, 2]: tiles of queries from `first` on, each with all tiles of keys."""
    return np.array([(i, j) for i in range(first, queries) for j in range(keys)], np.int32)


def triangle(tiles: int) -> np.ndarray:
    """int32 [pairs, 2]: each tile of queries with those of keys up to itself. Itself first: then the running maximum
    is a real score from the start."""
    return np.array([(i, j) for i in range(tiles) for j in range(i, -1, -1)], np.int32)


def ring_attention(q_BTHDh, k_BTKDh, v_BTKDh, *, q_pos, k_pos, q_seg, k_seg, ring: Ring):
    """`slow_attention` of the whole row, for this device's queries; inside `jax.shard_map` over `ring.axis`.

    All arrays are those of the device's own tokens, for queries and keys the same.
    """
    del k_pos, k_seg
    B, T, H, Dh = q_BTHDh.shape
    K = k_BTKDh.shape[2]
    C = max(d for d in range(1, ring.tile + 1) if (T // ring.each) % d == 0)

    def tiled(x):  # [B, T, ...] -> [n, B, C, ...]
        return x.reshape(B, T // C, C, *x.shape[2:]).swapaxes(0, 1)

    q = tiled(q_BTHDh.reshape(B, T, K, H // K, Dh)).transpose(0, 1, 3, 4, 2, 5)
    k, v = (tiled(x).swapaxes(2, 3) for x in (k_BTKDh, v_BTKDh))
    o = _attend(ring, q, k, v, (tiled(q_pos), tiled(q_seg)))
    return o.transpose(1, 0, 4, 2, 3, 5).reshape(B, T, H, Dh)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: Ring, q, k, v, ids):
    """q [n, B, K, G, C, Dh]; k, v [n, B, K, C, Dh]; ids: positions and segments [n, B, C]. Returns o like q."""
    return _forward(ring, q, k, v, ids)[0]


def _forward(ring: Ring, q, k, v, ids):
    # Under `jax.checkpoint`, what ids alone decide would be no part of what is computed again: the masks of all tiles
    # were kept for the backward pass, a byte for every score. Now ids cannot be told from q.
    q, ids = jax.lax.optimization_barrier((q, ids))
    n, look = len(q), partial(_look, q, ids)
    visitor = ring.pass_on((k, v, ids))
    start = (jnp.full(q.shape[:-1], MASKED), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape, jnp.float32))
    sums = look((k, v, ids), start, triangle(n))

    def turn(carry, step):
        sums, visitor = carry
        onward = ring.pass_on(visitor)
        return (ring.meet(step, n, partial(look, visitor), sums), onward), None

    (sums, visitor), _ = _turns(turn, (sums, visitor), ring)
    m, z, acc = ring.meet(ring.shards - 1, n, partial(look, visitor), sums)
    o, log_z = (checkpoint_name(x, ATTENDED) for x in ((acc / z[..., None]).astype(q.dtype), m + jnp.log(z)))
    return o, (q, k, v, ids, o, log_z)


def _backward(ring: Ring, saved, do):
    q, k, v, ids, o, log_z = saved
    delta = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1)
    n, look = len(q), partial(_look_back, q, ids, do, log_z, delta)
    visitor = ring.pass_on((k, v, ids))
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    dq, grads = look((k, v, ids), (jnp.zeros(q.shape, jnp.float32), zeros), triangle(n))

    def meet(step, dq, grads, visitor):
        arriving = ring.pass_on(grads)  # of the visitor, from all that it has visited: nothing here waits for it
        dq, new = ring.meet(step, n, partial(look, visitor), (dq, zeros))
        return dq, jax.tree.map(jnp.add, arriving, new)

    def turn(carry, step):
        dq, grads, visitor = carry
        onward = ring.pass_on(visitor)
        return (*meet(step, dq, grads, visitor), onward), None

    (dq, grads, visitor), _ = _turns(turn, (dq, grads, visitor), ring)
    dq, grads = meet(ring.shards - 1, dq, grads, visitor)
    dk, dv = ring.pass_on(grads)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _turns(turn, carry, ring: Ring):
    """All turns but the last, after which nothing goes on."""
    return jax.lax.scan(turn, carry, jnp.arange(1, ring.shards - 1)) if ring.shards > 2 else (carry, None)


def _scores(q, k, q_ids, k_ids):
    """float32 [B, K, G, C, C] of a tile of queries and one of keys; MASKED where a query does not see a key."""
    (q_pos, q_seg), (k_pos, k_seg) = q_ids, k_ids
    score = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    sees = (q_seg[:, :, None] == k_seg[:, None, :]) & (k_pos[:, None, :] <= q_pos[:, :, None])
    return jnp.where(sees[:, None, None], score, MASKED)


def _at(tree: Any, i: Array) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def _look(q, ids, visitor, sums, pairs):
    """Running maximum, sum and weighted values of all tiles of queries, after the pairs with the visitor's keys."""
    k, v, k_ids = visitor

    def pair(sums, ij):
        i, j = ij
        m, z, acc = _at(sums, i)
        score = _scores(q[i], k[j], _at(ids, i), _at(k_ids, j))
        top = jnp.maximum(m, score.max(-1))
        p, shrink = jnp.exp(score - top[..., None]), jnp.exp(m - top)
        seen = jnp.einsum("bkgts,bksd->bkgtd", p.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
        new = (top, z * shrink + p.sum(-1), acc * shrink[..., None] + seen)
        return jax.tree.map(lambda all, one: all.at[i].set(one), sums, new), None

    return jax.lax.scan(pair, sums, jnp.asarray(pairs))[0]


def _look_back(q, ids, do, log_z, delta, visitor, grads, pairs):
    """(dq, (dk, dv)) with what the pairs add to them."""
    k, v, k_ids = visitor
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def pair(grads, ij):
        dq, (dk, dv) = grads
        i, j = ij
        p = jnp.exp(_scores(q[i], k[j], _at(ids, i), _at(k_ids, j)) - log_z[i][..., None])
        dp = product("bkgtd,bksd->bkgts", do[i], v[j])
        ds = (p * (dp - delta[i][..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
        dq = dq.at[i].add(product("bkgts,bksd->bkgtd", ds, k[j]))
        dk = dk.at[j].add(product("bkgts,bkgtd->bksd", ds, q[i]))
        dv = dv.at[j].add(product("bkgts,bkgtd->bksd", p.astype(do.dtype), do[i]))
        return (dq, (dk, dv)), None

    return jax.lax.scan(pair, grads, jnp.asarray(pairs))[0]
