"""Losses: pure maths on arrays. Each returns `Sum(num, den)`; the step divides once.

`TERMS` says how a term of the training loss is taken from a batch and what the model made of it: one line for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from llamax import config
from llamax.batch import Batch
from llamax.losses import next_token, router
from llamax.losses.sum import Sum

__all__ = ["TERMS", "Sum", "Term", "next_token", "router"]


class Term(NamedTuple):
    """`of(scored, batch, model)` is the Sum of some rows, `den(batch)` its denominator, known before a forward pass."""

    of: Callable[[Any, Batch, config.Model], Sum]  # scored: llamax.model.score.Score
    den: Callable[[Batch], Array]
    needs_experts: bool = False
    in_row_order: bool = False  # of the routing and the batch; otherwise tokens may stand in any order


def real(batch: Batch) -> Array:
    """bool [B, T]: not padding."""
    return batch.segment_ids > 0


# The terms that `config.Losses` weighs, by the names of its fields.
TERMS: dict[str, Term] = {
    "next_token": Term(
        lambda scored, batch, model: next_token.next_token(scored.logp, batch.loss_weights),
        lambda batch: batch.loss_weights.sum(),
    ),
    "router_balance": Term(
        lambda scored, batch, model: router.balance(
            scored.routing.logits, scored.routing.index, real(batch), router.probabilities(model)
        ),
        lambda batch: real(batch).sum(),
        needs_experts=True,
    ),
    "router_balance_seq": Term(
        lambda scored, batch, model: router.sequence_balance(
            scored.routing.logits,
            scored.routing.index,
            batch.segment_ids,
            batch.positions,
            router.probabilities(model),
        ),
        lambda batch: real(batch).sum(),
        needs_experts=True,
        in_row_order=True,
    ),
    "router_z": Term(
        lambda scored, batch, model: router.z_loss(scored.routing.logits, real(batch)),
        lambda batch: real(batch).sum(),
        needs_experts=True,
    ),
}
