"""config.json to config.Model and back: released spellings, defaults of the classes, and refusals of all the rest."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pytest

from llamax import config, variants
from llamax.checkpoint import hf_config, hf_config_write
from llamax.config import ConfigError
from llamax.model.rope import frequencies
from tests import goldens

TEXT = {  # Scout's, in the older spelling that it was released in
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "attn_temperature_tuning": 4,
    "bos_token_id": 200000,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 10485760,
    "model_type": "llama4_text",
    "no_rope_layers": [],
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "use_qk_norm": True,
    "vocab_size": 202048,
}
VISION = {
    "hidden_size": 1408,
    "image_size": 336,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_hidden_layers": 34,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "rope_theta": 10000,
    "vision_output_dim": 4096,
}
SCOUT = {"model_type": "llama4", "image_token_index": 200092, "text_config": TEXT, "vision_config": VISION}


def golden(case):
    return json.loads((goldens.FOLDER / case / "config.json").read_text())


def changed(path, value, base=SCOUT):
    said = copy.deepcopy(base)
    at = said
    *parents, last = path.split(".")
    for key in parents:
        at = at[key]
    at[last] = value
    return said


def test_scout_as_it_was_released():
    assert hf_config.describe(SCOUT, "x") == (variants.scout(), "llama4", 200092)


def test_maverick_from_intervals():
    text = TEXT | {"interleave_moe_layer_step": 2, "num_local_experts": 128, "use_qk_norm": False, "rope_scaling": None}
    text["no_rope_layers"] = None
    assert hf_config.describe(SCOUT | {"text_config": text}, "x").model == variants.maverick()


def test_missing_keys_take_the_classes_defaults():
    model = hf_config.describe({"model_type": "llama"}, "x").model
    assert (model.dim, model.n_kv_heads, model.head_dim, model.norm_eps) == (4096, 32, 128, 1e-6)
    assert model.rope == config.Rope(theta=10_000.0) and len(model.layers) == 32
    model = hf_config.describe({"model_type": "llama4_text"}, "x").model
    assert dataclasses.replace(model, rope=variants.scout().rope, vision=config.Vision()) == variants.scout()
    assert model.rope == config.Rope(theta=500_000.0)


def test_the_tiles_of_a_picture_come_from_the_preprocessor():
    size = {"height": 336, "width": 336, "longest_edge": None}
    found = hf_config.describe(SCOUT, "x", {"max_patches": 5, "image_mean": [0.5] * 3, "size": size})
    assert found.model.vision.max_tiles == 5


@pytest.mark.parametrize(
    "key, value",
    [
        ("image_mean", [0.48, 0.46, 0.41]),
        ("image_std", [0.5, 0.5, 0.4]),
        ("size", {"height": 448, "width": 448}),
        ("resize_to_max_canvas", True),
        ("do_normalize", False),
        ("max_patches", 0),
    ],
)
def test_a_preprocessor_that_makes_other_pixels_is_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        hf_config.describe(SCOUT, "x", {key: value})


@pytest.mark.parametrize(
    "kind, named",
    [("llama4_text", "MistralForCausalLM"), ("llama4", "LlamaForCausalLM"), ("llama", "Llama4ForCausalLM")],
)
def test_classes_of_another_architecture_are_refused(kind, named):
    with pytest.raises(ConfigError, match="architectures"):
        hf_config.describe({"model_type": kind, "architectures": [named]}, "x")


def test_lists_override_intervals():
    lists = {"num_hidden_layers": 5, "no_rope_layers": [1, 0, 1, 1, 0], "moe_layers": [0, 4]}
    model = hf_config.describe(TEXT | lists, "x").model
    assert model.layers == ("rope_chunk+moe", "nope_full+dense", *["rope_chunk+dense"] * 2, "nope_full+moe")
    full = lists | {"layer_types": ["full_attention"] * 5}
    assert hf_config.describe(TEXT | full, "x").model.layers[0] == "rope_full+moe"
    assert hf_config.describe(TEXT | lists | {"moe_layers": []}, "x").model.layers[0] == "rope_chunk+dense"


REFUSED = {
    "model_type": ("mixtral", "llama4_text"),
    "tie_word_embeddings": (True, "text_config"),
    "text_config.hidden_act": ("gelu", "silu"),
    "text_config.attention_bias": (True, "only False"),
    "text_config.attention_dropout": (0.1, "only 0.0"),
    "text_config.rope_scaling": ({"rope_type": "yarn", "factor": 4.0}, "yarn"),
    "text_config.rope_scaling.type": ("dynamic", None),
    "text_config.rope_scaling.factor": (None, "it needs factor"),
    "text_config.rope_scaling.partial_rotary_factor": (0.5, "only 1.0"),
    "text_config.num_key_value_heads": (7, "divides"),
    "text_config.head_dim": (127, "even"),
    "text_config.num_experts_per_tok": (17, "num_local_experts=16"),
    "text_config.hidden_size": ("wide", "a whole number"),
    "text_config.num_hidden_layers": (0, "1 or more"),
    "text_config.moe_layers": ([48], "layers from 0 to 47"),
    "text_config.no_rope_layers": ([1, 2], "0 and 1"),
    "text_config.layer_types": (["chunked_attention"] * 48, "full without RoPE"),
    "text_config.attention_chunk_size": (None, "chunked_attention"),
    "text_config.rms_norm_eps": (float("nan"), "a number"),
    "vision_config.hidden_act": ("quick_gelu", "gelu"),
    "vision_config.num_channels": (4, "only 3"),
    "vision_config.pixel_shuffle_ratio": (0.4, "one over a whole number"),
    "vision_config.vision_output_dim": (7680, "projector_output_dim=4096"),
    "vision_config.projector_input_dim": (2048, "projector_output_dim=4096"),
    "vision_config.intermediate_size": (5000, "5632"),
    "vision_config.multi_modal_projector_bias": (True, "only False"),
    "vision_config.vision_feature_select_strategy": ("full", "default"),
    "vision_config.rope_parameters": ({"rope_type": "llama3", "factor": 8.0}, "it needs"),
    "vision_config.image_size": (340, "a multiple of 28"),
    "vision_config.hidden_size": (1400, "5600"),
    "text_config": ([1], "a dict"),
    "text_config.rope_theta": (-5.0, "more than 0"),
    "text_config.rope_scaling.low_freq_factor": (-1.0, "above 0"),
    "image_token_index": (202_048, "202048 ids"),
    "partial_rotary_factor": (0.5, "only 1.0"),
}


@pytest.mark.parametrize("path", REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(path):
    value, says = REFUSED[path]
    if says is None:  # the newer key wins
        assert hf_config.describe(changed(path, value), "x").model == variants.scout()
        return
    with pytest.raises(ConfigError, match=says) as error:
        hf_config.describe(changed(path, value), "FILE")
    assert path.rpartition(".")[2].split("_")[-1] in str(error.value) and "FILE" in error.value.asked


@pytest.mark.parametrize("key", ["mlp_bias", "attention_bias"])
def test_biases_of_a_dense_llama_are_refused(key):
    with pytest.raises(ConfigError, match=key):
        hf_config.describe({"model_type": "llama", key: True}, "x")


# ------------------------------------------------------------------------------------------------- rescaled positions

DENSE = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32}  # Llama 2's heads of 128
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}


def rope_of(said, base=DENSE):
    return hf_config.describe(base | {"rope_parameters": said}, "x").model.rope


def test_yarn_as_transformers_computes_it():
    """`_compute_yarn_parameters` of transformers' modeling_rope_utils.py by hand: dim 128, base 10,000, 4,096 tokens.

    find_correction_dim(32) = 128 ln(4096 / (32 2 pi)) / (2 ln 10000) = 20.9, floor 20; of 1 turn 45.03, ceil 46. So the
    ramp of pair 27 is (27 - 20) / (46 - 20) = 7 / 26, of pair 33 13 / 26. Attention factor: 0.1 ln 16 + 1 = 1.2773.
    """
    rope = rope_of(YARN)
    assert rope == config.Rope(10_000.0, "yarn", factor=16.0, original_len=4096, ramp="pairs")
    w = frequencies(rope, 128)
    for j, ramp in ((20, 0), (27, 7 / 26), (33, 13 / 26), (46, 1), (63, 1)):
        plain = 10_000 ** (-2 * j / 128)
        assert w[j] == pytest.approx(plain / 16 * ramp + plain * (1 - ramp), rel=1e-12)
    assert rope.sharpening == pytest.approx(1.2772589, abs=1e-7)


@pytest.mark.parametrize(
    "said, factor",
    [
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, (0.1 * math.log(16) + 1) / (0.05 * math.log(16) + 1)),
        ({"mscale": 0.7}, 0.1 * math.log(16) + 1),  # alone it counts for nothing
        ({"attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5}, 1.0),
        ({"beta_fast": None, "beta_slow": 0}, 0.1 * math.log(16) + 1),
    ],
)
def test_yarns_attention_factor_is_the_one_that_they_take(said, factor):
    rope = rope_of(YARN | said)
    assert rope.sharpening == pytest.approx(factor, rel=1e-12) and (rope.beta_fast, rope.beta_slow) == (32, 1)


def test_interpolated_positions_are_read():
    assert rope_of({"type": "linear", "factor": 4.0}) == config.Rope(10_000.0, "linear", factor=4.0)


@pytest.mark.parametrize(
    "said, says",
    [
        ({"rope_type": "linear"}, "it needs factor"),
        ({"rope_type": "yarn", "factor": 2.0}, "it needs original_max_position_embeddings"),
        (YARN | {"truncate": False}, "truncate=False, but only True"),
        (YARN | {"factor": 0.5}, "factor is 1 or more"),
        (YARN | {"beta_slow": 32.0}, "beta_fast is more than beta_slow"),
        (YARN | {"attention_factor": 0.0}, "attention_factor=0, but it is more than 0"),
        ({"rope_type": "dynamic", "factor": 2.0}, "only 'default', 'linear', 'yarn', 'llama3'"),
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type='longrope'"),
    ],
)
def test_scalings_that_are_not_ours_are_refused(said, says):
    with pytest.raises(ConfigError, match=says):
        rope_of(said)


def test_an_attention_factor_that_their_norm_undoes_is_refused():
    """Llama4TextAttention norms queries and keys after the rotation that carries the factor; ours scales after."""
    with pytest.raises(ConfigError, match="rope_type='yarn' with use_qk_norm"):
        rope_of(YARN, TEXT | {"rope_scaling": None})
    assert rope_of(YARN, TEXT | {"rope_scaling": None, "use_qk_norm": False}).sharpening > 1
    assert rope_of(YARN | {"attention_factor": 1.0}, TEXT | {"rope_scaling": None}).sharpening == 1


# ------------------------------------------------------------------------------------------------------ ours to theirs


LLAMA2 = variants.llama2_7b()
RESCALED = {
    "linear": config.Rope(10_000.0, "linear", factor=4.0),
    "yarn": config.Rope(10_000.0, "yarn", factor=16.0, original_len=4096, ramp="pairs", attention_factor=1.25),
    "by parts": config.Rope(10_000.0, "yarn", factor=16.0, original_len=4096, attention_factor=1.0),
    "ntk": config.Rope(10_000.0, "ntk", factor=4.0),
    "llama3": variants.llama31_8b().rope,
}


@pytest.mark.parametrize("method", RESCALED)
def test_rescaled_positions_are_written_as_the_same_function(method):
    """ "ntk" comes back as the theta that it is, NTK-by-parts by turns as llama3's scaling, which it is."""
    model = dataclasses.replace(LLAMA2, rope=RESCALED[method])
    written = hf_config_write.write(model, hf_config_write.TokenIds(), "float32")
    back = hf_config.describe(written, "x").model
    np.testing.assert_allclose(frequencies(back.rope, 128), frequencies(model.rope, 128), rtol=1e-13)
    assert back.rope.sharpening == model.rope.sharpening
    assert (back.rope == model.rope) == (method in ("linear", "yarn", "llama3"))
    longest = {"yarn": 65_536, "by parts": 65_536, "llama3": 65_536}
    assert written["max_position_embeddings"] == longest.get(method, 131_072)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(attn_scale="ssmax"), "attn_scale='ssmax'"),
        (dict(rope=config.Rope(scaling="yarn")), "rope.ramp='turns'"),
        (dict(rope=config.Rope(scaling="yarn", ramp="pairs"), qk_norm=True), "attention factor 1.20794 and qk_norm"),
    ],
)
def test_positions_that_they_cannot_express_are_refused(changes, says):
    with pytest.raises(ConfigError, match=says) as refused:
        hf_config_write.format_of(dataclasses.replace(LLAMA2, **changes))
    assert "llamax's own format" in refused.value.change


