"""Model variants: data only, each a function that returns a `config.Model`.

Scout and Maverick are the released models (Meta's reference code and Hugging Face's released configurations agree on
every number here). They differ in experts (16 in every layer, or 128 in every second layer beside dense ones), RoPE
scaling (Scout only) and QK norm (Scout only). The tiny ones have the same shape at a laptop's size: chunk, temperature
floor and the scaling's original length shrink too, so that they act within a row. Behemoth was never released: its
sizes are ours.

Llama 1 to 3.3 are dense decoders with RoPE in every layer and full attention, as published. Their released weights come
in two orders of RoPE's lanes, Meta's interleaved (ours) and Hugging Face's half-rotated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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


def behemoth() -> Model:
    """A Llama 4 of Behemoth's published size: 16 experts, 288B active of about 2T parameters.

    Meta announced these three numbers and never released the model or its dimensions: every width below is our own,
    chosen to meet them. Scout's layers, one expert of 16 a token and one shared; heads of 128; widths are multiples of
    256. With x the parameters of one expert in all layers and a everything else (attention, embeddings, router, norms),
    active = a + 2 x and total = a + 17 x, so 2000B - 288B = 15 x: x = 114.1B and a = 59.7B.

        88 layers, width 16,384, 128 query and 16 kv heads: attention 2 * 16,384 * 128 * (128 + 16) = 604.0M a layer
        a = 88 * (604.0M + 0.3M router and norms) + 2 * 202,048 * 16,384 embeddings = 53.2B + 6.6B = 59.8B
        experts of 26,368:  x = 88 * 3 * 16,384 * 26,368 = 114.1B
        active = 59.8B + 2 * 114.1B = 287.9B;  total = 59.8B + 17 * 114.1B = 1,998.7B, and 0.9B of vision

    RoPE is not rescaled: its layers see chunks of 8,192 tokens, the length that they are trained at.
    """
    return Model(
        dim=16_384,
        n_heads=128,
        n_kv_heads=16,
        plan=((SCOUT_PERIOD, 22),),
        expert_ffn_dim=26_368,
        n_experts=16,
        vision=Vision(),
    )


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


def scout_context_tiny() -> Model:
    """Scout's shape for work on long contexts: text alone, heads as wide as Scout's. QK norm bounds a local layer's
    logits by the root of a head's width, and heads of 32 cannot tell one token from its neighbours."""
    small = scout_tiny()
    return replace(small, head_dim=128, chunk_len=32, init_std=0.02, rope=Rope(theta=10_000.0), vision=None)


def maverick_tiny() -> Model:
    """Maverick's shape in 4 layers, 2 of them with 8 experts."""
    return _tiny(plan=((MAVERICK_PERIOD, 1),), n_experts=8, qk_norm=False)


def behemoth_tiny() -> Model:
    """Behemoth's shape: Scout's layers and routing, RoPE not rescaled."""
    return _tiny(plan=((SCOUT_PERIOD, 1),), n_experts=4, qk_norm=True)


# --------------------------------------------------------------------------------------------------- dense decoders


def _dense(dim: int, layers: int, heads: int, kv_heads: int, ffn_dim: int, **differences) -> Model:
    """A Llama before the fourth: the sizes of its table, head width dim / heads."""
    return Model(
        dim=dim,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=dim // heads,
        plan=((("rope_full+dense",), layers),),
        dense_ffn_dim=ffn_dim,
        qk_norm=False,
        attn_temperature=0.0,
        **differences,
    )


LLAMA1 = dict(vocab_size=32_000, norm_eps=1e-6, rope=Rope(theta=10_000.0))  # trained on rows of 2,048 tokens
LLAMA2 = dict(vocab_size=32_000, rope=Rope(theta=10_000.0))  # 4,096
LLAMA3 = dict(vocab_size=128_256)  # 8,192
LLAMA31 = dict(vocab_size=128_256, rope=Rope(scaling="llama3", factor=8.0))  # 131,072, as all below
LLAMA32 = dict(vocab_size=128_256, rope=Rope(scaling="llama3", factor=32.0), tied_embeddings=True)


