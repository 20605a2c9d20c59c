"""Needle in a haystack: the share of right answers by length of the context and depth of what is asked for.

A heat map for every task, with lengths to the right and depths downwards. Beside it stands what the same questions
score without their context, which is what guessing gives.
"""

from __future__ import annotations

import numpy as np

from llamax import config
from llamax.evals import samples
from llamax.evals.report import Context, Report
from llamax.observe import plots

TASKS = ("needle",)


def check(run: config.Run, cfg: config.Eval) -> None:
    samples.check(run, cfg, TASKS)


def depths_of(cfg: config.Eval) -> list[float]:
    """Evenly from 0 to 1; one alone is the middle."""
    return [i / (cfg.depths - 1) for i in range(cfg.depths)] if cfg.depths > 1 else [0.5]


def run(ctx: Context, cfg: config.Eval) -> Report:
    makers, depths, said = samples.makers(ctx.run, cfg, TASKS), depths_of(cfg), []
    for length in cfg.lengths:
        said += samples.asked(ctx, cfg, samples.made(cfg, makers, length, depths), length)
    longest = [one.sample for one in said if one.sample.meta["length"] == cfg.lengths[-1]]
    blind = samples.by(samples.asked_blind(ctx, cfg, longest), "task")
    cells = samples.by(said, "task", "length", "asked_depth")
    report = Report({"accuracy": samples.mean(said)})
    report.details = {
        "cells": [
            {"task": t, "length": n, "depth": d, "score": samples.mean(of), "samples": len(of)}
            for (t, n, d), of in cells.items()
        ],
        "no_context": {task: samples.mean(of) for (task,), of in blind.items()},
        "examples": samples.examples(said),
    }
    for task in makers:
        grid = np.array([[samples.mean(cells[task, n, d]) for n in cfg.lengths] for d in depths])
        labels = dict(x=[f"{n:,}" for n in cfg.lengths], y=[f"{d:.0%}" for d in depths])
        axes = dict(x_title="tokens", y_title="depth of what is asked for")
        report.plots[task] = plots.heat_map(grid, **labels, **axes, title=f"{task}: answers that are right")
        without = samples.mean(blind[task,])
        report.scalars[f"{task}/no_context"] = without
        for i, length in enumerate(cfg.lengths):
            worst = int(grid[:, i].argmin())
            report.scalars[f"{task}/{length}"] = figure = float(grid[:, i].mean())
            compared = (
                f"{without:.1%} without the context; at its worst depth, {depths[worst]:.0%}, {grid[worst, i]:.1%}"
            )
            report.rows.append((f"{task} at {length:,} tokens", f"{figure:.1%}", compared))
    return report
