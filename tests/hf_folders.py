"""Folders in Hugging Face's format for tests: the goldens' own, and random ones of any configuration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from llamax.checkpoint import hf, hf_config, hf_names
from tests.goldens import FOLDER

GENERATION = {"bos_token_id": 0, "eos_token_id": [1, 2], "temperature": 0.6, "transformers_version": "4.51.0"}


def write(folder: Path, config: dict, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A folder with these tensors, spread over `shards` files in no order that a layer would have."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def golden(folder: Path, case: str, dtype=np.float32, **how) -> Path:
    """A golden case as a folder that transformers could have written, cast to `dtype`."""
    weights = load_file(FOLDER / case / "weights.safetensors")
    config = json.loads((FOLDER / case / "config.json").read_text())
    return write(folder, config, {name: x.astype(dtype) for name, x in weights.items()}, **how)


def random(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of any configuration, float32; the same on every machine."""
    model, form, _ = hf_config.describe(config, "a test")
    shapes = hf_names.tensors(hf_names.leaves(model, form, hf.shapes(model)[0]))
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in sorted(shapes):
        x = rng.standard_normal(shapes[name], np.float32)
        is_norm = "norm" in name and name.endswith("weight")
        tensors[name] = 1 + 0.1 * x if is_norm else x * (0.5 if len(shapes[name]) < 2 else shapes[name][-1] ** -0.5)
    return tensors


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's files."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Equal in names, dtypes, shapes and every byte."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


# Shapes that the released models do not have: heads that are no power of two, head_dim x heads other than the width,
# two experts a token, chunks that do not divide the row, lists of layers without a period, a rotated layer that sees
# all. transformers' logits for these (weights: `random`, tokens: `tokens`) are in tests/golden/exported.safetensors.
ODD = {
    "model_type": "llama4_text",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "intermediate_size_mlp": 56,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 20,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "moe_layers": [3, 5],
    "no_rope_layers": [1, 1, 1, 0, 1, 0],
    "layer_types": ["chunked_attention"] * 3 + ["full_attention"] * 3,
    "attention_chunk_size": 7,
    "floor_scale": 4,
    "attn_scale": 0.3,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 16,
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
ODD_DENSE = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 72,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "rope_theta": 5000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def tokens(vocab_size: int = 96) -> np.ndarray:
    """int32 [2, 20]."""
    return np.random.default_rng(7).integers(3, vocab_size, (2, 20)).astype(np.int32)
