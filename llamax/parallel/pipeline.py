"""Pipeline parallelism: the periods of a stack split over the mesh axis `pipeline`, by a circular schedule.

Each of the p devices along the axis is a stage. Of R = v p periods it works on every p-th: period k p + s on stage s in
round k, so micro-batches go round the ring of stages v times (Narayanan et al. 2021, arXiv:2104.04473, section 2.2; as
circles: Xu et al. 2021, arXiv:2105.04663). They go in groups of p, one a tick, and a group's round follows its last one
without a gap. A step of m micro-batches takes m v + p - 1 ticks, in which a stage works m v times:

    bubble = (p - 1) / (m v + p - 1)

The backward pass is autodiff's: the same ticks in reverse. A stage keeps what backward needs of every tick; of those
with work that is what its v periods keep of all rows.

Here `jax.shard_map` splits by hand along `pipeline` alone. Inside a stage the other axes are what they are elsewhere:
the compiler's, or split by hand once more (place.py). Outside of the stack the devices along `pipeline` split rows.

Letters: B rows, T tokens a row, D model width; m micro-batches of b rows; p stages, v rounds, R periods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from llamax.parallel import place, rules

AXIS = "pipeline"


@dataclass(frozen=True)
class Schedule:
    """Who works on what, when."""

    stages: int
    rounds: int
    microbatches: int  # a multiple of the stages

    @classmethod
    def of(cls, stages: int, repeats: int, microbatches: int = 0) -> Schedule:
        """Of so many periods. `microbatches`: 0 for as many as there are stages."""
        return cls(stages, repeats // stages, microbatches or stages)

    def __str__(self) -> str:
        return (
            f"pipeline of {self.stages} stages, {self.rounds} periods each: {self.microbatches} micro-batches in "
            f"{self.ticks} ticks, {self.stages - 1} of them idle for a stage (a bubble of {self.bubble:.1%})"
        )

    @property
    def units(self) -> int:
        """Ticks in which a stage has work."""
        return self.microbatches * self.rounds

    @property
    def ticks(self) -> int:
        return self.units + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of its time that a stage has nothing to do."""
        return (self.stages - 1) / self.ticks

    def at(self, tick: Any, stage: Any) -> tuple[Any, Any, Any]:
        """(whether there is work, its round, its micro-batch), of whole numbers or of arrays."""
        since = tick - stage
        work = (since >= 0) & (since < self.units)
        unit = since % self.units  # without work it is some other tick's
        group, within = unit // (self.stages * self.rounds), unit % (self.stages * self.rounds)
        return work, within // self.stages, group * self.stages + within % self.stages


@dataclass(frozen=True)
class Pipelined:
    """x through all periods, as `in_order` runs them on one device. `microbatches`: see `Schedule.of`.

    Row dimension 0 of every array in `rows`, and of whatever a period tells beside x, is that of x. Periods that do not
    divide by the stages are run in order by all of them.
    """

    in_order: Callable
    mesh: Mesh
    microbatches: int = 0

    def schedule(self, repeats: int, rows: int) -> Schedule:
        """For so many periods, and rows of a step; a batch that has too few for all micro-batches makes one a stage."""
        asked = Schedule.of(self.mesh.shape[AXIS], repeats, self.microbatches)
        ways = math.prod(self.mesh.shape[axis] for axis in rules.ROWS if axis != AXIS)
        return Schedule.of(asked.stages, repeats, 0 if rows % (asked.microbatches * ways) else asked.microbatches)

    def __call__(self, step: Callable, x_BTD: Array, stacked: Any, rows: Any, remat: Callable) -> tuple[Array, Any]:
        repeats = len(jax.tree.leaves(stacked)[0])
        if repeats % self.mesh.shape[AXIS]:
            return self.in_order(step, x_BTD, stacked, rows, remat)
        schedule = self.schedule(repeats, len(x_BTD))
        split = PartitionSpec(AXIS)
        run = jax.shard_map(
            partial(self._stage, step, schedule, remat),
            mesh=self.mesh,
            in_specs=split,
            out_specs=(split, PartitionSpec(None, AXIS)),
            axis_names={AXIS},
            check_vma=False,  # as in PerShard
        )
        return run(jnp.arange(schedule.stages), x_BTD, stacked, rows)

    def _stage(
        self, step: Callable, plan: Schedule, remat: Callable, stage: Array, x_BTD: Array, stacked: Any, rows: Any
    ) -> tuple[Array, Any]:
        """All ticks of one stage: of the rows here, what comes out of the last period, and what all periods tell.

        `stage` [1]: its number; the partitioner knows no other way to ask for it where other axes are its own.
        """
        stage = stage[0]
        x_mbTD, rows = jax.tree.map(partial(everyones, plan), (x_BTD, rows))
        # What the first stage reads is what the last one overwrites with what comes out.
        ends_mbTD = place.Constrain(self.mesh)(x_mbTD, (None, "rows", "tokens", None))
        periods = dealt(stacked, stage, plan)
        first, last = stage == 0, stage == plan.stages - 1

        # Weights and rows are picked inside what `remat` wraps, so that none of them is kept for every tick.
        @remat
        def unit(x_bTD: Array, k: Array, i: Array, periods: Any, rows: Any) -> tuple[Array, Any]:
            return step(x_bTD, picked(periods, k), picked(rows, i))

        def tick(carry: tuple[Array, Array], t: Array) -> tuple[tuple[Array, Array], Any]:
            came_bTD, ends_mbTD = carry
            work, k, i = plan.at(t, stage)
            # With nothing to do a stage works on embedded tokens, as likely as any, and nobody reads what it makes.
            end_bTD = picked(ends_mbTD, i)
            x_bTD = jnp.where(work & ~(first & (k == 0)), came_bTD, end_bTD)
            x_bTD, told = unit(x_bTD, k, i, periods, rows)
            end_bTD = jnp.where(work & last & (k == plan.rounds - 1), x_bTD, end_bTD)
            ends_mbTD = jax.lax.dynamic_update_index_in_dim(ends_mbTD, end_bTD, i, 0)
            return (to_the_next(x_bTD, plan), ends_mbTD), told

        start = (jnp.zeros_like(ends_mbTD[0]), ends_mbTD)
        (_, ends_mbTD), told = jax.lax.scan(tick, start, jnp.arange(plan.ticks))
        return from_the_last(ends_mbTD, plan), jax.tree.map(partial(by_period, plan, stage), told)


