"""The router's losses beside loops over layers and tokens."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llamax import config
from llamax.losses import TERMS, Facts, router
from llamax.losses.router import balance, bias_step, loads, sequence_balance, stats, z_loss
from tests.model.twins import quick_jit
from tests.tolerances import ORACLE, TWIN_GRAD

L, B, T, E, K = 2, 2, 12, 4, 2
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(L, B, T, E)).astype(np.float32)
INDEX = np.argsort(-LOGITS, axis=-1)[..., :K].astype(np.int32)
MASK = RNG.uniform(size=(B, T)) < 0.7
LLAMA4 = config.Model()
V3 = config.Model(choose_by="scores")
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], np.int32)
POSITIONS = np.array([[*range(5), *range(4), 0, 0, 0], range(12)], np.int32)


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def slow_loads(index, mask):
    counts = np.zeros((L, E))
    for layer, b, t in np.ndindex(L, B, T):
        for e in index[layer, b, t]:
            counts[layer, e] += mask[b, t]
    return counts


def normalised(z):
    s = 1 / (1 + np.exp(-z))
    return s / s.sum()


def slow_balance(logits, index, mask, probability=softmax):
    """Mean over layers of E sum_e f_e P_e."""
    total = 0.0
    for layer in range(L):
        p_E = sum(probability(logits[layer, b, t]) for b, t in zip(*np.nonzero(mask), strict=True)) / mask.sum()
        f_E = slow_loads(index, mask)[layer] / (mask.sum() * index.shape[-1])
        total += E * (f_E * p_E).sum() / L
    return total


def slow_z(logits, mask):
    """Mean over layers and real tokens of (log sum exp)^2."""
    squares = [np.log(np.exp(logits[layer, b, t]).sum()) ** 2 for layer in range(L) for b, t in np.argwhere(mask)]
    return np.mean(squares)


def balance_mean(logits):
    return balance(logits, INDEX, MASK).mean()


def balance_of_scores(logits):
    return balance(logits, INDEX, MASK, router.probabilities(V3)).mean()


def z_mean(logits):
    return z_loss(logits, MASK).mean()


def test_loads_count_real_tokens():
    np.testing.assert_array_equal(loads(INDEX, MASK, E), slow_loads(INDEX, MASK))


@pytest.mark.parametrize(
    "ours, slow",
    [
        (balance_mean, lambda z: slow_balance(z, INDEX, MASK)),
        (balance_of_scores, lambda z: slow_balance(z, INDEX, MASK, normalised)),
        (z_mean, lambda z: slow_z(z, MASK)),
    ],
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


def test_probabilities_are_of_what_is_chosen_by():
    for how in ({}, dict(router_score="softmax"), dict(router_score="softmax", choose_by="scores")):
        assert router.probabilities(config.Model(**how)) is jax.nn.softmax
    assert router.probabilities(V3) is router.normalised_sigmoid
    low = router.normalised_sigmoid(np.full(4, -200.0, np.float32))  # sigmoids of 0 in float32
    np.testing.assert_allclose(low, 0.25, rtol=1e-6)


@pytest.mark.parametrize("model, probability", [(LLAMA4, softmax), (V3, normalised)])
def test_the_terms_take_the_probabilities_of_the_model(model, probability):
    """As the step calls them."""
    scored = SimpleNamespace(routing=SimpleNamespace(logits=LOGITS, index=INDEX))
    batch, facts = SimpleNamespace(segment_ids=SEGMENTS, positions=POSITIONS), Facts(model, config.Preference(), 0)
    of_batch, of_documents = (TERMS[name].of(scored, batch, facts) for name in ("router_balance", "router_balance_seq"))
    logits = LOGITS.astype(float)
    np.testing.assert_allclose(of_batch.mean(), slow_balance(logits, INDEX, SEGMENTS > 0, probability), **ORACLE)
    np.testing.assert_allclose(
        of_documents.mean(), slow_sequence_balance(logits, INDEX, SEGMENTS, probability), **ORACLE
    )


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


# ---------------------------------------------------------------------------------------------- balance per document


def slow_sequence_balance(logits, index, segments, probability=softmax):
    """Mean over documents, by tokens, and over layers, of E sum_e f_e P_e within the document."""
    total, tokens = 0.0, 0
    for b in range(B):
        for s in set(segments[b]) - {0}:
            inside = np.zeros((B, T), bool)
            inside[b] = segments[b] == s
            total += inside.sum() * slow_balance(logits, index, inside, probability)
            tokens += inside.sum()
    return total / tokens


@pytest.mark.parametrize("model, probability", [(LLAMA4, softmax), (V3, normalised)])
def test_sequence_balance_matches_the_loop_in_value_and_gradient(model, probability):
    def ours(logits):
        return sequence_balance(logits, INDEX, SEGMENTS, POSITIONS, router.probabilities(model)).mean()

    value, grad = quick_jit(jax.value_and_grad(ours))(LOGITS)
    slow = partial(slow_sequence_balance, index=INDEX, segments=SEGMENTS, probability=probability)
    np.testing.assert_allclose(value, slow(LOGITS.astype(float)), **ORACLE)
    of_the_batch = balance(LOGITS, INDEX, SEGMENTS > 0, router.probabilities(model)).mean()
    assert abs(value - of_the_batch) > 1e-2, "another figure than the batch's"
    step = 1e-6
    for place in [(0, 0, 0, 1), (1, 0, 7, 2), (0, 1, 11, 3), (1, 0, 10, 0)]:
        nudge = np.zeros(LOGITS.shape)
        nudge[place] = step
        up, down = (slow(LOGITS + sign * nudge) for sign in (1, -1))
        np.testing.assert_allclose(grad[place], (up - down) / (2 * step), **TWIN_GRAD)


def test_sequence_balance_of_a_packed_row_is_that_of_its_documents_alone():
    whole = sequence_balance(LOGITS, INDEX, SEGMENTS, POSITIONS)
    parts = []
    for b, start, stop in ((0, 0, 5), (0, 5, 9), (1, 0, 12)):
        n = stop - start
        alone = np.ones((1, n), np.int32)
        parts.append(
            sequence_balance(
                LOGITS[:, b : b + 1, start:stop], INDEX[:, b : b + 1, start:stop], alone, np.arange(n)[None]
            )
        )
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, **ORACLE)


def test_bias_step_by_hand():
    loads_LE = np.array([[8.0, 0.0, 4.0, 4.0], [4.0, 4.0, 4.0, 4.0]])
    bias_LE = np.full((2, 4), 0.5)
    sign = bias_step(bias_LE, loads_LE, 0.1, "sign")
    np.testing.assert_allclose(sign, [[0.4, 0.6, 0.5, 0.5], [0.5] * 4], rtol=1e-6)
    proportional = bias_step(bias_LE, loads_LE, 0.1, "proportional")
    np.testing.assert_allclose(proportional, [[0.4, 0.6, 0.5, 0.5], [0.5] * 4], rtol=1e-6)
    uneven = bias_step(bias_LE, loads_LE + np.array([4.0, 0.0, 0.0, 0.0]), 0.1, "proportional")
    np.testing.assert_allclose(uneven[0], [0.36, 0.6, 0.52, 0.52], rtol=1e-6)  # 12, 0, 4, 4 beside an even 5


def test_stats_are_sums_over_real_tokens():
    got = stats(LOGITS, INDEX, MASK)
    np.testing.assert_array_equal(got.loads, slow_loads(INDEX, MASK))
    squares = [sum((LOGITS[layer, b, t] ** 2).sum() for b, t in np.argwhere(MASK)) for layer in range(L)]
    np.testing.assert_allclose(got.squares, squares, **ORACLE)
