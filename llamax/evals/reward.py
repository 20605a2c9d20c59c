"""Which of two answers does a reward model score higher? Held-out comparisons, scored where the answers end."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from llamax import config
from llamax.batch import Batch
from llamax.config import ConfigError
from llamax.data.pipeline import HeldOut
from llamax.evals.report import Context, Report, left_out_of
from llamax.losses.reward import at_end
from llamax.model.score import score
from llamax.model.skeleton import Skeleton
from llamax.observe import plots
from llamax.parallel import place


def check(run: config.Run, cfg: config.Eval) -> None:
    if not run.model.reward_head:
        true = "the model has no head that scores"
        raise ConfigError(
            f"reward evaluation of {cfg.path}", true, "Set --config.model.reward_head=true, or take it out."
        )


def run(ctx: Context, cfg: config.Eval) -> Report:
    held_out = HeldOut(cfg.path, ctx.run.data, ctx.run.model.vision, cfg.max_docs)
    found = []
    for batch in held_out:
        ctx.check_stop()
        sides = scores(ctx.skeleton, ctx.run.data.comparisons_per_row, ctx.params, ctx.router_bias, ctx.put(batch))
        (chosen, has_chosen), (rejected, has_rejected) = place.fetch(sides)
        found.append(np.stack([chosen, rejected])[:, has_chosen & has_rejected])
    chosen, rejected = np.concatenate(found, axis=1) if found else np.zeros((2, 0))
    if not len(chosen):
        true = "no comparison in it can be used"
        raise ConfigError(f"reward evaluation of {cfg.path}", true, "Name a manifest of comparisons.")
    right, margin = float(np.mean(chosen > rejected)), float(np.mean(chosen - rejected))
    scalars = {"accuracy": right, "margin": margin, "chosen": float(chosen.mean()), "rejected": float(rejected.mean())}
    compared = f"chosen {chosen.mean():+.2f}, rejected {rejected.mean():+.2f}"
    compared += left_out_of(sum(held_out.skipped.values()), len(held_out.taken))
    sides = {"chosen": chosen.tolist(), "rejected": rejected.tolist()}
    picture = plots.histogram(sides, title="Scores of answers", x_title="score", y_title="answers")
    rows = [(f"right of {len(chosen)} comparisons", f"{right:.1%}", compared)]
    return Report(scalars, rows, plots={"scores": picture})


@partial(jax.jit, static_argnums=(0, 1))
def scores(skeleton: Skeleton, S: int, params, router_bias, batch: Batch):
    """((score, whether it is there) of chosen answers, the same of rejected ones), [B, S] each."""
    reward_BT = score(skeleton.bind(params, router_bias), batch).reward
    return at_end(reward_BT, batch, S, 1), at_end(reward_BT, batch, S, -1)
