"""What one step, and five, of a run give on a mesh, and a batch on which another order of sums cannot move a route.

The real training step with plain SGD; `optax.trace` without decay keeps the gradient in the optimizer's state, so the
compiled program is the one that trains, its places pinned. Choosing experts is not continuous: a token whose k-th and
k+1-th best logits nearly tie may go either way after a rounding. Only rows without such tokens are taken.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from llamax import config, stripes, variants
from llamax.batch import Batch
from llamax.data import pipeline
from llamax.data.tokenizer import Tokenizer
from llamax.model import lora
from llamax.model.score import score
from llamax.model.seam import make_seam
from llamax.model.skeleton import Skeleton, skeleton
from llamax.parallel import place
from llamax.parallel.mesh import make_mesh
from llamax.train.programs import build
from llamax.train.state import init
from tests.runs import tiny_run

ALL = config.Tune()  # is trained
MARGIN = 1e-3  # least distance of the k-th best router logit from the next
STEPS = 5
LR = 0.001  # small, so that what was no tie in the first step is none in the fifth
MOST_WINDOWS = 60  # batches that rows are looked for in
SGD = optax.chain(optax.trace(decay=0.0), optax.scale(-LR))  # the trace is the last gradient

SHAPES = {
    "scout": dict(plan=((variants.SCOUT_PERIOD, 1),), top_k=1, qk_norm=True),
    "scout top-2": dict(plan=((variants.SCOUT_PERIOD, 1),), top_k=2, qk_norm=True),
    "maverick": dict(plan=((variants.MAVERICK_PERIOD, 1),), top_k=1, qk_norm=False),
    "maverick top-2": dict(plan=((variants.MAVERICK_PERIOD, 1),), top_k=2, qk_norm=False),
}


def shaped(name: str, repeats: int = 2, **sections) -> config.Run:
    """A run whose every dimension divides by 8: heads, experts, widths, rows, chunks of a row. Periods of repeats."""
    # Documents aligned to chunks: the same rows for every size of `context`.
    run = tiny_run(**sections | dict(data=dict(align_tokens=16) | sections.get("data", {})))
    shape = dict(SHAPES[name])
    ((period, _),) = shape.pop("plan")
    model = dataclasses.replace(
        run.model, n_heads=8, head_dim=8, n_experts=8, chunk_len=16, plan=((period, repeats),), **shape
    )
    return dataclasses.replace(run, model=model)


class Outcome(NamedTuple):
    """As numpy, by the names that a failure is told with."""

    loss: float
    routes: np.ndarray  # int32 [L, B, T, K]
    gradients: dict[str, np.ndarray]
    losses: list[float]  # of the five steps
    params: dict[str, np.ndarray]  # after the five
    told: dict[str, float]  # of the first step's comparisons


def bones_on(run: config.Run, mesh: Any) -> Skeleton:
    seam = make_seam(mesh, run.train, stripes_of(run))
    return skeleton(run.model, seam, patch_id=Tokenizer(run.data.tokenizer).patch, train=run.train, tune=run.tune)


def stripes_of(run: config.Run) -> stripes.Stripes:
    return stripes.of(run.model, run.data.seq_len, run.mesh.context)


def mesh_of(run: config.Run) -> Any:
    sizes = run.mesh.axes
    return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


def outcome(run: config.Run, batch: Batch, routed: bool = True) -> Outcome:
    """Of the run's own mesh; with the routes, which are a program of their own, or without."""
    mesh = mesh_of(run)
    bones = bones_on(run, mesh)
    step, shapes = build(run, bones, SGD, mesh)
    state = host_state(run.model, run.tune)
    if run.reference.source == "live":
        state = state._replace(reference=(bones.own(reference_of(state.params)), state.router_bias))
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, shapes))
    placed = place.put_batch(batch, mesh=mesh, stripes=stripes_of(run))
    routes = np.zeros(0, np.int32)
    if routed:
        found = jax.jit(functools.partial(_routes, bones))(state.params, state.router_bias, placed)
        routes = np.asarray(jax.device_get(found))
    losses, gradients, compared = [], {}, {}
    for n in range(STEPS):
        state, told = step(state, placed)
        losses.append(float(told.loss))
        if n == 0:
            gradients = by_path(state.opt[0].trace)
            compared = {name: float(x.mean()) for name, x in (told.compared or {}).items()}
    assert step._cache_size() == 1, "compiled twice"
    return Outcome(losses[0], routes, gradients, losses, by_path(state.params), compared)


