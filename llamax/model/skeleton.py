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
from llamax.model import lora, tuned
from llamax.model.llama import Llama
from llamax.model.moe import RouterBias
from llamax.model.seam import Seam

Tree = dict[str, Any]
ALL = config.Tune()  # is trained


@dataclass(frozen=True)
class Skeleton:
    """`axes`, `kinds` and `trained` have the structure of `params`: logical axis names; matrix | embedding | norm |
    bias | adapter; whether a run trains it."""

    graph: nnx.GraphDef  # tells two skeletons apart; hashable, so a skeleton may be a static argument of a jit
    make: Callable[..., Llama] = field(compare=False)
    axes: Tree = field(compare=False)
    kinds: Tree = field(compare=False)
    trained: Tree = field(compare=False)
    bias_axes: Tree = field(compare=False)
    plain: nnx.GraphDef | None = field(compare=False, default=None)  # of the model without adapters, if it has some

    def bind(self, params: Tree, router_bias: Tree, *, adapters: bool = True) -> Llama:
        """A usable model around the arrays (or tracers) given. `adapters=False`: what they stand beside, as if there
        were none: of a run that trains adapters alone, the model that it began with, and no second copy of it."""
        if adapters or self.plain is None:
            return nnx.merge(self.graph, nnx.State(params), nnx.State(router_bias))
        return nnx.merge(self.plain, nnx.State(lora.without(params)), nnx.State(router_bias))

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh (params, router_bias); call it under one jit."""
        _, params, bias = nnx.split(self.make(rngs=nnx.Rngs(key)), nnx.Param, RouterBias)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(bias)

    def reference(self, params: Tree, own: Tree, router_bias: Tree) -> Llama:
        """The model that a run is measured against: `own` in the place of what is trained of `params`, no adapters, the
        rest the same. No gradient goes there."""
        whole = merged(own, self.split(params)[1])
        return self.bind(jax.lax.stop_gradient(whole), router_bias, adapters=False)

    def own(self, params: Tree) -> Tree:
        """What a reference has for its own: what is trained of `params`, and no adapter."""
        return lora.without(self.split(params)[0])

    def split(self, tree: Tree) -> tuple[Tree, Tree]:
        """A tree with the structure of `params` as two: of what is trained, and of what is frozen."""
        return tuned.split(tree, self.trained)

    def kept(self, params: Tree) -> Tree:
        """What a checkpoint holds of the parameters: all; of a model with adapters, what is trained. The rest is where
        the run began."""
        return params if self.plain is None else self.split(params)[0]

    def shapes(self) -> tuple[Tree, Tree]:
        """(params, router_bias) as ShapeDtypeStructs, nothing allocated."""
        return jax.eval_shape(self.init, jax.random.key(0))


def skeleton(
    model: config.Model, seam: Seam, *, patch_id: int, train: config.Train, tune: config.Tune = ALL
) -> Skeleton:
    """`tune`: what of it is trained. ConfigError if its rules do not suit the model."""
    dtype = np.dtype("float32") if train.compute_dtype == "float32" else jax.numpy.bfloat16
    make = partial(Llama, model, seam, patch_id=patch_id, dtype=dtype, remat=train.remat)
    plain = None
    if tune.lora_rank:
        plain, *_ = _parts(make)
        make = partial(lora.beside, make, tune)
    graph, params, bias = _parts(make)
    axes = facts(params, "axes")
    trained = tuned.trained(tune, axes)
    return Skeleton(graph, make, axes, facts(params, "kind"), trained, facts(bias, "axes"), plain)


def _parts(make: Callable[..., Llama]) -> Any:
    """(graph, params, router_bias) of a model without its arrays."""
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.Param, RouterBias)


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
