"""A `config.Model` as Hugging Face's config.json, for a model that did not come with one. `hf_config.describe` reads it
back. What no format of theirs can express is refused, and so is every field that this file does not know. No jax.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from llamax.checkpoint.hf_config import (
    BOI_TOKEN,
    EOI_TOKEN,
    IMAGE_TOKEN,
    LLAMA4_TEXT_DEFAULTS,
    VISION_NORM_EPS,
    rope_survives,
)
from llamax.checkpoint.hf_names import LLAMA, LLAMA4, LLAMA4_TEXT
from llamax.config import ConfigError, Model, Rope, Vision

MAX_POSITIONS = 131_072  # of a model whose RoPE is not rescaled; the model itself has no limit
# The fields that an export writes down, or that say nothing of what a trained model computes. Any other one has to be
# at its default, or the export is refused.
EXPRESSED: dict[type, str] = {
    Model: "vocab_size dim n_heads n_kv_heads head_dim plan dense_ffn_dim expert_ffn_dim n_experts top_k"
    " n_shared_experts chunk_len qk_norm attn_temperature attn_temperature_floor norm_eps tied_embeddings"
    " init_std rope vision attn_temperature_when ssmax_len",
    Rope: "theta scaling factor low_freq_factor high_freq_factor original_len beta_slow beta_fast ramp"
    " attention_factor",
    Vision: "tile_px patch_px max_tiles dim n_layers n_heads ffn_dim adapter_dim shuffle rope_theta norm_eps",
}


class TokenIds(NamedTuple):
    """The special tokens that a config.json names; by default Llama 4's."""

    bos: int = 200_000
    eos: tuple[int, ...] = (200_001, 200_007, 200_008)
    pad: int = 200_018
    image_start: int = BOI_TOKEN
    image_end: int = EOI_TOKEN
    patch: int = IMAGE_TOKEN


def format_of(model: Model) -> str:
    """The Hugging Face format that a model is written in.

    Raises:
      ConfigError: no format can express it.
    """
    for part, name in ((model, "model"), (model.rope, "model.rope"), (model.vision, "model.vision")):
        if part is not None:
            _only_expressed(part, name)
    if any(kind.endswith("+moe") for kind in model.layers) and model.n_shared_experts != 1:
        raise _unwritable(f"n_shared_experts={model.n_shared_experts}", "theirs has exactly one beside its experts")
    _check_rope(model)
    if model.vision is not None:
        if model.vision.ffn_dim != model.vision.dim * model.vision.shuffle**2:
            true = "theirs takes it for the adapter's input width, vision.dim x vision.shuffle^2"
            raise _unwritable(f"vision.ffn_dim={model.vision.ffn_dim}", true)
        if model.vision.norm_eps != VISION_NORM_EPS:
            true = f"theirs always computes with {VISION_NORM_EPS:g}"
            raise _unwritable(f"vision.norm_eps={model.vision.norm_eps:g}", true)
        return LLAMA4
    plain = set(model.layers) == {"rope_full+dense"} and not model.qk_norm
    return LLAMA if plain and model.dim % model.n_heads == 0 else LLAMA4_TEXT


def _check_rope(model: Model) -> None:
    rope = model.rope
    if rope.scaling == "yarn" and rope.ramp == "turns" and rope.sharpening != 1:
        raise _unwritable("rope.ramp='turns'", "with an attention factor theirs has a ramp over pairs only")
    if not rope_survives(model):
        true = "theirs norms queries and keys after it, which undoes the factor"
        raise _unwritable(f"YaRN's attention factor {rope.sharpening:g} and qk_norm", true)


def _only_expressed(part: Any, name: str) -> None:
    if type(part) not in EXPRESSED:
        raise _unwritable(f"{name}={part!r}", "Hugging Face's Llamas have nothing like it")
    known = EXPRESSED[type(part)].split()
    for field in dataclasses.fields(part):
        make = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        if field.name not in known and getattr(part, field.name) != default:
            true = f"Hugging Face's Llamas are as with {default!r}"
            raise _unwritable(f"{name}.{field.name}={getattr(part, field.name)!r}", true)


def _unwritable(asked: str, true: str) -> ConfigError:
    return ConfigError(f"Exporting a model with {asked}", true, "Keep it in llamax's own format.")


def write(model: Model, ids: TokenIds, dtype: str) -> dict[str, Any]:
    """config.json of a model that did not come with one; `dtype` is that of its tensors, such as "bfloat16".

    Raises:
      ConfigError: no format can express it.
    """
    form = format_of(model)
    ends = _ends(ids, model.vocab_size)
    if form == LLAMA:
        return {**_write_dense(model), **ends, "architectures": ["LlamaForCausalLM"], "dtype": dtype}
    text = {**_write_decoder(model), **ends, "dtype": dtype}
    if form == LLAMA4_TEXT:
        return {**text, "architectures": ["Llama4ForCausalLM"]}
    assert model.vision is not None
    return dict(
        model_type=LLAMA4,
        architectures=["Llama4ForConditionalGeneration"],
        boi_token_index=ids.image_start,
        eoi_token_index=ids.image_end,
        image_token_index=ids.patch,
        tie_word_embeddings=model.tied_embeddings,
        dtype=dtype,
        text_config=text,
        vision_config={**_write_vision(model.vision), "dtype": dtype},
    )


