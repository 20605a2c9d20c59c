"""The Llama 4 family: embed, fuse pictures, run the stack, normalise. The head is applied by `score.py`, in chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from llamax import config
from llamax.batch import Batch
from llamax.model import cache as caches
from llamax.model.attention import places, places_after
from llamax.model.cache import Cache
from llamax.model.fusion import fuse
from llamax.model.layers import RMSNorm, embedding, linear, matrix
from llamax.model.seam import Seam
from llamax.model.stack import ROWS, Stack, Trace
from llamax.model.vision import TILES, LinearPatches, VisionEncoder, normalise


class Llama(nnx.Module):
    """A decoder of any layer plan, with an encoder of pictures where the configuration has one.

    `patch_id` is the token id of `<|patch|>`. Activations are of `dtype`; parameters are float32 masters.
    """

    def __init__(self, model: config.Model, seam: Seam, *, patch_id: int, dtype, remat: str, rngs: nnx.Rngs):
        self.model, self.seam, self.patch_id, self.dtype = model, seam, patch_id, jnp.dtype(dtype)
        self.embed = embedding(rngs, (model.vocab_size, model.dim), ("vocab", "embed"), std=model.init_std)
        self.stack = Stack(model, seam, remat=remat, rngs=rngs)
        self.norm = RMSNorm(model.dim, model.norm_eps)
        if not model.tied_embeddings:
            sizes = dict(fan_in=model.dim, fan_out=model.vocab_size)
            self.head = matrix(rngs, (model.dim, model.vocab_size), ("embed", "vocab"), **sizes)
        if model.reward_head:
            self.reward = matrix(rngs, (model.dim, 1), ("embed", None), fan_in=model.dim, fan_out=1)
        if model.vision and model.vision.encoder == "linear":
            self.vision = LinearPatches(model.vision, model.dim, std=model.init_std, rngs=rngs)
        elif model.vision:
            self.vision = VisionEncoder(model.vision, remat=remat, constrain=seam.constrain, rngs=rngs)
            sizes = dict(fan_in=model.vision.adapter_dim, fan_out=model.dim)
            self.projector = matrix(rngs, (model.vision.adapter_dim, model.dim), ("ffn", "embed"), **sizes)

    def __call__(self, batch: Batch) -> tuple[Array, Trace]:
        """Hidden states after the final norm [B, T, D], and what the layers tell of themselves."""
        x_BTD, vision_energy = self.embed_batch(batch)
        x_BTD = self.seam.constrain(x_BTD, ROWS)
        x_BTD, trace, _ = self.stack(x_BTD, places(batch.positions, batch.segment_ids, self.model))
        return self.norm(x_BTD), trace._replace(vision_energy=vision_energy)

    def prefill(self, batch: Batch, room: int) -> tuple[Array, Cache]:
        """Hidden states [B, T, D] as above, and a new cache for `room` tokens that holds the batch.

        One document a row, at any place of it (padding is segment 0 on either side), from any position on.
        """
        x_BTD, _ = self.embed_batch(batch)
        at = places(batch.positions, batch.segment_ids, self.model)
        x_BTD, _, new = self.stack(x_BTD, at, keep=True)
        cache = self.empty_cache(len(x_BTD), room)
        return self.norm(x_BTD), self.placed(caches.write(cache, new, batch.positions, batch.segment_ids))

    def empty_cache(self, rows: int, room: int) -> Cache:
        """For `rows` rows of at most `room` tokens."""
        return self.placed(caches.empty(self.model, rows, room, self.dtype))

    def placed(self, cache: Cache) -> Cache:
        """Every device keeps its own rows and kv heads: a cache comes back as it was given, so that its memory can be
        used again."""
        layers = jax.tree.map(lambda x: self.seam.constrain(x, (None, "rows", "kv_heads", None, None)), cache.layers)
        return Cache(layers, *(self.seam.constrain(x, ("rows",)) for x in (cache.start, cache.length)))

    def extend(self, batch: Batch, cache: Cache) -> tuple[Array, Cache]:
        """Hidden states [B, T, D] of tokens that go on where each row of the cache ends, and the cache with them.

        A row with padding only (segment 0) stays as it is. The cache must have room: nothing tells if it has not.
        """
        x_BTD, _ = self.embed_batch(batch)
        at = places_after(batch.positions, batch.segment_ids, self.model, caches.windows(cache, self.model))
        x_BTD, _, new = self.stack(x_BTD, at, keep=True, past=cache.layers)
        return self.norm(x_BTD), self.placed(caches.write(cache, new, batch.positions, batch.segment_ids))

    def embed_batch(self, batch: Batch) -> tuple[Array, Array | None]:
        """Token embeddings with the pictures' features in place, and the encoder's energy.

        Text-only batches never reach the encoder.
        """
        x_BTD = self.seam.lookup(self.embed[...], batch.tokens, self.dtype)
        rows, slots = batch.tiles.shape[:2]
        if not slots:
            return x_BTD, None
        pixels = self.seam.constrain(batch.tiles.reshape(rows * slots, *batch.tiles.shape[2:]), (*TILES, None))
        features, square_LS = self.vision(normalise(pixels, self.dtype))
        if hasattr(self, "projector"):
            features = self.seam.constrain(linear(features, self.projector[...].astype(self.dtype)), TILES)
        features_BFD = self.seam.constrain(features.reshape(rows, -1, x_BTD.shape[-1]), ("rows", None, None))
        is_patch_BT = batch.tokens == self.patch_id
        used_BM = jnp.arange(slots) < is_patch_BT.sum(axis=1, keepdims=True) // (features_BFD.shape[1] // slots)
        energy_LB = jnp.sum(jnp.where(used_BM, square_LS.reshape(-1, rows, slots), 0.0), axis=-1)
        return fuse(x_BTD, features_BFD, is_patch_BT, self.seam.tokens.running), energy_LB

    def head_DV(self) -> Array:
        return self.embed[...].T if self.model.tied_embeddings else self.head[...]

    def logits(self, hidden: Array) -> Array:
        """float32 logits of a few positions (sampling, tests); training goes through `score.py`."""
        return jnp.matmul(hidden, self.head_DV().astype(hidden.dtype), preferred_element_type=jnp.float32)
