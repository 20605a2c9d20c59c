"""Prompts read in pieces beside prompts read at once: logits, log-probabilities, text; memory and programs counted."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax import config
from llamax.kernels import attention
from llamax.kernels.attention import blocked_attention, cached_attention
from llamax.kernels.grouped import sorted_experts
from llamax.model.score import score
from llamax.model.seam import Seam, make_seam
from llamax.model.skeleton import skeleton
from llamax.parallel import rules
from llamax.parallel.mesh import make_mesh
from llamax.sample import reading
from llamax.sample.conversation import Conversation
from llamax.sample.engine import generate
from llamax.sample.reading import Prompt, cut, pack, pieces, read, score_tokens
from tests.model import twins
from tests.tolerances import TWIN

VISION = replace(twins.VISION, encoder="linear")  # compiles in no time; the other makes the same tokens
MODEL = replace(twins.TINY, plan=((("rope_chunk+dense", "nope_full+moe"), 1),), vision=VISION)
A_TILE, SIDE = VISION.tokens_per_tile, VISION.tile_px
PIECE = 16
LENGTHS = (70, 5, 33, 48)  # five pieces, a part of one, three with one token in the last, three whole


def build(seam: Seam, model: config.Model = MODEL):
    return skeleton(model, seam, patch_id=twins.PATCH, train=config.Train(remat="none"))


@pytest.fixture(scope="module")
def tiny():
    """(skeleton, params, router_bias) of a small model with opinions."""
    skel = build(Seam(blocked_attention, cached_attention, sorted_experts))
    params, bias = skel.shapes()
    rng = np.random.default_rng(7)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), params)
    return skel, params, jax.tree.map(lambda x: jnp.zeros(x.shape), bias)


@pytest.fixture(scope="module", autouse=True)
def in_pieces():
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE", PIECE)
        patch.setattr(attention, "TILE", 8)  # tokens that read a cache in turn, few places of it at a time
        patch.setattr(attention, "KEYS", 8)
        yield
    jax.clear_caches()


def prompt(length: int, tiles_at: tuple[int, ...] = (), seed: int = 0) -> Prompt:
    rng = np.random.default_rng([seed, length])
    tokens = rng.integers(0, twins.PATCH, length)
    for at in tiles_at:
        tokens[at : at + A_TILE] = twins.PATCH
    return Prompt(tokens.tolist(), rng.integers(0, 256, (len(tiles_at), SIDE, SIDE, 3), dtype=np.uint8))


# Tiles at the beginning, across the ends of pieces, side by side, at the very end; and rows without any.
PICTURED = [prompt(70, (0, 14, 20, 24, 66)), prompt(5), prompt(33, (29,)), prompt(48)]


@pytest.fixture(scope="module")
def at_once(tiny):
    """Log-probabilities of every token of PICTURED after the first, and logits at the end, from whole rows."""
    batch = pack(PICTURED)
    batch = batch._replace(targets=np.roll(batch.tokens, -1, axis=1))

    def whole(params, bias, batch):
        model = tiny[0].bind(params, bias)
        return score(model, batch).logp, model.logits(model(batch)[0])

    logp, logits = twins.quick_jit(whole)(*tiny[1:], batch)
    rows = range(len(LENGTHS))
    return [logp[row, : LENGTHS[row] - 1] for row in rows], np.stack([logits[row, LENGTHS[row] - 1] for row in rows])


def test_logits_and_log_probabilities_are_those_of_whole_rows(tiny, at_once):
    """Rows of several lengths, pictures anywhere; and each program is compiled once, whatever stands in the pieces."""
    logp, logits = at_once
    for program in (reading.prefill, reading.extend, reading.score_piece):
        program.clear_cache()
    found, cache = read(*tiny, PICTURED, 96, tiles=5)
    np.testing.assert_allclose(found, logits, **TWIN)
    assert cache.length.tolist() == list(LENGTHS)
    assert reading.extend._cache_size() == 2 and reading.prefill._cache_size() == 0  # with tiles and without
    scored = score_tokens(*tiny, PICTURED, [1] * 4, tiles=5)
    for mine, whole in zip(scored, logp, strict=True):
        np.testing.assert_allclose(mine.logp, whole, **TWIN)
    late = score_tokens(*tiny, PICTURED, [40, 4, 33, 17], tiles=5)
    for mine, whole, first in zip(late, logp, (40, 4, 33, 17), strict=True):
        np.testing.assert_allclose(mine.logp, whole[first - 1 :], **TWIN)
    few = [prompt(48, (29,)), *PICTURED[1:]]  # shorter, with one picture in a piece
    read(*tiny, few, 96, length=70, tiles=5)
    score_tokens(*tiny, few, [40, 4, 33, 17], length=70, tiles=5)
    assert reading.extend._cache_size() == 2 and reading.score_piece._cache_size() == 2


def test_shapes_do_not_depend_on_what_stands_in_a_batch(tiny):
    """Not on the number of its pictures: a piece has room for those of the prompts that it is told of."""
    model, some = tiny[0].bind(*tiny[1:]), [[PICTURED[0]], [PICTURED[2]], [prompt(48, (0, 40))]]
    shapes = [{piece.batch.tiles.shape[1] for piece in pieces(few, model, tiles=5)} for few in some]
    assert shapes == [{4, 0}] * 3  # of 5 tiles, a piece of 16 tokens holds 4
    shapes = [{piece.batch.tiles.shape[1] for piece in pieces(few, model)} for few in some]
    assert shapes == [{3, 0}, {1, 0}, {1, 0}]
    assert {pack(few, tiles=5).tiles.shape[1] for few in [*some, [prompt(48)]]} == {5}


def test_the_likeliest_are_told(tiny):
    """What greedy text says is the likeliest, and nothing else is."""
    asked = prompt(30)
    ((said,),) = generate(*tiny, [asked], max_tokens=8, stop=())
    other = [*said.tokens[:-1], (said.tokens[-1] + 1) % twins.PATCH]
    whole = [asked._replace(tokens=asked.tokens + tokens) for tokens in (said.tokens, other)]
    (right,), (wrong,) = (score_tokens(*tiny, [one], [30]) for one in whole)
    assert right.likeliest.all() and wrong.likeliest.tolist() == [True] * 7 + [False]
    np.testing.assert_allclose(right.logp, said.logp, **TWIN)


def test_a_conversation_is_read_in_pieces_too(tiny):
    """Both turns are longer than a piece, and the second goes on in the middle of one."""
    talk = Conversation(*tiny, stop=())
    talk.tell(prompt(20))
    talk.tell(prompt(35))
    said = list(talk.say(4))
    both = prompt(20).tokens + prompt(35).tokens
    assert [c.tokens for (c,) in generate(*tiny, [prompt(20)._replace(tokens=both)], max_tokens=4, stop=())] == [said]


def test_a_piece_goes_into_the_memory_of_the_cache():
    """The cache is donated and comes back in its own bytes. Beside it there is one layer's at a time, not all four."""
    model = replace(MODEL, plan=((("nope_full+dense",), 4),), vision=None)
    skel = build(Seam(cached_attention=cached_attention), model)
    weights = [jax.tree.map(lambda x: jnp.zeros(x.shape), tree) for tree in skel.shapes()]
    logits, cache = reading.empty(skel, 1, 8192, *weights)
    (piece,) = pieces([prompt(PIECE)], skel.bind(*weights))
    memory = reading.extend.lower(skel, *weights, piece.batch, logits, cache).compile().memory_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 2
    reading.extend(skel, *weights, piece.batch, logits, cache)
    assert all(x.is_deleted() for x in jax.tree.leaves(cache.layers))


