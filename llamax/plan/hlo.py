"""What a compiled program does, read from its text (HLO): the FLOPs of its matmuls, the bytes of its collectives.

XLA's own cost analysis counts the body of a loop once and knows nothing of fused kernels. Here a loop counts as often
as it runs, and the kernels that our steps call (grouped matmuls, attention) by the shapes that they are given. All
figures are of one device: the program is what each of them runs.

    dot, convolution   2 x (numbers in the result) x (terms of each sum); a convolution's padding is not counted
    grouped matmul     2 M K N: every row through one expert, or into the gradient of one expert's weight
    attention kernel   2 Dh x (matmuls a tile) x (queries x keys of the tiles that a causal band touches)

Of a condition the branch with the most FLOPs counts, for the slowest device is waited for; but where the program calls
it `rarely` that with the fewest: tokens over a buffer (parallel/expert.py), of which a balanced router has none. For
the same reason grouped matmuls over such a buffer count the rows that an even share fills.

A collective's bytes are what one device sends when its group of n works in a ring: (n - 1) x its part in an all-gather,
(n - 1) / n of its operand in a reduce-scatter or all-to-all (of a ragged one, the shorter of operand and result),
twice that in an all-reduce, all of it in a permute.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"),
    "collective-broadcast",
)
BITS = {"pred": 8, "token": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2}  # others tell their width: bf16, f32, f8e4m3fn
# Matmuls of a tile, and how many of them repeat what was known before: backward computes the scores again, and the
# gradients of queries and of keys each on their own.
SPLASH = {"fwd": (2, 0), "dq": (3, 2), "dkv": (4, 1)}
TRITON = {"forward": (2, 0), "backward": (7, 3)}
# Kernels of grouped matmuls by what is in their text: of XLA for TPU, of jax's MegaBlocks, of tokamax for GPU. Of their
# operands, the first matrix is [M, K]; the last dimension of the result is N.
GROUPED = re.compile(r"^\s*(?:ROOT )?%ragged-dot|tpu_custom_call.*\btgmm\b|gpu\.triton.*RaggedDot")

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (?=[\w(])")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{\s*$")
SHAPE = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,<=]*)\]")
NAME = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"\b(calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
OP_NAME = re.compile(r'op_name="([^"]*)"')
CHAINED = re.compile(r"\bchannel_id=(\d+).*\bchain_id=")
FILLED = re.compile(r"filled_(\d+\.\d+)")  # parallel/expert.py: the share of a buffer that balanced routing fills
# How jax names what `jax.checkpoint` computes again, and the logits that kernels/cross_entropy.py does in its backward.
RECOMPUTED = re.compile(r"rematted_computation|transpose\([^\"]*nd,dc->nc")
# The backward pass of kernels/ring.py: scores, which forward had, and the gradients of what softmax gave.
HALF_RECOMPUTED = re.compile(r"transpose\([^\"]*bkgtd,bksd->bkgts")


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        width = re.search(r"\d+", self.dtype)
        return self.size * BITS.get(self.dtype, int(width[0]) if width else 8) // 8


class Instruction(NamedTuple):
    name: str
    shapes: list[Shape]  # of the result; several for a tuple
    op: str
    operands: list[str]
    text: str  # all of it, attributes included


class Computation(NamedTuple):
    name: str
    instructions: dict[str, Instruction]

    def shapes(self, instruction: Instruction) -> list[Shape]:
        """Of all operands, tuples taken apart."""
        return [shape for name in instruction.operands for shape in self.instructions[name].shapes]


class Exchange(NamedTuple):
    """Collectives of one kind among the same groups of devices."""

    kind: str
    groups: tuple[tuple[int, ...], ...]  # places in the mesh, flat; pairs (from, to) of a permute


@dataclass
class Cost:
    """Of one run of a program, on one device."""

    flops: float = 0.0
    recomputed: float = 0.0  # of these, what was computed before: by rematerialisation, or in attention's backward
    sent: dict[Exchange, float] = field(default_factory=partial(defaultdict, float))  # bytes
    calls: Counter[Exchange] = field(default_factory=Counter)
    by_name: dict[str, float] = field(default_factory=partial(defaultdict, float))  # flops, by jax's names
    endless: set[str] = field(default_factory=set)  # loops whose length the text does not tell; counted once

    @property
    def sent_bytes(self) -> float:
        return sum(self.sent.values())

    def add(self, other: Cost, times: int = 1) -> None:
        self.flops += times * other.flops
        self.recomputed += times * other.recomputed
        for exchange, n in other.sent.items():
            self.sent[exchange] += times * n
            self.calls[exchange] += times * other.calls[exchange]
        for name, n in other.by_name.items():
            self.by_name[name] += times * n
        self.endless |= other.endless


def cost(text: str) -> Cost:
    """Walks a program's text, `compiled.as_text()`."""
    computations, entry = parse(text)
    later = _later_parts(computations)
    known: dict[str, Cost] = {}

    def of(name: str) -> Cost:
        if name not in known:
            known[name] = total = Cost()
            here = computations[name]
            for instruction in here.instructions.values():
                if instruction.name not in later:
                    _add(total, instruction, here)
                times = 1
                if instruction.op == "while":
                    trips = _trips(instruction, here, computations)
                    times = 1 if trips is None else trips
                    if trips is None:
                        total.endless.add(_op_name(instruction))
                parts = [of(called) for called in _called(instruction)]
                if instruction.op == "conditional":
                    choose = min if "rarely" in _op_name(instruction) else max
                    parts = [choose(parts, key=lambda part: (part.flops, part.sent_bytes))]
                for part in parts:
                    total.add(part, times)
        return known[name]

    return of(entry)


