"""A small model with weights large enough to have opinions, and its slow twin's log-probabilities."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from llamax import config
from llamax.data.tokenizer import Tokenizer
from llamax.kernels.attention import blocked_attention
from llamax.kernels.grouped import sorted_experts
from llamax.loading import Loaded
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from tests.model import twins
from tests.runs import FIXTURES

TOKENIZER = Tokenizer(FIXTURES.parent / "tokenizer.model")
MODEL = replace(
    twins.TINY, vocab_size=TOKENIZER.vocab_size, plan=((("rope_chunk+dense", "nope_full+moe"), 1),), vision=None
)


def make() -> Loaded:
    skel = skeleton(
        MODEL, Seam(attention=blocked_attention, run_experts=sorted_experts), patch_id=-1, train=config.Train()
    )
    rng = np.random.default_rng(7)
    params, bias = skel.shapes()
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), params)
    return Loaded(MODEL, skel, params, jax.tree.map(lambda x: jnp.zeros(x.shape), bias), TOKENIZER)


def slow(model: Loaded, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One text alone, without padding, in float64: the sum of log-softmax, and whether all are likeliest."""
    row = np.array([context + continuation], np.int32)
    at, no_tiles = np.arange(row.size)[None], np.zeros((1, 0, 1, 1, 3), np.uint8)
    batch = twins.batch()._replace(tokens=row, tiles=no_tiles, positions=at, segment_ids=np.ones_like(row))
    tree = twins.float64(jax.tree.map(np.asarray, model.params))
    tree["stack"]["segment0"]["slot1"]["moe"]["router_bias"] = np.zeros((1, MODEL.n_experts))
    logits_TV = twins.decode(tree, MODEL, batch).logits[0][len(context) - 1 : -1]
    top_T1 = logits_TV.max(axis=-1, keepdims=True)
    logp_TV = logits_TV - top_T1 - np.log(np.exp(logits_TV - top_T1).sum(axis=-1, keepdims=True))
    logp = sum(row[token] for row, token in zip(logp_TV, continuation, strict=True))
    return float(logp), bool((logits_TV.argmax(axis=-1) == continuation).all())
