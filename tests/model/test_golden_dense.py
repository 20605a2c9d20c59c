"""The outside truth of the dense Llamas (3.1 with a head of its own, 3.2 tied): hidden states, logits, loss, gradients.

Hugging Face's q and k rows rotate by halves, ours in pairs; the reader turns them (llamax/checkpoint/hf_names.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax import config
from llamax.checkpoint.hf_names import Heads
from llamax.model import stack
from llamax.model.score import score
from llamax.model.seam import Seam
from tests import goldens
from tests.model.test_golden import loop
from tests.model.twins import quick_jit
from tests.tolerances import GOLDEN


def logits(golden, batch=None, **changes):
    skel, params, bias = goldens.build(golden, **changes)

    def program(params):
        llama = skel.bind(params, bias)
        return llama.logits(llama(batch or golden.batch)[0])

    return quick_jit(program)(params)


@pytest.mark.parametrize("case", goldens.DENSE)
def test_every_layer_and_gradient_matches(monkeypatch, case):
    monkeypatch.setattr(stack, "scan", loop)
    golden, seen = goldens.load(case), []
    skel, params, bias = goldens.build(golden, Seam(constrain=lambda x, names: seen.append(x) or x))
    weights = golden.batch.loss_weights

    def program(params):
        seen.clear()
        llama = skel.bind(params, bias)
        final, _ = llama(golden.batch)
        hidden = [*seen[::2], final]  # the stack's input, every layer's output, the norm's
        loss = -jnp.sum(score(llama, golden.batch).logp * weights) / weights.sum()
        return loss, (hidden, llama.logits(final))

    (loss, (hidden, ours)), grads = quick_jit(jax.value_and_grad(program, has_aux=True))(params)
    names = sorted(name for name in golden.outputs if name.startswith("hidden."))
    for name, layer in zip(names, hidden, strict=True):
        np.testing.assert_allclose(layer, golden.outputs[name], **GOLDEN, err_msg=name)
    np.testing.assert_allclose(ours, golden.outputs["logits"], **GOLDEN)
    np.testing.assert_allclose(loss, golden.outputs["loss"][0], atol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(grad, dtype=np.float64)) for grad in jax.tree.leaves(grads)))
    np.testing.assert_allclose(norm, golden.outputs["grad_global_norm"][0], rtol=1e-4)
    named = goldens.theirs(golden, grads)
    for name, theirs in golden.grads.items():
        assert np.linalg.norm(named[name] - theirs) <= 1e-4 * np.linalg.norm(theirs), name


@pytest.mark.parametrize("case", goldens.DENSE)
def test_packed_documents_match(case):
    golden = goldens.load(case)
    packed = logits(golden, goldens.packed(golden, case))
    np.testing.assert_allclose(packed, golden.outputs["packed.logits"], **GOLDEN)


def test_the_golden_is_sensitive_to_rope_scaling():
    golden = goldens.load("llama31_untied")
    moved = logits(golden, rope=config.Rope(theta=golden.model.rope.theta))
    assert np.abs(moved - golden.outputs["logits"]).max() > 1000 * GOLDEN["atol"]


def test_the_golden_is_sensitive_to_how_lanes_are_paired():
    golden = goldens.load("llama31_untied")
    table = [
        leaf._replace(how=Heads(leaf.how.head_dim)) if isinstance(leaf.how, Heads) else leaf for leaf in golden.table
    ]
    moved = logits(golden._replace(table=table))
    assert np.abs(moved - golden.outputs["logits"]).max() > 1000 * GOLDEN["atol"]
