"""Comparisons in the training step: the loss of a slow twin, a reference beside, splits, meshes."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax import config
from llamax.batch import Batch
from llamax.model.score import score
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from llamax.optim.build import optimizer
from llamax.train.state import State
from llamax.train.step import make_gradient, make_step
from tests.model import twins
from tests.tolerances import MESH_GRAD, MESH_LOSS, ORACLE

B, T = 4, 24
BETA = 0.5
RUN = config.Run(
    model=replace(twins.TINY, plan=((("rope_chunk+moe",), 1),), vision=None),
    data=config.Data(sources={"a": config.Source()}, comparisons_per_row=3),
    optim=config.Optim(peak_lr=3e-2, warmup_steps=0, clip_norm=1e9),
    losses=config.Losses(router_balance=0.0, router_z=1e-2, next_token=0.2),
    preference=config.Preference(config.PreferenceLosses(sigmoid=1.0), beta=BETA),
    reference=config.Reference(source="live"),
    train=config.Train(steps=100),
)
REWARDED = replace(
    RUN,
    model=replace(RUN.model, reward_head=True),
    losses=replace(RUN.losses, next_token=0.0, preference=0.0, reward=1.0),
    preference=config.Preference(centring=0.1),
    reference=config.Reference(),
)


def rows() -> Batch:
    """Four rows: comparisons of answers of other lengths, a chosen and a rejected answer alone, one row without any."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, twins.PATCH, (2, B, T), dtype=np.int32)
    segments, sides = np.zeros((2, B, T), np.int32)
    positions = np.zeros((B, T), np.int32)
    layout = [  # (length, prompt's length, side) of the segments of each row
        [(7, 3, 1), (9, 3, -1), (4, 2, 2), (4, 2, -2)],
        [(12, 5, 1), (8, 5, -1)],
        [(6, 2, 1), (7, 2, -1), (6, 3, 2), (5, 2, -3)],
        [(10, 0, 0)],
    ]
    for b, row in enumerate(layout):
        at = 0
        for number, (length, prompt, side) in enumerate(row, start=1):
            where = slice(at, at + length)
            segments[b, where], positions[b, where] = number, np.arange(length)
            sides[b, at + prompt : at + length] = side
            at += length
    weights = (sides > 0).astype(np.float32)
    nothing = np.zeros((B, T), np.int32)
    tiles = np.zeros((B, 0, 8, 8, 3), np.uint8)
    return Batch(tokens, targets, weights, segments, positions, nothing, tiles, sides=sides)


ROWS = rows()
COMPARISONS = [(0, 1), (0, 2), (1, 1), (2, 1)]  # (row, number) of those with two sides


def bones_of(run: config.Run):
    return skeleton(run.model, Seam(), patch_id=twins.PATCH, train=run.train)


def weights_of(bones, seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0.2, 0.2, x.shape).astype(np.float32), bones.shapes())


@pytest.fixture(scope="module")
def tiny():
    bones = bones_of(RUN)
    params, bias = weights_of(bones, 0)
    others, _ = weights_of(bones, 1)
    return bones, params, bias, others


def gradient_of(run: config.Run, bones):
    return twins.quick_jit(make_gradient(run, bones))


def test_the_loss_is_that_of_one_comparison_at_a_time(tiny):
    """DPO (eq. 7), one comparison after the other, from log-probabilities of the two models; and 0.2 of the NLL."""
    bones, params, bias, others = tiny
    _, told = gradient_of(RUN, bones)(params, bias, ROWS, (others, bias))
    ours, theirs = (np.asarray(score(bones.bind(p, bias), ROWS).logp, np.float64) for p in (params, others))
    loss, right = 0.0, 0
    for b, k in COMPARISONS:
        chosen, rejected = (ROWS.sides[b] == side * k for side in (1, -1))
        apart = (ours - theirs)[b, chosen].sum() - (ours - theirs)[b, rejected].sum()
        loss += np.log1p(np.exp(-BETA * apart))
        right += ours[b, chosen].sum() > ours[b, rejected].sum()
    n = len(COMPARISONS) + 2  # the answers without another count, and add nothing
    np.testing.assert_allclose(told.terms["preference"].mean(), loss / n, **ORACLE)
    np.testing.assert_allclose(told.compared["accuracy"].mean(), right / len(COMPARISONS), **ORACLE)
    np.testing.assert_allclose(told.terms["next_token"].mean(), -ours[ROWS.sides > 0].mean(), **ORACLE)
    want = loss / n - 0.2 * ours[ROWS.sides > 0].mean() + 1e-2 * told.terms["router_z"].mean()
    np.testing.assert_allclose(told.loss, want, **ORACLE)


