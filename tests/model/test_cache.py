"""Cached decoding beside the full forward: every position, every kind of layer, past chunks and temperature steps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.batch import Batch
from llamax.kernels import attention
from llamax.kernels.attention import TILE, blocked_attention, cached_attention, slow_attention
from llamax.kernels.grouped import sorted_experts
from llamax.model import cache as caches
from llamax.model.llama import Llama
from llamax.model.seam import Seam
from llamax.variants import SCOUT_PERIOD
from tests.model import twins
from tests.tolerances import FAR, ORACLE, TWIN

ALL_KINDS = (("rope_chunk+moe", "nope_full+dense", "rope_full+moe"), 2)
MODEL = replace(twins.TINY, plan=(ALL_KINDS, (("rope_chunk+dense",), 1)), top_k=2)
FAST = Seam(attention=blocked_attention, run_experts=sorted_experts)
T = 24  # four chunks and a part of 5 tokens, six steps of the temperature


def build(model=MODEL, seam=FAST):
    graph, tree = twins.fresh(partial(Llama, model, seam, patch_id=twins.PATCH, dtype=np.float32, remat="none"))
    return lambda tree: twins.bind(graph, tree), jax.tree.map(jnp.asarray, tree)


def text(tokens_BT, positions_BT, segments_BT) -> Batch:
    B, T = np.shape(tokens_BT)
    zeros = np.zeros((B, T), np.int32)
    return Batch(tokens_BT, zeros, zeros * 0.0, segments_BT, positions_BT, zeros, np.zeros((B, 0, 8, 8, 3), np.uint8))


def span(batch: Batch, first: int, last: int) -> Batch:
    """Some columns of a batch of text."""
    return Batch(**{name: x[:, first:last] for name, x in batch.of_tokens().items()}, tiles=batch.tiles[:, :0])


def rows(first_position: int = 0) -> Batch:
    """Two rows of 24 tokens."""
    tokens = np.random.default_rng(0).integers(0, twins.PATCH, (2, T), dtype=np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32) + first_position, (2, T))
    return text(tokens, positions, np.ones_like(tokens))


def in_pieces(batch: Batch, cuts: list[int], model=MODEL, room: int = T):
    """Hidden states of the whole row, read in pieces that end at the cuts."""
    bind, tree = build(model)
    prefill = twins.quick_jit(lambda tree, batch: bind(tree).prefill(batch, room))
    extend = twins.quick_jit(lambda tree, batch, cache: bind(tree).extend(batch, cache))
    hidden, cache = prefill(tree, span(batch, 0, cuts[0]))
    parts = [hidden]
    for first, last in zip(cuts, [*cuts[1:], T], strict=True):
        hidden, cache = extend(tree, span(batch, first, last), cache)
        parts.append(hidden)
    return np.concatenate(parts, axis=1), cache


@pytest.mark.parametrize("cuts", [list(range(1, T)), [7, 8, 9, 16], [10, 23]], ids=["token by token", "mixed", "two"])
def test_prefill_and_decode_equal_the_slow_twin_at_every_position(cuts):
    """Pieces end within chunks and at their ends, and are longer than a chunk."""
    batch = rows()
    bind, tree = build()
    hidden, cache = in_pieces(batch, cuts)
    np.testing.assert_allclose(hidden, twins.decode(tree, MODEL, batch).hidden, **ORACLE)
    assert cache.length.tolist() == [T, T]


def test_what_scales_queries_is_the_same_in_every_piece():
    """YaRN's attention factor on rotated layers, Scalable-Softmax where the whole row is seen."""
    rope = replace(MODEL.rope, scaling="yarn", beta_slow=0.5, beta_fast=4.0, attention_factor=1.6)
    plan = ((("rope_chunk+dense", "nope_full+dense", "rope_full+dense"), 1),)
    model, batch = replace(MODEL, plan=plan, rope=rope, attn_scale="ssmax", ssmax_len=12), rows()
    hidden, _ = in_pieces(batch, [7, 16], model)
    np.testing.assert_allclose(hidden, twins.decode(build(model)[1], model, batch).hidden, **ORACLE)


def test_a_row_may_start_at_any_position():
    """10,000,003 is within a chunk: the float64 twin turns by true positions, where float32 angles would be off."""
    batch = rows(first_position=10_000_003)
    _, tree = build()
    truth = twins.decode(tree, MODEL, batch).hidden
    np.testing.assert_allclose(in_pieces(batch, list(range(9, T)))[0], truth, **FAR)
    local = replace(MODEL, plan=((("rope_chunk+dense", "nope_full+dense"), 1),))
    bind, tree = build(local)
    truth = twins.decode(tree, local, batch).hidden
    np.testing.assert_allclose(in_pieces(batch, list(range(9, T)), local)[0], truth, **ORACLE)


def test_padding_on_either_side_and_rows_of_different_lengths():
    """A row of 24 tokens, one of 11 padded on the left, one of 5 padded on the right; all go on alone."""
    whole = rows()
    bind, tree = build()
    lengths, T0 = (T - 4, 11, 5), 20
    tokens, segments, positions = (np.zeros((3, T0), np.int32) for _ in range(3))
    for row, (n, first) in enumerate(zip(lengths, (0, T0 - 11, 0), strict=True)):
        tokens[row, first : first + n] = whole.tokens[row % 2, :n]
        segments[row, first : first + n] = 1
        positions[row, first : first + n] = np.arange(n)
    hidden, cache = bind(tree).prefill(text(tokens, positions, segments), room=32)
    assert cache.length.tolist() == list(lengths)
    for step in range(4):
        at = np.array(lengths) + step
        going = np.array([True, True, step != 1])  # a row that takes a rest
        at[2] -= step > 1
        new = np.array([whole.tokens[row % 2, at[row]] for row in range(3)])
        hidden, cache = bind(tree).extend(text(new[:, None], at[:, None], going[:, None].astype(np.int32)), cache)
        for row in np.flatnonzero(going):
            prefix = text(*(x[row % 2 : row % 2 + 1, : at[row] + 1] for x in (whole.tokens, whole.positions)), 1)
            prefix = prefix._replace(segment_ids=np.ones_like(prefix.tokens))
            np.testing.assert_allclose(hidden[row, 0], twins.decode(tree, MODEL, prefix).hidden[0, -1], **ORACLE)
    assert cache.length.tolist() == [T, 15, 8]


