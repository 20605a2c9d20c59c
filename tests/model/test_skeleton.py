"""The door between modules and trees: metadata, initialisation, equality."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from llamax import config
from llamax.model import count
from llamax.model.llama import Llama
from llamax.model.seam import Seam
from llamax.model.skeleton import Skeleton, facts, skeleton
from tests.model import twins

# Wide enough for a standard deviation to be measured.
MODEL = replace(twins.TINY, vocab_size=512, dim=64, plan=((("rope_chunk+moe",), 2),), vision=twins.VISION)
TEXT = twins.batch()
AXES = {"layers", "vision_layers", "embed", "heads", "kv_heads", "head_dim", "ffn", "experts", "vocab", "norm", None}


def build(model: config.Model, compute_dtype: str = "float32") -> Skeleton:
    return skeleton(model, Seam(), patch_id=twins.PATCH, train=config.Train(compute_dtype=compute_dtype))


def flat(tree) -> dict[str, object]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def fresh():
    skel = build(MODEL)
    return skel, *twins.quick_jit(skel.init)(jax.random.key(0))


def test_every_parameter_has_its_facts(fresh):
    skel, params, bias = fresh
    make = partial(Llama, MODEL, Seam(), patch_id=twins.PATCH, dtype=np.float32, remat="period")
    state = nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.Param)
    fan_in, fan_out = flat(facts(state, "fan_in")), flat(facts(state, "fan_out"))
    axes, kinds, shapes = flat(skel.axes), flat(skel.kinds), {name: x.shape for name, x in flat(params).items()}
    assert axes.keys() == kinds.keys() == fan_in.keys() == fan_out.keys() == shapes.keys()
    for name, shape in shapes.items():
        assert len(axes[name]) == len(shape), name
        assert set(axes[name]) <= AXES, name
        assert kinds[name] in ("matrix", "embedding", "norm", "bias"), name
        assert fan_in[name] >= 1 and fan_out[name] >= 1, name
        stacked = name.startswith(("stack.", "vision.blocks."))
        assert (axes[name][0] in ("layers", "vision_layers")) == stacked, name
        assert (axes[name][0] == "layers") == name.startswith("stack."), name
    ((bias_name, bias_axes),) = flat(skel.bias_axes).items()
    assert flat(bias)[bias_name].ndim == len(bias_axes) and bias_axes[0] == "layers"


def test_shapes_are_those_of_init_and_of_the_count(fresh):
    skel, params, bias = fresh
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (params, bias))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), skel.shapes())
    assert {x.dtype for x in jax.tree.leaves((params, bias))} == {np.dtype("float32")}
    assert sum(x.size for x in jax.tree.leaves(params)) == count.parameters(MODEL).total


def test_initial_scale(fresh):
    """Fan-in scaled matrices, outputs into the residual stream smaller by sqrt(2 L); ones, zeros."""
    _, params, bias = fresh
    D, L = MODEL.dim, len(MODEL.layers)
    residual = 1 / math.sqrt(2 * L)
    layer = "stack.segment0.slot0."
    expected = {
        "embed": MODEL.init_std,
        "head": D**-0.5,
        "projector": twins.VISION.adapter_dim**-0.5,
        layer + "attention.query": D**-0.5,
        layer + "attention.value": D**-0.5,
        layer + "attention.out": residual * (MODEL.n_heads * MODEL.head_dim) ** -0.5,
        layer + "moe.router": D**-0.5,
        layer + "moe.gate": D**-0.5,  # not (E D)^-0.5
        layer + "moe.down": residual * MODEL.expert_ffn_dim**-0.5,
        layer + "moe.shared.down": residual * MODEL.expert_ffn_dim**-0.5,
        layer + "moe.shared.up": D**-0.5,
        "vision.blocks.query.weight": twins.VISION.dim**-0.5,
        "vision.patch_embedding.weight": 12**-0.5,
        "vision.position_embedding": twins.VISION.dim**-0.5,
    }
    values = flat(params)
    for name, std in expected.items():
        np.testing.assert_allclose(np.std(values[name]), std, rtol=0.2, err_msg=name)
        assert len(np.unique(values[name])) > 0.99 * values[name].size, name  # repeats, experts and heads all differ
    assert (values["stack.segment0.slot0.attention_norm.weight"] == 1).all()
    assert not np.asarray(values["vision.blocks.query.bias"]).any()
    assert not any(np.asarray(b).any() for b in jax.tree.leaves(bias))


def test_loss_of_a_fresh_model_is_near_ln_v(fresh):
    """The mean over all targets: fan-in scaled logits have variance 1, which costs about half a nat."""
    skel, params, bias = fresh

    def forward(params):
        llama = skel.bind(params, bias)
        return llama.logits(llama(TEXT)[0])

    logits = twins.quick_jit(forward)(params)
    loss = jax.nn.logsumexp(logits, axis=-1).mean() - logits.mean()
    assert abs(loss - math.log(MODEL.vocab_size)) < 0.7


def test_equal_skeletons_share_a_program_and_others_do_not():
    small = replace(MODEL, vision=None, plan=((("rope_chunk+dense",), 1),))
    assert build(small) == build(small) and hash(build(small)) == hash(build(small))
    assert build(small) != build(replace(small, qk_norm=False))
    assert build(small) != build(small, compute_dtype="bfloat16")
