"""The reward model's loss beside a loop; TRL's cases are in test_preference_goldens.py."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from llamax.losses.reward import bradley_terry
from tests.tolerances import TWIN, TWIN_GRAD

RNG = np.random.default_rng(0)
CHOSEN, REJECTED = RNG.normal(size=(2, 3, 4)).astype(np.float32)
MARGIN = RNG.uniform(size=(3, 4)).astype(np.float32)
MASK = RNG.uniform(size=(3, 4)) < 0.6


def slow(chosen, rejected, margin, centring):
    return sum(
        -math.log(1 / (1 + math.exp(-(chosen[at] - rejected[at] - margin[at]))))
        + centring * (chosen[at] + rejected[at]) ** 2
        for at in zip(*np.nonzero(MASK), strict=True)
    )


@pytest.mark.parametrize(("margin", "centring"), [(MARGIN, 0.01), (None, 0.0)])
def test_a_loop_gives_the_same(margin, centring):
    num, den = bradley_terry(CHOSEN, REJECTED, MASK, margin, centring)
    np.testing.assert_allclose(num, slow(CHOSEN, REJECTED, 0 * MARGIN if margin is None else margin, centring), **TWIN)
    assert den == MASK.sum()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_masked_may_be_anything(bad):
    def loss(chosen, rejected, margin):
        return bradley_terry(chosen, rejected, MASK, margin, 0.01).num

    spoilt = [np.where(MASK, x, bad) for x in (CHOSEN, REJECTED, MARGIN)]
    np.testing.assert_array_equal(loss(*spoilt), loss(CHOSEN, REJECTED, MARGIN))
    for ours, clean in zip(*(jax.grad(loss, (0, 1))(*x) for x in (spoilt, (CHOSEN, REJECTED, MARGIN))), strict=True):
        np.testing.assert_array_equal(ours, clean)
        assert (ours[~MASK] == 0).all() and np.abs(ours).max() > 0.1


def test_a_tie_pulls_by_a_half_and_centring_pulls_towards_zero():
    zero, yes = np.zeros((1,), np.float32), np.ones((1,), bool)
    grad = jax.grad(lambda x: bradley_terry(x, zero, yes).mean())(zero)
    np.testing.assert_allclose(grad, [-0.5], **TWIN_GRAD)
    grad = jax.grad(lambda x: bradley_terry(x, x, yes, None, 0.5).mean())(zero + 3)
    np.testing.assert_allclose(grad, [0.5 * 2 * 6 * 2], **TWIN_GRAD)


def test_nothing_to_compare_is_zero():
    nothing = np.zeros_like(MASK)
    assert bradley_terry(CHOSEN, REJECTED, nothing).mean() == 0
    grad = jax.grad(lambda x: bradley_terry(x, REJECTED, nothing, MARGIN, 0.01).mean())(CHOSEN)
    np.testing.assert_array_equal(grad, nothing)