# ------------------------------------------------------------------------------------- rows, inside of a stage


def everyones(plan: Schedule, x: Array) -> Array:
    """The rows here [B/p, ...] -> those of all stages, in micro-batches [m, b, ...].

    As in accumulation a micro-batch takes every nth of the rows here: along the other axes no row moves.
    """
    n = plan.microbatches // plan.stages
    x_nb = jnp.moveaxis(x.reshape(len(x) // n, n, *x.shape[1:]), 1, 0)
    # A copy to every stage, not an all-gather: the sum in that one's gradient XLA cannot do on CPU, in bfloat16, where
    # other axes are its own.
    x_pnb = jax.lax.all_to_all(jnp.broadcast_to(x_nb, (plan.stages, *x_nb.shape)), AXIS, 0, 0)
    return x_pnb.reshape(-1, *x_nb.shape[1:])


def from_the_last(x_mb: Array, plan: Schedule) -> Array:
    """The last stage's micro-batches -> the rows here [B/p, ...]."""
    x_pnb = x_mb.reshape(plan.stages, -1, *x_mb.shape[1:])
    return whole_rows(jax.lax.all_to_all(x_pnb, AXIS, 0, 0)[-1], 0)


def whole_rows(x: Array, dim: int) -> Array:
    """Micro-batches [..., n, b, ...] at dimension `dim` -> their rows [..., B/p, ...], in the order that they had."""
    x = jnp.moveaxis(x, dim, dim + 1)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


def by_period(plan: Schedule, stage: Array, told: Array) -> Array:
    """What a stage's periods told, by tick [ticks, b, ...] -> what all periods tell of the rows here [R, B/p, ...].

    Of ticks without work nothing is left.
    """
    p, v, m = plan.stages, plan.rounds, plan.microbatches
    units = jax.lax.dynamic_slice_in_dim(told, stage, plan.units)
    x_vm = jnp.moveaxis(units.reshape(m // p, v, p, *told.shape[1:]), 0, 1)
    x_vpn = x_vm.reshape(v, p, m // p, *told.shape[1:])  # micro-batches by the stage whose rows they are
    x_vpn = jax.lax.all_to_all(x_vpn, AXIS, 1, 1)  # now p counts the stage that tells
    return whole_rows(x_vpn.reshape(v * p, m // p, *told.shape[1:]), 1)


def picked(tree: Any, i: Array) -> Any:
    """The i-th of every array's first dimension."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def to_the_next(x: Array, plan: Schedule) -> Array:
    return jax.lax.ppermute(x, AXIS, [(s, (s + 1) % plan.stages) for s in range(plan.stages)])


# ------------------------------------------------------------------------------------- weights, inside of a stage


def dealt(stacked: Any, stage: Array, plan: Schedule) -> Any:
    """Stacked weights as they live, v neighbours a stage -> as the schedule needs them, every p-th: [v, ...] each.

    Every stage sends and receives one period at a time, v times.
    """
    if plan.rounds == 1:
        return stacked
    sends_vp, to_vp, arrives_vp = deal(plan.stages, plan.rounds)
    own, tos = list(range(plan.stages)), to_vp.tolist()

    def move(w: Array) -> Array:
        sent = w[jnp.asarray(sends_vp)[:, stage]]
        came = [
            x if to == own else jax.lax.ppermute(x, AXIS, list(enumerate(to))) for x, to in zip(sent, tos, strict=True)
        ]
        return jnp.stack(came)[jnp.asarray(arrives_vp)[:, stage]]

    return jax.tree.map(move, stacked)


def deal(p: int, v: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """v exchanges that deal R = v p periods, of which stage s holds s v + j for j < v, to stages r mod p.

    In exchange t stage s sends its j = (t + floor(s g / p)) mod v, g = gcd(v, p): no two stages send to one.

    Returns [v, p] each, for a stage: which of its periods it sends in an exchange; to whom; and for a round, in which
    exchange its period arrives.
    """
    t_v1, s_1p = np.arange(v)[:, None], np.arange(p)[None]
    sends_vp = (t_v1 + s_1p * math.gcd(v, p) // p) % v
    period_vp = s_1p * v + sends_vp
    to_vp = period_vp % p
    arrives_vp = np.empty((v, p), int)
    arrives_vp[period_vp // p, to_vp] = t_v1
    return sends_vp, to_vp, arrives_vp
