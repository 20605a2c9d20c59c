"""THE log-probability of tokens: policy, reference, teacher, judge and evaluation all take it from here."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array
from jaxtyping import Float

from llamax.batch import Batch
from llamax.model.llama import Llama
from llamax.model.moe import Routing


class Score(NamedTuple):
    logp: Float[Array, "B T"]  # float32: log-probability of the target at every position
    logz: Float[Array, "B T"]  # float32: log of the softmax's denominator
    energy: Float[Array, "L B"]  # float32; see stack.Trace
    routing: Routing | None
    vision_energy: Float[Array, "Lv B"] | None


def score(model: Llama, batch: Batch) -> Score:
    """log p(targets[b, t] | what stands before and at t). The logits of a vocabulary never exist as a whole."""
    hidden_BTD, trace = model(batch)
    tokens, rows = model.seam.tokens, len(batch.targets)
    head_DV = model.head_DV().astype(hidden_BTD.dtype)
    nll_N, logz_N = model.seam.cross_entropy(tokens.flat(hidden_BTD), head_DV, tokens.flat(batch.targets))
    return Score(-tokens.unflat(nll_N, rows), tokens.unflat(logz_N, rows), *trace)
