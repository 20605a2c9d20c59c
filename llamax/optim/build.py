"""The optimizer: AdamW from optax, behind a clip of the global gradient norm."""

from __future__ import annotations

import jax
import optax

from llamax import config
from llamax.optim.schedules import schedule


def optimizer(optim: config.Optim, steps: int, kinds: dict) -> optax.GradientTransformation:
    """`kinds`: the tree of parameter kinds; weight decay acts on "matrix" only (not on embeddings, norms, biases)."""
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
    )
