"""The loss that compares answers: a weighted mixture of what PREFERENCE holds, over the comparisons.

docs/how-to/preference-losses.md is the table of them all. From log-probabilities of tokens to answers: compared.py.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from llamax import config
from llamax.losses import paired, reference_free, unpaired
from llamax.losses.compared import Compared, compare, count
from llamax.losses.sum import Sum

__all__ = ["PREFERENCE", "Compared", "compare", "count", "margins", "preference", "told"]

# Each gives the loss of every comparison [B, S], by the names of config.PreferenceLosses.
PREFERENCE: dict[str, Callable[[Compared, config.Preference], Array]] = {
    **paired.PAIRED,
    "simpo": reference_free.simpo,
    "orpo": reference_free.orpo,
    "kto": unpaired.kto,
    "apo_zero_unpaired": unpaired.apo_zero_unpaired,
    "nll": reference_free.nll,
}
ONE_SIDED = ("nll", "kto", "apo_zero_unpaired")  # these want one answer only, and look themselves whether it is there


def preference(compared: Compared, cfg: config.Preference) -> Sum:
    """The mixture that `cfg.losses` weighs, added up over the comparisons; over their number.

    A comparison without the answers that a loss wants adds nothing to that loss, and still counts.
    """
    c = without_holes(compared)
    total = jnp.zeros((), c.chosen.dtype)
    for name, weight in cfg.weights.items():
        loss_BS = PREFERENCE[name](c, cfg)
        if name not in ONE_SIDED:
            loss_BS = jnp.where(paired.pairs(c), loss_BS if c.weight is None else c.weight * loss_BS, 0)
        total += weight * loss_BS.sum()
    return Sum(total, (c.has_chosen | c.has_rejected).sum(dtype=c.chosen.dtype))


def without_holes(c: Compared) -> Compared:
    """0 for every number of an answer that is not there, and 1 for its length: no loss, and no gradient, then meets inf
    or 0 / 0."""
    chosen, rejected = c.has_chosen, c.has_rejected
    return c._replace(
        chosen=jnp.where(chosen, c.chosen, 0),
        rejected=jnp.where(rejected, c.rejected, 0),
        ref_chosen=jnp.where(chosen, c.ref_chosen, 0),
        ref_rejected=jnp.where(rejected, c.ref_rejected, 0),
        n_chosen=jnp.where(chosen, c.n_chosen, 1),
        n_rejected=jnp.where(rejected, c.n_rejected, 1),
        chosen_tail=None if c.chosen_tail is None else jnp.where(chosen, c.chosen_tail, 0),
        rejected_tail=None if c.rejected_tail is None else jnp.where(rejected, c.rejected_tail, 0),
        weight=None if c.weight is None else jnp.where(chosen & rejected, c.weight, 0),
    )


def told(compared: Compared, cfg: config.Preference) -> dict[str, Sum]:
    """What a step tells of its comparisons: log-probabilities a token, rewards, how often the chosen answer leads.

    `accuracy` goes by log-probabilities, `reward_accuracy` by implicit rewards, where a tie counts half: before the
    first step all are ties. `kl` is the mean of log pi - log ref over the tokens of chosen answers: the policy has not
    said them, so it is a distance from the reference and not the divergence; without a reference there is none.
    """
    c, good, bad, both = without_holes(compared), compared.has_chosen, compared.has_rejected, paired.pairs(compared)
    good_reward, bad_reward = paired.rewards(c, cfg)

    def over(x: Array, there: Array, of: Array | None = None) -> Sum:
        return Sum(jnp.where(there, x, 0).sum(), jnp.where(there, 1 if of is None else of, 0).sum(dtype=x.dtype))

    margin = good_reward - bad_reward
    found = {"kl": over(c.chosen - c.ref_chosen, good, c.n_chosen)} if cfg.needs_reference else {}
    return found | {
        "chosen_logp": over(c.chosen, good, c.n_chosen),
        "rejected_logp": over(c.rejected, bad, c.n_rejected),
        "chosen_reward": over(good_reward, good),
        "rejected_reward": over(bad_reward, bad),
        "chosen_tokens": over(c.n_chosen, good),
        "rejected_tokens": over(c.n_rejected, bad),
        "margin": over(margin, both),
        "accuracy": over((c.chosen > c.rejected).astype(margin.dtype), both),
        "reward_accuracy": over(0.5 + 0.5 * jnp.sign(margin), both),
    }


def margins(compared: Compared, cfg: config.Preference) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """Implicit rewards beta (log pi - log ref) of the chosen and the rejected answers, for metrics; 0 where there are
    none."""
    c = without_holes(compared)
    return paired.rewards(c, cfg)
