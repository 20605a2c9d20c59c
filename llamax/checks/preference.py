"""The checks of `config.Preference`: a knob that none of the losses reads, and knobs that contradict each other."""

from __future__ import annotations

import dataclasses

from llamax.config import F_DIVERGENCES, REFERENCE_FREE, Preference, PreferenceLosses, Run
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


def check(run: Run) -> None:
    """Raises ConfigError at the first setting that means nothing, or that lacks another one."""
    check_knobs(run.preference)
    _unread(run)
    _comparisons(run)
    _reference(run)
    _reward(run)


def _unread(run: Run) -> None:
    """Knobs beside the losses' own that nothing of this run reads."""
    centring, default = run.preference.centring, Preference.centring
    if centring != default and not run.model.reward_head:
        true, change = "reward models alone read it", f"Set --config.preference.centring={default}."
        raise ConfigError(_asked("centring", centring), true, change)
    if run.data.mismatched and not run.preference.losses.kto:
        true, change = "kto alone reads such answers, and it is off", "Set --config.data.mismatched=false."
        raise ConfigError("--config.data.mismatched=true", true, change)
    if not (run.data.compare_marks or run.data.comparisons_per_row):
        true, change = "rows of this run hold no comparisons", "Set --config.data.compare_marks=true."
        raise ConfigError("--config.data.compare_marks=false", true, change)


def _comparisons(run: Run) -> None:
    """What compares answers needs rows that hold some."""
    reward = run.losses.reward and run.model.reward_head
    wanted = [f"preference.losses.{name}" for name in run.preference.weights] + ["losses.reward"] * bool(reward)
    if wanted and not run.data.comparisons_per_row:
        true = "it compares answers, and rows of this run hold no comparisons"
        raise ConfigError(f"--config.{wanted[0]}", true, "Set --config.data.comparisons_per_row=8 or more.")


def _reference(run: Run) -> None:
    source, beside = run.reference.source, run.reference
    needed = run.preference.needs_reference and run.losses.preference
    if needed and source == "none":
        asked = f"--config.preference.losses.{next(n for n in run.preference.weights if n not in REFERENCE_FREE)}"
        true = "it counts answers beside what a reference model gives them, and there is none"
        change = "Set --config.reference.source=cache (or live), or --config.preference.reference=false."
        raise ConfigError(asked, true, change)
    if source == "none":
        for name, value in (("path", beside.path), ("step", beside.step)):
            if value:
                true = "reference.source is none"
                raise ConfigError(f"--config.reference.{name}={value}", true, "Set --config.reference.source=live.")
    elif run.model.reward_head:
        true = "a reward model gives scores, which are measured against none"
        raise ConfigError(f"--config.reference.source={source}", true, "Set --config.reference.source=none.")
    elif not (beside.path or run.init.path):
        true = "neither reference.path nor init.path names a model"
        change = "Set --config.init.path to the model that the run begins with."
        raise ConfigError(f"--config.reference.source={source}", true, change)
    _shared(run)
    if run.data.mismatched and source == "cache":
        true = "what is kept is of answers to their own prompts, and mismatched ones are to another"
        raise ConfigError("--config.data.mismatched=true", true, "Set --config.reference.source=live.")
    if run.data.ref_logp and source != "cache":
        true = f"reference.source is {source}, which keeps nothing on disk"
        change = "Set --config.reference.source=cache."
        raise ConfigError(f"--config.data.ref_logp={run.data.ref_logp}", true, change)


def _shared(run: Run) -> None:
    """What is frozen is that of the run, which begins as `init`; what experts drop depends on what stands beside, and
    numbers that are kept are read beside something else."""
    live, beside, init = run.reference.source == "live", run.reference, run.init
    other = beside.path and (beside.path, beside.step) != (init.path, init.step)
    if live and other and (run.tune.freeze or run.tune.lora_rank):
        true = f"what is frozen is held once, and is of init.path={init.path or repr('')}"
        change = "Set --config.reference.source=cache."
        raise ConfigError(f"--config.reference.path={beside.path} of a live reference", true, change)
    if beside.source == "cache" and run.train.expert_capacity:
        true = "what experts drop depends on the rows, and what a reference gave is kept for any rows"
        change = "Set --config.train.expert_capacity=0, or --config.reference.source=live."
        raise ConfigError(f"--config.train.expert_capacity={run.train.expert_capacity}", true, change)
    if beside.source == "cache" and run.model.in_training != run.model:
        true = "training steps and evaluations then compute two functions, and what is kept is of one"
        change = "Set --config.model.attn_temperature_when=always, or --config.reference.source=live."
        raise ConfigError(f"--config.model.attn_temperature_when={run.model.attn_temperature_when}", true, change)


def _reward(run: Run) -> None:
    if run.losses.reward and not run.model.reward_head:
        true, change = "the model has no head that scores", "Set --config.model.reward_head=true."
        raise ConfigError(f"--config.losses.reward={run.losses.reward}", true, change)
    if run.model.reward_head and not run.losses.reward:
        true, change = "nothing teaches it", "Set --config.losses.reward=1."
        raise ConfigError("--config.model.reward_head=true", true, change)


def check_knobs(preference: Preference) -> None:
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
