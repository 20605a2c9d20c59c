"""Continuations of prompts: each prompt is read once (prefill), then every new token costs one token's work (decode).

Both are programs of few shapes: lengths and numbers of rows are rounded up. A sampled token depends on the seed, its
prompt's number and its sample's, and never on which other prompts share the batch.

Letters: B rows, T room in a row, M tiles a row, V vocabulary, S new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llamax.batch import Batch
from llamax.config import ConfigError
from llamax.model import cache as caches
from llamax.model.cache import Cache
from llamax.model.llama import Llama
from llamax.model.skeleton import Skeleton

ROUND = 64  # the least length of a row
LEAST = 1e-6  # of temperatures above 0, and of top_p: float32 divides by it
MOST_TOKENS = 2**24  # of a completion


class Prompt(NamedTuple):
    tokens: list[int]
    tiles: np.ndarray  # uint8 [n, P, P, 3]


class Completion(NamedTuple):
    tokens: list[int]  # as they were drawn, with the stop id that ended it
    logp: list[float]  # of each under the model: softmax of the logits as they are, whatever they were drawn from
    stopped: bool  # by a stop id; otherwise there was no more room

    @property
    def text(self) -> list[int]:
        """The tokens without the stop id."""
        return self.tokens[:-1] if self.stopped else self.tokens


class Sampling(NamedTuple):
    temperature: float = 0.0  # 0 takes the likeliest token; above, samples from softmax(logits / temperature)
    top_p: float = 1.0  # out of the likeliest tokens that together have this probability (arXiv:1904.09751)
    seed: int = 0  # 0 to 2^32 - 1


def check(max_tokens: int, sampling: Sampling, n: int = 1) -> None:
    """ConfigError if no text can be drawn so; it names the options of the command line."""
    if not 1 <= max_tokens <= MOST_TOKENS:
        asked, true = f"--max-tokens {max_tokens}", f"a text has 1 to {MOST_TOKENS} tokens"
        raise ConfigError(asked, true, "Give a number in between.")
    if n < 1:
        raise ConfigError(f"-n {n}", "that is no continuation", "Give 1 or more.")
    if sampling.temperature != 0 and not LEAST <= sampling.temperature < math.inf:
        asked, true = f"--temperature {sampling.temperature:g}", f"it is 0, or a number from {LEAST:g} up"
        raise ConfigError(asked, true, "Give 0 for the likeliest text.")
    if not LEAST <= sampling.top_p <= 1:
        asked, true = f"--top-p {sampling.top_p:g}", f"it is a probability from {LEAST:g} up"
        raise ConfigError(asked, true, "Give 1 for all tokens, or --temperature 0 for the likeliest.")
    if not 0 <= sampling.seed < 2**32:
        raise ConfigError(f"--seed {sampling.seed}", "it is 0 to 2^32 - 1", "Give a smaller one.")


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


def generate(
    skeleton: Skeleton,
    params,
    router_bias,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    stop: Collection[int],
    n: int = 1,
    sampling: Sampling = Sampling(),  # noqa: B008, it is immutable
    rows: int = 128,
    row_multiple: int = 1,
    allowed: Collection[int] = (),
) -> list[list[Completion]]:
    """`n` completions of at most `max_tokens` new tokens for each prompt.

    `rows`: completions that are worked on together, at most, but for what fills up to `row_multiple`: the rows of a
    batch divide by it (on a mesh, the devices that split rows). `allowed`: the only ids that may be drawn; none stands
    for all but `<|patch|>`, which would take a picture's next feature.

    Raises:
        ConfigError: `check_prompt` refuses a prompt, or `check` the numbers.
    """
    check(max_tokens, sampling, n)
    model = skeleton.bind(params, router_bias)
    for prompt in prompts:
        check_prompt(prompt, model)
    may_V = may_be_drawn(allowed, model.model.vocab_size, model.patch_id)
    how = How(skeleton, tuple(sorted(stop)), sampling.temperature > 0, sampling.top_p < 1)
    chance = (np.float32(sampling.temperature), np.float32(sampling.top_p))
    done: list[list[Completion]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    at_once = 1 << max(0, (rows // n).bit_length() - 1)  # prompts; `pack` rounds their number up to such
    for first in range(0, len(prompts), at_once):
        numbers = by_length[first : first + at_once]
        batch = pack([prompts[i] for i in numbers], row_multiple)
        room = rounded(max(len(prompts[i].tokens) for i in numbers) + max_tokens)
        read_once = prefill(how.skeleton, room, params, router_bias, batch)
        for sample in range(0, n, rows):
            samples = range(sample, min(n, sample + rows))
            names = [(i, k) for i in numbers for k in samples]
            logits_BV, cache = jax.tree.map(jnp.copy, read_once) if n > rows else read_once  # which `advance` takes
            if len(samples) > 1:
                logits_BV, cache = jnp.repeat(logits_BV, len(samples), axis=0), caches.repeat(cache, len(samples))
            state = begin(logits_BV, cache, rounded(max_tokens), len(names))
            keys_B = keys(sampling.seed, names, len(logits_BV))
            state = advance(how, params, router_bias, state, np.int32(max_tokens), chance, may_V, keys_B)
            for (i, _), completion in zip(names, read(state, len(names), how.stop), strict=True):
                done[i].append(completion)
    return done


class How(NamedTuple):
    """The static part of the decode program."""

    skeleton: Skeleton
    stop: tuple[int, ...]  # sorted
    sampled: bool
    nucleus: bool


class Going(NamedTuple):
    """Completions under way. What stands in a row after its stop id means nothing."""

    cache: Cache
    logits: Array  # float32 [B, V] of the next token
    tokens: Array  # int32 [B, S]
    logp: Array  # float32 [B, S]
    count: Array  # int32 []: tokens drawn
    done: Array  # bool [B]


def begin(logits_BV: Array, cache: Cache, S: int, real_rows: int) -> Going:
    """Nothing drawn yet, of at most S tokens. Rows after the first `real_rows` fill the batch up: they are done."""
    B = len(logits_BV)
    nothing = jnp.zeros((B, S))
    done_B = jnp.arange(B) >= real_rows
    return Going(cache, logits_BV, nothing.astype(jnp.int32), nothing, jnp.int32(0), done_B)


def read(state: Going, rows: int, stop: Collection[int]) -> list[Completion]:
    """The first `rows` completions, on the host."""
    tokens, logp, count = jax.device_get((state.tokens, state.logp, state.count))
    found = []
    for ids, logps in zip(tokens[:rows, :count].tolist(), logp[:rows, :count].tolist(), strict=True):
        end = next((i for i, token in enumerate(ids) if token in stop), None)
        length = len(ids) if end is None else end + 1
        found.append(Completion(ids[:length], logps[:length], end is not None))
    return found


# ------------------------------------------------------------------------------------------------------- the programs


@partial(jax.jit, static_argnums=(0, 1))
def prefill(skeleton: Skeleton, room: int, params, router_bias, batch: Batch) -> tuple[Array, Cache]:
    """Logits [B, V] of the token after each prompt, and the cache that holds the prompts."""
    model = skeleton.bind(params, router_bias)
    hidden_BTD, cache = model.prefill(batch, room)
    return model.logits(_last(hidden_BTD, batch)), cache


@partial(jax.jit, static_argnums=0)
def extend(skeleton: Skeleton, params, router_bias, batch: Batch, cache: Cache) -> tuple[Array, Cache]:
    """The same for tokens that go on where the cache ends; the cache given stays as it was."""
    model = skeleton.bind(params, router_bias)
    hidden_BTD, cache = model.extend(batch, cache)
    return model.logits(_last(hidden_BTD, batch)), cache


def _last(hidden_BTD: Array, batch: Batch) -> Array:
    """The hidden state of each row's last token [B, D]."""
    last_B = jnp.where(batch.segment_ids > 0, batch.positions, -1).argmax(axis=1)
    return hidden_BTD[jnp.arange(len(last_B)), last_B]


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def advance(
    how: How, params, router_bias, state: Going, until: Array, chance: tuple[Array, Array], may_V: Array, keys_B: Array
) -> Going:
    """Draws tokens, and feeds each, the stop id too, until `until` are drawn or every row is done."""
    model = how.skeleton.bind(params, router_bias)
    rows, stops = jnp.arange(len(state.logits)), jnp.asarray(how.stop, jnp.int32)

    def unfinished(state: Going):
        return (state.count < until) & ~state.done.all()

    def one(state: Going) -> Going:
        token_B = draw(how, jnp.where(may_V, state.logits, -jnp.inf), chance, keys_B, state.count)
        logp_B = jax.nn.log_softmax(state.logits)[rows, token_B]
        next_B = state.cache.start + state.cache.length
        hidden_B1D, cache = model.extend(_tokens(token_B[:, None], next_B[:, None], ~state.done[:, None]), state.cache)
        return Going(
            cache,
            model.logits(hidden_B1D[:, 0]),
            state.tokens.at[:, state.count].set(token_B),
            state.logp.at[:, state.count].set(logp_B),
            state.count + 1,
            state.done | (token_B[:, None] == stops).any(axis=1),
        )

    return jax.lax.while_loop(unfinished, one, state)


