"""The device mesh: a grid of devices whose axes are always these six, of size 1 when unused.

The axes are Auto: the compiler propagates shardings, which we pin at the step's inputs and outputs and constrain at
block boundaries (docs/decisions/0004-named-rules-sharding-pinned.md). An axis further left varies more slowly, so that
its neighbours are further apart: `data` may cross slow links, `tensor` gets the fastest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llamax import config
from llamax.config import ConfigError

AXES = config.MESH_AXES


def make_mesh(sizes: config.Mesh | Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all, of every process) in an order that suits how they are wired.

    `sizes` gives devices along an axis, and perhaps `slices`; 1 where one is left out. A -1 must be resolved
    (`config.check_devices`). Devices may also be those of a topology that is not here, for compiling ahead of time.

    Raises:
        ConfigError: the devices come in more slices than are asked for, or in others.
    """
    devices = list(jax.devices() if devices is None else devices)
    named = {**sizes} if isinstance(sizes, Mapping) else {**sizes.axes, "slices": sizes.slices}
    slices = named.pop("slices", 1)
    assert not set(named) - set(AXES), f"mesh axes {sorted(named)} are not all among {AXES}"
    shape = {axis: named.get(axis, 1) for axis in AXES}
    n = math.prod(shape.values())
    assert min(shape.values()) >= 1 and n == len(devices), f"mesh {named} does not fit {len(devices)} devices"
    assert shape["data"] % slices == 0, f"data={shape['data']} has no {slices} equal slices"
    within = tuple(n // slices if axis == "data" else n for axis, n in shape.items())
    # An axis may take part of a physical one: 16 x 16 on a torus of 8 x 8 x 4 has no other way.
    parts = [
        mesh_utils.create_device_mesh(within, part, allow_split_physical_axes=True)
        for part in in_slices(devices, slices)
    ]
    return Mesh(np.concatenate(parts, AXES.index("data")), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def in_slices(devices: Sequence[jax.Device], slices: int) -> list[list[jax.Device]]:
    """The devices in `slices` equal groups. TPUs know their slice; elsewhere processes stand together, in order."""
    found = sorted({index_of_slice(device) for device in devices})
    if slices % len(found):
        true = f"the {len(devices)} devices come in {len(found)} slices with slow links between them"
        raise ConfigError(f"--config.mesh.slices={slices}", true, f"Set --config.mesh.slices={len(found)}.")
    ordered = sorted(devices, key=index_of_slice)  # stable: within a slice they stay as they were
    size = len(devices) // slices
    return [ordered[at : at + size] for at in range(0, len(devices), size)]


def index_of_slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", 0) or 0
