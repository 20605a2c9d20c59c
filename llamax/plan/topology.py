"""A cluster by its name, and its devices without having it: `v5p:8x8x4` chips on a torus, `h100:64x8` nodes x GPUs.

The compilers do not need the hardware: libtpu (extra `tpu`) knows the TPU topologies, and jax's CUDA plugin compiles
for a GPU that is described to it (targets/*.txtpb).
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamax.config import ConfigError
from llamax.config_dict import nearest
from llamax.plan.chips import CHIPS, Chip

TARGETS = Path(__file__).parent / "targets"
EXAMPLES = "v5p:8x8x4, v5e:16x16, v6e:16x16, tpu7x:4x4x4, h100:64x8, h200:32x8, b200:32x8"
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclass(frozen=True)
class Topology:
    name: str
    chip: Chip
    shape: tuple[int, ...]  # TPU: chips along each side; GPU: (nodes, GPUs a node)

    @property
    def platform(self) -> str:
        return "tpu" if self.chip.dims else "gpu"

    @property
    def n_devices(self) -> int:
        return math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def extra(self) -> str:
        """The optional dependency that compiles for it."""
        return "tpu" if self.chip.dims else "cuda"

    def has_compiler(self) -> bool:
        modules = ("libtpu",) if self.chip.dims else CUDA_PLUGINS
        return any(importlib.util.find_spec(module) for module in modules)

    def devices(self) -> list[Any]:
        """Devices that programs can be compiled for and nothing else. Needs `has_compiler`.

        Raises:
            ConfigError: the compiler knows no such topology.
        """
        from jax.experimental import topologies

        prepare()
        try:
            if self.chip.dims:
                return topologies.get_topology_desc(platform="tpu", topology_name=self.name).devices
            kind = self.name.split(":")[0]
            target = (TARGETS / f"{kind}.txtpb").read_text(encoding="utf-8")
            nodes, per_node = self.shape
            how = dict(topology_name=kind, topology=f"1x{nodes}x{per_node}", target_config=target)
            return topologies.get_topology_desc(platform="cuda", **how).devices
        except Exception as error:
            said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            change = f"Name another topology ({EXAMPLES}), or use --estimate, which needs no compiler."
            raise ConfigError(f"--topology {self.name}", f"its compiler refuses: {said}", change) from error

    def places(self, devices: np.ndarray) -> np.ndarray:
        """[n, dims] of the devices given in this order: coordinates on the torus, or (node, GPU)."""
        if self.chip.dims:
            return np.array([[*d.coords, getattr(d, "core_on_chip", 0) or 0] for d in devices.flat])
        return np.array([divmod(d.id, self.shape[1]) for d in devices.flat])

    def counted_places(self) -> np.ndarray:
        """The same without devices, in row-major order: what an estimate takes."""
        shape = (*self.shape, self.chip.devices_per_chip) if self.chip.dims else self.shape
        return np.stack(np.unravel_index(np.arange(self.n_devices), shape), axis=1)


def prepare() -> None:
    """Before jax starts a backend: none of the accelerators compiled for is looked for on this machine."""
    for name, value in (
        *(("JAX_PLATFORMS", "cpu"), ("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")),
        # libtpu would ask who it is, and say at length that nobody answers.
        *(("TPU_WORKER_HOSTNAMES", "localhost"), ("TPU_WORKER_ID", "0"), ("TPU_ACCELERATOR_TYPE", "v5p-8")),
        *(("TF_CPP_MIN_LOG_LEVEL", "3"), ("TPU_STDERR_LOG_LEVEL", "3"), ("TPU_MIN_LOG_LEVEL", "3")),
        # NVIDIA's libraries are not needed to compile, and their absence would keep the plugin from loading.
        ("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1"),
    ):
        os.environ.setdefault(name, value)
    import jax

    if not jax.config.jax_platforms:  # jax reads the environment when it is imported, which may have been before
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


def parse(name: str) -> Topology:
    """The topology of a name like `v5p:8x8x4`.

    Raises:
        ConfigError: no such kind of chip, or a shape that it does not come in.
    """
    found = re.fullmatch(r"([A-Za-z0-9_]+)[:=]([0-9x]+)", name.strip())
    kind, _, _ = name.partition(":")
    if kind.lower() not in CHIPS:
        close = nearest(kind.lower(), tuple(CHIPS))
        advice = f"Did you mean {close}:...? " if close else ""
        raise ConfigError(
            f"--topology {name}", f"its kind is one of {', '.join(CHIPS)}", f"{advice}Write it like {EXAMPLES}."
        )
    kind = kind.lower()
    chip = CHIPS[kind]
    parts = found[2].split("x") if found else []
    dims = chip.dims or 2
    if len(parts) != dims or not all(part.isdecimal() and int(part) > 0 for part in parts):
        form = " x ".join(["nodes", "GPUs a node"] if not chip.dims else ["chips"] * dims)
        example = next(e for e in (*EXAMPLES.split(", "), "v4:4x4x4") if e.startswith(f"{kind}:"))
        raise ConfigError(f"--topology {name}", f"a shape of {kind} is {form}", f"Write it like {example}.")
    return Topology(f"{kind}:{found[2]}" if found else name, chip, tuple(map(int, parts)))
