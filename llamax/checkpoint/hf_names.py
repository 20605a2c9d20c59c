"""The one table of names between our parameters and Hugging Face's tensors, read in both directions.

A row pairs one of our leaves of a layer with a tensor of a Hugging Face layer and says how the arrays differ (`Same`,
`Transposed`, `Heads`, `HeadsOut`, `Half`). Ours are stacked over the repeats of (segment, slot), theirs are one tensor
a layer: HF layer = layers of the segments before + repeat x period + slot. Three formats:

    llama4        text and vision: text names under `language_model.`
    llama4_text   the decoder alone, no prefix
    llama         dense Llamas: the feed-forward is called `mlp`, and heads rotate by halves

Sources: the specification's parts A.3 and F. Letters: V vocabulary, D width, H heads, Dh head dim, F hidden, E experts.
numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from llamax.config import Model

LLAMA4, LLAMA4_TEXT, LLAMA = "llama4", "llama4_text", "llama"
FORMATS = (LLAMA4, LLAMA4_TEXT, LLAMA)
TILE = (128, 1024)  # of a transpose; two of them fit into a core's cache
Index = tuple[slice, ...]  # a slice with start and stop for each dimension
Get = Callable[[Index], np.ndarray]  # a box of one of their tensors
Shape = tuple[int, ...]


class How(Protocol):
    """How one of their tensors becomes one of ours."""

    @property
    def slow(self) -> int:
        """The dimension of ours that is their slowest."""

    def theirs(self, ours: Shape) -> Shape:
        """The shape of their tensor."""

    def take(self, get: Get, box: Index) -> np.ndarray:
        """A box of ours, out of no more of theirs than it takes."""

    def put(self, theirs: np.ndarray, ours: np.ndarray) -> None:
        """Writes the whole of ours where it belongs in theirs."""


@dataclass(frozen=True)
class Same:
    slow: int = 0

    def theirs(self, ours: Shape) -> Shape:
        return ours

    def take(self, get: Get, box: Index) -> np.ndarray:
        return get(box)

    def put(self, theirs: np.ndarray, ours: np.ndarray) -> None:
        bits(theirs)[...] = bits(ours)


@dataclass(frozen=True)
class Transposed:
    """Theirs [out, in], ours [in, out]."""

    slow: int = 1

    def theirs(self, ours: Shape) -> Shape:
        return ours[::-1]

    def take(self, get: Get, box: Index) -> np.ndarray:
        return turned(get(box[::-1]))

    def put(self, theirs: np.ndarray, ours: np.ndarray) -> None:
        turned(ours, theirs)


@dataclass(frozen=True)
class Heads:
    """Theirs [H Dh, D], ours [D, H, Dh]. `halves`: their lanes j and j + Dh/2 are a pair, ours 2j and 2j + 1."""

    head_dim: int
    halves: bool = False
    slow: int = 1

    def theirs(self, ours: Shape) -> Shape:
        return (ours[1] * ours[2], ours[0])

    def take(self, get: Get, box: Index) -> np.ndarray:
        inputs, heads, lanes = box
        rows_FD = get((slice(heads.start * self.head_dim, heads.stop * self.head_dim), inputs))
        if self.halves:
            pairs = rows_FD.reshape(-1, 2, self.head_dim // 2, rows_FD.shape[-1])
            rows_FD = pairs.swapaxes(1, 2).reshape(rows_FD.shape)
        return turned(rows_FD).reshape(rows_FD.shape[1], -1, self.head_dim)[:, :, lanes]

    def put(self, theirs: np.ndarray, ours: np.ndarray) -> None:
        turned(ours.reshape(len(ours), -1), theirs)
        if self.halves:
            pairs = theirs.reshape(-1, self.head_dim // 2, 2, theirs.shape[-1])
            theirs[...] = pairs.swapaxes(1, 2).reshape(theirs.shape)


@dataclass(frozen=True)
class HeadsOut:
    """Theirs [D, H Dh], ours [H, Dh, D]."""

    head_dim: int
    slow: int = 2

    def theirs(self, ours: Shape) -> Shape:
        return (ours[2], ours[0] * ours[1])

    def take(self, get: Get, box: Index) -> np.ndarray:
        heads, lanes, outputs = box
        rows_DF = get((outputs, slice(heads.start * self.head_dim, heads.stop * self.head_dim)))
        return turned(rows_DF).reshape(-1, self.head_dim, len(rows_DF))[:, lanes]

    def put(self, theirs: np.ndarray, ours: np.ndarray) -> None:
        turned(ours.reshape(-1, ours.shape[-1]), theirs)


@dataclass(frozen=True)
class Half:
    """Theirs [E, D, 2 F], ours [E, D, F]: the first half (0) or the second (1) of their last dimension."""

    which: int
    ffn_dim: int
    slow: int = 0

    def theirs(self, ours: Shape) -> Shape:
        return (*ours[:-1], 2 * ours[-1])

    def take(self, get: Get, box: Index) -> np.ndarray:
        at = self.which * self.ffn_dim
        return get((*box[:-1], slice(at + box[-1].start, at + box[-1].stop)))

    def put(self, theirs: np.ndarray, ours: np.ndarray) -> None:
        bits(theirs)[..., self.which * self.ffn_dim : (self.which + 1) * self.ffn_dim] = bits(ours)


def turned(x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The transpose of a matrix as a new array, or into `out`.

    By tiles, through two small buffers whose rows lie apart by no power of two: numpy's own copy of `x.T` is ten times
    slower on large weights, whose rows all fall into the same lines of the cache.
    """
    rows, columns = x.shape
    out = np.empty((columns, rows), x.dtype) if out is None else out
    source, target = bits(x), bits(out)
    high, wide = TILE
    into, across = np.empty((high, wide + 8), source.dtype), np.empty((wide, high + 8), source.dtype)
    for i in range(0, rows, high):
        h = min(high, rows - i)
        for j in range(0, columns, wide):
            w = min(wide, columns - j)
            into[:h, :w] = source[i : i + h, j : j + w]
            across[:w, :h] = into[:h, :w].T
            target[j : j + w, i : i + h] = across[:w, :h]
    return out


