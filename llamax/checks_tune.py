"""The checks of `config.Tune`: what a run trains of its model. Whether rules match anything the model itself tells
(model/tuned.py). No jax."""

from __future__ import annotations

from llamax.config import Run
from llamax.config_dict import ConfigError


def check(run: Run) -> None:
    _rules(run.tune.freeze)


def _rules(rules: tuple) -> None:
    for rule in rules:
        if not isinstance(rule, str) or not rule.strip("!"):
            true = "a rule is a pattern over the paths of parameters, or ! and a pattern"
            change = """Write them like --config.tune.freeze="('*', '!vision/*')"."""
            raise ConfigError(f"{rule!r} in --config.tune.freeze", true, change)
