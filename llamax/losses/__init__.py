"""Losses: pure maths on arrays. Each returns `Sum(num, den)`; the step divides once.

`TERMS` says how a term of the training loss is taken from a batch and what the model made of it: one line for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from llamax import config
from llamax.batch import Batch
from llamax.losses import compared, next_token, preference, reward, router
from llamax.losses.sum import Sum

__all__ = ["TERMS", "Facts", "Sum", "Term", "next_token", "router", "told"]


class Facts(NamedTuple):
    """What of a run the terms look at."""

    model: config.Model
    preference: config.Preference
    comparisons: int  # a row

    @classmethod
    def of(cls, run: config.Run) -> Facts:
        return cls(run.model, run.preference, run.data.comparisons_per_row)

    @property
    def has_experts(self) -> bool:
        return any(kind.endswith("+moe") for kind in self.model.layers)


class Term(NamedTuple):
    """`of(scored, batch, facts)` is the Sum of some rows, `den(batch)` its denominator, known before a forward pass."""

    of: Callable[[Any, Batch, Facts], Sum]  # scored: llamax.model.score.Score
    den: Callable[[Batch], Array]
    on: Callable[[Facts], bool] = lambda facts: True  # whether there is such a thing in the run
    in_row_order: bool = False  # of the routing and the batch; otherwise tokens may stand in any order


def real(batch: Batch) -> Array:
    """bool [B, T]: not padding."""
    return batch.segment_ids > 0


# The terms that `config.Losses` weighs, by the names of its fields.
TERMS: dict[str, Term] = {
    "next_token": Term(
        lambda scored, batch, facts: next_token.next_token(scored.logp, batch.loss_weights),
        lambda batch: batch.loss_weights.sum(),
    ),
    "router_balance": Term(
        lambda scored, batch, facts: router.balance(
            scored.routing.logits, scored.routing.index, real(batch), router.probabilities(facts.model)
        ),
        lambda batch: real(batch).sum(),
        lambda facts: facts.has_experts,
    ),
    "router_balance_seq": Term(
        lambda scored, batch, facts: router.sequence_balance(
            scored.routing.logits,
            scored.routing.index,
            batch.segment_ids,
            batch.positions,
            router.probabilities(facts.model),
        ),
        lambda batch: real(batch).sum(),
        lambda facts: facts.has_experts,
        in_row_order=True,
    ),
    "router_z": Term(
        lambda scored, batch, facts: router.z_loss(scored.routing.logits, real(batch)),
        lambda batch: real(batch).sum(),
        lambda facts: facts.has_experts,
    ),
    "preference": Term(
        lambda scored, batch, facts: preference.preference(compare(scored, batch, facts), facts.preference),
        lambda batch: compared.count(batch.sides),
        lambda facts: bool(facts.preference.weights),
    ),
    "reward": Term(
        lambda scored, batch, facts: reward.of_answers(
            scored.reward, batch, facts.comparisons, facts.preference.centring
        ),
        lambda batch: reward.count_pairs(batch.sides),
        lambda facts: facts.model.reward_head,
    ),
}


def told(scored: Any, batch: Batch, facts: Facts) -> dict[str, Sum]:
    """What a step tells of its comparisons. Rewards are those of the losses that compare answers, or the head's."""
    found = preference.told(compare(scored, batch, facts), facts.preference)
    if facts.model.reward_head and not facts.preference.weights:
        found |= reward.told(scored.reward, batch, facts.comparisons)
    return found


def compare(scored: Any, batch: Batch, facts: Facts) -> compared.Compared:
    """The answers in these rows, by what the model gives their tokens."""
    of_tokens = (scored.logp, batch.sides, batch.ref_logp, batch.positions)
    return compared.compare(*of_tokens, facts.comparisons, facts.preference, scored.collisions)