def test_pieces_end_before_a_tile_that_would_not_fit():
    begins, ends = np.array([0, 14, 20, 24, 66]), np.array([3, 17, 23, 27, 69])
    assert cut(68, 16, begins, ends) == [0, 14, 30, 46, 62, 68]
    assert cut(70, 10, begins, ends) == [0, 10, 20, 30, 40, 50, 60, 70] and cut(40, 12, begins, ends)[1:3] == [12, 24]
    assert cut(16, 16, begins, ends) == [0, 16] and cut(17, 16, begins[:0], ends[:0]) == [0, 16, 17]
    assert cut(9, 4, np.array([0, 4]), np.array([3, 7])) == [0, 4, 8, 9]  # tiles as long as a piece


@pytest.mark.parametrize(
    ("sizes", "kv_heads"),
    [
        ({"fsdp": 4, "context": 2}, 2),
        ({"fsdp": 2, "context": 2, "tensor": 2}, 1),
        pytest.param({"data": 2, "tensor": 4}, 2, marks=pytest.mark.slow),  # more devices than kv heads: each has all
    ],
    ids=str,
)
def test_a_mesh_gives_the_numbers_of_one_device(sizes, kv_heads, tiny):
    """Rows, a cache's kv heads and weights over devices; a program that takes what it gave is not compiled again."""
    mesh, texts = make_mesh(sizes), [prompt(length) for length in LENGTHS]
    skel = build(make_seam(mesh))
    params = jax.device_put(tiny[1], rules.shardings(skel.axes, tiny[1], mesh))
    alone, _ = read(*tiny, texts, 96)
    reading.extend.clear_cache()
    found, cache = read(skel, params, tiny[2], texts, 96, row_multiple=8)
    np.testing.assert_allclose(found[:4], alone, **TWIN)
    assert reading.extend._cache_size() == 1
    for x in jax.tree.leaves(cache.layers):
        assert x.sharding.shard_shape(x.shape)[2] == kv_heads
