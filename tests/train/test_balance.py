"""Experts stay alive: from a router that sends every token to one expert, each way of balancing spreads the tokens."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from llamax import config
from llamax.model import stack
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from llamax.model.stack import moe_slots
from llamax.model.vision import normalise
from llamax.optim.build import optimizer
from llamax.train.blocks import gradient_squares, move_biases
from llamax.train.state import State
from llamax.train.step import make_step
from tests.model import twins
from tests.train.test_step import NOTHING_RECENT, ROWS, RUN

NO_BALANCE = dict(router_balance=0.0, router_z=0.0)
STEPS, LAST = 120, 20
# Layers scanned and single, MoE first and last in a period: the biases' rows must find their own layers.
PLANS = {
    1: ((("rope_chunk+moe", "nope_full+dense"), 2), (("rope_chunk+dense", "nope_full+moe"), 1)),
    2: ((("nope_full+dense", "rope_chunk+moe"), 1),),
}


DEEPSEEK_V3 = dict(choose_by="scores", router_renormalise=True, router_scale=2.5, gate_on="output")


def trained(losses: dict, top_k: int = 1, *, routing: dict | None = None, **router_bias):
    """(max/mean load of each MoE layer over the last steps, mean squared router logsumexp at the start and the end)."""
    run = replace(
        RUN,
        model=replace(RUN.model, plan=PLANS[top_k], top_k=top_k, **(routing or {})),
        losses=replace(RUN.losses, **(NO_BALANCE | losses)),
        router_bias=config.RouterBias(**router_bias),
        optim=replace(RUN.optim, peak_lr=1e-2),
    )
    skel = skeleton(run.model, Seam(), patch_id=twins.PATCH, train=run.train)
    tx = optimizer(run.optim, run.train.steps, skel.kinds)
    rng = np.random.default_rng(0)
    params, bias = jax.tree.map(lambda x: rng.normal(0.2, 0.2, x.shape).astype(np.float32), skel.shapes())
    bias = jax.tree.map(np.zeros_like, bias)
    for segment, slot in moe_slots(run.model.plan):
        # All of a token's features are positive on average, so these columns win for every token.
        params["stack"][segment][slot]["moe"]["router"][..., 2 : 2 + top_k] += 0.3
    zero = np.zeros((), np.int32)
    state = State(zero, params, bias, tx.init(params), np.zeros(2, np.uint32), zero, zero, NOTHING_RECENT)
    step = twins.quick_jit(make_step(run, skel, tx))
    loads, z = [], []
    for _ in range(STEPS):
        state, metrics = step(state, ROWS)
        loads.append(np.asarray(metrics.routing.loads))
        z.append(float(metrics.terms["router_z"].mean()) if "router_z" in metrics.terms else np.nan)
    first, last = loads[0], np.sum(loads[-LAST:], axis=0)
    assert (first.max(1) / first.mean(1) > 3.5 / top_k).all(), "the start is a collapse: 4 (or 2) would be a whole one"
    return last.max(1) / last.mean(1), z


@pytest.mark.parametrize(
    "losses, router_bias, top_k",
    [
        (dict(router_balance=1.0), {}, 1),
        (dict(router_balance_seq=1.0), {}, 1),
        ({}, dict(rate=0.05, update="sign"), 1),
        ({}, dict(rate=0.05, update="proportional"), 1),
        pytest.param(dict(router_balance=1.0), {}, 2, marks=pytest.mark.slow),
        pytest.param(dict(router_balance_seq=1.0), {}, 2, marks=pytest.mark.slow),
        ({}, dict(rate=0.05, update="sign"), 2),
        pytest.param({}, dict(rate=0.05, update="proportional"), 2, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(map(str, value)) or "-" if isinstance(value, dict) else f"top-{value}",
)
def test_a_collapsed_router_is_balanced(losses, router_bias, top_k):
    skew, _ = trained(losses, top_k, **router_bias)
    assert (skew < 1.5).all(), skew


@pytest.mark.parametrize(
    "losses, router_bias",
    [
        ({}, dict(rate=0.02, update="sign")),
        pytest.param(dict(router_balance=1.0), {}, marks=pytest.mark.slow),
        pytest.param(dict(router_balance_seq=1.0), {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_choice_by_scores_is_balanced_too(losses, router_bias):
    """The bias then moves scores, which are 0 to 1; the losses' P is the scores' share."""
    skew, _ = trained(losses, 2, routing=DEEPSEEK_V3, **router_bias)
    assert (skew < 1.5).all(), skew


@pytest.mark.slow
def test_without_balancing_it_stays_collapsed_and_the_z_loss_bounds_the_logits():
    """So the test above can fail. The z-loss weighs next to nothing, so that it is measured only; then it counts."""
    skew, free = trained(dict(router_z=1e-9))
    assert (skew > 2).all(), skew
    _, bound = trained(dict(router_z=0.1))
    assert free[0] == pytest.approx(bound[0], rel=1e-4) and free[0] > 4
    assert max(bound[-LAST:]) < 2.5 < min(free[-LAST:]), (max(bound[-LAST:]), min(free[-LAST:]))


def test_biases_move_by_the_loads_of_their_own_layer():
    """Two periods of two MoE layers and a dense one between, then one more: layer order is 0 1 | 2 3 | 4."""
    plan = ((("rope_chunk+moe", "rope_chunk+dense", "nope_full+moe"), 2), (("rope_chunk+moe",), 1))
    loads_LE = np.full((5, 2), 4.0)
    loads_LE[:, 0] += np.arange(5)  # expert 0 is busy from layer 1 on
    loads_LE[3] = [0.0, 9.0]

    def biases(repeats):
        return {"moe": {"router_bias": np.zeros((repeats, 2), np.float32)}}

    tree = {"stack": {"segment0": {"slot0": biases(2), "slot2": biases(2)}, "segment1": {"slot0": biases(1)}}}
    routers = {"moe": {"router": None}}
    grads = {"stack": {"segment0": {"slot0": routers, "slot2": routers}, "segment1": {"slot0": routers}}}
    moved = move_biases(tree, loads_LE, plan, 1.0, "sign", grads)["stack"]
    signs = {"slot0": [[0, 0], [-1, 1]], "slot2": [[-1, 1], [1, -1]]}  # layers 0 and 2, layers 1 and 3
    for slot, expected in signs.items():
        np.testing.assert_array_equal(moved["segment0"][slot]["moe"]["router_bias"], expected)
    np.testing.assert_array_equal(moved["segment1"]["slot0"]["moe"]["router_bias"], [[-1, 1]])
    frozen = {"stack": {"segment0": {"slot0": {"moe": {"gate": None}}, "slot2": routers}}}  # two of the three
    still = move_biases(tree, loads_LE, plan, 1.0, "sign", frozen)["stack"]
    for segment, slot in (("segment0", "slot0"), ("segment1", "slot0")):
        np.testing.assert_array_equal(still[segment][slot]["moe"]["router_bias"], 0)
    np.testing.assert_array_equal(still["segment0"]["slot2"]["moe"]["router_bias"], signs["slot2"])


@pytest.mark.parametrize("encoder", ["vit", "linear"])
def test_gradient_norms_by_block_sum_to_the_whole(encoder):
    """Every parameter is in exactly one block, and a layer's block holds that layer's parameters."""
    vision = replace(twins.VISION, encoder=encoder)
    model = replace(RUN.model, plan=((("rope_chunk+moe", "nope_full+dense"), 2),), vision=vision)
    run = replace(RUN, model=model)
    skel = skeleton(model, Seam(), patch_id=twins.PATCH, train=run.train)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), skel.shapes()[0])
    got = gradient_squares(grads, model.plan)
    assert got["layer"].shape == (4,)
    assert encoder == "linear" or got["vision"].shape == (vision.n_layers,)
    of_the_vit = {"vision", "projector"} if encoder == "vit" else set()
    assert got.keys() == {"layer", "vision_rest", "embed", "head", "norm"} | of_the_vit
    total = sum(float((np.float64(g) ** 2).sum()) for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(sum(float(np.sum(x)) for x in got.values()), total, rtol=1e-5)
    third = jax.tree.map(lambda g: g[1], grads["stack"]["segment0"]["slot0"])  # repeat 1 of slot 0: layer 2
    np.testing.assert_allclose(got["layer"][2], sum((g**2).sum() for g in jax.tree.leaves(third)), rtol=1e-5)


def test_activation_norms_are_those_of_the_residual_stream():
    """The model constrains its stack's input, and every layer's middle and output."""
    seen = []
    skel = skeleton(
        RUN.model, Seam(constrain=lambda x, names: seen.append(x) or x), patch_id=twins.PATCH, train=RUN.train
    )
    rng = np.random.default_rng(0)
    params, bias = jax.tree.map(lambda x: rng.normal(0.2, 0.2, x.shape).astype(np.float32), skel.shapes())

    def forward(params):
        seen.clear()
        model = skel.bind(params, bias)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stack, "scan", one_repeat)
            _, trace = model(ROWS)
        return trace.energy, seen[2]

    energy, out = twins.quick_jit(forward)(params)
    square = (np.asarray(out, np.float64) ** 2).mean(axis=-1) * (ROWS.segment_ids > 0)
    np.testing.assert_allclose(energy, [square.sum(axis=1)], rtol=1e-5)


def one_repeat(stacked, x, *args, remat, each, run, **how):
    graph, state = nnx.split(stacked)
    x, told = nnx.merge(graph, jax.tree.map(lambda w: w[0], state))(x, *args, **how)
    return x, jax.tree.map(lambda a: a[None], told)


def test_activation_norms_of_the_encoder_count_the_tiles_in_use():
    """The first row uses two of its three slots, the second one: what the empty slots hold must not matter."""
    model = replace(RUN.model, vision=twins.VISION)
    batch = twins.batch(tiles=(2, 1))
    padded = np.pad(batch.tiles, ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)), constant_values=200)
    skel = skeleton(model, Seam(), patch_id=twins.PATCH, train=RUN.train)
    rng = np.random.default_rng(0)
    params, bias = jax.tree.map(lambda x: rng.normal(0.2, 0.2, x.shape).astype(np.float32), skel.shapes())

    def forward(params):
        model = skel.bind(params, bias)
        _, square_LS = model.vision(normalise(np.concatenate([batch.tiles[0, :2], batch.tiles[1, :1]]), np.float32))
        return model(batch._replace(tiles=padded))[1].vision_energy, square_LS

    energy_LB, square_LS = twins.quick_jit(forward)(params)
    np.testing.assert_allclose(energy_LB, np.stack([square_LS[:, :2].sum(1), square_LS[:, 2]], 1), rtol=1e-5)
