"""The same numbers on every mesh as on one device: loss, every route, every gradient, and five steps of SGD.

The default suite runs meshes that together have every axis; `make test-full` each axis alone at
2, 4 and 8, all pairs, and triples, for Scout's and Maverick's layers, one expert a token and two. With
LLAMAX_MATRIX=FILE each case appends what it saw, of which docs/make_meshes.py makes docs/meshes.md.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from llamax import config
from tests.tolerances import MESH_LOSS, MESH_PARAMETER
from tests.train.matrix import SHAPES, Outcome, clear_batch, outcome, shaped

AXES = config.MESH_AXES
QUICK = [  # the first: weights, moments and gradients over all of its axes
    dict(data=2, fsdp=2, expert=2, rules="zero"),
    dict(expert=2, context=2, tensor=2),
    dict(pipeline=2, fsdp=2, expert=2),
]
COVERING = [
    dict(data=2, fsdp=4),
    dict(fsdp=2, expert=2, tensor=2),
    dict(expert=4, tensor=2),
    dict(data=2, context=4),
    dict(pipeline=2, context=2, tensor=2),
    dict(data=2, fsdp=2, context=2),
]
ALONE = [{axis: n} for axis in AXES for n in (2, 4, 8)]
PAIRS = [{a: 2, b: 4} for a, b in itertools.combinations(AXES, 2)]
TRIPLES = [mesh for mesh in (*COVERING, *QUICK[1:]) if len(mesh) == 3]


def cases() -> list:
    quick = [pytest.param("maverick", mesh, id=name_of("maverick", mesh)) for mesh in QUICK]
    full = [("maverick", mesh) for mesh in COVERING]
    full += [(shape, mesh) for shape in ("scout", "maverick top-2") for mesh in (*ALONE, *PAIRS, *TRIPLES)]
    full += [("scout top-2", mesh) for mesh in TRIPLES]
    return quick + [pytest.param(*case, id=name_of(*case), marks=pytest.mark.slow) for case in full]


def name_of(shape: str, mesh: dict[str, int]) -> str:
    return f"{shape}: {' '.join(f'{axis}={n}' for axis, n in mesh.items())}"


@functools.cache
def on_one_device(shape: str, repeats: int) -> Outcome:
    return outcome(shaped(shape, repeats), clear_batch(shape, repeats))


@pytest.mark.parametrize(("shape", "mesh"), cases())
def test_numbers_are_those_of_one_device(shape, mesh):
    repeats = max(2, mesh.get("pipeline", 1))
    want = on_one_device(shape, repeats)
    batch = clear_batch(shape, repeats)
    got = outcome(shaped(shape, repeats, mesh=dict(data=1) | mesh), batch)
    gradients, params = off(got.gradients, want.gradients), off(got.params, want.params)
    note(shape, mesh, got, want, gradients, params)
    np.testing.assert_allclose(got.loss, want.loss, **MESH_LOSS)
    real = batch.segment_ids > 0
    np.testing.assert_array_equal(got.routes[:, real], want.routes[:, real])
    assert all(np.linalg.norm(g) > 0 for g in want.gradients.values()), "every parameter is reached"
    assert {path: d for path, d in gradients.items() if not d <= MESH_PARAMETER} == {}
    np.testing.assert_allclose(got.losses, want.losses, rtol=MESH_PARAMETER)
    assert {path: d for path, d in params.items() if not d <= MESH_PARAMETER} == {}


def off(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
    """||difference|| / ||value|| of every parameter."""
    assert got.keys() == want.keys()
    return {path: float(np.linalg.norm(got[path] - x) / np.linalg.norm(x)) for path, x in want.items()}


def note(shape: str, mesh: dict, got: Outcome, want: Outcome, gradients: dict, params: dict) -> None:
    """Appends a case's figures to the file that LLAMAX_MATRIX names."""
    if not os.environ.get("LLAMAX_MATRIX"):
        return
    worst = max(gradients, key=lambda path: gradients[path])
    row = dict(
        shape=shape,
        mesh=mesh,
        loss=abs(got.loss / want.loss - 1),
        routes=int((got.routes != want.routes).sum()),
        gradient=gradients[worst],
        worst=worst,
        losses=max(abs(a / b - 1) for a, b in zip(got.losses, want.losses, strict=True)),
        params=max(params.values()),
    )
    with Path(os.environ["LLAMAX_MATRIX"]).open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_the_default_set_has_every_axis_and_the_full_one_every_pair():
    assert {axis for mesh in QUICK for axis in mesh} == {*AXES, "rules"}
    assert {frozenset(mesh) for mesh in PAIRS} == {frozenset(p) for p in itertools.combinations(AXES, 2)}
    assert all(np.prod(list(mesh.values())) == 8 for mesh in (*QUICK[1:], *COVERING, *PAIRS, *TRIPLES))
    assert len(TRIPLES) >= 2 and set(SHAPES) == {"scout", "scout top-2", "maverick", "maverick top-2"}
