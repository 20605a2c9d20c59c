"""Parameter counts to the unit; FLOPs beside every matmul that a slow twin of the step does; bytes beside real ones."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval as pe

from llamax import config, variants
from llamax.batch import Batch
from llamax.kernels.cross_entropy import slow_cross_entropy
from llamax.model import count
from llamax.model.score import score
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from llamax.optim.build import optimizer
from tests.model import twins

SCOUT, MAVERICK = variants.scout(), variants.maverick()


def test_scout_and_maverick_to_the_unit():
    """The published models' tensors, counted from their checkpoints' index."""
    scout, maverick = count.parameters(SCOUT), count.parameters(MAVERICK)
    assert scout == count.Parameters(text=107_769_861_120, text_active=17_172_894_720, vision=871_932_416)
    assert scout.total == 108_641_793_536
    assert maverick == count.Parameters(text=400_711_848_960, text_active=17_184_691_200, vision=871_932_416)
    assert maverick.total == 401_583_781_376
    assert count.matmul_active(SCOUT) == 16_137_912_320
    assert count.matmul_active(MAVERICK) == 16_149_708_800


@pytest.mark.parametrize(
    "model",
    [
        *(make() for make in variants.VARIANTS.values()),
        replace(variants.scout_tiny(), tied_embeddings=True, vision=None, top_k=2, n_shared_experts=2),
        replace(
            variants.maverick_tiny(), n_shared_experts=0, plan=((("rope_full+dense",), 2), (("nope_full+moe",), 1))
        ),
        replace(variants.scout_tiny(), vision=replace(variants.scout_tiny().vision, encoder="linear")),
        replace(variants.scout_tiny(), attn_scale="ssmax"),
    ],
    ids=[*variants.VARIANTS, "tied", "aperiodic", "linear patches", "ssmax"],
)
def test_the_model_has_as_many_parameters_as_are_counted(model):
    bones = skeleton(model, Seam(), patch_id=0, train=config.Train())
    params, _ = bones.shapes()
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == count.parameters(model).total


# --------------------------------------------------------------------------------- FLOPs: a walk over the slow step
#
# The jaxpr of value_and_grad of the score, with twins in the seam that do what is counted and nothing else: attention a
# query at a time over the keys that it sees, every token through the weights of its own experts, whole logits. A
# matmul is a dot_general, times the length of the scans around it. What nothing needs (a gradient of pixels) is cut.


def visible_attention(q, k, v, *, local_len=None, **_):
    """Rows of one document: query t sees keys from the start of its chunk to itself."""
    B, T, H, Dh = q.shape
    q, out = q.reshape(B, T, k.shape[2], -1, Dh), []
    for t in range(T):
        seen = slice(t // local_len * local_len if local_len else 0, t + 1)
        p_BKGS = jax.nn.softmax(jnp.einsum("bkgd,bskd->bkgs", q[:, t], k[:, seen]) * Dh**-0.5)
        out.append(jnp.einsum("bkgs,bskd->bkgd", p_BKGS, v[:, seen]))
    return jnp.stack(out, axis=1).reshape(B, T, H, Dh)


def chosen_experts(x_ND, experts, index_NK, gate_NK, *, gate_on):
    gate, up, down = (w[index_NK] for w in experts)
    z_NKD = jnp.broadcast_to(x_ND[:, None], (*gate_NK.shape, x_ND.shape[1]))
    z_NKD = gate_NK[..., None] * z_NKD if gate_on == "input" else z_NKD
    h_NKF = jax.nn.silu(jnp.einsum("nkd,nkdf->nkf", z_NKD, gate)) * jnp.einsum("nkd,nkdf->nkf", z_NKD, up)
    y_NKD = jnp.einsum("nkf,nkfd->nkd", h_NKF, down)
    return (y_NKD if gate_on == "input" else gate_NK[..., None] * y_NKD).sum(1)


def matmul_flops(jaxpr) -> int:
    """2 * (numbers in the result) * (terms of each sum), over all dot_generals."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * terms
        inside = sum(map(matmul_flops, jaxprs_in_params(eqn.params)))
        assert not inside or eqn.primitive.name in ("scan", "jit", "pjit"), f"{eqn.primitive} runs how often?"
        total += inside * eqn.params.get("length", 1)
    return total


def walked(model: config.Model, tokens: int, tiles: int) -> int:
    """FLOPs of value_and_grad on one row of one document and so many picture tiles."""
    seam = Seam(attention=visible_attention, run_experts=chosen_experts, cross_entropy=slow_cross_entropy)
    bones = skeleton(model, seam, patch_id=0, train=config.Train(remat="none"))
    row = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    side = model.vision.tile_px if model.vision else 1
    batch = Batch(*[row] * 6, tiles=jax.ShapeDtypeStruct((1, tiles, side, side, 3), jnp.uint8))

    def loss(params, bias, batch):
        return score(bones.bind(params, bias), batch).logp.sum()

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(*bones.shapes(), batch).jaxpr
    return matmul_flops(pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0])


