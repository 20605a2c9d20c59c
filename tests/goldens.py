"""Reads the tiny Llama goldens (tests/golden/README.md) into llamax models, through the reader that users get."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from llamax import config
from llamax.batch import Batch
from llamax.checkpoint import hf, hf_names
from llamax.checkpoint.hf_read import Source, Tensor
from llamax.model.seam import Seam
from llamax.model.skeleton import Skeleton, skeleton

FOLDER = Path(__file__).parent / "golden" / "llama4"
LLAMA4 = ("scout_like", "maverick_like", "vision")
DENSE = ("llama31_untied", "llama32_tied")


class Golden(NamedTuple):
    model: config.Model
    table: list[hf_names.Leaf]  # our parameters and the tensors that they are made of
    weights: dict[str, Tensor]
    batch: Batch
    outputs: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    patch_id: int


def load(name: str) -> Golden:
    folder = FOLDER / name
    source = Source(folder, weights="weights.safetensors")
    table = hf_names.leaves(source.model, source.form, hf.shapes(source.model)[0])
    inputs, outputs, grads = (load_file(folder / f"{part}.safetensors") for part in ("inputs", "outputs", "grads"))
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
        else rows_of_tiles(pixels, tokens == source.patch_id),
    )
    return Golden(source.model, table, source.check(table), batch, outputs, grads, source.patch_id)


def rows_of_tiles(pixels_SCHW: np.ndarray, is_patch_BT: np.ndarray) -> np.ndarray:
    """The case's flat tiles as float [B, M, H, W, 3], each row's own first."""
    per_tile = is_patch_BT.sum() // len(pixels_SCHW)
    counts = is_patch_BT.sum(1) // per_tile
    pixels = pixels_SCHW.transpose(0, 2, 3, 1)
    tiles = np.zeros((len(counts), counts.max(), *pixels.shape[1:]), np.float32)
    for row, (count, start) in enumerate(zip(counts, np.cumsum(counts) - counts, strict=True)):
        tiles[row, :count] = pixels[start : start + count]
    return tiles


def packed(golden: Golden, name: str) -> Batch:
    """The case's packed row: several documents, each with positions of its own."""
    row = load_file(FOLDER / name / "inputs_packed.safetensors")
    row = {key: value.astype(np.int32) for key, value in row.items()}
    return golden.batch._replace(
        tokens=row["input_ids"],
        positions=row["position_ids"],
        segment_ids=row["segment_ids"],
        tiles=golden.batch.tiles[:1],
    )


def build(golden: Golden, seam: Seam | None = None, *, remat: str = "none", **changes) -> tuple[Skeleton, dict, dict]:
    """The case as (skeleton, params, router_bias); `changes` replace fields of its configuration."""
    model, train = dataclasses.replace(golden.model, **changes), config.Train(remat=remat)
    skel = skeleton(model, seam or Seam(), patch_id=golden.patch_id, train=train)
    values = {
        leaf.path: jnp.array(hf_names.assemble(leaf, golden.weights, hf_names.whole(leaf.shape)))
        for leaf in golden.table
    }
    _, bias = skel.shapes()
    return skel, hf_names.tree(values), jax.tree.map(lambda b: jnp.zeros(b.shape, b.dtype), bias)


def theirs(golden: Golden, tree: dict) -> dict[str, np.ndarray]:
    """A tree like our parameters (a gradient) under their names and in their shapes."""
    found = {name: np.zeros(shape, np.float32) for name, shape in hf_names.tensors(golden.table).items()}
    for leaf in golden.table:
        value = tree
        for key in leaf.path:
            value = value[key]
        layers = np.asarray(value) if leaf.stacked else np.asarray(value)[None]
        for name, layer in zip(leaf.tensors, layers, strict=True):
            leaf.how.put(found[name], layer)
    return found
