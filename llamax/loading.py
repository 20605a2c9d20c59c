"""`llamax.load`: a model from any folder that holds one, straight onto a mesh.

Three kinds of folder: a training run's workdir, a converted model (`llamax convert from-hf`), and a folder in Hugging
Face's format, whose tensors are read where they lie: each device gets the slices that it holds, and no more is read.
The adapters of a run are folded into the weights that they stand beside, which are read where the run began.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamax import checks, config
from llamax.checkpoint import hf_names, hf_tokenizer, saved
from llamax.checkpoint.found import Found, base_of, find
from llamax.checkpoint.hf_read import Source, Tensor
from llamax.checkpoint.manager import Checkpoints
from llamax.checkpoint.saved import Saved
from llamax.config import ConfigError
from llamax.config_dict import merged
from llamax.data.tokenizer import Tokenizer, check_size
from llamax.model import lora
from llamax.model.seam import Seam, make_seam
from llamax.model.skeleton import Skeleton, skeleton
from llamax.parallel import rules
from llamax.parallel.mesh import make_mesh
from llamax.positions import changed


class Loaded(NamedTuple):
    """A model that can be run: `skeleton.bind(params, router_bias)`."""

    model: config.Model
    skeleton: Skeleton
    params: Any
    router_bias: Any
    tokenizer: Tokenizer | None  # None: the folder has none that we read


def load(
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    step: int | None = None,
    positions: Mapping[str, Any] | None = None,
) -> Loaded:
    """The model in `folder`: a run's workdir, a converted model, or a folder in Hugging Face's format.

    Args:
      mesh: where its arrays go, by the rules of `parallel/rules.py`; the first device unless given.
      dtype: of the parameters in memory and of the computation, float32 or bfloat16.
      step: of a run; None takes the newest sound checkpoint.
      positions: what to change of how the model reads positions, which no parameter depends on, by the dotted names of
        its fields: `{"attn_temperature": 0.0, "rope.scaling": "yarn"}`. All of them: llamax.positions.WEIGHTLESS.
    Raises:
      ConfigError: `positions` cannot be changed so; no model is there; its files are damaged or not those of its
        configuration; the tokenizer has another number of ids than the embedding has rows.
    """
    if dtype not in config.COMPUTE_DTYPES:
        true = f"it is one of {', '.join(config.COMPUTE_DTYPES)}"
        raise ConfigError(f"dtype={dtype!r}", true, f"Give {config.COMPUTE_DTYPES[0]!r}.")
    found, mesh = find(folder, step), mesh or make_mesh({"data": 1}, jax.devices()[:1])
    said, model = found.said, found.said.model
    if positions:
        model = changed(model, positions)
        checks.check_model(model)
    tokenizer = tokenizer_of(said)
    bones, shapes = _bones(model, said.patch_id, mesh, dtype)
    params, bias = read(found, *shapes)
    return Loaded(model, bones, params, bias, tokenizer)


def tokenizer_of(said: Saved | Source) -> Tokenizer | None:
    """None: the folder has none that we read."""
    if isinstance(said, Source):
        hf_tokenizer.check(said.folder, said.model)
        return hf_tokenizer.opened(hf_tokenizer.find(said.folder))
    return _tokenizer(said)


def read(found: Found, params: Any, router_bias: Any) -> tuple[Any, Any]:
    """(params, router_bias) of these shapes, dtypes and places (jax.ShapeDtypeStruct)."""
    if isinstance(found.said, Source):
        values = _read(found.said, params)
        return values, jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), router_bias)
    if found.said.tune.lora_rank:
        return _folded(found, found.said, params, router_bias)
    with Checkpoints(found.said.checkpoints) as checkpoints:
        return checkpoints.restore_weights(found.step, params=params, router_bias=router_bias, checked=True)


def _folded(found: Found, said: Saved, params: Any, router_bias: Any) -> tuple[Any, Any]:
    """Of a run with adapters: what it trained, and what it began with."""
    how = dict(patch_id=said.patch_id, train=config.Train(), tune=said.tune)
    bones = skeleton(said.model, Seam(), **how)
    shapes, _ = bones.shapes()
    places = rules.shardings(bones.axes, shapes, jax.tree.leaves(params)[0].sharding.mesh)
    whole = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)
    kept = bones.kept(merged(whole, params))
    base = base_of(said)
    beneath, _ = read(base, lora.beneath(params, base.said.model), router_bias)
    with Checkpoints(said.checkpoints) as checkpoints:
        own, bias = checkpoints.restore_weights(found.step, params=kept, router_bias=router_bias, checked=True)
    return lora.merged(merged(beneath, own), lora.scale_of(said.tune)), bias


def _tokenizer(ours: saved.Saved) -> Tokenizer | None:
    if ours.hf is not None:
        hf_tokenizer.check(ours.hf, ours.model)
        return hf_tokenizer.opened(ours.tokenizer)
    if ours.tokenizer is None:
        return None
    tokenizer = Tokenizer(ours.tokenizer)
    check_size(tokenizer, ours.model.vocab_size, f"The model in {ours.folder}", "Bring the tokenizer that it had.")
    return tokenizer


def _bones(model: config.Model, patch_id: int, mesh: Mesh, dtype: str) -> tuple[Skeleton, tuple[Any, Any]]:
    """The model without its arrays, and their shapes, dtypes and places."""
    how = config.Train(compute_dtype=dtype, remat="none")
    bones = skeleton(model, make_seam(mesh), patch_id=patch_id, train=how)
    params, bias = bones.shapes()
    places = rules.shardings(bones.axes, params, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, dtype, sharding=at), params, places)
    bias = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), bias)
    return bones, (params, bias)


def _read(source: Source, shapes: Any) -> Any:
    """Their tensors as our parameters, leaf by leaf."""
    table = hf_names.leaves(source.model, source.form, shapes)
    found = source.check(table)
    wanted = {leaf.path: leaf for leaf in table}
    values = {}
    for path, shape in _flat(shapes):
        values[path] = _leaf(wanted[path], found, shape)
        for name in wanted[path].tensors:
            found[name].release()
    return hf_names.tree(values)


def _leaf(leaf: hf_names.Leaf, found: dict[str, Tensor], shape: jax.ShapeDtypeStruct) -> jax.Array:
    seen: dict[tuple, np.ndarray] = {}  # devices that hold the same slices share one reading

    def read(index: tuple[slice, ...]) -> np.ndarray:
        box = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, leaf.shape, strict=True))
        key = tuple((s.start, s.stop) for s in box)
        if key not in seen:
            seen[key] = hf_names.assemble(leaf, found, box).astype(shape.dtype)  # a copy: arrays must not hang on files
        return seen[key]

    return jax.make_array_from_callback(leaf.shape, shape.sharding, read)


def _flat(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(tuple(key.key for key in path), leaf) for path, leaf in leaves]
