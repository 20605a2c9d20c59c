"""How a model tells where tokens stand, as settings: what can be changed with the same weights, and what cannot work.

The model's side is model/rope.py and model/attention.py; docs/how-to/positions.md says when to use what. No jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamax.config import Model, Rope
from llamax.config_dict import ConfigError, flat, from_dict, merged, nearest, to_dict

# Fields of a model that no parameter depends on.
WEIGHTLESS = (
    *(f"rope.{name}" for name in flat(to_dict(Rope()))),
    *("chunk_len", "attn_temperature", "attn_temperature_floor"),
)


def changed(model: Model, changes: Mapping[str, Any]) -> Model:
    """The same weights with positions read in another way: `{"attn_temperature": 0.0, "rope.scaling": "yarn"}`.

    Raises:
        ConfigError: a name that is no field of WEIGHTLESS, a value of the wrong type, or a temperature that no layer of
        the model has.
    """
    tree: dict[str, Any] = {}
    for key, value in changes.items():
        if key not in WEIGHTLESS:
            close = nearest(key, WEIGHTLESS)
            true = f"without training, a model's positions change by {', '.join(WEIGHTLESS)}"
            raise ConfigError(f"positions: {key}", true, f"Did you mean {close}?" if close else "Name one of these.")
        if key.startswith("attn_temperature") and not tempered(model):
            true = "no layer of the model has a temperature: that is for layers nope_full, with attn_scale=temperature"
            raise ConfigError(f"positions: {key}={value} (--temperature-tuning)", true, "Leave it out.")
        *sections, name = key.split(".")
        for section in reversed(sections):
            value, name = {name: value}, section
        tree = merged(tree, {name: value})
    return from_dict(Model, merged(to_dict(model), tree), "model")


def check(model: Model) -> None:
    """Raises ConfigError at the first setting of positions that cannot work, or that no layer of the model reads."""
    kinds = {kind.split("+")[0] for kind in model.layers}
    if model.rope.scaling != "none":
        _scaling(model, kinds)
    if model.attn_scale == "ssmax":
        _ssmax(model, kinds)
    if model.attn_temperature_when != "always" and not tempered(model):
        asked = f"--config.model.attn_temperature_when={model.attn_temperature_when}"
        true = "no layer has a temperature: that is for layers nope_full, with attn_scale=temperature"
        raise ConfigError(asked, true, "Set --config.model.attn_temperature_when=always.")


def tempered(model: Model) -> bool:
    """Whether a layer's queries are scaled by a temperature."""
    return model.attn_scale == "temperature" and any(kind.split("+")[0] == "nope_full" for kind in model.layers)


def _scaling(model: Model, kinds: set[str]) -> None:
    rope, asked = model.rope, f"--config.model.rope.scaling={model.rope.scaling}"
    if not kinds & {"rope_chunk", "rope_full"}:
        true = "no layer of --config.model.plan rotates anything, so it would change nothing"
        raise ConfigError(asked, true, "Set --config.model.rope.scaling=none, or a plan with rope_full or rope_chunk.")
    if rope.factor < 1:
        asked, true = (
            f"--config.model.rope.factor={rope.factor:g}",
            "it is how many times longer rows become: 1 or more",
        )
        raise ConfigError(asked, true, f"Set --config.model.rope.factor={1 / rope.factor:g}.")
    if rope.scaling == "ntk" and model.head_dim < 4:
        true = f"it stretches from the fastest pair to the slowest, and head_dim={model.head_dim} has one pair"
        raise ConfigError(asked, true, "Set --config.model.rope.scaling=linear.")
    if rope.scaling == "yarn" and rope.beta_fast <= rope.beta_slow:
        asked = f"--config.model.rope.beta_fast={rope.beta_fast:g}"
        true = f"pairs that turn fast turn more often than beta_slow={rope.beta_slow:g} times"
        raise ConfigError(asked, true, "Set --config.model.rope.beta_fast=32 and --config.model.rope.beta_slow=1.")
    if rope.scaling == "yarn" and rope.ramp == "pairs" and rope.theta <= 1:
        asked, true = f"--config.model.rope.theta={rope.theta:g} with ramp=pairs", "the pairs turn ever slower above 1"
        raise ConfigError(asked, true, "Set --config.model.rope.ramp=turns.")


def _ssmax(model: Model, kinds: set[str]) -> None:
    asked = "--config.model.attn_scale=ssmax"
    if not kinds & {"rope_full", "nope_full"}:
        true = "it is for layers that see the whole row, and --config.model.plan has rope_chunk only"
        raise ConfigError(asked, true, "Set --config.model.attn_scale=temperature.")
    if model.ssmax_len < 2:
        asked, true = f"--config.model.ssmax_len={model.ssmax_len}", "s begins as 1 / ln(ssmax_len), and ln 1 = 0"
        raise ConfigError(asked, true, "Set --config.model.ssmax_len to the tokens of a row, 2 or more.")
