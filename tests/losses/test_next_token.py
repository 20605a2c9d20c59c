"""The next-token loss beside a loop over tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from llamax.losses.next_token import by_source, next_token
from llamax.losses.sum import Sum
from tests.tolerances import TWIN

RNG = np.random.default_rng(0)
LOGP = -RNG.exponential(size=(2, 24)).astype(np.float32)
WEIGHTS = (RNG.uniform(size=(2, 24)) * (RNG.uniform(size=(2, 24)) < 0.7)).astype(np.float32)  # some are 0
SOURCES = RNG.integers(0, 3, (2, 24), dtype=np.int32)


def slow(logp, weights, sources, n_sources):
    """(nats, weight) of every source, token by token."""
    totals = np.zeros((2, n_sources))
    for token in np.ndindex(logp.shape):
        totals[0, sources[token]] -= float(logp[token]) * float(weights[token])
        totals[1, sources[token]] += float(weights[token])
    return totals


def test_sums_and_mean_match_the_loop():
    num, den = slow(LOGP, WEIGHTS, SOURCES, 3).sum(axis=1)
    ours = next_token(LOGP, WEIGHTS)
    np.testing.assert_allclose(ours, (num, den), **TWIN)
    np.testing.assert_allclose(ours.mean(), num / den, **TWIN)


def test_sources_match_the_loop_and_add_up():
    ours = by_source(LOGP, WEIGHTS, SOURCES, 4)  # the fourth has no token
    np.testing.assert_allclose(ours, slow(LOGP, WEIGHTS, SOURCES, 4), **TWIN)
    np.testing.assert_allclose([part.sum() for part in ours], next_token(LOGP, WEIGHTS), **TWIN)
    assert ours.mean()[3] == 0


def test_splitting_a_batch_changes_no_sum():
    """Sums of the parts add up, whatever the weights in each; means of the parts would not."""
    parts = [next_token(LOGP[row], WEIGHTS[row] * (row + 1)) for row in range(2)]
    whole = next_token(LOGP, WEIGHTS * np.array([[1], [2]], np.float32))
    added = Sum(parts[0].num + parts[1].num, parts[0].den + parts[1].den)
    np.testing.assert_allclose(added, whole, **TWIN)
    assert abs(added.mean() - (parts[0].mean() + parts[1].mean()) / 2) > 1e-2


def test_gradient_is_minus_the_weight():
    grad = jax.grad(lambda logp: next_token(logp, WEIGHTS).num)(LOGP)
    np.testing.assert_allclose(grad, -WEIGHTS, **TWIN)


def test_weight_zero_means_not_counted_even_beside_infinity():
    logp = jnp.where(WEIGHTS == 0, -jnp.inf, LOGP)
    np.testing.assert_array_equal(next_token(logp, WEIGHTS), next_token(LOGP, WEIGHTS))
    np.testing.assert_array_equal(by_source(logp, WEIGHTS, SOURCES, 3), by_source(LOGP, WEIGHTS, SOURCES, 3))
    grad = jax.grad(lambda logp: next_token(logp, WEIGHTS).num)(logp)
    np.testing.assert_array_equal(grad, -WEIGHTS)


def test_no_weight_at_all_gives_zero():
    nothing = np.zeros_like(WEIGHTS)
    assert next_token(LOGP, nothing).mean() == 0
    grad = jax.grad(lambda logp: next_token(logp, nothing).mean())(LOGP)
    np.testing.assert_array_equal(grad, nothing)
    np.testing.assert_array_equal(jax.grad(lambda w: Sum(w, w * 0).mean())(1.0), 0)  # not NaN through the division
