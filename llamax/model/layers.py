"""The parts that text and vision share: parameters with their facts, norms, feed-forwards, stacked layers.

A parameter records its logical axes (parallel/rules.py maps them to mesh axes), its fan-in and fan-out, and its kind:
"matrix" (weight decay applies), "embedding", "norm" (gains, of heads too) or "bias". Master values are float32; a
module casts at use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from llamax.model import remat as rematted


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple, *, fan_in: int, fan_out: int, gain=1.0) -> nnx.Param:
    """A projection, normal with standard deviation gain / sqrt(fan_in)."""
    value = jax.random.normal(rngs.params(), shape, jnp.float32) * (gain / math.sqrt(fan_in))
    return nnx.Param(value, axes=axes, fan_in=fan_in, fan_out=fan_out, kind="matrix")


def embedding(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple, *, std: float) -> nnx.Param:
    value = jax.random.normal(rngs.params(), shape, jnp.float32) * std
    return nnx.Param(value, axes=axes, fan_in=1, fan_out=shape[-1], kind="embedding")


def gains(dim: int, axis: str, value: float = 1.0) -> nnx.Param:
    return nnx.Param(jnp.full(dim, value, jnp.float32), axes=(axis,), fan_in=1, fan_out=dim, kind="norm")


def zeros(shape: tuple[int, ...], axes: tuple) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes, fan_in=1, fan_out=shape[-1], kind="bias")


@jax.custom_vjp
def linear(x: Array, w_DF: Array) -> Array:
    """x [..., D] @ w_DF. Autodiff would write the weight's gradient as [F, D] and transpose it, for which XLA on CPU
    also turns dy around: that costs as much again as the matmul."""
    return x @ w_DF


def _linear_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w_DF = saved
    if x.dtype == jnp.bfloat16:  # on accelerators: no split of N would be that of rows and tokens, where both are split
        lead = tuple(range(x.ndim - 1))
        return dy @ w_DF.T, jax.lax.dot_general(x, dy, ((lead, lead), ((), ())))
    x_ND, dy_NF = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])  # one sum: two would be copied into one
    return dy @ w_DF.T, jnp.einsum("nd,nf->df", x_ND, dy_NF)


linear.defvjp(lambda x, w_DF: (x @ w_DF, (x, w_DF)), _linear_backward)


def as_it_is(w: Array, names: tuple[str | None, ...]) -> Array:
    """The seam's `gathered` on one device, where weights are whole."""
    del names
    return w


def rms(x: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)


def mean_square(x: Array) -> Array:
    """Over the last dimension, in float32, for the eye only: no gradient."""
    return jnp.mean(jnp.square(jax.lax.stop_gradient(x).astype(jnp.float32)), axis=-1)


class RMSNorm(nnx.Module):
    """rms(x) in float32, cast back, then times the weight: Llama's order, and no 1 + w."""

    def __init__(self, dim: int, eps: float, *, axis: str = "norm"):
        self.eps = eps
        self.weight = gains(dim, axis)

    def __call__(self, x: Array) -> Array:
        return rms(x, self.eps).astype(x.dtype) * self.weight[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias in float32."""

    def __init__(self, dim: int, eps: float, *, axis: str = "norm"):
        self.eps = eps
        self.weight = gains(dim, axis)
        self.bias = zeros((dim,), (axis,))

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (centred * scale * self.weight[...] + self.bias[...]).astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate x) * up x), no biases."""

    WIDE, NARROW = ("embed", "ffn"), ("ffn", "embed")

    def __init__(self, dim: int, ffn_dim: int, gathered: Callable, *, out_gain: float, rngs: nnx.Rngs):
        self.gathered = gathered
        self.gate = matrix(rngs, (dim, ffn_dim), self.WIDE, fan_in=dim, fan_out=ffn_dim)
        self.up = matrix(rngs, (dim, ffn_dim), self.WIDE, fan_in=dim, fan_out=ffn_dim)
        self.down = matrix(rngs, (ffn_dim, dim), self.NARROW, fan_in=ffn_dim, fan_out=dim, gain=out_gain)

    def __call__(self, x: Array) -> Array:
        gate_DF, up_DF = (self.gathered(w[...].astype(x.dtype), self.WIDE) for w in (self.gate, self.up))
        down_FD = self.gathered(self.down[...].astype(x.dtype), self.NARROW)
        return linear(jax.nn.silu(linear(x, gate_DF)) * linear(x, up_DF), down_FD)


def stacked(make: Callable[..., nnx.Module], repeats: int, rngs: nnx.Rngs, *, axis: str = "layers") -> nnx.Module:
    """One module whose every parameter holds `repeats` layers along a new first dimension, of logical axis `axis`."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    # lax.map, not vmap: random draws vmapped over keys take several times longer to compile.
    state = jax.lax.map(lambda key: nnx.state(make(rngs=nnx.Rngs(key))), jax.random.split(rngs.params(), repeats))
    for _, variable in nnx.iter_graph(state):
        if isinstance(variable, nnx.Variable):
            variable.set_metadata("axes", (axis, *variable.get_metadata("axes")))
    return nnx.merge(graph, state)


def in_order(step: Callable, x: Array, stacked: Any, rows: Any, remat: Callable) -> tuple[Array, Any]:
    """x through `step(x, item, rows) -> (x, told)` for each item of the trees in `stacked`, as one `jax.lax.scan`; and
    what the steps told, stacked. `remat` wraps a function whose insides backward recomputes."""
    return jax.lax.scan(remat(lambda x, item: step(x, item, rows)), x, stacked)


def scan(
    layers: nnx.Module, x: Array, *rows: Any, remat: str, each: Any = (), run: Callable = in_order, **how: Any
) -> tuple[Array, Any]:
    """x through the stacked `layers` in order; also what each layer returned beside x, stacked.

    Every layer is given `rows` (trees of arrays by row), then its own part of the trees in the tuple `each`, stacked
    like the layers, and `how`. `remat`: what the backward pass computes again, by a name of remat.py.
    """
    graph, state = nnx.split(layers)

    def step(x: Array, item: Any, rows: Any) -> tuple[Array, Any]:
        layer, own = item
        return nnx.merge(graph, layer)(x, *rows, *own, **how)

    return run(step, x, (state, each), rows, partial(rematted.repeated, remat=remat))
