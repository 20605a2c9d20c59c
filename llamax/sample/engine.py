"""Continuations of prompts: each prompt is read once (reading.py), then every new token costs one token's work.

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
from llamax.model.skeleton import Skeleton
from llamax.parallel import place
from llamax.sample.reading import Prompt as Prompt  # whoever generates takes it from here
from llamax.sample.reading import by_length, check_prompt, read, rounded

LEAST = 1e-6  # of temperatures above 0, and of top_p: float32 divides by it
MOST_TOKENS = 2**24  # of a completion


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
    length: int = 0,
    tiles: int = 0,
    allowed: Collection[int] = (),
    numbers: Sequence[int] = (),
) -> list[list[Completion]]:
    """`n` completions of at most `max_tokens` new tokens for each prompt.

    `rows`: completions that are worked on together, at most, but for what fills up to `row_multiple`: the rows of a
    batch divide by it (on a mesh, the devices that split rows). `length` and `tiles`: prompts are taken to have at
    least so many tokens, and tiles, so that calls with prompts of about one length share programs. `allowed`: the only
    ids that may be drawn; none stands for all but `<|patch|>`, which would take a picture's next feature. `numbers`:
    of the prompts, 0 to 2^32 - 1, by which they are sampled, so that a prompt's samples do not depend on those that it
    is given with; their places unless given.

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
    numbers = numbers or range(len(prompts))
    for places in by_length(prompts, max(1, rows // n)):
        some = [prompts[i] for i in places]
        room = rounded(max(length, *(len(prompt.tokens) for prompt in some)) + max_tokens)
        shape = dict(row_multiple=row_multiple, length=length, tiles=tiles)
        read_once = read(skeleton, params, router_bias, some, room, **shape)
        for sample in range(0, n, rows):
            samples = range(sample, min(n, sample + rows))
            names = [(i, k) for i in places for k in samples]
            logits_BV, cache = jax.tree.map(jnp.copy, read_once) if n > rows else read_once  # which `advance` takes
            if len(samples) > 1:
                logits_BV, cache = jnp.repeat(logits_BV, len(samples), axis=0), caches.repeat(cache, len(samples))
            state = begin(logits_BV, cache, rounded(max_tokens), len(names))
            keys_B = keys(sampling.seed, [(numbers[i], k) for i, k in names], len(logits_BV))
            state = advance(how, params, router_bias, state, np.int32(max_tokens), chance, may_V, keys_B)
            for (i, _), completion in zip(names, completions(state, len(names), how.stop), strict=True):
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


def completions(state: Going, rows: int, stop: Collection[int]) -> list[Completion]:
    """The first `rows` completions, on the host."""
    tokens, logp, count = place.fetch((state.tokens, state.logp, state.count))
    found = []
    for ids, logps in zip(tokens[:rows, :count].tolist(), logp[:rows, :count].tolist(), strict=True):
        end = next((i for i, token in enumerate(ids) if token in stop), None)
        length = len(ids) if end is None else end + 1
        found.append(Completion(ids[:length], logps[:length], end is not None))
    return found


# ------------------------------------------------------------------------------------------------------- the programs


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
        hidden_B1D, cache = model.extend(one_each(token_B, next_B, ~state.done), state.cache)
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


# ------------------------------------------------------------------------------------------------------------- inputs


def one_each(token_B: Array, position_B: Array, real_B: Array) -> Batch:
    """A batch of one token a row."""
    tokens_B1 = token_B[:, None]
    zeros, nothing = jnp.zeros_like(tokens_B1), jnp.zeros((len(tokens_B1), 0, 1, 1, 3), jnp.uint8)
    real_B1 = real_B[:, None].astype(jnp.int32)
    return Batch(tokens_B1, zeros, zeros.astype(jnp.float32), real_B1, position_B[:, None], zeros, nothing)


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
