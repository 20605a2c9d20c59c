"""Mixture of experts beside one token at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llamax.kernels.grouped import slow_experts, sorted_experts
from llamax.model.moe import MoE, best, choose, gates
from llamax.model.seam import Seam
from tests.model import twins
from tests.tolerances import ORACLE, TWIN_GRAD

X_BTD = np.random.default_rng(2).normal(size=(2, 24, 16)).astype(np.float32)


# Routings of published models, at sizes where each of their choices matters.
ROUTINGS = {
    "llama 4": dict(),
    "llama 4, top 2": dict(top_k=2, n_shared_experts=0),
    "llama 4, top 2, two shared": dict(top_k=2, n_shared_experts=2),
    "switch": dict(router_score="softmax", gate_on="output", n_shared_experts=0),
    "mixtral": dict(
        **dict(router_score="softmax", router_renormalise=True, gate_on="output"),
        **dict(n_experts=8, top_k=2, n_shared_experts=0),
    ),
    "olmoe": dict(router_score="softmax", gate_on="output", n_experts=8, top_k=4, n_shared_experts=0),
    "deepseek v2": dict(
        **dict(router_score="softmax", router_scale=16.0, gate_on="output", expert_ffn_dim=6, n_shared_experts=2),
        **dict(n_experts=12, top_k=3, n_groups=4, top_groups=2, group_best=1),
    ),
    "deepseek v3": dict(
        **dict(router_renormalise=True, router_scale=2.5, gate_on="output", choose_by="scores", expert_ffn_dim=6),
        **dict(n_experts=16, top_k=4, n_groups=4, top_groups=2, group_best=2),
    ),
}


def build(**changes):
    model = replace(twins.TINY, **changes)
    return model, *twins.fresh(partial(MoE, model, Seam(), out_gain=1.0))


@pytest.mark.parametrize("name", ROUTINGS)
def test_layer_matches_the_slow_twin(name):
    """The random router bias of `fresh` takes part in the choice here, and not in the gate."""
    model, graph, tree = build(**ROUTINGS[name])
    y_BTD, routing = twins.quick_jit(lambda tree, x: twins.bind(graph, tree)(x))(tree, X_BTD)
    slow, logits, chosen = twins.moe(twins.float64(tree), X_BTD.reshape(48, 16).astype(float), model)
    np.testing.assert_allclose(y_BTD.reshape(48, 16), slow, **ORACLE)
    np.testing.assert_allclose(routing.logits.reshape(48, -1), logits, **ORACLE)
    np.testing.assert_array_equal(routing.index.reshape(48, -1), chosen)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_best_are_those_of_top_k_with_ties_and_infinities(k):
    x = np.random.default_rng(k).integers(-2, 3, (50, 2, 6)).astype(np.float32)
    x[x == -2], x[x == 2] = -np.inf, np.inf
    np.testing.assert_array_equal(best(jnp.asarray(x), k), jax.lax.top_k(x, k)[1])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mixtral", dict(router_renormalise=False)),
        ("mixtral", dict(router_score="sigmoid")),
        ("mixtral", dict(gate_on="input")),
        ("mixtral", dict(choose_by="scores")),  # the bias is not zero
        ("deepseek v2", dict(group_best=2)),
        ("deepseek v2", dict(n_groups=3)),
        ("deepseek v2", dict(n_groups=1, top_groups=1)),
        ("deepseek v3", dict(top_groups=3)),
        ("deepseek v3", dict(group_best=1)),
        ("deepseek v3", dict(router_scale=1.0)),
        ("deepseek v3", dict(choose_by="logits")),
        ("deepseek v3", dict(router_renormalise=False)),
    ],
)
def test_every_field_of_a_routing_matters(name, change):
    """On these inputs, in the slow twin: so that the test above cannot pass without it."""
    model, _, tree = build(**ROUTINGS[name])
    x_ND, w = X_BTD.reshape(48, 16).astype(float), twins.float64(tree)
    y, changed = (twins.moe(w, x_ND, m)[0] for m in (model, replace(model, **change)))
    assert np.abs(y - changed).max() > 0.1


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


@pytest.mark.parametrize("name", ["llama 4, top 2", "mixtral", "deepseek v3"])
def test_gradients_by_central_differences(name):
    """d sum(y c) / d parameter or input of the float64 twin, the choice held, at the largest entries; none of the
    router's bias. c is random: a plain sum would hide the gates of a renormalised routing from each other."""
    model, graph, tree = build(**ROUTINGS[name])
    c_ND = np.random.default_rng(5).normal(size=(48, 16)).astype(np.float32)

    def loss(tree, x_BTD):
        return (twins.bind(graph, tree)(x_BTD)[0].reshape(48, 16) * c_ND).sum()

    grads, dx_BTD = twins.quick_jit(jax.grad(loss, argnums=(0, 1)))(tree, X_BTD)
    assert not np.asarray(grads["router_bias"]).any()
    w, x_ND, step = twins.float64(tree), X_BTD.reshape(48, 16).astype(float), 1e-6
    slopes = dict(grads, x=np.asarray(dx_BTD).reshape(48, 16))
    for part in ("router", "gate", "up", "down", "x"):
        slope = np.asarray(slopes[part])
        for place in np.argsort(-np.abs(slope).ravel())[:3]:
            moved = []
            for sign in (+1, -1):
                nudged = dict(w, x=x_ND.copy())
                nudged[part] = nudged[part].copy()
                nudged[part].ravel()[place] += sign * step
                moved.append((twins.moe(nudged, nudged["x"], model)[0] * c_ND).sum())
            np.testing.assert_allclose(slope.ravel()[place], (moved[0] - moved[1]) / (2 * step), **TWIN_GRAD)


