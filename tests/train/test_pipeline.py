"""A pipeline of several rounds gives the numbers of one device, as in the matrix of meshes, which has one round."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from llamax import config
from tests.tolerances import BF16, MESH_LOSS, MESH_PARAMETER
from tests.train.matrix import Outcome, clear_batch, outcome, shaped
from tests.train.test_matrix import off

REPEATS = 4
UNBALANCED = dict(losses=dict(router_balance=0.0))  # balance is a statistic of each micro-batch of accumulation


def run_of(**sections) -> config.Run:
    return shaped("maverick", REPEATS, **sections)


@functools.cache
def on_one_device(balanced: bool) -> Outcome:
    return outcome(run_of(**({} if balanced else UNBALANCED)), clear_batch("maverick", REPEATS))


SPLITS = [
    dict(mesh=dict(data=1, pipeline=2)),
    dict(mesh=dict(data=1, pipeline=2), train=dict(pipeline_microbatches=4)),
    dict(mesh=dict(data=1, pipeline=2, fsdp=2, expert=2)),
    dict(mesh=dict(data=1, pipeline=4, tensor=2), train=dict(pipeline_microbatches=8, remat="none")),
    dict(mesh=dict(data=2, pipeline=2), train=dict(accumulate=2), **UNBALANCED),
]


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_numbers_are_those_of_one_device(split):
    want = on_one_device("losses" not in split)
    batch = clear_batch("maverick", REPEATS)
    got = outcome(run_of(**split), batch)
    np.testing.assert_allclose(got.loss, want.loss, **MESH_LOSS)
    np.testing.assert_allclose(got.losses, want.losses, rtol=MESH_PARAMETER)
    real = batch.segment_ids > 0
    np.testing.assert_array_equal(got.routes[:, real], want.routes[:, real])
    gradients, params = off(got.gradients, want.gradients), off(got.params, want.params)
    assert {path: d for path, d in gradients.items() if not d <= MESH_PARAMETER} == {}
    assert {path: d for path, d in params.items() if not d <= MESH_PARAMETER} == {}


@pytest.mark.slow
def test_bfloat16_goes_through_the_stages():
    run = run_of(mesh=dict(data=1, pipeline=2, fsdp=2), train=dict(compute_dtype="bfloat16"))
    got = outcome(run, clear_batch("maverick", REPEATS))
    np.testing.assert_allclose(got.losses[0], on_one_device(True).losses[0], **BF16)
