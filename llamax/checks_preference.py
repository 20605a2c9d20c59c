"""The checks of `config.Preference`: a knob that none of the losses reads, and knobs that contradict each other."""

from __future__ import annotations

import dataclasses

from llamax.config import F_DIVERGENCES, REFERENCE_FREE, Preference, PreferenceLosses
from llamax.config_dict import ConfigError

LOSSES = tuple(f.name for f in dataclasses.fields(PreferenceLosses))
ONE_SIDED = ("kto", "apo_zero_unpaired")
PAIRED = tuple(name for name in LOSSES if name not in (*REFERENCE_FREE, *ONE_SIDED))
BY_REWARD = tuple(name for name in PAIRED if name not in ("ipo", "aot"))  # those that read no log-ratio but the reward

READ_BY = {  # knobs, and the losses that look at them
    "beta": tuple(name for name in LOSSES if name != "nll"),
    "per_token": BY_REWARD,
    "f_divergence": BY_REWARD,
    "label_smoothing": ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo"),
    "ld_alpha": BY_REWARD,
    "wpo": (*PAIRED, "simpo", "orpo"),
    "bco_shift": ("bco_pair",),
    "simpo_gamma": ("simpo",),
    "discopop_temperature": ("discopop",),
    "desirable_weight": ONE_SIDED,
    "undesirable_weight": ONE_SIDED,
}

# Of the tables in checks.py, what is of a preference.
MAY_BE_ZERO = (
    *(f"preference.losses.{name}" for name in LOSSES),
    *("preference.label_smoothing", "preference.ld_alpha", "preference.simpo_gamma"),
    "preference.centring",
)
AT_MOST = {"preference.f_alpha": 0.999, "preference.label_smoothing": 0.499, "preference.ld_alpha": 1}
CHOICES = {"preference.f_divergence": F_DIVERGENCES}


def check(preference: Preference) -> None:
    """Raises ConfigError at the first knob that means nothing."""
    for knob, readers in READ_BY.items():
        value, default = getattr(preference, knob), getattr(Preference(), knob)
        if value != default and not any(name in readers for name in preference.weights):
            *most, last = readers
            names = f"{', '.join(most)} or {last}" if most else last
            on = ", ".join(preference.weights) or "none"
            true = f"it is read by {names}, and of the losses that compare answers {on} is on"
            raise ConfigError(_asked(knob, value), true, f"Set --config.preference.{knob}={_written(default)}.")
    _divergence(preference)
    _smoothing(preference)
    if preference.ld_alpha < 1 and preference.per_token:
        true = "per_token divides by an answer's length already"
        change = "Set --config.preference.per_token=false."
        raise ConfigError(_asked("ld_alpha", preference.ld_alpha), true, change)


def _divergence(preference: Preference) -> None:
    kind = preference.f_divergence
    if kind != "alpha" and preference.f_alpha != Preference.f_alpha:
        true, change = f"f_divergence is {kind}, which has no alpha", "Set --config.preference.f_divergence=alpha."
        raise ConfigError(_asked("f_alpha", preference.f_alpha), true, change)
    if kind == "reverse_kl":
        return
    if not preference.reference:
        true = "a divergence is from a reference, and reference is false"
        raise ConfigError(_asked("f_divergence", kind), true, "Set --config.preference.reference=true.")
    if preference.per_token:
        true = "per_token makes a mean of log-ratios, of which no other divergence than reverse_kl is known"
        raise ConfigError(_asked("f_divergence", kind), true, "Set --config.preference.f_divergence=reverse_kl.")


def _smoothing(preference: Preference) -> None:
    if "exo_pair" in preference.weights and not preference.label_smoothing:
        true = "exo_pair's loss is infinite without it"
        raise ConfigError(_asked("label_smoothing", 0.0), true, "Set --config.preference.label_smoothing=0.001.")


def _asked(knob: str, value: object) -> str:
    return f"--config.preference.{knob}={_written(value)}"


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
