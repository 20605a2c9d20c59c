"""Pictures: a ViT over the patches of a square tile, then pixel shuffle and a two-layer adapter; or one linear layer.

The ViT, as in Llama 4: patches row-major, flattened channel-major (colour, row, column), embedded without bias; the
class token comes last; learned positions; pre-norm blocks with biases, 2D RoPE, full attention, exact GELU; the class
token is dropped at the end. Pixel shuffle joins s x s neighbouring patches into one token. The adapter applies GELU
after its second layer too.

Linear patches, as in Fuyu (adept.ai, 2023): the pixels of s x s neighbouring patches, projected with a bias to the
decoder's width, are a token. Where a patch stands, the decoder learns from the order of tokens and the separators.

Letters: S tiles, P patches a tile + 1, W width, H heads, Dh head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from llamax import config
from llamax.model.layers import LayerNorm, embedding, linear, matrix, mean_square, scan, stacked, zeros
from llamax.model.rope import grid_rotation, rotate
from llamax.model.seam import unconstrained

TILES = ("flat", None, None)  # tiles of all rows: devices that share a row share its tiles


def normalise(tiles: Array, dtype) -> Array:
    """uint8 pixels to [-1, 1]; tiles that are floating already are taken as they are."""
    if jnp.issubdtype(tiles.dtype, jnp.floating):
        return tiles.astype(dtype)
    return (tiles.astype(jnp.float32) / 127.5 - 1.0).astype(dtype)


def patches(tiles_SHWC: Array, patch_px: int) -> Array:
    """[S, side, side, 3] -> [S, grid^2, 3 patch_px^2], colour first inside a patch."""
    s, side, _, c = tiles_SHWC.shape
    g = side // patch_px
    x = tiles_SHWC.reshape(s, g, patch_px, g, patch_px, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(s, g * g, c * patch_px * patch_px)


def pixel_shuffle(x_SPW: Array, shuffle: int) -> Array:
    """[S, g^2, W] -> [S, (g/s)^2, s^2 W]: output (r, c) joins the patches (sr + i, sc + j) in row-major order."""
    s, p, w = x_SPW.shape
    g = round(p**0.5)
    x = x_SPW.reshape(s, g // shuffle, shuffle, g // shuffle, shuffle, w).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(s, (g // shuffle) ** 2, shuffle * shuffle * w)


class Linear(nnx.Module):
    def __init__(self, fan_in: int, fan_out: int, axes: tuple, *, bias: bool, rngs: nnx.Rngs, gain: float = 1.0):
        self.weight = matrix(rngs, (fan_in, fan_out), axes, fan_in=fan_in, fan_out=fan_out, gain=gain)
        if bias:
            self.bias = zeros((fan_out,), axes[1:])

    def __call__(self, x: Array) -> Array:
        y = linear(x, self.weight[...].astype(x.dtype))
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


class VisionBlock(nnx.Module):
    def __init__(self, vision: config.Vision, constrain: Callable, *, rngs: nnx.Rngs):
        self.vision, self.constrain = vision, constrain
        dim, ffn_dim = vision.dim, vision.ffn_dim
        into, out_of = ("embed", "heads"), ("heads", "embed")
        self.attention_norm = LayerNorm(dim, vision.norm_eps)
        self.query, self.key, self.value = (Linear(dim, dim, into, bias=True, rngs=rngs) for _ in range(3))
        self.out = Linear(dim, dim, out_of, bias=True, rngs=rngs)
        self.ffn_norm = LayerNorm(dim, vision.norm_eps)
        self.up = Linear(dim, ffn_dim, ("embed", "ffn"), bias=True, rngs=rngs)
        self.down = Linear(ffn_dim, dim, ("ffn", "embed"), bias=True, rngs=rngs)

    def __call__(self, x_SPW: Array) -> tuple[Array, Array]:
        """The residual stream after it, and its mean square [S]."""
        x_SPW = self.constrain(x_SPW + self.attend(self.attention_norm(x_SPW)), TILES)
        y_SPW = self.down(jax.nn.gelu(self.up(self.ffn_norm(x_SPW)), approximate=False))
        x_SPW = self.constrain(x_SPW + y_SPW, TILES)
        return x_SPW, mean_square(x_SPW).mean(axis=-1)

    def attend(self, x_SPW: Array) -> Array:
        heads = self.vision.n_heads
        head_dim = self.vision.dim // heads
        turn = grid_rotation(self.vision.grid, head_dim, self.vision.rope_theta)
        q, k, v = (f(x_SPW).reshape(*x_SPW.shape[:2], heads, head_dim) for f in (self.query, self.key, self.value))
        o_SPHDh = jax.nn.dot_product_attention(rotate(q, turn), rotate(k, turn), v)
        return self.out(o_SPHDh.reshape(x_SPW.shape))


class VisionEncoder(nnx.Module):
    def __init__(self, vision: config.Vision, *, remat: str, constrain: Callable = unconstrained, rngs: nnx.Rngs):
        self.constrain = constrain
        self.vision, self.remat = vision, "period" if remat == "block" else remat  # a period is a layer
        dim, adapter_dim = vision.dim, vision.adapter_dim
        pixels = 3 * vision.patch_px**2
        std = dim**-0.5
        self.patch_embedding = Linear(pixels, dim, (None, "embed"), bias=False, rngs=rngs)
        self.class_embedding = embedding(rngs, (dim,), ("embed",), std=std)
        self.position_embedding = embedding(rngs, (vision.grid**2 + 1, dim), (None, "embed"), std=std)
        self.norm_pre, self.norm_post = LayerNorm(dim, vision.norm_eps), LayerNorm(dim, vision.norm_eps)
        blocks = partial(VisionBlock, vision, constrain)
        self.blocks = stacked(blocks, vision.n_layers, rngs, axis="vision_layers")
        shuffled = vision.shuffle**2 * dim
        self.adapter_in = Linear(shuffled, adapter_dim, ("embed", "ffn"), bias=False, rngs=rngs)
        self.adapter_out = Linear(adapter_dim, adapter_dim, ("ffn", "embed"), bias=False, rngs=rngs)

    def __call__(self, pixels_SHWC: Array) -> tuple[Array, Array]:
        """Normalised pixels [S, side, side, 3] -> features [S, tokens_per_tile, adapter_dim].

        Also returns the mean square of the residual stream after each layer, [L, S].
        """
        x_SPW = self.patch_embedding(patches(pixels_SHWC, self.vision.patch_px))
        last = jnp.broadcast_to(self.class_embedding[...].astype(x_SPW.dtype), (x_SPW.shape[0], 1, x_SPW.shape[2]))
        x_SPW = jnp.concatenate([x_SPW, last], axis=1) + self.position_embedding[...].astype(x_SPW.dtype)
        x_SPW, square_LS = scan(self.blocks, self.constrain(self.norm_pre(x_SPW), TILES), remat=self.remat)
        x = self.constrain(pixel_shuffle(self.norm_post(x_SPW)[:, :-1], self.vision.shuffle), TILES)
        x = jax.nn.gelu(self.adapter_in(x), approximate=False)
        return self.constrain(jax.nn.gelu(self.adapter_out(x), approximate=False), TILES), square_LS


class LinearPatches(nnx.Module):
    """Features of white pixels start with standard deviation `std`, that of the other embeddings."""

    def __init__(self, vision: config.Vision, dim: int, *, std: float, rngs: nnx.Rngs):
        self.token_px = vision.shuffle * vision.patch_px
        self.projection = Linear(3 * self.token_px**2, dim, (None, "embed"), bias=True, gain=std, rngs=rngs)

    def __call__(self, pixels_SHWC: Array) -> tuple[Array, Array]:
        """Normalised pixels [S, side, side, 3] -> features [S, tokens_per_tile, D], and the squares of no layers."""
        features = self.projection(patches(pixels_SHWC, self.token_px))
        return features, jnp.zeros((0, len(features)), jnp.float32)
