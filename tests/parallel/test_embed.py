"""Tokens looked up where the embedding is, on meshes that split its width, its vocabulary, or both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.model.seam import TABLE_AXES
from llamax.parallel.embed import SplitLookup, lookup
from llamax.parallel.mesh import make_mesh
from tests.splits import agree, normal

V, D = 24, 16
MESHES = [
    {"fsdp": 2, "expert": 2, "context": 2},
    {"data": 2, "context": 2, "tensor": 2},
    {"fsdp": 4, "tensor": 2},
    {"data": 8},
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("shape", [(V, D), (V - 1, D - 2)], ids=str)  # the second divides by few axes
def test_values_and_gradients_are_those_of_the_plain_lookup(sizes, shape):
    tokens_BT = np.random.default_rng(0).integers(0, shape[0], (8, 6)).astype(np.int32)
    split = SplitLookup(make_mesh(sizes), TABLE_AXES)
    agree(lambda a: lookup(*a, "float32"), lambda a: split(*a, "float32"), ((normal(*shape), tokens_BT),))


def test_the_table_stays_where_it_is_and_vectors_travel_in_the_dtype_asked_for():
    split = SplitLookup(make_mesh(MESHES[0]), TABLE_AXES)
    tokens_BT = jnp.zeros((8, 6), jnp.int32)
    text = str(jax.make_jaxpr(lambda table: split(table, tokens_BT, "bfloat16"))(normal(V, D)))
    gathered = [line for line in text.splitlines() if "all_gather[" in line]
    assert gathered and all(":i32[" in line for line in gathered)
    assert all(":bf16[" in line for line in text.splitlines() if "all_to_all[" in line) and "all_to_all[" in text
