"""Mixture of experts as Llama 4 defines it, dropless.

For a token x: z = x W_r (no bias); the top-k of z choose the experts; the gate of a chosen expert is sigmoid(z_e), each
on its own, not renormalised; the gate scales the expert's INPUT: y = shared(x) + sum_e SwiGLU_e(sigmoid(z_e) x). SwiGLU
is not homogeneous, so scaling the output instead would be another model. Router logits, the choice
and the sigmoid are float32.
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


class RouterBias(nnx.Variable):
    """Added to the logits for the choice of experts only; moved by load balancing, never by a gradient."""


class Routing(NamedTuple):
    """What a MoE layer decided; stacked over layers by the stack, read by losses and metrics."""

    logits: Array  # float32 [B, T, E]
    index: Array  # int32 [B, T, top_k]: the experts chosen


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
            self.shared = SwiGLU(dim, model.n_shared_experts * ffn_dim, out_gain=out_gain, rngs=rngs)

    def __call__(self, x_BTD: Array) -> tuple[Array, Routing]:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        # HIGHEST: left to themselves, TPUs multiply float32 in bfloat16 passes and GPUs in TF32, which moves choices.
        z_NE = jnp.matmul(x_ND.astype(jnp.float32), self.router[...], precision=jax.lax.Precision.HIGHEST)
        _, index_NK = jax.lax.top_k(jax.lax.stop_gradient(z_NE) + self.router_bias[...], self.model.top_k)
        gate_NK = jax.nn.sigmoid(jnp.take_along_axis(z_NE, index_NK, axis=1)).astype(x_ND.dtype)
        weights = Experts(*(w[...].astype(x_ND.dtype) for w in (self.gate, self.up, self.down)))
        y_BTD = self.seam.run_experts(x_ND, weights, index_NK, gate_NK).reshape(x_BTD.shape)
        if self.model.n_shared_experts:
            y_BTD = y_BTD + self.shared(x_BTD)
        lead = x_BTD.shape[:2]
        return y_BTD, Routing(z_NE.reshape(*lead, -1), index_NK.reshape(*lead, -1))