WALKED = {
    "scout": replace(twins.TINY, plan=((variants.SCOUT_PERIOD, 2),)),
    "maverick": replace(twins.TINY, plan=((variants.MAVERICK_PERIOD, 1),)),
    "dense, tied": replace(twins.TINY, plan=((("rope_full+dense",), 3),), tied_embeddings=True),
    "top 2, two shared, aperiodic": replace(
        twins.TINY,
        plan=((("rope_full+dense",), 1), (("rope_chunk+moe", "nope_full+moe"), 2)),
        **dict(n_heads=5, n_kv_heads=1, top_k=2, n_shared_experts=2, chunk_len=7),
    ),
    "deepseek v3": replace(
        twins.TINY,
        plan=((("rope_full+dense",), 1), (("rope_full+moe",), 2)),
        **dict(n_experts=16, top_k=4, expert_ffn_dim=6, n_groups=4, top_groups=2, group_best=2, gate_on="output"),
        **dict(router_renormalise=True, router_scale=2.5, choose_by="scores"),
    ),
    "mixtral": replace(
        twins.TINY,
        plan=((("rope_full+moe",), 2),),
        **dict(top_k=2, n_shared_experts=0, router_score="softmax", router_renormalise=True, gate_on="output"),
    ),
    "chunks longer than the row": replace(twins.TINY, chunk_len=100),
}


@pytest.mark.parametrize("name", WALKED)
def test_flops_are_the_matmuls_of_the_step(name):
    """To the unit, in rows of two chunks of 5 tokens and a rest."""
    assert walked(WALKED[name], tokens=11, tiles=0) == count.row_flops(WALKED[name], 11)


@pytest.mark.parametrize("encoder", ["vit", "linear"])
def test_flops_of_pictures_are_the_matmuls_of_the_step(encoder):
    model = replace(twins.TINY, vision=replace(twins.VISION, encoder=encoder))
    assert walked(model, 2, tiles=3) == count.row_flops(model, 2) + 3 * count.tile_flops(model.vision, model.dim)


@pytest.mark.parametrize("seq_len", [1, 63, 64, 65, 200])
def test_row_flops_count_the_keys_that_each_query_sees(seq_len):
    model = variants.scout_tiny()
    query, key = np.arange(seq_len)[:, None], np.arange(seq_len)[None]
    causal, same_chunk = key <= query, key // model.chunk_len == query // model.chunk_len
    seen = sum((causal & (same_chunk | (not kind.startswith("rope_chunk")))).sum() for kind in model.layers)
    matmuls = 6 * seq_len * count.matmul_active(model)
    assert count.row_flops(model, seq_len) == matmuls + 12 * model.n_heads * model.head_dim * seen


def test_the_walk_counts_scans_by_their_length():
    def f(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=5)[0]

    assert matmul_flops(jax.make_jaxpr(f)(jnp.ones((3, 3))).jaxpr) == 5 * 2 * 27


def test_attention_flops_of_scout():
    """The specification's table, GFLOP a token."""
    for seq_len, expected in {4096: 6.04, 8192: 12.08, 32_768: 21.1, 131_072: 57.4, 1_048_576: 396}.items():
        attention = count.token_flops(SCOUT, seq_len) - 6 * count.matmul_active(SCOUT)
        assert attention / 1e9 == pytest.approx(expected, rel=2e-3)


def test_tile_flops_of_scout():
    """The specification's formula, whose "weights" include biases and norms (0.1% of the encoder), and whose patch
    embedding learns its input's gradient."""
    vision, n = SCOUT.vision, count.parameters(SCOUT).vision
    connector = 39_845_888 + 20_971_520
    attention = 12 * 1408 * 577 * 34 * 577
    expected = 6 * ((n - connector) * 577 + connector * 144) + attention
    assert count.tile_flops(vision, SCOUT.dim) == pytest.approx(expected, rel=3e-3)


def test_step_flops():
    run = config.freeze(config.load("recipes/scout_pretrain.py:tiny"))
    text = run.data.rows * count.row_flops(run.model, run.data.seq_len)
    assert count.step_flops(run) == text
    assert count.step_flops(run, tiles=3) == text + 3 * count.tile_flops(run.model.vision, run.model.dim)


# ------------------------------------------------------------------------------------------------------------- bytes


def test_training_bytes_are_those_of_the_arrays():
    model = variants.maverick_tiny()
    bones = skeleton(model, Seam(), patch_id=0, train=config.Train())
    params, _ = bones.shapes()
    opt = jax.eval_shape(optimizer(config.Optim(), 10_000, bones.kinds).init, params)
    kept = count.training_bytes(count.parameters(model).total)
    assert count.training_bytes(10, 2) == count.Bytes(parameters=40, gradients=8, optimizer=16)
    assert kept.parameters == kept.gradients == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert kept.optimizer == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(opt) if x.ndim)


def test_cache_bytes_of_a_sequence():
    """By hand for Scout: 36 layers of chunks of 8,192 tokens, 12 layers that see all; 8 heads of 128, keys and values,
    2 bytes a number. At 1M tokens it is a quarter of full attention's, plus the chunks."""
    each = 2 * 8 * 128 * 2
    assert count.cache_bytes(SCOUT, 100) == 48 * 100 * each
    assert count.cache_bytes(SCOUT, 8193) == (36 * 8192 + 12 * 8193) * each
    million = count.cache_bytes(SCOUT, 2**20)
    assert million == (36 * 8192 + 12 * 2**20) * each
    assert million / (48 * 2**20 * each) == pytest.approx(0.256, abs=0.001)
    assert count.cache_bytes(SCOUT, 2**20, itemsize=4) == 2 * million
    assert count.cache_bytes(variants.llama31_8b(), 2**17) == 2**17 * 131_072  # 128 KiB a token, nothing forgotten
