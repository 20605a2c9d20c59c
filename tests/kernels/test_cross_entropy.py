"""Cross-entropy in chunks of the vocabulary against the definition; the logits of a whole row of text never exist."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.kernels.cross_entropy import cross_entropy, slow_cross_entropy
from tests.tolerances import BF16, ORACLE, TWIN, TWIN_GRAD

N, D, V = 40, 16, 100


def inputs(hidden_dtype=jnp.float32, head_dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (N, D)).astype(hidden_dtype)
    head = jax.random.normal(keys[1], (D, V)).astype(head_dtype)
    targets = jax.random.randint(keys[2], (N,), 0, V).at[:4].set(jnp.array([0, 31, 96, V - 1]))  # edges of chunks
    return hidden, head, targets, tuple(jax.random.normal(keys[3], (2, N)))


@partial(jax.jit, static_argnums=0)
def run(f, hidden, head, targets, cotangents):
    (nll, logz), backward = jax.vjp(lambda hidden, head: f(hidden, head, targets), hidden, head)
    return (nll, logz), backward(cotangents)


def assert_twins(fast, slow, value=TWIN, grad=TWIN_GRAD):
    for a, b in zip(fast[0], slow[0], strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_allclose(a, b, **value)
    for a, b in zip(fast[1], slow[1], strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), **grad)


def test_definition_against_loops():
    hidden, head, targets, _ = inputs()
    nll, logz = map(np.asarray, jax.jit(slow_cross_entropy)(hidden, head, targets))
    hidden, head, targets = np.float64(hidden), np.float64(head), np.asarray(targets)
    for n in range(N):
        logits = hidden[n] @ head
        np.testing.assert_allclose(logz[n], np.log(np.exp(logits).sum()), **ORACLE)
        np.testing.assert_allclose(nll[n], np.log(np.exp(logits).sum()) - logits[targets[n]], **ORACLE)


@pytest.mark.parametrize("chunk", [32, 25, 100, 1000, 99])
def test_chunks_are_the_whole(chunk):
    """Chunks that divide V, that do not, and one that holds it; the last of 32 and of 99 reach back over 28 and 98."""
    args = inputs()
    assert_twins(run(partial(cross_entropy, chunk=chunk), *args), run(slow_cross_entropy, *args))


@pytest.mark.parametrize("which", [0, 1])
def test_each_output_alone(which):
    hidden, head, targets, cotangents = inputs()
    alone = tuple(c if i == which else jnp.zeros(N) for i, c in enumerate(cotangents))
    args = hidden, head, targets, alone
    assert_twins(run(chunks_of_32, *args), run(slow_cross_entropy, *args))


def chunks_of_32(*args):
    return cross_entropy(*args, chunk=32)


@pytest.mark.parametrize("head_dtype", [jnp.bfloat16, jnp.float32])
def test_bfloat16(head_dtype):
    args = inputs(jnp.bfloat16, head_dtype)
    fast, slow = run(chunks_of_32, *args), run(slow_cross_entropy, *args)
    # Products of bf16 are exact in float32 and summed there, so the values are as close as in float32.
    assert_twins(fast, slow, TWIN, BF16)


def test_logits_as_large_as_a_spike():
    hidden, head, targets, cotangents = inputs()
    args = hidden * 100, head, targets, cotangents
    fast, slow = run(chunks_of_32, *args), run(slow_cross_entropy, *args)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(fast))
    # Logits near 2,000 are rounded to 1e-4, and so is every probability.
    assert_twins(fast, slow, TWIN, dict(rtol=1e-3, atol=1e-2))


def test_logits_never_exist():
    """No intermediate of forward or backward holds N * V values."""
    hidden, head, targets, cotangents = inputs()
    N = 4 * D  # so that [N, V] is the largest shape around
    args = jnp.tile(hidden, (2, 1))[:N], head, jnp.tile(targets, 2)[:N], tuple(jnp.tile(c, 2)[:N] for c in cotangents)
    largest = lambda f: max(x.size for x in intermediates(jax.make_jaxpr(partial(run, f))(*args).jaxpr))  # noqa: E731
    assert largest(slow_cross_entropy) >= N * V
    assert largest(chunks_of_32) < N * V


def intermediates(jaxpr):
    """Every value that a program computes, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars if hasattr(v.aval, "size"))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from intermediates(inner)
