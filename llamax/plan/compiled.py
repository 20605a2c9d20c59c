"""The real step, compiled ahead of time for devices that are not here: what run.py would compile, from shapes alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llamax import config, stripes
from llamax.data.pipeline import lacking
from llamax.model.seam import make_seam
from llamax.model.skeleton import Skeleton, skeleton
from llamax.optim.build import optimizer
from llamax.parallel import place
from llamax.parallel.mesh import make_mesh
from llamax.plan.topology import Topology
from llamax.train.programs import abstract_batch, build
from llamax.train.state import State


class Traced(NamedTuple):
    """A run's step on a mesh, ready to be compiled."""

    mesh: Mesh
    step: Any
    state: State  # shapes, dtypes and places
    batch: Any


def traced(run: config.Run, devices: list[Any]) -> Traced:
    """Steps with pictures are the larger ones: where the run has them, one of those is taken."""
    mesh = make_mesh(config.check_devices(run, len(devices)), devices)
    bones = bones_of(run, mesh)
    step, state = build(run, bones, optimizer(run.optim, run.train.steps, bones.split(bones.kinds)[0]), mesh)
    batch = abstract_batch(run, slots(run), place.batch_shardings(mesh, lacking(run.data)))
    return Traced(mesh, step, state, batch)


def bones_of(run: config.Run, mesh: Mesh) -> Skeleton:
    cut = stripes.of(run.model, run.data.seq_len, mesh.shape["context"])
    seam = make_seam(mesh, run.train, cut)
    # Any token may stand for the patch: it is a constant that no shape depends on.
    return skeleton(run.model.in_training, seam, patch_id=0, train=run.train, tune=run.tune)


def lower(step: Traced, topology: Topology) -> Any:
    with _kernels_for(topology):
        return step.step.lower(step.state, step.batch)


def peak_of(program: Any) -> int:
    """Bytes of one device at the worst moment, by the compiler. A CPU's tells a peak without what is temporary."""
    memory = program.memory_analysis()
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    (platform,) = {device.platform for device in jax.tree.leaves(program.input_shardings)[0].device_set}
    told = 0 if platform == "cpu" else getattr(memory, "peak_memory_in_bytes", 0)
    return int(told or whole + memory.temp_size_in_bytes)


@contextlib.contextmanager
def _kernels_for(topology: Topology) -> Iterator[None]:
    """tokamax asks which device is here before it gives a kernel; here it is told that it compiles for another."""
    try:
        if topology.chip.dims:
            raise ImportError
        import tokamax
        from absl import flags
    except ImportError:
        yield
        return
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # else it parses llamax's own command line
    with tokamax.config.cross_compile(True):
        yield


def bytes_per_device(tree: Any) -> int:
    """Of a tree of shapes with their shardings: what the fullest device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def slots(run: config.Run) -> int:
    """Picture tiles a row of the larger kind of step; the manifests, which need not be here, are not asked."""
    return run.data.tiles_per_row if run.model.vision and run.data.multimodal_steps else 0


def places(step: Traced, topology: Topology) -> np.ndarray:
    """Where the mesh's devices stand in the cluster, in the mesh's order."""
    return topology.places(step.mesh.devices)
