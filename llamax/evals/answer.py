"""Loss on the answer with the right context, with that of another sample, and with none: how much the context is used.

Nats a token of the answer. A model that does not use its context loses nothing when it is given a wrong one; the
difference is what the context tells it. Finer than whether an answer is right, and moves long before.
"""

from __future__ import annotations

import numpy as np

from llamax import config
from llamax.config import ConfigError
from llamax.data.tasks import Sample
from llamax.evals import samples
from llamax.evals.report import Context, Report
from llamax.sample.reading import most_tiles, score_tokens

TASKS = ("needle", "key_value")
CONTEXTS = ("right", "shuffled", "none")


def check(run: config.Run, cfg: config.Eval) -> None:
    if cfg.samples < 2:
        asked, true = f"answer evaluation with samples={cfg.samples}", "a wrong context is that of another sample"
        raise ConfigError(asked, true, "Set samples=2 or more.")
    samples.check(run, cfg, TASKS)


def run(ctx: Context, cfg: config.Eval) -> Report:
    makers = samples.makers(ctx.run, cfg, TASKS)
    report, cells = Report(), []
    for length in cfg.lengths:
        found = samples.made(cfg, makers, length, [None])
        contexts = {
            "right": [sample.pieces[:-1] for sample in found],
            "shuffled": [other.pieces[:-1] for other in others(found, cfg.samples)],
            "none": [()] * len(found),
        }
        nats = {name: losses(ctx, cfg, found, contexts[name], length, name) for name in CONTEXTS}
        for t, task in enumerate(makers):
            of = slice(t * cfg.samples, (t + 1) * cfg.samples)
            right, shuffled, none = (float(np.mean(nats[name][of])) for name in CONTEXTS)
            gains = np.subtract(nats["shuffled"][of], nats["right"][of])
            noise = float(gains.std(ddof=1) / np.sqrt(len(gains)))
            here = f"{task}/{length}"
            report.scalars |= {f"{here}/right": right, f"{here}/shuffled": shuffled, f"{here}/none": none}
            report.scalars[f"{here}/gain"] = shuffled - right
            compared = f"{shuffled:.3f} with another's context ({shuffled - right:+.3f} ± {noise:.3f}, 1σ)"
            compared += f", {none:.3f} with none"
            report.rows.append((f"nats of the answer, {task} at {length:,} tokens", f"{right:.3f}", compared))
            cells.append({"task": task, "length": length, "right": right, "shuffled": shuffled, "none": none})
    report.details = {"cells": cells}
    return report


def others(found: list[Sample], n: int) -> list[Sample]:
    """For each sample another one of its task: the next of its n."""
    return [found[i - i % n + (i + 1) % n] for i in range(len(found))]


def losses(
    ctx: Context, cfg: config.Eval, found: list[Sample], contexts: list[tuple], length: int, name: str
) -> list[float]:
    """Nats a token of each sample's answer behind a context and its question."""
    asked = [
        samples.prompt_of(ctx, (*pieces, sample.pieces[-1])) for sample, pieces in zip(found, contexts, strict=True)
    ]
    answers = [samples.answer_of(ctx, sample) for sample in found]
    prompts = [p._replace(tokens=p.tokens + answer) for p, answer in zip(asked, answers, strict=True)]
    firsts = [len(prompt.tokens) for prompt in asked]
    longest = max(0 if name == "none" else length + samples.BEYOND, *(len(prompt.tokens) for prompt in prompts))
    rows = samples.rows_at(ctx.run, cfg, longest, len(prompts))
    how = dict(rows=rows, row_multiple=-(-rows // ctx.row_multiple) * ctx.row_multiple, likeliest=False)
    how |= dict(length=longest, tiles=most_tiles(prompts))
    nats: list[float] = []
    for first in ctx.track(range(0, len(prompts), rows), f"answer at {length} tokens, {name} context"):
        ctx.check_stop()
        some = slice(first, first + rows)
        scored = score_tokens(ctx.sampler, ctx.params, ctx.router_bias, prompts[some], firsts[some], **how)
        nats += [-float(one.logp.mean()) for one in scored]
    return nats
