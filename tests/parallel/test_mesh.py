"""Mesh: every axis always there, every device once, and sizes that do not fit refused."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType

from llamax import config
from llamax.config import ConfigError
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


class Wired:
    """A device that says in which slice it is."""

    platform, device_kind = "cpu", "none"

    def __init__(self, number, slice_index):
        self.id, self.slice_index, self.process_index = number, slice_index, 0


def test_slices_are_the_outer_factor_of_data():
    scattered = [Wired(n, n % 2) for n in range(8)]
    mesh = make_mesh({"data": 4, "tensor": 2, "slices": 2}, scattered)
    assert dict(mesh.shape)["data"] == 4
    assert [[d.slice_index for d in row] for row in mesh.devices.reshape(4, 2)] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert make_mesh({"data": 4, "tensor": 2, "slices": 2}) == make_mesh({"data": 4, "tensor": 2})  # all near


def test_slices_that_are_there_are_not_forgotten():
    with pytest.raises(ConfigError, match=r"mesh.slices=1, but the 8 devices come in 2 slices .* Set .*slices=2\."):
        make_mesh({"data": 8}, [Wired(n, n // 4) for n in range(8)])
