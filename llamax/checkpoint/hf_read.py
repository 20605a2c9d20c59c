"""A folder in Hugging Face's format, read without loading it: headers first, then boxes of tensors, straight from maps.

`Source` opens config.json and the headers of the safetensors files and finds everything that is wrong before a value
is read. A tensor that is stored in eight bits gives bfloat16: value x scale in float32, rounded once. Scales: one for
each output channel, one for a tensor or an expert, or one for each block of 128 x 128. Experts may be one fused tensor
or one Linear each. Pages that were read are given back by `release`, so that memory stays small whatever the files'
size. No jax.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from llamax.checkpoint import hf_config
from llamax.checkpoint.hf_names import Index, Leaf, Shape, tensors, whole
from llamax.config import ConfigError
from llamax.config_dict import MOST_CHARS

logger = logging.getLogger("llamax")
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BF16, "F8_E4M3": FP8}
SCALES = ("_scale", "_scale_inv")  # after the name of the tensor that they belong to
BLOCK = 128
# Tables that follow from the configuration, and scales of activations, which an unquantised model has no use for.
IGNORED = re.compile(r".*(rotary_emb\.inv_freq|rotary_embedding\.freqs_ci|\.(input|output|k|v)_scale(_ub)?)")
EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


def read_json(path: Path) -> Any:
    """ConfigError if it is missing or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}", "there is no such file", "Give a folder in Hugging Face's format.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}", f"it cannot be read ({error})", "Download it again.") from None