def bits(x: np.ndarray) -> np.ndarray:
    """The same memory as whole numbers, which numpy copies faster than bfloat16."""
    return x.view(f"u{x.dtype.itemsize}")


# ------------------------------------------------------------------------------------------------------- the table


class Leaf(NamedTuple):
    """One of our arrays, and the tensors that it is made of: one, or one for each repeat of a stacked leaf."""

    path: tuple[str, ...]  # in params
    shape: Shape
    stacked: bool  # dimension 0 counts repeats
    tensors: tuple[str, ...]  # theirs
    how: How

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def layer_shape(self) -> Shape:
        """The shape of what one tensor gives."""
        return self.shape[1:] if self.stacked else self.shape


def text_layer(model: Model, kind: str, form: str) -> dict[str, tuple[str, How]]:
    """Our leaf of a decoder layer -> (their name within the layer, how)."""
    heads, flip = Heads(model.head_dim), Transposed()
    rotated = Heads(model.head_dim, halves=form == LLAMA)
    rows: dict[str, tuple[str, How]] = {
        "attention_norm.weight": ("input_layernorm.weight", Same()),
        "attention.query": ("self_attn.q_proj.weight", rotated),
        "attention.key": ("self_attn.k_proj.weight", rotated),
        "attention.value": ("self_attn.v_proj.weight", heads),
        "attention.out": ("self_attn.o_proj.weight", HeadsOut(model.head_dim)),
        "ffn_norm.weight": ("post_attention_layernorm.weight", Same()),
    }
    ffn = "mlp" if form == LLAMA else "feed_forward"
    if kind.endswith("+dense"):
        return rows | {f"dense.{part}": (f"{ffn}.{part}_proj.weight", flip) for part in ("gate", "up", "down")}
    rows["moe.router"] = (f"{ffn}.router.weight", flip)
    for which, part in enumerate(("gate", "up")):
        rows[f"moe.{part}"] = (f"{ffn}.experts.gate_up_proj", Half(which, model.expert_ffn_dim))
    rows["moe.down"] = (f"{ffn}.experts.down_proj", Same())
    shared = {
        f"moe.shared.{part}": (f"{ffn}.shared_expert.{part}_proj.weight", flip) for part in ("gate", "up", "down")
    }
    return rows | shared


