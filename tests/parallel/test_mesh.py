"""Mesh: every axis always there, every device once, and sizes that do not fit refused."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType

from llamax import config
from llamax.parallel.mesh import AXES, make_mesh


def test_all_axes_are_present_and_auto():
    mesh = make_mesh(config.Mesh(data=4, fsdp=2))
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"pipeline": 1, "data": 4, "fsdp": 2, "expert": 1, "context": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_part_of_the_devices():
    devices = jax.devices()[2:4]
    assert set(make_mesh({"fsdp": 2}, devices).devices.flat) == set(devices)


@pytest.mark.parametrize("sizes", [{"data": 4}, {"data": -1}, {"dta": 8}])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(AssertionError):
        make_mesh(sizes)


def test_equal_meshes_are_equal():
    """Otherwise two seams on the same mesh would compile twice."""
    assert make_mesh({"data": 8}) == make_mesh({"data": 8})
    assert make_mesh({"data": 8}) != make_mesh({"fsdp": 8})
