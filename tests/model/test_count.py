"""Parameter counts to the unit, and FLOPs beside a slow count of every key that every query sees."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

from llamax import config, variants
from llamax.model import count
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton

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
        dataclasses.replace(variants.scout_tiny(), tied_embeddings=True, vision=None, top_k=2, n_shared_experts=2),
        dataclasses.replace(
            variants.maverick_tiny(), n_shared_experts=0, plan=((("rope_full+dense",), 2), (("nope_full+moe",), 1))
        ),
    ],
    ids=[*variants.VARIANTS, "tied", "aperiodic"],
)
def test_the_model_has_as_many_parameters_as_are_counted(model):
    bones = skeleton(model, Seam(), patch_id=0, train=config.Train())
    params, _ = bones.shapes()
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == count.parameters(model).total


def keys_seen_slowly(kind: str, seq_len: int, chunk_len: int) -> int:
    query, key = np.arange(seq_len)[:, None], np.arange(seq_len)[None]
    mask = key <= query
    if kind.startswith("rope_chunk"):
        mask &= key // chunk_len == query // chunk_len
    return int(mask.sum())


@pytest.mark.parametrize("seq_len", [1, 63, 64, 65, 200])
def test_row_flops(seq_len):
    model = variants.scout_tiny()
    per_key = 12 * model.n_heads * model.head_dim
    seen = sum(keys_seen_slowly(kind, seq_len, model.chunk_len) for kind in model.layers)
    assert count.row_flops(model, seq_len) == 6 * seq_len * count.matmul_active(model) + per_key * seen


def test_attention_flops_of_scout():
    """The specification's table, GFLOP a token."""
    for seq_len, expected in {4096: 6.04, 8192: 12.08, 32_768: 21.1, 131_072: 57.4, 1_048_576: 396}.items():
        attention = count.row_flops(SCOUT, seq_len) / seq_len - 6 * count.matmul_active(SCOUT)
        assert attention / 1e9 == pytest.approx(expected, rel=2e-3)


def test_tile_flops_of_scout():
    """The specification's formula, whose "weights" include biases and norms: 0.1% of the encoder."""
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
