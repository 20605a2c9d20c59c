"""The circular schedule, counted; stages beside one loop, values and gradients; where the weights are."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.kernels.cross_entropy import slow_cross_entropy
from llamax.model.layers import in_order
from llamax.model.seam import make_seam
from llamax.model.skeleton import skeleton
from llamax.optim.build import optimizer
from llamax.parallel import pipeline
from llamax.parallel.mesh import make_mesh
from llamax.parallel.pipeline import Pipelined, Schedule
from llamax.parallel.tensor import SplitVocabulary
from llamax.train.programs import places_of
from llamax.train.state import init
from tests.runs import tiny_run
from tests.splits import Seen, agree, normal

SIZES = [(1, 1, 3), (2, 1, 2), (2, 1, 6), (2, 2, 2), (2, 3, 4), (3, 2, 3), (4, 3, 8), (4, 4, 4), (8, 6, 16)]


@pytest.mark.parametrize(("p", "v", "m"), SIZES)
def test_every_period_meets_every_microbatch_once_in_order_on_its_stage(p, v, m):
    plan = Schedule(p, v, m)
    table = [[plan.at(tick, stage) for stage in range(p)] for tick in range(plan.ticks)]
    when = {}
    for tick, row in enumerate(table):
        for stage, (work, k, i) in enumerate(row):
            assert 0 <= k < v and 0 <= i < m, "without work too: these are indices"
            if work:
                assert (k * p + stage, i) not in when
                when[k * p + stage, i] = tick
    assert len(when) == v * p * m
    for (period, i), tick in when.items():
        assert period == 0 or when[period - 1, i] == tick - 1, "what a stage hands on is worked on at the next tick"
    idle = sum(not work for row in table for work, *_ in row)
    assert plan.bubble == idle / (p * plan.ticks) == (p - 1) / (m * v + p - 1)


@pytest.mark.parametrize(("p", "v"), [(2, 2), (2, 3), (2, 4), (3, 2), (4, 2), (4, 4), (4, 6), (6, 4), (8, 3), (9, 6)])
def test_a_deal_sends_every_period_to_its_stage(p, v):
    sends, to, arrives = pipeline.deal(p, v)
    got = np.full((p, v), -1)
    for t in range(v):
        assert sorted(to[t]) == list(range(p)), "every stage receives one period in every exchange"
        for stage in range(p):
            (k,) = np.flatnonzero(arrives[:, to[t, stage]] == t)
            got[to[t, stage], k] = stage * v + sends[t, stage]
    assert got.tolist() == [[k * p + stage for k in range(v)] for stage in range(p)]


def step(x_BTD, item, rows):
    """A layer that is ruined, as is what it tells, by an x that has not been through exactly the layers before it."""
    w_DD, number = item
    tag_B, mask_BT = rows
    here_B = (jnp.abs(x_BTD[..., -1] - number) < 0.5).all(axis=1)
    y_BTD = jnp.tanh(x_BTD @ w_DD) * mask_BT[..., None] + tag_B[:, None, None]
    y_BTD = jnp.where(here_B[:, None, None], y_BTD, jnp.nan).at[..., -1].set(number + 1.0)
    told = dict(sum=y_BTD[..., :-1].sum((1, 2)), token=y_BTD[..., 0], number=jnp.where(here_B, number, -1))
    return y_BTD, told


def inputs(repeats: int, rows: int):
    """x, stacked layers, and what the rows bring."""
    mask_BT = jnp.asarray(np.random.default_rng(0).integers(0, 2, (rows, 2)), jnp.float32)
    layers = normal(repeats, 4, 4), jnp.arange(repeats)
    return normal(rows, 2, 4).at[..., -1].set(0.0), layers, (normal(rows), mask_BT)


TOY = [
    (dict(pipeline=2, data=2, fsdp=2), 4, 4, 16, True),  # two rounds, two groups
    (dict(pipeline=4, data=2), 4, 0, 16, False),  # one round
    pytest.param(dict(pipeline=4, data=2), 12, 8, 32, True, marks=pytest.mark.slow),  # three rounds: no common divisor
    pytest.param(dict(pipeline=4), 24, 4, 8, False, marks=pytest.mark.slow),  # six: one of two
]


@pytest.mark.parametrize(("sizes", "repeats", "microbatches", "rows", "again"), TOY)
def test_stages_give_what_one_loop_gives(sizes, repeats, microbatches, rows, again):
    """Values, gradients, and what every layer tells of every row; ticks without work leave no trace, not even NaN."""
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    remat = functools.partial(jax.checkpoint, prevent_cse=False) if again else lambda fn: fn

    def through(run):
        return lambda x_BTD, layers, own: run(step, x_BTD, layers, own, remat)

    agree(through(in_order), through(Pipelined(in_order, mesh, microbatches)), inputs(repeats, rows))


def test_a_batch_of_few_rows_makes_one_microbatch_a_stage():
    split = Pipelined(in_order, make_mesh({"pipeline": 2, "data": 4}), 4)
    assert split.schedule(6, 32) == Schedule(2, 3, 4)
    assert split.schedule(6, 8) == Schedule(2, 3, 2), "8 rows are one for each of 2 micro-batches on 4 devices"
    assert Pipelined(in_order, make_mesh({"pipeline": 4, "data": 2})).schedule(4, 8) == Schedule(4, 1, 4)


def test_outside_of_the_stages_the_axis_splits_rows():
    """So the head is not computed by every stage."""
    kernel = Seen(slow_cross_entropy)
    split = SplitVocabulary(kernel, make_mesh({"pipeline": 4, "data": 2}), ("embed", "vocab"))
    agree(slow_cross_entropy, split, (normal(16, 4), normal(4, 6), jnp.arange(16, dtype=jnp.int32) % 6))
    assert kernel.shapes[0] == (2, 4)


def test_every_weight_of_the_decoder_is_split_over_the_stages():
    """And its moments; the vision encoder's layers are none of the pipeline's."""
    run = tiny_run(mesh=dict(pipeline=2, fsdp=2, expert=2))
    mesh = make_mesh(run.mesh)
    bones = skeleton(run.model, make_seam(mesh), patch_id=0, train=run.train)
    tx = optimizer(run.optim, run.train.steps, bones.kinds)
    shapes = jax.eval_shape(functools.partial(init, bones, tx, 0, 8))
    where = places_of(bones, shapes, mesh)
    split = [
        (jax.tree_util.keystr(path), x.shape, place.shard_shape(x.shape))
        for (path, x), place in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(where), strict=True)
    ]
    stacked = [(whole, part) for path, whole, part in split if "'segment0'" in path and "bias" not in path]
    assert len(stacked) >= 3 * 17 and all(part[0] == whole[0] // 2 for whole, part in stacked)
    encoder = [(whole, part) for path, whole, part in split if "'blocks'" in path]
    assert encoder and all(part[0] == whole[0] for whole, part in encoder)
