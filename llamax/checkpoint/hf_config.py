"""Hugging Face's config.json as a `config.Model`. What cannot be expressed is refused, never dropped.

Keys that are missing take the defaults of the transformers classes (`Llama4TextConfig`, `Llama4VisionConfig`,
`LlamaConfig`), which are not the released models' values. Keys that do not change what the model computes (caches,
initialisation, auxiliary losses that no code of theirs computes) are not looked at. No jax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from llamax import config
from llamax.checkpoint.hf_names import LLAMA, LLAMA4, LLAMA4_TEXT
from llamax.config import ConfigError, Model, Rope, Vision

# What a key that is missing, or null, stands for.
LLAMA4_TEXT_DEFAULTS: dict[str, Any] = dict(
    vocab_size=202_048,
    hidden_size=5120,
    intermediate_size=8192,
    intermediate_size_mlp=16_384,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    hidden_act="silu",
    initializer_range=0.02,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    num_experts_per_tok=1,
    num_local_experts=16,
    interleave_moe_layer_step=1,
    use_qk_norm=True,
    no_rope_layer_interval=4,
    attention_chunk_size=8192,
    attn_temperature_tuning=True,
    floor_scale=8192,
    attn_scale=0.1,
    attention_bias=False,
    attention_dropout=0.0,
)
LLAMA_DEFAULTS: dict[str, Any] = dict(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    hidden_act="silu",
    initializer_range=0.02,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    attention_bias=False,
    attention_dropout=0.0,
    mlp_bias=False,
)
VISION_DEFAULTS: dict[str, Any] = dict(
    hidden_size=768,
    hidden_act="gelu",
    num_hidden_layers=34,
    num_attention_heads=16,
    num_channels=3,
    intermediate_size=5632,
    vision_output_dim=7680,
    image_size=448,
    patch_size=14,
    vision_feature_select_strategy="default",
    pixel_shuffle_ratio=0.5,
    projector_input_dim=4096,
    projector_output_dim=4096,
    multi_modal_projector_bias=False,
    projector_dropout=0.0,
    attention_dropout=0.0,
)
THETA = {LLAMA4_TEXT: 500_000.0, LLAMA: 10_000.0, "vision": 10_000.0}  # where neither spelling gives one
# The kinds of RoPE that we read, with what each needs; modeling_rope_utils.py of transformers has the formulas.
ROPE_TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": dict(factor=0.0),
    "yarn": dict(factor=0.0, original_max_position_embeddings=0),
    "llama3": dict(factor=0.0, low_freq_factor=0.0, high_freq_factor=0.0, original_max_position_embeddings=0),
}
BRING_BACK = "Bring the file back from its source."
IMAGE_TOKEN, BOI_TOKEN, EOI_TOKEN = 200_092, 200_080, 200_081
VISION_NORM_EPS = 1e-5  # theirs are LayerNorms of this epsilon, whatever norm_eps says


class Described(NamedTuple):
    """What a config.json says."""

    model: Model
    form: str  # a format of hf_names
    patch_id: int  # the token that a picture's features replace; -1 without pictures


# ------------------------------------------------------------------------------------------------------ theirs to ours


class Section:
    """One level of a config.json, with its class's defaults; asks for a value of the default's type."""

    def __init__(self, values: Any, defaults: Mapping[str, Any], where: str):
        self.values, self.defaults, self.where = values, defaults, where
        if not isinstance(values, Mapping):
            raise self.refused(f"{values!r}", "it is a dict", BRING_BACK)

    def refused(self, asked: str, true: str, change: str = "") -> ConfigError:
        change = change or "Such a model cannot be expressed here: convert one without it."
        return ConfigError(f"{self.where}: {asked}", true, change)

    def __call__(self, key: str) -> Any:
        """The value of `key`, or its default where it is missing or null."""
        default = self.defaults[key]
        value = self.values.get(key)
        if value is None:
            return default
        kind = type(default)
        if kind is float and type(value) is int:
            return float(value)
        if kind is bool and type(value) is int:  # released files say attn_temperature_tuning: 4
            return bool(value)
        if type(value) is not kind or (kind in (int, float) and not math.isfinite(value)):
            raise self.refused(f"{key}={value!r}", f"it is {config_kind(kind)}", BRING_BACK)
        return value

    def only(self, key: str, allowed: Any) -> None:
        """Refuses any other value than `allowed`."""
        if self(key) != allowed:
            raise self.refused(f"{key}={self(key)!r}", f"only {allowed!r} is supported")

    def size(self, key: str) -> int:
        """A whole number from 1 up."""
        if self(key) < 1:
            raise self.refused(f"{key}={self(key)}", "it is 1 or more", BRING_BACK)
        return self(key)

    def optional(self, key: str, fallback: int) -> int:
        """A whole number whose default follows from others."""
        return Section(self.values, {**self.defaults, key: fallback}, self.where).size(key)


def config_kind(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[kind]


def describe(hf: Any, where: str, preprocessor: Mapping[str, Any] | None = None) -> Described:
    """What the config.json `hf` says; `preprocessor` is preprocessor_config.json, which knows the tiles of a picture.

    Raises:
      ConfigError: another architecture, or a value that changes the model and cannot be expressed.
    """
    top = Section(hf, {"model_type": "", "tie_word_embeddings": False, "partial_rotary_factor": 1.0}, where)
    kind = top("model_type")
    _architecture(top, kind)
    top.only("partial_rotary_factor", 1.0)
    if kind == LLAMA:
        return Described(_dense(Section(hf, LLAMA_DEFAULTS, where)), LLAMA, -1)
    if kind == LLAMA4_TEXT:
        return Described(_decoder(Section(hf, LLAMA4_TEXT_DEFAULTS, where)), LLAMA4_TEXT, -1)
    if kind == LLAMA4:
        text = Section(hf.get("text_config") or {}, LLAMA4_TEXT_DEFAULTS, f"{where}, text_config")
        vision = Section(hf.get("vision_config") or {}, VISION_DEFAULTS, f"{where}, vision_config")
        model = _decoder(text)
        if "tie_word_embeddings" in hf and top("tie_word_embeddings") != model.tied_embeddings:
            raise top.refused(
                f"tie_word_embeddings={top('tie_word_embeddings')}", f"text_config says {model.tied_embeddings}"
            )
        model = dataclasses.replace(model, vision=_vision(vision, _max_tiles(preprocessor or {}, vision)))
        key = "image_token_index" if "image_token_index" in hf else "image_token_id"
        patch_id = Section(hf, {key: IMAGE_TOKEN}, where)(key)
        if not 0 <= patch_id < model.vocab_size:
            raise top.refused(f"{key}={patch_id}", f"the vocabulary has {model.vocab_size} ids", BRING_BACK)
        return Described(model, LLAMA4, patch_id)
    true = f"this converts model_type {LLAMA4}, {LLAMA4_TEXT} and {LLAMA}"
    raise top.refused(f"model_type={kind!r}", true, "Convert a model of the Llama family.")


def _architecture(top: Section, kind: str) -> None:
    """A config.json may name classes of transformers; they are those of its model_type."""
    named = top.values.get("architectures")
    family = {LLAMA: "Llama", LLAMA4_TEXT: "Llama4", LLAMA4: "Llama4"}.get(kind)
    for name in named if isinstance(named, list) and family else ():
        if not str(name).startswith(family) or (kind == LLAMA and str(name).startswith("Llama4")):
            raise top.refused(f"architectures={named!r}", f"model_type={kind!r} is another one", BRING_BACK)


def _max_tiles(preprocessor: Mapping[str, Any], vision: Section) -> int:
    """Tiles of a picture at most. What the preprocessor would do otherwise than we is refused."""
    defaults = dict(max_patches=16, resize_to_max_canvas=False, do_resize=True, do_rescale=True, do_normalize=True)
    said = Section(preprocessor, defaults, "the preprocessor's configuration")
    for key in ("resize_to_max_canvas", "do_resize", "do_rescale", "do_normalize"):
        said.only(key, defaults[key])
    side = vision.size("image_size")
    for key, allowed in (("image_mean", [0.5] * 3), ("image_std", [0.5] * 3), ("size", dict(height=side, width=side))):
        value = preprocessor.get(key)
        if isinstance(value, Mapping):  # later versions name other ways to give a size, all null
            value = {name: one for name, one in value.items() if one is not None}
        if value is not None and value != allowed:
            raise said.refused(f"{key}={value!r}", f"only {allowed!r} is supported")
    return said.size("max_patches")


def _dense(text: Section) -> Model:
    """A Llama 1 to 3.3."""
    for key in ("hidden_act", "attention_bias", "mlp_bias", "attention_dropout"):
        text.only(key, LLAMA_DEFAULTS[key])
    heads = text.size("num_attention_heads")
    return _checked(
        text,
        Model(
            vocab_size=text.size("vocab_size"),
            dim=text.size("hidden_size"),
            n_heads=heads,
            n_kv_heads=text.optional("num_key_value_heads", heads),
            head_dim=text.optional("head_dim", text.size("hidden_size") // heads),
            plan=config.plan_of(["rope_full+dense"] * text.size("num_hidden_layers")),
            dense_ffn_dim=text.size("intermediate_size"),
            qk_norm=False,
            attn_temperature=0.0,
            norm_eps=text("rms_norm_eps"),
            tied_embeddings=text("tie_word_embeddings"),
            init_std=text("initializer_range"),
            rope=_rope(text, THETA[LLAMA]),
        ),
    )


def _decoder(text: Section) -> Model:
    """The text part of a Llama 4."""
    for key in ("hidden_act", "attention_bias", "attention_dropout"):
        text.only(key, LLAMA4_TEXT_DEFAULTS[key])
    return _checked(
        text,
        Model(
            vocab_size=text.size("vocab_size"),
            dim=text.size("hidden_size"),
            n_heads=text.size("num_attention_heads"),
            n_kv_heads=text.size("num_key_value_heads"),
            head_dim=text.size("head_dim"),
            plan=config.plan_of(_kinds(text), _period(text)),
            dense_ffn_dim=text.size("intermediate_size_mlp"),
            expert_ffn_dim=text.size("intermediate_size"),
            n_experts=text.size("num_local_experts"),
            top_k=text.size("num_experts_per_tok"),
            n_shared_experts=1,
            chunk_len=text.size("attention_chunk_size"),
            qk_norm=text("use_qk_norm"),
            attn_temperature=text("attn_scale") if text("attn_temperature_tuning") else 0.0,
            attn_temperature_floor=text.size("floor_scale"),
            norm_eps=text("rms_norm_eps"),
            tied_embeddings=text("tie_word_embeddings"),
            init_std=text("initializer_range"),
            rope=_rope(text, THETA[LLAMA4_TEXT]),
        ),
    )


def _period(text: Section) -> int:
    """Layers after which the two intervals meet again."""
    return math.lcm(text.size("no_rope_layer_interval"), text.size("interleave_moe_layer_step"))


def _kinds(text: Section) -> list[str]:
    """The kind of every layer: from explicit lists where there are some, else from the intervals."""
    n, interval, step = (
        text.size(key) for key in ("num_hidden_layers", "no_rope_layer_interval", "interleave_moe_layer_step")
    )
    rope = text.values.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(n)]  # 1: it has RoPE
    _listed(text, "no_rope_layers", rope, len(rope) >= n and all(x in (0, 1) for x in rope), f"{n} or more of 0 and 1")
    moe = text.values.get("moe_layers")
    moe = list(range(step - 1, n, step)) if moe is None else moe
    _listed(text, "moe_layers", moe, all(type(i) is int and 0 <= i < n for i in moe), f"layers from 0 to {n - 1}")
    types = text.values.get("layer_types") or ["chunked_attention" if x else "full_attention" for x in rope[:n]]
    attention = {
        (1, "chunked_attention"): "rope_chunk",
        (1, "full_attention"): "rope_full",
        (0, "full_attention"): "nope_full",
    }
    right = len(types) == n and all((x, kind) in attention for x, kind in zip(rope, types, strict=False))
    _listed(text, "layer_types", types, right, f"{n} of chunked_attention and full_attention, full without RoPE")
    if "chunked_attention" in types and text.values.get("attention_chunk_size", True) is None:
        raise text.refused("attention_chunk_size=null", "there are layers with chunked_attention")
    return [
        attention[x, kind] + ("+moe" if i in set(moe) else "+dense")
        for i, (x, kind) in enumerate(zip(rope[:n], types, strict=True))
    ]


def _listed(section: Section, key: str, value: Any, right: bool, what: str) -> None:
    if not isinstance(value, list) or not right:
        raise section.refused(f"{key}={value!r}", f"it lists {what}")


def _rope(section: Section, theta: float) -> Rope:
    """Either spelling: `rope_parameters`, or `rope_scaling` beside `rope_theta`."""
    key = next((key for key in ("rope_scaling", "rope_parameters") if section.values.get(key)), "rope_parameters")
    said = section.values.get(key) or {}
    at = Section(said, {}, f"{section.where}, {key}")
    theta = section.values.get("rope_theta") or theta
    at.defaults = dict(rope_type="default", type="default", rope_theta=float(theta), partial_rotary_factor=1.0)
    kind = at("rope_type") if said.get("rope_type") else at("type")
    at.only("partial_rotary_factor", 1.0)
    if at("rope_theta") <= 0:
        raise at.refused(f"rope_theta={at('rope_theta'):g}", "it is more than 0", BRING_BACK)
    if kind not in ROPE_TYPES:
        raise at.refused(f"rope_type={kind!r}", f"only {', '.join(map(repr, ROPE_TYPES))} are supported")
    needed = ROPE_TYPES[kind]
    at.defaults = {**at.defaults, **needed}
    missing = [key for key in needed if not at(key) > 0]
    if missing:
        raise at.refused(f"rope_type={kind!r}", f"it needs {', '.join(missing)}, above 0", BRING_BACK)
    rope = Rope(theta=at("rope_theta"))
    if kind == "default":
        return rope
    rope = dataclasses.replace(rope, scaling=kind, factor=at("factor"))
    if kind == "linear":
        return rope
    rope = dataclasses.replace(rope, original_len=at("original_max_position_embeddings"))
    if kind == "yarn":
        return _yarn(at, rope)
    low, high = at("low_freq_factor"), at("high_freq_factor")
    return dataclasses.replace(rope, low_freq_factor=low, high_freq_factor=high)


def _yarn(at: Section, rope: Rope) -> Rope:
    """Theirs is linear in a pair's number. Where no attention factor is given, DeepSeek's two numbers may give it."""
    extra = dict(attention_factor=0.0, beta_fast=0.0, beta_slow=0.0, mscale=0.0, mscale_all_dim=0.0, truncate=True)
    at.defaults = {**at.defaults, **extra}
    at.only("truncate", True)
    fast, slow, factor = at("beta_fast") or 32.0, at("beta_slow") or 1.0, at("attention_factor")
    if rope.factor < 1 or slow >= fast:
        true = "the factor is 1 or more, and beta_fast is more than beta_slow"
        raise at.refused(f"factor={rope.factor:g}, beta_fast={fast:g}, beta_slow={slow:g}", true, BRING_BACK)
    if at.values.get("attention_factor") is not None and factor <= 0:
        raise at.refused(f"attention_factor={factor:g}", "it is more than 0", BRING_BACK)
    if not factor and at("mscale") and at("mscale_all_dim"):
        of, all_of = (0.1 * at(key) * math.log(rope.factor) + 1.0 for key in ("mscale", "mscale_all_dim"))
        factor = of / all_of
    return dataclasses.replace(rope, ramp="pairs", beta_fast=fast, beta_slow=slow, attention_factor=factor)


def _vision(vision: Section, max_tiles: int) -> Vision:
    for key in ("hidden_act", "num_channels", "vision_feature_select_strategy", "multi_modal_projector_bias"):
        vision.only(key, VISION_DEFAULTS[key])
    for key in ("projector_dropout", "attention_dropout"):
        vision.only(key, VISION_DEFAULTS[key])
    ratio = vision("pixel_shuffle_ratio")
    shuffle = round(1 / ratio) if ratio > 0 else 0
    if shuffle < 1 or abs(shuffle * ratio - 1) > 1e-6:
        raise vision.refused(f"pixel_shuffle_ratio={ratio}", "it is one over a whole number")
    dim, ffn_dim, adapter_dim = (vision.size(k) for k in ("hidden_size", "intermediate_size", "projector_output_dim"))
    if ffn_dim != dim * shuffle**2:
        # theirs reads the adapter's input width from intermediate_size
        true = f"it is hidden_size / pixel_shuffle_ratio^2 = {dim * shuffle**2}, what the adapter reads"
        raise vision.refused(f"intermediate_size={ffn_dim}", true)
    for key in ("projector_input_dim", "vision_output_dim"):
        if vision(key) != adapter_dim:
            raise vision.refused(f"{key}={vision(key)}", f"it equals projector_output_dim={adapter_dim}")
    heads, tile, patch = (vision.size(k) for k in ("num_attention_heads", "image_size", "patch_size"))
    if dim % (4 * heads):
        raise vision.refused(f"hidden_size={dim}", f"it is a multiple of 4 x num_attention_heads={heads}")
    if tile % (patch * shuffle):
        raise vision.refused(
            f"image_size={tile}", f"it is a multiple of {patch * shuffle}, patches of a shuffled token"
        )
    rope = _rope(vision, THETA["vision"])
    if rope.scaling != "none":
        raise vision.refused(f"rope_type={rope.scaling!r}", "pictures have fixed positions, and only 'default'")
    return Vision(
        tile_px=tile,
        patch_px=patch,
        max_tiles=max_tiles,
        dim=dim,
        n_layers=vision.size("num_hidden_layers"),
        n_heads=heads,
        ffn_dim=ffn_dim,
        adapter_dim=adapter_dim,
        shuffle=shuffle,
        rope_theta=rope.theta,
        norm_eps=VISION_NORM_EPS,
    )


def rope_survives(model: Model) -> bool:
    """Whether theirs does what YaRN's attention factor asks for: it scales with the rotation, before QK norm."""
    return model.rope.sharpening == 1 or not model.qk_norm


def _checked(text: Section, model: Model) -> Model:
    """Relations between sizes that the parameters' shapes would not tell."""
    if model.n_heads % model.n_kv_heads:
        true = f"it divides num_attention_heads={model.n_heads}"
        raise text.refused(f"num_key_value_heads={model.n_kv_heads}", true)
    if model.head_dim % 2:
        raise text.refused(f"head_dim={model.head_dim}", "RoPE turns pairs of lanes, so it is even")
    if not rope_survives(model):
        true = f"theirs norms queries and keys after it, which undoes the factor {model.rope.sharpening:g}"
        raise text.refused("rope_type='yarn' with use_qk_norm", true, "Set its attention_factor to 1.")
    if model.top_k > model.n_experts:
        raise text.refused(f"num_experts_per_tok={model.top_k}", f"there are num_local_experts={model.n_experts}")
    return model
