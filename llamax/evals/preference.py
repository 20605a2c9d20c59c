"""Which of two answers does the model prefer? Held-out comparisons, scored as in training.

    accuracy           share of the comparisons whose chosen answer has the higher log-probability
    reward accuracy    the same of implicit rewards, log p - log p of the reference; a tie counts half. Before the first
                       step all are ties
    margin             mean difference of the two, in nats
    KL to reference    mean of log p - log p of the reference over the tokens of chosen answers, which are not the
                       model's own: a distance, and not the divergence itself

Answers that are only labelled count in the figures of their side alone. The log-probability of chosen answers, a token,
is one that should not fall: a run warns where it does (config.Eval.patience).
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from llamax import config
from llamax.batch import Batch
from llamax.config import ConfigError
from llamax.data.pipeline import HeldOut
from llamax.evals.report import Context, Report, left_out_of
from llamax.losses.preference import compare
from llamax.model.score import score
from llamax.model.skeleton import Skeleton
from llamax.observe import plots
from llamax.parallel import place

SIDES = ("chosen", "rejected")
# Whatever the losses of the run: what a reference gives is 0 where there is none.
BESIDE, ALONE = config.Preference(config.PreferenceLosses(sigmoid=1.0)), config.Preference()


def check(run: config.Run, cfg: config.Eval) -> None:
    if not run.data.comparisons_per_row:
        true = "rows of this run hold no comparisons"
        change = "Set --config.data.comparisons_per_row=8, or take the evaluation out."
        raise ConfigError(f"preference evaluation of {cfg.path}", true, change)


def run(ctx: Context, cfg: config.Eval) -> Report:
    held_out = HeldOut(cfg.path, ctx.run.data, ctx.run.model.vision, cfg.max_docs, beside=True)
    rows = []
    for batch in held_out:
        ctx.check_stop()
        rows.append(of_batch(ctx, ctx.put(batch)))
    found = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]} if rows else {}
    if not rows or not found["has_chosen"].any():
        true = "no comparison in it can be used"
        raise ConfigError(f"preference evaluation of {cfg.path}", true, "Name a manifest of comparisons.")
    beside = bool(ctx.reference is not None or ctx.run.data.ref_logp)
    return report_of(found, beside, left_out_of(sum(held_out.skipped.values()), len(held_out.taken)))


def of_batch(ctx: Context, batch: Batch) -> dict[str, np.ndarray]:
    """Of every comparison of a batch: what `compare` says of it, [comparisons] each."""
    S = ctx.run.data.comparisons_per_row
    against = BESIDE if batch.ref_logp is not None or ctx.reference is not None else ALONE
    ours = compared(ctx.skeleton, (S, against), ctx.params, ctx.router_bias, ctx.reference, batch)
    ours = {name: np.asarray(x) for name, x in place.fetch(ours)._asdict().items() if x is not None}
    there = ours["has_chosen"] | ours["has_rejected"]
    return {name: x[there] for name, x in ours.items()}


@partial(jax.jit, static_argnums=(0, 1))
def compared(skeleton: Skeleton, how: tuple[int, config.Preference], params, router_bias, reference, batch: Batch):
    logp_BT = score(skeleton.bind(params, router_bias), batch).logp
    ref_BT = batch.ref_logp if reference is None else score(skeleton.reference(params, *reference), batch).logp
    return compare(logp_BT, batch.sides, ref_BT, batch.positions, *how)


def report_of(found: dict[str, np.ndarray], beside: bool, left_out: str = "") -> Report:
    """Figures and pictures of comparisons; arrays [P], as of losses.preference.Compared. `beside`: a reference."""
    both = found["has_chosen"] & found["has_rejected"]
    n, apart = int(both.sum()), (found["chosen"] - found["rejected"])[both]
    scalars = {f"{side}_logp": per_token(found, side, found[side]) for side in SIDES}
    scalars |= {f"{side}_tokens": mean(found[f"n_{side}"][found[f"has_{side}"]]) for side in SIDES}
    scalars["accuracy"] = mean(apart > 0)
    report = Report(scalars, rises=("chosen_logp",))
    if beside:
        add_rewards(report, found, both)
    told = {name: f"{value:+.3f}" for name, value in scalars.items()}
    rewards = f"{scalars['reward_accuracy']:.1%} by rewards, margin {told['margin']}" if beside else "no reference"
    kl = f", KL to the reference {told['kl_to_reference']}" if beside else ""
    if n:
        report.rows.append((f"right of {n} comparisons", f"{scalars['accuracy']:.1%}", rewards))
    said = f"rejected {told['rejected_logp']}{kl}{left_out}"
    report.rows.append(("nats a token of chosen answers", told["chosen_logp"], said))
    return report


def add_rewards(report: Report, found: dict[str, np.ndarray], both: np.ndarray) -> None:
    """What was gained over the reference, in figures and pictures."""
    gained = {side: found[side] - found[f"ref_{side}"] for side in SIDES}
    there = {side: found[f"has_{side}"] for side in SIDES}
    margin = (gained["chosen"] - gained["rejected"])[both]
    report.scalars |= {f"{side}_reward": mean(gained[side][there[side]]) for side in SIDES}
    report.scalars["margin"] = mean(margin)
    report.scalars["reward_accuracy"] = mean(np.where(margin == 0, 0.5, margin > 0))
    report.scalars["kl_to_reference"] = per_token(found, "chosen", gained["chosen"])
    points = {side: (found[f"n_{side}"][there[side]], gained[side][there[side]]) for side in SIDES}
    titles = dict(title="Length against reward", x_title="tokens", y_title="reward, nats")
    report.plots["length"] = plots.scatter(points, **titles)
    titles = dict(title="Margins between rewards", x_title="nats", y_title="comparisons")
    report.plots["margins"] = plots.histogram({"margin": margin.tolist()}, **titles)


def per_token(found: dict[str, np.ndarray], side: str, sums: np.ndarray) -> float:
    """Sums over answers, by the answers' tokens."""
    there = found[f"has_{side}"]
    return float(sums[there].sum() / max(found[f"n_{side}"][there].sum(), 1))


def mean(x: np.ndarray) -> float:
    return float(x.mean()) if len(x) else 0.0
