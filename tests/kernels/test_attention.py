"""Attention: the definition against loops, every fast function against the definition, segments apart to the bit."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.kernels.attention import (
    TILE,
    blocked_attention,
    pick_attention,
    slow_attention,
    splash_attention,
    triton_attention,
)
from tests.tolerances import BF16, ORACLE, TWIN, TWIN_GRAD

B, T, H, K, DH = 3, 4 * TILE + 44, 4, 2, 16  # T: four tiles and a part
CHUNK = 32


def ids_of(lengths: list[list[int]], T: int = T, chunk: int | None = None):
    """Rows packed from segments of these lengths, padding behind; a chunk makes the ids finer and restarts nothing."""
    seg, pos = np.zeros((2, len(lengths), T), np.int32)
    for b, row in enumerate(lengths):
        at = 0
        for number, length in enumerate(row, 1):
            seg[b, at : at + length] = number
            pos[b, at : at + length] = np.arange(length)
            at += length
    if chunk:
        seg = np.where(seg > 0, seg * 1000 + pos // chunk, 0)
    return jnp.array(seg), jnp.array(pos)


MASKS = {
    "whole": ids_of([[T], [T], [T]]),
    "packed": ids_of([[TILE, 64, 172], [1, 255, 44], [60, 60, 60, 60, 60]]),
    "padding": ids_of([[100, 50], [], [299]]),
    "chunks": ids_of([[100, 50, 150], [T], [31, 33, 32, 1]], chunk=CHUNK),
}


def inputs(shape=(B, T, H, K, DH), dtype=jnp.float32):
    B, T, H, K, DH = shape
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (H, K, K, H)
    return tuple(jax.random.normal(key, (B, T, h, DH)).astype(dtype) for key, h in zip(keys, heads, strict=True))


@partial(jax.jit, static_argnums=(0,), static_argnames=("local_len",))
def run(attention, q, k, v, do, seg, pos, local_len=None):
    """o and the gradients of q, k, v; padding's outputs are masked, since they mean nothing."""

    def forward(q, k, v):
        o = attention(q, k, v, q_pos=pos, k_pos=pos, q_seg=seg, k_seg=seg, local_len=local_len)
        return jnp.where((seg > 0)[..., None, None], o, 0)

    o, backward = jax.vjp(forward, q, k, v)
    return o, backward(do.astype(o.dtype))


def assert_twins(fast, slow, value=TWIN, grad=TWIN_GRAD):
    np.testing.assert_allclose(*(np.asarray(x[0], np.float32) for x in (fast, slow)), **value)
    for name, a, b in zip("qkv", fast[1], slow[1], strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), err_msg=f"d{name}", **grad)