def test_a_temperature_for_inference_is_theirs():
    """What they run is inference."""
    scout = dataclasses.replace(variants.scout(), attn_temperature_when="inference")
    assert hf_config.describe(hf_config_write.write(scout, hf_config_write.TokenIds(), "float32"), "x").model == (
        variants.scout()
    )


@pytest.mark.parametrize("case", [*goldens.LLAMA4, *goldens.DENSE])
def test_what_is_written_reads_back(case):
    said = golden(case)
    found = hf_config.describe(said, "x")
    ids = hf_config_write.TokenIds(patch=said.get("image_token_index", 0))
    assert hf_config.describe(hf_config_write.write(found.model, ids, "float32"), "x") == found


def test_a_family_without_a_format_is_told():
    with pytest.raises(ConfigError, match="router_score"):
        hf_config_write.format_of(variants.mixtral_8x7b())


@pytest.mark.parametrize("variant", sorted(variants.VARIANTS.keys() - {"mixtral_8x7b"}))
def test_every_variant_has_a_format(variant):
    model = variants.VARIANTS[variant]()
    if model.vision is None:
        assert hf_config_write.format_of(model) in ("llama", "llama4_text")
    tiles = model.vision and hf_config_write.preprocessor(model.vision)
    ids = hf_config_write.TokenIds()
    written = hf_config_write.write(model, ids._replace(patch=min(ids.patch, model.vocab_size - 1)), "bfloat16")
    assert all(token is None or token < model.vocab_size for token in (written.get("pad_token_id"),))
    assert hf_config.describe(written, "x", tiles).model == model


