"""The few functions that the model is handed instead of asking which platform, mesh or precision it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jax import Array
from jax.sharding import Mesh

from llamax import config
from llamax.kernels.attention import cached_attention, pick_attention, slow_attention
from llamax.kernels.cross_entropy import cross_entropy
from llamax.kernels.grouped import Experts, pick_experts, slow_experts
from llamax.kernels.ring import Ring, ring_attention
from llamax.model.capacity import Capacity
from llamax.model.layers import as_it_is, in_order
from llamax.parallel import context, embed, expert, pipeline, place, tensor
from llamax.stripes import Stripes

EXPERT_AXES = Experts(("experts", "embed", "ffn"), ("experts", "embed", "ffn"), ("experts", "ffn", "embed"))
HEAD_AXES = ("embed", "vocab")
TABLE_AXES = ("vocab", "embed")
PLAIN = config.Train()
RING_TILE = {"cpu": 64}  # tokens of a tile in ring attention; elsewhere 512, for the matrix units


def unconstrained(x: Array, names: tuple[str | None, ...]) -> Array:
    """Leave the placement of x to the compiler: what one device needs."""
    del names
    return x


@dataclass(frozen=True)
class Seam:
    """Module-level functions or frozen dataclasses, never lambdas: two lambdas would make two graphs and two compiles.

    The defaults are the slow twins on one device; `make_seam` picks the fast ones for a platform and a mesh.
    """

    attention: Callable = slow_attention  # (q, k, v, *, q_pos, k_pos, q_seg, k_seg, local_len) -> o_BTHDh
    cached_attention: Callable = cached_attention  # (q, past k, past v, k, v, *, the same, past_pos, past_seg)
    run_experts: Callable = slow_experts  # (x_ND, experts, index_NK, gate_NK, *, gate_on) -> y_ND; index E is no expert
    capacity: Callable | None = None  # (index_BTK, real_BT, n_experts, running) -> bool [B, T, K]
    cross_entropy: Callable = cross_entropy  # (hidden_ND, head_DV, targets_N) -> nll_N, logz_N
    lookup: Callable = embed.lookup  # (table_VD, tokens_BT, dtype) -> x_BTD
    repeat: Callable = in_order  # (step, x, stacked weights, rows, remat) -> x, told
    constrain: Callable = unconstrained  # (x, logical names of its dimensions) -> x
    gathered: Callable = as_it_is  # (w, logical names of its dimensions) -> w, for a product
    tokens: context.Tokens = context.Tokens()


def make_seam(mesh: Mesh, train: config.Train = PLAIN, stripes: Stripes = place.WHOLE) -> Seam:
    """The fast functions for the mesh's platform, each device working on its own rows, and its part of the widths.

    `stripes`: how the batches' rows are cut over the axis `context`. As long as they are whole, as for sampling, the
    axis splits rows like the others.
    """
    platform = mesh.devices.flat[0].platform
    stages, whole = mesh.shape[pipeline.AXIS], stripes.n == 1
    attention: Callable = pick_attention(platform)
    if not whole:
        assert stripes.shards == mesh.shape[context.AXIS], f"{stripes} on a mesh of {dict(mesh.shape)}"
        ring = Ring(context.AXIS, stripes.shards, stripes.each, RING_TILE.get(platform, 512))
        attention = context.LocalOrRing(attention, ring_attention, ring)
    return Seam(
        attention=tensor.SplitHeads(attention, mesh, tensor.WHOLE_HEADS if whole else tensor.HEADS),
        cached_attention=place.PerShard(cached_attention, mesh, rows=place.FLAT),
        run_experts=expert.SplitExperts(
            pick_experts(platform), mesh, EXPERT_AXES, train.expert_buffer, expert.pick_exchange(platform)
        ),
        capacity=Capacity(train.expert_capacity) if train.expert_capacity else None,
        cross_entropy=tensor.SplitVocabulary(cross_entropy, mesh, HEAD_AXES),
        lookup=embed.SplitLookup(mesh, TABLE_AXES, embed.WHOLE_ROWS if whole else embed.TOKENS),
        repeat=pipeline.Pipelined(in_order, mesh, train.pipeline_microbatches) if stages > 1 else in_order,
        constrain=place.Constrain(mesh, whole),
        gathered=place.Gathered(mesh),
        tokens=context.Tokens() if whole else context.SplitTokens(mesh, stripes),
    )
