"""Causal attention over packed rows: one signature, a slow twin, and a fast function per platform.

    o[t, h] = sum_s p[t, s, h] v[s, h // G]
    p[t, :, h] = softmax of q[t, h] . k[s, h // G] / sqrt(Dh) over the keys s that t sees

Query t sees key s iff both carry the same segment id and pos[s] <= pos[t]. A row holds its segments one after another,
positions ascend inside a segment, and segment 0 is padding: its output is finite and means nothing. A layer that sees
chunks of C tokens only is the same thing with finer segment ids (and says so with `local_len=C`, which lets a kernel
with a static grid leave blocks out).

The blocked algorithm is FlashAttention (Dao et al. 2022, arXiv:2205.14135; the backward of FlashAttention-2,
arXiv:2307.08691): tiles of C queries by C keys, a running maximum m and sum l, and only the logarithm of the
normaliser is kept for the backward pass, which computes the tiles again.

Letters: B rows, T tokens a row, H query heads, K kv heads, G = H // K query heads a kv head, Dh head dim; here also
n tiles a row and C tokens a tile. Scores, softmax and sums are float32 whatever the inputs are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llamax.kernels.varying import full_like, vary_alike

ATTENDED = "attended"  # what the backward pass of a fast kernel needs beside q, k, v (model/remat.py)
MASKED = -1e30  # finite: a row without any key stays free of NaN
KEYS = 512  # places of a cache that a tile of queries meets at once
TILE = 64  # tokens a tile: of 64, 128 and 256 the least time on 2 cores (bench/kernel_times.py), fewest future keys


# ------------------------------------------------------------------------------------------------------ the slow twin


def slow_attention(q_BTHDh, k_BSKDh, v_BSKDh, *, q_pos, k_pos, q_seg, k_seg, local_len=None):
    """Attention with the full [B, H, T, S] matrix of scores: the definition, and the truth that the others are held to.

    q_BTHDh [B, T, H, Dh]; k_BSKDh, v_BSKDh [B, S, K, Dh]; q_pos, q_seg int32 [B, T]; k_pos, k_seg int32 [B, S].
    S may differ from T. `local_len` says nothing that the segment ids do not. Returns [B, T, H, Dh] in q's dtype.
    """
    B, T, H, Dh = q_BTHDh.shape
    K = k_BSKDh.shape[2]
    q_BTKGDh = q_BTHDh.astype(jnp.float32).reshape(B, T, K, H // K, Dh) * Dh**-0.5
    score_BKGTS = jnp.einsum("btkgd,bskd->bkgts", q_BTKGDh, k_BSKDh.astype(jnp.float32))
    sees_BTS = (q_seg[:, :, None] == k_seg[:, None, :]) & (k_pos[:, None, :] <= q_pos[:, :, None])
    p_BKGTS = jax.nn.softmax(jnp.where(sees_BTS[:, None, None], score_BKGTS, MASKED), axis=-1)
    o_BTKGDh = jnp.einsum("bkgts,bskd->btkgd", p_BKGTS, v_BSKDh.astype(jnp.float32))
    return o_BTKGDh.reshape(B, T, H, Dh).astype(q_BTHDh.dtype)


# ------------------------------------------------------------------------------------------------- against a cache


def cached_attention(
    q_BTHDh, past_k_BKSDh, past_v_BKSDh, k_BKTDh, v_BKTDh, *, q_pos, k_pos, q_seg, k_seg, past_pos, past_seg
):
    """`slow_attention` over the keys of a cache and the new ones, without a copy of both together.

    The cache is read as it lies, heads before tokens: [B, K, S, Dh]; past_pos, past_seg int32 [B, S]. Segment 0 is an
    empty place. Few queries meet all places at once. Many go in tiles, and a tile meets `KEYS` places at a time, from
    the first to the last that one of its queries sees: a cache costs what it holds and not its room.
    """
    B, T, H, Dh = q_BTHDh.shape
    K, dtype = k_BKTDh.shape[1], q_BTHDh.dtype
    kv = (x.astype(dtype) for x in (past_k_BKSDh, past_v_BKSDh, k_BKTDh, v_BKTDh))
    past, new = (next(kv), next(kv), past_pos, past_seg), (next(kv), next(kv), k_pos, k_seg)

    def attend(tile):
        q_BCHDh, *at = tile
        C = q_BCHDh.shape[1]
        q = q_BCHDh.reshape(B, C, K, H // K, Dh).transpose(0, 2, 3, 1, 4)
        o = _at_once(q, *at, past, new) if T <= TILE else _in_turn(q, *at, past, new)
        return o.transpose(0, 3, 1, 2, 4).reshape(B, C, H, Dh).astype(dtype)

    if T <= TILE:
        return attend((q_BTHDh, q_pos, q_seg))
    n = -(-T // TILE)

    def tiled(x):  # [B, T, ...] -> [n, B, TILE, ...]
        x = jnp.pad(x, ((0, 0), (0, n * TILE - T)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, n, TILE, *x.shape[2:]).swapaxes(0, 1)

    o_nBCHDh = jax.lax.map(attend, (tiled(q_BTHDh), tiled(q_pos), tiled(q_seg)))
    return o_nBCHDh.swapaxes(0, 1).reshape(B, n * TILE, H, Dh)[:, :T]


# Of a tile of queries q [B, K, G, C, Dh] at pos, seg [B, C]. Keys: (k, v, pos, seg), [B, K, S, Dh] and [B, S].


def _at_once(q, q_pos, q_seg, past, new):
    score = jnp.concatenate([_scores(q, q_pos, q_seg, *keys) for keys in (past, new)], axis=-1)
    p_past, p_new = jnp.split(jax.nn.softmax(score, axis=-1), [past[0].shape[2]], axis=-1)
    return _weighed(q, p_past, past[1]) + _weighed(q, p_new, new[1])


def _in_turn(q, q_pos, q_seg, past, new):
    """As in the blocked algorithm. A query that has met no key it sees carries a sum that means nothing, and that the
    first real score makes 0: at the latest its own, for a token sees itself."""
    carry = (full_like(q, q.shape[:-1], MASKED), full_like(q, q.shape[:-1]), full_like(q, q.shape))
    for k, v, pos, seg in (past, new):
        S = k.shape[2]
        n = min(KEYS, S)

        def add(j, carry, keys=(k, v, pos, seg), S=S, n=n):
            m, z, acc = carry
            # The last places, which n need not divide, reach back into the ones before: what is not new is masked.
            start = jnp.minimum(j * n, S - n)
            k, v, pos, seg = (jax.lax.dynamic_slice_in_dim(x, start, n, axis=x.ndim // 2) for x in keys)
            score = _scores(q, q_pos, q_seg, k, v, pos, jnp.where(start + jnp.arange(n) >= j * n, seg, -1))
            m_new = jnp.maximum(m, score.max(-1))
            p, shrink = jnp.exp(score - m_new[..., None]), jnp.exp(m - m_new)
            return m_new, z * shrink + p.sum(-1), acc * shrink[..., None] + _weighed(q, p, v)

        first, end = _seen(q_pos, q_seg, pos, seg)
        carry = jax.lax.fori_loop(first // n, -(-end // n), add, carry)
    _, z, acc = carry
    return acc / jnp.maximum(z, 1e-30)[..., None]  # of padding alone nothing is met


def _scores(q, q_pos, q_seg, k, v, pos, seg):
    score = jnp.einsum("bkgcd,bksd->bkgcs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    sees_BCS = (q_seg[:, :, None] == seg[:, None, :]) & (pos[:, None, :] <= q_pos[:, :, None])
    return jnp.where(sees_BCS[:, None, None], score, MASKED)


def _weighed(q, p, v):
    return jnp.einsum("bkgcs,bksd->bkgcd", p.astype(q.dtype), v, preferred_element_type=jnp.float32)


def _seen(q_pos, q_seg, pos, seg):
    """(first, one past the last) of the places that a real query of the tile may see; (S, 0) if there are none."""
    real, big = q_seg > 0, jnp.iinfo(jnp.int32).max
    least, most = (jnp.where(real, q_seg, big).min(1)[:, None], jnp.where(real, q_seg, -1).max(1)[:, None])
    until = jnp.where(real, q_pos, -big).max(1)[:, None]
    seen_S, S = ((seg >= least) & (seg <= most) & (pos <= until)).any(axis=0), seg.shape[1]
    return jnp.where(seen_S, jnp.arange(S), S).min(), jnp.where(seen_S, jnp.arange(S) + 1, 0).max()


# -------------------------------------------------------------------------------------------- blocked, in plain JAX


def blocked_attention(q_BTHDh, k_BTKDh, v_BTKDh, *, q_pos, k_pos, q_seg, k_seg, local_len=None):
    """`slow_attention` in tiles, made for CPU: [T, T] never exists, and tiles that no query can see are not computed.

    Where q and k are equally long they must be the same tokens (self-attention): tiles in the future, and tiles before
    the segment in which the query tile starts, are skipped row by row. A chunked layer thus costs O(T C). Any T
    works. Other lengths (decoding against a cache) go to `slow_attention`, whose matrix is then thin.
    The loop runs over rows: on several devices, call it inside `jax.shard_map` over B.
    """
    B, T, H, Dh = q_BTHDh.shape
    K = k_BTKDh.shape[2]
    if k_BTKDh.shape[1] != T:
        return slow_attention(q_BTHDh, k_BTKDh, v_BTKDh, q_pos=q_pos, k_pos=k_pos, q_seg=q_seg, k_seg=k_seg)
    C = min(TILE, -(-min(T, local_len or T) // 16) * 16)
    n = -(-T // C)

    def tiled(x):  # [B, T, ...] -> [B, n, C, ...]; the filling is padding: segment 0
        x = jnp.pad(x, ((0, 0), (0, n * C - T)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, n, C, *x.shape[2:])

    def heads(x):  # -> [B, n, K, G, C, Dh]
        x = tiled(x.astype(jnp.float32))
        return x.reshape(B, n, C, K, -1, Dh).transpose(0, 1, 3, 4, 2, 5)

    q, k, v = heads(q_BTHDh) * Dh**-0.5, heads(k_BTKDh)[:, :, :, 0], heads(v_BTKDh)[:, :, :, 0]
    ids = tuple(tiled(x) for x in (q_pos, k_pos, q_seg, k_seg))
    o = _tiles(*vary_alike(q, k, v, ids, _first_tile(ids[2])))
    return o.transpose(0, 1, 4, 2, 3, 5).reshape(B, n * C, H, Dh)[:, :T].astype(q_BTHDh.dtype)


def _first_tile(seg_BnC):
    """[B, n]: the tile in which the segment of each tile's first token starts. No query of the tile sees an earlier
    one."""
    B, n, C = seg_BnC.shape
    seg_BT = seg_BnC.reshape(B, n * C)
    begins_BT = jnp.pad(seg_BT[:, 1:] != seg_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start_BnC = jnp.where(begins_BT, jnp.arange(n * C), 0).reshape(B, n, C)
    in_earlier_tiles_Bn = jnp.pad(jax.lax.cummax(start_BnC.max(-1), axis=1)[:, :-1], ((0, 0), (1, 0)))
    first_Bn = jnp.maximum(in_earlier_tiles_Bn, start_BnC[:, :, 0]) // C
    # Padding would be one long segment: a tile that begins with it has no use for earlier ones.
    return jnp.where(seg_BnC[:, :, 0] == 0, jnp.arange(n), first_Bn)


@jax.custom_vjp
def _tiles(q, k, v, ids, first):
    """q [B, n, K, G, C, Dh], scaled; k, v [B, n, K, C, Dh]; ids: four of [B, n, C]; first [B, n]: the first tile of
    keys that a tile of queries needs. Returns o like q."""
    return _tiles_forward(q, k, v, ids, first)[0]


def _tiles_forward(q, k, v, ids, first):
    o, log_z = (checkpoint_name(x, ATTENDED) for x in jax.lax.map(_row_forward, (q, k, v, ids, first)))
    return o, (q, k, v, ids, first, o, log_z)


def _tiles_backward(saved, do):
    q, k, v, ids, first, o, log_z = saved
    delta = (do * o).sum(-1)  # equals sum_s p dp, FlashAttention-2 section 3
    dq, dk, dv = jax.lax.map(_row_backward, (q, k, v, ids, first, do, log_z, delta))
    return dq, dk, dv, None, None


_tiles.defvjp(_tiles_forward, _tiles_backward)


def _row_forward(row):
    """One row: o [n, K, G, C, Dh] and the log of the softmax's normaliser [n, K, G, C]."""
    q, k, v, (q_pos, k_pos, q_seg, k_seg), first = row
    n, K, G, C, Dh = q.shape

    def query_tile(tile):
        i, q_i, pos_i, seg_i, first_i = tile

        def key_tile(step, carry):
            m, z, acc = carry
            j = i - step  # the diagonal comes first, so that m is a real score from the start
            score = jnp.einsum("kgtd,ksd->kgts", q_i, k[j])
            sees = (seg_i[:, None] == k_seg[j][None, :]) & (k_pos[j][None, :] <= pos_i[:, None])
            score = jnp.where(sees, score, MASKED)
            m_new = jnp.maximum(m, score.max(-1))
            p = jnp.exp(score - m_new[..., None])
            shrink = jnp.exp(m - m_new)
            acc = acc * shrink[..., None] + jnp.einsum("kgts,ksd->kgtd", p, v[j])
            return m_new, z * shrink + p.sum(-1), acc

        start = (full_like(q, (K, G, C), MASKED), full_like(q, (K, G, C)), full_like(q, (K, G, C, Dh)))
        m, z, acc = jax.lax.fori_loop(0, i + 1 - first_i, key_tile, start)
        return acc / z[..., None], m + jnp.log(z)

    return jax.lax.map(query_tile, (jnp.arange(n), q, q_pos, q_seg, first))


