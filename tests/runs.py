"""A run small enough for tests: fixture text and pictures, a Llama 4 with every kind of layer, seconds on one core."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llamax import config, variants

FIXTURES = Path(__file__).resolve().parent.parent / "data" / "fixtures"
KINDS = ("rope_chunk+dense", "nope_full+moe")


def tiny_run(steps: int = 4, **sections) -> config.Run:
    """8 rows of 128 tokens, every other step with pictures. `sections` replace fields: optim=dict(b1=0.8)."""
    model = config.Model(
        vocab_size=4096,
        dim=32,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        plan=((KINDS, 2),),
        dense_ffn_dim=64,
        expert_ffn_dim=32,
        n_experts=4,
        chunk_len=32,
        attn_temperature_floor=32,
        rope=variants.scout_tiny().rope,
        vision=config.Vision(
            tile_px=28, patch_px=7, max_tiles=2, dim=32, n_layers=2, n_heads=2, ffn_dim=64, adapter_dim=32
        ),
    )
    sources = {name: config.Source(str(FIXTURES / f"{name}.toml"), w) for name, w in SOURCES.items()}
    data = config.Data(
        tokenizer=str(FIXTURES.parent / "tokenizer.model"),
        seq_len=128,
        batch_tokens=8 * 128,
        sources=sources,
        multimodal_steps=0.5,
        tiles_per_row=8,
        window_docs=16,
    )
    run = config.Run(
        name="tiny",
        model=model,
        data=data,
        mesh=config.Mesh(data=1),
        optim=config.Optim(peak_lr=3e-3, warmup_steps=2),
        router_bias=config.RouterBias(rate=1e-2),
        train=config.Train(steps=steps, log_every_steps=2),
        checkpoint=config.Checkpoint(every_steps=2),
    )
    for name, changes in sections.items():
        section = getattr(run, name)
        changed = dataclasses.replace(section, **changes) if dataclasses.is_dataclass(section) else changes
        run = dataclasses.replace(run, **{name: changed})
    return run


SOURCES = {"text": 0.5, "code": 0.3, "pictures": 0.2}
