"""Models from Hugging Face's format and back: `llamax convert from-hf` and `to-hf`.

Both go leaf by leaf (hf_names.py says which tensors a leaf is made of), so that memory holds a few chunks, or tensors
of the export, and never the model. Both check everything first, write to a folder beside the one asked for, and give it
its name at the end: what is there is whole.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamax.checkpoint import hf_config, hf_config_write, hf_tokenizer, hf_write, layers, saved, space, stream
from llamax.checkpoint.found import Found
from llamax.checkpoint.hf_names import Index, Leaf, Same, Shape, assemble, leaves, tree
from llamax.checkpoint.hf_read import BF16, CONFIG, Source, Tensor, read_json
from llamax.checkpoint.hf_write import Planned
from llamax.checkpoint.manager import Checkpoints
from llamax.config import ConfigError, Model, Train
from llamax.data.tokenizer import Tokenizer
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from llamax.observe.progress import quantity, transfer
from llamax.observe.provenance import write_whole

logger = logging.getLogger("llamax")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BF16, "float16": np.dtype(np.float16)}
KEPT = (  # what is not weights, and is given back as it was
    *("config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "*processor_config.json", "vocab.json", "merges.txt", "tokenizer.model"),
    *("LICENSE*", "USE_POLICY*", "README*"),
)
DTYPE_KEYS = ("dtype", "torch_dtype")  # of config.json, and its sections


@functools.lru_cache(4)
def shapes(model: Model) -> tuple[Any, Any]:
    """(params, router_bias) of a model as shapes of float32; nothing is allocated."""
    return skeleton(model, Seam(), patch_id=-1, train=Train()).shapes()


# ---------------------------------------------------------------------------------------------------- from Hugging Face


def from_hf(folder: str | Path, out: str | Path) -> Path:
    """Converts the Hugging Face folder to one of ours (saved.py says what is in it); returns `out`.

    Tensors keep their dtype; those of eight bits become bfloat16. Where the layers of one stacked leaf differ in dtype,
    it takes the one that holds them all, and an export gives each its own.

    Raises:
      ConfigError: `out` is there already; the folder, its configuration, its tensors or its tokenizer are not in order,
        or the disk has no room. Nothing is left behind.
    """
    source, out = Source(folder), Path(out)
    params, bias = shapes(source.model)
    table = leaves(source.model, source.form, params)
    found = source.check(table)
    hf_tokenizer.check(source.folder, source.model)
    tokenizer = hf_tokenizer.find(source.folder)
    values = {leaf.path: _lazy(leaf, found) for leaf in table}
    dtypes = {
        name: found[name].dtype.name
        for leaf in table
        for name in leaf.tensors
        if found[name].dtype != values[leaf.path].dtype
    }
    with new_folder(out, space.needed(values.values())) as temporary:
        _keep(source.folder, temporary / saved.HF)
        described = dict(form=source.form, folder=source.folder.name, shards=len(source.shards))
        saved.record(
            temporary,
            source.model,
            patch_id=source.patch_id,
            tokenizer=f"{saved.HF}/{tokenizer.name}" if tokenizer is not None else None,
            dtypes=dtypes,
            source=described,
        )
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), bias)
        total = sum(value.nbytes for value in values.values())
        with transfer(f"converting {source.folder.name}", total) as advance:
            stream.write(temporary / saved.CHECKPOINTS, tree(values), zeros, advance)
    return out


def _lazy(leaf: Leaf, found: dict[str, Tensor]) -> stream.Lazy:
    dtypes = [found[name].dtype for name in leaf.tensors]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = np.promote_types(dtype, other)  # bfloat16 and float16 fit into float32 only

    def make(box: Index) -> np.ndarray:
        return assemble(leaf, found, box).astype(dtype, copy=False)

    def release(box: Index) -> None:
        for name in leaf.tensors[box[0]] if leaf.stacked else leaf.tensors:
            found[name].release()

    chunk = stream.chunk_of(leaf.shape, dtype.itemsize, stacked=leaf.stacked, slow=leaf.how.slow)
    return stream.Lazy(leaf.shape, dtype, chunk, make, release)


def _keep(folder: Path, to: Path) -> None:
    to.mkdir()
    for path in sorted({path for pattern in KEPT for path in folder.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, to / path.name)


# ------------------------------------------------------------------------------------------------------ to Hugging Face


def to_hf(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    step: int | None = None,
    max_shard_gb: float = 5.0,
) -> Path:
    """Exports a run's workdir or a converted model in Hugging Face's format; returns `out`.

    Args:
      dtype: of the tensors, a key of DTYPES; None leaves each as it is stored.
      step: of a run; None takes the newest sound checkpoint.
      max_shard_gb: of a file, in 10^9 bytes; a larger tensor has a file of its own.
    Raises:
      ConfigError: as `from_hf`; or no format of theirs can express the model, or its router has a bias.
    """
    out, model = Path(out), _ours(Path(folder), step)
    with Checkpoints(model.checkpoints) as checkpoints:
        step = checkpoints.sound(step)
    model = _ours(Path(folder), step)
    if not max_shard_gb > 0:
        raise ConfigError(f"--max-shard-gb {max_shard_gb:g}", "a file has more than 0 GB", "Leave it out for 5.")
    form = hf_config_write.format_of(model.model)
    if model.hf is not None:  # a Llama 4 without anything of its own is written as what it came as
        form = hf_config.describe(read_json(model.hf / CONFIG), str(model.hf / CONFIG)).form
    params, bias = shapes(model.model)
    table = leaves(model.model, form, params)
    opened = layers.leaves(Found(model, step), params, bias)
    _refuse_router_bias(model.checkpoints / str(step), bias)
    with new_folder(out, 0) as temporary:
        # With adapters, some of it is stored as the run began, and all as the run has it.
        cast = DTYPES[dtype or "float32"] if dtype or model.tune.lora_rank else None
        plan, staged = _plan(table, opened, temporary, cast, model.dtypes)
        check_room(out, space.needed(plan) + staged)
        _write_small_files(model, temporary, dtype, max(plan, key=lambda tensor: tensor.nbytes).dtype.name)
        with transfer(f"exporting {model.folder.name}", hf_write.total(plan)) as advance:
            hf_write.write(temporary, plan, max_shard_gb * 1e9, advance)
    return out


def _ours(folder: Path, step: int | None) -> saved.Saved:
    found = saved.find(folder, step)
    if found is None:
        true = f"it holds neither a run.json nor a {saved.MODEL}"
        raise ConfigError(f"A model in {folder}", true, "Give the --workdir of a run, or a converted model.")
    return found


def _refuse_router_bias(step_folder: Path, bias: Any) -> None:
    for path, _ in jax.tree_util.tree_leaves_with_path(bias):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if np.any(stream.Stored(step_folder / "router_bias", name).read()):
            true = f"{name} is not zero, and Llama 4 has no such tensor"
            change = "Train with --config.router_bias.rate=0, and export that."
            raise ConfigError(f"Exporting {step_folder}", true, change)


def _plan(
    table: list[Leaf], opened: layers.Open, scratch: Path, dtype: np.dtype | None, dtypes: dict[str, str]
) -> tuple[list[Planned], int]:
    """(their tensors in the order in which they are made: those that share our leaves together; bytes of the largest
    leaves that are staged at the same time)."""
    groups: dict[tuple[str, ...], list[Leaf]] = {}
    for leaf in table:
        groups.setdefault(leaf.tensors, []).append(leaf)
    plan: list[Planned] = []
    staged = 0
    for parts in groups.values():
        stored = [opened(leaf.name) for leaf in parts]
        sides = [_Layers(leaf, one, scratch) for leaf, one in zip(parts, stored, strict=True)]
        for r, name in enumerate(parts[0].tensors):
            shape = parts[0].how.theirs(parts[0].layer_shape)
            own = np.dtype(dtypes[name]) if name in dtypes else stored[0].dtype
            plan.append(Planned(name, shape, dtype or own, _maker(name, sides, r, shape, dtype or own)))
        staged = max(staged, sum(one.staged_bytes for leaf, one in zip(parts, stored, strict=True) if leaf.stacked))
    return plan, staged


class _Layers:
    """The layers of one leaf, each to be asked for once, from any thread; staged, if at all, when the first is."""

    def __init__(self, leaf: Leaf, stored: layers.Layered, scratch: Path):
        self.leaf, self._stored, self._scratch = leaf, stored, scratch / f"{leaf.name}.staged"
        self._layer: Callable[[int], np.ndarray] | None = None
        self._left, self._lock = len(leaf.tensors), threading.Lock()

    def __call__(self, r: int) -> np.ndarray:
        if not self.leaf.stacked:
            return self._stored.read()
        with self._lock:
            layer = self._layer = self._layer or self._stored.by_layer(self._scratch)
            self._left -= 1
            if not self._left:
                self._layer = None  # and the staged file goes with it
        return layer(r)


def _maker(name: str, sides: list[_Layers], r: int, shape: Shape, dtype: np.dtype) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        made = None
        for part in sides:
            ours = _cast(name, part(r), dtype)
            if isinstance(part.leaf.how, Same):
                return np.ascontiguousarray(ours)
            made = np.empty(shape, dtype) if made is None else made
            part.leaf.how.put(made, ours)
            del ours  # before the next is read
        assert made is not None
        return made

    return make


def _cast(name: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype == x.dtype:
        return x
    with np.errstate(over="ignore"):
        cast = x.astype(dtype)
    if dtype == np.float16 and np.isinf(cast).any() and not np.isinf(x).any():
        true = f"{name} has values beyond float16's 65504"
        raise ConfigError("--dtype float16", true, "Give --dtype bfloat16, or leave it out.")
    return cast


# ---------------------------------------------------------------------------------------------------- the small files


def _write_small_files(model: saved.Saved, to: Path, dtype: str | None, stored: str) -> None:
    """config.json and what belongs to it: those that the model came with, or new ones."""
    if model.hf is not None:
        for path in sorted(model.hf.iterdir()):
            shutil.copyfile(path, to / path.name)
        said = read_json(to / CONFIG)
        changed = with_dtype(said, dtype)
        if changed != said:
            write_whole(to / CONFIG, json.dumps(changed, indent=2) + "\n")
        tokenizer = hf_tokenizer.opened(model.tokenizer)
        if tokenizer is not None and not (to / hf_tokenizer.JSON).exists():
            hf_tokenizer.write(tokenizer, to)
        return
    tokenizer = Tokenizer(model.tokenizer) if model.tokenizer else None
    ids = token_ids(tokenizer)
    files = {CONFIG: hf_config_write.write(model.model, ids, dtype or stored)}
    files["generation_config.json"] = hf_config_write.generation(ids, model.model.vocab_size)
    if model.model.vision is not None:
        files["preprocessor_config.json"] = hf_config_write.preprocessor(model.model.vision)
    for name, said in files.items():
        write_whole(to / name, json.dumps(said, indent=2) + "\n")
    if tokenizer is not None:
        hf_tokenizer.write(tokenizer, to)


def token_ids(tokenizer: Tokenizer | None) -> hf_config_write.TokenIds:
    """The special tokens of a tokenizer; Llama 4's without one."""
    if tokenizer is None:
        return hf_config_write.TokenIds()
    ids = hf_config_write.TokenIds(bos=tokenizer.bos, eos=tuple(sorted(tokenizer.stop)), pad=tokenizer.pad)
    if not tokenizer.has("patch"):
        return ids
    return ids._replace(image_start=tokenizer.image_start, image_end=tokenizer.image_end, patch=tokenizer.patch)


