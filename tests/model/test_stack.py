"""The whole model beside the slow twin: layer order of every plan, rows and documents kept apart, remat, text without
pictures, bfloat16."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.batch import Batch
from llamax.kernels.attention import blocked_attention
from llamax.kernels.grouped import sorted_experts
from llamax.model.llama import Llama
from llamax.model.score import score
from llamax.model.seam import Seam
from llamax.variants import MAVERICK_PERIOD, SCOUT_PERIOD
from tests.model import twins
from tests.tolerances import BF16, ORACLE

PLANS = {
    "scout": ((SCOUT_PERIOD, 2),),
    "maverick": ((MAVERICK_PERIOD, 1),),
    "dense prefix": ((("rope_full+dense",), 1), (("rope_full+moe",), 3)),
    "aperiodic": ((("rope_chunk+moe",), 1), (("nope_full+dense", "rope_full+moe"), 1), (("rope_full+dense",), 1)),
}
PICTURES = replace(twins.TINY, plan=((("rope_chunk+moe", "nope_full+moe"), 1),), vision=twins.VISION)
FAST = Seam(attention=blocked_attention, run_experts=sorted_experts)
TEXT, MIXED = twins.batch(), twins.batch(tiles=(2, 1))


def build(model, *, seam=None, dtype=np.float32, remat="none"):
    return twins.fresh(partial(Llama, model, seam or Seam(), patch_id=twins.PATCH, dtype=dtype, remat=remat))


def assert_real_close(ours_BT, slow_BT, batch: Batch, **tolerance):
    real = batch.segment_ids > 0
    np.testing.assert_allclose(np.asarray(ours_BT)[real], slow_BT[real], **tolerance)


@pytest.mark.parametrize("plan", PLANS)
def test_layers_run_in_the_order_of_the_plan(plan):
    """Every layer has weights of its own, so any other order, repeat or kind gives other logits."""
    model = replace(twins.TINY, plan=PLANS[plan], tied_embeddings=plan == "aperiodic")
    graph, tree = build(model)

    def forward(tree):
        llama = twins.bind(graph, tree)
        hidden, trace = llama(TEXT)
        return hidden, llama.logits(hidden), trace.routing

    hidden, logits, routing = twins.quick_jit(forward)(tree)
    slow = twins.decode(tree, model, TEXT)
    assert_real_close(hidden, slow.hidden, TEXT, **ORACLE)
    assert_real_close(logits, slow.logits, TEXT, **ORACLE)
    assert routing.logits.shape == slow.router_logits.shape
    for layer in range(len(slow.router_logits)):
        assert_real_close(routing.logits[layer], slow.router_logits[layer], TEXT, **ORACLE)
        assert_real_close(routing.index[layer], slow.chosen[layer], TEXT)


def plan_of_lists(layers: int, moe_layers: list[int], no_rope_layers: list[int]) -> tuple:
    """An explicit plan, as a configuration of transformers gives it: segments of one layer."""
    kinds = (
        ("nope_full" if i in no_rope_layers else "rope_chunk") + ("+moe" if i in moe_layers else "+dense")
        for i in range(layers)
    )
    return tuple(((kind,), 1) for kind in kinds)


SHAPES = {
    "no power of two": dict(
        plan=((SCOUT_PERIOD, 1),),
        **dict(dim=20, n_heads=5, n_kv_heads=1, head_dim=6, n_experts=3, top_k=2, chunk_len=7),
    ),
    "explicit lists": dict(
        plan=plan_of_lists(4, moe_layers=[1, 2], no_rope_layers=[0, 2]),
        **dict(n_heads=9, n_kv_heads=3, top_k=2, n_shared_experts=2, chunk_len=10, qk_norm=False),
    ),
    "deepseek v3's experts": dict(
        plan=((("rope_full+dense",), 1), (("rope_full+moe",), 2)),
        **dict(n_experts=16, expert_ffn_dim=6, top_k=4, n_groups=4, top_groups=2, group_best=2, gate_on="output"),
        **dict(router_renormalise=True, router_scale=2.5, choose_by="scores"),
    ),
    "linear patches": dict(
        plan=((("rope_chunk+moe", "nope_full+moe"), 1),), vision=replace(twins.VISION, encoder="linear")
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_by_the_fast_kernels(shape):
    """Logits of real tokens in float64 numpy: blocks of attention and sorted experts do not mind odd sizes."""
    model = replace(twins.TINY, **SHAPES[shape])
    graph, tree = build(model, seam=FAST)
    batch = MIXED if model.vision else TEXT

    def forward(tree):
        llama = twins.bind(graph, tree)
        hidden, trace = llama(batch)
        return llama.logits(hidden), trace.routing

    logits, routing = twins.quick_jit(forward)(tree)
    slow = twins.decode(tree, model, batch)
    assert_real_close(logits, slow.logits, batch, **ORACLE)
    for index, chosen in zip(routing.index, slow.chosen, strict=True):
        assert_real_close(index, chosen, batch)


def test_text_never_runs_the_encoder():
    """Nothing of it is traced, so nothing of it is computed and its gradient is zero to the bit."""
    graph, tree = build(PICTURES)
    tree = jax.tree.map(jnp.asarray, tree)

    def program(encoder, batch):
        return score(twins.bind(graph, tree | encoder), batch).logp.sum()

    encoder = {name: tree[name] for name in ("vision", "projector")}
    assert "erf" in str(jax.make_jaxpr(program)(encoder, MIXED))  # the encoder's GELU, which nothing else has
    assert "erf" not in str(jax.make_jaxpr(program)(encoder, TEXT))
    grads = twins.quick_jit(jax.grad(program))(encoder, TEXT)
    assert not any(np.asarray(grad).any() for grad in jax.tree.leaves(grads))


@pytest.mark.parametrize("seam", [Seam(), FAST], ids=["slow", "fast"])
def test_a_document_changes_no_bit_of_another(seam):
    """New text and another picture in the second of three documents; before it, the slow twin's values."""
    graph, tree = build(PICTURES, seam=seam)
    program = twins.quick_jit(lambda tree, batch: score(twins.bind(graph, tree), batch))
    before = program(tree, MIXED)
    logits = twins.decode(tree, PICTURES, MIXED).logits
    logz = np.log(np.exp(logits).sum(axis=-1))
    assert_real_close(before.logz, logz, MIXED, **ORACLE)
    logp = np.take_along_axis(logits, MIXED.targets[..., None], axis=-1)[..., 0] - logz
    assert_real_close(before.logp, logp, MIXED, **ORACLE)

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
