"""What is known of each kind of accelerator without having one: one row a kind.

Sources: TPU: Google Cloud's page of each generation ("system architecture": memory, bandwidths a chip; the
bidirectional bandwidth of all links of a chip, divided here by links and directions). v7x counts one of the two devices
of a chip. GPU: NVIDIA's data sheets (memory, its bandwidth, NVLink in both directions, halved here), and one 400 Gb/s
network adapter a GPU, as in NVIDIA's own DGX H100, H200 and B200. Peaks: `observe/metrics.py`, which MFU uses as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamax.observe.metrics import PEAK_BF16

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Chip:
    """One jax device of a kind. Bandwidths are bytes a second, links those of one direction."""

    kind: str  # its key in metrics.PEAK_BF16
    hbm_bytes: int  # what a program can have
    hbm_bandwidth: float
    link_bandwidth: float  # TPU: of one link to one neighbour; GPU: to all others of its node together
    slow_bandwidth: float  # a device's share of the network between slices or nodes
    dims: int = 0  # TPU: of the torus; 0: a switch
    devices_per_chip: int = 1
    largest: int = 0  # TPU: chips along the longest side of a pod

    @property
    def flops_per_s(self) -> float:
        """Dense bfloat16."""
        return PEAK_BF16[self.kind]


CHIPS = {
    "v4": Chip("TPU v4", 32 * GIB, 1228 * GB, 50 * GB, 3.125 * GB, dims=3, largest=16),
    "v5e": Chip("TPU v5e", int(15.75 * GIB), 819 * GB, 50 * GB, 3.125 * GB, dims=2, largest=16),
    "v5p": Chip("TPU v5", 95 * GIB, 2765 * GB, 100 * GB, 6.25 * GB, dims=3, largest=28),
    "v6e": Chip("TPU v6", int(31.25 * GIB), 1640 * GB, 100 * GB, 12.5 * GB, dims=2, largest=32),
    "tpu7x": Chip("TPU7x", 96 * GB, 3690 * GB, 50 * GB, 6.25 * GB, dims=3, devices_per_chip=2, largest=32),
    "h100": Chip("H100", 80 * GB, 3350 * GB, 450 * GB, 50 * GB),
    "h200": Chip("H200", 141 * GB, 4800 * GB, 450 * GB, 50 * GB),
    "b200": Chip("B200", 180 * GB, 7700 * GB, 900 * GB, 50 * GB),
}
