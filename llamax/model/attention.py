"""Grouped-query attention with Llama 4's interleaved RoPE (iRoPE).

Three kinds of layer. rope_chunk: rotated, sees its own chunk of C tokens only. rope_full: rotated, sees all before it.
nope_full: not rotated, sees all before it. A chunk is a finer segment: a local layer is plain causal attention whose
segment ids tell (segment, position // C) apart, and it rotates by position mod C: the same in exact arithmetic,
because RoPE is relative, and exact in float32 on any row.

A softmax over more keys is flatter, so queries can be scaled by their position p, by `model.attn_scale`:

    temperature   1 + a ln(1 + floor((p + 1) / floor_len)) in nope_full: Llama 4's temperature tuning
    ssmax         s ln(p + 1) in nope_full and rope_full, s learnt by every head: Scalable-Softmax (arXiv 2501.19399),
                  softmax of s ln(n) x logits over the n keys that a query sees

and YaRN scales queries and keys of rotated layers by its attention factor f, here queries by f^2: the same logits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from llamax import config
from llamax.model.cache import KV, Window
from llamax.model.layers import gains, linear, matrix, rms
from llamax.model.rope import Rotation, frequencies, rotate, rotation
from llamax.model.seam import Seam


class Places(NamedTuple):
    """Where every token of a batch stands; computed once, read by every layer."""

    positions: Array  # int32 [B, T], per segment
    segments: Array  # int32 [B, T]
    chunks: Array  # int32 [B, T]: one id per (segment, chunk)
    chunk_rotation: Rotation  # of position mod C
    full_rotation: Rotation
    growth: Array  # float32 [B, T]: what `model.attn_scale` makes of the position: temperature, or ln(p + 1)
    before: dict[str, Window] | None = None  # by kind of layer: where the keys of its cache stand


def places(positions_BT: Array, segment_ids_BT: Array, model: config.Model) -> Places:
    freq = frequencies(model.rope, model.head_dim)
    within = positions_BT % model.chunk_len
    # A chunk begins wherever position mod C is 0, and with its segment: counting those names them.
    begins = (within == 0) | (jnp.diff(segment_ids_BT, axis=1, prepend=-1) != 0)
    chunks = jnp.where(segment_ids_BT > 0, jnp.cumsum(begins, axis=1, dtype=jnp.int32), 0)
    return Places(
        positions_BT,
        segment_ids_BT,
        chunks,
        rotation(within, freq, model.chunk_len),
        rotation(positions_BT, freq),
        GROWTH[model.attn_scale](positions_BT, model),
    )


def places_after(positions_BT: Array, segment_ids_BT: Array, model: config.Model, before: dict[str, Window]) -> Places:
    """Of tokens that go on where a cache ends, one document a row: its chunks are numbered as the cache's."""
    real = segment_ids_BT > 0
    at = places(positions_BT, real.astype(jnp.int32), model)
    return at._replace(chunks=jnp.where(real, 1 + positions_BT // model.chunk_len, 0), before=before)


def temperature(positions_BT: Array, model: config.Model) -> Array:
    """1 + scale ln(1 + floor((p + 1) / floor_len)) in float32: exactly 1 before position floor_len - 1."""
    # Integer division: float32 cannot tell neighbouring positions apart beyond 2^24.
    steps = ((positions_BT + 1) // model.attn_temperature_floor).astype(jnp.float32)
    return 1.0 + model.attn_temperature * jnp.log1p(steps)


def log_keys(positions_BT: Array, model: config.Model) -> Array:
    """ln n in float32, n = p + 1 being the keys that a query sees of its document: 0 for the first, with no choice."""
    del model
    return jnp.log((positions_BT + 1).astype(jnp.float32))


GROWTH = {"temperature": temperature, "ssmax": log_keys}
QUERY, KEY, OUT = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim"), ("heads", "head_dim", "embed")


class Attention(nnx.Module):
    """q, k, v, o projections around the seam's attention; no biases; QK norm has no weight and follows the rotation.

    What scales queries comes after QK norm, which would undo it.
    """

    def __init__(self, model: config.Model, kind: str, seam: Seam, *, out_gain: float, rngs: nnx.Rngs):
        self.kind, self.model, self.seam = kind, model, seam
        dim, heads, kv_heads, head_dim = model.dim, model.n_heads, model.n_kv_heads, model.head_dim
        wide = dict(fan_in=dim, fan_out=heads * head_dim)
        narrow = dict(fan_in=dim, fan_out=kv_heads * head_dim)
        self.query = matrix(rngs, (dim, heads, head_dim), QUERY, **wide)
        self.key = matrix(rngs, (dim, kv_heads, head_dim), KEY, **narrow)
        self.value = matrix(rngs, (dim, kv_heads, head_dim), KEY, **narrow)
        out = dict(fan_in=heads * head_dim, fan_out=dim, gain=out_gain)
        self.out = matrix(rngs, (heads, head_dim, dim), OUT, **out)
        if model.attn_scale == "ssmax" and kind != "rope_chunk":
            self.ssmax = gains(heads, "heads", 1 / math.log(model.ssmax_len))

    def __call__(self, x_BTD: Array, at: Places, past: KV | None = None) -> tuple[Array, KV]:
        """The layer's output, and the keys and values of these tokens as a cache keeps them: rotated and normed."""
        q_BTHDh, k_BTKDh, v_BTKDh = (
            heads(x_BTD, self.gathered(w, names, x_BTD.dtype))
            for w, names in ((self.query, QUERY), (self.key, KEY), (self.value, KEY))
        )
        if self.kind != "nope_full":
            turn = at.chunk_rotation if self.kind == "rope_chunk" else at.full_rotation
            q_BTHDh, k_BTKDh = rotate(q_BTHDh, turn), rotate(k_BTKDh, turn)
            if self.model.qk_norm:
                q_BTHDh = rms(q_BTHDh, self.model.norm_eps).astype(x_BTD.dtype)
                k_BTKDh = rms(k_BTKDh, self.model.norm_eps).astype(x_BTD.dtype)
        for scale in self.query_scales(at):
            q_BTHDh = (q_BTHDh * scale).astype(x_BTD.dtype)
        local = self.kind == "rope_chunk"
        segments = at.chunks if local else at.segments
        new = KV(k_BTKDh.swapaxes(1, 2), v_BTKDh.swapaxes(1, 2))
        here = dict(q_pos=at.positions, k_pos=at.positions, q_seg=segments, k_seg=segments)
        if past is None:
            local_len = self.model.chunk_len if local else None
            o_BTHDh = self.seam.attention(q_BTHDh, k_BTKDh, v_BTKDh, **here, local_len=local_len)
        else:
            assert at.before is not None
            window = at.before[self.kind]
            here |= dict(past_pos=window.positions, past_seg=window.segments)
            o_BTHDh = self.seam.cached_attention(q_BTHDh, *past, *new, **here)
        out_FD = self.gathered(self.out, OUT, x_BTD.dtype).reshape(-1, x_BTD.shape[-1])
        return linear(o_BTHDh.reshape(*x_BTD.shape[:2], -1), out_FD), new

    def query_scales(self, at: Places) -> list[Array | float]:
        """What queries [B, T, H, Dh] are multiplied by; empty where they stay as they are."""
        scales: list[Array | float] = []
        if self.kind != "nope_full" and self.model.rope.sharpening != 1:
            scales.append(self.model.rope.sharpening**2)
        if hasattr(self, "ssmax"):
            scales.append((at.growth[..., None] * self.ssmax[...].astype(jnp.float32))[..., None])
        elif self.kind == "nope_full" and self.model.attn_scale == "temperature" and self.model.attn_temperature:
            scales.append(at.growth[..., None, None])
        return scales

    def gathered(self, w: nnx.Param, names: tuple[str, ...], dtype: Any) -> Array:
        return self.seam.gathered(w[...].astype(dtype), names)


def heads(x_BTD: Array, w_DHDh: Array) -> Array:
    """x projected to heads: [B, T, H, Dh]."""
    y_BTF = linear(x_BTD, w_DHDh.reshape(x_BTD.shape[-1], -1))
    return y_BTF.reshape(*x_BTD.shape[:2], *w_DHDh.shape[1:])
