"""The checks of `config.Tune`: what a run trains of its model. Whether rules match anything the model itself tells
(model/tuned.py). No jax."""

from __future__ import annotations

from llamax.config import LORA_TARGETS, Run, Tune
from llamax.config_dict import ConfigError, nearest

KINDS = {"dense": "+dense", "shared": "+moe", "experts": "+moe"}  # of the layers that have it


def check(run: Run) -> None:
    _rules(run.tune.freeze)
    _targets(run)
    if run.tune.lora_rank:
        _adapters(run)
    else:
        _without_adapters(run.tune)


def _rules(rules: tuple) -> None:
    for rule in rules:
        if not isinstance(rule, str) or not rule.strip("!"):
            true = "a rule is a pattern over the paths of parameters, or ! and a pattern"
            change = """Write them like --config.tune.freeze="('*', '!vision/*')"."""
            raise ConfigError(f"{rule!r} in --config.tune.freeze", true, change)


def _targets(run: Run) -> None:
    """What has adapters is something that the model has."""
    model, targets = run.model, run.tune.lora_targets
    has = ["attention", *(name for name, kind in KINDS.items() if any(layer.endswith(kind) for layer in model.layers))]
    has = [name for name in has if name != "shared" or model.n_shared_experts]
    for target in targets:
        if target not in has:
            known = target in LORA_TARGETS
            true = f"this model has {', '.join(has)}" if known else f"they are some of {', '.join(LORA_TARGETS)}"
            close = None if known else nearest(str(target), has)
            fits = tuple(dict.fromkeys(name for name in (*targets, close) if name in has))
            change = f'Set --config.tune.lora_targets="{fits}"' + (", or leave it out for all." if not fits else ".")
            raise ConfigError(f"{target!r} in --config.tune.lora_targets", true, change)


def _without_adapters(tune: Tune) -> None:
    """Nobody asks for adapters and gets full training."""
    for name in ("lora_alpha", "lora_targets"):
        if getattr(tune, name) != getattr(Tune, name):
            true, change = "lora_rank is 0: there are no adapters", "Leave it out, or set --config.tune.lora_rank=8."
            raise ConfigError(f"--config.tune.{name}={getattr(tune, name)}", true, change)


def _adapters(run: Run) -> None:
    rank, narrow = run.tune.lora_rank, run.model.dim
    if rank > narrow:
        asked, true = (
            f"--config.tune.lora_rank={rank}",
            f"matrices have a side of model.dim={narrow}, and no higher rank",
        )
        raise ConfigError(asked, true, f"Set --config.tune.lora_rank={max(1, narrow // 8)}.")
    if not run.init.path:
        true = "adapters are saved alone, and what they stand beside would be lost: it is drawn at random"
        change = "Set --config.init.path to the model that they adapt."
        raise ConfigError(f"--config.tune.lora_rank={rank} without --config.init.path", true, change)
