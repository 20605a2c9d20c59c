"""The device mesh: a grid of devices whose axes are always these six, of size 1 when unused.

The axes are Auto: the compiler propagates shardings, which we pin at the step's inputs and outputs and constrain at
block boundaries (docs/decisions/0004-named-rules-sharding-pinned.md). An axis further left varies more slowly, so that
its neighbours are further apart: `data` may cross slow links, `tensor` gets the fastest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llamax import config

AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")


def make_mesh(sizes: config.Mesh | Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all, of every process) in an order that suits how they are wired.

    `sizes` gives devices along an axis, 1 where an axis is left out; a -1 must be resolved (`config.check_devices`).
    Devices may also be those of a topology that is not here, for compiling ahead of time.
    """
    devices = list(jax.devices() if devices is None else devices)
    named = dict(sizes) if isinstance(sizes, Mapping) else dataclasses.asdict(sizes)
    assert not set(named) - set(AXES), f"mesh axes {sorted(named)} are not all among {AXES}"
    shape = tuple(named.get(axis, 1) for axis in AXES)
    assert min(shape) >= 1 and math.prod(shape) == len(devices), f"mesh {named} does not fit {len(devices)} devices"
    # An axis may take part of a physical one: 16 x 16 on a torus of 8 x 8 x 4 has no other way.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