def with_dtype(said: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config.json that came with a model, for the tensors of an export: they are quantised no more, and of `dtype`
    (None: as they came)."""
    said = {key: value for key, value in said.items() if key not in ("quantization_config", "compression_config")}
    for key, value in said.items():
        if key in DTYPE_KEYS and dtype is not None:
            said[key] = dtype
        elif key in ("text_config", "vision_config") and isinstance(value, dict):
            said[key] = with_dtype(value, dtype)
    return said


# -------------------------------------------------------------------------------------------------------- new folders


@contextlib.contextmanager
def new_folder(out: Path, bytes_needed: int) -> Iterator[Path]:
    """A temporary folder beside `out`, which takes that name if all goes well and is removed if not.

    Raises:
      ConfigError: `out` is there and not empty, cannot be made, or the disk has no room.
    """
    out = out.expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}", "it is there already", "Name a new folder, or remove this one.")
    check_room(out, bytes_needed)
    new_parents = [parent for parent in out.parents if not parent.exists()]
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--out {out}", f"it cannot be made: {error}", "Name another folder.") from None
    try:
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except BaseException as error:
        space.remove(temporary)
        for parent in new_parents:  # the deepest first
            with contextlib.suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        if isinstance(error, Exception) and space.is_full(error):
            true = f"the disk was full before all was written; {quantity(space.free(out))}B are free now"
            raise ConfigError(f"--out {out}", true, "Free some space, or name a folder on another disk.") from error
        raise


def check_room(out: Path, bytes_needed: int) -> None:
    """ConfigError if fewer bytes are free where `out` will be."""
    free = space.free(out.expanduser().absolute())
    if free < bytes_needed:
        true = f"it needs {quantity(bytes_needed)}B, and {quantity(free)}B are free"
        raise ConfigError(f"--out {out}", true, "Free some space, or name a folder on another disk.")
