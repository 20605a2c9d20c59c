"""What holds for one field alone: which numbers may be 0, how large they may be, which words there are."""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from llamax.checks import preference
from llamax.config import (
    ATTN_SCALES,
    BIAS_UPDATES,
    CHOOSE_BY,
    COMPUTE_DTYPES,
    EVAL_KINDS,
    GATE_ON,
    ON_NONFINITE,
    ON_SPIKE,
    REFERENCES,
    REMATS,
    ROPE_RAMPS,
    ROPE_SCALINGS,
    ROUTER_SCORES,
    RULES,
    SCHEDULES,
    TEMPERATURE_WHEN,
    TEMPLATES,
    TOO_LONG,
    VISION_ENCODERS,
)
from llamax.config_dict import ConfigError, nearest

# Every number of the schema is finite and more than 0, but for these ("*" stands for a source's or evaluation's name),
MAY_BE_ZERO = (
    *("seed", "model.n_shared_experts", "model.attn_temperature", "model.rope.attention_factor"),
    *("data.multimodal_steps", "data.workers", "data.align_tokens", "data.comparisons_per_row"),
    *("init.step", "train.steps", "train.expert_capacity", "optim.begins", "tune.lora_rank"),
    *("optim.warmup_steps", "optim.decay_steps", "optim.end_lr_ratio", "optim.b1", "optim.b2", "optim.weight_decay"),
    *("losses.next_token", "losses.router_balance", "losses.router_balance_seq", "losses.router_z"),
    *("losses.preference", "losses.reward", "reference.step", "router_bias.rate"),
    *("health.max_roll_backs", "train.pipeline_microbatches", "evals.*.every_steps", "evals.*.seed"),
    *("checkpoint.keep_every_steps", "data.sources.*.weight", *preference.MAY_BE_ZERO),
)
# which some are bounded from above too,
AT_MOST = preference.AT_MOST | {
    "seed": 2**32 - 1,
    "model.vision.max_tiles": 1024,  # the canvases are all of its products: time and memory go as its square
    "data.multimodal_steps": 1,
    "data.video_frames": 1024,
    "data.window_docs": 2**20,
    "data.workers": 1024,
    "data.comparisons_per_row": 2**16,
    "data.prefetch_batches": 1024,
    "health.spike_window": 100_000,
    "optim.end_lr_ratio": 1,
    "optim.b1": 0.9999,
    "optim.b2": 0.9999,
    "evals.*.depths": 1024,
    "evals.*.samples": 2**16,
    "evals.*.seed": 2**32 - 1,
    "evals.*.threshold": 1,
}
MOST_WHOLE = 2**31 - 1  # of every other whole number: steps and sizes are 32 bits on the devices
MOST_TOKENS = 1e15  # of a schedule of weights,
MOST_WEIGHT = 1e100  # and one of these
# and some strings are names out of a few.
CHOICES: dict[str, tuple[str, ...]] = preference.CHOICES | {
    "model.rope.scaling": ROPE_SCALINGS,
    "model.rope.ramp": ROPE_RAMPS,
    "model.attn_scale": ATTN_SCALES,
    "model.attn_temperature_when": TEMPERATURE_WHEN,
    "model.router_score": ROUTER_SCORES,
    "model.choose_by": CHOOSE_BY,
    "model.gate_on": GATE_ON,
    "model.vision.encoder": VISION_ENCODERS,
    "data.too_long": TOO_LONG,
    "mesh.rules": RULES,
    "optim.moments_dtype": COMPUTE_DTYPES,
    "optim.schedule": SCHEDULES,
    "train.compute_dtype": COMPUTE_DTYPES,
    "train.remat": REMATS,
    "reference.source": REFERENCES,
    "router_bias.update": BIAS_UPDATES,
    "health.on_nonfinite": ON_NONFINITE,
    "health.on_spike": ON_SPIKE,
    "evals.*.kind": EVAL_KINDS,
    "evals.*.templates": TEMPLATES,
}


def walk(value: Any, path: str = "", pattern: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted path, the same with "*" for names that the recipe chose, value) of every field."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            here, like = (f"{p}.{f.name}".lstrip(".") for p in (path, pattern))
            yield from walk(getattr(value, f.name), here, like)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from walk(entry, f"{path}.{name}", f"{pattern}.*")
    else:
        yield path, pattern, value


def each(fields: Iterable[tuple[str, str, Any]]) -> None:
    """What holds for one field alone."""
    for path, pattern, value in fields:
        if isinstance(value, int | float) and not isinstance(value, bool) and not path.startswith("mesh."):
            number(path, pattern, value)
        if isinstance(value, str):
            text(path, value)
        if pattern in CHOICES:
            choice(path, value, CHOICES[pattern])


def number(path: str, pattern: str, value: float) -> None:
    asked, high = f"--config.{path}={value}", AT_MOST.get(pattern, MOST_WHOLE if isinstance(value, int) else math.inf)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(asked, "it is a finite number", f"Set --config.{path} to one.")
    if pattern in MAY_BE_ZERO and value < 0:
        raise ConfigError(asked, "it is 0 or more", f"Set --config.{path}=0.")
    if pattern not in MAY_BE_ZERO and value <= 0:
        change = f"Set --config.{path}=1 or more." if isinstance(value, int) else f"Set --config.{path} above 0."
        raise ConfigError(asked, "it is more than 0", change)
    if value > high:
        raise ConfigError(asked, f"it is at most {high}", f"Set --config.{path}={high}.")


def text(path: str, value: str) -> None:
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in value):  # no path has them, and no file takes the latter
        asked, true = f"--config.{path}={value!r}", "it is text without control characters and of valid Unicode"
        raise ConfigError(asked, true, f"Set --config.{path} without them.")


def choice(path: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = nearest(value, choices) or choices[0]
        asked, true = f"--config.{path}={value}", f"it is one of {', '.join(choices)}"
        raise ConfigError(asked, true, f"Set --config.{path}={close}.")


def named(name: str, what: str, section: str) -> None:
    if not name.isidentifier():
        fits = "".join(c if c.isidentifier() or c.isdigit() else "_" for c in name)
        fits = fits if fits.isidentifier() else f"_{fits}"
        true = f"--config.{section}.NAME must be able to name it: letters, digits, underscores"
        raise ConfigError(f"{what} {name!r}", true, f"Call it {fits!r}.")


def manifest(here: str, path: str) -> None:
    if not path.endswith(".toml"):
        true = "it is a manifest, a .toml file that says where the documents are"
        raise ConfigError(f"{here}.path={path!r}", true, f"Set {here}.path=data/NAME.toml.")