def other(value):
    """A value that differs from the one given, of its type."""
    if isinstance(value, bool):
        return not value
    return f"{value}x" if isinstance(value, str) else value + 1


def test_a_field_that_an_export_does_not_know_has_to_be_at_its_default():
    """Whatever fields there are: each is written down, or refused when it is not at its default."""
    base = dataclasses.replace(variants.scout_tiny(), n_experts=8)
    parts = {"": base, "rope": base.rope, "vision": base.vision}
    for name, part in parts.items():
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.name in hf_config_write.EXPRESSED[type(part)].split() or not isinstance(value, int | float | str):
                continue
            part_changed = dataclasses.replace(part, **{field.name: other(value)})
            model = dataclasses.replace(base, **{name: part_changed}) if name else part_changed
            with pytest.raises(ConfigError, match=field.name):
                hf_config_write.format_of(model)


def test_an_unknown_field_is_refused(monkeypatch):
    known = hf_config_write.EXPRESSED[config.Model].replace(" chunk_len", "")
    monkeypatch.setitem(hf_config_write.EXPRESSED, config.Model, known)
    assert variants.scout().chunk_len == config.Model().chunk_len and hf_config_write.format_of(variants.scout())
    with pytest.raises(ConfigError, match="model.chunk_len=64"):
        hf_config_write.format_of(variants.scout_tiny())


