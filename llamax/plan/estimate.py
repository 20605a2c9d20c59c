"""The same figures from formulas alone: no compiler, no devices, a second of work.

State is exact: shapes and placement are those of the run. The rest follows from what the step does; docs/how-to/plan.md
says how it compares with compiled steps.

    kept         what the forward pass leaves for the backward pass: the residual stream before every rematted part (a
                 period or a layer), or, with remat=none, what every matmul and norm of every layer read; the same of
                 the vision encoder's layers
    working set  the largest of: a rematted part's backward pass (all that its layers keep, their weights gathered, the
                 gradients of the largest layer, the weights of one more, gathered ahead, and the buffer's second pass),
                 and the cross-entropy (the head and its gradient, gathered)

Letters as in model/count.py; c bytes of a number in the computation; N tokens of a device and a micro-batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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


@dataclass(frozen=True)
class Layer:
    """What one layer needs of a device, in bytes."""

    kept: float  # for its backward pass: what its matmuls and norms read
    over: float  # while a further pass of its experts (expert.py) is differentiated
    weights: float  # gathered


def layer(run: config.Run, mesh: Mapping[str, int], kind: str) -> Layer:
    """The residual stream (twice), its two norms; queries, keys, values and the attention's output; of a feed-forward
    its two products, and their product. Experts work on a buffer of rows; their products are float32."""
    model, c, n = run.model, itemsize(run), tokens_per_device(run, mesh)
    d, tensor, expert = model.dim, mesh.get("tensor", 1), mesh.get("expert", 1)
    heads, kv = model.n_heads * model.head_dim / tensor, model.n_kv_heads * model.head_dim / tensor
    kept = n * c * (4 * d + 2 * heads + 2 * kv)
    attention = 2 * d * (heads + kv)
    if not kind.endswith("+moe"):
        wide = model.dense_ffn_dim / tensor
        return Layer(kept + 3 * n * wide * c, 0.0, c * (attention + 3 * d * wide))
    wide, own = model.expert_ffn_dim / tensor, model.n_experts / expert
    passed = min(run.train.expert_buffer, expert) if expert > 1 else 1.0
    rows = n * model.top_k * passed
    experts = rows * (wide * (4 + 4 + c) + 2 * d * c)
    kept += experts + n * (model.n_shared_experts * 3 * wide * c + 4 * model.n_experts)
    weights = attention + d * model.n_experts + 3 * d * wide * (own + model.n_shared_experts)
    # The same rows again, the gradients of their products, and the loop's own weights and sums of their gradients.
    over = experts + rows * wide * (4 + 4 + c) + 2 * c * 3 * d * wide * own
    return Layer(kept, over if passed < expert else 0.0, c * weights)


def memory(run: config.Run, mesh: Mapping[str, int], tiles: int = 0) -> Memory:
    """What one device needs beside its share of parameters, optimizer and gradients. `tiles`: of all rows of a step."""
    model, c, n = run.model, itemsize(run), tokens_per_device(run, mesh)
    remat = run.train.remat
    kept, working = 0.0, 0.0
    for period, repeats in model.plan:
        layers = [layer(run, mesh, kind) for kind in period]
        inputs = {"none": 0, "block": len(period), "period": 1, "attention": 1, "offload": 0}[remat]
        attended = 2 * c * n * model.n_heads * model.head_dim / mesh.get("tensor", 1) * len(period)
        kept += repeats * (inputs * n * model.dim * c + attended * (remat == "attention"))
        whole = [sum(part.kept for part in layers), sum(part.weights for part in layers)]
        most = [max(part.kept for part in layers), max(part.weights for part in layers)]
        if remat == "none":
            kept += repeats * sum(whole)
        now = sum(whole) if remat in ("period", "attention", "offload") else sum(most)
        ahead = most[1] if math.prod(mesh.get(axis, 1) for axis in ("fsdp", "context")) > 1 else 0.0
        working = max(working, now + most[1] + ahead + max(part.over for part in layers))
    head = model.vocab_size * model.dim / mesh.get("tensor", 1)
    scored = 2 * c * head + n * (4 * min(CHUNK, model.vocab_size) + 8 * model.dim)
    kept += n * (4 * model.dim + 4 * model.n_experts * sum(kind.endswith("moe") for kind in model.layers))
    kept += _seen(run, mesh, tiles)
    if run.mesh.rules == "zero" and mesh.get("data", 1) > 1:  # the copies that a step computes with
        kept += c * count.parameters(model).total / math.prod(n for axis, n in mesh.items() if axis != "data")
    return Memory(kept, max(working, scored))


def cast(run: config.Run, parameters: float) -> float:
    """Bytes of the weights of all layers as the loop over them reads them, cast before it begins."""
    return parameters * itemsize(run) / 4 if run.train.compute_dtype != "float32" else 0.0


def _seen(run: config.Run, mesh: Mapping[str, int], tiles: int) -> float:
    """Bytes that the vision encoder's layers keep: their inputs, or all that they read."""
    vision = run.model.vision
    if not tiles or vision is None or vision.encoder == "linear":
        return 0.0
    here = tiles / run.train.accumulate / math.prod(mesh.get(axis, 1) for axis in (*rules.ROWS, "context"))
    inputs = here * (vision.grid**2 + 1) * vision.dim * itemsize(run) * vision.n_layers
    return inputs * (1 if run.train.remat != "none" else 8 + 2 * vision.ffn_dim / vision.dim)


