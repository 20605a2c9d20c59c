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
from llamax.model.cache import KV, Layers
from llamax.model.layers import RMSNorm, SwiGLU, in_order, mean_square, scan, stacked
from llamax.model.lora import folding
from llamax.model.moe import MoE, Routing
from llamax.model.remat import block
from llamax.model.seam import Seam

ROWS = ("rows", "tokens", None)


class Trace(NamedTuple):
    """What the layers tell of themselves, in layer order."""

    energy: Array  # float32 [L, B]: mean square of the residual stream after each layer, summed over real tokens
    routing: Routing | None  # of the MoE layers; None if there is none
    vision_energy: Array | None = None  # float32 [vision layers, B]: the same, summed over the row's tiles


class Block(nnx.Module):
    adapted = False  # whether there are adapters beside its matrices (lora.py)

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
            self.dense = SwiGLU(model.dim, model.dense_ffn_dim, seam.gathered, out_gain=gain, rngs=rngs)

    def __call__(self, x_BTD: Array, at: Places, past: KV | None = None) -> tuple[Array, Array, Routing | None, KV]:
        """The residual stream after it, its energy [B], the routing of a MoE block, and what a cache keeps."""
        o_BTD, new = self.attention(self.attention_norm(x_BTD), at, past)
        x_BTD = self.seam.constrain(x_BTD + o_BTD, ROWS)
        h_BTD = self.ffn_norm(x_BTD)
        y_BTD, routing = self.moe(h_BTD, at.segments > 0) if hasattr(self, "moe") else (self.dense(h_BTD), None)
        x_BTD = self.seam.constrain(x_BTD + y_BTD, ROWS)
        return x_BTD, energy(x_BTD, at.segments > 0), routing, new


def energy(x_BTD: Array, real_BT: Array) -> Array:
    """float32 [B]: the sum over real tokens of mean_d x^2."""
    return jnp.sum(jnp.where(real_BT, mean_square(x_BTD), 0.0), axis=-1)


class Told(NamedTuple):
    """What the blocks of a period return beside the residual stream."""

    energy: list[Array]
    routing: list[Routing]  # of its MoE blocks
    new: dict[str, KV]  # by slot, for a cache; empty if none is kept


class Period(nnx.Module):
    """The blocks that repeat."""

    def __init__(self, model: config.Model, kinds: tuple[str, ...], seam: Seam, *, remat: str, rngs: nnx.Rngs):
        self.remat = remat
        self.slots = tuple(f"slot{i}" for i in range(len(kinds)))
        for slot, kind in zip(self.slots, kinds, strict=True):
            setattr(self, slot, Block(model, kind, seam, rngs=rngs))

    def __call__(
        self, x_BTD: Array, at: Places, past: dict[str, KV] | None = None, *, keep: bool = False
    ) -> tuple[Array, Told]:
        told = Told([], [], {})
        for slot in self.slots:
            run = block(folding(getattr(self, slot)), self.remat)
            x_BTD, energy_B, routing, new = run(x_BTD, at, past and past[slot])
            told.energy.append(energy_B)
            if routing is not None:
                told.routing.append(routing)
            if keep:
                told.new[slot] = new
        return x_BTD, told


class Stack(nnx.Module):
    def __init__(self, model: config.Model, seam: Seam, *, remat: str, rngs: nnx.Rngs):
        self.remat, self.seam = remat, seam
        self.segments = tuple(f"segment{i}" for i in range(len(model.plan)))
        for segment, (kinds, repeats) in zip(self.segments, model.plan, strict=True):
            setattr(self, segment, stacked(partial(Period, model, kinds, seam, remat=remat), repeats, rngs))

    def __call__(
        self, x_BTD: Array, at: Places, *, keep: bool = False, past: Layers | None = None
    ) -> tuple[Array, Trace, Layers]:
        """x after the last layer; what the layers tell; and, to `keep`, the keys and values of x. `past`: those before
        it, at the places that `at` tells."""
        energies, routings, new = [], [], {}
        run = in_order if keep else self.seam.repeat
        for segment in self.segments:
            each = () if past is None else (past[segment],)
            x_BTD, told = scan(getattr(self, segment), x_BTD, at, remat=self.remat, each=each, run=run, keep=keep)
            energies.append(in_layer_order(told.energy))
            if told.routing:
                routings.append(in_layer_order(told.routing))
            new[segment] = told.new
        return x_BTD, Trace(joined(energies), joined(routings) if routings else None), new


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
