"""Losses of answers that are labelled good (the chosen ones) or bad (the rejected ones), each by itself.

r = log pi - log ref of an answer. A comparison of two answers is two examples, and counts as their mean.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from llamax import config
from llamax.losses.compared import Compared
from llamax.losses.paired import s


def kto(c: Compared, cfg: config.Preference) -> Array:
    """w_good (1 - s(beta (r - z))) of what is good, w_bad (1 - s(beta (z - r))) of what is bad (KTO, arXiv
    2402.01306).

    z = max(0, mean r of mismatched answers), those to other prompts: an estimate of KL(pi || ref), a constant to the
    gradient. It is a statistic of the micro-batch over all devices, so this loss does depend on how a batch is split by
    accumulation; 0 where the data hold no mismatched answers.
    """
    assert c.mismatched is not None and c.ref_mismatched is not None and c.has_mismatched is not None
    kl = jnp.where(c.has_mismatched, c.mismatched - c.ref_mismatched, 0).sum() / jnp.maximum(c.has_mismatched.sum(), 1)
    z = jax.lax.stop_gradient(jnp.maximum(kl, 0))
    good = 1 - s(cfg.beta * (c.chosen - c.ref_chosen - z))
    bad = 1 - s(cfg.beta * (z - (c.rejected - c.ref_rejected)))
    return mean_of_sides(c, cfg, good, bad)


def apo_zero_unpaired(c: Compared, cfg: config.Preference) -> Array:
    """w_good (1 - s(beta r)) of what is good, w_bad s(beta r) of what is bad (arXiv 2408.06266): KTO with z = 0."""
    good = 1 - s(cfg.beta * (c.chosen - c.ref_chosen))
    bad = s(cfg.beta * (c.rejected - c.ref_rejected))
    return mean_of_sides(c, cfg, good, bad)


def mean_of_sides(c: Compared, cfg: config.Preference, good: Array, bad: Array) -> Array:
    """[B, S]: over the answers of a comparison that are there, as the configuration weighs them."""
    good, bad = cfg.desirable_weight * good, cfg.undesirable_weight * bad
    total = jnp.where(c.has_chosen, good, 0) + jnp.where(c.has_rejected, bad, 0)
    return total / jnp.maximum(c.has_chosen.astype(total.dtype) + c.has_rejected, 1)
