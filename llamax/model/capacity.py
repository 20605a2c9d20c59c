"""A capacity for every expert, optional: of each row's tokens it takes the first C, and the others go without it.

    C = ceil(factor x T K / E)

Rows do not compete with one another, so what is dropped is the same on every mesh and in every split of the batch, as
it is not with a capacity for a device or a batch (Switch Transformer, arXiv 2101.03961, section 2.2).

Letters: B rows, T tokens a row, K experts a token, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

CUMSUM = partial(jnp.cumsum, axis=1)


@dataclass(frozen=True)
class Capacity:
    factor: float  # of an even share of a row's tokens

    def __call__(self, index_BTK: Array, real_BT: Array, n_experts: int, running: Callable = CUMSUM) -> Array:
        """bool [B, T, K]: the assignments that fit, first come, first served. Padding takes no room and has none.

        `running`: sums over the tokens as they stand in the row, for context parallelism cuts rows.
        """
        _, T, K = index_BTK.shape
        room = math.ceil(self.factor * T * K / n_experts)
        chosen_BTE = jax.nn.one_hot(index_BTK, n_experts, dtype=jnp.int32).sum(2) * real_BT[..., None]
        before_BTE = running(chosen_BTE) - chosen_BTE
        return real_BT[..., None] & (jnp.take_along_axis(before_BTE, index_BTK, axis=2) < room)