def _later_parts(computations: dict[str, Computation]) -> set[str]:
    """TPUs spread a collective over several fusions, in each of which it stands whole, on one channel: all but the
    first of each."""
    seen: set[str] = set()
    later = set()
    for here in computations.values():
        for instruction in here.instructions.values():
            chained = CHAINED.search(instruction.text)
            if chained:
                if chained[1] in seen:
                    later.add(instruction.name)
                seen.add(chained[1])
    return later


# ----------------------------------------------------------------------------------------------------------- parsing


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations by name, and the entry's name."""
    computations: dict[str, Computation] = {}
    entry, here, lines = "", None, []

    def close() -> None:
        if here is not None and lines:
            instruction = _instruction("\n".join(lines))
            here.instructions[instruction.name] = instruction
        lines.clear()

    for line in text.splitlines():
        if here is None or not line.startswith(" "):
            head = COMPUTATION.match(line)
            if head:
                close()
                here = computations[head[2]] = Computation(head[2], {})
                entry = head[2] if head[1] else entry
                continue
        if here is not None and line.startswith("}") and not line.strip("}\n "):
            close()
            here = None
        elif here is not None and INSTRUCTION.match(line):
            close()
            lines.append(line)
        elif lines:  # an attribute may hold line breaks
            lines.append(line)
    assert entry, "no ENTRY in the program's text"
    return computations, entry


def _instruction(text: str) -> Instruction:
    start = INSTRUCTION.match(text)
    assert start
    at = start.end()
    end = _closing(text, at) + 1 if text[at] == "(" else text.index(" ", at)
    shapes = shapes_of(text[at:end])
    opened = text.index("(", end)
    closed = _closing(text, opened)
    return Instruction(start[1], shapes, text[end:opened].strip(), NAME.findall(text[opened:closed]), text)