def test_a_reference_of_the_same_weights_gives_the_same_bits(tiny):
    bones, params, bias, _ = tiny
    _, told = gradient_of(RUN, bones)(params, bias, ROWS, (params, bias))
    assert told.compared["margin"].num == 0 and told.compared["kl"].num == 0
    assert told.compared["reward_accuracy"].mean() == 0.5, "all are ties"
    np.testing.assert_allclose(told.terms["preference"].num, len(COMPARISONS) * np.log(2), rtol=1e-6)


def test_no_gradient_goes_to_the_reference_and_no_step_moves_it(tiny):
    bones, params, bias, others = tiny
    gradient = make_gradient(RUN, bones)
    of_reference = jax.grad(lambda own: gradient(params, bias, ROWS, (own, bias))[1].loss)(others)
    assert not any(np.any(x) for x in jax.tree.leaves(of_reference))
    tx = optimizer(RUN.optim, RUN.train.steps, bones.kinds)
    zero = np.zeros((), np.int32)
    recent = jnp.full((2, RUN.health.spike_window), jnp.inf, jnp.float32)
    state = State(zero, params, bias, tx.init(params), np.zeros(2, np.uint32), zero, zero, recent, (others, bias))
    step = twins.quick_jit(make_step(RUN, bones, tx))
    margins = []
    for _ in range(5):
        state, metrics = step(state, ROWS)
        margins.append(float(metrics.compared["margin"].mean()))
    assert margins[-1] > margins[0] + 1, "it learns what is preferred"
    jax.tree.map(np.testing.assert_array_equal, state.reference, (others, bias))


@pytest.mark.parametrize("run", [RUN, REWARDED], ids=["preference", "reward"])
def test_micro_batches_change_neither_loss_nor_gradient(run):
    bones = bones_of(run)
    params, bias = weights_of(bones, 0)
    reference = (weights_of(bones, 1)[0], bias) if run.reference.source == "live" else None
    whole, told = gradient_of(run, bones)(params, bias, ROWS, reference)
    parts = replace(run, train=replace(run.train, accumulate=4))
    split, told_in_parts = gradient_of(parts, bones)(params, bias, ROWS, reference)
    np.testing.assert_allclose(told_in_parts.loss, told.loss, **MESH_LOSS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **MESH_GRAD), split, whole)


def test_a_reward_model_is_scored_where_the_answers_end():
    bones = bones_of(REWARDED)
    params, bias = weights_of(bones, 0)
    _, told = gradient_of(REWARDED, bones)(params, bias, ROWS)
    scores = np.asarray(score(bones.bind(params, bias), ROWS).reward, np.float64)
    loss, margins = 0.0, []
    for b, k in COMPARISONS:
        good, bad = (scores[b, np.flatnonzero(ROWS.sides[b] == side * k)[-1]] for side in (1, -1))
        loss += np.log1p(np.exp(bad - good)) + 0.1 * (good + bad) ** 2
        margins.append(good - bad)
    np.testing.assert_allclose(told.terms["reward"].mean(), loss / len(COMPARISONS), **ORACLE)
    np.testing.assert_allclose(told.compared["margin"].mean(), np.mean(margins), **ORACLE)
    assert told.compared["reward_accuracy"].mean() == np.mean(np.array(margins) > 0)
    assert "kl" not in told.compared, "there is no reference"


def test_rows_without_comparisons_know_nothing_of_them():
    """The program is that of before: nothing is told, and no term is there."""
    plain = replace(RUN, preference=config.Preference(), reference=config.Reference())
    bones = bones_of(plain)
    _, told = gradient_of(plain, bones)(*weights_of(bones, 0), ROWS._replace(sides=None))
    assert told.compared is None and set(told.terms) == {"next_token", "router_z"}
