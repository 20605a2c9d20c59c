"""Block by block: the gradient's size, the routers' biases moved, and norms for people."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llamax.losses import router
from llamax.model.stack import moe_slots


def gradient_squares(grads: dict[str, Any], plan: tuple) -> dict[str, Array]:
    """Sums of squares, float32, by block: "layer" [L] in layer order, "vision" [vision layers], and a number for each
    part of the model that is no block (embed, head, ..., vision_rest). What is frozen is in none: a layer of which
    nothing is trained has 0, and a part is left out."""

    def squares(tree: Any, keep: int) -> Array:
        """Over all but the first `keep` dimensions."""
        leaves = [
            jnp.sum(jnp.square(x), axis=tuple(range(keep, x.ndim)), dtype=jnp.float32) for x in jax.tree.leaves(tree)
        ]
        return sum(leaves[1:], leaves[0])

    out: dict[str, Array] = {}
    for name, tree in grads.items():
        if name == "stack":
            segments = []
            for s, (kinds, repeats) in enumerate(plan):
                trained = [tree.get(f"segment{s}", {}).get(f"slot{i}") for i in range(len(kinds))]
                slots = [jnp.zeros(repeats, jnp.float32) if slot is None else squares(slot, 1) for slot in trained]
                segments.append(jnp.stack(slots, 1).reshape(-1))
            out["layer"] = jnp.concatenate(segments)
        elif name == "vision":
            if "blocks" in tree:  # linear patches have none
                out["vision"] = squares(tree["blocks"], 1)
            rest = {key: part for key, part in tree.items() if key != "blocks"}
            if rest:
                out["vision_rest"] = squares(rest, 0)
        else:
            out[name] = squares(tree, 0)
    return out


def move_biases(router_bias: Any, loads_LE: Array, plan: tuple, rate: float, update: str, grads: Any) -> Any:
    """The routers' biases after a step with these loads; same tree. The bias of a frozen router, which has no gradient
    in `grads`, stays."""
    slots = moe_slots(plan)

    def move(path: tuple, bias_RE: Array) -> Array:
        # ("stack", segment, slot, "moe", "router_bias")
        layer = functools.reduce(lambda tree, key: tree.get(key.key, {}), path[:-1], grads)
        if "router" not in layer:
            return bias_RE
        layers = jnp.array(slots[path[1].key, path[2].key])
        return router.bias_step(bias_RE, loads_LE[layers], rate, update)

    return jax.tree.map_with_path(move, router_bias)


def norms(got: Any, tokens: int, tiles: int) -> dict[str, float]:
    """Of a step: norms/gradient/BLOCK, before clipping, and norms/activation/layer_07, .../vision_03: the root
    mean square of the residual stream after that layer, over the step's real tokens, and over its picture tiles."""
    squares, energy_L, vision_L = jax.device_get((got.grad_squares, got.energy, got.vision_energy))
    out: dict[str, float] = {}
    for block, values in squares.items():
        if np.ndim(values):
            out |= {f"norms/gradient/{block}_{i:02d}": float(np.sqrt(x)) for i, x in enumerate(values)}
        else:
            out[f"norms/gradient/{block}"] = float(np.sqrt(values))
    for block, energies, n in (("layer", energy_L, tokens), ("vision", [] if vision_L is None else vision_L, tiles)):
        out |= {f"norms/activation/{block}_{i:02d}": float(np.sqrt(x / max(n, 1))) for i, x in enumerate(energies)}
    return out