def _row_backward(row):
    """One row: dq like q, dk and dv like k. Scores are computed keys first, [K, C keys, G, C queries]: then no matmul
    but dq's contracts a leading dimension, which XLA on CPU does 2-3 times slower; dq is summed transposed."""
    q, k, v, (q_pos, k_pos, q_seg, k_seg), first, do, log_z, delta = row
    n, K, G, C, Dh = q.shape
    k_transposed = jnp.swapaxes(k, -1, -2)

    def query_tile(sums, tile):
        i, q_i, do_i, log_z_i, delta_i, pos_i, seg_i, first_i = tile
        q_flat, do_flat = (x.reshape(K, G * C, Dh) for x in (q_i, do_i))

        def key_tile(step, carry):
            dq, dk, dv = carry
            j = i - step
            score, dp = (
                jnp.einsum("ksd,kqd->ksq", a, b).reshape(K, C, G, C) for a, b in ((k[j], q_flat), (v[j], do_flat))
            )
            sees = (k_seg[j][:, None] == seg_i[None, :]) & (k_pos[j][:, None] <= pos_i[None, :])
            p = jnp.exp(jnp.where(sees[:, None], score, MASKED) - log_z_i[:, None])
            dscore = p * (dp - delta_i[:, None])
            dv = dv.at[j].add(jnp.einsum("ksgt,kgtd->ksd", p, do_i))
            dk = dk.at[j].add(jnp.einsum("ksgt,kgtd->ksd", dscore, q_i))
            return dq + jnp.einsum("kds,ksgt->kdgt", k_transposed[j], dscore), dk, dv

        dq, *sums = jax.lax.fori_loop(0, i + 1 - first_i, key_tile, (full_like(q, (K, Dh, G, C)), *sums))
        return tuple(sums), dq.transpose(0, 2, 3, 1)

    zeros = (full_like(k, k.shape), full_like(v, v.shape))
    (dk, dv), dq = jax.lax.scan(query_tile, zeros, (jnp.arange(n), q, do, log_z, delta, q_pos, q_seg, first))
    return dq, dk, dv


