"""The variants: layer plans and sizes as published, and tiny ones in which everything acts."""

from __future__ import annotations

import pytest

from llamax import config, show, variants
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


@pytest.mark.parametrize(("name", "repeats"), [("scout", 12), ("maverick", 12), ("behemoth", 22)])
def test_a_tiny_variant_has_the_shape_of_its_model(name, repeats):
    full, tiny = variants.VARIANTS[name](), variants.VARIANTS[f"{name}_tiny"]()
    assert full.plan == ((tiny.layers, repeats),)
    for field in ("qk_norm", "top_k", "n_shared_experts", "attn_temperature", "tied_embeddings"):
        assert getattr(tiny, field) == getattr(full, field)
    assert tiny.rope.scaling == full.rope.scaling
    assert tiny.vision.max_tiles > 1 and tiny.vision.shuffle == full.vision.shuffle
    row = config.freeze(config.load(f"recipes/{name}_pretrain.py:tiny")).data.seq_len
    assert tiny.chunk_len <= row // 4 and tiny.attn_temperature_floor <= row // 4  # both act within a row
    assert count.parameters(tiny).total < 10e6


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_variant_can_be_named_in_a_recipe_and_shown(name):
    model = variants.VARIANTS[name]()
    cfg = config.recipe(name, model)
    cfg.data.update(sources={"web": {"path": "web.toml"}}, multimodal_steps=0.5 if model.vision else 0.0)
    run = config.freeze(cfg)
    assert run.model == model
    shown = dict(show.facts(run))
    assert shown["parameters"] == f"{count.parameters(model).total:,}"
    assert f"{count.parameters(model).text_active:,} are active" in shown["of these text"]


# The specification's table: name -> width, layers, query heads, kv heads, feed-forward, vocabulary, RoPE's theta and
# factor, epsilon, tied embeddings, parameters.
DENSE = {
    "llama1_7b": (4096, 32, 32, 32, 11_008, 32_000, 1e4, None, 1e-6, False, 6_738_415_616),
    "llama1_13b": (5120, 40, 40, 40, 13_824, 32_000, 1e4, None, 1e-6, False, 13_015_864_320),
    "llama1_33b": (6656, 60, 52, 52, 17_920, 32_000, 1e4, None, 1e-6, False, 32_528_943_616),
    "llama1_65b": (8192, 80, 64, 64, 22_016, 32_000, 1e4, None, 1e-6, False, 65_285_660_672),
    "llama2_7b": (4096, 32, 32, 32, 11_008, 32_000, 1e4, None, 1e-5, False, 6_738_415_616),
    "llama2_13b": (5120, 40, 40, 40, 13_824, 32_000, 1e4, None, 1e-5, False, 13_015_864_320),
    "llama2_70b": (8192, 80, 64, 8, 28_672, 32_000, 1e4, None, 1e-5, False, 68_976_648_192),
    "llama3_8b": (4096, 32, 32, 8, 14_336, 128_256, 5e5, None, 1e-5, False, 8_030_261_248),
    "llama3_70b": (8192, 80, 64, 8, 28_672, 128_256, 5e5, None, 1e-5, False, 70_553_706_496),
    "llama31_8b": (4096, 32, 32, 8, 14_336, 128_256, 5e5, 8, 1e-5, False, 8_030_261_248),
    "llama31_70b": (8192, 80, 64, 8, 28_672, 128_256, 5e5, 8, 1e-5, False, 70_553_706_496),
    "llama31_405b": (16_384, 126, 128, 8, 53_248, 128_256, 5e5, 8, 1e-5, False, 405_853_388_800),
    "llama32_1b": (2048, 16, 32, 8, 8192, 128_256, 5e5, 32, 1e-5, True, 1_235_814_400),
    "llama32_3b": (3072, 28, 24, 8, 8192, 128_256, 5e5, 32, 1e-5, True, 3_212_749_824),
    "llama33_70b": (8192, 80, 64, 8, 28_672, 128_256, 5e5, 8, 1e-5, False, 70_553_706_496),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_llamas_are_those_of_the_table(name):
    model = variants.VARIANTS[name]()
    *sizes, parameters = DENSE[name]
    factor = {"none": None, "llama3": model.rope.factor}[model.rope.scaling]
    assert sizes == [
        *(model.dim, len(model.layers), model.n_heads, model.n_kv_heads, model.dense_ffn_dim, model.vocab_size),
        *(model.rope.theta, factor, model.norm_eps, model.tied_embeddings),
    ]
    assert (model.rope.low_freq_factor, model.rope.high_freq_factor, model.rope.original_len) == (1.0, 4.0, 8192)
    assert model.head_dim == (64 if name == "llama32_1b" else 128) and not model.qk_norm and model.vision is None
    assert set(model.layers) == {"rope_full+dense"}
    counted = count.parameters(model)
    assert counted.total == counted.text_active == parameters  # a dense model is all active


def test_no_dense_variant_is_missing_from_the_table():
    assert {name for name in variants.VARIANTS if name.startswith("llama")} == set(DENSE)


def test_behemoth_has_the_size_that_was_announced():
    model = variants.behemoth()
    counted = count.parameters(model)
    assert model.n_experts == 16 and model.layers == variants.SCOUT_PERIOD * 22
    assert counted.text_active == pytest.approx(288e9, abs=0.5e9)
    assert counted.total == pytest.approx(2e12, rel=0.001)
    assert not any(n % 256 for n in (model.dim, model.expert_ffn_dim)) and model.head_dim == 128


def test_mixtral_has_its_published_size():
    counted = count.parameters(variants.mixtral_8x7b())
    assert (counted.total, counted.text_active) == (46_702_792_704, 12_879_925_248)
