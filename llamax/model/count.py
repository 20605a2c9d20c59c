"""Exact counts of a model's parameters, the model FLOPs of training it, and bytes: pure Python on `config.Model`.

A matmul weight costs 6 FLOPs a token in training: 2 forward, 4 backward, of which 2 for the gradient of its input; that
of pixels nobody asks for, so their first matrix costs 4. An attention layer adds 12 H Dh FLOPs for each key that a
query sees (q.k and weights.v are 2 H Dh each; forward and backward are three times the forward). Masked keys are not
counted, nor is what rematerialisation computes again, nor anything that is no matmul: scores, choices and groups of a
router cost nothing, whatever the routing. A row is taken as one document: when several are packed into it, attention
costs less than is counted here.

Letters: D width, H query heads, K kv heads, Dh head dim, F ffn, E experts, V vocabulary, T tokens a row, W vision's D.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamax.config import Model, Run, Vision


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    text: int  # both embeddings, attention, feed-forwards, norms
    text_active: int  # of these, what one token uses: its top-k experts, and both embeddings whole
    vision: int  # encoder, adapter and projector, or the one linear layer

    @property
    def total(self) -> int:
        return self.text + self.vision


def parameters(model: Model) -> Parameters:
    """The model's parameters, to the unit."""
    embeddings = model.vocab_size * model.dim * (1 if model.tied_embeddings else 2)
    norms = (2 * len(model.layers) + 1) * model.dim
    fixed = embeddings + norms + _ssmax(model)
    return Parameters(
        text=fixed + _layers(model, model.n_experts),
        text_active=fixed + _layers(model, model.top_k),
        vision=_vision(model.vision, model.dim) if model.vision else 0,
    )


def matmul_active(model: Model) -> int:
    """Weights that multiply a token's activations: the active ones, without the input embedding and the norms."""
    return model.vocab_size * model.dim + _layers(model, model.top_k)


def row_flops(model: Model, seq_len: int) -> int:
    """Model FLOPs of training on one row of `seq_len` text tokens, forward and backward."""
    seen = sum(_keys_seen(kind, seq_len, model.chunk_len) for kind in model.layers)
    return 6 * matmul_active(model) * seq_len + 12 * model.n_heads * model.head_dim * seen


def token_flops(model: Model, seq_len: int) -> float:
    """The same a token, on average over the row."""
    return row_flops(model, seq_len) / seq_len


def tile_flops(vision: Vision, dim: int) -> int:
    """Model FLOPs of training on one picture tile, forward and backward, up to the decoder's width `dim`."""
    if vision.encoder == "linear":
        return 4 * _token_pixels(vision) * dim * vision.tokens_per_tile
    patches = vision.grid**2
    block = 4 * vision.dim**2 + 2 * vision.dim * vision.ffn_dim
    blocks = vision.n_layers * block * (patches + 1)
    attention = 12 * vision.dim * (patches + 1) ** 2 * vision.n_layers  # every patch sees all, and the class token
    from_pixels = 4 * 3 * vision.patch_px**2 * vision.dim * patches
    return from_pixels + 6 * (blocks + _connector(vision, dim) * vision.tokens_per_tile) + attention


def step_flops(run: Run, tiles: int = 0) -> int:
    """Model FLOPs of one training step: all rows, and `tiles` picture tiles."""
    return run.data.rows * row_flops(run.model, run.data.seq_len) + tiles * tile_flops_of(run)


def tile_flops_of(run: Run) -> int:
    """Model FLOPs that a picture tile adds to a step; 0 for a model without pictures."""
    return tile_flops(run.model.vision, run.model.dim) if run.model.vision is not None else 0


@dataclass(frozen=True)
class Bytes:
    """What training keeps of a model, all devices together, before activations."""

    parameters: int  # float32 masters
    gradients: int  # float32
    optimizer: int  # AdamW's two moments, float32


def training_bytes(n: int, trained: int | None = None) -> Bytes:
    """Of so many parameters, of which so many are trained: all, unless told otherwise."""
    trained = n if trained is None else trained
    return Bytes(parameters=4 * n, gradients=4 * trained, optimizer=8 * trained)


def cache_bytes(model: Model, context: int, itemsize: int = 2) -> int:
    """Bytes of the keys and values that decoding keeps of a sequence of `context` tokens, `itemsize` bytes a number: a
    chunked layer keeps those of at most one chunk."""
    kept = sum(min(model.chunk_len, context) if kind.startswith("rope_chunk") else context for kind in model.layers)
    return 2 * model.n_kv_heads * model.head_dim * itemsize * kept


def _layers(model: Model, n_experts: int) -> int:
    """Attention and feed-forward weights of all layers, with `n_experts` experts counted in each MoE layer."""
    attention = 2 * model.dim * model.head_dim * (model.n_heads + model.n_kv_heads)
    dense = 3 * model.dim * model.dense_ffn_dim
    moe = model.dim * model.n_experts + 3 * model.dim * model.expert_ffn_dim * (n_experts + model.n_shared_experts)
    return sum(attention + (moe if kind.endswith("+moe") else dense) for kind in model.layers)


def _ssmax(model: Model) -> int:
    """Scalable-Softmax's factors: one a head in every layer that sees the whole row."""
    layers = sum(not kind.startswith("rope_chunk") for kind in model.layers)
    return layers * model.n_heads if model.attn_scale == "ssmax" else 0


def _keys_seen(kind: str, seq_len: int, chunk_len: int) -> int:
    """Pairs (query, key it sees) in a row: causal, within chunks where the layer has them."""
    if not kind.startswith("rope_chunk"):
        chunk_len = seq_len
    chunks, rest = divmod(seq_len, chunk_len)
    return chunks * chunk_len * (chunk_len + 1) // 2 + rest * (rest + 1) // 2


def _vision(vision: Vision, dim: int) -> int:
    """Parameters of encoder, adapter and projector, or of the one linear layer and its bias."""
    if vision.encoder == "linear":
        return (_token_pixels(vision) + 1) * dim
    w, f = vision.dim, vision.ffn_dim
    block = 4 * (w * w + w) + (w * f + f) + (f * w + w) + 2 * 2 * w  # q k v o, up, down, two LayerNorms, all with bias
    embeddings = 3 * vision.patch_px**2 * w + w + (vision.grid**2 + 1) * w  # patches (no bias), class token, positions
    return embeddings + 2 * 2 * w + vision.n_layers * block + _connector(vision, dim)


def _connector(vision: Vision, dim: int) -> int:
    """Weights of the adapter's two layers and of the projector: no biases."""
    return vision.shuffle**2 * vision.dim * vision.adapter_dim + vision.adapter_dim**2 + vision.adapter_dim * dim


def _token_pixels(vision: Vision) -> int:
    """Numbers that make one token: the pixels of shuffle x shuffle patches, three colours."""
    return 3 * (vision.shuffle * vision.patch_px) ** 2
