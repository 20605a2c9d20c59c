"""Reading: prompts go into a cache, a piece of fixed length after the other, so that memory is that of the cache and of
one piece, whatever the length; also the log-probability of given tokens on the way.

A prompt of at most `PIECE` tokens is read at once. A longer one goes through one program, which takes a piece and the
cache, and gives the cache back in the same memory. Rows of different lengths end in different pieces. A piece is cut
short before a picture's tile that would not fit: a tile's tokens and its pixels are in one piece.

Letters: B rows, T tokens of a piece, M tiles of a piece, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llamax.batch import Batch
from llamax.config import ConfigError
from llamax.model.cache import Cache
from llamax.model.llama import Llama
from llamax.model.score import score_after
from llamax.model.skeleton import Skeleton
from llamax.parallel import place

PIECE = 1024  # tokens of a piece
ROUND = 64  # the least length of a row
BEST_OF = 64  # tokens whose logits exist at once


class Prompt(NamedTuple):
    tokens: list[int]
    tiles: np.ndarray  # uint8 [n, P, P, 3]


class Scored(NamedTuple):
    """Of the tokens that were asked about."""

    logp: np.ndarray  # float32 [n]: log-probability of each, given all before it
    likeliest: np.ndarray  # bool [n]: no other token is likelier there


def check_prompt(prompt: Prompt, model: Llama) -> None:
    """ConfigError if a prompt is empty, has ids that the model does not, or other pictures than places for them."""
    if not prompt.tokens:
        raise ConfigError("a prompt of no tokens", "there is nothing to continue", "Begin it with <|begin_of_text|>.")
    ids, vocab_size = np.asarray(prompt.tokens), model.model.vocab_size
    if ids.min() < 0 or ids.max() >= vocab_size:
        true = f"the model's vocabulary has {vocab_size} ids"
        raise ConfigError(f"a prompt with ids {ids.min()} to {ids.max()}", true, "Use the model's own tokenizer.")
    vision, places = model.model.vision, int((ids == model.patch_id).sum())
    a_tile = vision.tokens_per_tile if vision else 0
    if places != len(prompt.tiles) * a_tile or (len(prompt.tiles) and not vision):
        asked, true = f"a prompt with {len(prompt.tiles)} tiles", f"it has {places} <|patch|> tokens, {a_tile} a tile"
        raise ConfigError(asked, true, "Encode pictures and text together, with data.encode or data.chat.")


def read(
    skeleton: Skeleton,
    params,
    router_bias,
    prompts: Sequence[Prompt],
    room: int,
    *,
    row_multiple: int = 1,
    length: int = 0,
    tiles: int = 0,
) -> tuple[Array, Cache]:
    """Logits [B, V] of the token after each prompt, and a cache with `room` places that holds the prompts.

    `length` and `tiles`: prompts are taken to have at least so many tokens, and tiles, so that calls with prompts of
    about one length share programs.
    """
    length = max(length, *(len(prompt.tokens) for prompt in prompts))
    if length <= PIECE:
        return prefill(skeleton, room, params, router_bias, pack(prompts, row_multiple, length, tiles))
    start = empty(skeleton, n_rows(len(prompts), row_multiple), room, params, router_bias)
    return go_on(skeleton, params, router_bias, prompts, *start, row_multiple=row_multiple, length=length, tiles=tiles)


def go_on(
    skeleton: Skeleton,
    params,
    router_bias,
    prompts: Sequence[Prompt],
    logits_BV: Array,
    cache: Cache,
    *,
    row_multiple: int = 1,
    first: int = 0,
    length: int = 0,
    tiles: int = 0,
) -> tuple[Array, Cache]:
    """The same for prompts that go on at position `first`, where each row of the cache ends, in the cache's memory."""
    model = skeleton.bind(params, router_bias)
    for piece in pieces(prompts, model, row_multiple, first, length=length, tiles=tiles):
        logits_BV, cache = extend(skeleton, params, router_bias, piece.batch, logits_BV, cache)
    return logits_BV, cache


