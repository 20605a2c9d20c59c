"""The few functions that the model is handed instead of asking which platform, mesh or precision it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jax import Array

from llamax.kernels.attention import slow_attention
from llamax.kernels.cross_entropy import cross_entropy
from llamax.kernels.grouped import slow_experts


def unconstrained(x: Array, names: tuple[str | None, ...]) -> Array:
    """Leave the placement of x to the compiler: what one device needs."""
    del names
    return x


@dataclass(frozen=True)
class Seam:
    """Module-level functions or frozen dataclasses, never lambdas: two lambdas would make two graphs and two compiles.

    The defaults are the slow twins on one device; `run.py` picks the fast ones for a platform and a mesh.
    """

    attention: Callable = slow_attention  # (q, k, v, *, q_pos, k_pos, q_seg, k_seg, local_len) -> o_BTHDh
    run_experts: Callable = slow_experts  # (x_ND, experts, index_NK, gate_NK, *, gate_on) -> y_ND
    cross_entropy: Callable = cross_entropy  # (hidden_ND, head_DV, targets_N) -> nll_N, logz_N
    constrain: Callable = unconstrained  # (x, logical names of its dimensions) -> x
