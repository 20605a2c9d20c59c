"""Continuations of prompts, by recomputing the whole row for every token (a cache makes this fast; this is its truth).

Letters: B prompts, T room in a row, M tiles a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llamax.batch import Batch
from llamax.model.skeleton import Skeleton

ROUND = 64  # row lengths, and numbers of rows above 1, are rounded up, so that few shapes compile


class Prompt(NamedTuple):
    tokens: list[int]
    tiles: np.ndarray  # uint8 [n, P, P, 3]


def generate(
    skeleton: Skeleton,
    params,
    router_bias,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    stop: set[int],
    temperature: float = 0.0,
    seed: int = 0,
    row_multiple: int = 1,
    allowed: Collection[int] = (),
) -> list[list[int]]:
    """At most `max_tokens` new ids for each prompt, without the stop id that ended it.

    `row_multiple`: the rows of a batch divide by it (on a mesh, the devices that split rows). `allowed`: the only ids
    that may be drawn; none stands for all but `<|patch|>`, which would take a picture's next feature.
    Temperature 0 takes the likeliest token; above, samples from softmax(logits / temperature).
    """
    rows, lengths = pack(prompts, max_tokens, row_multiple)
    how = DecodeSettings(skeleton, max_tokens, tuple(sorted(stop)), temperature)
    model = skeleton.bind(params, router_bias)
    may_V = np.zeros(model.model.vocab_size, bool)
    may_V[list(allowed) or slice(None)] = True
    may_V[model.patch_id] = False
    new = np.asarray(decode(how, params, router_bias, rows, lengths, may_V, jax.random.key(seed)))
    return [list(until(row.tolist(), stop)) for row in new[: len(prompts)]]


def until(ids: Sequence[int], stop: set[int]) -> Iterator[int]:
    for token in ids:
        if token in stop:
            return
        yield token


def pack(prompts: Sequence[Prompt], max_tokens: int, row_multiple: int = 1) -> tuple[Batch, np.ndarray]:
    """One prompt a row, with room for its continuation; and the prompts' lengths [B], 0 for a row without one."""
    longest = max(len(p.tokens) for p in prompts) + max_tokens
    B, T = len(prompts), -(-longest // ROUND) * ROUND
    step = row_multiple if B == 1 else math.lcm(ROUND, row_multiple)
    B = -(-B // step) * step
    M = max(len(p.tiles) for p in prompts)
    tokens = np.zeros((B, T), np.int32)
    side = max(p.tiles.shape[1] for p in prompts)
    tiles = np.zeros((B, M, side, side, 3), np.uint8)
    lengths = np.zeros(B, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = prompt.tokens
        tiles[row, : len(prompt.tiles)] = prompt.tiles if len(prompt.tiles) else 0
        lengths[row] = len(prompt.tokens)
    zeros = np.zeros((B, T), np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return Batch(tokens, zeros, zeros.astype(np.float32), zeros + 1, positions, zeros, tiles), lengths


class DecodeSettings(NamedTuple):
    """The static part of a decode program; `stop` is sorted."""

    skeleton: Skeleton
    max_tokens: int
    stop: tuple[int, ...]
    temperature: float


@partial(jax.jit, static_argnums=0)
def decode(how: DecodeSettings, params, router_bias, batch: Batch, lengths_B: Array, may_V: Array, key: Array) -> Array:
    """New ids int32 [B, max_tokens], out of those that may be drawn; what follows a stop id is meaningless."""
    model = how.skeleton.bind(params, router_bias)
    rows = jnp.arange(batch.tokens.shape[0])
    stops = jnp.asarray(how.stop, jnp.int32)

    def unfinished(carry):
        step, _, _, done_B = carry
        return (step < how.max_tokens) & ~done_B.all()

    def one(carry):
        step, tokens_BT, new_BS, done_B = carry
        hidden_BTD, _ = model(batch._replace(tokens=tokens_BT))
        logits_BV = jnp.where(may_V, model.logits(hidden_BTD[rows, lengths_B + step - 1]), -jnp.inf)
        if how.temperature:
            drawn_B = jax.random.categorical(jax.random.fold_in(key, step), logits_BV / how.temperature)
        else:
            drawn_B = logits_BV.argmax(axis=-1)
        drawn_B = drawn_B.astype(jnp.int32)
        tokens_BT = tokens_BT.at[rows, lengths_B + step].set(drawn_B)
        done_B = done_B | (drawn_B[:, None] == stops).any(axis=1)
        return step + 1, tokens_BT, new_BS.at[:, step].set(drawn_B), done_B

    B = batch.tokens.shape[0]
    start = (0, jnp.asarray(batch.tokens), jnp.zeros((B, how.max_tokens), jnp.int32), lengths_B == 0)
    return jax.lax.while_loop(unfinished, one, start)[2]
