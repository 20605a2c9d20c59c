"""Attention layers beside the slow twin: every mask, packed rows, padding, temperature, QK norm, grouped heads."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax import config
from llamax.kernels.attention import TILE, blocked_attention
from llamax.model.attention import Attention, places, temperature
from llamax.model.seam import Seam
from tests.model import twins
from tests.tolerances import ORACLE

X_BTD = np.random.default_rng(1).normal(size=(2, 24, 16)).astype(np.float32)
KINDS = ("rope_chunk", "rope_full", "nope_full")


def compare(model: config.Model, kind: str, positions=twins.POSITIONS, segments=twins.SEGMENTS) -> None:
    graph, tree = twins.fresh(partial(Attention, model, kind, Seam(), out_gain=1.0))
    at = places(jnp.asarray(positions), jnp.asarray(segments), model)
    ours = np.asarray(twins.bind(graph, tree)(jnp.asarray(X_BTD), at)[0])
    assert np.isfinite(ours).all()  # on padding too
    for row in range(2):
        slow = twins.attention(
            twins.float64(tree), X_BTD[row].astype(float), positions[row], segments[row], model, kind
        )
        real = segments[row] > 0
        np.testing.assert_allclose(ours[row][real], slow[real], **ORACLE)


@pytest.mark.parametrize("n_heads", [6, 10])  # groups of 3 and of 5
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_matches_the_slow_twin(kind, qk_norm, n_heads):
    compare(replace(twins.TINY, n_heads=n_heads, qk_norm=qk_norm), kind)


def test_temperature_can_be_off():
    compare(replace(twins.TINY, attn_temperature=0.0), "nope_full")


def test_chunk_layers_are_exact_ten_million_tokens_out():
    """Local rotation by position mod C equals the global one, where float32 angles of the position itself fail."""
    model = replace(twins.TINY, rope=config.Rope(theta=500_000.0), chunk_len=10)
    far = np.stack([np.arange(24, dtype=np.int32) + 10_000_000] * 2)
    compare(model, "rope_chunk", positions=far, segments=np.ones_like(far))


def test_chunks_restart_with_every_document():
    at = places(jnp.asarray(twins.POSITIONS), jnp.asarray(twins.SEGMENTS), twins.TINY)
    sizes = [np.unique(row[row > 0], return_counts=True)[1].tolist() for row in np.asarray(at.chunks)]
    assert sizes == [[5, 4, 5, 2, 5], [5, 5, 5, 5, 4]]


@pytest.mark.parametrize("kind, alone", [("rope_chunk", True), ("rope_full", False)])
def test_a_local_layer_costs_as_much_a_chunk_on_any_row(kind, alone):
    """Each chunk of a long row is computed without looking at any other, forward or backward: the cost is O(T C).

    Where the kernel computes a tile that is masked, a NaN in its values comes through (0 x NaN).
    """
    C, chunks = TILE, 6
    model = replace(twins.TINY, chunk_len=C)
    graph, tree = twins.fresh(partial(Attention, model, kind, Seam(attention=blocked_attention), out_gain=1.0))
    at = places(jnp.arange(chunks * C)[None], jnp.ones((1, chunks * C), jnp.int32), model)
    own = np.arange(chunks * C) // C

    @jax.jit
    def run(x):
        y, backward = jax.vjp(lambda x: twins.bind(graph, tree)(x, at)[0], x)
        return y, backward(jnp.ones_like(y))[0]

    x = np.random.default_rng(0).normal(size=(1, chunks * C, model.dim)).astype(np.float32)
    for chunk in (chunks // 2, chunks - 1):
        y, dx = run(jnp.where((own == chunk)[None, :, None], x, jnp.nan))
        assert np.isfinite(y[:, own == chunk]).all() == alone
        assert np.isfinite(dx[:, own == chunk]).all() == alone


def test_temperature_of_the_released_models():
    positions = jnp.array([0, 1000, 8190, 8191, 131_071, 1_048_575, 10_485_759])
    values = np.asarray(temperature(positions, config.Model()))
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values[:3], 1.0)
    np.testing.assert_allclose(values[3:], [1.0693, 1.2833, 1.4860, 1.7155], atol=5e-5)
    neighbours = np.asarray(temperature(jnp.array([2**25 + 8190, 2**25 + 8191]), config.Model()))
    assert neighbours[0] < neighbours[1]  # float32 positions would not tell these apart
