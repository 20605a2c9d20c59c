"""Heads and the vocabulary over several devices: each computes its part; together they are the whole."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from llamax.kernels.attention import slow_attention
from llamax.kernels.cross_entropy import slow_cross_entropy
from llamax.parallel.mesh import make_mesh
from llamax.parallel.tensor import SplitHeads, SplitVocabulary
from tests.splits import Seen, agree, normal

B, T, D, V = 2, 8, 8, 24
MESH = {"data": 2, "tensor": 4}


@pytest.mark.parametrize(("heads", "kv", "own"), [(8, 4, (2, 1)), (8, 2, (2, 1)), (8, 8, (2, 2)), (6, 2, (6, 2))])
def test_each_device_attends_with_its_own_heads(heads, kv, own):
    """Fewer heads of keys and values than devices are copied; heads that do not divide stay whole."""
    kernel = Seen(slow_attention)
    q, k, v = normal(B, T, heads, 4), normal(B, T, kv, 4, seed=1), normal(B, T, kv, 4, seed=2)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    rows = dict(q_pos=positions, k_pos=positions, q_seg=positions // 5 + 1, k_seg=positions // 5 + 1)
    agree(slow_attention, SplitHeads(kernel, make_mesh(MESH)), (q, k, v), **rows)
    assert [shape[2] for shape in kernel.shapes] == [own[0], own[1], own[1]]


@pytest.mark.parametrize(("columns", "own"), [(V, V // 4), (V + 1, V + 1)])
def test_each_device_scores_its_part_of_the_vocabulary(columns, own):
    """Logits far from zero too: the sum of exponentials is taken from the largest of all devices."""
    kernel = Seen(slow_cross_entropy)
    targets = jnp.arange(B * T, dtype=jnp.int32) * 5 % columns
    args = (30 * normal(B * T, D), normal(D, columns), targets)
    agree(slow_cross_entropy, SplitVocabulary(kernel, make_mesh(MESH), ("embed", "vocab")), args)
    assert kernel.shapes[1] == (D, own)
