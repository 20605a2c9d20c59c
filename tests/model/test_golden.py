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

from llamax.batch import Batch
from llamax.kernels.attention import blocked_attention
from llamax.kernels.grouped import sorted_experts
from llamax.model import layers, llama, stack, vision
from llamax.model.score import score
from llamax.model.seam import Seam
from tests import goldens
from tests.model.twins import quick_jit
from tests.tolerances import GOLDEN

CASES = ("scout_like", "maverick_like", "vision", "odd")
FAST = Seam(attention=blocked_attention, run_experts=sorted_experts)


def forward(case: str, batch: Batch | None = None, constrained: list | None = None, **changes):
    """(stream, router logits [L_moe, B, T, E], logits). The stream, collected in `constrained`, is what the model
    constrains: the stack's input, and after each layer's attention and after its feed-forward; and the final norm's
    output."""
    golden = goldens.load(case)
    seen = [] if constrained is None else constrained
    skel, params, bias = goldens.build(golden, Seam(constrain=lambda x, names: note(seen, x, names)), **changes)

    def program(params):
        model = skel.bind(params, bias)
        final, trace = model(batch or golden.batch)
        stream = [] if constrained is None else [*seen, final]
        return stream, trace.routing.logits, model.logits(final)

    return quick_jit(program)(params)


def note(seen: list, x, names):
    if names == stack.ROWS:  # of the decoder
        seen.append(x)
    return x


def loop(stacked, x, *args, remat, each=(), run=None, **how):
    """`layers.scan` as a loop, which keeps every layer's output in sight."""
    graph, state = nnx.split(stacked)
    results = []
    for repeat in range(len(jax.tree.leaves(state)[0])):
        x, result = nnx.merge(graph, jax.tree.map(lambda w: w[repeat], state))(x, *args, **how)  # noqa: B023
        results.append(result)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *results)


@pytest.mark.parametrize("case", CASES)
def test_every_layer_matches(monkeypatch, case):
    assert stack.scan is layers.scan
    monkeypatch.setattr(stack, "scan", loop)
    golden = goldens.load(case)
    theirs, batch = golden.outputs, golden.batch
    (*stream, final), router, logits = forward(case, constrained=[])
    names = sorted(name for name in theirs if name.startswith("hidden."))
    for name, ours in zip(names, [*stream[::2], final], strict=True):
        np.testing.assert_allclose(ours, theirs[name], **GOLDEN, err_msg=name)
    for i, (before, between, after) in enumerate(zip(stream[:-1:2], stream[1::2], stream[2::2], strict=True)):
        for name, ours in ((f"attn_out.layer{i}", between - before), (f"ffn_out.layer{i}", after - between)):
            np.testing.assert_allclose(ours, theirs[name].reshape(ours.shape), **GOLDEN, err_msg=name)
    routers = sorted(name for name in theirs if name.startswith("router_logits."))
    np.testing.assert_allclose(
        router.reshape(len(routers), -1, router.shape[-1]), [theirs[name] for name in routers], **GOLDEN
    )
    np.testing.assert_allclose(logits, theirs["logits"], **GOLDEN)
    nll = -np.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(np.average(nll, weights=batch.loss_weights), theirs["loss"][0], atol=1e-5)


@pytest.mark.parametrize("case", ["scout_like", "maverick_like"])
def test_packed_documents_match(case):
    """Positions and chunks restart with every document. (The case was made without temperature.)"""
    golden = goldens.load(case)
    batch = goldens.packed(golden, case)
    logits = forward(case, batch, attn_temperature=0.0)[-1]
    np.testing.assert_allclose(logits, golden.outputs["packed.logits"], **GOLDEN)


def test_every_step_of_the_encoder_matches(monkeypatch):
    """In the order of their making; of a module used in every layer, the first or the last."""
    golden, made = goldens.load("vision"), {}

    def note(owner, attribute, name):
        f = getattr(owner, attribute)

        def noting(*args):
            made.setdefault(name, []).append(f(*args))
            return made[name][-1]

        monkeypatch.setattr(owner, attribute, noting)

    monkeypatch.setattr(vision, "scan", loop)
    for module in ("Linear", "LayerNorm", "VisionBlock", "VisionEncoder"):
        note(getattr(vision, module), "__call__", module)
    note(vision, "pixel_shuffle", "pixel_shuffle")
    monkeypatch.setattr(llama, "fuse", lambda x, features, is_patch, running: made.setdefault("fuse", features))
    skel, params, bias = goldens.build(golden)

    def program(params):
        skel.bind(params, bias).embed_batch(golden.batch)
        return {
            "patch_embed": made["Linear"][0],
            "ln_pre": made["LayerNorm"][0],
            "layer0": made["VisionBlock"][0][0],
            "layer1": made["VisionBlock"][1][0],
            "ln_post": made["LayerNorm"][-1],
            "pixel_shuffled": made["pixel_shuffle"][0],
            "adapter": made["VisionEncoder"][0][0],
            "projected": made["fuse"].reshape(8, 4, -1),
        }

    steps = quick_jit(program)(params)
    used = (np.arange(4) < np.array([[3], [4]])).ravel()  # rows of 3 and of 4 tiles, in 4 slots each
    assert {f"vision.{name}" for name in steps} == {name for name in golden.outputs if name.startswith("vision.")}
    for name, ours in steps.items():
        theirs = golden.outputs[f"vision.{name}"]
        np.testing.assert_allclose(ours[used], theirs.reshape(7, *ours.shape[1:]), **GOLDEN, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_gradients_match(case):
    """d loss / d parameter through every part: routers, experts, vision encoder, projector. "odd", by the blocks of
    attention and the sorted experts, has widths of no power of two, two experts a token, chunks that do not divide the
    row, and layers without a period."""
    golden = goldens.load(case)
    skel, params, bias = goldens.build(golden, FAST if case == "odd" else None, remat="period")
    weights = golden.batch.loss_weights

    def loss(params):
        return -jnp.sum(score(skel.bind(params, bias), golden.batch).logp * weights) / weights.sum()

    value, grads = quick_jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, golden.outputs["loss"][0], atol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(grad, dtype=np.float64)) for grad in jax.tree.leaves(grads)))
    np.testing.assert_allclose(norm, golden.outputs["grad_global_norm"][0], rtol=1e-5)  # all parameters at once
    assert len(golden.grads) >= 12
    ours = goldens.theirs(golden, grads)
    for name, theirs in golden.grads.items():
        assert np.linalg.norm(ours[name] - theirs) <= 1e-4 * np.linalg.norm(theirs), name
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(grad).max() > 0, jax.tree_util.keystr(path)  # pictures train every part of the encoder
