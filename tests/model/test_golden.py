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

from llamax import config
from llamax.batch import Batch
from llamax.model import layers, stack
from llamax.model.score import score
from llamax.model.seam import Seam
from tests import goldens
from tests.model.twins import quick_jit
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
    batch = goldens.packed(golden, case)
    logits = forward(case, batch, attn_temperature=0.0)[-1]
    np.testing.assert_allclose(logits, golden.outputs["packed.logits"], **GOLDEN)


# What each switch turns off.
TOGGLES = {
    "temperature": dict(attn_temperature=0.0),
    "chunks": dict(chunk_len=48),
    "qk norm": dict(qk_norm=False),
    "rope scaling": dict(rope=config.Rope(theta=10_000.0)),
    "full attention": dict(plan=((("rope_chunk+moe",) * 4, 2),)),
    "layers without rope": dict(plan=((("rope_chunk+moe",) * 3 + ("rope_full+moe",), 2),)),
}


@pytest.mark.parametrize("toggle", TOGGLES)
def test_the_golden_is_sensitive(toggle):
    theirs = goldens.load("scout_like").outputs["logits"]
    moved = np.abs(forward("scout_like", **TOGGLES[toggle])[-1] - theirs).max()
    assert moved > 1000 * GOLDEN["atol"]


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
    ours = goldens.theirs(golden, grads)
    for name, theirs in golden.grads.items():
        assert np.linalg.norm(ours[name] - theirs) <= 1e-4 * np.linalg.norm(theirs), name
    for path, grad in jax.tree_util.tree_leaves_with_path({part: grads[part] for part in ("vision", "projector")}):
        assert np.abs(grad).max() > 0, jax.tree_util.keystr(path)  # pictures train every part of the encoder
