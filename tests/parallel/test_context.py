"""Rows over several devices: ring attention is attention, local layers exchange nothing, tokens find their way back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.kernels.attention import slow_attention
from llamax.kernels.ring import Ring, ring_attention
from llamax.parallel.context import LocalOrRing, SplitTokens
from llamax.parallel.mesh import make_mesh
from llamax.parallel.tensor import SplitHeads
from llamax.stripes import Stripes
from tests.splits import Seen, agree, normal

B, T = 2, 32
# Of two rows: documents of one chunk and of all, shorter and longer than a shard, padding between and after them.
LENGTHS = ((T,), (3, -2, 9, 13, -5))
MESHES = [
    ({"data": 2, "context": 4}, 2, (4, 2)),
    ({"context": 4, "tensor": 2}, 1, (4, 2)),
    pytest.param({"context": 2, "tensor": 4}, 2, (4, 2), marks=pytest.mark.slow),
    pytest.param({"context": 8}, 2, (4, 4), marks=pytest.mark.slow),
    pytest.param({"context": 8}, 1, (4, 1), marks=pytest.mark.slow),
    pytest.param({"data": 2, "context": 2, "tensor": 2}, 1, (4, 2), marks=pytest.mark.slow),
]


def packed():
    """Positions and segments [B, T] of LENGTHS, in row order; a negative length is padding."""
    positions, segments = np.zeros((2, B, T), np.int32)
    for row, lengths in enumerate(LENGTHS):
        t = 0
        for segment, n in enumerate(lengths, start=1):
            if n > 0:
                positions[row, t : t + n], segments[row, t : t + n] = np.arange(n), segment
            t += abs(n)
    return positions, segments


@pytest.mark.parametrize(("sizes", "each", "heads"), MESHES, ids=str)
def test_ring_attention_is_attention(sizes, each, heads):
    """Values and gradients of the whole row, its tokens in shard order; padding's output is not looked at."""
    mesh, stripes, (H, K) = make_mesh(sizes), Stripes(sizes["context"], each), heads
    ring = SplitHeads(LocalOrRing(slow_attention, ring_attention, Ring("context", stripes.shards, each, 3)), mesh)
    places = stripes.places(T)
    positions, segments = packed()
    real = jnp.asarray(segments > 0, jnp.float32)[:, :, None, None]

    def whole(q, k, v):
        ids = dict(q_pos=positions, k_pos=positions, q_seg=segments, k_seg=segments)
        return real * slow_attention(q, k, v, **ids)

    def split(q, k, v):
        q, k, v = (x[:, places] for x in (q, k, v))
        pos, seg = jnp.asarray(positions[:, places]), jnp.asarray(segments[:, places])
        o = ring(q, k, v, q_pos=pos, k_pos=pos, q_seg=seg, k_seg=seg)
        return real * o[:, np.argsort(places)]

    qkv = normal(B, T, H, 4), normal(B, T, K, 4, seed=1), normal(B, T, K, 4, seed=2)
    agree(lambda qkv: whole(*qkv), lambda qkv: split(*qkv), (qkv,))