ENDS: dict[str, tuple[str, How]] = {
    "embed": ("model.embed_tokens.weight", Same()),
    "norm.weight": ("model.norm.weight", Same()),
    "head": ("lm_head.weight", Transposed()),
}
VISION: dict[str, tuple[str, How]] = {
    "projector": ("multi_modal_projector.linear_1.weight", Transposed()),
    "vision.class_embedding": ("vision_model.class_embedding", Same()),
    "vision.position_embedding": ("vision_model.positional_embedding_vlm", Same()),
    "vision.patch_embedding.weight": ("vision_model.patch_embedding.linear.weight", Transposed()),
    "vision.adapter_in.weight": ("vision_model.vision_adapter.mlp.fc1.weight", Transposed()),
    "vision.adapter_out.weight": ("vision_model.vision_adapter.mlp.fc2.weight", Transposed()),
    **{
        f"vision.norm_{at}.{part}": (f"vision_model.layernorm_{at}.{part}", Same())
        for at in ("pre", "post")
        for part in ("weight", "bias")
    },
}
VISION_LAYER: dict[str, tuple[str, How]] = {
    f"{ours}.{part}": (f"{theirs}.{part}", Transposed() if part == "weight" and "norm" not in ours else Same())
    for ours, theirs in {
        "attention_norm": "input_layernorm",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }.items()
    for part in ("weight", "bias")
}


def leaves(model: Model, form: str, shapes: dict[str, Any]) -> list[Leaf]:
    """Every leaf of `shapes`, the parameters' tree of anything with a shape, with the tensors of format `form`."""
    known = _rows(model, form)
    found = [(path, tuple(leaf.shape)) for path, leaf in _flat(shapes)]
    assert {".".join(path) for path, _ in found} == known.keys(), "the table and the model differ"
    return [Leaf(path, shape, *known[".".join(path)]) for path, shape in found]


def _rows(model: Model, form: str) -> dict[str, tuple[bool, tuple[str, ...], How]]:
    """Leaf's name -> (stacked, their names, how)."""
    prefix = "language_model." if form == LLAMA4 else ""
    ends = {ours: row for ours, row in ENDS.items() if not (ours == "head" and model.tied_embeddings)}
    rows: dict[str, tuple[bool, tuple[str, ...], How]] = {
        ours: (False, (prefix + theirs,), how) for ours, (theirs, how) in ends.items()
    }
    first = 0
    for s, (kinds, repeats) in enumerate(model.plan):
        for slot, kind in enumerate(kinds):
            layers = [first + repeat * len(kinds) + slot for repeat in range(repeats)]
            for ours, (theirs, how) in text_layer(model, kind, form).items():
                names = tuple(f"{prefix}model.layers.{i}.{theirs}" for i in layers)
                rows[f"stack.segment{s}.slot{slot}.{ours}"] = (True, names, how)
        first += len(kinds) * repeats
    if model.vision is not None:
        rows |= {ours: (False, (theirs,), how) for ours, (theirs, how) in VISION.items()}
        for ours, (theirs, how) in VISION_LAYER.items():
            names = tuple(f"vision_model.model.layers.{i}.{theirs}" for i in range(model.vision.n_layers))
            rows[f"vision.blocks.{ours}"] = (True, names, how)
    return rows


def tensors(table: list[Leaf]) -> dict[str, Shape]:
    """Their tensors' names and shapes, in our leaves' order."""
    found: dict[str, Shape] = {}
    for leaf in table:
        shape = leaf.how.theirs(leaf.layer_shape)
        for name in leaf.tensors:
            assert found.setdefault(name, shape) == shape, f"{name} has two shapes"
    return found


def whole(shape: Shape) -> Index:
    """The box that is all of an array."""
    return tuple(slice(0, n) for n in shape)


def assemble(leaf: Leaf, found: Mapping[str, Any], box: Index) -> np.ndarray:
    """A box of one of our leaves out of their tensors, each of which has a `get`; it may be a view of one."""
    inner = box[1:] if leaf.stacked else box
    layers = [leaf.how.take(found[name].get, inner) for name in leaf.tensors[box[0] if leaf.stacked else slice(None)]]
    if len(layers) == 1:
        return layers[0][None] if leaf.stacked else layers[0]
    made = np.empty((len(layers), *layers[0].shape), np.result_type(*layers))
    for r, layer in enumerate(layers):
        if layer.dtype == made.dtype:
            bits(made)[r] = bits(layer)
        else:
            made[r] = layer
    return made


def tree(values: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """Path -> value as nested dicts."""
    nested: dict[str, Any] = {}
    for path, value in values.items():
        at = nested
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = value
    return nested


def _flat(nested: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(nested, dict):
        return [(path, nested)]
    return [leaf for key in nested for leaf in _flat(nested[key], (*path, key))]
