"""Cross-entropy of the next token straight from the hidden states, a chunk of the vocabulary at a time.

    logit[n, v] = hidden[n] . head[:, v]
    logz[n] = log sum_v exp(logit[n, v])
    nll[n] = logz[n] - logit[n, target[n]]

The [N, V] logits are the largest array of a language model's step, so they never exist: the forward pass keeps a
running maximum and sum (the online softmax of Milakov & Gimelshein 2018, arXiv:1805.02867), the backward pass computes
each chunk again from logz,

    dlogit = exp(logit - logz) (dnll + dlogz) - onehot(target) dnll.

Letters: N tokens, D model width, V vocabulary, C columns a chunk. Matmuls take the dtype of hidden and add up in
float32; logits, logz and every running sum are float32.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from llamax.kernels.varying import full_like, vary_alike

CHUNK = 512  # columns of the vocabulary whose logits exist at once


def slow_cross_entropy(hidden_ND, head_DV, targets_N):
    """The definition, with [N, V] logits. Shapes, dtypes and results as in `cross_entropy`."""
    logits_NV = _matmul("nd,dv->nv", hidden_ND, head_DV)
    logz_N = jax.nn.logsumexp(logits_NV, axis=-1)
    return logz_N - jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0], logz_N


def cross_entropy(
    hidden_ND: Float[Array, "N D"], head_DV: Float[Array, "D V"], targets_N: Int[Array, " N"], *, chunk: int = CHUNK
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Negative log-likelihood of the targets and the log of the softmax's normaliser, both float32 [N].

    hidden_ND [N, D]; head_DV [D, V]; targets_N int32 [N] in [0, V). `chunk` (columns) need not divide V. Both results
    are differentiable in hidden and head. On several devices, call it inside `jax.shard_map` over the tokens, with
    the whole head.
    """
    hidden_ND, head_DV, targets_N = vary_alike(hidden_ND, head_DV, targets_N)
    return _chunked(min(chunk, head_DV.shape[1]), hidden_ND, head_DV, targets_N)


def _matmul(spec, a, b):
    return jnp.einsum(spec, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _columns(head_DV, c, C):
    """Chunk c: its first column, its weights, and which of its columns are new. The last chunk of a vocabulary that C
    does not divide reaches back into the chunk before it, which spares a padded copy of the head."""
    start = jnp.minimum(c * C, head_DV.shape[1] - C)
    return start, jax.lax.dynamic_slice_in_dim(head_DV, start, C, axis=1), start + jnp.arange(C) >= c * C


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(C, hidden_ND, head_DV, targets_N):
    return _forward(C, hidden_ND, head_DV, targets_N)[0]


def _forward(C, hidden_ND, head_DV, targets_N):
    N = hidden_ND.shape[0]

    def add_chunk(carry, c):
        top_N, sum_N, target_logit_N = carry
        start, head_DC, new_C = _columns(head_DV, c, C)
        logits_NC = jnp.where(new_C, _matmul("nd,dc->nc", hidden_ND, head_DC), -jnp.inf)
        new_top_N = jnp.maximum(top_N, logits_NC.max(-1))
        sum_N = sum_N * jnp.exp(top_N - new_top_N) + jnp.exp(logits_NC - new_top_N[:, None]).sum(-1)
        column_N = targets_N - start
        logit_N = jnp.take_along_axis(logits_NC, jnp.clip(column_N, 0, C - 1)[:, None], axis=-1)[:, 0]
        here_N = (column_N >= 0) & (column_N < C) & (targets_N >= c * C)
        return (new_top_N, sum_N, jnp.where(here_N, logit_N, target_logit_N)), None

    start = (full_like(hidden_ND, (N,), -jnp.inf), full_like(hidden_ND, (N,)), full_like(hidden_ND, (N,)))
    (top_N, sum_N, target_logit_N), _ = jax.lax.scan(add_chunk, start, jnp.arange(-(-head_DV.shape[1] // C)))
    logz_N = top_N + jnp.log(sum_N)
    return (logz_N - target_logit_N, logz_N), (hidden_ND, head_DV, targets_N, logz_N)


def _backward(C, saved, cotangents):
    hidden_ND, head_DV, targets_N, logz_N = saved
    dnll_N, dlogz_N = cotangents

    def add_chunk(carry, c):
        dhidden_ND, dhead_DV = carry
        start, head_DC, new_C = _columns(head_DV, c, C)
        p_NC = jnp.exp(_matmul("nd,dc->nc", hidden_ND, head_DC) - logz_N[:, None])
        is_target_NC = (targets_N - start)[:, None] == jnp.arange(C)
        dlogits_NC = p_NC * (dnll_N + dlogz_N)[:, None] - jnp.where(is_target_NC, dnll_N[:, None], 0)
        dlogits_NC = jnp.where(new_C, dlogits_NC, 0).astype(hidden_ND.dtype)
        dhead_DC = jax.lax.dynamic_slice_in_dim(dhead_DV, start, C, axis=1)
        dhead_DC = dhead_DC + _matmul("nd,nc->dc", hidden_ND, dlogits_NC).astype(dhead_DC.dtype)
        dhead_DV = jax.lax.dynamic_update_slice_in_dim(dhead_DV, dhead_DC, start, axis=1)
        return (dhidden_ND + _matmul("nc,dc->nd", dlogits_NC, head_DC), dhead_DV), None

    start = (full_like(hidden_ND, hidden_ND.shape), full_like(head_DV, head_DV.shape, dtype=head_DV.dtype))
    (dhidden_ND, dhead_DV), _ = jax.lax.scan(add_chunk, start, jnp.arange(-(-head_DV.shape[1] // C)))
    return dhidden_ND.astype(hidden_ND.dtype), dhead_DV, None


_chunked.defvjp(_forward, _backward)
