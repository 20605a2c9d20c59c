"""Experts: the definition against loops, the sorted functions against the definition, under every kind of routing."""

from __future__ import annotations

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.kernels import grouped
from llamax.kernels.grouped import (
    Experts,
    cpu_experts,
    few_experts,
    pick_experts,
    ragged_experts,
    slow_experts,
    sorted_experts,
    tpu_experts,
)
from tests.tolerances import BF16, ORACLE, TWIN, TWIN_GRAD

N, D, F, E = 300, 16, 24, 4


def inputs(k=1, n=N, dtype=jnp.float32, D=D, F=F):
    keys = jax.random.split(jax.random.key(k), 6)
    normal = lambda key, *shape: (jax.random.normal(key, shape) * shape[-2] ** -0.5).astype(dtype)  # noqa: E731
    experts = Experts(normal(keys[0], E, D, F), normal(keys[1], E, D, F), normal(keys[2], E, F, D))
    x, dy = (jax.random.normal(key, (n, D)).astype(dtype) for key in keys[3:5])
    return x, experts, jax.nn.sigmoid(jax.random.normal(keys[5], (n, k))).astype(dtype), dy


def routing(kind: str, k: int, n: int = N):
    """index_NK; the K experts of a token differ."""
    rng = np.random.default_rng(0)
    first = {
        "even": rng.permutation(np.arange(n) % E),
        "one takes all": np.full(n, 2),
        "first and last empty": rng.integers(1, E - 1, n),
        "skewed": np.minimum(rng.geometric(0.8, n) - 1, E - 1),
    }[kind]
    return jnp.array(np.stack([(first + i) % E for i in range(k)], axis=1), jnp.int32)


@partial(jax.jit, static_argnums=(0, 6))
def run(run_experts, x, experts, index, gate, dy, gate_on="input"):
    def f(x, experts, gate):
        return run_experts(x, experts, index, gate, gate_on=gate_on)

    y, backward = jax.vjp(f, x, experts, gate)
    return y, backward(dy)


def assert_twins(fast, slow, value=TWIN, grad=TWIN_GRAD):
    assert jax.tree.map(jnp.result_type, fast) == jax.tree.map(jnp.result_type, slow)
    f32 = lambda x: np.asarray(x, np.float32)  # noqa: E731
    np.testing.assert_allclose(f32(fast[0]), f32(slow[0]), **value)
    for (path, a), b in zip(jax.tree.leaves_with_path(fast[1]), jax.tree.leaves(slow[1]), strict=True):
        np.testing.assert_allclose(f32(a), f32(b), err_msg=jax.tree_util.keystr(path), **grad)


@pytest.mark.parametrize("gate_on", ["input", "output"])
def test_definition_against_loops(gate_on):
    x, experts, gate, _ = inputs(k=2, n=5)
    index = routing("even", 2, n=5)
    y = np.asarray(jax.jit(partial(slow_experts, gate_on=gate_on))(x, experts, index, gate))
    x, experts, gate = (jax.tree.map(lambda a: np.asarray(a, np.float64), t) for t in (x, experts, gate))
    for n in range(5):
        truth = np.zeros(D)
        for e, g in zip(np.asarray(index[n]), gate[n], strict=True):
            z = g * x[n] if gate_on == "input" else x[n]
            a = z @ experts.gate_EDF[e]
            out = (a / (1 + np.exp(-a)) * (z @ experts.up_EDF[e])) @ experts.down_EFD[e]
            truth += out if gate_on == "input" else g * out
        np.testing.assert_allclose(y[n], truth, **ORACLE)


