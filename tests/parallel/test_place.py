"""Placement: sharded training steps equal one device's, programs compile once, batches reach the right devices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llamax.batch import COMPARING, Batch
from llamax.kernels import grouped
from llamax.kernels.grouped import sorted_experts
from llamax.parallel import rules
from llamax.parallel.mesh import make_mesh
from llamax.parallel.place import Constrain, PerShard, batch_shardings, fetch, put_batch, replicate
from tests.tolerances import MESH_GRAD, MESH_LOSS

B, T, D, E, L = 8, 4, 8, 4, 3  # rows, tokens, width, experts, layers
MESHES = ({"data": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "expert": 2, "tensor": 2})
AXES = {"mix": ("layers", "embed", None), "experts": ("layers", "experts", "embed", "ffn")}


class Experts(NamedTuple):
    up: jax.Array


@jax.custom_vjp
def attend(q, k, v, seg):
    """Mean of v over a row's tokens of the same segment, plus q * k: a kernel with its own gradient and a loop."""
    same = (seg[:, :, None] == seg[:, None, :]).astype(v.dtype)
    mean = jnp.einsum("bts,bsd->btd", same / same.sum(-1, keepdims=True), v)
    return jax.lax.fori_loop(0, 2, lambda i, o: o + (q * k + mean) / 2, jnp.zeros_like(v))


def attend_bwd(saved, g):
    q, k, seg = saved
    same = (seg[:, :, None] == seg[:, None, :]).astype(g.dtype)
    return g * k, g * q, jnp.einsum("bts,btd->bsd", same / same.sum(-1, keepdims=True), g), None


attend.defvjp(lambda q, k, v, seg: (attend(q, k, v, seg), (q, k, seg)), attend_bwd)


def attention(q, k, v, *, q_seg, local_len=None):
    return attend(q, k, v, q_seg) if local_len is None else v


@jax.custom_vjp
def select(x, up, index):
    """x_n times the matrix of its expert, experts in a loop; the gradient of `up` sums over this device's rows."""
    return jax.lax.fori_loop(0, E, lambda e, y: jnp.where((index == e)[:, None], x @ up[e], y), jnp.zeros_like(x))


def select_bwd(saved, g):
    x, up, index = saved
    chosen = jax.nn.one_hot(index, E)
    return jnp.einsum("nf,ndf->nd", g, up[index]), jnp.einsum("ne,nd,nf->edf", chosen, x, g), None


select.defvjp(lambda x, up, index: (select(x, up, index), (x, up, index)), select_bwd)


def run_experts(x_ND, experts, index_NK, gate_NK):
    return select(x_ND * gate_NK, experts.up, index_NK[:, 0])


def loss(params, x, seg, index, seam):
    constrain, attention, run_experts = seam

    @jax.checkpoint
    def layer(x, p):
        q, k, v = (constrain(y, ("rows", "tokens", None)) for y in (x @ p["mix"], x, x @ p["mix"].T))
        x = x + attention(q, k, v, q_seg=seg, local_len=None)
        gate = jax.nn.sigmoid(x.reshape(-1, D)[:, :1])
        y = run_experts(x.reshape(-1, D), Experts(p["experts"]), index, gate)
        return constrain(x + y.reshape(x.shape), ("rows", "tokens", None)), None

    x, _ = jax.lax.scan(layer, x, params)
    return jnp.sum(jnp.tanh(x) ** 2)


def inputs():
    rng = np.random.default_rng(0)
    params = {"mix": rng.normal(size=(L, D, D)) * 0.2, "experts": rng.normal(size=(L, E, D, D)) * 0.3}
    seg = np.sort(rng.integers(1, 3, (B, T)), axis=1).astype(np.int32)
    index = rng.integers(0, E, (B * T, 1)).astype(np.int32)
    return jax.tree.map(np.float32, params), rng.normal(size=(B, T, D)).astype(np.float32), seg, index


def seam_on(mesh):
    return Constrain(mesh), PerShard(attention, mesh), PerShard(run_experts, mesh, (None, Experts(AXES["experts"][1:])))


@pytest.fixture(scope="module")
def plain():
    """Loss and gradients on one device, by autodiff of the plain formulas: the custom gradients are checked too."""

    def plain_attention(q, k, v, *, q_seg, local_len=None):
        same = (q_seg[:, :, None] == q_seg[:, None, :]).astype(v.dtype)
        return q * k + jnp.einsum("bts,bsd->btd", same / same.sum(-1, keepdims=True), v)

    def plain_experts(x, experts, index, gate):
        return jnp.einsum("nd,ndf->nf", x * gate, experts.up[index[:, 0]])

    seam = (lambda x, names: x), plain_attention, plain_experts
    return jax.jit(lambda *a: jax.value_and_grad(loss, (0, 1))(*a, seam))(*inputs())


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_loss_and_gradients_are_those_of_one_device(sizes, plain):
    mesh = make_mesh(sizes)
    params, x, seg, index = inputs()
    weights = rules.shardings(AXES, params, mesh)
    rows = jax.sharding.NamedSharding(mesh, P(rules.ROWS))
    placed = jax.device_put((params, x, seg, index), (weights, rows, rows, rows))
    step = jax.jit(
        lambda p, *a: jax.value_and_grad(loss, (0, 1))(p, *a, seam_on(mesh)),
        in_shardings=(weights, rows, rows, rows),
        out_shardings=(None, (weights, rows)),
    )
    value, grads = step(*placed)
    np.testing.assert_allclose(value, plain[0], **MESH_LOSS)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, **MESH_GRAD), fetch(grads), fetch(plain[1]))
    step(grads[0], *placed[1:])  # what comes out goes in again: the same program serves
    assert step._cache_size() == 1
    assert grads[0]["mix"].sharding.is_equivalent_to(weights["mix"], 3)


