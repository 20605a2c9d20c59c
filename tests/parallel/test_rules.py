"""Rules: names to mesh axes, one use of an axis a spec, and dimensions that do not divide."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from llamax.parallel import rules
from llamax.parallel.mesh import AXES, make_mesh


def test_tables_name_only_mesh_axes():
    for table in (rules.PARAMETERS, rules.ACTIVATIONS):
        for entry in table.values():
            assert set((entry,) if isinstance(entry, str) else entry or ()) <= set(AXES)


def test_spec():
    stacked = rules.spec(("layers", "embed", "heads", "head_dim"), rules.PARAMETERS)
    assert stacked == P("pipeline", "fsdp", "tensor", None)
    assert rules.spec(("experts", "ffn", "embed"), rules.PARAMETERS) == P("expert", "tensor", "fsdp")
    rows = ("pipeline", "data", "fsdp", "expert")
    assert rules.spec(("rows", "tokens", None), rules.ACTIVATIONS) == P(rows, "context", None)
    assert rules.spec((), rules.PARAMETERS) == P()


def test_an_axis_is_used_once():
    assert rules.spec(("embed", "embed"), rules.PARAMETERS) == P("fsdp", None)
    table = {"a": ("data", "fsdp"), "b": ("fsdp", "expert"), "c": "expert"}
    assert rules.spec(("a", "b", "c"), table) == P(("data", "fsdp"), None, "expert")


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError):
        rules.spec(("embd",), rules.PARAMETERS)


def test_shardings_place_real_arrays():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    axes = {"q": ("embed", "heads"), "odd": {"up": ("embed", "ffn")}, "norm": ("norm",)}
    shapes = {"q": jnp.ones((8, 6)), "odd": {"up": jax.ShapeDtypeStruct((6, 8), jnp.float32)}, "norm": jnp.ones(5)}
    placed = rules.shardings(axes, shapes, mesh)
    assert placed["q"].spec == P("fsdp", "tensor")  # an axis of size 1 divides anything
    assert placed["norm"].spec == P(None)
    assert placed["odd"]["up"].spec == P(None, "tensor")  # 6 over 4 devices does not divide
    assert {s.data.shape for s in jax.device_put(shapes["q"], placed["q"]).addressable_shards} == {(2, 6)}


def test_what_could_not_be_split_is_reported():
    axes = {"odd": {"up": ("embed", "ffn")}, "even": ("embed", "ffn")}
    shapes = {"odd": {"up": jnp.ones((6, 3))}, "even": jnp.ones((8, 3))}
    (line,) = rules.unsharded(axes, shapes, make_mesh({"data": 2, "fsdp": 4}))
    assert "odd/up" in line and "embed=6" in line and "fsdp=4" in line
    assert rules.unsharded(axes, shapes, make_mesh({"data": 8})) == []
