"""The variants: layer plans and sizes as published, and tiny ones in which everything acts."""

from __future__ import annotations

import pytest

from llamax import checks, config, variants
from llamax.model import count

SCOUT, MAVERICK = variants.scout(), variants.maverick()


def plan_by_rule(moe_step: int) -> tuple[str, ...]:
    """The specification's modulo rules: no RoPE where (i + 1) % 4 = 0, MoE where (i + 1) % moe_step = 0."""
    attention = ["nope_full" if (i + 1) % 4 == 0 else "rope_chunk" for i in range(48)]
    feed_forward = ["moe" if (i + 1) % moe_step == 0 else "dense" for i in range(48)]
    return tuple(f"{a}+{f}" for a, f in zip(attention, feed_forward, strict=True))


def test_layer_plans():
    assert SCOUT.layers == plan_by_rule(moe_step=1)
    assert MAVERICK.layers == plan_by_rule(moe_step=2)


def test_what_scout_and_maverick_share():
    for model in (SCOUT, MAVERICK):
        assert (model.dim, model.n_heads, model.n_kv_heads, model.head_dim) == (5120, 40, 8, 128)
        assert (model.vocab_size, model.dense_ffn_dim, model.expert_ffn_dim) == (202_048, 16_384, 8192)
        assert (model.top_k, model.n_shared_experts, model.tied_embeddings) == (1, 1, False)
        assert (model.chunk_len, model.attn_temperature, model.attn_temperature_floor) == (8192, 0.1, 8192)
        assert (model.norm_eps, model.rope.theta) == (1e-5, 500_000.0)
        vision = model.vision
        assert (vision.tile_px, vision.patch_px, vision.max_tiles, vision.tokens_per_tile) == (336, 14, 16, 144)
        assert (vision.dim, vision.n_layers, vision.n_heads, vision.ffn_dim) == (1408, 34, 16, 5632)
        assert (vision.adapter_dim, vision.shuffle, vision.rope_theta, vision.norm_eps) == (4096, 2, 10_000.0, 1e-5)


def test_where_they_differ():
    assert (SCOUT.n_experts, MAVERICK.n_experts) == (16, 128)
    assert (SCOUT.qk_norm, MAVERICK.qk_norm) == (True, False)
    assert MAVERICK.rope.scaling == "none"
    rope = SCOUT.rope
    assert (rope.scaling, rope.factor, rope.low_freq_factor, rope.high_freq_factor) == ("llama3", 16.0, 1.0, 1.0)
    assert rope.original_len == 8192


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_a_tiny_variant_has_the_shape_of_its_model(name):
    full, tiny = variants.VARIANTS[name](), variants.VARIANTS[f"{name}_tiny"]()
    assert full.plan == ((tiny.layers, 12),)
    for field in ("qk_norm", "top_k", "n_shared_experts", "attn_temperature", "tied_embeddings"):
        assert getattr(tiny, field) == getattr(full, field)
    assert tiny.rope.scaling == full.rope.scaling
    assert tiny.vision.max_tiles > 1 and tiny.vision.shuffle == full.vision.shuffle
    row = config.freeze(config.load(f"recipes/{name}_pretrain.py:tiny")).data.seq_len
    assert tiny.chunk_len <= row // 4 and tiny.attn_temperature_floor <= row // 4  # both act within a row
    assert count.parameters(tiny).total < 10e6


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_variant_passes_the_checks(name):
    model = variants.VARIANTS[name]()
    data = config.Data(seq_len=8192, sources={"web": config.Source("web.toml")})
    checks.check(config.Run(name=name, model=model, data=data))
