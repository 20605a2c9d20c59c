"""Losses of two answers to one prompt, by the implicit reward of each.

    r = beta f'(pi / ref)        pi, ref: the answer's probability under the policy and under the reference

which for DPO is beta (log pi - log ref). r_w is of the chosen answer and r_l of the rejected one, d = r_w - r_l, s the
logistic function and eps the label smoothing. Each function takes what was compared, without holes
(`preference.without_holes`), and gives every comparison's loss [B, S].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from llamax import config
from llamax.losses.compared import Compared

MOST = 80.0  # exponents are cut here: exp is still finite in float32
log_s, s = jax.nn.log_sigmoid, jax.nn.sigmoid


# f'(u) - f'(1) at log u, and for "alpha" at alpha: 0 where policy and reference agree (arXiv 2309.16240, table 1).
DIVERGENCES: dict[str, Callable[[Array, float], Array]] = {
    "reverse_kl": lambda log_u, alpha: log_u,
    "forward_kl": lambda log_u, alpha: 1 - jnp.exp(jnp.minimum(-log_u, MOST)),
    "js": lambda log_u, alpha: math.log(2) + log_s(log_u),
    "alpha": lambda log_u, alpha: (1 - jnp.exp(jnp.minimum(-alpha * log_u, MOST))) / alpha,
}


def scores(c: Compared, cfg: config.Preference) -> tuple[Array, Array]:
    """r / beta of both answers [B, S].

    LD-DPO (arXiv 2409.06411) weighs what lies beyond the shorter answer's length by ld_alpha; per_token (Tülu 3, arXiv
    2411.15124, section 5) divides by an answer's length.
    """
    chosen, rejected = c.chosen - c.ref_chosen, c.rejected - c.ref_rejected
    if c.chosen_tail is not None and c.rejected_tail is not None:
        chosen, rejected = (
            x - (1 - cfg.ld_alpha) * tail for x, tail in ((chosen, c.chosen_tail), (rejected, c.rejected_tail))
        )
    if cfg.per_token:
        chosen, rejected = chosen / c.n_chosen, rejected / c.n_rejected
    of = DIVERGENCES[cfg.f_divergence]
    return of(chosen, cfg.f_alpha), of(rejected, cfg.f_alpha)


def rewards(c: Compared, cfg: config.Preference) -> tuple[Array, Array]:
    chosen, rejected = scores(c, cfg)
    return cfg.beta * chosen, cfg.beta * rejected


def sigmoid(c: Compared, cfg: config.Preference) -> Array:
    """-(1 - eps) log s(d) - eps log s(-d): DPO (arXiv 2305.18290, eq. 7), smoothed as conservative DPO."""
    chosen, rejected = rewards(c, cfg)
    return smoothed(chosen - rejected, cfg.label_smoothing)


def smoothed(d: Array, eps: float) -> Array:
    return -(1 - eps) * log_s(d) - eps * log_s(-d)


def hinge(c: Compared, cfg: config.Preference) -> Array:
    """max(0, 1 - d) (SLiC, arXiv 2305.10425)."""
    chosen, rejected = rewards(c, cfg)
    return jax.nn.relu(1 - (chosen - rejected))


def ipo(c: Compared, cfg: config.Preference) -> Array:
    """(h - 1 / (2 beta))^2, h the difference of the log-ratios (arXiv 2310.12036): of their means over an
    answer's tokens, as its authors run it."""
    chosen, rejected = (c.chosen - c.ref_chosen) / c.n_chosen, (c.rejected - c.ref_rejected) / c.n_rejected
    return (chosen - rejected - 1 / (2 * cfg.beta)) ** 2


def robust(c: Compared, cfg: config.Preference) -> Array:
    """(-(1 - eps) log s(d) + eps log s(-d)) / (1 - 2 eps): unbiased if a share eps is labelled the wrong way round
    (arXiv 2403.00409)."""
    chosen, rejected = rewards(c, cfg)
    d, eps = chosen - rejected, cfg.label_smoothing
    return (-(1 - eps) * log_s(d) + eps * log_s(-d)) / (1 - 2 * eps)


def exo_pair(c: Compared, cfg: config.Preference) -> Array:
    """KL(s(d), s(-d) || 1 - eps, eps): the reverse KL from the smoothed label (EXO, arXiv 2402.00856)."""
    chosen, rejected = rewards(c, cfg)
    d, eps = chosen - rejected, cfg.label_smoothing
    return s(d) * (log_s(d) - math.log1p(-eps)) + s(-d) * (log_s(-d) - math.log(eps))