@pytest.mark.parametrize(
    "changes",
    [
        {"n_shared_experts": 2},
        {"n_shared_experts": 0},
        {"vision": dataclasses.replace(variants.scout_tiny().vision, ffn_dim=128)},
        {"vision": dataclasses.replace(variants.scout_tiny().vision, norm_eps=1e-6)},
    ],
)
def test_a_model_that_they_do_not_have_is_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        hf_config_write.format_of(dataclasses.replace(variants.scout_tiny(), **changes))


def test_dense_models_with_llama_4s_parts_are_llama_4s():
    dense = hf_config.describe(golden("llama31_untied"), "x").model
    assert hf_config_write.format_of(dense) == "llama"
    assert hf_config_write.format_of(dataclasses.replace(dense, qk_norm=True)) == "llama4_text"
    odd = dataclasses.replace(dense, plan=((("rope_full+dense", "nope_full+dense"), 2),))
    assert hf_config_write.format_of(odd) == "llama4_text"
    written = hf_config_write.write(odd, hf_config_write.TokenIds(), "float32")
    assert hf_config.describe(written, "x").model.layers == odd.layers


# ----------------------------------------------------------------------------------------------------- layer plans


@pytest.mark.parametrize("variant", ["scout", "maverick", "scout_tiny", "maverick_tiny"])
def test_plans_come_back_from_their_layers(variant):
    plan = variants.VARIANTS[variant]().plan
    assert config.plan_of(variants.VARIANTS[variant]().layers, 4) == plan


@pytest.mark.parametrize(
    ("kinds", "period", "plan"),
    [
        ("a", 1, ((("a",), 1),)),
        ("aaaa", 1, ((("a",), 4),)),
        ("aaab", 1, ((("a",), 3), (("b",), 1))),
        ("aaab", 4, ((("a", "a", "a", "b"), 1),)),
        ("abababc", 2, ((("a", "b"), 3), (("c",), 1))),
        ("aabbabab", 1, ((("a",), 2), (("b",), 2), (("a", "b"), 2))),
    ],
)
def test_a_plan_has_as_few_different_layers_as_can_be(kinds, period, plan):
    found = config.plan_of(kinds, period)
    assert "".join(kind for kinds, n in found for _ in range(n) for kind in kinds) == kinds
    assert sum(len(period) for period, _ in found) <= sum(len(period) for period, _ in plan)
    assert found == plan or len(found) == len(plan)
