"""The router's losses beside loops over layers and tokens."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from llamax.losses.router import balance, loads, z_loss
from tests.model.twins import quick_jit
from tests.tolerances import ORACLE, TWIN_GRAD

L, B, T, E, K = 2, 2, 12, 4, 2
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(L, B, T, E)).astype(np.float32)
INDEX = np.argsort(-LOGITS, axis=-1)[..., :K].astype(np.int32)
MASK = RNG.uniform(size=(B, T)) < 0.7


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def slow_loads(index, mask):
    counts = np.zeros((L, E))
    for layer, b, t in np.ndindex(L, B, T):
        for e in index[layer, b, t]:
            counts[layer, e] += mask[b, t]
    return counts


def slow_balance(logits, index, mask):
    """Mean over layers of E sum_e f_e P_e."""
    total = 0.0
    for layer in range(L):
        p_E = sum(softmax(logits[layer, b, t]) for b, t in zip(*np.nonzero(mask), strict=True)) / mask.sum()
        f_E = slow_loads(index, mask)[layer] / (mask.sum() * index.shape[-1])
        total += E * (f_E * p_E).sum() / L
    return total


def slow_z(logits, mask):
    """Mean over layers and real tokens of (log sum exp)^2."""
    squares = [np.log(np.exp(logits[layer, b, t]).sum()) ** 2 for layer in range(L) for b, t in np.argwhere(mask)]
    return np.mean(squares)


def balance_mean(logits):
    return balance(logits, INDEX, MASK).mean()


def z_mean(logits):
    return z_loss(logits, MASK).mean()


def test_loads_count_real_tokens():
    np.testing.assert_array_equal(loads(INDEX, MASK, E), slow_loads(INDEX, MASK))


@pytest.mark.parametrize(
    "ours, slow", [(balance_mean, lambda z: slow_balance(z, INDEX, MASK)), (z_mean, lambda z: slow_z(z, MASK))]
)
def test_value_and_gradient_match_the_loop(ours, slow):
    """The gradient at a few logits by central differences; the choice of experts is held, as it has no gradient."""
    value, grad = quick_jit(jax.value_and_grad(ours))(LOGITS)
    np.testing.assert_allclose(value, slow(LOGITS.astype(float)), **ORACLE)
    assert np.abs(grad).max() > 1e-3
    step = 1e-6
    real = np.argwhere(np.broadcast_to(MASK[..., None], LOGITS.shape))[::17]
    padding = (0, *np.argwhere(~MASK)[0], 1)
    for place in [*map(tuple, real), padding]:
        nudge = np.zeros(LOGITS.shape)
        nudge[place] = step
        np.testing.assert_allclose(grad[place], (slow(LOGITS + nudge) - slow(LOGITS - nudge)) / (2 * step), **TWIN_GRAD)


def test_balance_is_one_when_uniform_and_e_when_collapsed():
    spread = np.broadcast_to(np.arange(T)[:, None] % E, (L, B, T, 1)).astype(np.int32)
    everything = np.ones((B, T), bool)
    np.testing.assert_allclose(balance(np.zeros_like(LOGITS), spread, everything).mean(), 1.0, rtol=1e-6)
    collapsed = np.where(np.arange(E) == 2, 50.0, 0.0) + np.zeros_like(LOGITS)
    np.testing.assert_allclose(balance(collapsed, np.full_like(spread, 2), everything).mean(), E, rtol=1e-6)


def test_padding_counts_for_nothing():
    noisy = np.where(MASK[..., None], LOGITS, 1e3).astype(np.float32)
    elsewhere = np.where(MASK[..., None], INDEX, 0)
    np.testing.assert_array_equal(balance(noisy, elsewhere, MASK), balance(LOGITS, INDEX, MASK))
    np.testing.assert_array_equal(z_loss(noisy, MASK), z_loss(LOGITS, MASK))


def test_an_empty_batch_gives_zero_and_no_nan():
    nothing = np.zeros((B, T), bool)
    for loss in (lambda z: balance(z, INDEX, nothing).mean(), lambda z: z_loss(z, nothing).mean()):
        value, grad = quick_jit(jax.value_and_grad(loss))(LOGITS)
        assert value == 0 and not np.asarray(grad).any()


def test_z_loss_is_a_sum_that_adds_up_over_rows():
    rows = [z_loss(LOGITS[:, b : b + 1], MASK[b : b + 1]) for b in range(B)]
    np.testing.assert_allclose(np.sum(rows, axis=0), z_loss(LOGITS, MASK), **ORACLE)
