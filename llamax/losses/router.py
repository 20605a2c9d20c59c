"""Losses on the router: the Switch balance loss and the z-loss.

Letters: L MoE layers, B rows, T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from llamax.losses.sum import Sum


def loads(index_LBTK: Int[Array, "L B T K"], mask_BT: Bool[Array, "B T"], n_experts: int) -> Float[Array, "L E"]:
    """How many real tokens each expert of each layer was given: float32 [L, E]."""
    chosen_LBTE = jax.nn.one_hot(index_LBTK, n_experts, dtype=jnp.float32).sum(axis=3)
    return jnp.einsum("lbte,bt->le", chosen_LBTE, mask_BT.astype(jnp.float32))


def balance(
    logits_LBTE: Float[Array, "L B T E"], index_LBTK: Int[Array, "L B T K"], mask_BT: Bool[Array, "B T"]
) -> Sum:
    """E sum_e f_e P_e, averaged over layers (Switch Transformer, arXiv 2101.03961, eq. 4-6); 1 when balanced.

    f_e is the share of tokens sent to expert e, P_e the mean softmax probability that the router gives it. Both are
    statistics of the whole micro-batch over all devices, so this loss, unlike the others, does depend on how a batch is
    split by accumulation. As a Sum it is weighted by the tokens that it was measured on.
    """
    n_experts = logits_LBTE.shape[-1]
    mask_BT = mask_BT.astype(jnp.float32)
    tokens = mask_BT.sum()
    safe = jnp.maximum(tokens, 1.0)
    share_LE = loads(index_LBTK, mask_BT, n_experts) / (safe * index_LBTK.shape[-1])
    mean_LE = jnp.einsum("lbte,bt->le", jax.nn.softmax(logits_LBTE, axis=-1), mask_BT) / safe
    return Sum(tokens * n_experts * jnp.sum(share_LE * mean_LE, axis=-1).mean(), tokens)


def z_loss(logits_LBTE: Float[Array, "L B T E"], mask_BT: Bool[Array, "B T"]) -> Sum:
    """Mean of (log sum_e exp z_e)^2 over tokens and layers (ST-MoE, arXiv 2202.08906, eq. 5): keeps logits small."""
    squared_LBT = jax.nn.logsumexp(logits_LBTE, axis=-1) ** 2
    mask_BT = mask_BT.astype(jnp.float32)
    return Sum(jnp.einsum("lbt,bt->", squared_LBT, mask_BT) / squared_LBT.shape[0], mask_BT.sum())
