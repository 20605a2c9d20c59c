"""RoPE: frequencies, scaling, interleaved pairs, and exactness far out."""

from __future__ import annotations

import numpy as np
import pytest

from llamax import config
from llamax.model.rope import frequencies, grid_rotation, rotate, rotation
from tests.model import twins
from tests.tolerances import ANGLE, ORACLE

THETA = 500_000.0
SCOUT = config.Rope(THETA, "llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_len=8192)
LLAMA31 = config.Rope(THETA, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_len=8192)


@pytest.mark.parametrize("rope", [config.Rope(THETA), SCOUT, LLAMA31, twins.TINY.rope])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_frequencies_match_the_formula(rope, head_dim):
    np.testing.assert_allclose(frequencies(rope, head_dim), twins.frequencies(rope, head_dim), rtol=1e-6)


def test_scaling_bands_of_the_released_models():
    plain = frequencies(config.Rope(THETA), 128)
    scout = frequencies(SCOUT, 128) / plain
    np.testing.assert_array_equal(scout[:35], 1)
    np.testing.assert_allclose(scout[35:], 1 / 16, rtol=1e-6)
    llama31 = frequencies(LLAMA31, 128) / plain
    np.testing.assert_array_equal(llama31[:29], 1)
    assert (np.diff(llama31[28:36]) < 0).all() and llama31[34] > 1 / 8  # six between, falling
    np.testing.assert_allclose(llama31[35:], 1 / 8, rtol=1e-6)


def test_rotation_turns_interleaved_pairs():
    rng = np.random.default_rng(0)
    x_BTHK = rng.normal(size=(2, 24, 6, 8)).astype(np.float32)
    freq = frequencies(twins.TINY.rope, 8)
    ours = rotate(x_BTHK, rotation(twins.POSITIONS, freq))
    w = np.array(twins.frequencies(twins.TINY.rope, 8))
    for b, t, h in np.ndindex(x_BTHK.shape[:3]):
        np.testing.assert_allclose(ours[b, t, h], twins.turn(x_BTHK[b, t, h], twins.POSITIONS[b, t] * w), **ORACLE)
    assert rotate(x_BTHK.astype("bfloat16"), rotation(twins.POSITIONS, freq)).dtype == "bfloat16"


@pytest.mark.parametrize("theta", [10_000.0, THETA])
def test_angles_are_right_at_any_position(theta):
    """Beside 80 bits; one float32 product is off by 0.4 rad at 10,000,000."""
    positions = np.array([[1, 63, 64, 8191, 65_535, 131_071, 1_048_575, 9_999_999, 16_777_217, 2**31 - 1]], np.int32)
    freq = frequencies(config.Rope(theta), 128)
    turn = np.longdouble(theta) ** (-np.arange(0, 128, 2) / np.longdouble(128))
    exact = positions[..., None].astype(np.longdouble) * turn
    ours = rotation(positions, freq)
    np.testing.assert_allclose(ours.cos[:, :, 0], np.cos(exact), **ANGLE)
    np.testing.assert_allclose(ours.sin[:, :, 0], np.sin(exact), **ANGLE)


def test_a_limit_leaves_out_digits_that_are_zero():
    freq = frequencies(config.Rope(THETA), 128)
    positions = np.arange(4096, dtype=np.int32)[None]
    for mine, whole in zip(rotation(positions, freq, 4096), rotation(positions, freq), strict=True):
        np.testing.assert_array_equal(mine, whole)


@pytest.mark.parametrize("grid, head_dim", [(4, 8), (24, 88)])
def test_the_grid_rotation_matches_the_formula(grid, head_dim):
    ours = grid_rotation(grid, head_dim, 10_000.0)
    angles = np.array([twins.grid_angles(p, grid, head_dim, 10_000.0) for p in range(grid * grid + 1)])
    np.testing.assert_allclose(ours.cos[:, 0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(ours.sin[:, 0], np.sin(angles), atol=1e-6)
