"""What keeps experts alive: balance losses, the z-loss, and the balance without a loss, the router's bias.

Letters: L MoE layers, B rows, T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from llamax import config
from llamax.losses.sum import Sum


class Stats(NamedTuple):
    """Sums over real tokens; add them over micro-batches."""

    loads: Float[Array, "L E"]  # tokens given to each expert
    squares: Float[Array, " L"]  # of the length of a token's router logits
    dropped: Float[Array, " L"] | None = None  # choices that came to nothing, the expert being full; None: no capacity


def stats(
    logits_LBTE: Float[Array, "L B T E"],
    index_LBTK: Int[Array, "L B T K"],
    mask_BT: Bool[Array, "B T"],
    dropped_LBTK: Bool[Array, "L B T K"] | None = None,
) -> Stats:
    """What every step logs of its routing; loads are what was chosen, dropped or not."""
    squares_LBT = jnp.sum(jax.lax.stop_gradient(logits_LBTE) ** 2, axis=-1)
    dropped_L = None if dropped_LBTK is None else _over_tokens(dropped_LBTK.sum(-1, dtype=jnp.float32), mask_BT)
    return Stats(loads(index_LBTK, mask_BT, logits_LBTE.shape[-1]), _over_tokens(squares_LBT, mask_BT), dropped_L)


def _over_tokens(x: Array, mask: Array) -> Array:
    """Sums [L, B, T, ...] over the real tokens. Not a matmul with the mask: TPUs and GPUs would round its terms."""
    return jnp.sum(jnp.where(mask, x, 0.0), axis=(1, 2))


def loads(index_LBTK: Int[Array, "L B T K"], mask_BT: Bool[Array, "B T"], n_experts: int) -> Float[Array, "L E"]:
    """How many real tokens each expert of each layer was given: float32 [L, E]."""
    chosen_LBTE = jax.nn.one_hot(index_LBTK, n_experts, dtype=jnp.float32).sum(axis=3)
    return _over_tokens(chosen_LBTE, mask_BT[..., None])


def probabilities(model: config.Model) -> Callable[[Array], Array]:
    """logits [..., E] -> how likely the router sends a token to each expert: what it chooses by, adding up to 1.

    The softmax, but for a choice by sigmoid scores: these divided by their sum (DeepSeek-V3, arXiv 2412.19437, eq. 19).
    """
    by_sigmoid = model.choose_by == "scores" and model.router_score == "sigmoid"
    return normalised_sigmoid if by_sigmoid else jax.nn.softmax


def normalised_sigmoid(logits: Array) -> Array:
    """s_e / sum s of s = sigmoid(logits), over the last dimension; as a softmax of log s, which does not underflow."""
    return jax.nn.softmax(jax.nn.log_sigmoid(logits))


def balance(
    logits_LBTE: Float[Array, "L B T E"],
    index_LBTK: Int[Array, "L B T K"],
    mask_BT: Bool[Array, "B T"],
    probabilities: Callable[[Array], Array] = jax.nn.softmax,
) -> Sum:
    """E sum_e f_e P_e, averaged over layers (Switch Transformer, arXiv 2101.03961, eq. 4-6); 1 when balanced.

    f_e is the share of tokens sent to expert e, P_e the mean probability that the router gives it. Both are
    statistics of the whole micro-batch over all devices, so this loss, unlike the others, does depend on how a batch is
    split by accumulation. As a Sum it is weighted by the tokens that it was measured on.
    """
    n_experts = logits_LBTE.shape[-1]
    tokens = mask_BT.sum().astype(jnp.float32)
    safe = jnp.maximum(tokens, 1.0)
    share_LE = loads(index_LBTK, mask_BT, n_experts) / (safe * index_LBTK.shape[-1])
    mean_LE = _over_tokens(probabilities(logits_LBTE), mask_BT[..., None]) / safe
    return Sum(tokens * n_experts * jnp.sum(share_LE * mean_LE, axis=-1).mean(), tokens)


def sequence_balance(
    logits_LBTE: Float[Array, "L B T E"],
    index_LBTK: Int[Array, "L B T K"],
    segment_ids_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    probabilities: Callable[[Array], Array] = jax.nn.softmax,
) -> Sum:
    """The same within every document: E sum_e f_e P_e of its own f and P (DeepSeek-V3, arXiv 2412.19437, eq. 17-20).

    Averaged over layers, and over documents in proportion to their tokens. A document is a packed segment, so splitting
    the batch, packing, padding and the order of rows change nothing.
    """
    n_experts, tokens = logits_LBTE.shape[-1], segment_ids_BT.shape[1]
    real_BT = segment_ids_BT > 0
    chosen_LBTE = jax.nn.one_hot(index_LBTK, n_experts, dtype=jnp.float32).sum(axis=3)
    chosen_LBTE = jnp.where(real_BT[..., None], chosen_LBTE, 0.0)
    # Tokens of a segment stand together, so its counts are differences of running counts: whole numbers, hence exact.
    running_LBTE = jnp.pad(jnp.cumsum(chosen_LBTE, axis=2), ((0, 0), (0, 0), (1, 0), (0, 0)))
    first_BT = jnp.arange(tokens) - positions_BT
    lengths_BT = jax.vmap(lambda ids: jnp.bincount(ids, length=tokens + 1)[ids])(segment_ids_BT)
    past_BT = jnp.where(real_BT, first_BT + lengths_BT, 0)

    def at(places_BT: Array) -> Array:
        return jnp.take_along_axis(running_LBTE, jnp.where(real_BT, places_BT, 0)[None, ..., None], axis=2)

    share_LBTE = (at(past_BT) - at(first_BT)) / (jnp.maximum(lengths_BT, 1) * index_LBTK.shape[-1])[..., None]
    products_LBT = jnp.sum(share_LBTE * probabilities(logits_LBTE), axis=-1)
    return Sum(n_experts * _over_tokens(products_LBT, real_BT).mean(), real_BT.sum().astype(jnp.float32))


def z_loss(logits_LBTE: Float[Array, "L B T E"], mask_BT: Bool[Array, "B T"]) -> Sum:
    """Mean of (log sum_e exp z_e)^2 over tokens and layers (ST-MoE, arXiv 2202.08906, eq. 5): keeps logits small."""
    squared_LBT = jax.nn.logsumexp(logits_LBTE, axis=-1) ** 2
    return Sum(_over_tokens(squared_LBT, mask_BT).mean(), mask_BT.sum().astype(jnp.float32))


def bias_step(
    bias_LE: Float[Array, "L E"], loads_LE: Float[Array, "L E"], rate: float, update: str
) -> Float[Array, "L E"]:
    """The bias after a step with these loads (arXiv 2408.15664, algorithm 1): more for idle experts, less for busy.

    Args:
      rate: how far a bias moves, in what experts are chosen by.
      update: "sign" moves each by `rate`; "proportional" by `rate` times its distance from an even share, relative to
        that share.
    """
    even_L1 = loads_LE.mean(axis=-1, keepdims=True)
    missing_LE = even_L1 - loads_LE
    return bias_LE + rate * (jnp.sign(missing_LE) if update == "sign" else missing_LE / jnp.maximum(even_L1, 1.0))
