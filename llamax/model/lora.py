"""Adapters beside frozen matrices (LoRA; Hu et al. 2021, arXiv:2106.09685): two thin matrices instead of a thick one.

    W' = W + (alpha / r) A B        A [D, r] normal with standard deviation 1 / sqrt(D),  B [r, F] zero

So a run starts as the model that it adapts, to the bit. An adapter is two more parameters beside the matrix that it
belongs to: `gate`, `gate_lora_a`, `gate_lora_b`; of kind "adapter" (no weight decay), stacked like the matrix, one for
every expert, split over the mesh like the matrix along the dimensions that it shares with it. W' is made of one layer
at a time, where the layer runs, in float32: there is no merged copy of the model, but for what `remat=none` keeps.

What this saves is memory: gradients and moments are those of the adapters. It saves no matmul: A and B get their
gradients from that of W', which is as large as W and lives as long as its layer's backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from llamax import config

Tree = dict[str, Any]
A, B = "_lora_a", "_lora_b"
ADAPTERS = ("*_lora_a", "*_lora_b")  # their names, as patterns
HEAD = "reward"  # of a reward model: what it adapts need not have one, so it is trained beside them

FFN = ("gate", "up", "down")
TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # of config.LORA_TARGETS: where in a block, and what
    "attention": (("attention",), ("query", "key", "value", "out")),
    "dense": (("dense",), FFN),
    "shared": (("moe", "shared"), FFN),
    "experts": (("moe",), FFN),
}
LEAD = ("layers", "experts")  # dimensions that count matrices
INPUTS = {("heads", "head_dim", "embed"): 2}  # how many of a matrix's dimensions are inputs, where it is not one


def scale_of(tune: config.Tune) -> float:
    """What A B is multiplied by."""
    return tune.lora_alpha / tune.lora_rank


# ---------------------------------------------------------------------------------------------------------- the module


def beside(make: Callable[..., Any], tune: config.Tune, *, rngs: nnx.Rngs) -> Any:
    """The model that `make` makes, the same numbers with or without adapters, and these."""
    model = make(rngs=rngs)
    for segment in model.stack.segments:
        period = getattr(model.stack, segment)
        for slot in period.slots:
            block = getattr(period, slot)
            for where, names in (TARGETS[target] for target in tune.lora_targets or TARGETS):
                module = block
                for part in where:
                    module = getattr(module, part, None)
                if module is not None:
                    block.adapted = True
                    for name in names:
                        _adapt(module, name, tune, rngs)
    return model


def _adapt(module: nnx.Module, name: str, tune: config.Tune, rngs: nnx.Rngs) -> None:
    matrix, rank = getattr(module, name), tune.lora_rank
    axes, shape, facts = matrix.get_metadata("axes"), matrix.shape, matrix.get_metadata()
    lead = sum(axis in LEAD for axis in axes)
    middle = lead + INPUTS.get(axes[lead:], 1)
    std = 1 / math.sqrt(facts["fan_in"])
    a = jax.random.normal(rngs.params(), (*shape[:middle], rank), jnp.float32) * std
    b = jnp.zeros((*shape[:lead], rank, *shape[middle:]), jnp.float32)
    how = dict(kind="adapter", scale=scale_of(tune))
    into, out_of = dict(fan_in=facts["fan_in"], fan_out=rank), dict(fan_in=rank, fan_out=facts["fan_out"])
    setattr(module, name + A, nnx.Param(a, axes=(*axes[:middle], None), **into, **how))
    setattr(module, name + B, nnx.Param(b, axes=(*axes[:lead], None, *axes[middle:]), **out_of, **how))


def folding(block: Any) -> Callable:
    """A block as a function that folds its adapters in before it runs; one without any is what it was."""
    return partial(_folded, block) if block.adapted else block


def _folded(block: nnx.Module, *args: Any, **how: Any) -> Any:
    graph, state = nnx.split(block)
    variables = dict(nnx.to_flat_state(state))
    for path, b in list(variables.items()):
        if path[-1].endswith(B):
            name = path[-1].removesuffix(B)
            of, beside = (*path[:-1], name), (*path[:-1], name + A)
            w = variables[of]
            variables[of] = w.replace(fold(w[...], variables[beside][...], b[...], b.get_metadata("scale")))
    return nnx.merge(graph, nnx.from_flat_state(variables))(*args, **how)


def fold(w: Array, a: Array, b: Array, scale: float) -> Array:
    """W + scale A B in float32, of one matrix or of as many as the first dimensions count."""
    # HIGHEST: in the passes that TPUs and GPUs take otherwise, an export would hold other weights than were trained.
    return w + scale * jnp.einsum(_product(w, a, b), a, b, precision=jax.lax.Precision.HIGHEST)


def fold_on_host(w: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """The same in numpy."""
    lead = a.ndim + b.ndim - 2 - w.ndim
    thin = a.reshape(*a.shape[:lead], -1, a.shape[-1]) @ b.reshape(*b.shape[: lead + 1], -1)
    return w.astype(np.float32) + np.float32(scale) * thin.reshape(w.shape)


def _product(w: Any, a: Any, b: Any) -> str:
    """[lead, in, r] x [lead, r, out] -> [lead, in, out], as einsum writes it."""
    lead = a.ndim + b.ndim - 2 - w.ndim
    letters = "abcdefgh"[: w.ndim]
    first, last = letters[: a.ndim - 1], letters[a.ndim - 1 :]
    return f"{first}r,{letters[:lead]}r{last}->{letters}"


# ------------------------------------------------------------------------------------------------------ trees of arrays


def without(params: Tree) -> Tree:
    """The tree without its adapters: the weights that they stand beside. A dict that held nothing else is left out, as
    by `tuned.split`."""
    out: Tree = {}
    for key, value in params.items():
        if isinstance(value, dict):
            out |= {key: rest} if (rest := without(value)) else {}
        elif not key.endswith((A, B)):
            out[key] = value
    return out


def beneath(params: Tree, model: config.Model) -> Tree:
    """What of a tree a run with adapters reads where it began, in a folder with such a model: that may have no head."""
    return {key: value for key, value in without(params).items() if key != HEAD or model.reward_head}


def merged(params: Tree, scale: float) -> Tree:
    """The tree with its adapters folded in, and without them; in its own dtypes and places, leaf by leaf."""
    out: Tree = {}
    for key, value in params.items():
        if isinstance(value, dict):
            out[key] = merged(value, scale)
        elif key + A in params:
            out[key] = _fold_into(value, params[key + A], params[key + B], scale)
        elif not key.endswith((A, B)):
            out[key] = value
    return out


def _fold_into(w: Array, a: Array, b: Array, scale: float) -> Array:
    fn = jax.jit(lambda w, a, b: fold(w, a, b, scale).astype(w.dtype), out_shardings=w.sharding, donate_argnums=0)
    return fn(w, a, b)
