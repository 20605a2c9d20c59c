"""Reads the tiny Llama 4 goldens (tests/golden/README.md) into a llamax model: no more than what the cases need."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from llamax import config
from llamax.batch import Batch
from llamax.model.seam import Seam
from llamax.model.skeleton import Skeleton, skeleton

FOLDER = Path(__file__).parent / "golden" / "llama4"


class Golden(NamedTuple):
    model: config.Model
    weights: dict[str, np.ndarray]
    batch: Batch
    outputs: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    patch_id: int


def load(name: str) -> Golden:
    folder = FOLDER / name
    hf = json.loads((folder / "config.json").read_text())
    text = hf.get("text_config", hf)
    files = [load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs", "grads")]
    weights, inputs, outputs, grads = files
    patch_id = hf.get("image_token_index", -1)
    tokens = inputs["input_ids"].astype(np.int32)
    labels = np.pad(inputs["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=-100)  # HF shifts inside its loss
    shape = tokens.shape
    pixels = inputs.get("pixel_values")
    batch = Batch(
        tokens=tokens,
        targets=np.maximum(labels, 0).astype(np.int32),
        loss_weights=(labels >= 0).astype(np.float32),
        segment_ids=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        source_ids=np.zeros(shape, np.int32),
        tiles=np.zeros((shape[0], 0, 1, 1, 3), np.uint8)
        if pixels is None
        else rows_of_tiles(pixels, tokens == patch_id),
    )
    return Golden(model_config(text, hf.get("vision_config")), weights, batch, outputs, grads, patch_id)


def rows_of_tiles(pixels_SCHW: np.ndarray, is_patch_BT: np.ndarray) -> np.ndarray:
    """The case's flat tiles as float [B, M, H, W, 3], each row's own first."""
    per_tile = is_patch_BT.sum() // len(pixels_SCHW)
    counts = is_patch_BT.sum(1) // per_tile
    pixels = pixels_SCHW.transpose(0, 2, 3, 1)
    tiles = np.zeros((len(counts), counts.max(), *pixels.shape[1:]), np.float32)
    for row, (count, start) in enumerate(zip(counts, np.cumsum(counts) - counts, strict=True)):
        tiles[row, :count] = pixels[start : start + count]
    return tiles


def model_config(text: dict, vision: dict | None) -> config.Model:
    rope = text["rope_parameters"]
    scaled = {}
    if rope["rope_type"] == "llama3":
        scaled = dict(
            scaling="llama3",
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_len=rope["original_max_position_embeddings"],
        )
    kinds = tuple(
        ("rope_chunk" if text["no_rope_layers"][i] else "nope_full") + ("+moe" if i in text["moe_layers"] else "+dense")
        for i in range(text["num_hidden_layers"])
    )
    return config.Model(
        vocab_size=text["vocab_size"],
        dim=text["hidden_size"],
        n_heads=text["num_attention_heads"],
        n_kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        plan=((kinds[:4], len(kinds) // 4),) if len(kinds) % 4 == 0 else ((kinds, 1),),
        dense_ffn_dim=text["intermediate_size_mlp"],
        expert_ffn_dim=text["intermediate_size"],
        n_experts=text["num_local_experts"],
        top_k=text["num_experts_per_tok"],
        chunk_len=text["attention_chunk_size"],
        qk_norm=text["use_qk_norm"],
        attn_temperature=text["attn_scale"] * text["attn_temperature_tuning"],
        attn_temperature_floor=text["floor_scale"],
        norm_eps=text["rms_norm_eps"],
        rope=config.Rope(theta=rope["rope_theta"], **scaled),
        vision=vision
        and config.Vision(
            tile_px=vision["image_size"],
            patch_px=vision["patch_size"],
            dim=vision["hidden_size"],
            n_layers=vision["num_hidden_layers"],
            n_heads=vision["num_attention_heads"],
            ffn_dim=vision["intermediate_size"],
            adapter_dim=vision["projector_output_dim"],
            rope_theta=vision["rope_parameters"]["rope_theta"],
            norm_eps=vision["norm_eps"],
        ),
    )


def build(golden: Golden, seam: Seam | None = None, *, remat: str = "none", **changes) -> tuple[Skeleton, dict, dict]:
    """The case as (skeleton, params, router_bias); `changes` replace fields of its configuration."""
    model, train = dataclasses.replace(golden.model, **changes), config.Train(remat=remat)
    skel = skeleton(model, seam or Seam(), patch_id=golden.patch_id, train=train)
    params, bias = skel.shapes()
    weights = text_tree(golden.model, golden.weights)
    if golden.model.vision:
        weights |= vision_tree(golden.model.vision, golden.weights)
    for name, value in weights.items():
        put(params, name, value)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))  # the case names every parameter
    return skel, jax.tree.map(jnp.asarray, params), jax.tree.map(lambda b: jnp.zeros(b.shape, b.dtype), bias)


def put(tree: dict, dotted: str, value: np.ndarray) -> None:
    *path, last = dotted.split(".")
    for key in path:
        tree = tree[key]
    assert tree[last].shape == value.shape, (dotted, tree[last].shape, value.shape)
    tree[last] = value


def text_tree(model: config.Model, hf: dict) -> dict[str, np.ndarray]:
    """llamax name -> value, layers stacked over repeats."""
    prefix = "language_model." if "language_model.lm_head.weight" in hf else ""
    hf = {key.removeprefix(prefix): value for key, value in hf.items()}
    tree = {
        "embed": hf["model.embed_tokens.weight"],
        "norm.weight": hf["model.norm.weight"],
        "head": hf["lm_head.weight"].T,
    }
    ((period, repeats),) = model.plan
    for slot in range(len(period)):
        layers = [text_layer(model, hf, f"model.layers.{r * len(period) + slot}.") for r in range(repeats)]
        for key in layers[0]:
            tree[f"stack.segment0.slot{slot}.{key}"] = np.stack([layer[key] for layer in layers])
    return tree


def text_layer(model: config.Model, hf: dict, at: str) -> dict[str, np.ndarray]:
    def heads(name, n):
        return hf[at + f"self_attn.{name}_proj.weight"].T.reshape(model.dim, n, model.head_dim)

    layer = {
        "attention.query": heads("q", model.n_heads),
        "attention.key": heads("k", model.n_kv_heads),
        "attention.value": heads("v", model.n_kv_heads),
        "attention.out": hf[at + "self_attn.o_proj.weight"].T.reshape(model.n_heads, model.head_dim, model.dim),
        "attention_norm.weight": hf[at + "input_layernorm.weight"],
        "ffn_norm.weight": hf[at + "post_attention_layernorm.weight"],
    }
    ffn = at + "feed_forward."
    if ffn + "router.weight" not in hf:
        return layer | {f"dense.{n}": hf[f"{ffn}{n}_proj.weight"].T for n in ("gate", "up", "down")}
    gate, up = np.split(hf[ffn + "experts.gate_up_proj"], 2, axis=-1)
    layer |= {"moe.router": hf[ffn + "router.weight"].T, "moe.gate": gate, "moe.up": up}
    layer["moe.down"] = hf[ffn + "experts.down_proj"]
    return layer | {f"moe.shared.{n}": hf[f"{ffn}shared_expert.{n}_proj.weight"].T for n in ("gate", "up", "down")}


def vision_tree(vision: config.Vision, hf: dict) -> dict[str, np.ndarray]:
    at = "vision_model."
    tree = {
        "projector": hf["multi_modal_projector.linear_1.weight"].T,
        "vision.class_embedding": hf[at + "class_embedding"],
        "vision.position_embedding": hf[at + "positional_embedding_vlm"],
        "vision.patch_embedding.weight": hf[at + "patch_embedding.linear.weight"].T,
        "vision.adapter_in.weight": hf[at + "vision_adapter.mlp.fc1.weight"].T,
        "vision.adapter_out.weight": hf[at + "vision_adapter.mlp.fc2.weight"].T,
    }
    for part in ("weight", "bias"):
        tree[f"vision.norm_pre.{part}"] = hf[f"{at}layernorm_pre.{part}"]
        tree[f"vision.norm_post.{part}"] = hf[f"{at}layernorm_post.{part}"]
    names = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.o_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            values = [hf[f"{at}model.layers.{i}.{theirs}.{part}"].T for i in range(vision.n_layers)]
            tree[f"vision.blocks.{ours}.{part}"] = np.stack(values)
    return tree