def _closing(text: str, opened: int) -> int:
    depth = 0
    for at in range(opened, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    raise AssertionError(f"a bracket never closes: {text[opened : opened + 80]}")


def shapes_of(text: str) -> list[Shape]:
    return [
        Shape(dtype, tuple(int(n.strip("<=")) for n in dims.split(",") if n)) for dtype, dims in SHAPE.findall(text)
    ]


def _called(instruction: Instruction) -> list[str]:
    if instruction.op in ("reduce", "scatter", "sort", "map", "reduce-window", *COLLECTIVES):
        return []  # an operation on two numbers
    found = [name for how, name in CALLED.findall(instruction.text) if how != "to_apply" or instruction.op == "call"]
    branches = BRANCHES.search(instruction.text)
    return found + (NAME.findall(branches[1]) if branches else [])


def _op_name(instruction: Instruction) -> str:
    found = OP_NAME.search(instruction.text)
    return found[1] if found else instruction.name


def _trips(loop: Instruction, here: Computation, computations: dict[str, Computation]) -> int | None:
    """How often a loop runs: as the compiler noted, or a counter that starts at a constant and is below another."""
    noted = re.search(r'known_trip_count"?[:=]\s*\{"n":"(\d+)"', loop.text)
    if noted:
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    assert condition
    there = computations[condition[1]].instructions
    constants = {name: int(n[1]) for name, i in there.items() if (n := re.search(r" constant\((-?\d+)\)", i.text))}
    ends = [i for i in there.values() if "ROOT " in i.text.split("=")[0]]
    if len(ends) != 1 or ends[0].op not in ("compare", "fusion"):
        return None
    counter = [there[name] for name in ends[0].operands if name in there and there[name].op == "get-tuple-element"]
    bounds = [constants[name] for name in ends[0].operands if name in constants]
    below = "direction=LT" in ends[0].text or (
        ends[0].op == "fusion"
        and any("direction=LT" in i.text for i in computations[_called(ends[0])[0]].instructions.values())
    )
    if len(counter) != 1 or len(bounds) != 1 or not below:
        return None
    index = re.search(r"index=(\d+)", counter[0].text)
    start = here.instructions.get(loop.operands[0])
    first = 0
    if index and start is not None and start.op == "tuple":
        begin = here.instructions[start.operands[int(index[1])]]
        number = re.search(r" constant\((-?\d+)\)", begin.text)
        first = int(number[1]) if number else 0
    step = _step(loop, int(index[1]), computations) if index else 1
    return max(0, -(-(bounds[0] - first) // step))


def _step(loop: Instruction, index: int, computations: dict[str, Computation]) -> int:
    """What a loop's body adds to its counter: more than 1 where the compiler has put several rounds into one."""
    body = re.search(r"body=%?([\w.\-]+)", loop.text)
    assert body
    there = computations[body[1]].instructions
    ends = [i for i in there.values() if "ROOT " in i.text.split("=")[0]]
    if not ends or ends[0].op != "tuple":
        return 1
    new = there.get(ends[0].operands[index])
    while new is not None and new.op in ("copy", "bitcast", "convert"):
        new = there.get(new.operands[0])
    if new is not None and new.op == "fusion":
        there = there | {name: i for c in _called(new) for name, i in computations[c].instructions.items()}
        new = next((there[name] for c in _called(new) for name in reversed(computations[c].instructions)), None)
    if new is None or new.op != "add":
        return 1
    numbers = [re.search(r" constant\((\d+)\)", there[name].text) for name in new.operands if name in there]
    return next((int(n[1]) for n in numbers if n and int(n[1])), 1)


# ------------------------------------------------------------------------------------------------------ instructions


def _add(total: Cost, instruction: Instruction, here: Computation) -> None:
    flops, again = _flops(instruction, here)
    if flops:
        total.flops += flops
        total.by_name[_op_name(instruction)] += flops
        again = flops / 2 if HALF_RECOMPUTED.search(instruction.text) else again
        total.recomputed += flops if RECOMPUTED.search(instruction.text) else again
    kind = instruction.op.removesuffix("-start")
    if kind in COLLECTIVES:
        if kind == "all-reduce" and "all-reduce-scatter" in here.name:
            kind = "reduce-scatter"  # as TPUs spell it: all of it is summed, a part of it is kept
        groups = _groups(instruction.text)
        n = max(map(len, groups), default=1)
        if n == 1:
            return
        operands = [shape.bytes for shape in here.shapes(instruction)]
        size = min(operands[:2]) if kind == "ragged-all-to-all" else sum(operands)
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1, "collective-broadcast": 1}
        exchange = Exchange(kind, groups)
        total.sent[exchange] += size * share.get(kind, (n - 1) / n)
        total.calls[exchange] += 1


def _flops(instruction: Instruction, here: Computation) -> tuple[float, float]:
    """All of an instruction, and those that a kernel repeats."""
    op = instruction.op
    if op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        lhs = here.shapes(instruction)[0]
        terms = math.prod(lhs.dims[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
        return 2 * instruction.shapes[0].size * terms, 0
    if op == "convolution":
        return _convolution(instruction, *here.shapes(instruction)[:2]), 0
    if op == "ragged-dot" or (op == "custom-call" and GROUPED.search(instruction.text)):
        if "ragged-dot-metadata" in instruction.name:
            return 0, 0
        matrices = [shape for shape in here.shapes(instruction) if len(shape.dims) >= 2]
        filled = FILLED.search(instruction.text)
        return 2 * matrices[0].size * instruction.shapes[0].dims[-1] * (float(filled[1]) if filled else 1), 0
    if op == "custom-call":
        return _kernel(instruction, here)
    return 0, 0


def _kernel(instruction: Instruction, here: Computation) -> tuple[float, float]:
    """The same of a fused kernel, by its name."""
    text, shapes = instruction.text, here.shapes(instruction)
    splash = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.name + _op_name(instruction))
    if splash and "tpu_custom_call" in text:
        q = next(shape for shape in shapes if len(shape.dims) >= 3 and shape.dtype in ("bf16", "f32", "f16"))
        rows, columns = next(shape.dims[-2:] for shape in shapes if shape.dtype in ("s8", "s32"))
        if splash[1] == "dkv":  # its table of tiles is keys by queries, shrunk along the first
            rows, columns = max(rows, columns), min(rows, columns)
        tokens, head_dim = q.dims[-2:]
        tiles = sum(min(i + 1, columns) for i in range(rows))
        seen = tiles * (tokens / rows) ** 2
        matmul = 2 * math.prod(q.dims[:-2]) * head_dim * seen
        return SPLASH[splash[1]][0] * matmul, SPLASH[splash[1]][1] * matmul
    triton = re.search(r"mha_(forward|backward)", text)
    if triton and "triton" in text:
        q = shapes[0]  # [B, T, H, Dh]
        batch, tokens, heads, head_dim = q.dims
        matmul = 2 * batch * heads * head_dim * tokens * tokens / 2
        return TRITON[triton[1]][0] * matmul, TRITON[triton[1]][1] * matmul
    if "$gemm" in text or "$matmul" in text or "$lt$" in text:  # of cuBLAS or oneDNN
        contracted = re.search(r'"lhs_contracting_dimensions":\["?(\d+)', text)
        lhs = shapes[0]
        return 2 * instruction.shapes[0].size * (lhs.dims[int(contracted[1])] if contracted else lhs.dims[-1]), 0
    return 0, 0


def _convolution(instruction: Instruction, lhs: Shape, rhs: Shape) -> float:
    """TPUs write matmuls as convolutions, batch dimensions as padded windows: only pairs inside the input count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    assert labels
    left, right, out = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    given = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(c for c in right if c.isdigit())

    def each(name: str, default: str) -> list[str]:
        return given[name].split("x") if name in given else [default] * len(spatial)

    pairs = 1.0
    for d, stride, pad, lhs_dilate, rhs_dilate in zip(
        *(spatial, each("stride", "1"), each("pad", "0_0")),
        *(each("lhs_dilate", "1"), each("rhs_dilate", "1")),
        strict=True,
    ):
        n_in, n_kernel = lhs.dims[left.index(d)], rhs.dims[right.index(d)]
        n_out, low = instruction.shapes[0].dims[out.index(d)], int(pad.split("_")[0])
        at = np.arange(n_out)[:, None] * int(stride) + np.arange(n_kernel) * int(rhs_dilate) - low
        pairs *= int(((at >= 0) & (at <= (n_in - 1) * int(lhs_dilate)) & (at % int(lhs_dilate) == 0)).sum())
    result = instruction.shapes[0].dims
    groups = re.search(r"batch_group_count=(\d+)", instruction.text)
    terms = rhs.dims[right.index("i")] * pairs / (int(groups[1]) if groups else 1)
    return 2 * result[out.index("b")] * result[out.index("f")] * terms


# ---------------------------------------------------------------------------------------------------- replica groups


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Who talks to whom, in any of the four ways in which it is written."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    if pairs:
        return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1]))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\)?)\))?\s*\{([^}]*)\}", text)
    if mesh:  # axes with their sizes, perhaps an order of the devices, and the axes that a group spans
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        n = math.prod(sizes.values())
        ids = _iota(mesh[2], n) if mesh[2] else np.arange(n)
        spans = [name for name in sizes if f"'{name}'" in mesh[3]]
        order = [*(i for i, a in enumerate(sizes) if a not in spans), *(i for i, a in enumerate(sizes) if a in spans)]
        groups = ids.reshape(*sizes.values()).transpose(order).reshape(-1, math.prod(sizes[a] for a in spans))
        return _tuples(groups)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]*\](?:T\([\d,]*\))?)", text)
    if iota:
        return _tuples(_iota(iota[3], int(iota[1]) * int(iota[2])).reshape(int(iota[1]), int(iota[2])))
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    return tuple(tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", listed[1])) if listed else ()


def _iota(text: str, n: int) -> np.ndarray:
    """[8,32]T(1,0): the numbers up to n, reshaped and transposed."""
    shape = re.match(r"\[([\d,]*)\](?:T\(([\d,]*)\))?", text)
    assert shape
    ids = np.arange(n).reshape([int(d) for d in shape[1].split(",")])
    return ids.transpose([int(d) for d in shape[2].split(",")]) if shape[2] else ids


def _tuples(groups: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in group) for group in groups)


def spanned(groups: tuple[tuple[int, ...], ...], shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    sizes = tuple(shape.values())
    found: set[int] = set()
    for group in groups:
        places = np.array(np.unravel_index(np.array(group), sizes))
        found |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
    return tuple(axis for i, axis in enumerate(shape) if i in found)
