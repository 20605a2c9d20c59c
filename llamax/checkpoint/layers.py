"""A model's leaves read from the disk layer by layer, wherever its weights are: a checkpoint's own files, tensors in
Hugging Face's format, or either with a run's adapters folded in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llamax import config
from llamax.checkpoint import hf_names
from llamax.checkpoint.found import Found, base_of
from llamax.checkpoint.hf_names import Leaf
from llamax.checkpoint.hf_read import Source
from llamax.checkpoint.manager import Checkpoints
from llamax.checkpoint.stream import Stored
from llamax.model import lora, tuned
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton


class Layered(Protocol):
    """One leaf: all of it, or a function that gives layer r of a stacked one (see `stream.Stored`)."""

    dtype: np.dtype

    @property
    def staged_bytes(self) -> int: ...

    def read(self) -> np.ndarray: ...

    def by_layer(self, scratch: Path) -> Callable[[int], np.ndarray]: ...


Open = Callable[[str], Layered]  # of a leaf's name, such as "stack.segment0.slot0.moe.gate"


class Tensors:
    """A leaf that is made of Hugging Face's tensors."""

    staged_bytes = 0

    def __init__(self, leaf: Leaf, found: Mapping[str, Any]):
        self._leaf, self._found = leaf, found
        self.dtype = np.result_type(*(found[name].dtype for name in leaf.tensors))

    def read(self) -> np.ndarray:
        return hf_names.assemble(self._leaf, self._found, hf_names.whole(self._leaf.shape))

    def by_layer(self, scratch: Path) -> Callable[[int], np.ndarray]:
        inner = hf_names.whole(self._leaf.layer_shape)
        return lambda r: hf_names.assemble(self._leaf, self._found, (slice(r, r + 1), *inner))[0]


class Folded:
    """A matrix with its adapters folded in, float32."""

    dtype = np.dtype(np.float32)

    def __init__(self, matrix: Layered, a: Layered, b: Layered, scale: float):
        self._matrix, self._a, self._b, self._scale = matrix, a, b, scale

    @property
    def staged_bytes(self) -> int:
        return self._matrix.staged_bytes + self._a.staged_bytes + self._b.staged_bytes

    def read(self) -> np.ndarray:
        return lora.fold_on_host(self._matrix.read(), self._a.read(), self._b.read(), self._scale)

    def by_layer(self, scratch: Path) -> Callable[[int], np.ndarray]:
        matrix = self._matrix.by_layer(scratch)
        a, b = self._a.by_layer(Path(f"{scratch}{lora.A}")), self._b.by_layer(Path(f"{scratch}{lora.B}"))
        return lambda r: lora.fold_on_host(matrix(r), a(r), b(r), self._scale)


def leaves(found: Found, params: Any, router_bias: Any) -> Open:
    """A way to open the leaves of a model whose parameters have these shapes.

    Raises:
      ConfigError: its files are damaged, or not those of such a model.
    """
    said = found.said
    if isinstance(said, Source):
        table = hf_names.leaves(said.model, said.form, params)
        tensors, named = said.check(table), {leaf.name: leaf for leaf in table}
        return lambda name: Tensors(named[name], tensors)
    kept = params
    if said.tune.lora_rank:
        bones = skeleton(said.model, Seam(), patch_id=said.patch_id, train=config.Train(), tune=said.tune)
        kept = bones.kept(bones.shapes()[0])
    with Checkpoints(said.checkpoints) as checkpoints:
        item = checkpoints.checked(found.step, params=kept, router_bias=router_bias) / "params"
    if not said.tune.lora_rank:
        return partial(Stored, item)
    base, scale = base_of(said), lora.scale_of(said.tune)
    beneath = leaves(base, lora.beneath(params, base.said.model), router_bias)
    own = {path.replace("/", ".") for path in tuned.paths_of(kept)}

    def opened(name: str) -> Layered:
        if name in own:
            return Stored(item, name)
        if name + lora.A in own:
            return Folded(beneath(name), Stored(item, name + lora.A), Stored(item, name + lora.B), scale)
        return beneath(name)

    return opened
