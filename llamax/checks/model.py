"""Checks of relations between a model's own fields: a part of checks.py, which has those of one field. No jax."""

from __future__ import annotations

from llamax import positions
from llamax.config import LAYER_KINDS, Model, Vision
from llamax.config_dict import ConfigError, nearest, nearest_divisor, nearest_multiple

MOST_LAYERS = 10_000


def check(model: Model) -> None:
    """Raises ConfigError at the first relation between fields that cannot be."""
    _plan(model)
    _heads(model)
    _routing(model)
    positions.check(model)
    if model.vision is not None:
        _vision(model.vision)


def _plan(model: Model) -> None:
    example = "(('rope_chunk+moe', 'nope_full+moe'), 2)"
    shape = f'Write it like --config.model.plan="({example},)".'
    if not model.plan:
        raise ConfigError("--config.model.plan=()", "a model has a layer or more", shape)
    for segment in model.plan:
        is_pair = isinstance(segment, tuple) and len(segment) == 2 and isinstance(segment[0], tuple)
        if not is_pair or not segment[0] or type(segment[1]) is not int or segment[1] < 1:
            raise ConfigError(f"{segment!r} in --config.model.plan", "a segment is (layer kinds, repeats >= 1)", shape)
        for kind in segment[0]:
            if kind not in LAYER_KINDS:
                close = nearest(str(kind), LAYER_KINDS) or LAYER_KINDS[0]
                true = f"a layer is one of {', '.join(LAYER_KINDS)}"
                raise ConfigError(f"layer {kind!r} in --config.model.plan", true, f"Did you mean {close!r}?")
    n = sum(len(period) * repeats for period, repeats in model.plan)
    if n > MOST_LAYERS:  # before anything lists them
        raise ConfigError(f"--config.model.plan with {n} layers", f"a model has at most {MOST_LAYERS}", shape)


def _heads(model: Model) -> None:
    """Relations between the decoder's sizes."""
    if model.n_heads % model.n_kv_heads:
        fits = nearest_divisor(model.n_heads, model.n_kv_heads)
        asked = f"--config.model.n_kv_heads={model.n_kv_heads}"
        true = f"every kv head serves as many of the n_heads={model.n_heads}"
        raise ConfigError(asked, true, f"Set --config.model.n_kv_heads={fits}.")
    if model.head_dim % 2 and any("rope_" in kind for kind in model.layers):
        asked, true = f"--config.model.head_dim={model.head_dim}", "RoPE turns pairs of lanes, so it is even"
        raise ConfigError(asked, true, f"Set --config.model.head_dim={model.head_dim + 1}.")
    low, high = model.rope.low_freq_factor, model.rope.high_freq_factor
    if low > high:
        asked, true = f"--config.model.rope.low_freq_factor={low}", f"it is at most high_freq_factor={high}"
        raise ConfigError(asked, true, f"Set --config.model.rope.low_freq_factor={high}.")


def _routing(model: Model) -> None:
    """A token finds its experts, in groups that fit, and the router can learn from what they give."""
    if model.top_k > model.n_experts:
        asked, true = f"--config.model.top_k={model.top_k}", f"there are n_experts={model.n_experts}"
        raise ConfigError(asked, true, f"Set --config.model.top_k={model.n_experts}.")
    if model.router_renormalise and model.top_k == 1:
        asked, true = "--config.model.router_renormalise with top_k=1", "the gate of one expert over itself is always 1"
        raise ConfigError(asked, f"{true}: nothing would teach the router", "Set --noconfig.model.router_renormalise.")
    if model.n_experts % model.n_groups:
        fits = nearest_divisor(model.n_experts, model.n_groups)
        asked, true = f"--config.model.n_groups={model.n_groups}", f"n_experts={model.n_experts} make no equal groups"
        raise ConfigError(asked, true, f"Set --config.model.n_groups={fits}.")
    size = model.n_experts // model.n_groups
    if model.top_groups > model.n_groups:
        asked, true = f"--config.model.top_groups={model.top_groups}", f"there are n_groups={model.n_groups}"
        raise ConfigError(asked, true, f"Set --config.model.top_groups={model.n_groups}.")
    if model.group_best > size:
        asked, true = f"--config.model.group_best={model.group_best}", f"a group has {size} experts"
        raise ConfigError(asked, true, f"Set --config.model.group_best={size}.")
    if model.top_k > model.top_groups * size:
        asked = f"--config.model.top_k={model.top_k}"
        true = f"top_groups={model.top_groups} groups of {size} have {model.top_groups * size} experts"
        raise ConfigError(asked, true, f"Set --config.model.top_groups={-(-model.top_k // size)}.")


def _vision(vision: Vision) -> None:
    """Tiles divide into patches, patches into shuffled tokens, the width into heads of 2D-RoPE lanes."""
    if vision.tile_px % vision.patch_px:
        fits = nearest_multiple(vision.patch_px, vision.tile_px)
        asked, true = f"--config.model.vision.tile_px={vision.tile_px}", f"patches have {vision.patch_px} px"
        raise ConfigError(asked, true, f"Set --config.model.vision.tile_px={fits}.")
    if vision.grid % vision.shuffle:
        fits = nearest_multiple(vision.shuffle, vision.grid) * vision.patch_px
        asked = f"--config.model.vision.shuffle={vision.shuffle}"
        true = f"a tile has {vision.grid} x {vision.grid} patches ({vision.tile_px} px / {vision.patch_px} px)"
        raise ConfigError(asked, true, f"Set --config.model.vision.tile_px={fits}, or another shuffle.")
    if vision.encoder == "vit" and vision.dim % (4 * vision.n_heads):
        fits = nearest_multiple(4 * vision.n_heads, vision.dim)
        asked = f"--config.model.vision.dim={vision.dim} with n_heads={vision.n_heads}"
        true = "2D RoPE needs a head width that is a multiple of 4"
        raise ConfigError(asked, true, f"Set --config.model.vision.dim={fits}.")
