"""The decoder's layers: segments, each a period of blocks repeated by one `jax.lax.scan` over stacked weights.

A block: h = x + Attention(RMSNorm(x)); out = h + FFN(RMSNorm(h)). Which kind each is comes from the plan: it is data.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from llamax import config
from llamax.model.attention import Attention, Places
from llamax.model.layers import RMSNorm, SwiGLU, mean_square, scan, stacked
from llamax.model.moe import MoE, Routing
from llamax.model.seam import Seam

ROWS = ("rows", "tokens", None)


class Trace(NamedTuple):
    """What the layers tell of themselves, in layer order."""

    energy: Array  # float32 [L, B]: mean square of the residual stream after each layer, summed over real tokens
    routing: Routing | None  # of the MoE layers; None if there is none
    vision_energy: Array | None = None  # float32 [vision layers, B]: the same, summed over the row's tiles


class Block(nnx.Module):
    def __init__(self, model: config.Model, kind: str, seam: Seam, *, rngs: nnx.Rngs):
        attention, ffn = kind.split("+")
        # Outputs into the residual stream start smaller the deeper the stack, so that its variance stays of order one.
        gain = 1 / math.sqrt(2 * len(model.layers))
        self.seam = seam
        self.attention_norm = RMSNorm(model.dim, model.norm_eps)
        self.attention = Attention(model, attention, seam, out_gain=gain, rngs=rngs)
        self.ffn_norm = RMSNorm(model.dim, model.norm_eps)
        if ffn == "moe":
            self.moe = MoE(model, seam, out_gain=gain, rngs=rngs)
        else:
            self.dense = SwiGLU(model.dim, model.dense_ffn_dim, out_gain=gain, rngs=rngs)

    def __call__(self, x_BTD: Array, at: Places) -> tuple[Array, Array, Routing | None]:
        """The residual stream after it, its energy [B], and the routing of a MoE block."""
        x_BTD = self.seam.constrain(x_BTD + self.attention(self.attention_norm(x_BTD), at), ROWS)
        h_BTD = self.ffn_norm(x_BTD)
        y_BTD, routing = self.moe(h_BTD) if hasattr(self, "moe") else (self.dense(h_BTD), None)
        x_BTD = self.seam.constrain(x_BTD + y_BTD, ROWS)
        return x_BTD, energy(x_BTD, at.segments > 0), routing


def energy(x_BTD: Array, real_BT: Array) -> Array:
    """float32 [B]: the sum over real tokens of mean_d x^2."""
    return jnp.sum(jnp.where(real_BT, mean_square(x_BTD), 0.0), axis=-1)


class Period(nnx.Module):
    """The blocks that repeat. Returns the energies of its blocks and the routings of its MoE blocks, in order."""

    def __init__(self, model: config.Model, kinds: tuple[str, ...], seam: Seam, *, rngs: nnx.Rngs):
        self.slots = tuple(f"slot{i}" for i in range(len(kinds)))
        for slot, kind in zip(self.slots, kinds, strict=True):
            setattr(self, slot, Block(model, kind, seam, rngs=rngs))

    def __call__(self, x_BTD: Array, at: Places) -> tuple[Array, tuple[list[Array], list[Routing]]]:
        energies, routings = [], []
        for slot in self.slots:
            x_BTD, energy_B, routing = getattr(self, slot)(x_BTD, at)
            energies.append(energy_B)
            if routing is not None:
                routings.append(routing)
        return x_BTD, (energies, routings)


class Stack(nnx.Module):
    def __init__(self, model: config.Model, seam: Seam, *, remat: bool, rngs: nnx.Rngs):
        self.remat = remat
        self.segments = tuple(f"segment{i}" for i in range(len(model.plan)))
        for segment, (kinds, repeats) in zip(self.segments, model.plan, strict=True):
            setattr(self, segment, stacked(partial(Period, model, kinds, seam), repeats, rngs))

    def __call__(self, x_BTD: Array, at: Places) -> tuple[Array, Trace]:
        """x after the last layer, and what the layers tell."""
        energies, routings = [], []
        for segment in self.segments:
            x_BTD, (energy, routing) = scan(getattr(self, segment), x_BTD, at, remat=self.remat)
            energies.append(in_layer_order(energy))
            if routing:
                routings.append(in_layer_order(routing))
        return x_BTD, Trace(joined(energies), joined(routings) if routings else None)


def in_layer_order(slots: list) -> Any:
    """Trees [repeats, ...], one for each slot of a period -> one tree [repeats * slots, ...]."""
    return jax.tree.map(lambda *xs: jnp.stack(xs, 1).reshape(-1, *xs[0].shape[1:]), *slots)


def joined(segments: list) -> Any:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *segments)


def moe_slots(plan: tuple) -> dict[tuple[str, str], list[int]]:
    """(segment, slot) of the parameter tree -> which of the MoE layers, in layer order, its repeats are."""
    found: dict[tuple[str, str], list[int]] = {}
    first = 0
    for s, (kinds, repeats) in enumerate(plan):
        slots = [i for i, kind in enumerate(kinds) if kind.endswith("+moe")]
        for nth, i in enumerate(slots):
            found[f"segment{s}", f"slot{i}"] = [first + repeat * len(slots) + nth for repeat in range(repeats)]
        first += repeats * len(slots)
    return found