def nca_pair(c: Compared, cfg: config.Preference) -> Array:
    """-log s(r_w) - (log s(-r_w) + log s(-r_l)) / 2 (arXiv 2402.05369): also keeps what is chosen likely."""
    chosen, rejected = rewards(c, cfg)
    return -log_s(chosen) - 0.5 * (log_s(-chosen) + log_s(-rejected))


def bco_pair(c: Compared, cfg: config.Preference) -> Array:
    """-log s(r_w - m) - log s(m - r_l) (BCO, arXiv 2404.04656): m = 0, or with bco_shift the mean reward.

    The mean is a constant to the gradient, and a statistic of the micro-batch over all devices: with it this loss does
    depend on how a batch is split by accumulation.
    """
    chosen, rejected = rewards(c, cfg)
    if cfg.bco_shift:
        both = jnp.where(pairs(c), chosen + rejected, 0).sum()
        mean = jax.lax.stop_gradient(both / jnp.maximum(2 * pairs(c).sum(), 1))
        chosen, rejected = chosen - mean, rejected - mean
    return -log_s(chosen) - log_s(-rejected)


def sppo_hard(c: Compared, cfg: config.Preference) -> Array:
    """((r_w - 1/2) / beta)^2 + ((r_l + 1/2) / beta)^2: who is chosen wins for certain (SPPO, arXiv 2405.00675)."""
    chosen, rejected = scores(c, cfg)
    return (chosen - 0.5 / cfg.beta) ** 2 + (rejected + 0.5 / cfg.beta) ** 2


def aot(c: Compared, cfg: config.Preference) -> Array:
    """As `sigmoid`, d between equal ranks: log pi_w - log pi_l of the policy and of the reference, each sorted over the
    comparisons (AOT, arXiv 2406.05882, paired).

    Sorted over the micro-batch on all devices: this loss does depend on how a batch is split by accumulation.
    """
    ours, theirs = c.chosen - c.rejected, c.ref_chosen - c.ref_rejected
    return smoothed(cfg.beta * (ours - of_equal_rank(theirs, ours, pairs(c))), cfg.label_smoothing)


def aot_unpaired(c: Compared, cfg: config.Preference) -> Array:
    """As `aot`, between the rewards of chosen and of rejected answers, each sorted over the comparisons (the same,
    unpaired): which answer stands beside which means nothing."""
    chosen, rejected = rewards(c, cfg)
    return smoothed(chosen - of_equal_rank(rejected, chosen, pairs(c)), cfg.label_smoothing)


def of_equal_rank(x: Array, beside: Array, exists: Array) -> Array:
    """For every element of `beside` the element of x with the same rank, both ranked among those that exist."""

    def ordered(y: Array) -> Array:
        return jnp.where(exists, y, jnp.inf).reshape(-1)

    ranks = jnp.argsort(jnp.argsort(ordered(beside)))
    return jnp.where(exists, jnp.sort(ordered(x))[ranks].reshape(x.shape), 0)


def apo_zero(c: Compared, cfg: config.Preference) -> Array:
    """1 - s(r_w) + s(r_l): what is chosen is to grow likelier (arXiv 2408.06266)."""
    chosen, rejected = rewards(c, cfg)
    return 1 - s(chosen) + s(rejected)


def apo_down(c: Compared, cfg: config.Preference) -> Array:
    """s(r_w) + 1 - s(r_w - r_l): both are to grow less likely, for the policy is better than either (the same)."""
    chosen, rejected = rewards(c, cfg)
    return s(chosen) + 1 - s(chosen - rejected)


def discopop(c: Compared, cfg: config.Preference) -> Array:
    """(1 - g) (-log s(d)) + g exp(-d), g = s(d / temperature) (arXiv 2406.08414, log-ratio modulated loss)."""
    chosen, rejected = rewards(c, cfg)
    d = chosen - rejected
    gate = s(d / cfg.discopop_temperature)
    return -(1 - gate) * log_s(d) + gate * jnp.exp(jnp.minimum(-d, MOST))


def pairs(c: Compared) -> Array:
    """bool [B, S]: both answers are there."""
    return c.has_chosen & c.has_rejected


PAIRED: dict[str, Callable[[Compared, config.Preference], Array]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}
