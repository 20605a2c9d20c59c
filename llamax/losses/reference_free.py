"""Losses of two answers by the policy alone, each answer by its mean log-probability a token: a = log pi(y) / |y|.

CPO needs no function of its own: it is `paired.sigmoid` without a reference, beside the NLL of what is chosen.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from llamax import config
from llamax.losses.compared import Compared
from llamax.losses.paired import log_s, smoothed


def means(c: Compared) -> tuple[Array, Array]:
    return c.chosen / c.n_chosen, c.rejected / c.n_rejected


def simpo(c: Compared, cfg: config.Preference) -> Array:
    """-log s(beta (a_w - a_l) - gamma), smoothed as conservative DPO (SimPO, arXiv 2405.14734, eq. 6)."""
    chosen, rejected = means(c)
    return smoothed(cfg.beta * (chosen - rejected) - cfg.simpo_gamma, cfg.label_smoothing)


def orpo(c: Compared, cfg: config.Preference) -> Array:
    """-beta log s(log odds_w - log odds_l), log odds = a - log(1 - exp a) (arXiv 2403.07691).

    The paper's loss has the NLL of what is chosen beside it.
    """
    chosen, rejected = means(c)
    return -cfg.beta * log_s(log_odds(chosen) - log_odds(rejected))


def log_odds(a: Array) -> Array:
    a = jnp.minimum(a, -1e-7)  # of something certain the odds are infinite
    return a - jnp.log(-jnp.expm1(a))


def nll(c: Compared, cfg: config.Preference) -> Array:
    """-a_w: each chosen answer counts the same, however long (Llama 3, arXiv 2407.21783, section 4.1.4)."""
    return -c.chosen / c.n_chosen  # 0 / 1 without one