def score_tokens(
    skeleton: Skeleton,
    params,
    router_bias,
    prompts: Sequence[Prompt],
    firsts: Sequence[int],
    *,
    rows: int = 16,
    row_multiple: int = 1,
    length: int = 0,
    tiles: int = 0,
    likeliest: bool = True,
) -> list[Scored]:
    """How likely the tokens of each prompt are from number `firsts[i]` (1 or more) on, each given all before it.

    The numbers are those of `model.score.score`. `rows`: prompts that are worked on together, at most; `length` and
    `tiles` as above. Without `likeliest` that is not looked at, and False.

    Raises:
        ConfigError: `check_prompt` refuses a prompt.
    """
    model = skeleton.bind(params, router_bias)
    for prompt, first in zip(prompts, firsts, strict=True):
        check_prompt(prompt, model)
        assert first >= 1, "nothing stands before a first token"
    found = [Scored(np.zeros(n, np.float32), np.zeros(n, bool)) for n in _asked(prompts, firsts)]
    for numbers in by_length(prompts, rows):
        some = [prompts[i] for i in numbers]
        longest = max(length, *(len(prompt.tokens) for prompt in some))
        logits_BV, cache = empty(skeleton, n_rows(len(some), row_multiple), rounded(longest), params, router_bias)
        shape, scored_from = dict(length=longest, tiles=tiles), [firsts[i] for i in numbers]
        for piece in pieces(some, model, row_multiple, scored_from=scored_from, **shape):
            if not piece.batch.loss_weights.any():
                logits_BV, cache = extend(skeleton, params, router_bias, piece.batch, logits_BV, cache)
                continue
            logp_BT, best_BT, cache = score_piece(skeleton, likeliest, params, router_bias, piece.batch, cache)
            logp_BT, best_BT = place.fetch((logp_BT, best_BT))
            for row, i in enumerate(numbers):
                at = np.flatnonzero(piece.batch.loss_weights[row])
                here = piece.first[row] + at + 1 - firsts[i]
                found[i].logp[here], found[i].likeliest[here] = logp_BT[row, at], best_BT[row, at]
    return found


def _asked(prompts: Sequence[Prompt], firsts: Sequence[int]) -> list[int]:
    return [max(0, len(prompt.tokens) - first) for prompt, first in zip(prompts, firsts, strict=True)]


def by_length(prompts: Sequence[Prompt], rows: int) -> Iterator[list[int]]:
    """The prompts' numbers in groups of about one length, of at most `rows` rounded down to what `n_rows` rounds to."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    at_once = 1 << max(0, rows.bit_length() - 1)
    for first in range(0, len(order), at_once):
        yield order[first : first + at_once]


# ------------------------------------------------------------------------------------------------------- the programs


@partial(jax.jit, static_argnums=(0, 1))
def prefill(skeleton: Skeleton, room: int, params, router_bias, batch: Batch) -> tuple[Array, Cache]:
    """Logits [B, V] of the token after each prompt, and the cache that holds the prompts."""
    model = skeleton.bind(params, router_bias)
    hidden_BTD, cache = model.prefill(batch, room)
    return model.logits(_last(hidden_BTD, batch)), cache


@partial(jax.jit, static_argnums=(0, 1, 2), keep_unused=True)
def empty(skeleton: Skeleton, rows: int, room: int, params, router_bias) -> tuple[Array, Cache]:
    """What `extend` begins with: logits that say nothing, and an empty cache."""
    model = skeleton.bind(params, router_bias)
    return _by_row(model, jnp.zeros((rows, model.model.vocab_size))), model.empty_cache(rows, room)


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def extend(
    skeleton: Skeleton, params, router_bias, batch: Batch, logits_BV: Array, cache: Cache
) -> tuple[Array, Cache]:
    """A piece that goes on where the cache ends, into the cache's own memory: whoever needs it as it was, copies it.
    The logits of a row without new tokens stay."""
    model = skeleton.bind(params, router_bias)
    hidden_BTD, cache = model.extend(batch, cache)
    new_B1 = (batch.segment_ids > 0).any(axis=1)[:, None]
    return _by_row(model, jnp.where(new_B1, model.logits(_last(hidden_BTD, batch)), logits_BV)), cache


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def score_piece(
    skeleton: Skeleton, likeliest: bool, params, router_bias, batch: Batch, cache: Cache
) -> tuple[Array, Array, Cache]:
    """The same for a piece with targets: their log-probabilities [B, T], whether no token is likelier [B, T]."""
    model = skeleton.bind(params, router_bias)
    logp_BT, hidden_BTD, cache = score_after(model, batch, cache)
    best_BT = _best(model, hidden_BTD) == batch.targets if likeliest else jnp.zeros(logp_BT.shape, bool)
    return logp_BT, best_BT, cache


def _best(model: Llama, hidden_BTD: Array) -> Array:
    """The likeliest token at every position, int32 [B, T]."""
    B, T, D = hidden_BTD.shape
    n = -(-T // BEST_OF)
    padded = jnp.pad(hidden_BTD, ((0, 0), (0, n * BEST_OF - T), (0, 0))).reshape(B, n, BEST_OF, D).swapaxes(0, 1)
    best_nBC = jax.lax.map(lambda hidden: model.logits(hidden).argmax(axis=-1), padded)
    return best_nBC.swapaxes(0, 1).reshape(B, -1)[:, :T]


def _last(hidden_BTD: Array, batch: Batch) -> Array:
    """The hidden state of each row's last token [B, D]."""
    last_B = jnp.where(batch.segment_ids > 0, batch.positions, -1).argmax(axis=1)
    return hidden_BTD[jnp.arange(len(last_B)), last_B]


def _by_row(model: Llama, logits_BV: Array) -> Array:
    return model.seam.constrain(logits_BV, ("rows", None))


# ------------------------------------------------------------------------------------------------------------- shapes


def rounded(n: int) -> int:
    """n rounded up to one of few lengths, at most a quarter longer above 256."""
    return few(n, ROUND)


