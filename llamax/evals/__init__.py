"""Evaluations: a kind is a function `run(Context, config.Eval) -> Report`."""

from __future__ import annotations

from llamax.evals import drawings, perplexity
from llamax.evals.report import Context, Report

__all__ = ["EVALS", "Context", "Report"]

EVALS = {"perplexity": perplexity.run, "drawings": drawings.run}
