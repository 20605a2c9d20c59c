"""The optimizer: AdamW from optax, behind a clip of the global gradient norm; the vision side at a rate of its own."""

from __future__ import annotations

import jax
import optax

from llamax import config
from llamax.optim.schedules import schedule

VISION = ("vision", "projector")  # the model's parts that `vision_lr_ratio` acts on


def optimizer(optim: config.Optim, steps: int, kinds: dict) -> optax.GradientTransformation:
    """`kinds`: the tree of parameter kinds; weight decay acts on "matrix" only (not on embeddings, norms, biases)."""
    vision = jax.tree.map_with_path(lambda path, _: path[0].key in VISION, kinds)
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.adamw(
            schedule(optim, steps),
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            mask=jax.tree.map(lambda kind: kind == "matrix", kinds),
        ),
        optax.masked(optax.scale(optim.vision_lr_ratio), vision),
    )
