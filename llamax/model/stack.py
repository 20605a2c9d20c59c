"""The decoder's layers: segments, each a period of blocks repeated by one `jax.lax.scan` over stacked weights.

A block: h = x + Attention(RMSNorm(x)); out = h + FFN(RMSNorm(h)). Which kind each is comes from the plan: it is data.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from llamax import config
from llamax.model.attention import Attention, Places
from llamax.model.layers import RMSNorm, SwiGLU, scan, stacked
from llamax.model.moe import MoE, Routing
from llamax.model.seam import Seam

ROWS = ("rows", "tokens", None)


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

    def __call__(self, x_BTD: Array, at: Places) -> tuple[Array, Routing | None]:
        x_BTD = self.seam.constrain(x_BTD + self.attention(self.attention_norm(x_BTD), at), ROWS)
        h_BTD = self.ffn_norm(x_BTD)
        y_BTD, routing = self.moe(h_BTD) if hasattr(self, "moe") else (self.dense(h_BTD), None)
        return self.seam.constrain(x_BTD + y_BTD, ROWS), routing


class Period(nnx.Module):
    """The blocks that repeat. Returns the routing of its MoE blocks, in order."""

    def __init__(self, model: config.Model, kinds: tuple[str, ...], seam: Seam, *, rngs: nnx.Rngs):
        self.slots = tuple(f"slot{i}" for i in range(len(kinds)))
        for slot, kind in zip(self.slots, kinds, strict=True):
            setattr(self, slot, Block(model, kind, seam, rngs=rngs))

    def __call__(self, x_BTD: Array, at: Places) -> tuple[Array, list[Routing]]:
        routings = []
        for slot in self.slots:
            x_BTD, routing = getattr(self, slot)(x_BTD, at)
            if routing is not None:
                routings.append(routing)
        return x_BTD, routings


class Stack(nnx.Module):
    def __init__(self, model: config.Model, seam: Seam, *, remat: bool, rngs: nnx.Rngs):
        self.remat = remat
        self.segments = tuple(f"segment{i}" for i in range(len(model.plan)))
        for segment, (kinds, repeats) in zip(self.segments, model.plan, strict=True):
            setattr(self, segment, stacked(partial(Period, model, kinds, seam), repeats, rngs))

    def __call__(self, x_BTD: Array, at: Places) -> tuple[Array, Routing | None]:
        """x after the last layer, and the routing of all MoE layers stacked in layer order (None if there is none)."""
        per_segment: list[Routing] = []
        for segment in self.segments:
            x_BTD, routings = scan(getattr(self, segment), x_BTD, at, remat=self.remat)
            if routings:
                # [repeats, ...] per MoE slot -> [repeats * slots, ...], layer order
                ordered = jax.tree.map(lambda *slots: jnp.stack(slots, 1).reshape(-1, *slots[0].shape[1:]), *routings)
                per_segment.append(ordered)
        if not per_segment:
            return x_BTD, None
        return x_BTD, jax.tree.map(lambda *parts: jnp.concatenate(parts), *per_segment)
