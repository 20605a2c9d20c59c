"""A capacity of experts beside a loop over tokens, and a layer that drops beside one that never had the assignment."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.kernels.grouped import slow_experts, sorted_experts
from llamax.losses import router
from llamax.model.capacity import Capacity
from llamax.model.moe import MoE
from llamax.model.seam import Seam
from llamax.observe import metrics
from llamax.parallel.context import SplitTokens
from llamax.parallel.mesh import make_mesh
from llamax.stripes import Stripes
from tests.model import twins
from tests.tolerances import TWIN, TWIN_GRAD

E, T = 4, 24
REAL_BT = np.arange(T) < np.array([[T], [17]])  # padding behind, and some between
REAL_BT[1, 4:6] = False


def kept_by_loop(index_BTK, factor: float):
    """Token by token in the order of the row."""
    kept = np.zeros(index_BTK.shape, bool)
    for b, t in np.ndindex(*index_BTK.shape[:2]):
        for k, e in enumerate(index_BTK[b, t]):
            room = np.ceil(factor * T * index_BTK.shape[2] / E)
            taken = sum(kept[b, s, j] for s in range(t) for j in range(len(kept[b, s])) if index_BTK[b, s, j] == e)
            kept[b, t, k] = REAL_BT[b, t] and taken < room
    return kept


@pytest.mark.parametrize("factor", [0.3, 0.75, 4.0])
@pytest.mark.parametrize("top_k", [1, 2])
def test_capacity_against_a_loop(top_k, factor):
    rng = np.random.default_rng(top_k)
    first_BT = np.minimum(rng.geometric(0.6, (2, T)) - 1, E - 1)
    index_BTK = np.stack([(first_BT + k * rng.integers(1, E, (2, T))) % E for k in range(top_k)], -1).astype(np.int32)
    kept = jax.jit(partial(Capacity(factor), n_experts=E))(index_BTK, REAL_BT)
    np.testing.assert_array_equal(kept, kept_by_loop(index_BTK, factor))
    assert (np.asarray(kept) == REAL_BT[..., None]).all() == (factor == 4.0)
    # Where rows are cut for context parallelism, the order of the row decides, not that of the array.
    tokens = SplitTokens(make_mesh({"context": 2}, jax.devices()[:2]), Stripes(2, 2))
    moved = tokens.stripes.places(T)
    cut = jax.jit(partial(Capacity(factor), n_experts=E, running=tokens.running))(
        index_BTK[:, moved], REAL_BT[:, moved]
    )
    np.testing.assert_array_equal(cut, np.asarray(kept)[:, moved])
    assert not np.array_equal(moved, np.arange(T))


@pytest.mark.parametrize("gate_on", ["input", "output"])
def test_what_is_dropped_gives_and_learns_nothing(gate_on):
    """Values and gradients of a layer, beside the shared expert and only those assignments that a loop keeps."""
    model = replace(twins.TINY, n_experts=E, top_k=2, gate_on=gate_on)
    x_BTD = np.random.default_rng(2).normal(size=(2, T, 16)).astype(np.float32)
    factor = 0.5
    build = lambda seam: twins.fresh(partial(MoE, model, seam, out_gain=1.0))  # noqa: E731
    graph, tree = build(Seam(run_experts=sorted_experts, capacity=Capacity(factor)))
    y, routing = jax.jit(lambda tree: twins.bind(graph, tree)(x_BTD, REAL_BT))(tree)
    kept = kept_by_loop(np.asarray(routing.index), factor)
    np.testing.assert_array_equal(routing.dropped, ~kept & REAL_BT[..., None])
    assert routing.dropped.any() and kept.any()

    def only_kept(x_ND, experts, index_NK, gate_NK, *, gate_on):
        return slow_experts(x_ND, experts, index_NK, jnp.where(kept.reshape(-1, 2), gate_NK, 0), gate_on=gate_on)

    slow_graph, _ = build(Seam(run_experts=only_kept))

    def total(graph, tree, x):
        y, _ = twins.bind(graph, tree)(x, REAL_BT)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    (_, y), got = jax.jit(jax.value_and_grad(partial(total, graph), (0, 1), has_aux=True))(tree, x_BTD)
    (_, slow_y), want = jax.jit(jax.value_and_grad(partial(total, slow_graph), (0, 1), has_aux=True))(tree, x_BTD)
    np.testing.assert_allclose(y, slow_y, **TWIN)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TWIN_GRAD), got, want)


def test_drops_are_counted_among_real_tokens():
    logits, index = jnp.zeros((1, 2, T, E)), jnp.zeros((1, 2, T, 1), jnp.int32)
    dropped = jnp.ones((1, 2, T, 1), bool).at[0, 0, :14].set(False)  # padding must not count, whatever it says
    stats = router.stats(logits, index, REAL_BT, dropped)
    assert stats.dropped.tolist() == [10 + 15] and stats.loads.sum() == 24 + 15
    assert router.stats(logits, index, REAL_BT).dropped is None
    shown = metrics.expert_scalars(metrics.experts(stats.loads, stats.squares, 1, stats.dropped), [3])
    assert shown["experts/layer_03/dropped"] == shown["experts/dropped"] == pytest.approx(25 / 39)
    assert "experts/dropped" not in metrics.expert_scalars(metrics.experts(stats.loads, stats.squares, 1), [3])
