"""The loss of a reward model: -log s(r_w - r_l - margin) + centring (r_w + r_l)^2 over comparisons.

r_w, r_l: scores of the chosen and the rejected answer (Bradley-Terry; InstructGPT, arXiv 2203.02155, eq. 1). margin:
how much better the chosen one was found (Llama 2, arXiv 2307.09288, eq. 2). The second term keeps scores around 0,
which the first does not look at (arXiv 2312.09244). Letter: P comparisons.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from llamax.losses.sum import Sum


def bradley_terry(
    chosen_P: Float[Array, "*P"],
    rejected_P: Float[Array, "*P"],
    mask_P: Bool[Array, "*P"],
    margin_P: Float[Array, "*P"] | None = None,
    centring: float = 0.0,
) -> Sum:
    """Added up over the comparisons that `mask_P` says exist; over their number. Any shape, one for all."""
    margin_P = jnp.zeros_like(chosen_P) if margin_P is None else margin_P
    # Where there is none, nothing may count, not even as 0 x inf.
    chosen_P, rejected_P, margin_P = (jnp.where(mask_P, x, 0) for x in (chosen_P, rejected_P, margin_P))
    loss_P = -jax.nn.log_sigmoid(chosen_P - rejected_P - margin_P) + centring * (chosen_P + rejected_P) ** 2
    return Sum(jnp.where(mask_P, loss_P, 0).sum(), mask_P.sum(dtype=loss_P.dtype))
