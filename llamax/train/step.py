"""The training step: loss -> gradient -> update, one pure function for one jit.

A bad step leaves parameters, router biases and optimizer as they were and is counted; the loop stops a run that meets
too many in a row. Bad is a loss or gradient that is not finite, and a spike of the loss where the run says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from llamax import config, losses
from llamax.batch import Batch
from llamax.config_dict import merged
from llamax.losses import TERMS, Facts, Sum, next_token, router
from llamax.model.score import Score, score
from llamax.model.skeleton import Skeleton
from llamax.optim.schedules import schedule
from llamax.parallel.place import Copies
from llamax.train import blocks
from llamax.train.state import State


class Metrics(NamedTuple):
    """Arrays of one step; fetched only when they are logged."""

    loss: Array  # the weighted total
    terms: dict[str, Sum]  # each loss term, unweighted
    by_source: Sum  # next-token nats and tokens, [n_sources] each
    routing: router.Stats | None  # None without MoE layers
    energy: Array  # [L]: mean square of the residual stream after each layer, summed over real tokens
    vision_energy: Array | None  # [vision layers]: the same, summed over tiles; None without pictures
    compared: dict[str, Sum] | None  # of comparisons, losses.told; None where the run has none
    grad_squares: dict[str, Array]  # by block: blocks.gradient_squares
    grad_norm: Array
    lr: Array
    finite: Array  # bool: loss and gradient
    spike: Array  # bool: the loss stands far above those of the last steps
    skipped: Array  # bad steps so far
    bad_in_row: Array


class Told(NamedTuple):
    """What the forward pass tells beside the gradient; sums over rows, but for the loss."""

    loss: Array
    terms: dict[str, Sum]
    by_source: Sum
    routing: router.Stats | None
    energy: Array
    vision_energy: Array | None
    compared: dict[str, Sum] | None


def make_gradient(run: config.Run, skeleton: Skeleton, copies: Copies | None = None) -> Callable:
    """gradient(params, router_bias, batch, reference=None) -> (grads, Told) over all of the batch's rows: grads of what
    is trained.

    `reference`: (what is trained of it, router_bias), whose log-probabilities take the place of the batch's `ref_logp`.
    They go through the same function in the same program, so those of equal weights are equal to the bit.
    `copies`: of the parameters, made once and computed with; None: the parameters themselves serve.
    """
    n_sources = len(run.data.sources)
    facts = Facts.of(run)
    weights = {name: getattr(run.losses, name) for name, term in TERMS.items() if term.on(facts)}
    weights = {name: weight for name, weight in weights.items() if weight}

    def loss(params, router_bias, reference, batch: Batch, dens: dict[str, Array]):
        model = skeleton.bind(params, router_bias)
        if reference is not None:
            batch = batch._replace(ref_logp=score(skeleton.reference(params, *reference), batch).logp)
        scored = score(model, batch, run.preference.wpo)
        seen = {name: (scored, batch) for name in weights}
        if any(TERMS[name].in_row_order for name in weights):
            ordered = in_row_order(scored, batch, model.seam.tokens.row_order)
            seen |= {name: ordered for name in weights if TERMS[name].in_row_order}
        terms = {name: TERMS[name].of(*seen[name], facts) for name in weights}
        # Divided by what the whole batch counts, of which these rows may be a part.
        total = sum(weights[name] * Sum(term.num, dens[name]).mean() for name, term in terms.items())
        per_source = next_token.by_source(scored.logp, batch.loss_weights, batch.source_ids, n_sources)
        routing = None
        if scored.routing is not None:
            logits, index, dropped = scored.routing
            routing = router.stats(logits, index, batch.segment_ids > 0, dropped)
        vision = None if scored.vision_energy is None else scored.vision_energy.sum(axis=1)
        compared = None if batch.sides is None else losses.told(scored, batch, facts)
        return total, Told(total, terms, per_source, routing, scored.energy.sum(axis=1), vision, compared)

    def gradient(params, router_bias, batch: Batch, reference: Any = None):
        dens = {name: TERMS[name].den(batch) for name in weights}
        made = None if copies is None else copies(params)
        trained, frozen = skeleton.split(params)

        def of(trained, batch: Batch):
            params = merged(trained, frozen)
            used = params if copies is None else copies.standing_for(params, made)
            return loss(used, router_bias, reference, batch, dens)

        if run.train.accumulate == 1:
            return jax.grad(of, has_aux=True)(trained, batch)
        # The backward pass adds to these in place: a micro-batch's own gradient never exists as a whole.
        totals = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), trained)

        def add(_, part):
            batch_of_part = each_nth_row(batch, run.train.accumulate, part)
            value, backward, told = jax.vjp(partial(of, batch=batch_of_part), trained, has_aux=True)
            backward.with_refs(totals)(jnp.ones_like(value))
            return None, told

        _, told = jax.lax.scan(add, None, jnp.arange(run.train.accumulate))
        return jax.tree.map(jax.freeze, totals), jax.tree.map(lambda x: x.sum(axis=0), told)

    return gradient


def in_row_order(scored: Score, batch: Batch, row_order: Callable[..., Array]) -> tuple[Score, Batch]:
    """The routing and the batch with tokens as they stand in their rows."""
    routing = scored.routing and jax.tree.map(lambda x: row_order(x, 2), scored.routing)
    ordered = {name: row_order(x) for name, x in batch.of_tokens().items()}
    return scored._replace(routing=routing), batch._replace(**ordered)


def each_nth_row(batch: Batch, n: int, first: Array) -> Batch:
    """[B, ...] -> [B / n, ...]: the rows first, first + n, first + 2n, ...; a device keeps the rows that it holds."""
    return jax.tree.map(lambda x: jnp.take(x.reshape(len(x) // n, n, *x.shape[1:]), first, axis=1), batch)


def make_step(
    run: config.Run, skeleton: Skeleton, optimizer: optax.GradientTransformation, copies: Copies | None = None
) -> Callable:
    """step(state, batch) -> (state, Metrics); pure. `copies` as for `make_gradient`."""
    gradient = make_gradient(run, skeleton, copies)
    lr = schedule(run.optim, run.train.steps)
    plan, bias, health = run.model.plan, run.router_bias, run.health

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        grads, told = gradient(state.params, state.router_bias, batch, state.reference)
        grad_norm = optax.tree.norm(grads)
        trained, frozen = skeleton.split(state.params)
        updates, opt = optimizer.update(grads, state.opt, trained)
        # Not from the updates too: until the last of them were known, all of them and the new moments would have to
        # live beside the old, three times the parameters. From finite gradients, clipped, AdamW makes finite updates.
        finite = jnp.isfinite(told.loss) & jnp.isfinite(grad_norm)
        kind = int(batch.tiles.shape[1] > 0)  # batches with pictures have losses of their own
        spike = is_spike(told.loss, state.recent[kind], health.spike_sigmas)
        good = finite if health.on_spike == "warn" else finite & ~spike
        updated, router_bias = optax.apply_updates(trained, updates), state.router_bias
        if told.routing is not None and bias.rate:
            router_bias = blocks.move_biases(router_bias, told.routing.loads, plan, bias.rate, bias.update, grads)
        remembered = jnp.concatenate([state.recent[kind, 1:], told.loss[None]])
        bad = (~good).astype(jnp.int32)
        new = State(
            step=state.step + 1,
            params=merged(keep_if(good, updated, trained), frozen),
            router_bias=keep_if(good, router_bias, state.router_bias),
            opt=keep_if(good, opt, state.opt),
            rng=state.rng,
            bad_in_row=(state.bad_in_row + 1) * bad,
            skipped=state.skipped + bad,
            # A spike is remembered: where the losses have risen for good, half a window later it is none any more.
            recent=keep_if(jnp.isfinite(told.loss), state.recent.at[kind].set(remembered), state.recent),
            reference=state.reference,
        )
        metrics = Metrics(
            **told._asdict(),
            grad_squares=blocks.gradient_squares(grads, plan),
            grad_norm=grad_norm,
            lr=jnp.asarray(lr(state.step - state.skipped), jnp.float32),
            finite=finite,
            spike=spike,
            skipped=new.skipped,
            bad_in_row=new.bad_in_row,
        )
        return new, metrics

    return step


def is_spike(loss: Array, recent_W: Array, sigmas: float) -> Array:
    """Whether a loss is more than `sigmas` robust standard deviations above the median of the recent ones (inf: none).

    The deviation is 1.4826 x the median distance from the median, which for normal noise is the standard deviation, and
    which no spike in less than half of the window moves; at least a thousandth of the median, for losses may be flat.
    False until half of the window is filled.
    """
    known_W = jnp.where(jnp.isfinite(recent_W), recent_W, jnp.nan)
    median = jnp.nanmedian(known_W)
    deviation = jnp.maximum(1.4826 * jnp.nanmedian(jnp.abs(known_W - median)), 1e-3 * jnp.abs(median))
    enough = jnp.sum(jnp.isfinite(recent_W)) >= recent_W.size // 2
    return enough & (loss > median + sigmas * deviation)


def keep_if(good: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
