"""What the backward pass computes again instead of keeping it, by name (`config.REMATS`); the gradients are the same.

    none       nothing: every layer keeps what its matmuls and norms read
    block      a layer: its input is kept
    period     a period of layers: its input is kept, and while its backward pass runs, all that its layers read
    attention  a period, but for its attention: the outputs of the fast kernel, and their normalisers, are kept too
    offload    a period, whose input waits in the host's memory: nothing of a layer stays on the device

Chen et al. 2016, arXiv:1604.06174; keeping attention's outputs: Korthikanti et al. 2022, arXiv:2205.05198, section 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from llamax.kernels.attention import ATTENDED

HOST = "pinned_host"  # the host's memory, as devices that reach it name it
INPUT = "input"  # of a period, or of a layer of the vision encoder

policies = jax.checkpoint_policies
# What of a period is kept beside its input; None: there is nothing to compute again.
KEPT: dict[str, Callable | None] = {
    "none": None,
    "block": None,  # its blocks are rematted one by one
    "period": policies.nothing_saveable,
    "attention": policies.save_only_these_names(ATTENDED),
    "offload": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT],
        offload_src="device",
        offload_dst=HOST,
    ),
}


def repeated(fn: Callable, remat: str) -> Callable:
    """`fn(x, ...) -> (x, told)`, the body of a loop over layers or periods, rematted."""
    if KEPT[remat] is None:
        return fn

    def named(x: Array, *rest: Any) -> tuple[Array, Any]:
        return fn(checkpoint_name(x, INPUT) if remat == "offload" else x, *rest)

    # In a scan, forward and backward are loops of their own: nothing could be shared, and no barrier is needed.
    return jax.checkpoint(named, prevent_cse=False, policy=KEPT[remat])


def block(fn: Callable, remat: str) -> Callable:
    """One layer of several in the body of a scan."""
    return jax.checkpoint(fn) if remat == "block" else fn
