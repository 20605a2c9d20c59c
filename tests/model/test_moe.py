"""Mixture of experts beside one token at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.kernels.grouped import slow_experts
from llamax.model.moe import MoE
from llamax.model.seam import Seam
from tests.model import twins
from tests.tolerances import ORACLE, TWIN_GRAD

X_BTD = np.random.default_rng(2).normal(size=(2, 24, 16)).astype(np.float32)


def build(**changes):
    model = replace(twins.TINY, **changes)
    return model, *twins.fresh(partial(MoE, model, Seam(), out_gain=1.0))


@pytest.mark.parametrize("top_k, shared", [(1, 1), (2, 0), (2, 2)])
def test_layer_matches_the_slow_twin(top_k, shared):
    """The random router bias of `fresh` takes part in the choice here, and not in the gate."""
    model, graph, tree = build(top_k=top_k, n_shared_experts=shared)
    y_BTD, routing = twins.quick_jit(lambda tree, x: twins.bind(graph, tree)(x))(tree, X_BTD)
    slow, logits, chosen = twins.moe(twins.float64(tree), X_BTD.reshape(48, 16).astype(float), model)
    np.testing.assert_allclose(y_BTD.reshape(48, 16), slow, **ORACLE)
    np.testing.assert_allclose(routing.logits.reshape(48, 4), logits, **ORACLE)
    np.testing.assert_array_equal(routing.index.reshape(48, top_k), chosen)


def test_the_router_bias_moves_the_choice_but_not_the_gate():
    """A bias that forces expert 2 gives exactly what expert 2 gives with its own gate, sigmoid(z_2)."""
    model, graph, tree = build(n_shared_experts=0)
    tree["router_bias"] = np.array([0, 0, 1e4, 0], np.float32)
    _, routing = twins.bind(graph, tree)(jnp.asarray(X_BTD))
    assert (routing.index == 2).all()
    np.testing.assert_allclose(routing.logits, X_BTD @ tree["router"], **ORACLE)
    w = twins.float64(tree)
    x_ND = X_BTD.reshape(48, 16).astype(float)
    gate_N1 = twins.sigmoid(x_ND @ w["router"][:, 2:3])
    expected = twins.swiglu(gate_N1 * x_ND, {name: w[name][2] for name in ("gate", "up", "down")})
    np.testing.assert_allclose(twins.bind(graph, tree)(jnp.asarray(X_BTD))[0].reshape(48, 16), expected, **ORACLE)


def test_gradient_reaches_router_and_not_its_bias():
    """d sum(y) / d router entry by central differences of the float64 twin, the choice held."""
    model, graph, tree = build(top_k=2)
    grads = twins.quick_jit(jax.grad(lambda tree: twins.bind(graph, tree)(X_BTD)[0].sum()))(tree)
    assert not np.asarray(grads["router_bias"]).any()
    w, x_ND, step = twins.float64(tree), X_BTD.reshape(48, 16).astype(float), 1e-6
    for d, e in [(0, 0), (3, 1), (7, 2), (15, 3)]:
        moved = []
        for sign in (+1, -1):
            nudged = dict(w, router=w["router"].copy())
            nudged["router"][d, e] += sign * step
            moved.append(twins.moe(nudged, x_ND, model)[0].sum())
        np.testing.assert_allclose(grads["router"][d, e], (moved[0] - moved[1]) / (2 * step), **TWIN_GRAD)


def test_gates_and_logits_are_float32_in_a_bfloat16_model():
    def check(x_ND, experts, index_NK, gate_NK):
        assert x_ND.dtype == gate_NK.dtype == experts.gate_EDF.dtype == jnp.bfloat16
        return slow_experts(x_ND, experts, index_NK, gate_NK)

    graph, tree = twins.fresh(partial(MoE, twins.TINY, Seam(run_experts=check), out_gain=1.0))
    y, routing = jax.eval_shape(lambda tree: twins.bind(graph, tree)(X_BTD.astype(jnp.bfloat16)), tree)
    assert y.dtype == jnp.bfloat16 and routing.logits.dtype == jnp.float32
