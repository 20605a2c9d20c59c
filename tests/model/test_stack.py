"""The whole model beside the slow twin: layer order of every plan, rows and documents kept apart, remat, text without
pictures, bfloat16."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.batch import Batch
from llamax.model.llama import Llama
from llamax.model.score import score
from llamax.model.seam import Seam
from llamax.variants import MAVERICK_PERIOD, SCOUT_PERIOD
from tests.model import twins
from tests.tolerances import BF16, ORACLE, TWIN, TWIN_GRAD

PLANS = {
    "scout": ((SCOUT_PERIOD, 2),),
    "maverick": ((MAVERICK_PERIOD, 1),),
    "dense_prefix": ((("rope_full+dense",), 1), (("rope_full+moe",), 3)),
    "aperiodic": ((("nope_full+dense",), 1), (("rope_chunk+moe",), 1), (("rope_full+dense", "nope_full+moe"), 1)),
}
PICTURES = replace(twins.TINY, plan=((("rope_chunk+moe",), 2),), vision=twins.VISION)
TEXT, MIXED = twins.batch(), twins.batch(tiles=(2, 1))


def build(model, *, seam=None, dtype=np.float32, remat=False):
    return twins.fresh(partial(Llama, model, seam or Seam(), patch_id=twins.PATCH, dtype=dtype, remat=remat))


def assert_real_close(ours_BT, slow_BT, batch: Batch, **tolerance):
    real = batch.segment_ids > 0
    np.testing.assert_allclose(np.asarray(ours_BT)[real], slow_BT[real], **tolerance)


@pytest.mark.parametrize("plan, tied", [("scout", False), ("maverick", True), ("dense_prefix", False), ("aperiodic", False)])
def test_layers_run_in_the_order_of_the_plan(plan, tied):
    """Every layer has weights of its own, so any other order, repeat or kind gives other logits."""
    model = replace(twins.TINY, plan=PLANS[plan], tied_embeddings=tied)
    graph, tree = build(model)

    def forward(tree):
        llama = twins.bind(graph, tree)
        hidden, routing = llama(TEXT)
        return hidden, llama.logits(hidden), routing

    hidden, logits, routing = twins.quick_jit(forward)(tree)
    slow = twins.decode(tree, model, TEXT)
    assert_real_close(hidden, slow.hidden, TEXT, **ORACLE)
    assert_real_close(logits, slow.logits, TEXT, **ORACLE)
    assert routing.logits.shape == slow.router_logits.shape
    for layer in range(len(slow.router_logits)):
        assert_real_close(routing.logits[layer], slow.router_logits[layer], TEXT, **ORACLE)
        assert_real_close(routing.index[layer], slow.chosen[layer], TEXT)


def loss(graph, tree, batch: Batch):
    """Something that depends on everything which a training loss reads; and the scores."""
    scored = score(twins.bind(graph, tree), batch)
    total = -jnp.sum(scored.logp * batch.loss_weights)
    return total + 1e-2 * jnp.sum(scored.routing.logits**2 * (batch.segment_ids > 0)[..., None]), scored


def slow_loss(tree, model, batch: Batch):
    slow = twins.decode(tree, model, batch)
    logz = np.log(np.exp(slow.logits).sum(axis=-1))
    logp = np.take_along_axis(slow.logits, batch.targets[..., None], axis=-1)[..., 0] - logz
    total = -np.sum(logp * batch.loss_weights)
    return total + 1e-2 * np.sum(slow.router_logits**2 * (batch.segment_ids > 0)[..., None]), logp


@cache
def value_and_grad(remat: bool):
    """(tree, program) of the model with pictures; the program takes (tree, batch)."""
    graph, tree = build(PICTURES, remat=remat)
    return tree, twins.quick_jit(jax.value_and_grad(partial(loss, graph), has_aux=True))


def test_loss_and_gradient_of_pictures_and_text_match_the_slow_twin():
    """The gradient in one random direction through all parameters, by central differences in float64."""
    tree, program = value_and_grad(remat=True)
    (value, scored), grads = program(tree, MIXED)
    slow, slow_logp = slow_loss(tree, PICTURES, MIXED)
    assert_real_close(scored.logp, slow_logp, MIXED, **ORACLE)
    np.testing.assert_allclose(value, slow, **ORACLE)

    rng, step = np.random.default_rng(5), 1e-6
    along = jax.tree.map(lambda x: rng.normal(size=x.shape), tree)
    for part in ("stack", "vision", "embed"):
        ends = [
            slow_loss({**tree, part: jax.tree.map(lambda x, d: x + s * step * d, tree[part], along[part])}, PICTURES, MIXED)  # noqa: B023
            for s in (+1.0, -1.0)
        ]
        ours = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (np.asarray(g, float) * d).sum(), grads[part], along[part])))
        np.testing.assert_allclose(ours, (ends[0][0] - ends[1][0]) / (2 * step), **TWIN_GRAD)


def test_remat_changes_neither_value_nor_gradient():
    tree, plain = value_and_grad(remat=False)
    (value, _), grads = plain(tree, MIXED)
    (again, _), regrads = value_and_grad(remat=True)[1](tree, MIXED)
    np.testing.assert_allclose(value, again, **TWIN)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TWIN_GRAD), grads, regrads)


def test_pictures_train_every_part_of_the_encoder():
    tree, program = value_and_grad(remat=True)
    _, grads = program(tree, MIXED)
    for path, grad in jax.tree_util.tree_leaves_with_path({"vision": grads["vision"], "projector": grads["projector"]}):
        assert np.abs(grad).max() > 0, jax.tree_util.keystr(path)


def test_text_never_runs_the_encoder():
    graph, tree = build(PICTURES)
    program = partial(loss, graph)
    assert "erf" in str(jax.make_jaxpr(program)(tree, MIXED))  # the encoder's GELU, which nothing else has
    assert "erf" not in str(jax.make_jaxpr(program)(tree, TEXT))
    grads = twins.quick_jit(jax.grad(lambda part: program(tree | part, TEXT)[0]))({k: tree[k] for k in ("vision", "projector")})
    assert not any(np.asarray(grad).any() for grad in jax.tree.leaves(grads))


@pytest.mark.parametrize("seam", [Seam()], ids=["slow"])
def test_a_document_changes_no_bit_of_another(seam):
    """New text and another picture in the second of three documents."""
    graph, tree = build(replace(PICTURES, plan=((("rope_chunk+moe", "nope_full+moe"), 1),)), seam=seam)
    program = twins.quick_jit(lambda tree, batch: score(twins.bind(graph, tree), batch))
    before = program(tree, MIXED)
    second = MIXED.segment_ids == 2
    tokens = np.where(second & (MIXED.tokens != twins.PATCH), (MIXED.tokens + 1) % twins.PATCH, MIXED.tokens)
    tiles = MIXED.tiles.copy()
    tiles[0, 1] = 255 - tiles[0, 1]
    after = program(tree, MIXED._replace(tokens=tokens, tiles=tiles))
    for old, new in ((before.logp, after.logp), (before.logz, after.logz)):
        np.testing.assert_array_equal(np.asarray(old)[~second], np.asarray(new)[~second])
        assert (np.asarray(old) != np.asarray(new))[second].all()


def test_bfloat16_is_close_to_float32():
    """Without experts, whose choice a rounding can turn; the layer's own test covers them."""
    model = replace(twins.TINY, plan=((("rope_chunk+dense", "nope_full+dense"), 1),))
    graph, tree = build(model, dtype=jnp.bfloat16)

    def forward(tree):
        llama = twins.bind(graph, tree)
        return llama(TEXT)[0], score(llama, TEXT).logp

    hidden, logp = twins.quick_jit(forward)(tree)
    assert hidden.dtype == jnp.bfloat16 and logp.dtype == jnp.float32
    real = TEXT.segment_ids > 0
    slow = twins.decode(tree, model, TEXT).hidden[real]
    error = np.linalg.norm(np.asarray(hidden, float)[real] - slow) / np.linalg.norm(slow)
    assert 0 < error < BF16["rtol"]
