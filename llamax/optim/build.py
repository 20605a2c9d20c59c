"""The optimizer: AdamW from optax, behind a clip of the global gradient norm; the vision side at a rate of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from llamax import config
from llamax.optim.schedules import schedule

VISION = ("vision", "projector")  # the model's parts that `vision_lr_ratio` acts on


def optimizer(optim: config.Optim, steps: int, kinds: dict) -> optax.GradientTransformation:
    """`kinds`: the tree of parameter kinds; weight decay acts on "matrix" only (not on embeddings, norms, biases)."""
    vision = jax.tree.map_with_path(lambda path, _: path[0].key in VISION, kinds)
    adamw = optax.adamw(
        schedule(optim, steps),
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=jax.tree.map(lambda kind: kind == "matrix", kinds),
    )
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        adamw if optim.moments_dtype == "float32" else stored_as(optim.moments_dtype, adamw),
        optax.masked(optax.scale(optim.vision_lr_ratio), vision),
    )


def stored_as(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, whose floats rest as `dtype` between updates, which are computed in float32. (optax's own `mu_dtype` is
    for the first moment alone.)"""

    def cast(state: Any, to: str) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)