def few(n: int, least: int) -> int:
    """n rounded up to a multiple of `least`, or of an eighth to a quarter of itself."""
    step = max(least, 1 << max(0, n.bit_length() - 3))
    return -(-n // step) * step


def n_rows(prompts: int, row_multiple: int = 1) -> int:
    B = 1 << (prompts - 1).bit_length()
    return -(-B // row_multiple) * row_multiple


def most_tiles(prompts: Sequence[Prompt]) -> int:
    return max(len(prompt.tiles) for prompt in prompts)


def pack(prompts: Sequence[Prompt], row_multiple: int = 1, length: int = 0, tiles: int = 0) -> Batch:
    """One prompt a row; rows beyond them hold padding only."""
    T = rounded(max(length, *(len(p.tokens) for p in prompts)))
    B, M = n_rows(len(prompts), row_multiple), few(max(tiles, most_tiles(prompts)), 1)
    batch = _blank(B, T, M, max(p.tiles.shape[1] for p in prompts))
    for row, prompt in enumerate(prompts):
        _fill(batch, row, prompt, 0)
    return batch


class Piece(NamedTuple):
    batch: Batch  # its targets and loss weights are those that a score was asked for
    first: list[int]  # of each prompt: the number of its first token in the piece


def pieces(
    prompts: Sequence[Prompt],
    model: Llama,
    row_multiple: int = 1,
    first: int = 0,
    length: int = 0,
    tiles: int = 0,
    scored_from: Sequence[int] = (),
) -> Iterator[Piece]:
    """The prompts as batches of one shape (of two, if some have pictures in them and some have not), piece by piece.

    With `tiles`, a piece has room for as many as any piece of such a prompt could have.
    `first`: the position of their first tokens. `scored_from`: of each prompt, the first token that is a target.
    """
    vision = model.model.vision
    a_tile = vision.tokens_per_tile if vision else 0
    T = min(PIECE, rounded(max(length, *(len(prompt.tokens) for prompt in prompts))))
    tiles_at = [np.flatnonzero(np.asarray(p.tokens) == model.patch_id)[:: a_tile or None] for p in prompts]
    ends_at = [np.flatnonzero(np.asarray(p.tokens) == model.patch_id)[a_tile - 1 :: a_tile or None] for p in prompts]
    T = max([T, *(int((b - a).max()) + 1 for a, b in zip(tiles_at, ends_at, strict=True) if len(a))])
    cuts = [cut(len(p.tokens), T, begins, ends) for p, begins, ends in zip(prompts, tiles_at, ends_at, strict=True)]
    counts = [np.searchsorted(begins, of) for begins, of in zip(tiles_at, cuts, strict=True)]
    M = few(max(min(tiles, T // max(1, a_tile)), *(int(np.diff(of).max()) for of in counts)), 1)
    B, side = n_rows(len(prompts), row_multiple), max(p.tiles.shape[1] for p in prompts)
    for k in range(max(len(of) for of in cuts) - 1):
        going = [row for row, of in enumerate(cuts) if k + 1 < len(of)]
        pictures = any(counts[row][k] < counts[row][k + 1] for row in going)
        batch = _blank(B, T, M if pictures else 0, side if pictures else 1)
        for row in going:
            (a, b), (m, n), prompt = cuts[row][k : k + 2], counts[row][k : k + 2], prompts[row]
            _fill(batch, row, Prompt(prompt.tokens[a:b], prompt.tiles[m:n]), first + a)
            if scored_from:
                targets = np.asarray(prompt.tokens[a + 1 : b + 1], np.int32)
                batch.targets[row, : len(targets)] = targets
                batch.loss_weights[row, max(0, scored_from[row] - 1 - a) : len(targets)] = 1
        yield Piece(batch, [of[min(k, len(of) - 1)] for of in cuts])


def cut(length: int, T: int, begins: np.ndarray, ends: np.ndarray) -> list[int]:
    """Where pieces of at most T tokens begin, and the length; none within a tile, whose tokens are begins[i] to
    ends[i]."""
    cuts = [0]
    while (at := cuts[-1] + T) < length:
        i = np.searchsorted(ends, at)  # the first tile that does not end before the cut
        cuts.append(int(begins[i]) if i < len(begins) and begins[i] < at else at)
    return [*cuts, length]


def _blank(B: int, T: int, M: int, side: int) -> Batch:
    nothing = np.zeros((B, T), np.int32)
    tiles = np.zeros((B, M, side, side, 3), np.uint8)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    weights = np.zeros((B, T), np.float32)
    return Batch(nothing, nothing.copy(), weights, nothing.copy(), positions, nothing.copy(), tiles)


def _fill(batch: Batch, row: int, prompt: Prompt, first: int) -> None:
    n = len(prompt.tokens)
    batch.tokens[row, :n] = prompt.tokens
    batch.segment_ids[row, :n] = 1
    batch.positions[row] += first
    if len(prompt.tiles):
        batch.tiles[row, : len(prompt.tiles)] = prompt.tiles