def test_definition_against_loops():
    q, k, v, _ = (np.asarray(x, np.float64) for x in inputs((2, 7, 4, 2, 3)))
    seg, pos = (np.asarray(x) for x in ids_of([[3, 4], [5]], T=7))
    o = jax.jit(slow_attention)(*map(np.float32, (q, k, v)), q_pos=pos, k_pos=pos, q_seg=seg, k_seg=seg)
    o = np.asarray(o)
    for b in range(2):
        for t in np.flatnonzero(seg[b]):
            keys = [s for s in range(7) if seg[b, s] == seg[b, t] and pos[b, s] <= pos[b, t]]
            for h in range(4):
                weight = np.exp([q[b, t, h] @ k[b, s, h // 2] / np.sqrt(3) for s in keys])
                truth = sum(w * v[b, s, h // 2] for w, s in zip(weight / weight.sum(), keys, strict=True))
                np.testing.assert_allclose(o[b, t, h], truth, **ORACLE)


@pytest.mark.parametrize("mask", MASKS)
def test_blocked_is_slow(mask):
    args = *inputs(), *MASKS[mask]
    assert_twins(run(blocked_attention, *args), run(slow_attention, *args))


def test_blocked_with_the_promise_of_short_segments():
    args = *inputs(), *MASKS["chunks"]
    assert_twins(run(blocked_attention, *args, local_len=CHUNK), run(slow_attention, *args))


def test_one_kv_head_and_a_row_shorter_than_a_tile():
    shape = (2, 37, 4, 1, 8)
    args = *inputs(shape), *ids_of([[20, 10], [37]], T=37)
    assert_twins(run(blocked_attention, *args), run(slow_attention, *args))


def test_bfloat16_in_and_out_float32_between():
    args = *inputs(dtype=jnp.bfloat16), *MASKS["packed"]
    fast, slow = run(blocked_attention, *args), run(slow_attention, *args)
    assert fast[0].dtype == jnp.bfloat16
    assert_twins(fast, slow, BF16, BF16)
    exact = run(slow_attention, *(x.astype(jnp.float32) for x in args[:4]), *args[4:])
    # Rounding once, on the way out, is half a unit in the last of 8 bits; bf16 scores would show several times that.
    np.testing.assert_allclose(np.asarray(fast[0], np.float32), exact[0], rtol=2**-8, atol=1e-6)


def test_a_segment_does_not_feel_its_neighbours():
    seg, pos = MASKS["packed"]
    q, k, v, do = inputs()
    other = (seg == 2)[..., None, None]
    before = run(blocked_attention, q, k, v, do, seg, pos)
    after = run(blocked_attention, *(jnp.where(other, 3 - 2 * x, x) for x in (q, k, v)), do, seg, pos)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(jnp.where(other, 0, a), jnp.where(other, 0, b))
        assert not np.array_equal(a, b)


def test_tiles_that_nobody_sees_are_not_computed():
    """NaN times a weight of zero is NaN, so a tile that is visited in vain gives itself away."""
    seg, pos = ids_of([[TILE, TILE, TILE, TILE, 44]] * B)
    q, k, v, do = inputs()
    tiles = np.arange(T) // TILE
    for poisoned in (0, 4):
        nan = jnp.where((tiles == poisoned)[None, :, None, None], jnp.nan, v)
        o, grads = run(blocked_attention, q, k, nan, do, seg, pos)
        for x in (o, *grads):
            assert np.isfinite(x[:, tiles != poisoned]).all()
    assert np.isnan(o[:, tiles == 4]).all()


def test_padding_is_finite():
    seg, pos = MASKS["padding"]
    q, k, v, do = inputs()
    o = jax.jit(blocked_attention)(q, k, v, q_pos=pos, k_pos=pos, q_seg=seg, k_seg=seg)
    assert np.isfinite(o).all()
    _, grads = run(blocked_attention, q, k, v, do, seg, pos)
    for x in grads:
        assert (np.where((seg == 0)[..., None, None], x, 0) == 0).all()


def test_one_query_against_a_cache():
    q, k, v, _ = inputs((2, 37, 4, 2, 8))
    seg, pos = ids_of([[37], [30]], T=37)
    full = jax.jit(slow_attention)(q, k, v, q_pos=pos, k_pos=pos, q_seg=seg, k_seg=seg)
    q, pos, seg, full = (np.asarray(x) for x in (q, pos, seg, full))
    last = slice(29, 30)
    for platform in ("cpu", "gpu", "tpu"):
        o = jax.jit(pick_attention(platform))(
            q[:, last], k, v, q_pos=pos[:, last], k_pos=pos, q_seg=seg[:, last], k_seg=seg
        )
        np.testing.assert_allclose(o, full[:, last], **TWIN)


@pytest.mark.parametrize(("fused", "dh", "platform"), [(splash_attention, 128, "tpu"), (triton_attention, 32, "gpu")])
@pytest.mark.parametrize("chunk", [None, CHUNK])
def test_fused_kernels(fused, dh, platform, chunk):
    """On their own platform as they are, everywhere else in Pallas' interpreter."""
    args = *inputs((1, 256, 2, 1, dh)), *ids_of([[90, 150]], T=256, chunk=chunk)
    attention = partial(fused, interpret=jax.default_backend() != platform)
    assert_twins(run(attention, *args, local_len=chunk), run(slow_attention, *args))


@pytest.mark.parametrize("fused", [splash_attention, triton_attention])
def test_fused_kernels_leave_other_shapes_to_the_blocked_one(fused):
    q, k, v, _ = inputs((2, 37, 4, 1, 8))
    seg, pos = ids_of([[20, 10], [37]], T=37)
    kwargs = dict(q_pos=pos, k_pos=pos, q_seg=seg, k_seg=seg)
    np.testing.assert_array_equal(jax.jit(fused)(q, k, v, **kwargs), jax.jit(blocked_attention)(q, k, v, **kwargs))
