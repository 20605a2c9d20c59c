"""Early fusion: the features of a row's pictures replace the embeddings at its `<|patch|>` tokens, in order."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float


def running_sum(x_BT: Array) -> Array:
    return jnp.cumsum(x_BT, axis=1)


def fuse(
    x_BTD: Float[Array, "B T D"],
    features_BFD: Float[Array, "B F D"],
    is_patch_BT: Bool[Array, "B T"],
    running: Callable[[Array], Array] = running_sum,
) -> Float[Array, "B T D"]:
    """The f-th patch token of row b becomes features[b, f]; every other embedding stays as it is.

    A row must not hold more patch tokens than features; the packer sees to it. `running` counts in the row's order.
    """
    rank_BT = running(is_patch_BT) - 1
    rank_BT = jnp.clip(rank_BT, 0, features_BFD.shape[1] - 1)
    replaced_BTD = jnp.take_along_axis(features_BFD, rank_BT[..., None], axis=1)
    return jnp.where(is_patch_BT[..., None], replaced_BTD.astype(x_BTD.dtype), x_BTD)
