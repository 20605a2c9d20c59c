"""Stripes: how a row's tokens are cut over the mesh axis `context`.

A row of T tokens is c shards, one for each device along the axis. Causal attention over the whole row gives early
tokens little to do and late ones much, so a shard is two stripes of T / 2c tokens where that can be, i and 2c - 1 - i:
then all have the same work (zigzag; Llama 3, arXiv:2407.21783, section 3.3.2). Layers that see chunks of C tokens want
whole chunks in a stripe; where a shard holds an odd number of chunks it is one stripe.

On the host a row stands in row order. On the devices it stands in shard order, shard after shard (parallel/place.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llamax import config


@dataclass(frozen=True)
class Stripes:
    shards: int = 1  # of a row: devices along `context`
    each: int = 1  # stripes of a shard: 1, or 2 in zigzag

    @property
    def n(self) -> int:
        return self.shards * self.each

    @property
    def order(self) -> tuple[int, ...]:
        """The row's stripes in shard order."""
        if self.each == 1:
            return tuple(range(self.n))
        return tuple(stripe for i in range(self.shards) for stripe in (i, self.n - 1 - i))

    def places(self, n_tokens: int) -> np.ndarray:
        """int32 [T]: where in the row each token of the shard order stands. Its argsort is the way back."""
        return np.arange(n_tokens, dtype=np.int32).reshape(self.n, -1)[list(self.order)].reshape(-1)


def of(model: config.Model, seq_len: int, shards: int) -> Stripes:
    """The stripes of a row of `seq_len` tokens over so many devices, which `checks` has found to divide."""
    pairs = seq_len % (2 * shards * (chunk_len(model) or 1)) == 0
    return Stripes(shards, 2 if shards > 1 and pairs else 1)


def alignment(model: config.Model, seq_len: int, shards: int) -> int:
    """The tokens of a stripe, if documents have to be aligned to stripes; else 0."""
    return seq_len // of(model, seq_len, shards).n if shards > 1 and chunk_len(model) else 0


def chunk_len(model: config.Model) -> int:
    """Tokens that the model's local layers can see; 0 if it has none."""
    return model.chunk_len if any(kind.startswith("rope_chunk") for kind in model.layers) else 0
