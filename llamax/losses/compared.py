"""Answers compared: from a row's log-probabilities, token by token, to one number for each answer.

A row holds up to S comparisons of two answers to one prompt, or with one side only where an answer is just labelled
good or bad. `sides` tells what a target belongs to (batch.py). Sums over T are all that is taken, and tokens are placed
by their positions: the order in which a row's tokens stand changes nothing.

Letters: B rows, T tokens a row, S comparisons a row. Dtypes are those of the log-probabilities.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from llamax import config
from llamax.batch import MISMATCHED


class Compared(NamedTuple):
    """Log-probabilities of answers, added up over their trained tokens; 0 where there is no such answer."""

    chosen: Float[Array, "B S"]
    rejected: Float[Array, "B S"]
    ref_chosen: Float[Array, "B S"]  # what the reference gives; 0 without one
    ref_rejected: Float[Array, "B S"]
    n_chosen: Float[Array, "B S"]  # trained tokens
    n_rejected: Float[Array, "B S"]
    has_chosen: Bool[Array, "B S"]
    has_rejected: Bool[Array, "B S"]
    chosen_tail: Float[Array, "B S"] | None = None  # LD-DPO: the log-ratio of what lies beyond the shorter answer's
    rejected_tail: Float[Array, "B S"] | None = None  # length
    weight: Float[Array, "B S"] | None = None  # WPO: what a comparison counts for
    mismatched: Float[Array, "B S"] | None = None  # KTO: of an answer to another prompt, after this one
    ref_mismatched: Float[Array, "B S"] | None = None
    has_mismatched: Bool[Array, "B S"] | None = None


def compare(
    logp_BT: Float[Array, "B T"],
    sides_BT: Int[Array, "B T"],
    ref_logp_BT: Float[Array, "B T"] | None,
    positions_BT: Int[Array, "B T"],
    S: int,
    cfg: config.Preference,
    collisions_BT: Float[Array, "B T"] | None = None,
) -> Compared:
    """The answers of every row.

    Args:
      logp_BT: log-probability of the target, of the policy.
      sides_BT: see `Batch.sides`; numbers of comparisons beyond S are left out.
      ref_logp_BT: the same of the reference; None if `cfg.needs_reference` is false.
      positions_BT: within the segment; read for `cfg.ld_alpha`.
      collisions_BT: log sum_v p_v^2 of the policy at every token; read for `cfg.wpo`.
    """
    if not cfg.needs_reference:
        ref_logp_BT = jnp.zeros_like(logp_BT)
    assert ref_logp_BT is not None, "the losses read a reference's log-probabilities, and there are none"
    ref_logp_BT = jax.lax.stop_gradient(ref_logp_BT)
    sides = (1, -1)
    chosen, rejected = (_sums(logp_BT, sides_BT, S, side) for side in sides)
    ref_chosen, ref_rejected = (_sums(ref_logp_BT, sides_BT, S, side) for side in sides)
    n_chosen, n_rejected = (_sums(jnp.ones_like(logp_BT), sides_BT, S, side) for side in sides)
    found = Compared(*(chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected), n_chosen > 0, n_rejected > 0)
    if cfg.ld_alpha < 1:
        shorter_BS = jnp.minimum(n_chosen, n_rejected)
        beyond_BTS = places(sides_BT, positions_BT)[..., None] >= shorter_BS[:, None]
        tails = (_sums(logp_BT - ref_logp_BT, sides_BT, S, side, beyond_BTS) for side in sides)
        found = found._replace(**dict(zip(("chosen_tail", "rejected_tail"), tails, strict=True)))
    if cfg.wpo:
        assert collisions_BT is not None, "WPO weighs by the policy's collision probabilities, and there are none"
        found = found._replace(weight=_likely(logp_BT - collisions_BT, sides_BT, S, n_chosen, n_rejected))
    if cfg.losses.kto:
        others_BT = jnp.where(sides_BT > MISMATCHED, sides_BT - MISMATCHED, 0)
        found = found._replace(
            mismatched=_sums(logp_BT, others_BT, S, 1),
            ref_mismatched=_sums(ref_logp_BT, others_BT, S, 1),
            has_mismatched=_sums(jnp.ones_like(logp_BT), others_BT, S, 1) > 0,
        )
    return found


def count(sides_BT: Int[Array, "B T"]) -> Float[Array, ""]:
    """How many comparisons these rows hold, those of one side included: what the losses are divided by."""
    numbers_BT = jnp.sort(jnp.where(sides_BT > MISMATCHED, 0, jnp.abs(sides_BT)), axis=1)
    first_BT = jnp.diff(numbers_BT, axis=1, prepend=0) > 0  # the number before is smaller: a comparison not met so far
    return first_BT.sum(dtype=jnp.float32)


def places(sides_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many trained tokens of its answer stand before each token, by their positions, in whatever order they are."""
    here_BT = jnp.broadcast_to(jnp.arange(sides_BT.shape[1], dtype=jnp.int32), sides_BT.shape)
    sides_BT, _, from_BT = jax.lax.sort((sides_BT, positions_BT, here_BT), num_keys=2)
    opens_BT = jnp.diff(sides_BT, axis=1, prepend=sides_BT[:, :1] - 1) != 0
    place_BT = here_BT - jax.lax.cummax(jnp.where(opens_BT, here_BT, 0), axis=1)
    return jnp.zeros_like(place_BT).at[jnp.arange(len(from_BT))[:, None], from_BT].set(place_BT)


def _sums(x_BT: Array, sides_BT: Array, S: int, sign: int, only_BTS: Array | bool = True) -> Array:
    """[B, S]: x added up over the answer `sign * k` of every comparison k = 1..S, of `only_BTS` where that is given."""
    of_BTS = sides_BT[..., None] == sign * jnp.arange(1, S + 1)
    # Elsewhere x must not count, not even as 0 x inf.
    return jnp.where(of_BTS & only_BTS, x_BT[..., None], 0).sum(axis=1)


def _likely(relative_BT: Array, sides_BT: Array, S: int, n_chosen: Array, n_rejected: Array) -> Array:
    """WPO's weights [B, S] (arXiv 2406.11827, eq. 2, sampled alignment), which are constants to the gradient.

    The product over both answers of exp mean_t (log p(y_t) - log sum_v p_v^2): around 1 where the policy would say such
    things itself.
    """
    means = (_sums(relative_BT, sides_BT, S, sign) / jnp.maximum(n, 1) for sign, n in ((1, n_chosen), (-1, n_rejected)))
    return jax.lax.stop_gradient(jnp.exp(sum(means)))
