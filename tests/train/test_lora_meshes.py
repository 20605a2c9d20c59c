"""With adapters, and with frozen parts, the same numbers on every mesh as on one device: loss, every route, every
gradient of what is trained, and five steps of SGD; the rest stays to the bit."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from llamax import config
from tests.tolerances import MESH_LOSS, MESH_PARAMETER
from tests.train.matrix import Outcome, by_path, clear_batch, host_state, outcome, shaped

TUNES = {
    "lora": config.Tune(lora_rank=2, lora_alpha=2.0),
    "lora beside vision": config.Tune(lora_rank=2, lora_alpha=2.0, freeze=("!vision/*", "!projector")),
    "aligning": config.Tune(freeze=("*", "!vision/*", "!projector")),
}
MESHES = [
    dict(fsdp=2, expert=2, tensor=2),
    dict(fsdp=2, context=2, tensor=2),
    dict(pipeline=2, fsdp=2, expert=2),
    dict(data=2, fsdp=2, expert=2, rules="zero"),
]
CASES = [("lora", mesh) for mesh in MESHES] + [("lora beside vision", MESHES[0]), ("aligning", MESHES[0])]


def tuned(name: str, **sections) -> config.Run:
    return dataclasses.replace(shaped("maverick", **sections), tune=TUNES[name])


@functools.cache
def on_one_device(name: str) -> Outcome:
    return outcome(tuned(name), clear_batch("maverick"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh"), CASES, ids=str)
def test_numbers_are_those_of_one_device(name, mesh):
    want, got = on_one_device(name), outcome(tuned(name, mesh=dict(data=1) | mesh), clear_batch("maverick"))
    np.testing.assert_allclose(got.loss, want.loss, **MESH_LOSS)
    real = clear_batch("maverick").segment_ids > 0
    np.testing.assert_array_equal(got.routes[:, real], want.routes[:, real])
    np.testing.assert_allclose(got.losses, want.losses, rtol=MESH_PARAMETER)
    assert got.gradients.keys() == want.gradients.keys() and got.gradients
    assert all(np.linalg.norm(g) > 0 for g in want.gradients.values()), "every parameter is reached"
    for tree, expected in ((got.gradients, want.gradients), (got.params, want.params)):
        trained = {path: tree[path] for path in got.gradients}  # of the rest, some is zero; it is compared below
        far = {path: np.linalg.norm(x - expected[path]) / np.linalg.norm(expected[path]) for path, x in trained.items()}
        assert {path: d for path, d in far.items() if not d <= MESH_PARAMETER} == {}
    for path, x in by_path(host_state(tuned(name).model, TUNES[name]).params).items():
        assert (got.params[path] == x).all() == (path not in got.gradients), path
