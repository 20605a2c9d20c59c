"""Evaluations: a kind is a function `run(Context, config.Eval) -> Report`, and may have one that looks before any work
is done, `check(config.Run, config.Eval)`, which raises a ConfigError."""

from __future__ import annotations

from llamax.evals import (
    answer,
    drawings,
    instructions,
    needle,
    perplexity,
    position,
    preference,
    reward,
    ruler,
)
from llamax.evals.report import Context, Report

__all__ = ["CHECKS", "EVALS", "Context", "Report"]

EVALS = {
    "perplexity": perplexity.run,
    "drawings": drawings.run,
    "needle": needle.run,
    "ruler": ruler.run,
    "position": position.run,
    "answer": answer.run,
    "preference": preference.run,
    "reward": reward.run,
    "instructions": instructions.run,
}
CHECKS = {
    "drawings": drawings.check,
    "needle": needle.check,
    "ruler": ruler.check,
    "position": position.check,
    "answer": answer.check,
    "preference": preference.check,
    "reward": reward.check,
    "instructions": instructions.check,
}
