"""Rotary positions (RoFormer, arXiv 2104.09864), on interleaved pairs as Llama 4 has them, and as rescaled.

Lanes (2j, 2j+1) of a head form one complex number, which position p multiplies by exp(i p w_j), w_j = theta^(-2j/Dh).
Within L = original_len tokens it makes r_j = L w_j / 2 pi turns. For a context s = factor times longer,

    linear   w_j / s: position interpolation (arXiv 2306.15595)
    ntk      theta s^(Dh / (Dh - 2)) in place of theta: NTK-aware
    yarn     w_j (g + (1 - g) / s), g rising from 0 at beta_slow turns to 1 at beta_fast: NTK-by-parts
             (arXiv 2309.00071); the attention factor that makes it YaRN is attention.py's
    llama3   the same, from low_freq_factor to high_freq_factor turns: Llama 3.1's and Scout's

Angles are float32, and right to 5e-5 at any int32 position.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from llamax import config

DIGIT = 64


class Rotation(NamedTuple):
    """cos and sin of the angles, float32, broadcastable to [..., 1, Dh/2]."""

    cos: Array
    sin: Array


def frequencies(rope: config.Rope, head_dim: int) -> np.ndarray:
    """w_j in radians per token, float64 [Dh/2]."""
    return SCALINGS[rope.scaling](rope, head_dim)


def unscaled(rope: config.Rope, head_dim: int) -> np.ndarray:
    return rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def linear(rope: config.Rope, head_dim: int) -> np.ndarray:
    return unscaled(rope, head_dim) / rope.factor


def ntk(rope: config.Rope, head_dim: int) -> np.ndarray:
    return unscaled(dataclasses.replace(rope, theta=rope.ntk_theta(head_dim)), head_dim)


def yarn(rope: config.Rope, head_dim: int) -> np.ndarray:
    freq = unscaled(rope, head_dim)
    kept = RAMPS[rope.ramp](rope, freq)
    return kept * freq + (1 - kept) * freq / rope.factor


def by_turns(rope: config.Rope, freq: np.ndarray) -> np.ndarray:
    """The share of every frequency that stays, by the paper's equation: linear in a pair's turns."""
    turns = rope.original_len * freq / (2 * np.pi)
    return np.clip((turns - rope.beta_slow) / (rope.beta_fast - rope.beta_slow), 0, 1)


def by_pairs(rope: config.Rope, freq: np.ndarray) -> np.ndarray:
    """The same as the paper's authors and everyone since computed it: linear in a pair's number j, between whole j."""
    head_dim = 2 * len(freq)

    def pair_of(turns: float) -> float:
        """j, any real number, whose r_j is `turns`."""
        return head_dim * math.log(rope.original_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first = max(math.floor(pair_of(rope.beta_fast)), 0)
    last = min(math.ceil(pair_of(rope.beta_slow)), head_dim - 1)
    width = last - first or 0.001  # theirs, for a ramp of no width
    return 1 - np.clip((np.arange(len(freq)) - first) / width, 0, 1)


def llama3(rope: config.Rope, head_dim: int) -> np.ndarray:
    freq = unscaled(rope, head_dim)
    wavelength = 2 * np.pi / freq
    low, high = rope.original_len / rope.low_freq_factor, rope.original_len / rope.high_freq_factor
    # Scout's low = high leaves no band between; the guard keeps 0/0 out of the branch that `where` throws away.
    band = max(rope.high_freq_factor - rope.low_freq_factor, 1e-9)
    mix = (rope.original_len / wavelength - rope.low_freq_factor) / band
    between = (1 - mix) * freq / rope.factor + mix * freq
    return np.where(wavelength < high, freq, np.where(wavelength > low, freq / rope.factor, between))


SCALINGS: dict[str, Callable[[config.Rope, int], np.ndarray]] = {
    "none": unscaled,
    "linear": linear,
    "ntk": ntk,
    "yarn": yarn,
    "llama3": llama3,
}
RAMPS: dict[str, Callable[[config.Rope, np.ndarray], np.ndarray]] = {"turns": by_turns, "pairs": by_pairs}


def rotation(positions_BT: Array, freq: np.ndarray, limit: int = 2**31) -> Rotation:
    """The angles of every token, for `rotate` on [B, T, heads, Dh]; positions are below `limit`.

    One product p w_j would be off by 0.4 rad at position 10,000,000. So p is taken as digits of base 64, and the turn
    of one in each place as what is left of it after whole turns, at most half a turn either way.
    """
    digit = (positions_BT % DIGIT).astype(jnp.float32)[..., None, None]
    angle, place = digit * freq.astype(np.float32), DIGIT
    while place < limit:
        digit = (positions_BT // place % DIGIT).astype(jnp.float32)[..., None, None]
        angle = angle + digit * (np.remainder(freq * place + np.pi, 2 * np.pi) - np.pi).astype(np.float32)
        place *= DIGIT
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Array, by: Rotation) -> Array:
    """x [..., heads, Dh] with every interleaved pair turned by its angle; computed in float32, same dtype out."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    real, imag = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([real * by.cos - imag * by.sin, real * by.sin + imag * by.cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def grid_rotation(grid: int, head_dim: int, theta: float) -> Rotation:
    """The vision encoder's 2D angles: [grid^2 + 1, 1, Dh/2], class token last and not rotated.

    The first half of the pairs turns with the column, the second with the row, both counted from 1.
    """
    freq = theta ** (-2 * np.arange(head_dim // 4) / (head_dim // 2))
    row, column = np.divmod(np.arange(grid * grid), grid)
    angle = np.concatenate([(column + 1)[:, None] * freq, (row + 1)[:, None] * freq], axis=1)
    angle = np.concatenate([angle, np.zeros((1, head_dim // 2))])[:, None, :]
    return Rotation(np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))