@pytest.mark.parametrize("gate_on", ["input", "output"])
def test_few_rows_are_slow(gate_on):
    """One by one up to FEW rows, sorted above; the same values and gradients either way."""
    for n in (1, grouped.FEW // 2, grouped.FEW // 2 + 1):
        x, experts, gate, dy = inputs(2, n)
        index = routing("skewed", 2, n)
        assert ("sort" in str(jax.make_jaxpr(cpu_experts)(x, experts, index, gate))) == (2 * n > grouped.FEW)
        slow = run(slow_experts, x, experts, index, gate, dy, gate_on)
        assert_twins(run(few_experts, x, experts, index, gate, dy, gate_on), slow)
        assert_twins(run(cpu_experts, x, experts, index, gate, dy, gate_on), slow)


@pytest.mark.parametrize("kind", ["even", "one takes all", "first and last empty", "skewed"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("fast", [sorted_experts, ragged_experts])
def test_sorted_is_slow(fast, k, kind):
    x, experts, gate, dy = inputs(k)
    index = routing(kind, k)
    assert np.bincount(np.ravel(index)).max() > grouped.BLOCK or kind == "even"  # more than one block of an expert
    got = run(fast, x, experts, index, gate, dy)
    assert_twins(got, run(slow_experts, x, experts, index, gate, dy))
    for weight in got[1][1]:  # an expert without tokens learns nothing
        assert (np.abs(np.asarray(weight)).sum((1, 2)) > 0).tolist() == np.isin(np.arange(E), index).tolist()


@pytest.mark.parametrize("fast", [sorted_experts, ragged_experts])
def test_sorted_is_slow_with_the_gate_on_the_output(fast):
    x, experts, gate, dy = inputs(2)
    index = routing("skewed", 2)
    got, on_input = (run(fast, x, experts, index, gate, dy, gate_on) for gate_on in ("output", "input"))
    assert_twins(got, run(slow_experts, x, experts, index, gate, dy, "output"))
    assert np.abs(got[0] - on_input[0]).max() > 0.1


@pytest.mark.parametrize("gate_on", ["input", "output"])
@pytest.mark.parametrize("fast", [sorted_experts, ragged_experts])
def test_bfloat16(fast, gate_on):
    x, experts, gate, dy = inputs(2, dtype=jnp.bfloat16)
    index = routing("skewed", 2)
    # The gradient of a weight adds up 300 rows; its tolerance is relative to the largest.
    (y, fast_grads), (slow_y, slow_grads) = (run(f, x, experts, index, gate, dy, gate_on) for f in (fast, slow_experts))
    scale = lambda grads: jax.tree.map(lambda g, s: g / np.abs(s).max(), grads, slow_grads)  # noqa: E731
    assert_twins((y, scale(fast_grads)), (slow_y, scale(slow_grads)), BF16, BF16)


interpreted = partial(tpu_experts, interpret=True)


@pytest.mark.parametrize(
    ("kind", "k", "n", "gate_on"),
    [("first and last empty", 2, N, "input"), ("skewed", 1, 40, "output")],  # 600 rows fill tiles, 40 a part of one
)
def test_tpu_kernel_agrees(kind, k, n, gate_on):
    """The gradient of the weights by jax's Pallas kernel, interpreted; the rest is `jax.lax.ragged_dot`."""
    x, experts, gate, dy = inputs(k, n, D=128, F=256)
    index = routing(kind, k, n).at[::7].set(E)  # some of no expert: they give and learn nothing
    gate = jnp.where(index < E, gate, 0)
    got = run(interpreted, x, experts, index, gate, dy, gate_on)
    assert_twins(got, run(slow_experts, x, experts, index, gate, dy, gate_on))
    for weight in got[1][1]:
        assert (np.abs(np.asarray(weight)).sum((1, 2)) > 0).tolist() == np.isin(np.arange(E), index).tolist()


def test_tpu_kernel_needs_whole_lanes():
    """Other widths take XLA's gradient: no Pallas call, which would not compile."""
    for D, F, fits in ((128, 256, True), (128, 24, False), (24, 128, False)):
        x, experts, gate, dy = inputs(1, 8, D=D, F=F)
        text = str(jax.make_jaxpr(run, static_argnums=(0,))(interpreted, x, experts, routing("even", 1, 8), gate, dy))
        assert ("pallas_call" in text) == fits


def test_a_token_does_not_feel_its_neighbours():
    """Which rows share a block decides nothing: a token's output keeps every bit when the others change."""
    x, experts, gate, dy = inputs(1)
    index = routing("skewed", 1)
    mine = (np.arange(N) % 3 == 0)[:, None]
    before = run(sorted_experts, x, experts, index, gate, dy)
    after = run(sorted_experts, jnp.where(mine, x, 2 - x), experts, index, gate, dy)
    for a, b in ((before[0], after[0]), (before[1][0], after[1][0]), (before[1][2], after[1][2])):
        np.testing.assert_array_equal(a[mine[:, 0]], b[mine[:, 0]])
        assert not np.array_equal(a, b)


def test_every_platform_has_a_function():
    assert pick_experts("cpu") is cpu_experts
    assert pick_experts("tpu") is tpu_experts
    gpu = importlib.util.find_spec("tokamax") and grouped.tokamax_experts or ragged_experts
    assert pick_experts("gpu") is gpu


@pytest.mark.parametrize(("k", "gate_on"), [(1, "input"), (2, "input"), (2, "output")])
def test_tokamax_agrees(k, gate_on):
    """Its plain implementation; the kernels for cards cannot run here."""
    pytest.importorskip("tokamax", reason="comes with the extra `cuda`")
    x, experts, gate, dy = inputs(k)
    index = routing("skewed", k)
    fast, slow = (run(f, x, experts, index, gate, dy, gate_on) for f in (grouped.tokamax_experts, slow_experts))
    assert_twins(fast, slow, TWIN, TWIN_GRAD)
