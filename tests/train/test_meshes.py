"""The gradient on a mesh is that on one device, parameter by parameter: the real model, packed rows, pictures."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
import pytest

from llamax import config
from llamax.batch import Batch
from llamax.data import pipeline
from llamax.data.tokenizer import Tokenizer
from llamax.model.seam import make_seam
from llamax.model.skeleton import skeleton
from llamax.optim.build import optimizer
from llamax.parallel import place
from llamax.parallel.mesh import make_mesh
from llamax.train.programs import state_shardings
from llamax.train.state import init
from llamax.train.step import make_gradient
from tests.runs import tiny_run
from tests.tolerances import BF16, BF16_GRADIENT, MESH_LOSS, MESH_PARAMETER

RUN = tiny_run()


def gradient_on(run: config.Run, batch: Batch | None = None):
    """(loss, gradients by path, expert loads) of the first batch with pictures, on the run's mesh, as numpy."""
    sizes = run.mesh.axes
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    bones = skeleton(
        run.model,
        make_seam(mesh, run.train),
        patch_id=Tokenizer(run.data.tokenizer).patch,
        train=run.train,
    )
    tx = optimizer(run.optim, run.train.steps, bones.kinds)
    state = jax.device_put(host_state(), state_shardings(bones, tx, run, mesh))
    batch = place.put_batch(batch or first_with_pictures(), mesh=mesh)
    gradient = jax.jit(make_gradient(run, bones))
    grads, told = gradient(state.params, state.router_bias, batch)
    paths = jax.tree_util.tree_leaves_with_path(grads)
    by_path = {jax.tree_util.keystr(path): np.asarray(g) for path, g in paths}
    return float(told.loss), by_path, np.asarray(told.routing.loads)


@functools.cache
def host_state():
    """The same initial state for every mesh."""
    mesh = make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1])
    bones = skeleton(RUN.model, make_seam(mesh), patch_id=Tokenizer(RUN.data.tokenizer).patch, train=RUN.train)
    return jax.device_get(jax.jit(lambda: init(bones, optimizer(RUN.optim, 4, bones.kinds), 0, 8))())


@functools.cache
def first_with_pictures() -> Batch:
    batches = iter(pipeline.build(RUN.data, RUN.model.vision, RUN.seed))
    batch = next(b for b in batches if b.tiles.shape[1])
    batches.close()
    return batch


# The balance loss is a statistic of each micro-batch, so it is off where batches are split in time.
UNBALANCED = dict(losses=dict(router_balance=0.0))
SPLITS = [
    pytest.param(dict(mesh=dict(data=8)), marks=pytest.mark.slow),
    pytest.param(dict(mesh=dict(data=2, fsdp=4)), marks=pytest.mark.slow),
    # More than there are heads of keys and values.
    pytest.param(dict(mesh=dict(data=1, fsdp=2, tensor=4)), marks=pytest.mark.slow),
    dict(mesh=dict(data=1, fsdp=2, expert=2, tensor=2)),
    pytest.param(dict(mesh=dict(data=1, expert=4)), marks=pytest.mark.slow),
    pytest.param(dict(mesh=dict(data=2, expert=4), train=dict(expert_buffer=0.5)), marks=pytest.mark.slow),
    pytest.param(dict(mesh=dict(data=1, tensor=2)), marks=pytest.mark.slow),
    pytest.param(dict(mesh=dict(data=2, fsdp=2, tensor=2)), marks=pytest.mark.slow),
    pytest.param(dict(mesh=dict(data=1, fsdp=8)), marks=pytest.mark.slow),
    pytest.param(dict(mesh=dict(data=1, fsdp=4), train=dict(accumulate=2), **UNBALANCED), marks=pytest.mark.slow),
]


@functools.cache
def on_one_device(balanced: bool):
    return gradient_on(RUN if balanced else tiny_run(**UNBALANCED))


@pytest.mark.slow
def test_what_a_capacity_drops_does_not_depend_on_the_mesh():
    """Loss and every gradient; the loads are those of one device, and drops are counted alike."""
    tight = dict(train=dict(expert_capacity=0.5))
    loss, grads, _ = gradient_on(tiny_run(mesh=dict(data=1, fsdp=2, expert=4), **tight))
    expected_loss, expected, _ = gradient_on(tiny_run(**tight))
    np.testing.assert_allclose(loss, expected_loss, **MESH_LOSS)
    far = {path: np.linalg.norm(g - expected[path]) / np.linalg.norm(expected[path]) for path, g in grads.items()}
    assert {path: d for path, d in far.items() if not d <= MESH_PARAMETER} == {}
    assert abs(loss - on_one_device(True)[0]) > 1e-4  # something is dropped


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_loss_routes_and_every_gradient_are_those_of_one_device(split):
    loss, grads, loads = gradient_on(tiny_run(**split))
    expected_loss, expected, expected_loads = on_one_device("losses" not in split)
    np.testing.assert_allclose(loss, expected_loss, **MESH_LOSS)
    np.testing.assert_array_equal(loads, expected_loads)
    far = {path: np.linalg.norm(g - expected[path]) / np.linalg.norm(expected[path]) for path, g in grads.items()}
    assert all(np.linalg.norm(g) > 0 for g in expected.values()), "every parameter is reached"
    assert {path: d for path, d in far.items() if not d <= MESH_PARAMETER} == {}


def test_bfloat16_is_near_float32_and_its_masters_are_float32():
    """Activations of 8 bits of mantissa, gradients and parameters of 24; routes may differ in a few tokens."""
    loss, grads, _ = gradient_on(tiny_run(train=dict(compute_dtype="bfloat16")))
    expected_loss, expected, _ = on_one_device(True)
    np.testing.assert_allclose(loss, expected_loss, **BF16)
    assert {g.dtype for g in grads.values()} == {np.dtype("float32")}
    whole, expected_whole = (np.concatenate([g.ravel() for g in tree.values()]) for tree in (grads, expected))
    assert np.linalg.norm(whole - expected_whole) / np.linalg.norm(expected_whole) <= BF16_GRADIENT
