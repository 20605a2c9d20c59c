"""THE log-probability of tokens: policy, reference, teacher, judge and evaluation all take it from here."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from llamax.batch import Batch
from llamax.model.cache import Cache
from llamax.model.llama import Llama
from llamax.model.moe import Routing


class Score(NamedTuple):
    logp: Float[Array, "B T"]  # float32: log-probability of the target at every position
    logz: Float[Array, "B T"]  # float32: log of the softmax's denominator
    energy: Float[Array, "L B"]  # float32; see stack.Trace
    routing: Routing | None
    vision_energy: Float[Array, "Lv B"] | None
    collisions: Float[Array, "B T"] | None = None  # float32: log of the sum of the softmax's squares; if asked for
    reward: Float[Array, "B T"] | None = None  # float32: of what stands up to each position, if the model has the head


def score(model: Llama, batch: Batch, collisions: bool = False) -> Score:
    """log p(targets[b, t] | what stands before and at t). The logits of a vocabulary never exist as a whole."""
    hidden_BTD, trace = model(batch)
    logp_BT, logz_BT = of_targets(model, hidden_BTD, batch.targets)
    scored = Score(logp_BT, logz_BT, *trace, reward=of_places(model, hidden_BTD))
    if collisions:  # log sum_v exp 2 z_v - 2 log z, without a gradient
        _, doubled_BT = of_targets(model, jax.lax.stop_gradient(2 * hidden_BTD), batch.targets)
        scored = scored._replace(collisions=jax.lax.stop_gradient(doubled_BT - 2 * logz_BT))
    return scored


def score_after(model: Llama, batch: Batch, cache: Cache) -> tuple[Float[Array, "B T"], Float[Array, "B T D"], Cache]:
    """The same log-probabilities for tokens that go on where each row of the cache ends; their hidden states; the cache
    with them."""
    hidden_BTD, cache = model.extend(batch, cache)
    logp_BT, _ = of_targets(model, hidden_BTD, batch.targets)
    return logp_BT, hidden_BTD, cache


def of_places(model: Llama, hidden_BTD: Array) -> Array | None:
    """The scores of a reward model."""
    if not model.model.reward_head:
        return None
    # A sum of products, not a matmul: TPUs and GPUs would round its terms.
    return jnp.sum(hidden_BTD.astype(jnp.float32) * model.reward[...][:, 0], axis=-1)


def of_targets(model: Llama, hidden_BTD: Array, targets_BT: Array) -> tuple[Array, Array]:
    """(log-probability of the targets, log of the softmax's denominator) from hidden states, both float32 [B, T]."""
    tokens, rows = model.seam.tokens, len(targets_BT)
    head_DV = model.head_DV().astype(hidden_BTD.dtype)
    nll_N, logz_N = model.seam.cross_entropy(tokens.flat(hidden_BTD), head_DV, tokens.flat(targets_BT))
    return -tokens.unflat(nll_N, rows), tokens.unflat(logz_N, rows)