def _routes(bones: Skeleton, params: Any, router_bias: Any, batch: Batch) -> jax.Array:
    model = bones.bind(params, router_bias)
    return model.seam.tokens.row_order(score(model, batch).routing.index, 2)


def by_path(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def host_state(model: config.Model, tune: config.Tune = ALL) -> Any:
    """The same initial state for every mesh. Routers are twice as decided as at a run's start: ties are rarer. Adapters
    change what they stand beside a little."""
    run = dataclasses.replace(tiny_run(), model=model, tune=tune)
    bones = bones_on(run, mesh_of(run))
    state = jax.device_get(jax.jit(lambda: init(bones, SGD, 0, run.health.spike_window))())
    rng = np.random.default_rng(0)

    def value(path: tuple, x: np.ndarray) -> np.ndarray:
        if path[-1].key.endswith(lora.B):
            return rng.normal(0, 1e-3, x.shape).astype(np.float32)
        return 2 * x if path[-1].key == "router" else x

    return state._replace(params=jax.tree.map_with_path(value, state.params))


def reference_of(params: Any) -> Any:
    """Weights a little beside these: what a policy has learnt is more than a rounding."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: (x * rng.normal(1, 0.1, x.shape)).astype(x.dtype), params)


@functools.cache
def clear_batch(name: str, repeats: int = 2) -> Batch:
    """The one of `shaped(name, repeats)`."""
    return clear_rows(shaped(name, repeats))


def clear_rows(run: config.Run) -> Batch:
    """A batch of packed rows, with pictures where the run has some, in which every real token's choice of experts is
    clear by MARGIN in every layer, on one device."""
    mesh = mesh_of(run)
    bones, state = bones_on(run, mesh), host_state(run.model, run.tune)
    margins = jax.jit(functools.partial(_least_margin, bones, run.model.top_k))
    rows: list[Batch] = []
    stream = iter(pipeline.build(run.data, run.model.vision, run.seed))
    try:
        for _ in range(MOST_WINDOWS):
            batch = next(stream)
            if not batch.tiles.shape[1] and run.data.multimodal_steps:
                continue
            clear = np.asarray(margins(state.params, state.router_bias, place.put_batch(batch, mesh=mesh))) >= MARGIN
            rows += [jax.tree.map(lambda x, r=r: x[r], batch) for r in np.flatnonzero(clear)]
            if len(rows) >= run.data.rows:
                break
    finally:
        stream.close()
    assert len(rows) >= run.data.rows, f"{len(rows)} rows without a tie"
    chosen = jax.tree.map(lambda *xs: np.stack(xs), *rows[: run.data.rows])
    assert (chosen.segment_ids.max(axis=1) > 1).any() and (chosen.segment_ids == 0).any()
    assert chosen.tiles.any() == bool(run.data.multimodal_steps)
    return chosen


def _least_margin(bones: Skeleton, k: int, params: Any, router_bias: Any, batch: Batch) -> jax.Array:
    """float32 [B]: of the row's real tokens and all MoE layers."""
    logits = score(bones.bind(params, router_bias), batch).routing.logits
    best = jax.lax.top_k(logits, k + 1)[0]
    gaps = best[..., k - 1] - best[..., k]  # [L, B, T]
    return jax.numpy.where(batch.segment_ids > 0, gaps, jax.numpy.inf).min(axis=(0, 2))
