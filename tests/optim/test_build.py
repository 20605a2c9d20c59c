"""The optimizer beside AdamW written out: clip, moments, decay on matrices only."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from llamax import config
from llamax.optim.build import optimizer
from llamax.optim.schedules import schedule
from tests.tolerances import TWIN

OPTIM = config.Optim(peak_lr=1e-2, warmup_steps=2, weight_decay=0.5, clip_norm=1.0)
STEPS = 10
KINDS = {"w": "matrix", "inner": {"scale": "norm", "table": "embedding", "shift": "bias"}}
RNG = np.random.default_rng(0)
PARAMS = jax.tree.map(lambda kind: RNG.normal(size=(3, 2)).astype(np.float32), KINDS)


def gradients(scale: float) -> list:
    return [jax.tree.map(lambda x: scale * RNG.normal(size=x.shape).astype(np.float32), PARAMS) for _ in range(4)]


def run(optim: config.Optim, grads: list):
    """(parameters, optimizer state) after the steps."""
    tx = optimizer(optim, STEPS, KINDS)

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for grad in grads:
        params, state = step(params, state, grad)
    return params, state


def slow_adamw(optim: config.Optim, grads: list, at_rest=np.asarray) -> list[np.ndarray]:
    """`at_rest`: what becomes of a moment from one step to the next."""
    lr = schedule(optim, STEPS)
    kinds, params = jax.tree.leaves(KINDS), [x.astype(float) for x in jax.tree.leaves(PARAMS)]
    m, v = [np.zeros_like(x) for x in params], [np.zeros_like(x) for x in params]
    for step, grad in enumerate(grads):
        flat = [np.asarray(g, float) for g in jax.tree.leaves(grad)]
        norm = np.sqrt(sum((g**2).sum() for g in flat))
        flat = [g * min(1.0, optim.clip_norm / norm) for g in flat]
        for i, g in enumerate(flat):
            m[i] = optim.b1 * m[i] + (1 - optim.b1) * g
            v[i] = optim.b2 * v[i] + (1 - optim.b2) * g**2
            m_hat, v_hat = m[i] / (1 - optim.b1 ** (step + 1)), v[i] / (1 - optim.b2 ** (step + 1))
            decay = optim.weight_decay if kinds[i] == "matrix" else 0.0
            params[i] = params[i] - float(lr(step)) * (m_hat / (np.sqrt(v_hat) + optim.eps) + decay * params[i])
            m[i], v[i] = at_rest(m[i]), at_rest(v[i])
    return params


@pytest.mark.parametrize("scale", [0.01, 10.0], ids=["below the clip", "clipped"])
def test_steps_match_adamw_written_out(scale):
    grads = gradients(scale)
    ours, _ = run(OPTIM, grads)
    for a, b in zip(jax.tree.leaves(ours), slow_adamw(OPTIM, grads), strict=True):
        np.testing.assert_allclose(a, b, **TWIN)


def test_moments_that_rest_in_bfloat16_are_updated_in_float32():
    grads, optim = gradients(1.0), replace(OPTIM, moments_dtype="bfloat16")
    ours, state = run(optim, grads)
    moments = jax.tree.leaves((optax.tree.get(state, "mu"), optax.tree.get(state, "nu")))
    assert {x.dtype for x in moments} == {np.dtype("bfloat16")} and len(moments) == 2 * len(jax.tree.leaves(PARAMS))

    def rounded(x):
        return x.astype(np.float32).astype("bfloat16").astype(float)

    slow, exact = slow_adamw(optim, grads, rounded), slow_adamw(optim, grads)
    for a, b in zip(jax.tree.leaves(ours), slow, strict=True):
        np.testing.assert_allclose(a, b, **TWIN)
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(ours), exact, strict=True)) > 2 * TWIN["atol"]


def test_decay_acts_on_matrices_only():
    nothing = [jax.tree.map(np.zeros_like, PARAMS)] * 3
    params, _ = run(OPTIM, nothing)
    shrink = np.prod([1 - float(schedule(OPTIM, STEPS)(step)) * OPTIM.weight_decay for step in range(3)])
    np.testing.assert_allclose(params["w"], PARAMS["w"] * shrink, **TWIN)
    for name in ("scale", "table", "shift"):
        np.testing.assert_array_equal(params["inner"][name], PARAMS["inner"][name])


def test_clip_bounds_the_global_norm():
    """Adam forgets a gradient's scale, its first moment does not."""
    grads = gradients(10.0)[:1]
    for clip in (1.0, 0.25):
        _, state = run(replace(OPTIM, clip_norm=clip), grads)
        moment = optax.tree.get(state, "mu")
        np.testing.assert_allclose(optax.tree.norm(moment), clip * (1 - OPTIM.b1), rtol=1e-5)


def test_the_vision_side_has_a_rate_of_its_own():
    kinds = {"embed": "embedding", "projector": "matrix", "vision": {"w": "matrix"}}
    params = jax.tree.map(lambda kind: np.ones((3, 2), np.float32), kinds)
    grads = jax.tree.map(lambda x: np.full_like(x, 0.5), params)

    def update(**changes):
        tx = optimizer(replace(OPTIM, warmup_steps=0, **changes), STEPS, kinds)
        return tx.update(grads, tx.init(params), params)[0]

    alike, slower = update(), update(vision_lr_ratio=0.25)
    np.testing.assert_allclose(slower["embed"], alike["embed"], **TWIN)
    np.testing.assert_allclose(slower["projector"], 0.25 * alike["projector"], **TWIN)
    np.testing.assert_allclose(slower["vision"]["w"], 0.25 * alike["vision"]["w"], **TWIN)
    assert np.abs(alike["projector"]).min() > 0