def generation(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    """generation_config.json of a model that did not come with one."""
    return _ends(ids, vocab_size)


def _ends(ids: TokenIds, vocab_size: int) -> dict[str, Any]:
    """Null for what a smaller vocabulary does not have."""

    def known(token: int) -> int | None:
        return token if token < vocab_size else None

    eos = [token for token in ids.eos if token < vocab_size]
    return dict(bos_token_id=known(ids.bos), eos_token_id=eos or None, pad_token_id=known(ids.pad))


def preprocessor(vision: Vision) -> dict[str, Any]:
    """preprocessor_config.json of a model that did not come with one."""
    return dict(
        image_processor_type="Llama4ImageProcessorFast",
        processor_class="Llama4Processor",
        size=dict(height=vision.tile_px, width=vision.tile_px),
        max_patches=vision.max_tiles,
        resize_to_max_canvas=False,
        do_resize=True,
        do_rescale=True,
        do_normalize=True,
        do_convert_rgb=True,
        rescale_factor=1 / 255,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=2,
    )


def _shared_keys(model: Model) -> dict[str, Any]:
    return dict(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        num_hidden_layers=len(model.layers),
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads,
        head_dim=model.head_dim,
        hidden_act="silu",
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tied_embeddings,
        initializer_range=model.init_std,
        attention_bias=False,
        attention_dropout=0.0,
        use_cache=True,
        max_position_embeddings=_max_positions(model.rope),
        rope_parameters=_write_rope(model.rope, model.head_dim),
    )


def _write_dense(model: Model) -> dict[str, Any]:
    return {**_shared_keys(model), "model_type": LLAMA, "intermediate_size": model.dense_ffn_dim, "mlp_bias": False}


def _write_decoder(model: Model) -> dict[str, Any]:
    layers = [kind.split("+") for kind in model.layers]
    return dict(
        **_shared_keys(model),
        model_type=LLAMA4_TEXT,
        intermediate_size=model.expert_ffn_dim,
        intermediate_size_mlp=model.dense_ffn_dim,
        num_local_experts=model.n_experts,
        num_experts_per_tok=model.top_k,
        moe_layers=[i for i, (_, ffn) in enumerate(layers) if ffn == "moe"],
        no_rope_layers=[int(attention != "nope_full") for attention, _ in layers],
        layer_types=["chunked_attention" if attention == "rope_chunk" else "full_attention" for attention, _ in layers],
        **_intervals(layers),
        attention_chunk_size=model.chunk_len,
        use_qk_norm=model.qk_norm,
        attn_temperature_tuning=model.attn_temperature != 0,
        attn_scale=model.attn_temperature or LLAMA4_TEXT_DEFAULTS["attn_scale"],
        floor_scale=model.attn_temperature_floor,
        output_router_logits=False,
        router_aux_loss_coef=0.001,
        router_jitter_noise=0.0,
    )


def _intervals(layers: list[list[str]]) -> dict[str, int]:
    """The intervals that give the lists; left at their defaults where none does. They also tell the plan's period."""
    n, found = len(layers), {}
    moe = [ffn == "moe" for _, ffn in layers]
    nope = [attention == "nope_full" for attention, _ in layers]
    for key, marks in (("interleave_moe_layer_step", moe), ("no_rope_layer_interval", nope)):
        fits = (step for step in range(1, n + 1) if marks == [(i + 1) % step == 0 for i in range(n)])
        step = next(fits, None)
        if step is not None:
            found[key] = step
    return found


def _write_vision(vision: Vision) -> dict[str, Any]:
    return dict(
        model_type="llama4_vision_model",
        hidden_size=vision.dim,
        hidden_act="gelu",
        num_hidden_layers=vision.n_layers,
        num_attention_heads=vision.n_heads,
        num_channels=3,
        intermediate_size=vision.ffn_dim,
        image_size=vision.tile_px,
        patch_size=vision.patch_px,
        norm_eps=vision.norm_eps,
        vision_feature_select_strategy="default",
        initializer_range=0.02,
        pixel_shuffle_ratio=1 / vision.shuffle,
        projector_input_dim=vision.adapter_dim,
        projector_output_dim=vision.adapter_dim,
        vision_output_dim=vision.adapter_dim,
        multi_modal_projector_bias=False,
        projector_dropout=0.0,
        attention_dropout=0.0,
        rope_parameters=dict(rope_type="default", rope_theta=vision.rope_theta),
    )


def _write_rope(rope: Rope, head_dim: int) -> dict[str, Any]:
    """Their NTK-aware scaling depends on the input's length, ours is a theta. NTK-by-parts by turns is llama3's."""
    if rope.scaling == "none":
        return dict(rope_type="default", rope_theta=rope.theta)
    if rope.scaling == "ntk":
        return dict(rope_type="default", rope_theta=rope.ntk_theta(head_dim))
    said = dict(rope_type=rope.scaling, rope_theta=rope.theta, factor=rope.factor)
    if rope.scaling == "linear":
        return said
    said["original_max_position_embeddings"] = rope.original_len
    if rope.scaling == "yarn" and rope.ramp == "pairs":
        return {
            **said,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.sharpening,
            "truncate": True,
        }
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if rope.scaling == "yarn":
        low, high = rope.beta_slow, rope.beta_fast
    return {**said, "rope_type": "llama3", "low_freq_factor": low, "high_freq_factor": high}


def _max_positions(rope: Rope) -> int:
    rescaled = rope.scaling in ("yarn", "llama3")  # the others do not say from which length
    return math.ceil(rope.original_len * rope.factor) if rescaled else MAX_POSITIONS
