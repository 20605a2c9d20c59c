"""Model variants: data only, each a function that returns a `config.Model`.

Scout and Maverick are the released models (Meta's reference code and Hugging Face's released configurations agree on
every number here). They differ in experts (16 in every layer, or 128 in every second layer beside dense ones), RoPE
scaling (Scout only) and QK norm (Scout only). The tiny ones have the same shape at a laptop's size: chunk, temperature
floor and the scaling's original length shrink too, so that they act within a row.
"""

from __future__ import annotations

from collections.abc import Callable

from llamax.config import Model, Rope, Vision

SCOUT_PERIOD = ("rope_chunk+moe", "rope_chunk+moe", "rope_chunk+moe", "nope_full+moe")
MAVERICK_PERIOD = ("rope_chunk+dense", "rope_chunk+moe", "rope_chunk+dense", "nope_full+moe")


def scout() -> Model:
    """Llama 4 Scout 17B-16E: 109B parameters, 17B active."""
    return Model(
        plan=((SCOUT_PERIOD, 12),),
        n_experts=16,
        qk_norm=True,
        rope=Rope(scaling="llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_len=8192),
        vision=Vision(),
    )


def maverick() -> Model:
    """Llama 4 Maverick 17B-128E: 402B parameters, 17B active."""
    return Model(plan=((MAVERICK_PERIOD, 12),), n_experts=128, qk_norm=False, vision=Vision())


def _tiny(**differences) -> Model:
    """What the tiny variants share; the tokenizer that ships has 4,096 ids."""
    return Model(
        vocab_size=4096,
        dim=128,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        dense_ffn_dim=512,
        expert_ffn_dim=256,
        chunk_len=64,
        attn_temperature_floor=64,
        init_std=0.3,  # as large as what the other embeddings, the pictures', begin with
        vision=Vision(
            tile_px=56, patch_px=14, max_tiles=4, dim=96, n_layers=3, n_heads=4, ffn_dim=384, adapter_dim=192, shuffle=2
        ),
        **differences,
    )


def scout_tiny() -> Model:
    """Scout's shape in 4 layers, one period, of 4 experts."""
    rope = Rope(scaling="llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_len=64)
    return _tiny(plan=((SCOUT_PERIOD, 1),), n_experts=4, qk_norm=True, rope=rope)


def maverick_tiny() -> Model:
    """Maverick's shape in 4 layers, 2 of them with 8 experts."""
    return _tiny(plan=((MAVERICK_PERIOD, 1),), n_experts=8, qk_norm=False)


VARIANTS: dict[str, Callable[[], Model]] = {
    "scout": scout,
    "maverick": maverick,
    "scout_tiny": scout_tiny,
    "maverick_tiny": maverick_tiny,
}
