"""Mixture of experts, dropless unless told otherwise, with the routing that the configuration describes.

For a token x: logits z = x W_r (no bias); scores s = sigmoid(z) or softmax(z) over all experts. The top k of c + bias
choose the experts, where c is z or s; with groups, only experts of the best groups are there to be chosen. The gate of
a chosen expert is its score, or its share of the chosen scores' sum, times a factor. It scales the expert's input or
its output: y = shared(x) + sum_e SwiGLU_e(g_e x), or shared(x) + sum_e g_e SwiGLU_e(x). Llama 4 is the defaults: choice
by z, gate sigmoid(z_e) on the input. docs/how-to/routing.md says which fields make which published model.

Logits, choice and gates are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from llamax import config
from llamax.kernels.grouped import Experts
from llamax.model.layers import SwiGLU, matrix
from llamax.model.seam import Seam

SCORES = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}  # of config.ROUTER_SCORES


class RouterBias(nnx.Variable):
    """Added to the logits or scores for the choice of experts only; moved by load balancing, never by a gradient."""


class Routing(NamedTuple):
    """What a MoE layer decided; stacked over layers by the stack, read by losses and metrics."""

    logits: Array  # float32 [B, T, E]
    index: Array  # int32 [B, T, top_k]: the experts chosen
    dropped: Array | None = None  # bool [B, T, top_k]: chosen, and full; None without a capacity


class MoE(nnx.Module):
    def __init__(self, model: config.Model, seam: Seam, *, out_gain: float, rngs: nnx.Rngs):
        self.model, self.seam = model, seam
        dim, ffn_dim, experts = model.dim, model.expert_ffn_dim, model.n_experts
        self.router = matrix(rngs, (dim, experts), ("embed", None), fan_in=dim, fan_out=experts)
        self.router_bias = RouterBias(jnp.zeros(experts, jnp.float32), axes=(None,))
        wide = dict(fan_in=dim, fan_out=ffn_dim)
        self.gate = matrix(rngs, (experts, dim, ffn_dim), ("experts", "embed", "ffn"), **wide)
        self.up = matrix(rngs, (experts, dim, ffn_dim), ("experts", "embed", "ffn"), **wide)
        narrow = dict(fan_in=ffn_dim, fan_out=dim, gain=out_gain)
        self.down = matrix(rngs, (experts, ffn_dim, dim), ("experts", "ffn", "embed"), **narrow)
        if model.n_shared_experts:
            self.shared = SwiGLU(dim, model.n_shared_experts * ffn_dim, seam.gathered, out_gain=out_gain, rngs=rngs)

    def __call__(self, x_BTD: Array, real_BT: Array | None = None) -> tuple[Array, Routing]:
        """`real_BT`: which tokens are not padding; only a capacity asks."""
        x_ND = self.seam.tokens.flat(x_BTD)
        # HIGHEST: left to themselves, TPUs multiply float32 in bfloat16 passes and GPUs in TF32, which moves choices.
        z_NE = jnp.matmul(x_ND.astype(jnp.float32), self.router[...], precision=jax.lax.Precision.HIGHEST)
        index_NK = choose(jax.lax.stop_gradient(z_NE), self.router_bias[...], self.model)
        gate_NK = gates(z_NE, index_NK, self.model).astype(x_ND.dtype)
        weights = Experts(*(w[...].astype(x_ND.dtype) for w in (self.gate, self.up, self.down)))
        taken_NK, dropped_BTK, tokens, B = index_NK, None, self.seam.tokens, len(x_BTD)
        if self.seam.capacity is not None:
            assert real_BT is not None
            index_BTK = tokens.unflat(index_NK, B)
            kept_BTK = self.seam.capacity(index_BTK, real_BT, self.model.n_experts, tokens.running)
            dropped_BTK = real_BT[..., None] & ~kept_BTK
            # No expert, and a gate that gives nothing and learns nothing.
            kept_NK = tokens.flat(kept_BTK)
            taken_NK, gate_NK = jnp.where(kept_NK, index_NK, self.model.n_experts), jnp.where(kept_NK, gate_NK, 0)
        y_ND = self.seam.run_experts(x_ND, weights, taken_NK, gate_NK, gate_on=self.model.gate_on)
        y_BTD, logits, index = (tokens.unflat(x, B) for x in (y_ND, z_NE, index_NK))
        if self.model.n_shared_experts:
            # Apart: folded into this sum, the shared expert's last product would wait for what travels.
            y_BTD, shared_BTD = jax.lax.optimization_barrier((y_BTD, self.shared(x_BTD)))
            y_BTD = y_BTD + shared_BTD
        return y_BTD, Routing(logits, index, dropped_BTK)


def choose(z_NE: Array, bias_E: Array, model: config.Model) -> Array:
    """int32 [N, top_k]: the experts of every token, best first; of equals, the first."""
    worth_NE = bias_E + (SCORES[model.router_score](z_NE) if model.choose_by == "scores" else z_NE)
    if model.top_groups < model.n_groups:
        worth_NGe = worth_NE.reshape(len(worth_NE), model.n_groups, -1)
        group_NG = jnp.take_along_axis(worth_NGe, best(worth_NGe, model.group_best), axis=-1).sum(-1)
        open_NG = jax.nn.one_hot(best(group_NG, model.top_groups), model.n_groups, dtype=bool).any(1)
        worth_NE = jnp.where(open_NG[..., None], worth_NGe, -jnp.inf).reshape(worth_NE.shape)
    return best(worth_NE, model.top_k)


def best(x: Array, k: int) -> Array:
    """int32 [..., k]: where the k largest are along the last dimension, best first; of equals, the first.

    `jax.lax.top_k` tells the same, but on some meshes the compiler gathers all tokens on every device for it.
    """
    x = jnp.maximum(x, jnp.finfo(x.dtype).min)  # what is taken is less than all others
    taken = []
    for _ in range(k):
        taken.append(jnp.argmax(x, axis=-1).astype(jnp.int32))
        x = jnp.where(jnp.arange(x.shape[-1]) == taken[-1][..., None], -jnp.inf, x)
    return jnp.stack(taken, axis=-1)


def gates(z_NE: Array, index_NK: Array, model: config.Model) -> Array:
    """float32 [N, top_k]: how much of every chosen expert a token takes."""
    softmax = model.router_score == "softmax"
    if model.router_renormalise:
        # s_e / sum s = softmax of log s, which no score can underflow; for s = softmax(z), z differs by a constant.
        z_NK = jnp.take_along_axis(z_NE, index_NK, axis=1)
        gate_NK = jax.nn.softmax(z_NK if softmax else jax.nn.log_sigmoid(z_NK), axis=-1)
    elif softmax:
        gate_NK = jnp.take_along_axis(jax.nn.softmax(z_NE, axis=-1), index_NK, axis=1)
    else:
        gate_NK = jax.nn.sigmoid(jnp.take_along_axis(z_NE, index_NK, axis=1))
    return gate_NK if model.router_scale == 1 else gate_NK * model.router_scale
