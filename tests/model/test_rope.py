"""RoPE: frequencies, scaling, interleaved pairs, and exactness far out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llamax import config
from llamax.model.rope import frequencies, grid_rotation, rotate, rotation
from tests.model import twins
from tests.tolerances import ANGLE, ORACLE

THETA = 500_000.0
SCOUT = config.Rope(THETA, "llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_len=8192)
LLAMA31 = config.Rope(THETA, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_len=8192)
LINEAR, NTK = config.Rope(THETA, "linear", factor=4.0), config.Rope(THETA, "ntk", factor=4.0)
YARN = config.Rope(10_000.0, "yarn", factor=16.0, original_len=4096)  # the paper's Llama 2 at 64k
PAIRS = replace(YARN, ramp="pairs")
RESCALED = [LINEAR, NTK, YARN, PAIRS, replace(YARN, beta_slow=2.0, beta_fast=8.0), SCOUT, LLAMA31]


@pytest.mark.parametrize("rope", [config.Rope(THETA), *RESCALED, twins.TINY.rope], ids=str)
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


@pytest.mark.parametrize("rope", RESCALED, ids=str)
def test_rows_that_become_no_longer_need_no_rescaling(rope):
    plain = frequencies(config.Rope(rope.theta), 128)
    np.testing.assert_allclose(frequencies(replace(rope, factor=1.0), 128), plain, rtol=1e-15)
    assert replace(rope, factor=1.0).sharpening == 1


def test_interpolated_positions_are_the_positions_between():
    """Token 4 p of a row four times longer stands where token p stood."""
    positions = np.array([[0, 1, 77, 8191, 500_000]], np.int32)
    plain, freq = (frequencies(rope, 128) for rope in (config.Rope(THETA), LINEAR))
    for near, far in zip(rotation(positions, plain), rotation(4 * positions, freq), strict=True):
        np.testing.assert_allclose(far, near, **ANGLE)


def test_ntk_keeps_the_fastest_pair_and_interpolates_the_slowest():
    ratio = frequencies(NTK, 128) / frequencies(config.Rope(THETA), 128)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / 4, rel=1e-12) and (np.diff(ratio) < 0).all()
    np.testing.assert_array_equal(frequencies(NTK, 128), frequencies(config.Rope(NTK.ntk_theta(128)), 128))


@pytest.mark.parametrize(("rope", "kept", "divided"), [(YARN, 21, 46), (PAIRS, 21, 46)])
def test_yarn_leaves_fast_pairs_and_interpolates_slow_ones(rope, kept, divided):
    """Within 4,096 tokens at theta 10,000, pairs 20 and 21 turn 36.7 and 31.7 times, pairs 45 and 46 1.004 and 0.87."""
    plain = frequencies(config.Rope(rope.theta), 128)
    turns, ratio = 4096 * plain / (2 * np.pi), frequencies(rope, 128) / plain
    assert turns[kept - 1] > 32 > turns[kept] and turns[divided - 1] > 1 > turns[divided]
    np.testing.assert_array_equal(ratio[:kept], 1)
    np.testing.assert_allclose(ratio[divided:], 1 / 16, rtol=1e-15)
    assert (np.diff(ratio[kept - 1 : divided + 1]) < 0).all()


def test_the_two_ramps_of_yarn_are_halfway_in_other_places():
    """The paper's equation: where a pair turns (1 + 32) / 2 times. Its code: in the middle of pairs 20 to 46."""
    plain = frequencies(config.Rope(10_000.0), 128)
    half = (1 + 1 / 16) / 2
    np.testing.assert_allclose(
        np.interp(-16.5, -4096 * plain / (2 * np.pi), frequencies(YARN, 128) / plain), half, 0.01
    )
    assert (frequencies(PAIRS, 128) / plain)[33] == pytest.approx(half, rel=1e-12)


def test_yarn_without_its_attention_factor_is_llama3s_scaling():
    by_parts = replace(LLAMA31, scaling="yarn", beta_slow=1.0, beta_fast=4.0, attention_factor=1.0)
    np.testing.assert_allclose(frequencies(by_parts, 128), frequencies(LLAMA31, 128), rtol=1e-14)
    assert by_parts.sharpening == 1


def test_the_attention_factor_is_the_papers_or_as_given():
    assert YARN.sharpening == 0.1 * np.log(16) + 1 == twins.attention_factor(YARN)
    assert replace(YARN, attention_factor=1.5).sharpening == 1.5
    assert LINEAR.sharpening == NTK.sharpening == SCOUT.sharpening == 1


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


@pytest.mark.parametrize("rope", RESCALED, ids=str)
def test_rescaled_angles_are_right_at_any_position(rope):
    positions = np.array([[63, 131_071, 9_999_999, 2**31 - 1]], np.int32)
    freq = frequencies(rope, 128)
    exact, ours = positions[..., None].astype(np.longdouble) * freq, rotation(positions, freq)
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