def draw(how: How, logits_BV: Array, chance: tuple[Array, Array], keys_B: Array, count: Array) -> Array:
    """The next token of every row, int32 [B]."""
    if not how.sampled:
        return logits_BV.argmax(axis=-1).astype(jnp.int32)
    temperature, top_p = chance
    logits_BV = logits_BV / temperature
    if how.nucleus:
        logits_BV = jnp.where(in_nucleus(jax.nn.softmax(logits_BV), top_p), logits_BV, -jnp.inf)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, count)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def in_nucleus(p_BV: Array, top_p: Array) -> Array:
    """Which tokens are among the likeliest whose probabilities add up to `top_p`; the likeliest always is."""
    falling_BV = -jnp.sort(-p_BV, axis=-1)
    before_BV = jnp.cumsum(falling_BV, axis=-1) - falling_BV
    least_B1 = jnp.min(jnp.where(before_BV < top_p, falling_BV, falling_BV[:, :1]), axis=-1, keepdims=True)
    return p_BV >= least_B1


# ------------------------------------------------------------------------------------------------------------- shapes


def rounded(n: int) -> int:
    """n rounded up to one of few lengths, at most a quarter longer above 256."""
    return _few(n, ROUND)


def _few(n: int, least: int) -> int:
    """n rounded up to a multiple of `least`, or of an eighth to a quarter of itself."""
    step = max(least, 1 << max(0, n.bit_length() - 3))
    return -(-n // step) * step


def pack(prompts: Sequence[Prompt], row_multiple: int = 1) -> Batch:
    """One prompt a row; rows beyond them hold padding only."""
    T = rounded(max(len(p.tokens) for p in prompts))
    B = 1 << (len(prompts) - 1).bit_length()
    B = -(-B // row_multiple) * row_multiple
    M = _few(max(len(p.tiles) for p in prompts), 1)
    side = max(p.tiles.shape[1] for p in prompts)
    tokens, segments = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    tiles = np.zeros((B, M, side, side, 3), np.uint8)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = prompt.tokens
        segments[row, : len(prompt.tokens)] = 1
        tiles[row, : len(prompt.tiles)] = prompt.tiles if len(prompt.tiles) else 0
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return _tokens(tokens, positions, segments)._replace(tiles=tiles)


def _tokens(tokens_BT, positions_BT, segments_BT) -> Batch:
    """A batch of text to read: no targets."""
    B, T = tokens_BT.shape
    zeros = np.zeros((B, T), np.int32)
    nothing = np.zeros((B, 0, 1, 1, 3), np.uint8)
    return Batch(tokens_BT, zeros, zeros.astype(np.float32), segments_BT.astype(np.int32), positions_BT, zeros, nothing)


def may_be_drawn(allowed: Collection[int], vocab_size: int, patch_id: int) -> np.ndarray:
    may_V = np.zeros(vocab_size, bool)
    may_V[list(allowed) or slice(None)] = True
    if patch_id >= 0:
        may_V[patch_id] = False
    assert may_V.any(), f"nothing may be drawn of {allowed}"
    return may_V


def keys(seed: int, names: Sequence[tuple[int, int]], rows: int) -> Array:
    """One key a row, by the number of its prompt and of its sample."""
    numbers = np.zeros((rows, 2), np.uint32)
    numbers[: len(names)] = names
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(jax.random.fold_in)(fold(jax.random.key(seed), numbers[:, 0]), numbers[:, 1])
