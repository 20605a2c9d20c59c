"""Rules: names to mesh axes, one use of an axis a spec, and dimensions that do not divide."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llamax.parallel import rules
from llamax.parallel.mesh import AXES, make_mesh


def test_tables_name_only_mesh_axes():
    for table in (rules.PARAMETERS, rules.ACTIVATIONS, *rules.RESTING.values()):
        for entry in table.values():
            assert set((entry,) if isinstance(entry, str) else entry or ()) <= set(AXES)


def test_spec():
    stacked = rules.spec(("layers", "embed", "heads", "head_dim"), rules.PARAMETERS)
    assert stacked == P("pipeline", ("fsdp", "expert", "context"), "tensor", None)
    wide = ("fsdp", "expert", "context")
    assert rules.spec((None, "embed", "heads", "head_dim"), rules.PARAMETERS) == P(None, wide, "tensor", None)
    assert rules.spec(("experts", "ffn", "embed"), rules.PARAMETERS) == P("expert", "tensor", ("fsdp", "context"))
    zero = rules.RESTING["zero"]
    assert rules.spec((None, "embed", "heads"), zero) == P(None, (*wide, "data"), "tensor")
    assert rules.spec(("experts", "embed", "ffn"), zero) == P("expert", ("fsdp", "context", "data"), "tensor")
    rows = ("pipeline", "data", "fsdp", "expert")
    assert rules.spec(("rows", "tokens", None), rules.ACTIVATIONS) == P(rows, "context", None)
    assert rules.spec((), rules.PARAMETERS) == P()


def test_parts_of_wide_dimensions_are_whole_tiles():
    """5,120 numbers over 32 devices are 160 each; over 32 x 8 they would be 20, no multiple of 16. The first
    axis splits at any rate, and a narrow dimension by all of them."""
    for size, fsdp, expert, want in ((5120, 32, 8, 32), (5120, 32, 2, 64), (5120, 512, 2, 512), (128, 8, 4, 32)):
        mesh = jax.sharding.AbstractMesh((1, 1, fsdp, expert, 1, 1), AXES)
        (split,) = rules.fitting(("embed",), (size,), rules.PARAMETERS, mesh)
        assert rules.ways(split, mesh) == want, (size, fsdp, expert)


def test_an_axis_is_used_once():
    assert rules.spec(("heads", "ffn"), rules.PARAMETERS) == P("tensor", None)
    table = {"a": ("data", "fsdp"), "b": ("fsdp", "expert"), "c": "expert"}
    assert rules.spec(("a", "b", "c"), table) == P(("data", "fsdp"), "expert", None)


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError):
        rules.spec(("embd",), rules.PARAMETERS)


def test_shardings_place_real_arrays():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    axes = {"q": ("embed", "heads"), "odd": {"up": ("embed", "ffn")}, "norm": ("norm",)}
    shapes = {"q": jnp.ones((8, 6)), "odd": {"up": jax.ShapeDtypeStruct((6, 8), jnp.float32)}, "norm": jnp.ones(5)}
    placed = rules.shardings(axes, shapes, mesh)
    assert placed["q"].spec == P(("fsdp", "expert", "context"), "tensor")  # an axis of size 1 divides anything
    assert placed["norm"].spec == P(None)
    assert placed["odd"]["up"].is_equivalent_to(NamedSharding(mesh, P()), 2)  # 6 over 4 devices does not divide
    assert {s.data.shape for s in jax.device_put(shapes["q"], placed["q"]).addressable_shards} == {(2, 6)}


def test_a_dimension_that_does_not_divide_by_all_axes_is_split_by_those_that_it_does():
    mesh = make_mesh({"data": 2, "fsdp": 2, "expert": 2})
    zero = rules.RESTING["zero"]

    def parts(axes, shape, table):
        (at,) = rules.shardings([axes], [jnp.ones(shape)], mesh, table)
        return {axis for entry in at.spec for axis in ([entry] if isinstance(entry, str) else entry or ())} - {
            *("context", "tensor", "pipeline")
        }

    assert parts(("embed", "ffn"), (8, 3), zero) == {"fsdp", "expert", "data"}
    assert parts(("embed", "ffn"), (12, 3), zero) == {"fsdp", "expert"}  # the slow axis goes without
    assert parts(("embed", "ffn"), (6, 3), zero) == parts(("embed", "ffn"), (6, 3), rules.PARAMETERS) == {"fsdp"}
    assert parts(("experts", "embed"), (4, 4), zero) == {"expert", "fsdp", "data"}
    assert parts(("experts", "embed"), (3, 4), zero) == {"fsdp", "expert"}  # what experts cannot take is free


def test_what_could_not_be_split_is_reported():
    axes = {"odd": {"up": ("embed", "ffn")}, "even": ("embed", "ffn")}
    shapes = {"odd": {"up": jnp.ones((6, 3))}, "even": jnp.ones((8, 3))}
    (line,) = rules.unsharded(axes, shapes, make_mesh({"data": 2, "fsdp": 4}))
    assert "odd/up" in line and "embed=6" in line and "fsdp=4" in line
    assert rules.unsharded(axes, shapes, make_mesh({"data": 8})) == []
    for_zero = rules.unsharded(axes, shapes, make_mesh({"data": 4, "fsdp": 2}), rules.RESTING["zero"])
    assert for_zero == ["odd/up: embed=6 is split by fsdp=2, not divisible by fsdp=2 * data=4"]
