"""RULER (arXiv 2404.06654): its eleven synthetic tasks at chosen lengths, and its two of questions from a user's file.

A length's score is the mean over the tasks. The effective length is the longest whose score is above a threshold; the
paper's is what Llama 2 7B reaches at 4,096 tokens, 85.6%. Beside it stands what the questions score without context.
"""

from __future__ import annotations

import numpy as np

from llamax import config
from llamax.data.tasks import RULER
from llamax.evals import qa, samples
from llamax.evals.report import Context, Report
from llamax.evals.samples import Make
from llamax.observe import plots


def check(run: config.Run, cfg: config.Eval) -> None:
    samples.check(run, cfg, tuple(RULER))
    if cfg.qa:
        makers_of_questions(run, cfg)


def makers_of_questions(run: config.Run, cfg: config.Eval) -> dict[str, Make]:
    return qa.makers(cfg.qa, str(config.resolve_path(run.data.tokenizer)), cfg.lengths) if cfg.qa else {}


def run(ctx: Context, cfg: config.Eval) -> Report:
    makers, said = samples.makers(ctx.run, cfg, tuple(RULER)) | makers_of_questions(ctx.run, cfg), []
    for length in cfg.lengths:
        said += samples.asked(ctx, cfg, samples.made(cfg, makers, length, [None]), length)
    longest = [one.sample for one in said if one.sample.meta["length"] == cfg.lengths[-1]]
    blind = samples.mean(samples.asked_blind(ctx, cfg, longest))
    cells = {key: samples.mean(of) for key, of in samples.by(said, "task", "length").items()}
    grid = np.array([[cells[task, length] for length in cfg.lengths] for task in makers])
    scores = {length: float(grid[:, i].mean()) for i, length in enumerate(cfg.lengths)}
    reached = effective(scores, cfg.threshold)
    report = Report({"effective_length": reached, "no_context": blind})
    for i, (length, figure) in enumerate(scores.items()):
        report.scalars[f"score/{length}"] = figure
        report.scalars |= {f"{task}/{length}": float(grid[t, i]) for t, task in enumerate(makers)}
        worst = list(makers)[int(grid[:, i].argmin())]
        compared = f"{blind:.1%} without the context; worst at {worst}, {grid[:, i].min():.1%}"
        report.rows.append((f"{len(makers)} tasks at {length:,} tokens", f"{figure:.1%}", compared))
    shown = f"{reached:,}" if reached else f"below {cfg.lengths[0]:,}"
    report.rows.append(("effective length", shown, f"the longest of these that scores above {cfg.threshold:.1%}"))
    labels = dict(x=[f"{length:,}" for length in cfg.lengths], y=list(makers))
    report.plots["ruler"] = plots.heat_map(grid, **labels, x_title="tokens", title="RULER: answers that are right")
    cells_told = [{"task": task, "length": length, "score": figure} for (task, length), figure in cells.items()]
    report.details = {"cells": cells_told, "no_context": blind, "examples": samples.examples(said, 13)}
    return report


def effective(scores: dict[int, float], threshold: float) -> int:
    """The longest length that scores above the threshold; 0 if none does."""
    return max((length for length, score in scores.items() if score > threshold), default=0)
