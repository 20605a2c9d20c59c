"""The outside truth: hidden states, router and final logits, loss and gradients of another implementation
(tests/golden/README.md).

Hidden states are looked at with the layers in a loop; everything else runs through the program as it is trained, scans
and remat included.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from llamax.batch import Batch
from llamax.model import layers, stack
from llamax.model.score import score
from llamax.model.seam import Seam
from tests import goldens
from tests.model.twins import layer_of, quick_jit
from tests.tolerances import GOLDEN

CASES = ("scout_like", "maverick_like", "vision")


def forward(case: str, batch: Batch | None = None, constrained: list | None = None, **changes):
    """(hidden, router logits [L_moe, B, T, E], logits). Of the arrays that the model constrains, collected in
    `constrained`, every second is the stack's input or a layer's output: with the final norm's, these are `hidden`."""
    golden = goldens.load(case)
    seen = [] if constrained is None else constrained
    skel, params, bias = goldens.build(golden, Seam(constrain=lambda x, names: seen.append(x) or x), **changes)

    def program(params):
        llama = skel.bind(params, bias)
        final, trace = llama(batch or golden.batch)
        hidden = [] if constrained is None else [*seen[::2], final]
        return hidden, trace.routing.logits, llama.logits(final)

    return quick_jit(program)(params)


def loop(stacked, x, *args, remat):
    """`layers.scan` as a loop, which keeps every layer's output in sight."""
    graph, state = nnx.split(stacked)
    results = []
    for repeat in range(len(jax.tree.leaves(state)[0])):
        x, result = nnx.merge(graph, jax.tree.map(lambda w: w[repeat], state))(x, *args)  # noqa: B023
        results.append(result)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *results)


@pytest.mark.parametrize("case", CASES)
def test_every_layer_matches(monkeypatch, case):
    assert stack.scan is layers.scan
    monkeypatch.setattr(stack, "scan", loop)
    golden = goldens.load(case)
    theirs, batch = golden.outputs, golden.batch
    hidden, router, logits = forward(case, constrained=[])
    names = sorted(name for name in theirs if name.startswith("hidden."))
    for name, ours in zip(names, hidden, strict=True):
        np.testing.assert_allclose(ours, theirs[name], **GOLDEN, err_msg=name)
    routers = sorted(name for name in theirs if name.startswith("router_logits."))
    np.testing.assert_allclose(router.reshape(len(routers), -1, 4), [theirs[name] for name in routers], **GOLDEN)
    np.testing.assert_allclose(logits, theirs["logits"], **GOLDEN)
    nll = -np.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(np.average(nll, weights=batch.loss_weights), theirs["loss"][0], atol=1e-5)


@pytest.mark.parametrize("case", ["scout_like", "maverick_like"])
def test_packed_documents_match(case):
    """Positions and chunks restart with every document. (The case was made without temperature.)"""
    golden = goldens.load(case)
    packed = load_file(goldens.FOLDER / case / "inputs_packed.safetensors")
    packed = {name: value.astype(np.int32) for name, value in packed.items()}
    batch = golden.batch._replace(
        tokens=packed["input_ids"],
        positions=packed["position_ids"],
        segment_ids=packed["segment_ids"],
        tiles=golden.batch.tiles[:1],
    )
    logits = forward(case, batch, attn_temperature=0.0)[-1]
    np.testing.assert_allclose(logits, golden.outputs["packed.logits"], **GOLDEN)


def test_gradients_match():
    """d loss / d parameter through every part: routers, experts, vision encoder, projector."""
    golden = goldens.load("vision")
    skel, params, bias = goldens.build(golden, remat="period")
    weights = golden.batch.loss_weights

    def loss(params):
        return -jnp.sum(score(skel.bind(params, bias), golden.batch).logp * weights) / weights.sum()

    value, grads = quick_jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, golden.outputs["loss"][0], atol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(grad, dtype=np.float64)) for grad in jax.tree.leaves(grads)))
    np.testing.assert_allclose(norm, golden.outputs["grad_global_norm"][0], rtol=1e-5)  # all parameters at once
    ours = named(grads)
    assert ours.keys() == golden.grads.keys()
    for name, theirs in golden.grads.items():
        assert np.linalg.norm(np.asarray(ours[name]) - theirs) <= 1e-4 * np.linalg.norm(theirs), name
    for path, grad in jax.tree_util.tree_leaves_with_path({part: grads[part] for part in ("vision", "projector")}):
        assert np.abs(grad).max() > 0, jax.tree_util.keystr(path)  # pictures train every part of the encoder


def named(grads: dict) -> dict:
    """Those of our gradients that the case holds, under its names and in its shapes."""
    slots = [layer_of(grads["stack"]["segment0"][f"slot{i}"], 0) for i in range(4)]
    vision, attention, moe = grads["vision"], slots[0]["attention"], slots[1]["moe"]

    def heads(weight_DHK):
        return weight_DHK.reshape(len(weight_DHK), -1).T

    text = {
        "embed_tokens.weight": grads["embed"],
        "norm.weight": grads["norm"]["weight"],
        "layers.0.input_layernorm.weight": slots[0]["attention_norm"]["weight"],
        "layers.0.self_attn.q_proj.weight": heads(attention["query"]),
        "layers.0.self_attn.k_proj.weight": heads(attention["key"]),
        "layers.0.feed_forward.gate_proj.weight": slots[0]["dense"]["gate"].T,
        "layers.0.feed_forward.down_proj.weight": slots[0]["dense"]["down"].T,
        "layers.1.feed_forward.router.weight": moe["router"].T,
        "layers.1.feed_forward.experts.gate_up_proj": jnp.concatenate([moe["gate"], moe["up"]], axis=-1),
        "layers.1.feed_forward.experts.down_proj": moe["down"],
        "layers.1.feed_forward.shared_expert.up_proj.weight": moe["shared"]["up"].T,
        "layers.3.self_attn.v_proj.weight": heads(slots[3]["attention"]["value"]),
        "layers.3.post_attention_layernorm.weight": slots[3]["ffn_norm"]["weight"],
    }
    encoder = {
        "class_embedding": vision["class_embedding"],
        "positional_embedding_vlm": vision["position_embedding"],
        "patch_embedding.linear.weight": vision["patch_embedding"]["weight"].T,
        "model.layers.0.self_attn.q_proj.weight": vision["blocks"]["query"]["weight"][0].T,
        "vision_adapter.mlp.fc1.weight": vision["adapter_in"]["weight"].T,
    }
    ends = {
        "language_model.lm_head.weight": grads["head"].T,
        "multi_modal_projector.linear_1.weight": grads["projector"].T,
    }
    return (
        ends
        | {f"language_model.model.{name}": grad for name, grad in text.items()}
        | {f"vision_model.{name}": grad for name, grad in encoder.items()}
    )
