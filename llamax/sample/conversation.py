"""A conversation with a model: one row that is told something and says something, in turns, on one cache."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Collection, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llamax.model import cache as caches
from llamax.model.cache import Cache
from llamax.model.skeleton import Skeleton
from llamax.sample import engine, reading
from llamax.sample.engine import Prompt, Sampling


class Conversation:
    """Nothing is ever read twice.

    `tokens` is all of it, as ids: what is said goes on from what was drawn, not from its text. An interrupt at any
    moment leaves it whole: tokens, and the cache that holds them.
    """

    def __init__(self, skeleton: Skeleton, params, router_bias, *, stop: Collection[int]):
        self.skeleton, self.weights, self.stop = skeleton, (params, router_bias), tuple(sorted(stop))
        self._llama = skeleton.bind(params, router_bias)
        self._now = _Now([], 0, None, None)

    @property
    def tokens(self) -> list[int]:
        return self._now.tokens

    def tell(self, prompt: Prompt) -> None:
        """Reads tokens and pictures after all that was before."""
        reading.check_prompt(prompt, self._llama)
        now = self._now
        tokens = now.tokens + prompt.tokens
        if now.cache is None:
            room = engine.rounded(len(tokens))
            logits, cache = reading.read(self.skeleton, *self.weights, [prompt], room)
        else:
            room, cache = self._with_room(now, len(tokens))
            cache = jax.tree.map(jnp.copy, cache)  # reading takes it, and an interrupt must find it as it was
            logits, cache = reading.go_on(
                self.skeleton, *self.weights, [prompt], now.logits, cache, first=len(now.tokens)
            )
        jax.block_until_ready(logits)
        self._now = _Now(tokens, room, cache, logits)

    def say(self, max_tokens: int, sampling: Sampling = Sampling()) -> Iterator[int]:  # noqa: B008, it is immutable
        """New tokens as they are drawn, the stop id that ends them included. Each is in `tokens` when it comes."""
        engine.check(max_tokens, sampling)
        assert self._now.cache is not None and self._now.logits is not None
        how = engine.How(self.skeleton, self.stop, sampling.temperature > 0, sampling.top_p < 1)
        may_V = jnp.asarray(engine.may_be_drawn((), self._llama.model.vocab_size, self._llama.patch_id))
        chance = (np.float32(sampling.temperature), np.float32(sampling.top_p))
        keys_B = engine.keys(sampling.seed, [(0, len(self.tokens))], 1)
        drawn = engine.begin(self._now.logits, self._now.cache, engine.rounded(max_tokens), 1)
        for number in range(max_tokens):
            with uninterrupted():  # the state is donated: until the new one is there, there is none
                now = self._now
                room, cache = self._with_room(now, len(now.tokens) + 1)
                state = drawn._replace(cache=cache, logits=now.logits)
                drawn = engine.advance(how, *self.weights, state, np.int32(number + 1), chance, may_V, keys_B)
                token = int(drawn.tokens[0, number])
                now.tokens.append(token)
                self._now = _Now(now.tokens, room, drawn.cache, drawn.logits)
            yield token
            if token in self.stop:
                return

    def _with_room(self, now: _Now, length: int) -> tuple[int, Cache]:
        assert now.cache is not None
        if length <= now.room:
            return now.room, now.cache
        room = engine.rounded(max(length, 2 * now.room))
        return room, caches.grown(now.cache, self._llama.model, room)


class _Now(NamedTuple):
    """A conversation as it stands. It is replaced as a whole."""

    tokens: list[int]
    room: int
    cache: Cache | None
    logits: Array | None


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block (in the main thread, which alone gets it)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[tuple] = []
    before = signal.signal(signal.SIGINT, lambda *how: asked.append(how))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked and callable(before):
        before(*asked[0])