# ------------------------------------------------------------------------------- jax's fused kernels for TPU and GPU
#
# Both take causality from the order in the row, which with the promises of the module's docstring comes to the same as
# comparing positions. Both are opaque calls, which the compiler cannot split over devices: on several devices, call
# them inside `jax.shard_map` over B with check_vma=False (they do not say over which axes their results vary).


def splash_attention(q_BTHDh, k_BTKDh, v_BTKDh, *, q_pos, k_pos, q_seg, k_seg, local_len=None, interpret=False):
    """`slow_attention` for TPU, on jax's Splash kernel; blocks outside a causal band of `local_len` are left out.

    Needs self-attention, T and Dh divisible by 128; anything else goes to `blocked_attention`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (_, T, H, Dh), S = q_BTHDh.shape, k_BTKDh.shape[1]
    if T != S or T % 128 or Dh % 128:
        return blocked_attention(
            q_BTHDh, k_BTKDh, v_BTKDh, q_pos=q_pos, k_pos=k_pos, q_seg=q_seg, k_seg=k_seg, local_len=local_len
        )
    mask = splash.CausalMask((T, T)) if local_len is None else splash.LocalMask((T, T), (local_len - 1, 0), 0)
    c = next(c for c in (512, 256, 128) if T % c == 0)
    sizes = splash.BlockSizes(block_q=c, block_kv=c, block_q_dkv=c, block_kv_dkv=c, block_q_dq=c, block_kv_dq=c)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * H),
        block_sizes=sizes,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in ((q_BTHDh * Dh**-0.5).astype(q_BTHDh.dtype), k_BTKDh, v_BTKDh))
    o_BHTDh = jax.vmap(kernel)(q, k, v, splash.SegmentIds(q_seg, k_seg))
    return jnp.swapaxes(o_BHTDh, 1, 2).astype(q_BTHDh.dtype)


def triton_attention(q_BTHDh, k_BTKDh, v_BTKDh, *, q_pos, k_pos, q_seg, k_seg, local_len=None, interpret=False):
    """`slow_attention` for GPU, on jax's Pallas/Triton FlashAttention. It repeats k and v for grouped heads, and
    computes blocks before a segment's start as well.

    Needs self-attention, T divisible by 128 and Dh a power of two from 16 to 128; anything else goes to
    `blocked_attention`.
    """
    (_, T, H, Dh), S, K = q_BTHDh.shape, k_BTKDh.shape[1], k_BTKDh.shape[2]
    if T != S or T % 128 or Dh not in (16, 32, 64, 128):
        return blocked_attention(
            q_BTHDh, k_BTKDh, v_BTKDh, q_pos=q_pos, k_pos=k_pos, q_seg=q_seg, k_seg=k_seg, local_len=local_len
        )
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k_BTKDh, v_BTKDh))
    return _triton(Dh**-0.5, interpret, q_BTHDh, k, v, q_seg)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _triton(scale, interpret, q, k, v, seg):
    """jax's kernel, with names for what its backward pass needs: o like q, and the log of the normaliser."""
    return _triton_forward(scale, interpret, q, k, v, seg)[0]


def _triton_forward(scale, interpret, q, k, v, seg):
    from jax.experimental.pallas.ops.gpu import attention as pallas_gpu

    how = dict(causal=True, interpret=interpret, return_residuals=True)
    o, log_z = (checkpoint_name(x, ATTENDED) for x in pallas_gpu.mha(q, k, v, seg, scale, **how))
    return o, (q, k, v, seg, o, log_z)


def _triton_backward(scale, interpret, saved, do):
    from jax.experimental.pallas.ops.gpu import attention as pallas_gpu

    defaults = dict(block_sizes=pallas_gpu.BlockSizes.get_default(), backward_pass_impl="triton", num_warps=None)
    defaults |= dict(num_stages=2, grid=None, debug=False, return_residuals=False)
    return pallas_gpu.mha.bwd(sm_scale=scale, causal=True, interpret=interpret, res=saved, do=do, **defaults)


_triton.defvjp(_triton_forward, _triton_backward)


def pick_attention(platform: str) -> Callable:
    """The fastest of the functions above on "gpu" or "tpu"; the one in plain JAX everywhere else."""
    return {"gpu": triton_attention, "tpu": splash_attention}.get(platform, blocked_attention)
