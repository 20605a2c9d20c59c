"""The training step: accumulation, skipped steps, and a loss that falls."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llamax import config
from llamax.batch import Batch
from llamax.losses import TERMS
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from llamax.optim.build import optimizer
from llamax.train import step as train_step
from llamax.train.state import State, init
from llamax.train.step import Told, each_nth_row, is_spike, make_gradient, make_step
from tests.model import twins
from tests.tolerances import MESH_GRAD, MESH_LOSS, MOMENTS_CURVE, ORACLE

RUN = config.Run(
    model=replace(twins.TINY, plan=((("rope_chunk+moe",), 1),)),
    data=config.Data(sources={"a": config.Source(), "b": config.Source()}),
    optim=config.Optim(peak_lr=3e-2, warmup_steps=2, clip_norm=1e9),
    losses=config.Losses(router_balance=0.0, router_z=1e-2),  # Switch balance is a statistic of each micro-batch
    train=config.Train(steps=100),
)


NOTHING_RECENT = jnp.full((2, RUN.health.spike_window), jnp.inf, jnp.float32)


def four_rows() -> Batch:
    """Rows with very different numbers of counted tokens; the last has next to none."""
    two = twins.batch()
    four = jax.tree.map(lambda x: np.concatenate([x, x]), two)
    four = four._replace(tokens=np.concatenate([two.tokens, two.tokens[:, ::-1]]))
    share = np.array([1.0, 0.2, 0.5, 0.05])[:, None]
    counted = np.random.default_rng(0).uniform(size=four.tokens.shape) < share
    return four._replace(loss_weights=(four.loss_weights * counted).astype(np.float32))


ROWS = four_rows()


@pytest.fixture(scope="module")
def tiny():
    """skeleton, optimizer, fresh state, and the jitted step of two micro-batches."""
    skel = skeleton(RUN.model, Seam(), patch_id=twins.PATCH, train=RUN.train)
    tx = optimizer(RUN.optim, RUN.train.steps, skel.kinds)
    rng = np.random.default_rng(0)
    params, bias = jax.tree.map(lambda x: rng.normal(0.2, 0.2, x.shape).astype(np.float32), skel.shapes())
    zero = np.zeros((), np.int32)
    state = State(zero, params, bias, tx.init(params), np.zeros(2, np.uint32), zero, zero, NOTHING_RECENT)
    return SimpleNamespace(skel=skel, tx=tx, state=state, step=twins.quick_jit(make_step(accumulating(2), skel, tx)))


def accumulating(parts: int, **losses) -> config.Run:
    return replace(RUN, train=replace(RUN.train, accumulate=parts), losses=replace(RUN.losses, **losses))


@pytest.fixture(scope="module")
def whole(tiny):
    """The gradient of all rows at once."""
    return twins.quick_jit(make_gradient(RUN, tiny.skel))(tiny.state.params, tiny.state.router_bias, ROWS)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_neither_loss_nor_gradient(tiny, whole, parts):
    """Although the micro-batches count very different numbers of tokens. (Not with `router_balance`, which is a
    statistic of each micro-batch.)"""
    if parts == 2:  # the step's own gradient, from Adam's first moment
        state, metrics = tiny.step(tiny.state, ROWS)
        grads = jax.tree.map(lambda m: m / (1 - RUN.optim.b1), optax.tree.get(state.opt, "mu"))
        told = Told(**{name: getattr(metrics, name) for name in Told._fields})
    else:
        gradient = twins.quick_jit(make_gradient(accumulating(parts), tiny.skel))
        grads, told = gradient(tiny.state.params, tiny.state.router_bias, ROWS)
    expected, whole_told = whole
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **MESH_LOSS), told, whole_told)
    np.testing.assert_array_equal(told.routing.loads, whole_told.routing.loads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **MESH_GRAD), grads, expected)


def test_a_fresh_state_has_the_structure_of_the_step(tiny):
    fresh = jax.eval_shape(lambda: init(tiny.skel, tiny.tx, seed=0, spike_window=RUN.health.spike_window))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(lambda x: (x.shape, x.dtype), tiny.state)


def test_loss_is_that_of_the_slow_twin(tiny, whole):
    """The weighted mean over all rows and the z-loss over real tokens, with the right weights."""
    tree = copy.deepcopy(tiny.state.params)
    tree["stack"]["segment0"]["slot0"]["moe"] |= tiny.state.router_bias["stack"]["segment0"]["slot0"]["moe"]
    slow = twins.decode(tree, RUN.model, ROWS)
    logz = np.log(np.exp(slow.logits).sum(axis=-1))
    nll = logz - np.take_along_axis(slow.logits, ROWS.targets[..., None], axis=-1)[..., 0]
    z = np.log(np.exp(slow.router_logits[0]).sum(axis=-1)) ** 2
    next_token, router_z = np.average(nll, weights=ROWS.loss_weights), z[ROWS.segment_ids > 0].mean()
    _, (loss, terms, by_source, routing, *_) = whole
    assert terms.keys() == {"next_token", "router_z"}
    means = [terms["next_token"].mean(), terms["router_z"].mean()]
    np.testing.assert_allclose(means, [next_token, router_z], **ORACLE)
    for name, term in terms.items():
        np.testing.assert_allclose(TERMS[name].den(ROWS), term.den, **MESH_LOSS)
    np.testing.assert_allclose(loss, next_token + 1e-2 * router_z, **ORACLE)
    of_source = [np.average(nll, weights=ROWS.loss_weights * (ROWS.source_ids == source)) for source in (0, 1)]
    np.testing.assert_allclose(by_source.mean(), of_source, **ORACLE)
    assert routing.loads.sum() == (ROWS.segment_ids > 0).sum()
    squares = (slow.router_logits[0] ** 2).sum(axis=-1)
    np.testing.assert_allclose(routing.squares, [squares[ROWS.segment_ids > 0].sum()], **ORACLE)


def test_every_micro_batch_takes_each_nth_row():
    parts = [each_nth_row(ROWS, 2, first) for first in range(2)]
    np.testing.assert_array_equal(parts[0].tokens, ROWS.tokens[[0, 2]])
    np.testing.assert_array_equal(parts[1].tokens, ROWS.tokens[[1, 3]])
    assert parts[1].tiles.shape == (2, *ROWS.tiles.shape[1:])


def test_loss_falls_on_a_fixed_batch(tiny):
    state, losses = tiny.state, []
    for number in range(10):
        state, metrics = tiny.step(state, ROWS)
        assert state.step == number + 1 and metrics.skipped == 0
        losses.append(float(metrics.terms["next_token"].mean()))
    assert losses[-1] < losses[0] - 0.5, losses


def test_moments_in_bfloat16_learn_as_fast(tiny):
    """Twenty steps on a fixed batch, beside moments in float32: as a whole, and step by step."""
    tx = optimizer(replace(RUN.optim, moments_dtype="bfloat16"), RUN.train.steps, tiny.skel.kinds)
    half = (
        twins.quick_jit(make_step(accumulating(2), tiny.skel, tx)),
        tiny.state._replace(opt=tx.init(tiny.state.params)),
    )
    curves = []
    for step, state in ((tiny.step, tiny.state), half):
        losses = []
        for _ in range(20):
            state, metrics = step(state, ROWS)
            losses.append(float(metrics.terms["next_token"].mean()))
        curves.append(losses)
    exact, rounded = curves
    assert {x.dtype for x in jax.tree.leaves(optax.tree.get(state.opt, "nu"))} == {np.dtype("bfloat16")}
    np.testing.assert_allclose(rounded, exact, **MOMENTS_CURVE)
    assert rounded != exact and exact[-1] < exact[0] - 1


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_non_finite_batch_changes_nothing_and_is_counted(tiny):
    state, _ = tiny.step(tiny.state, ROWS)
    poisoned = ROWS.loss_weights.copy()
    poisoned[1, 3] = np.inf
    bad, metrics = state, None
    for count in (1, 2):
        bad, metrics = tiny.step(bad, ROWS._replace(loss_weights=poisoned))
        assert not np.isfinite(metrics.loss)
        assert metrics.skipped == bad.skipped == count and metrics.bad_in_row == bad.bad_in_row == count
    assert_same_bits((state.params, state.opt, state.router_bias), (bad.params, bad.opt, bad.router_bias))
    assert bad.step == state.step + 2
    after_bad, metrics = tiny.step(bad, ROWS)
    after_good, good_metrics = tiny.step(state, ROWS)
    assert after_bad.skipped == 2 and after_bad.bad_in_row == 0
    assert_same_bits((after_bad.params, after_bad.opt), (after_good.params, after_good.opt))  # no trace is left
    assert metrics.lr == good_metrics.lr > 0


@pytest.mark.parametrize("loss, grad", [(1.0, 1.0), (1.0, np.nan), (1.0, np.inf), (np.nan, 1.0)])
def test_loss_and_gradient_must_both_be_finite(monkeypatch, loss, grad):
    """A gradient can overflow under a finite loss."""

    def gradient(params, router_bias, batch, reference):
        return {"w": jnp.array([[grad, 0.0], [0.0, 1.0]])}, Told(jnp.float32(loss), {}, None, None, None, None, None)

    good = bool(np.isfinite(loss + grad))
    params = {"w": jnp.ones((2, 2))}
    monkeypatch.setattr(train_step, "make_gradient", lambda run, skel, copies: gradient)
    tx = optimizer(replace(RUN.optim, warmup_steps=0), 10, {"w": "matrix"})
    zero = jnp.zeros((), jnp.int32)
    state = State(zero, params, {}, tx.init(params), zero, zero, zero, NOTHING_RECENT)
    new, metrics = make_step(RUN, SimpleNamespace(split=lambda tree: (tree, {})), tx)(state, ROWS)
    assert metrics.skipped == metrics.bad_in_row == (0 if good else 1)
    assert np.isfinite(new.params["w"]).all() and (np.asarray(new.params["w"]) != 1).any() == good
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new.opt))


# ---------------------------------------------------------------------------------------------------------- spikes

NORMAL = np.random.default_rng(0).normal(3.0, 0.1, 64).astype(np.float32)


@pytest.mark.parametrize(
    "recent, loss, spike",
    [
        (NORMAL, 3.2, False),
        (NORMAL, 3.7, False),  # seven standard deviations
        (NORMAL, 4.2, True),  # twelve
        (NORMAL, 1.0, False),  # only upwards
        (NORMAL, np.nan, False),  # another kind of bad
        (np.where(np.arange(64) < 30, 50.0, NORMAL), 8.0, True),  # robust: nearly half of the window is spikes
        (np.where(np.arange(64) < 40, 50.0, NORMAL), 50.0, False),  # a new level is none
        (np.where(np.arange(64) < 40, np.inf, NORMAL), 50.0, False),  # too few losses to tell
        (np.where(np.arange(64) < 20, np.inf, NORMAL), 50.0, True),
        (np.full(64, 3.0), 3.02, False),  # a flat curve: a thousandth of the median is its deviation
        (np.full(64, 3.0), 3.03, True),
    ],
)
def test_what_a_spike_is(recent, loss, spike):
    assert bool(is_spike(jnp.float32(loss), jnp.asarray(recent, jnp.float32), 8.0)) is spike


@pytest.fixture(scope="module")
def skipping(tiny):
    run = replace(RUN, health=config.Health(on_spike="skip", spike_window=8, spike_sigmas=1.0))
    recent = jnp.full((2, 8), jnp.inf)
    step = twins.quick_jit(make_step(run, tiny.skel, tiny.tx))
    return step, tiny.state._replace(recent=recent)


def test_a_spike_is_skipped_and_remembered_where_the_run_says_so(tiny, skipping):
    step, state = skipping
    for _ in range(8):
        state, metrics = step(state, ROWS)
        assert not metrics.spike and metrics.skipped == 0
    np.testing.assert_array_equal(state.recent[1], np.inf)  # no step had pictures
    assert np.isfinite(state.recent[0]).all() and state.recent[0, -1] == metrics.loss
    hostile = ROWS._replace(targets=np.full_like(ROWS.targets, 39), loss_weights=np.ones_like(ROWS.loss_weights))
    spiked, metrics = step(state, hostile)
    assert metrics.spike and metrics.finite and metrics.skipped == metrics.bad_in_row == 1
    assert_same_bits((state.params, state.opt, state.router_bias), (spiked.params, spiked.opt, spiked.router_bias))
    assert spiked.recent[0, -1] == metrics.loss > 1.5 * state.recent[0, -1]
    after, metrics = step(spiked, ROWS)
    assert not metrics.spike and metrics.bad_in_row == 0 and metrics.skipped == 1
    # With the default, "warn", the update is applied and the spike only told.
    warned, metrics = tiny.step(state._replace(recent=jnp.full_like(NOTHING_RECENT, 1.0)), hostile)
    assert metrics.spike and metrics.skipped == 0
    assert (np.asarray(warned.params["embed"]) != state.params["embed"]).any()