def test_pictures_in_the_prompt_and_in_what_follows():
    model = replace(twins.TINY, plan=((SCOUT_PERIOD, 1),), vision=twins.VISION)
    batch = twins.batch(tiles=(2, 2))
    n = twins.VISION.tokens_per_tile
    tokens = np.where(batch.tokens == twins.PATCH, 1, batch.tokens)
    tokens[:, 2 : 2 + n] = tokens[:, 13 : 13 + n] = twins.PATCH
    batch = rows()._replace(tokens=tokens, tiles=np.concatenate([batch.tiles[:1]] * 2))
    bind, tree = build(model)
    _, cache = bind(tree).prefill(span(batch, 0, 12)._replace(tiles=batch.tiles[:, :1]), room=T)
    hidden, _ = bind(tree).extend(span(batch, 12, T)._replace(tiles=batch.tiles[:, 1:]), cache)
    np.testing.assert_allclose(hidden, twins.decode(tree, model, batch).hidden[:, 12:], **ORACLE)


def test_chunked_layers_keep_a_chunk_and_others_all():
    cache = jax.eval_shape(lambda: caches.empty(MODEL, rows=3, room=100, dtype=jnp.bfloat16))
    shapes = {(segment, slot): kv.key.shape for segment, kvs in cache.layers.items() for slot, kv in kvs.items()}
    K, Dh, C = MODEL.n_kv_heads, MODEL.head_dim, MODEL.chunk_len
    assert shapes == {
        ("segment0", "slot0"): (2, 3, K, C, Dh),
        ("segment0", "slot1"): (2, 3, K, 100, Dh),
        ("segment0", "slot2"): (2, 3, K, 100, Dh),
        ("segment1", "slot0"): (1, 3, K, C, Dh),
    }
    assert caches.empty(MODEL, rows=3, room=3, dtype=jnp.float32).layers["segment1"]["slot0"].key.shape[3] == 3


def test_a_cache_grows_and_repeats():
    """From less room than a chunk to more than the row; then the rows twice, one after the other."""
    batch = rows()
    bind, tree = build()
    _, cache = bind(tree).prefill(span(batch, 0, 4), room=4)
    cache = caches.repeat(caches.grown(cache, MODEL, 40), 2)
    twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), batch)
    hidden, _ = bind(tree).extend(span(twice, 4, T), cache)
    truth = twins.decode(tree, MODEL, batch).hidden[:, 4:]
    np.testing.assert_allclose(hidden, np.repeat(truth, 2, axis=0), **ORACLE)


@pytest.mark.parametrize("queries, keys", [(1, 512), (5, 512), (TILE + 3, 512), (TILE + 3, 4), (2 * TILE, 16)])
def test_the_kernel_equals_attention_over_both_parts_together(queries, keys, monkeypatch):
    """Many queries meet `keys` places at a time, which the 11 places and the new tokens need not divide by."""
    monkeypatch.setattr(attention, "KEYS", keys)
    rng = np.random.default_rng(0)
    B, H, K, Dh, S = 2, 6, 2, 8, 11

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    q, past, new = normal(B, queries, H, Dh), normal(2, B, K, S, Dh), normal(2, B, K, queries, Dh)
    past_pos = np.tile(np.arange(S, dtype=np.int32), (B, 1))
    past_seg = np.array([[1] * 9 + [0] * 2, [2] * 11], np.int32)
    q_pos = np.stack([9 + np.arange(queries), 4 + np.arange(queries)]).astype(np.int32)
    q_seg = np.array([[1], [2]], np.int32) * np.ones((B, queries), np.int32)
    here = dict(q_pos=q_pos, k_pos=q_pos, q_seg=q_seg, k_seg=q_seg)
    ours = cached_attention(q, *past, *new, **here, past_pos=past_pos, past_seg=past_seg)
    key, value = np.concatenate([past, new], axis=3).swapaxes(2, 3)
    both = {name: np.concatenate([a, here[name]], axis=1) for name, a in (("k_pos", past_pos), ("k_seg", past_seg))}
    slow = slow_attention(q, key, value, q_pos=q_pos, q_seg=q_seg, **both)
    np.testing.assert_allclose(ours, slow, **TWIN)


def test_a_ring_keeps_the_newest_whatever_their_order():
    """Twelve tokens told backwards into five places: two for one place would leave it to chance which one stays."""
    model = replace(twins.TINY, plan=((("rope_chunk+dense",), 1),))
    positions = np.arange(12, dtype=np.int32)[::-1][None]
    value = np.broadcast_to(positions[0, :, None].astype(np.float32), (1, 1, model.n_kv_heads, 12, model.head_dim))
    new = {"segment0": {"slot0": caches.KV(jnp.asarray(value), jnp.asarray(value))}}
    cache = caches.write(caches.empty(model, 1, 20, jnp.float32), new, positions, np.ones_like(positions))
    window = caches.windows(cache, model)["rope_chunk"]
    assert sorted(window.positions[0].tolist()) == [7, 8, 9, 10, 11]
    np.testing.assert_array_equal(cache.layers["segment0"]["slot0"].key[0, 0, 0, :, 0], window.positions[0])
