"""What backward computes again: the same gradients by every name, less memory, and attention not run twice."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from llamax import config
from llamax.batch import Batch
from llamax.kernels.attention import blocked_attention
from llamax.kernels.grouped import sorted_experts
from llamax.model.llama import Llama
from llamax.model.seam import Seam
from tests.model import twins
from tests.tolerances import TWIN, TWIN_GRAD

MODEL = replace(twins.TINY, plan=((("rope_chunk+dense", "nope_full+moe"), 3),))
PICTURES = replace(MODEL, vision=twins.VISION)
SEAM = Seam(attention=blocked_attention, run_experts=sorted_experts)
BATCH, MIXED = twins.batch(), twins.batch(tiles=(2, 1))


def gradient(remat: str, model: config.Model = MODEL, batch: Batch = BATCH):
    graph, tree = twins.fresh(partial(Llama, model, SEAM, patch_id=twins.PATCH, dtype=np.float32, remat=remat))
    real = batch.segment_ids > 0
    return jax.value_and_grad(lambda tree: twins.bind(graph, tree)(batch)[0][real].sum()), tree


@pytest.fixture(scope="module")
def by_name():
    """(value, gradient, bytes of temporaries) by every name."""
    found = {}
    for remat in config.REMATS:
        program, tree = gradient(remat)
        compiled = jax.jit(program).lower(tree).compile()
        found[remat] = *compiled(tree), compiled.memory_analysis().temp_size_in_bytes
    return found


def test_value_and_gradient_are_the_same(by_name):
    value, grads, _ = by_name["none"]
    for name, (again, regrads, _) in by_name.items():
        np.testing.assert_allclose(again, value, **TWIN, err_msg=name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TWIN_GRAD), regrads, grads)


def test_what_is_not_kept_frees_memory(by_name):
    size = {name: temporaries for name, (_, _, temporaries) in by_name.items()}
    assert size["none"] > size["attention"] > size["period"]
    assert size["none"] > size["block"]


def test_attention_is_not_run_again_where_its_outputs_are_kept():
    """A loop over tiles of keys less for every layer of a period than where all of it is computed again."""
    count = {}
    for remat in ("none", "period", "attention"):
        program, tree = gradient(remat)
        count[remat] = str(jax.make_jaxpr(program)(tree)).count(" while[")
    layers = len(MODEL.plan[0][0])
    assert count["attention"] == count["period"] - layers
    assert count["none"] < count["attention"]


def test_what_is_offloaded_is_the_input_of_every_period_and_vision_layer():
    program, tree = gradient("offload", PICTURES, MIXED)
    (rows, tokens), dim, vision = MIXED.tokens.shape, MODEL.dim, PICTURES.vision
    text = str(jax.make_jaxpr(program)(tree))
    assert f"f32<host>[3,{rows},{tokens},{dim}]" in text
    assert f"f32<host>[{vision.n_layers},4,{vision.grid**2 + 1},{vision.dim}]" in text