def flops(
    run: config.Run, tiles: int, tile: int, *, every_expert: bool = False, context: int = 1, bubble: float = 0.0
) -> tuple[float, float]:
    """(all, recomputed) of a step on all devices; attention works in tiles of `tile` queries by as many keys.

    `context`: parts of a row: local layers attend within one, the others round the ring.

    `every_expert`: the gradient of the experts' weights is computed from every row for every expert, most of them
    masked: what compilers for TPU make of that of `jax.lax.ragged_dot` (jax 0.10), where widths allow no other.
    `bubble`: the share of a pipeline's time in which a stage works on what nobody reads.
    """
    model, t = run.model, run.data.seq_len
    remat = run.train.remat != "none"
    ran = 1 / (1 - bubble)
    matmuls = ran * 6 * (count.matmul_active(model) - model.vocab_size * model.dim) * run.data.batch_tokens
    head = 6 * model.vocab_size * model.dim * run.data.batch_tokens
    pictures = tiles * count.tile_flops(model.vision, model.dim) if model.vision and tiles else 0
    again: float = (matmuls + pictures) / 3 * remat + head / 3 - ran * _last(run)
    attended = 0.0
    rematted = 2 if remat and run.train.remat != "attention" else 0
    for kind in model.layers:
        local = kind.startswith("rope_chunk")
        parts = context if local else 1
        c = min(tile, t // parts)
        n = -(-t // parts // c)
        width = min(n, -(-(model.chunk_len - 1) // c) + 1) if local else n
        here: float = parts * sum(min(i + 1, width) for i in range(n)) * c**2
        here *= ran * 2 * model.n_heads * model.head_dim * run.data.rows
        attended += here
        # Matmuls of attention: 2 forward, 2 again with remat, 7 backward, of which 3 repeat what the others know; in
        # the ring 5, of which 1 does.
        again += here * (rematted + (3 if local or context == 1 else 1))
    masked = 0.0
    if every_expert:
        expert = ran * 2 * 3 * model.dim * model.expert_ffn_dim * run.data.batch_tokens * model.top_k
        masked = expert * (model.n_experts - 1) * sum(kind.endswith("+moe") for kind in model.layers)
    return matmuls + head + pictures + attended * 6 + masked + again, again


def _last(run: config.Run) -> float:
    """FLOPs of what a rematted part need not compute again: its last matmul, whose result nobody reads then."""
    model = run.model

    def down(kind: str) -> float:
        used = model.top_k + model.n_shared_experts
        return 2 * model.dim * (model.expert_ffn_dim * used if kind.endswith("+moe") else model.dense_ffn_dim)

    last = {"none": lambda period: [], "block": lambda period: period}.get(run.train.remat, lambda period: period[-1:])
    each = sum(repeats * sum(down(kind) for kind in last(period)) for period, repeats in model.plan)
    return each * run.data.batch_tokens


class Leaf(NamedTuple):
    """A parameter, as far as its exchange goes."""

    size: int  # numbers
    split: tuple[str, ...]  # mesh axes
    stays: tuple[str, ...] = ()  # of these, those along which tokens travel instead: of experts, and of embeddings
    once: bool = False  # gathered once: the head's, which is no part of what is rematted
    trained: bool = True  # else it has no gradient to be summed


def exchanged(run: config.Run, mesh: Mapping[str, int], leaves: list[Leaf], *, least: bool = False) -> hlo.Cost:
    """What a step sends: weights gathered for the forward pass and, with remat, again for the backward pass; their
    gradients summed where they are split and over the copies; tokens that travel to their experts, and embeddings;
    sums of activations over `tensor`; keys and values round the ring of `context`. A pipeline gathers for every
    micro-batch, and hands its tokens from stage to stage.

    `least`: without the activations that are only sent to be computed again, the theoretical minimum of a mesh.
    """
    c, remat = itemsize(run), run.train.remat != "none"
    rows = [axis for axis in (*rules.ROWS, "context") if mesh.get(axis, 1) > 1]
    total = hlo.Cost()
    sums: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    stages = pipeline_of(run, mesh)
    for size, split, stays, alone, trained in leaves:
        often = run.train.accumulate * (stages.microbatches if "pipeline" in split else 1)
        gathered = tuple(axis for axis in split if axis in rows and axis not in (*stays, "data", "pipeline"))
        n = math.prod(mesh[axis] for axis in gathered)
        part = size * c / math.prod(mesh.get(axis, 1) for axis in split if axis != "data")
        if "data" in split and mesh["data"] > 1:  # over `data` a copy is gathered, once a step (place.Copies)
            once = (mesh["data"] - 1) / mesh["data"] * part
            sums["all-gather", ("data",)] += once
            sums["reduce-scatter", ("data",)] += once * run.train.accumulate * trained
        if n > 1:
            twice = (remat or least) and not alone
            sums["all-gather", gathered] += (n - 1) * part * (2 if twice else 1) * often
            sums["reduce-scatter", gathered] += (n - 1) * part * often * trained
        copies = tuple(axis for axis in rows if axis not in split)
        m = math.prod(mesh[axis] for axis in copies)
        if m > 1:
            sums["all-reduce", copies] += 2 * (m - 1) / m * part * run.train.accumulate * trained
    if stages.stages > 1:
        handed = tokens_per_device(run, mesh) * stages.stages / stages.microbatches * run.model.dim * c
        sums["collective-permute", ("pipeline",)] += 2 * stages.ticks * handed * run.train.accumulate
    for key, sent in _travelling(run, mesh, least).items():
        sums[key] += sent * run.train.accumulate
    for (kind, axes), sent in sums.items():
        groups = groups_over(axes, mesh)
        exchange = hlo.Exchange(kind, in_rings(groups) if kind == "collective-permute" else groups)
        total.sent[exchange] += sent
        total.calls[exchange] += 1
    return total


def _travelling(run: config.Run, mesh: Mapping[str, int], least: bool) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes of activations that one device sends in a micro-batch, by kind and axes."""
    model, c, n = run.model, itemsize(run), tokens_per_device(run, mesh)
    remat, stream = "none" if least else run.train.remat, n * model.dim * c
    expert, tensor, context = (mesh.get(axis, 1) for axis in ("expert", "tensor", "context"))
    sums: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    for period, repeats in model.plan:
        moe = [kind.endswith("+moe") for kind in period]
        # There and back, forward and backward; again there, and back too unless the rematted part ends with it.
        again = {"none": 0, "block": sum(moe)}.get(remat, 2 * sum(moe) - moe[-1])
        if expert > 1 and model.n_experts % expert == 0:
            trips = 4 * sum(moe) + again
            sums["all-to-all", ("expert",)] += repeats * trips * stream * model.top_k * (expert - 1) / expert
        if tensor > 1:
            # After attention and after each feed-forward, and of their inputs' gradients; experts sum in float32.
            each = len(period) * (4 + (remat != "none")) + sum(moe) * (2 + (remat != "none")) * 4 / c
            sums["all-reduce", ("tensor",)] += repeats * each * stream * 2 * (tensor - 1) / tensor
        if context > 1:
            whole = sum(not kind.startswith("rope_chunk") for kind in period)
            keys = 2 * n * model.n_kv_heads * model.head_dim / tensor
            turns = (context - 1) * (c * (1 + (remat not in ("none", "attention"))) + c + 4)
            sums["collective-permute", ("context",)] += repeats * whole * keys * turns
    width = tuple(axis for axis in (*rules.ROWS, "context") if mesh.get(axis, 1) > 1 and axis in ("fsdp", "context"))
    ways = math.prod(mesh[axis] for axis in width)
    if ways > 1:
        sums["all-to-all", width] += 2 * stream * (ways - 1) / ways  # embeddings, and their gradient
    return sums


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


def split_of(params: Any, names: Any, trained: Any, *, pictures: bool = True) -> list[Leaf]:
    """Every parameter of a tree of shapes with shardings; `names`: the same tree with their logical axes; `trained`:
    with whether it is. Without `pictures`, those of the vision side are left out: such a step has no use for them."""
    import jax

    found = []
    told = jax.tree.leaves(names, is_leaf=_is_axes), jax.tree.leaves(trained)
    for (path, x), axes, learns in zip(jax.tree_util.tree_leaves_with_path(params), *told, strict=True):
        if not pictures and path[0].key in ("vision", "projector"):
            continue
        spec = (*x.sharding.spec, *(None for _ in range(len(axes) - len(x.sharding.spec))))
        entries = [(e,) if isinstance(e, str) else tuple(e or ()) for e in spec]
        split = tuple(axis for entry in entries for axis in entry)
        of_experts = entries[axes.index("experts")] if "experts" in axes else ()
        stays = split if axes == ("vocab", "embed") else of_experts
        found.append(Leaf(math.prod(x.shape), split, stays, axes == ("embed", "vocab"), learns))
    return found


def _is_axes(value: Any) -> bool:
    return isinstance(value, tuple)