def test_every_device_sees_its_own_rows():
    mesh = make_mesh({"data": 2, "fsdp": 4})

    def kernel(x_BD, w, *, scale_B, power=1):
        assert x_BD.shape == (1, 3) and scale_B.shape == (1,) and w.shape == (3,)  # a row each; the weight whole
        return x_BD * w * scale_B[:, None] ** power, x_BD.sum(1)

    x = jnp.arange(24.0).reshape(8, 3)
    scale = jnp.arange(8.0)
    y, total = jax.jit(PerShard(kernel, mesh, (None, ("embed",))))(x, jnp.ones(3), scale_B=scale)
    np.testing.assert_array_equal(y, x * scale[:, None])
    np.testing.assert_array_equal(total, x.sum(1))
    squared, _ = PerShard(kernel, mesh, (None, ("embed",)))(x, jnp.ones(3), scale_B=scale, power=2)
    np.testing.assert_array_equal(squared, x * scale[:, None] ** 2)


def test_experts_per_shard_take_the_gate_where_it_is_said():
    """The real kernel, its gate on the input and on the output, on eight devices and on one."""
    mesh, (params, x, _, _) = make_mesh({"data": 2, "fsdp": 4}), inputs()
    x_ND, up = x.reshape(-1, D), params["experts"][0]
    index = np.random.default_rng(1).permuted(np.tile(np.arange(E), (len(x_ND), 1)), axis=1)[:, :2].astype(np.int32)
    axes = AXES["experts"][1:]
    sharded = PerShard(sorted_experts, mesh, (None, grouped.Experts(axes, axes, axes)))

    def loss(x_ND, up, run, gate_on):
        gate_NK = jax.nn.sigmoid(x_ND[:, :2])
        return jnp.sum(jnp.tanh(run(x_ND, grouped.Experts(up, up, up), index, gate_NK, gate_on=gate_on)))

    program = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=(2, 3))
    results = {where: [program(x_ND, up, f, where) for f in (sharded, sorted_experts)] for where in ("input", "output")}
    for on_mesh, on_one in results.values():
        np.testing.assert_allclose(on_mesh[0], on_one[0], **MESH_LOSS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **MESH_GRAD), on_mesh[1], on_one[1])
    assert abs(results["input"][0][0] - results["output"][0][0]) > 1e-2


def test_weights_are_gathered_and_their_gradient_scattered():
    """An all-reduce of whole gradients would give the same numbers at twice the traffic, and not fit large experts."""
    mesh = make_mesh({"data": 2, "fsdp": 4})
    matmul = PerShard(jnp.matmul, mesh, (None, ("embed", "ffn")))
    text = str(jax.make_jaxpr(jax.grad(lambda w, x: matmul(x, w).sum()))(jnp.ones((8, 3)), jnp.ones((8, 8))))
    assert "all_gather" in text and "reduce_scatter" in text


def test_constrain_places_an_activation():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    y = jax.jit(lambda x: Constrain(mesh)(x, ("rows", "tokens", None)))(jnp.ones((8, 2, 3)))
    assert {s.data.shape for s in y.addressable_shards} == {(1, 2, 3)}


def test_seam_values_are_equal_when_built_twice():
    first, again = seam_on(make_mesh({"data": 8})), seam_on(make_mesh({"data": 8}))
    assert first == again and hash(first) == hash(again)
    assert seam_on(make_mesh({"fsdp": 8})) != first


def test_one_device_runs_the_plain_function():
    mesh = make_mesh({}, jax.devices()[:1])
    params, x, seg, index = inputs()
    text = str(jax.make_jaxpr(lambda *a: loss(*a, seam_on(mesh)))(params, x, seg, index))
    assert "shard_map" not in text and "sharding_constraint" not in text


def host_batch(rows=8, tiles=2):
    text = [np.arange(rows * T).reshape(rows, T).astype(np.int32) + i for i in range(6)]
    text[2] = text[2].astype(np.float32)
    return Batch(*text, tiles=np.arange(rows * tiles * 12, dtype=np.uint8).reshape(rows, tiles, 2, 2, 3))


@pytest.mark.parametrize("tiles", [0, 2])
def test_put_batch_and_fetch(tiles):
    mesh = make_mesh({"data": 4, "fsdp": 2})
    host = host_batch(tiles=tiles)
    batch = put_batch(host, mesh)
    assert batch.lacking() == COMPARING
    there = [name for name in Batch._fields if name not in COMPARING]
    for name, *trees in zip(there, *map(jax.tree.leaves, (batch, fetch(batch), batch_shardings(mesh))), strict=True):
        x, back, where = trees
        assert x.sharding == where and x.dtype == getattr(host, name).dtype
        np.testing.assert_array_equal(back, getattr(host, name))
        assert all(s.data.shape[0] == 1 for s in x.addressable_shards), name
    assert isinstance(fetch(batch).tokens, np.ndarray)


def test_replicate_gives_every_device_the_whole():
    mesh = make_mesh({"data": 8})
    x = replicate({"a": np.arange(6)}, mesh)["a"]
    assert {s.data.shape for s in x.addressable_shards} == {(6,)} and len(x.addressable_shards) == 8
