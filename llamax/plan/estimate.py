"""The same figures from formulas alone: no compiler, no devices, a second of work.

State is exact: shapes and placement are those of the run. The rest follows from what the step does; docs/how-to/plan.md
says how it compares with compiled steps.

    kept         what the forward pass leaves for the backward pass: the residual stream before every period (or layer,
                 or on the host), what attention gave where that is kept, or, with remat=none, what every matmul and
                 norm of every layer read; and the copies that the step computes with, if masters rest elsewhere
    working set  the largest of: a period's backward pass (all that its layers keep, their weights gathered, the
                 gradient of the largest), or a layer's, and the cross-entropy (the head and its gradient, gathered)

Letters as in model/count.py; c bytes of a number in the computation; N tokens of a device and a micro-batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamax import config
from llamax.kernels.cross_entropy import CHUNK
from llamax.model import count
from llamax.parallel import rules
from llamax.parallel.pipeline import Schedule
from llamax.plan import hlo


@dataclass(frozen=True)
class Memory:
    """Bytes of one device beside parameters, optimizer and gradients."""

    kept: float
    working: float


def itemsize(run: config.Run) -> int:
    return 4 if run.train.compute_dtype == "float32" else 2


def tokens_per_device(run: config.Run, mesh: Mapping[str, int]) -> float:
    """Of one micro-batch."""
    ways = math.prod(mesh.get(axis, 1) for axis in (*rules.ROWS, "context"))
    return run.data.batch_tokens / run.train.accumulate / ways


def layer_kept(model: config.Model, kind: str, c: int, tensor: int) -> float:
    """Bytes a token that one layer keeps for its backward pass.

    The residual stream (twice), its two norms in float32 and cast; queries, keys, values and the attention's output;
    of a feed-forward its two products, their product and, for experts, the sorted rows in and out.
    """
    d, heads, kv = model.dim, model.n_heads * model.head_dim / tensor, model.n_kv_heads * model.head_dim / tensor
    kept = 2 * d * c + 2 * d * c + (2 * heads + 2 * kv) * c
    if kind.endswith("+moe"):
        wide = model.expert_ffn_dim / tensor
        kept += (model.top_k * (3 * wide * c + 2 * d * c)) + model.n_shared_experts * 3 * wide * c + 4 * model.n_experts
    else:
        kept += 3 * model.dense_ffn_dim / tensor * c
    return kept


def layer_weights(model: config.Model, kind: str) -> int:
    """Weights of one layer."""
    attention = 2 * model.dim * model.head_dim * (model.n_heads + model.n_kv_heads)
    if kind.endswith("+moe"):
        each = 3 * model.dim * model.expert_ffn_dim
        return attention + model.dim * model.n_experts + each * (model.n_experts + model.n_shared_experts)
    return attention + 3 * model.dim * model.dense_ffn_dim


def memory(run: config.Run, mesh: Mapping[str, int]) -> Memory:
    """What one device needs beside its share of parameters, optimizer and gradients."""
    model, c, n = run.model, itemsize(run), tokens_per_device(run, mesh)
    tensor, expert = mesh.get("tensor", 1), mesh.get("expert", 1)
    remat = run.train.remat
    kept, working = 0.0, 0.0
    for period, repeats in model.plan:
        each = [n * layer_kept(model, kind, c, tensor) for kind in period]
        weights = [c * layer_weights(model, kind) / tensor / (expert if "moe" in kind else 1) for kind in period]
        attended = n * len(period) * model.n_heads * (model.head_dim * c + 4) / tensor
        kept += repeats * {
            "none": sum(each) + sum(weights),
            "block": len(period) * n * model.dim * c,
            "attention": n * model.dim * c + attended,
            "offload": 0.0,
        }.get(remat, n * model.dim * c)
        by_layer = remat in ("none", "block")
        working = max(working, (max(each) + max(weights) if by_layer else sum(each) + sum(weights)) + max(weights))
    head = 2 * c * model.vocab_size * model.dim / tensor + n * (4 * min(CHUNK, model.vocab_size) + 8 * model.dim)
    if run.mesh.rules == "zero" and mesh.get("data", 1) > 1:
        kept += c * count.parameters(model).total / math.prod(mesh.get(axis, 1) for axis in mesh if axis != "data")
    kept += n * (4 * model.dim + 4 * model.n_experts * sum(kind.endswith("moe") for kind in model.layers))
    return Memory(kept, max(working, head))


def flops(
    run: config.Run, tiles: int, tile: int, *, every_expert: bool = False, bubble: float = 0.0
) -> tuple[float, float]:
    """(all, recomputed) of a step on all devices; attention works in tiles of `tile` queries by as many keys.

    `every_expert`: the gradient of the experts' weights is computed from every row for every expert, most of them
    masked: what compilers for TPU make of that of `jax.lax.ragged_dot` (jax 0.10), where widths allow no other.
    `bubble`: the share of a pipeline's time in which a stage works on what nobody reads.
    """
    model, t = run.model, run.data.seq_len
    remat, attention = run.train.remat != "none", run.train.remat not in ("none", "attention")
    ran = 1 / (1 - bubble)
    matmuls = ran * 6 * (count.matmul_active(model) - model.vocab_size * model.dim) * run.data.batch_tokens
    head = 6 * model.vocab_size * model.dim * run.data.batch_tokens
    pictures = tiles * count.tile_flops(model.vision, model.dim) if model.vision and tiles else 0
    again: float = (matmuls + pictures) / 3 * remat + head / 3
    tile = min(tile, t)
    rows = -(-t // tile)
    attended = 0.0
    for kind in model.layers:
        width = rows if not kind.startswith("rope_chunk") else min(rows, -(-(model.chunk_len - 1) // tile) + 1)
        attended += sum(min(i + 1, width) for i in range(rows)) * tile**2
    attended *= ran * 2 * model.n_heads * model.head_dim * run.data.rows
    # Matmuls of attention: 2 forward, 2 again if rematted, 7 backward, of which 3 repeat what the others know.
    again += attended * (2 * attention + 3)
    masked = 0.0
    if every_expert:
        expert = ran * 2 * 3 * model.dim * model.expert_ffn_dim * run.data.batch_tokens * model.top_k
        masked = expert * (model.n_experts - 1) * sum(kind.endswith("+moe") for kind in model.layers)
    return matmuls + head + pictures + attended * 6 + masked + again, again


def exchanged(run: config.Run, mesh: Mapping[str, int], leaves: list[tuple[int, tuple]]) -> hlo.Cost:
    """What a step sends: weights gathered for the forward pass and, with remat, again for the backward pass; their
    gradients summed where they are split and over the copies. A pipeline does so for every micro-batch, and hands its
    tokens from stage to stage. `leaves`: of each parameter, its size and the mesh axes that split it."""
    c, remat = itemsize(run), run.train.remat != "none"
    rows = [axis for axis in (*rules.ROWS, "context") if mesh.get(axis, 1) > 1]
    total = hlo.Cost()
    sums: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    stages = pipeline_of(run, mesh)
    for size, split in leaves:
        times = run.train.accumulate * (stages.microbatches if "pipeline" in split else 1)
        # Experts are not gathered over the axis that splits them first; over `data` a copy is, once (place.Copies).
        experts = "expert" in split and "fsdp" not in split[: split.index("expert")]
        stay = ("expert", "data", "pipeline") if experts else ("data", "pipeline")
        gathered = tuple(axis for axis in split if axis in rows and axis not in stay)
        n = math.prod(mesh[axis] for axis in gathered)
        part = size * c / math.prod(mesh.get(axis, 1) for axis in split if axis != "data")
        if "data" in split and mesh["data"] > 1:
            once = (mesh["data"] - 1) / mesh["data"] * part
            sums["all-gather", ("data",)] += once
            sums["reduce-scatter", ("data",)] += once * run.train.accumulate
        if n > 1:
            sums["all-gather", gathered] += (n - 1) * part * (1 + remat) * times
            sums["reduce-scatter", gathered] += (n - 1) * part * times
        copies = tuple(axis for axis in rows if axis not in split)
        m = math.prod(mesh[axis] for axis in copies)
        if m > 1:
            sums["all-reduce", copies] += 2 * (m - 1) / m * part * run.train.accumulate
    if stages.stages > 1:
        handed = tokens_per_device(run, mesh) * stages.stages / stages.microbatches * run.model.dim * c
        sums["collective-permute", ("pipeline",)] += 2 * stages.ticks * handed * run.train.accumulate
    for (kind, axes), sent in sums.items():
        groups = groups_over(axes, mesh)
        exchange = hlo.Exchange(kind, in_rings(groups) if kind == "collective-permute" else groups)
        total.sent[exchange] += sent
        total.calls[exchange] += 1
    return total


def groups_over(axes: tuple[str, ...], mesh: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
    """The devices that differ along `axes` only, as flat places in the mesh."""
    names = list(mesh)
    ids = np.arange(math.prod(mesh.values())).reshape(*mesh.values())
    order = [*(i for i, a in enumerate(names) if a not in axes), *(i for i, a in enumerate(names) if a in axes)]
    groups = ids.transpose(order).reshape(-1, math.prod(mesh[a] for a in axes))
    return tuple(tuple(map(int, group)) for group in groups)


def in_rings(groups: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """(from, to) of devices that each hand on to the next of their group."""
    return tuple(pair for group in groups for pair in zip(group, (*group[1:], group[0]), strict=True))


def pipeline_of(run: config.Run, mesh: Mapping[str, int]) -> Schedule:
    """Of one stage where there is no pipeline."""
    stages = mesh.get("pipeline", 1)
    return Schedule.of(stages, run.model.plan[0][1], run.train.pipeline_microbatches if stages > 1 else 0)


def split_of(params: Any) -> list[tuple[int, tuple]]:
    """(numbers, mesh axes that split it) of every parameter of a tree of shapes with shardings."""
    import jax

    found = []
    for x in jax.tree.leaves(params):
        entries = [(e,) if isinstance(e, str) else tuple(e) for e in x.sharding.spec if e is not None]
        found.append((math.prod(x.shape), tuple(axis for entry in entries for axis in entry)))
    return found
