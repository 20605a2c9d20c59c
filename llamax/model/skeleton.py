"""The door between NNX modules and plain pytrees: a model without its arrays.

Inside, modules. Outside, `params` and `router_bias` are nested dicts of arrays: what jit, grad, scan, optax and Orbax
see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from llamax import config
from llamax.config_dict import merged
from llamax.model import tuned
from llamax.model.llama import Llama
from llamax.model.moe import RouterBias
from llamax.model.seam import Seam

Tree = dict[str, Any]
ALL = config.Tune()  # is trained


@dataclass(frozen=True)
class Skeleton:
    """`axes`, `kinds` and `trained` have the structure of `params`: logical axis names; matrix | embedding | norm |
    bias; whether a run trains it."""

    graph: nnx.GraphDef  # tells two skeletons apart; hashable, so a skeleton may be a static argument of a jit
    make: Callable[..., Llama] = field(compare=False)
    axes: Tree = field(compare=False)
    kinds: Tree = field(compare=False)
    trained: Tree = field(compare=False)
    bias_axes: Tree = field(compare=False)

    def bind(self, params: Tree, router_bias: Tree) -> Llama:
        """A usable model around the arrays (or tracers) given."""
        return nnx.merge(self.graph, nnx.State(params), nnx.State(router_bias))

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh (params, router_bias); call it under one jit."""
        _, params, bias = nnx.split(self.make(rngs=nnx.Rngs(key)), nnx.Param, RouterBias)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(bias)

    def reference(self, params: Tree, others: Tree, router_bias: Tree) -> Llama:
        """A model with `others` in the place of what is trained of `params`; the rest is the same. No gradient goes
        there."""
        return self.bind(jax.lax.stop_gradient(merged(others, self.split(params)[1])), router_bias)

    def split(self, tree: Tree) -> tuple[Tree, Tree]:
        """A tree with the structure of `params` as two: of what is trained, and of what is frozen."""
        return tuned.split(tree, self.trained)

    def shapes(self) -> tuple[Tree, Tree]:
        """(params, router_bias) as ShapeDtypeStructs, nothing allocated."""
        return jax.eval_shape(self.init, jax.random.key(0))


def skeleton(
    model: config.Model, seam: Seam, *, patch_id: int, train: config.Train, tune: config.Tune = ALL
) -> Skeleton:
    """`tune`: what of it is trained. ConfigError if its rules do not suit the model."""
    dtype = np.dtype("float32") if train.compute_dtype == "float32" else jax.numpy.bfloat16
    make = partial(Llama, model, seam, patch_id=patch_id, dtype=dtype, remat=train.remat)
    graph, params, bias = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.Param, RouterBias)
    axes = facts(params, "axes")
    return Skeleton(graph, make, axes, facts(params, "kind"), tuned.trained(tune, axes), facts(bias, "axes"))


def facts(state: nnx.State, name: str) -> Tree:
    """The metadata `name` of every variable, as a tree of the state's structure."""
    flat = nnx.to_flat_state(state)
    tree: Tree = {}
    for path, variable in zip(flat.paths, flat.leaves, strict=True):
        at = tree
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = variable.get_metadata(name)
    return tree
