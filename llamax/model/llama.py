"""The Llama 4 family: embed, fuse pictures, run the stack, normalise. The head is applied by `score.py`, in chunks."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from llamax import config
from llamax.batch import Batch
from llamax.model.attention import places
from llamax.model.fusion import fuse
from llamax.model.layers import RMSNorm, embedding, linear, matrix
from llamax.model.moe import Routing
from llamax.model.seam import Seam
from llamax.model.stack import ROWS, Stack
from llamax.model.vision import VisionEncoder, normalise


class Llama(nnx.Module):
    """A decoder of any layer plan, with a vision encoder where the configuration has one.

    `patch_id` is the token id of `<|patch|>`. Activations are of `dtype`; parameters are float32 masters.
    """

    def __init__(self, model: config.Model, seam: Seam, *, patch_id: int, dtype, remat: bool, rngs: nnx.Rngs):
        self.model, self.seam, self.patch_id, self.dtype = model, seam, patch_id, jnp.dtype(dtype)
        self.embed = embedding(rngs, (model.vocab_size, model.dim), ("vocab", "embed"), std=model.init_std)
        self.stack = Stack(model, seam, remat=remat, rngs=rngs)
        self.norm = RMSNorm(model.dim, model.norm_eps)
        if not model.tied_embeddings:
            sizes = dict(fan_in=model.dim, fan_out=model.vocab_size)
            self.head = matrix(rngs, (model.dim, model.vocab_size), ("embed", "vocab"), **sizes)
        if model.vision:
            self.vision = VisionEncoder(model.vision, remat=remat, rngs=rngs)
            sizes = dict(fan_in=model.vision.adapter_dim, fan_out=model.dim)
            self.projector = matrix(rngs, (model.vision.adapter_dim, model.dim), ("ffn", "embed"), **sizes)

    def __call__(self, batch: Batch) -> tuple[Array, Routing | None]:
        """Hidden states after the final norm [B, T, D], and the routing of the MoE layers [L_moe, B, T, ...]."""
        x_BTD = self.seam.constrain(self.embed_batch(batch), ROWS)
        x_BTD, routing = self.stack(x_BTD, places(batch.positions, batch.segment_ids, self.model))
        return self.norm(x_BTD), routing

    def embed_batch(self, batch: Batch) -> Array:
        """Token embeddings with the pictures' features in place; text-only batches never reach the encoder."""
        x_BTD = self.embed[...][batch.tokens].astype(self.dtype)
        rows, slots = batch.tiles.shape[:2]
        if not slots:
            return x_BTD
        features = self.vision(normalise(batch.tiles.reshape(rows * slots, *batch.tiles.shape[2:]), self.dtype))
        features_BFD = linear(features, self.projector[...].astype(self.dtype)).reshape(rows, -1, x_BTD.shape[-1])
        return fuse(x_BTD, features_BFD, batch.tokens == self.patch_id)

    def head_DV(self) -> Array:
        return self.embed[...].T if self.model.tied_embeddings else self.head[...]

    def logits(self, hidden: Array) -> Array:
        """float32 logits of a few positions (sampling, tests); training goes through `score.py`."""
        return jnp.matmul(hidden, self.head_DV().astype(hidden.dtype), preferred_element_type=jnp.float32)