def llama1_7b() -> Model:
    """Llama 1 7B (arXiv 2302.13971, table 2)."""
    return _dense(4096, 32, 32, 32, 11_008, **LLAMA1)


def llama1_13b() -> Model:
    """Llama 1 13B."""
    return _dense(5120, 40, 40, 40, 13_824, **LLAMA1)


def llama1_33b() -> Model:
    """Llama 1 33B; some call it 30B."""
    return _dense(6656, 60, 52, 52, 17_920, **LLAMA1)


def llama1_65b() -> Model:
    """Llama 1 65B."""
    return _dense(8192, 80, 64, 64, 22_016, **LLAMA1)


def llama2_7b() -> Model:
    """Llama 2 7B (arXiv 2307.09288): Llama 1's sizes, another epsilon."""
    return _dense(4096, 32, 32, 32, 11_008, **LLAMA2)


def llama2_13b() -> Model:
    """Llama 2 13B."""
    return _dense(5120, 40, 40, 40, 13_824, **LLAMA2)


def llama2_70b() -> Model:
    """Llama 2 70B: the first with grouped queries."""
    return _dense(8192, 80, 64, 8, 28_672, **LLAMA2)


def llama3_8b() -> Model:
    """Llama 3 8B (arXiv 2407.21783, table 3)."""
    return _dense(4096, 32, 32, 8, 14_336, **LLAMA3)


def llama3_70b() -> Model:
    """Llama 3 70B."""
    return _dense(8192, 80, 64, 8, 28_672, **LLAMA3)


def llama31_8b() -> Model:
    """Llama 3.1 8B: Llama 3's with RoPE rescaled by 8 for 131,072 tokens."""
    return _dense(4096, 32, 32, 8, 14_336, **LLAMA31)


def llama31_70b() -> Model:
    """Llama 3.1 70B."""
    return _dense(8192, 80, 64, 8, 28_672, **LLAMA31)


def llama31_405b() -> Model:
    """Llama 3.1 405B, with its 8 kv heads; one of the released checkpoints repeats them to 16."""
    return _dense(16_384, 126, 128, 8, 53_248, **LLAMA31)


def llama32_1b() -> Model:
    """Llama 3.2 1B: heads of 64, one matrix for both embeddings, RoPE rescaled by 32."""
    return _dense(2048, 16, 32, 8, 8192, **LLAMA32)


def llama32_3b() -> Model:
    """Llama 3.2 3B: one matrix for both embeddings, RoPE rescaled by 32."""
    return _dense(3072, 28, 24, 8, 8192, **LLAMA32)


def llama33_70b() -> Model:
    """Llama 3.3 70B: Llama 3.1 70B's shape."""
    return llama31_70b()


# ------------------------------------------------------------------------------------------------------ other families


def mixtral_8x7b() -> Model:
    """Mixtral 8x7B (arXiv 2401.04088, table 1): 46.7B parameters, 12.9B active; 2 of 8 experts, no shared one."""
    return Model(
        vocab_size=32_000,
        dim=4096,
        n_heads=32,
        n_kv_heads=8,
        plan=((("rope_full+moe",), 32),),
        expert_ffn_dim=14_336,
        n_experts=8,
        top_k=2,
        n_shared_experts=0,
        router_score="softmax",
        router_renormalise=True,
        gate_on="output",
        qk_norm=False,
        attn_temperature=0.0,
        rope=Rope(theta=1_000_000.0),
    )


VARIANTS: dict[str, Callable[[], Model]] = {
    make.__name__: make
    for make in (
        *(scout, maverick, behemoth, scout_tiny, scout_context_tiny, maverick_tiny, behemoth_tiny),
        *(llama1_7b, llama1_13b, llama1_33b, llama1_65b, llama2_7b, llama2_13b, llama2_70b, llama3_8b, llama3_70b),
        *(llama31_8b, llama31_70b, llama31_405b, llama32_1b, llama32_3b, llama33_70b, mixtral_8x7b),
    )
}
