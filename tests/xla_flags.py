"""How XLA compiles for tests, which compile far more than they compute. Imports no jax, which has to find the flags."""

from __future__ import annotations

from importlib.metadata import version

# A tiny training step compiles in 18 s on one core, in 14 s without optimisation, and in 6 s with the older emitters of
# fused loops besides (jax 0.10.2).
QUICK = {"xla_backend_optimization_level": 0}
if tuple(map(int, version("jax").split(".")[:2])) < (0, 11):  # newer ones have no other emitters and no such option
    QUICK["xla_cpu_use_fusion_emitters"] = False
QUICK_FLAGS = [f"--{name}={int(value)}" for name, value in QUICK.items()]


def quick_flags(devices: int = 8) -> str:
    """Of a CPU that looks like so many devices."""
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *QUICK_FLAGS])
