"""How a batch is cut, padded, packed, ordered or spread over devices changes neither its loss nor its gradient.

The batch has pictures, several documents a row, a row with a few tokens only and an empty one, as a short last window
leaves them. The balance loss is the one of documents: Switch's is a statistic of the micro-batch.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from llamax.batch import Batch
from llamax.data.tokenizer import Tokenizer
from tests.runs import tiny_run
from tests.tolerances import SPLIT_LOSS, SPLIT_PARAMETER
from tests.train.test_meshes import first_with_pictures, gradient_on

LOSSES = dict(router_balance=0.0, router_balance_seq=1e-2, router_z=1e-3)
RUN = tiny_run(losses=LOSSES)
SHORT = 9  # tokens in the last row that has any


@functools.cache
def batch() -> Batch:
    whole = first_with_pictures()
    used = np.ones(whole.tokens.shape, bool)
    used[-1], used[-2, SHORT:] = False, False
    texts = {name: np.where(used, x, 0) for name, x in whole.of_tokens().items()}
    tiles = whole.tiles.copy()
    patch = Tokenizer(RUN.data.tokenizer).patch
    for row in (-1, -2):
        tiles[row, int((texts["tokens"][row] == patch).sum()) // RUN.model.vision.tokens_per_tile :] = 0
    made = Batch(**{**texts, "tiles": tiles, "loss_weights": texts["loss_weights"].astype(np.float32)})
    assert (made.tokens == patch).sum() > 20 and made.segment_ids.max() > 2, "pictures, and several documents a row"
    return made


def padded() -> Batch:
    """Eight more rows of nothing, and tile slots that nobody uses."""
    return jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch())


def unpacked() -> Batch:
    """Every document in a row of its own, with its own pictures; as many rows as `padded` has."""
    whole, patch, per_tile = batch(), Tokenizer(RUN.data.tokenizer).patch, RUN.model.vision.tokens_per_tile
    made, row = jax.tree.map(lambda x: np.zeros((2 * len(x), *x.shape[1:]), x.dtype), whole), 0
    for r in range(len(whole.tokens)):
        first = 0  # tile of this row
        for segment in range(1, whole.segment_ids[r].max() + 1):
            where = whole.segment_ids[r] == segment
            for name, theirs in whole.of_tokens().items():
                getattr(made, name)[row, : where.sum()] = theirs[r, where]
            made.segment_ids[row, : where.sum()] = 1
            n = int((whole.tokens[r, where] == patch).sum()) // per_tile
            made.tiles[row, :n] = whole.tiles[r, first : first + n]
            first, row = first + n, row + 1
    assert row > 1.5 * len(whole.tokens) and (made.segment_ids > 0).sum() == (whole.segment_ids > 0).sum()
    return made


def reordered() -> Batch:
    order = np.random.default_rng(0).permutation(len(batch().tokens))
    return jax.tree.map(lambda x: x[order], batch())


@functools.cache
def reference():
    return gradient_on(RUN, batch())


@pytest.mark.parametrize(
    "make, split",
    [
        pytest.param(batch, dict(train=dict(accumulate=4)), id="micro-batches of 2 rows"),
        pytest.param(batch, dict(train=dict(accumulate=8)), id="micro-batches of 1 row", marks=pytest.mark.slow),
        pytest.param(padded, {}, id="padding"),
        pytest.param(unpacked, {}, id="no packing"),
        pytest.param(reordered, {}, id="row order"),
        pytest.param(batch, dict(mesh=dict(data=8)), id="data parallel", marks=pytest.mark.slow),
        pytest.param(
            batch, dict(mesh=dict(data=2, fsdp=2), train=dict(accumulate=2)), id="both", marks=pytest.mark.slow
        ),
    ],
)
def test_neither_loss_nor_gradient_changes(make, split):
    loss, grads, loads = gradient_on(tiny_run(losses=LOSSES, **split), make())
    expected_loss, expected, expected_loads = reference()
    np.testing.assert_allclose(loss, expected_loss, **SPLIT_LOSS)
    np.testing.assert_array_equal(loads, expected_loads)
    far = {path: np.linalg.norm(g - expected[path]) / np.linalg.norm(expected[path]) for path, g in grads.items()}
    assert all(np.linalg.norm(g) > 0 for g in expected.values()), "every parameter is reached"
    assert {path: d for path, d in far.items() if not d <= SPLIT_PARAMETER} == {}, max(far.values())
