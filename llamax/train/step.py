"""The training step: loss -> gradient -> update, one pure function for one jit.

A non-finite loss or gradient leaves parameters and optimizer as they were and is counted; the loop stops a run
that meets too many in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from llamax import config
from llamax.batch import Batch
from llamax.losses import TERMS, Sum, next_token, router
from llamax.model.score import score
from llamax.model.skeleton import Skeleton
from llamax.optim.schedules import schedule
from llamax.train.state import State


class Metrics(NamedTuple):
    """Arrays of one step; fetched only when they are logged."""

    loss: Array  # the weighted total
    terms: dict[str, Sum]  # each loss term, unweighted
    by_source: Sum  # next-token nats and tokens, [n_sources] each
    loads: Array | None  # tokens given to each expert, [L_moe, E]
    grad_norm: Array
    lr: Array
    skipped: Array  # non-finite steps so far
    bad_in_row: Array


def make_gradient(run: config.Run, skeleton: Skeleton) -> Callable:
    """gradient(params, router_bias, batch) -> (grads, (loss, terms, by_source, loads)) over all of the batch's rows."""
    n_sources = len(run.data.sources)
    has_experts = any(kind.endswith("+moe") for kind in run.model.layers)
    weights = {name: getattr(run.losses, name) for name, t in TERMS.items() if has_experts or not t.needs_experts}
    weights = {name: weight for name, weight in weights.items() if weight}

    def loss(params, router_bias, batch: Batch, dens: dict[str, Array]):
        scored = score(skeleton.bind(params, router_bias), batch)
        terms = {name: TERMS[name].of(scored, batch) for name in weights}
        # Divided by what the whole batch counts, of which these rows may be a part.
        total = sum(weights[name] * Sum(term.num, dens[name]).mean() for name, term in terms.items())
        per_source = next_token.by_source(scored.logp, batch.loss_weights, batch.source_ids, n_sources)
        loads = None
        if scored.routing is not None:
            loads = router.loads(scored.routing.index, batch.segment_ids > 0, run.model.n_experts)
        return total, (total, terms, per_source, loads)

    def gradient(params, router_bias, batch: Batch):
        dens = {name: TERMS[name].den(batch) for name in weights}
        grad = jax.grad(loss, has_aux=True)
        if run.train.accumulate == 1:
            return grad(params, router_bias, batch, dens)
        micro = split_rows(batch, run.train.accumulate)
        first = jax.tree.map(lambda x: x[0], micro)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad, params, router_bias, first, dens)
        )

        def add(total, batch):
            return jax.tree.map(jnp.add, total, grad(params, router_bias, batch, dens)), None

        return jax.lax.scan(add, zeros, micro)[0]

    return gradient


def split_rows(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B / parts, ...], every part taking each `parts`-th row: a device keeps the rows it holds."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(len(x) // parts, parts, *x.shape[1:]), 0, 1), batch)


def make_step(run: config.Run, skeleton: Skeleton, optimizer: optax.GradientTransformation) -> Callable:
    """step(state, batch) -> (state, Metrics); pure."""
    gradient = make_gradient(run, skeleton)
    lr = schedule(run.optim, run.train.steps)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        grads, (loss, terms, by_source, loads) = gradient(state.params, state.router_bias, batch)
        grad_norm = optax.tree.norm(grads)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        # Not from the updates too: until the last of them were known, all of them and the new moments would have to
        # live beside the old, three times the parameters. From finite gradients, clipped, AdamW makes finite updates.
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params = optax.apply_updates(state.params, updates)
        bad = (~good).astype(jnp.int32)
        new = State(
            step=state.step + 1,
            params=keep_if(good, params, state.params),
            router_bias=state.router_bias,
            opt=keep_if(good, opt, state.opt),
            rng=state.rng,
            bad_in_row=(state.bad_in_row + 1) * bad,
            skipped=state.skipped + bad,
        )
        rate = jnp.asarray(lr(state.step - state.skipped), jnp.float32)
        return new, Metrics(loss, terms, by_source, loads, grad_norm, rate, new.skipped, new.bad_in_row)

    return step


def keep_if(good: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