class Tensor(Protocol):
    """Something that gives boxes of a tensor of `dtype`."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> np.dtype: ...

    def get(self, box: Index) -> np.ndarray: ...

    def release(self) -> None:
        """Lets go of the pages that `get` has read."""


class Shard:
    """One safetensors file, mapped. `entries`: name -> (dtype as the file spells it, shape, begin, end)."""

    def __init__(self, path: Path):
        """ConfigError if the file is cut short or is none."""
        try:
            with safe_open(path, framework="np"):  # checks the header, and that the file is as long as it says
                pass
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ConfigError(f"{path}", "there is no such file", "Download it again.") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise ConfigError(
                f"{path}", f"it is cut short or no safetensors file ({error})", "Download it again."
            ) from None
        start = 8 + int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8:start])
        header.pop("__metadata__", None)
        self.path, self.bytes = path, len(self._map)
        self.entries: dict[str, tuple[str, Shape, int, int]] = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            self.entries[name] = (entry["dtype"], tuple(entry["shape"]), start + begin, start + end)

    def bytes_at(self, start: int, n: int) -> bytes:
        """At most `n` bytes of the file, header included."""
        return self._map[start : start + n]

    def bytes_of(self, name: str) -> np.ndarray:
        """A view of the file, uint8."""
        _, _, begin, end = self.entries[name]
        return np.frombuffer(self._map, np.uint8, end - begin, begin)

    def array(self, name: str) -> np.ndarray:
        """A view of the file, of the tensor's dtype and shape."""
        dtype, shape, _, _ = self.entries[name]
        return self.bytes_of(name).view(FLOATS[dtype]).reshape(shape)

    def release(self, name: str) -> None:
        """Lets go of the pages that were read of a tensor; reading them again is harmless."""
        _, _, begin, end = self.entries[name]
        first = begin - begin % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first, end - first)


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file."""

    shard: Shard
    name: str

    @property
    def shape(self) -> Shape:
        return self.shard.entries[self.name][1]

    @property
    def spelt(self) -> str:
        """Its dtype as the file spells it."""
        return self.shard.entries[self.name][0]

    @property
    def dtype(self) -> np.dtype:
        return FLOATS[self.spelt]

    def get(self, box: Index) -> np.ndarray:
        return self.shard.array(self.name)[box]

    def release(self) -> None:
        self.shard.release(self.name)

    def same_as(self, other: Stored) -> bool:
        """Whether the bytes are the same."""
        if (self.spelt, self.shape) != (other.spelt, other.shape):
            return False
        return np.array_equal(*(tensor.shard.bytes_of(tensor.name) for tensor in (self, other)))


@dataclass(frozen=True)
class Scaled:
    """A tensor of eight bits times its scale, whose dimension d counts blocks of `blocks[d]` of the tensor's."""

    stored: Stored
    scale: np.ndarray  # float32
    blocks: Shape
    dtype: np.dtype = BF16

    @property
    def shape(self) -> Shape:
        return self.stored.shape

    def get(self, box: Index) -> np.ndarray:
        at = [np.arange(s.start // block, -(-s.stop // block)) for s, block in zip(box, self.blocks, strict=True)]
        scale = self.scale[np.ix_(*at)]
        for dim, (s, block) in enumerate(zip(box, self.blocks, strict=True)):
            if scale.shape[dim] > 1 and block > 1:
                inside = np.arange(s.start, s.stop) // block - s.start // block
                scale = np.take(scale, inside, axis=dim)
        return (self.stored.get(box).astype(np.float32) * scale).astype(BF16)

    def release(self) -> None:
        self.stored.release()


@dataclass(frozen=True)
class PerExpert:
    """Linears of every expert, [out, in] each, as one tensor [E, in, parts x out]; a box lies within one part."""

    parts: tuple[tuple[Tensor, ...], ...]  # [E][part]

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0][0].dtype

    @property
    def shape(self) -> Shape:
        out, into = self.parts[0][0].shape
        return (len(self.parts), into, len(self.parts[0]) * out)

    def get(self, box: Index) -> np.ndarray:
        experts, inputs, outputs = box
        wide = self.parts[0][0].shape[0]
        part = outputs.start // wide
        assert outputs.stop <= (part + 1) * wide, "a box crosses parts"
        rows = slice(outputs.start - part * wide, outputs.stop - part * wide)
        return np.stack([expert[part].get((rows, inputs)).T for expert in self.parts[experts]])

    def release(self) -> None:
        for expert in self.parts:
            for part in expert:
                part.release()


class Problem(NamedTuple):
    what: str  # missing | extra | a shape or dtype that is wrong
    name: str


def read_preprocessor(folder: Path) -> dict[str, Any] | None:
    """How pictures are tiled: preprocessor_config.json, or where later versions of transformers keep the same."""
    if (folder / "preprocessor_config.json").exists():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").exists():
        found = read_json(folder / "processor_config.json").get("image_processor")
        return found if isinstance(found, dict) else None
    return None


class Source:
    """A Hugging Face folder. Nothing is kept in memory but headers."""

    def __init__(self, folder: str | Path, weights: str = WEIGHTS):
        """`weights` is the file that is read where there is no index.

        Raises:
          ConfigError: no config.json, another architecture, files that are missing or cut short.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConfigError(f"{self.folder}", "there is no such folder", "Give one in Hugging Face's format.")
        self.config = read_json(self.folder / CONFIG)
        pictures = read_preprocessor(self.folder)
        self.model, self.form, self.patch_id = hf_config.describe(self.config, str(self.folder / CONFIG), pictures)
        self.shards, indexed = self._open(weights)
        self.stored = {name: Stored(shard, name) for shard in self.shards for name in shard.entries}
        self._lost = [Problem("missing from its file", name) for name in indexed - self.stored.keys()]

    def _open(self, weights: str) -> tuple[list[Shard], set[str]]:
        """(files, the tensors that the index names)."""
        index = self.folder / INDEX
        if index.exists():
            found = read_json(index)
            names = found.get("weight_map") if isinstance(found, dict) else None
            if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
                raise ConfigError(f"{index}", "it has no weight_map of files", "Download it again.")
            files = sorted(set(names.values()))
            missing = [file for file in files if not (self.folder / file).is_file()]
            if missing:
                true = f"it names files that are not there: {', '.join(missing)}"
                raise ConfigError(f"{index}", true, "Download them again.")
            return [Shard(self.folder / file) for file in files], set(names)
        if not (self.folder / weights).is_file():
            true = f"it holds neither {weights} nor {INDEX}"
            raise ConfigError(f"{self.folder}", true, "Give a folder with safetensors files; others are not read.")
        return [Shard(self.folder / weights)], set()

    def check(self, table: list[Leaf]) -> dict[str, Tensor]:
        """Their tensors by name, for every leaf of the table.

        Raises:
          ConfigError: tensors are missing, unknown, of another shape or of a dtype that is no weight's; all are named.
        """
        problems, used = list(self._lost), set()
        lost = {problem.name for problem in problems}
        found: dict[str, Tensor] = {}
        for name, shape in tensors(table).items():
            if name in lost:
                continue
            tensor, needed, wrong = self._find(name, shape)
            used |= needed
            problems += wrong
            if tensor is not None:
                found[name] = tensor
        extra = [n for n in self.stored if n not in used and not IGNORED.fullmatch(n) and not self._is_tied_copy(n)]
        problems += [Problem("not of such a model", name) for name in extra]
        if problems:
            lines = summary(problems)
            if len("; ".join(lines)) > MOST_CHARS:
                for line in lines:
                    logger.error(line)
            change = "Check that config.json belongs to these files, and download what is missing."
            raise ConfigError(f"The tensors in {self.folder}", "; ".join(lines), change)
        return found

    def _is_tied_copy(self, name: str) -> bool:
        """Whether it is a head that repeats the embedding, of a model that ties the two."""
        if not (self.model.tied_embeddings and name.endswith("lm_head.weight")):
            return False
        embed = self.stored.get(name.replace("lm_head", "model.embed_tokens"))
        head = self.stored[name]
        return embed is not None and embed.same_as(head)

    # ------------------------------------------------------------------------------------------------- one tensor

    def _find(self, name: str, shape: Shape) -> tuple[Tensor | None, set[str], list[Problem]]:
        """(the tensor, what it uses of the files, what is wrong)."""
        if name in self.stored:
            return self._plain(name, shape)
        experts = EXPERTS.fullmatch(name)
        if experts and any(other.startswith(f"{experts[1]}.0.") for other in self.stored):
            return self._per_expert(experts[1], experts[2], shape)
        return None, set(), [Problem("missing", name)]

    def _plain(self, name: str, shape: Shape) -> tuple[Tensor | None, set[str], list[Problem]]:
        stored = self.stored[name]
        if stored.shape != shape:
            return None, {name}, [Problem(f"has shape {list(stored.shape)} and not {list(shape)}", name)]
        if stored.spelt not in FLOATS:
            return None, {name}, [Problem(f"is {stored.spelt} and not one of {', '.join(FLOATS)}", name)]
        if stored.dtype != FP8:
            return stored, {name}, []
        scale_name = next((name + end for end in SCALES if name + end in self.stored), None)
        if scale_name is None:
            return None, {name}, [Problem("missing, the scale of an F8_E4M3 tensor", f"{name}_scale")]
        scale = self.stored[scale_name]
        if scale.spelt not in FLOATS or scale.dtype == FP8:
            return None, {name, scale_name}, [Problem(f"is {scale.spelt} and no scale", scale_name)]
        fitted = scale_shape(scale.shape, shape)
        if fitted is None:
            return (
                None,
                {name, scale_name},
                [Problem(f"has shape {list(scale.shape)}, no scale of {list(shape)}", scale_name)],
            )
        values = scale.get(whole(scale.shape)).astype(np.float32).reshape(fitted)
        blocks = tuple(1 if s == n else n if s == 1 else BLOCK for s, n in zip(fitted, shape, strict=True))
        return Scaled(stored, values, blocks), {name, scale_name}, []

    def _per_expert(self, at: str, part: str, shape: Shape) -> tuple[Tensor | None, set[str], list[Problem]]:
        linears = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
        each = (shape[2] // len(linears), shape[1])
        found: list[tuple[Tensor, ...]] = []
        used: set[str] = set()
        wrong: list[Problem] = []
        for expert in range(shape[0]):
            row = []
            for linear in linears:
                tensor, needed, problems = self._find(f"{at}.{expert}.{linear}.weight", each)
                row += [] if tensor is None else [tensor]
                used |= needed
                wrong += problems
            found.append(tuple(row))
        if wrong:
            return None, used, wrong
        whole_one = PerExpert(tuple(found))
        if len({tensor.dtype for row in found for tensor in row}) > 1:
            wrong = [Problem("has experts of several dtypes", f"{at}.*.{part}")]
        return whole_one, used, wrong


def scale_shape(scale: Shape, weight: Shape) -> Shape | None:
    """The scale's shape with a dimension for each of the weight's; None if it is none of the known kinds."""
    n = math.prod(scale)
    if n == 1:
        return (1,) * len(weight)
    if len(weight) == 3:  # fused experts, input-major: outputs are the last dimension
        experts, _, out = weight
        return {experts * out: (experts, 1, out), experts: (experts, 1, 1)}.get(n)
    if len(weight) != 2:
        return None
    if n == weight[0] and scale[0] == n:
        return (n, 1)
    blocks = tuple(-(-size // BLOCK) for size in weight)
    return blocks if scale == blocks else None


def summary(problems: Iterable[Problem]) -> list[str]:
    """One line for each kind of problem and tensor; those that differ by their layer only are put together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        layer = re.search(r"\.layers\.(\d+)\.", problem.name)
        like = problem.name.replace(layer[0], ".layers.{}.", 1) if layer else problem.name
        groups.setdefault((problem.what, like), []).append(layer[1] if layer else "")
    lines = []
    for (what, like), layers in sorted(groups.items()):
        numbers = ranges(sorted({int(n) for n in layers if n}))
        name = like.replace("{}", numbers if numbers.isdecimal() else f"{{{numbers}}}")
        lines.append(f"{name} {what}")
    return lines


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], n]
        else:
            parts.append([n])
    return ",".join("-".join(map(str, part)) for part in parts)
