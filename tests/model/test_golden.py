"""The outside truth: logits, hidden states and gradients of another implementation (tests/golden/README.md)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llamax.model.llama import Llama
from llamax.model.score import score
from tests import goldens

CASES = ("scout_like", "maverick_like", "vision")
LOGITS = 1e-4  # the cases' own float32 noise is about 1e-5


def logits_of(llama: Llama, batch) -> np.ndarray:
    def forward(state):
        model = nnx.merge(graph, state)
        return model.logits(model(batch)[0])

    graph, state = nnx.split(llama)
    return np.asarray(jax.jit(forward)(state))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_loss_match(name):
    golden = goldens.load(name)
    llama = goldens.build(golden)
    np.testing.assert_allclose(logits_of(llama, golden.batch), golden.outputs["logits"], atol=LOGITS, rtol=0)
    weights = golden.batch.loss_weights
    loss = -(score(llama, golden.batch).logp * weights).sum() / weights.sum()
    np.testing.assert_allclose(loss, golden.outputs["loss"][0], atol=1e-5)


# What each switch turns off, and a bound far above the tolerance that its absence must exceed.
TOGGLES = {
    "temperature": dict(attn_temperature=0.0),
    "chunks": dict(chunk_len=48),
    "qk_norm": dict(qk_norm=False),
    "rope_scaling": dict(rope=None),
    "nope_layers_chunked": dict(plan="rope_chunk"),
}


@pytest.mark.parametrize("toggle", TOGGLES)
def test_the_golden_is_sensitive(toggle):
    golden = goldens.load("scout_like")
    changes = dict(TOGGLES[toggle])
    if toggle == "rope_scaling":
        changes["rope"] = type(golden.model.rope)(theta=golden.model.rope.theta)
    if toggle == "nope_layers_chunked":
        changes["plan"] = ((("rope_chunk+moe",) * 4, 2),)
    moved = np.abs(logits_of(goldens.build(golden, **changes), golden.batch) - golden.outputs["logits"]).max()
    assert moved > 1000 * LOGITS


def test_gradients_match():
    """d loss / d parameter through every part: routers, experts, vision encoder, projector."""
    golden = goldens.load("vision")
    graph, params, rest = nnx.split(goldens.build(golden), nnx.Param, ...)
    weights = golden.batch.loss_weights

    def loss(params):
        return -jnp.sum(score(nnx.merge(graph, params, rest), golden.batch).logp * weights) / weights.sum()

    grads = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
    ours = {
        "language_model.model.embed_tokens.weight": grads["embed"],
        "language_model.lm_head.weight": grads["head"].T,
        "language_model.model.layers.1.feed_forward.router.weight": grads["stack"]["segment0"]["slot1"]["moe"]["router"][0].T,
        "language_model.model.layers.1.feed_forward.experts.down_proj": grads["stack"]["segment0"]["slot1"]["moe"]["down"][0],
        "language_model.model.layers.0.self_attn.q_proj.weight": grads["stack"]["segment0"]["slot0"]["attention"]["query"][
            0
        ]
        .reshape(64, -1)
        .T,
        "vision_model.patch_embedding.linear.weight": grads["vision"]["patch_embedding"]["weight"].T,
        "vision_model.class_embedding": grads["vision"]["class_embedding"],
        "vision_model.positional_embedding_vlm": grads["vision"]["position_embedding"],
        "vision_model.model.layers.0.self_attn.q_proj.weight": grads["vision"]["blocks"]["query"]["weight"][0].T,
        "vision_model.vision_adapter.mlp.fc1.weight": grads["vision"]["adapter_in"]["weight"].T,
        "multi_modal_projector.linear_1.weight": grads["projector"].T,
    }
    for name, grad in ours.items():
        theirs = golden.grads[name]
        assert np.linalg.norm(np.asarray(grad) - theirs) <= 1e-4 * np.linalg.norm(theirs), name
