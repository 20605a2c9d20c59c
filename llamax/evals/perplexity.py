"""Bits per byte on held-out text, beside what a unigram model of the same tokens and `zlib -9` need for it.

    bits per byte = sum of -log2 p(token) over the text's tokens / bytes of the text

over the documents that the packer takes; those that it leaves out count in neither, and their number is told. Where
texts weigh (sources.py), both sums are of what weighs, each as much as it does.

The unigram is fitted on the held-out text itself, which no real one could beat; zlib compresses all of it as one
stream. The end of a document is predicted too and counts against the model.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp

from llamax import config
from llamax.batch import Batch
from llamax.config import ConfigError
from llamax.data.pipeline import HeldOut, text_bytes
from llamax.evals.report import Context, Report, left_out_of
from llamax.model.score import score
from llamax.model.skeleton import Skeleton


def run(ctx: Context, cfg: config.Eval) -> Report:
    nats = tokens = size = 0.0
    held_out = HeldOut(cfg.path, ctx.run.data, ctx.run.model.vision, cfg.max_docs)
    for batch in held_out:
        ctx.check_stop()
        size += text_bytes(batch, ctx.tokenizer.byte_lengths).sum()
        batch_nats, batch_tokens = sums(ctx.skeleton, ctx.params, ctx.router_bias, ctx.put(batch))
        nats, tokens = nats + float(batch_nats), tokens + float(batch_tokens)
    if not size:
        raise ConfigError(f"perplexity evaluation of {cfg.path}", "no document has text", "Name another manifest.")
    bits = nats / math.log(2) / size
    n_bytes = sum(len(text.encode()) for text in held_out.texts())
    unigram, packed = unigram_bits(ctx, held_out.texts()) / n_bytes, zlib_bits(held_out.texts()) / n_bytes
    scalars = {"bits_per_byte": bits, "nats_per_token": nats / tokens}
    scalars |= {"unigram_bits_per_byte": unigram, "zlib_bits_per_byte": packed}
    compared = f"unigram {unigram:.3f} ({bits / unigram - 1:+.0%}), zlib -9 {packed:.3f} ({bits / packed - 1:+.0%})"
    left_out = sum(held_out.skipped.values())
    scalars["left_out"] = left_out
    compared += left_out_of(left_out, left_out + len(held_out.taken))
    return Report(scalars, [("bits per byte", f"{bits:.3f}", compared)])


@partial(jax.jit, static_argnums=0)
def sums(skeleton: Skeleton, params, router_bias, batch: Batch):
    """(nats, tokens) of a batch."""
    logp_BT = score(skeleton.bind(params, router_bias), batch).logp
    return -jnp.sum(logp_BT * batch.loss_weights), jnp.sum(batch.loss_weights)


def unigram_bits(ctx: Context, texts: Iterable[str]) -> float:
    """Bits of all tokens under their own frequencies."""
    counts = Counter(token for text in texts for token in ctx.tokenizer.encode(text))
    total = sum(counts.values())
    return -sum(n * math.log2(n / total) for n in counts.values())


def zlib_bits(texts: Iterable[str]) -> float:
    stream = zlib.compressobj(9)
    return 8.0 * (sum(len(stream.compress(text.encode())) for text in texts) + len(stream.flush()))
