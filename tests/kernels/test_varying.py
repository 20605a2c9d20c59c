"""The kernels inside `jax.shard_map` over batch rows: the loss and gradients of one device, also of weights that every
device holds, with and without the check of varying axes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from llamax.kernels.attention import blocked_attention
from llamax.kernels.cross_entropy import cross_entropy
from llamax.kernels.grouped import Experts, ragged_experts, sorted_experts
from tests.tolerances import MESH_GRAD, MESH_LOSS

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices, real or simulated")

B, T, H, K, DH, D, F, E, V = 8, 24, 2, 1, 8, 16, 16, 4, 50
ROWS = P(("data", "fsdp"))


def nll_of_rows(run_experts, weights, x_BTD, seg, pos, index, targets):
    """One attention, one mixture, one cross-entropy: [B, T]."""
    rows = x_BTD.shape[0]
    qkv = (x_BTD @ weights["qkv"]).reshape(rows, T, H + 2 * K, DH)
    q, k, v = qkv[:, :, :H], qkv[:, :, H : H + K], qkv[:, :, H + K :]
    o = blocked_attention(q, k, v, q_pos=pos, k_pos=pos, q_seg=seg, k_seg=seg).reshape(rows * T, D)
    gate = jax.nn.sigmoid(o[:, : index.shape[-1]])
    y = o + run_experts(o, weights["experts"], index.reshape(rows * T, -1), gate)
    nll, logz = cross_entropy(y, weights["head"], targets.reshape(-1), chunk=20)
    return (nll + 0.1 * logz**2).reshape(rows, T)


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 8)
    normal = lambda key, *shape: jax.random.normal(key, shape) * shape[-2] ** -0.5  # noqa: E731
    weights = dict(
        qkv=normal(keys[0], D, (H + 2 * K) * DH),
        experts=Experts(normal(keys[1], E, D, F), normal(keys[2], E, D, F), normal(keys[3], E, F, D)),
        head=normal(keys[4], D, V),
    )
    seg = jnp.array((np.arange(T) >= np.arange(B)[:, None]) + 1, jnp.int32)
    pos = jnp.where(seg == 1, jnp.arange(T), jnp.arange(T) - jnp.arange(B)[:, None])
    index = jax.random.randint(keys[5], (B, T, 1), 0, E)
    targets = jax.random.randint(keys[6], (B, T), 0, V)
    batch = jax.random.normal(keys[7], (B, T, D)), seg, pos, index, targets
    return weights, batch, gradients(partial(nll_of_rows, sorted_experts), weights, batch)


def gradients(nll, weights, batch):
    """The mean loss, and its gradients with respect to the weights and the first array of the batch."""
    loss = jax.value_and_grad(lambda weights, x, *rest: nll(weights, x, *rest).mean(), argnums=(0, 1))
    return jax.jit(loss)(weights, *batch)


@pytest.mark.parametrize(
    ("run_experts", "check_vma"), [(sorted_experts, True), (sorted_experts, False), (ragged_experts, False)]
)
def test_rows_over_devices(problem, run_experts, check_vma):
    weights, batch, (one_loss, one_gradient) = problem
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    over_devices = jax.shard_map(
        partial(nll_of_rows, run_experts),
        mesh=mesh,
        in_specs=(P(), *(ROWS for _ in batch)),
        out_specs=ROWS,
        check_vma=check_vma,
    )
    loss, gradient = gradients(over_devices, weights, batch)
    np.testing.assert_allclose(loss, one_loss, **MESH_LOSS)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(one_gradient), strict=True):
        np.testing.assert_allclose(a, b, **MESH_GRAD)


def test_gradient_taken_inside(problem):
    """With the check on, a replicated weight's gradient is already the sum over devices."""
    weights, batch, (_, (one_gradient, _)) = problem
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def gradient(weights, *batch):
        return jax.grad(lambda w: nll_of_rows(sorted_experts, w, *batch).sum() / (B * T))(weights)

    inside = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), *(P("data") for _ in batch)), out_specs=P())
    for a, b in zip(jax.tree.leaves(jax.jit(inside)(weights, *batch)), jax.tree.leaves(one_gradient), strict=True):
        np.testing.assert_allclose(a, b, **MESH_GRAD)
