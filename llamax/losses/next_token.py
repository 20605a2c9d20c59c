"""The next-token loss: -sum_t w_t log p(y_t | y_<t) over sum_t w_t."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from llamax.losses.sum import Sum


def next_token(logp_BT: Float[Array, "B T"], weights_BT: Float[Array, "B T"]) -> Sum:
    """Weighted negative log-likelihood, in nats."""
    # Where the weight is 0 the log-probability must not count, not even as 0 x inf.
    return Sum(-jnp.sum(jnp.where(weights_BT > 0, logp_BT * weights_BT, 0.0)), jnp.sum(weights_BT))


def by_source(
    logp_BT: Float[Array, "B T"], weights_BT: Float[Array, "B T"], source_ids_BT: Int[Array, "B T"], n_sources: int
) -> Sum:
    """The same, one entry per source: [n_sources] each."""
    nll_BT = jnp.where(weights_BT > 0, -logp_BT * weights_BT, 0.0)
    sources_N = source_ids_BT.reshape(-1)
    num = jax.ops.segment_sum(nll_BT.reshape(-1), sources_N, n_sources)
    return Sum(num, jax.ops.segment_sum(weights_BT.reshape(-1), sources_N, n_sources))
