"""The loss of a reward model: -log s(r_w - r_l - margin) + centring (r_w + r_l)^2 over comparisons.

r_w, r_l: scores of the chosen and the rejected answer (Bradley-Terry; InstructGPT, arXiv 2203.02155, eq. 1). margin:
how much better the chosen one was found (Llama 2, arXiv 2307.09288, eq. 2). The second term keeps scores around 0,
which the first does not look at (arXiv 2312.09244). Letter: P comparisons.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from llamax.batch import Batch
from llamax.losses.compared import count
from llamax.losses.sum import Sum


def of_answers(scores_BT: Float[Array, "B T"], batch: Batch, S: int, centring: float) -> Sum:
    """The loss of a batch's comparisons, S a row at most; over those that have two sides."""
    chosen_BS, has_chosen_BS = at_end(scores_BT, batch, S, 1)
    rejected_BS, has_rejected_BS = at_end(scores_BT, batch, S, -1)
    margin_BS = None if batch.margins is None else at_end(batch.margins, batch, S, 1)[0]
    return bradley_terry(chosen_BS, rejected_BS, has_chosen_BS & has_rejected_BS, margin_BS, centring)


def told(scores_BT: Float[Array, "B T"], batch: Batch, S: int) -> dict[str, Sum]:
    """What a step tells of the scores, by the names that implicit rewards have in preference.py."""
    (good_BS, there_BS), (bad_BS, too_BS) = (at_end(scores_BT, batch, S, sign) for sign in (1, -1))
    margin_BS, both_BS = good_BS - bad_BS, there_BS & too_BS

    def over(x_BS: Array, where_BS: Array) -> Sum:
        return Sum(jnp.where(where_BS, x_BS, 0).sum(), where_BS.sum(dtype=x_BS.dtype))

    return {
        "chosen_reward": over(good_BS, there_BS),
        "rejected_reward": over(bad_BS, too_BS),
        "margin": over(margin_BS, both_BS),
        "reward_accuracy": over(0.5 + 0.5 * jnp.sign(margin_BS), both_BS),
    }


def at_end(x_BT: Array, batch: Batch, S: int, sign: int) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """x where every answer of that sign ends, at the token whose target is the last that is trained; whether it is
    there. Tokens are told by their positions, so they may stand in any order."""
    assert batch.sides is not None, "rows without comparisons"
    of_BTS = batch.sides[..., None] == sign * jnp.arange(1, S + 1)
    places_BTS = jnp.where(of_BTS, batch.positions[..., None], -1)
    last_BS = places_BTS.max(axis=1)
    ends_BTS = of_BTS & (places_BTS == last_BS[:, None])
    return jnp.where(ends_BTS, x_BT[..., None], 0).sum(axis=1), last_BS >= 0


def count_pairs(sides_BT: Int[Array, "B T"]) -> Float[Array, ""]:
    """How many comparisons of these rows have two sides."""
    one, other = count(jnp.maximum(sides_BT, 0)), count(jnp.maximum(-sides_BT, 0))
    return one + other - count(sides_BT)


def bradley_terry(
    chosen_P: Float[Array, "*P"],
    rejected_P: Float[Array, "*P"],
    mask_P: Bool[Array, "*P"],
    margin_P: Float[Array, "*P"] | None = None,
    centring: float = 0.0,
) -> Sum:
    """Added up over the comparisons that `mask_P` says exist; over their number. Any shape, one for all."""
    margin_P = jnp.zeros_like(chosen_P) if margin_P is None else margin_P
    # Where there is none, nothing may count, not even as 0 x inf.
    chosen_P, rejected_P, margin_P = (jnp.where(mask_P, x, 0) for x in (chosen_P, rejected_P, margin_P))
    loss_P = -jax.nn.log_sigmoid(chosen_P - rejected_P - margin_P) + centring * (chosen_P + rejected_P) ** 2
    return Sum(jnp.where(mask_P, loss_P, 0).sum(), mask_P.sum(dtype=loss_P.dtype))