MIXTRAL = dict(n_experts=8, top_k=2, n_shared_experts=0)
DEEPSEEK_V3 = dict(n_experts=8, top_k=3, n_groups=4, top_groups=2, group_best=2)


@pytest.mark.parametrize(("name", "sizes"), [("mixtral", MIXTRAL), ("deepseek_v3", DEEPSEEK_V3)])
def test_layer_matches_another_implementation(golden, name, sizes):
    """Values, choices and all gradients of transformers' layers (tests/golden/README.md), by the sorted experts."""
    hf = load_file(golden(f"moe/{name}.safetensors"))
    model = replace(twins.TINY, dim=8, **ROUTINGS[name.replace("_", " ")] | sizes)
    graph, _ = twins.fresh(partial(MoE, model, Seam(run_experts=sorted_experts), out_gain=1.0))
    tree = in_our_shapes(hf) | {"router_bias": hf.get("gate.e_score_correction_bias", np.zeros(8, np.float32))}

    def loss(tree, x_BTD):
        y_BTD, routing = twins.bind(graph, tree)(x_BTD)
        return (y_BTD * hf["c"]).sum(), (y_BTD, routing)

    (dtree, dx_BTD), (y_BTD, routing) = twins.quick_jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(tree, hf["x"])
    np.testing.assert_allclose(y_BTD, hf["y"], **ORACLE)
    np.testing.assert_allclose(routing.logits.reshape(24, 8), hf["logits"], **ORACLE)
    np.testing.assert_array_equal(np.sort(routing.index.reshape(24, -1)), np.sort(hf["index"]))  # theirs in any order
    np.testing.assert_allclose(dx_BTD, hf["grad.x"], **TWIN_GRAD)
    theirs = in_our_shapes({name.removeprefix("grad."): x for name, x in hf.items() if name.startswith("grad.")})
    assert not dtree.pop("router_bias").any()
    jax.tree.map(lambda ours, hfs: np.testing.assert_allclose(ours, hfs, **TWIN_GRAD), dtree, theirs)


def in_our_shapes(hf: dict) -> dict:
    """Weights, or gradients, of a MoE layer of transformers as a tree of ours."""
    gate_EDF, up_EDF = np.split(hf["experts.gate_up_proj"].transpose(0, 2, 1), 2, axis=-1)
    tree = {"router": hf["gate.weight"].T, "gate": gate_EDF, "up": up_EDF}
    tree["down"] = hf["experts.down_proj"].transpose(0, 2, 1)
    if "shared_experts.up_proj.weight" in hf:
        tree["shared"] = {name: hf[f"shared_experts.{name}_proj.weight"].T for name in ("gate", "up", "down")}
    return tree


def test_a_gate_survives_scores_that_float32_cannot_hold():
    """Renormalised, scores of e^-200 are as good as any: no division of zeros, and a gradient."""
    model = replace(twins.TINY, top_k=2, router_renormalise=True)
    z_NE, index_NK = jnp.array([[-200.0, -201.0, 3.0, 2.0]]), jnp.array([[0, 1]])
    for score in ("sigmoid", "softmax"):
        how = replace(model, router_score=score)
        np.testing.assert_allclose(gates(z_NE, index_NK, how), [[0.73105858, 0.26894142]], **ORACLE)
        slope = jax.grad(lambda z, how=how: gates(z, index_NK, how)[0, 0])(z_NE)
        np.testing.assert_allclose(slope, [[0.19661193, -0.19661193, 0, 0]], **ORACLE)


def test_llama_4_chooses_by_logits_where_scores_are_all_one():
    z_NE, bias_E = jnp.array([[30.0, 31.0, 40.0, 20.0]]), jnp.zeros(4)
    assert (jax.nn.sigmoid(z_NE) == 1).all()
    assert choose(z_NE, bias_E, twins.TINY).item() == 2
    assert choose(z_NE, bias_E, replace(twins.TINY, choose_by="scores")).item() == 0


def test_gates_and_logits_are_float32_in_a_bfloat16_model():
    def check(x_ND, experts, index_NK, gate_NK, *, gate_on):
        assert x_ND.dtype == gate_NK.dtype == experts.gate_EDF.dtype == jnp.bfloat16 and gate_on == "input"
        return slow_experts(x_ND, experts, index_NK, gate_NK)

    graph, tree = twins.fresh(partial(MoE, twins.TINY, Seam(run_experts=check), out_gain=1.0))
    y, routing = jax.eval_shape(lambda tree: twins.bind(graph, tree)(X_BTD.astype(jnp.bfloat16)), tree)
    assert y.dtype == jnp.bfloat16 and routing.logits.dtype == jnp.float32
