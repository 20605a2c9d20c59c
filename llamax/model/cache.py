"""The keys and values of the tokens before, so that a new token costs one row of attention and not the whole matrix.

A layer that sees its chunk of C tokens only keeps the last C keys at most, in a ring; the others keep all. A cache of
S places holds position p of a row in place (p - start) mod S, start being the row's first position: so one rule says
which position lies in which place, whether the places are a ring or not, and whether they are filled yet. Keys are
kept as they are read: rotated, normed, heads before tokens.

Letters: B rows, T new tokens, K kv heads, S places, Dh head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from llamax import config


class KV(NamedTuple):
    """Keys and values: of one layer [B, K, S, Dh], or stacked over the repeats of a segment [repeats, B, K, S, Dh]."""

    key: Array
    value: Array


Layers = dict[str, dict[str, KV]]  # segment of the plan -> slot of its period, as in the tree of parameters


class Cache(NamedTuple):
    layers: Layers
    start: Array  # int32 [B]: the position of a row's first token
    length: Array  # int32 [B]: tokens seen; the next one stands at start + length


class Window(NamedTuple):
    """What lies in the places of a layer's cache."""

    positions: Array  # int32 [B, S]
    segments: Array  # int32 [B, S]: the id that attention compares, 1 + chunk or 1; 0 where nothing is


def places_of(kind: str, model: config.Model, room: int) -> int:
    """The places that a layer of a kind needs for `room` tokens."""
    return min(room, model.chunk_len) if kind.startswith("rope_chunk") else room


def empty(model: config.Model, rows: int, room: int, dtype) -> Cache:
    """A cache for `rows` rows of at most `room` tokens."""
    layers: Layers = {}
    for i, (kinds, repeats) in enumerate(model.plan):
        shapes = [(repeats, rows, model.n_kv_heads, places_of(kind, model, room), model.head_dim) for kind in kinds]
        layers[f"segment{i}"] = {
            f"slot{j}": KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for j, shape in enumerate(shapes)
        }
    nothing = jnp.zeros(rows, jnp.int32)
    return Cache(layers, nothing, nothing)


def windows(cache: Cache, model: config.Model) -> dict[str, Window]:
    """What each kind of attention finds in its cache, by the kind's name (`rope_chunk`, ...)."""
    found: dict[str, Window] = {}
    for i, (kinds, _) in enumerate(model.plan):
        for j, kind in enumerate(kinds):
            name = kind.split("+")[0]
            if name not in found:
                S = cache.layers[f"segment{i}"][f"slot{j}"].key.shape[3]
                chunk_len = model.chunk_len if name == "rope_chunk" else None
                found[name] = window(cache.start, cache.length, S, chunk_len)
    return found


def window(start_B: Array, length_B: Array, S: int, chunk_len: int | None) -> Window:
    newest_B1 = (start_B + length_B - 1)[:, None]
    # The newest position p with (p - start) mod S = s.
    positions_BS = newest_B1 - (length_B[:, None] - 1 - jnp.arange(S)) % S
    segments_BS = 1 + positions_BS // chunk_len if chunk_len else jnp.ones_like(positions_BS)
    return Window(positions_BS, jnp.where(positions_BS >= start_B[:, None], segments_BS, 0))


def write(cache: Cache, new: Layers, positions_BT: Array, segments_BT: Array) -> Cache:
    """The cache with the new tokens' keys and values [repeats, B, K, T, Dh] in their places; padding (segment 0) and
    what its ring would lose again at once are left out."""
    real_BT = segments_BT > 0
    first_B = jnp.min(jnp.where(real_BT, positions_BT, jnp.iinfo(jnp.int32).max), axis=1)
    next_B = jnp.max(jnp.where(real_BT, positions_BT + 1, 0), axis=1)
    start_B = jnp.where((cache.length == 0) & real_BT.any(axis=1), first_B, cache.start)
    rows_B1 = jnp.arange(len(start_B))[:, None]

    def put(old: Array, value: Array) -> Array:
        S = old.shape[3]
        kept_BT = real_BT & (positions_BT >= next_B[:, None] - S)
        place_BT = jnp.where(kept_BT, (positions_BT - start_B[:, None]) % S, S)  # S is outside, and dropped
        # Two index arrays around a slice: their dimensions come first.
        value = value.astype(old.dtype).transpose(1, 3, 0, 2, 4)
        return old.at[:, rows_B1, :, place_BT].set(value, mode="drop")

    layers = jax.tree.map(put, cache.layers, new)
    return Cache(layers, start_B, jnp.maximum(cache.length, next_B - start_B))


def repeat(cache: Cache, n: int) -> Cache:
    """Every row n times, one after the other."""
    layers = jax.tree.map(lambda x: jnp.repeat(x, n, axis=1), cache.layers)
    return Cache(layers, jnp.repeat(cache.start, n), jnp.repeat(cache.length, n))


def grown(cache: Cache, model: config.Model, room: int) -> Cache:
    """The same tokens in a cache for `room` tokens, not fewer than before."""
    layers: Layers = {}
    for i, (kinds, _) in enumerate(model.plan):
        old = cache.layers[f"segment{i}"]
        layers[f"segment{i}"] = {
            # Whatever grows has not gone round yet: a ring has C places from when there is room for C tokens.
            f"slot{j}": KV(*(_longer(x, places_of(kind, model, room)) for x in old[f"slot{j}"]))
            for j, kind in enumerate(kinds)
        }
    return cache._replace(layers=layers)


def _longer(x: Array, S: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, S - x.shape[3]), (0, 0)))
