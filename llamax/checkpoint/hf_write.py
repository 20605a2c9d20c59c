"""Safetensors files, written tensor by tensor as they are made; the library's own writer wants a file in memory.

The format: the header's length in 8 bytes, the header as JSON padded to 8 bytes, the tensors one after the other. What
was written goes to the disk at once and leaves the page cache: a file that counts as written is there after a power
cut, an export of any size pushes nothing else out of memory, and memory that the system has already is used again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from llamax.checkpoint.hf_names import Shape, bits
from llamax.checkpoint.hf_read import FLOATS, INDEX, WEIGHTS
from llamax.observe.provenance import write_whole

SPELT = {dtype: spelt for spelt, dtype in FLOATS.items()}  # in a file's header
MAKERS, AHEAD = 1 + min(4, os.cpu_count() or 1), 128 * 2**20  # threads; bytes that are made ahead
PIECE, BEHIND = 32 * 2**20, 2  # bytes that go to the disk together; pieces that may be on their way


class Planned(NamedTuple):
    """A tensor of an export: `make` fills it, in any thread."""

    name: str
    shape: Shape
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def total(plan: list[Planned]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in plan)


def write(folder: Path, plan: list[Planned], most: float, advance: Callable[[int], Any]) -> None:
    """The tensors in files of at most `most` bytes, where tensors allow it, with an index if there are several;
    `advance` is told of bytes written."""
    shards = list(_grouped(plan, most))
    made = _ahead(plan)
    with contextlib.closing(made):
        for number, shard in enumerate(shards, start=1):
            _write_shard(folder / _file_name(number, len(shards)), shard, made, advance)
    if len(shards) > 1:
        _write_index(folder, shards)


def _grouped(plan: list[Planned], most: float) -> Iterator[list[Planned]]:
    shard: list[Planned] = []
    for tensor in plan:
        if shard and total(shard) + tensor.nbytes > most:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _ahead(plan: list[Planned]) -> Generator[np.ndarray]:
    """The tensors of the plan, in order; the next ones are made meanwhile: one, or as many as AHEAD bytes hold."""
    with ThreadPoolExecutor(MAKERS, "convert") as pool:
        pending: deque[tuple[Future[np.ndarray], int]] = deque()
        for tensor in plan:
            while len(pending) == MAKERS or (pending and sum(n for _, n in pending) + tensor.nbytes > AHEAD):
                yield pending.popleft()[0].result()
            pending.append((pool.submit(tensor.make), tensor.nbytes))
        while pending:
            yield pending.popleft()[0].result()


def _write_shard(path: Path, shard: list[Planned], made: Iterator[np.ndarray], advance: Callable[[int], Any]) -> None:
    with path.open("wb", buffering=0) as file, Settled(file) as settled:
        settled.write(memoryview(_header(shard)))
        for tensor in shard:
            settled.write(memoryview(bits(next(made))).cast("B"))
            advance(tensor.nbytes)


def _header(shard: list[Planned]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for tensor in shard:
        offsets = [at, at := at + tensor.nbytes]
        header[tensor.name] = dict(dtype=SPELT[tensor.dtype], shape=tensor.shape, data_offsets=offsets)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Settled:
    """Writes to the end of a file, which is on the disk when this is left without an error. A thread waits for the
    disk, PIECE by PIECE, and gives the pages back."""

    def __init__(self, file: BinaryIO):
        self._file, self._end = file, 0
        self._pool = ThreadPoolExecutor(1, "settle")
        self._pending: deque[Future[None]] = deque()

    def write(self, data: memoryview) -> None:
        """Writes bytes; an error of the disk may be that of a piece before."""
        for start in range(0, len(data), PIECE):
            rest = data[start : start + PIECE]
            while rest:  # an unbuffered file may take less at once
                n = self._file.write(rest)
                self._end += n
                rest = rest[n:]
            self._pending.append(self._pool.submit(self._settle, self._end))
            if len(self._pending) > BEHIND:
                self._pending.popleft().result()

    def _settle(self, end: int) -> None:
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):  # not on every system
            os.posix_fadvise(self._file.fileno(), 0, end, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> Settled:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        while self._pending and kind is None:
            self._pending.popleft().result()


def _file_name(number: int, of: int) -> str:
    return WEIGHTS if of == 1 else f"model-{number:05d}-of-{of:05d}.safetensors"


def _write_index(folder: Path, shards: list[list[Planned]]) -> None:
    files = {
        tensor.name: _file_name(number, len(shards)) for number, shard in enumerate(shards, start=1) for tensor in shard
    }
    index = {"metadata": {"total_size": sum(map(total, shards))}, "weight_map": dict(sorted(files.items()))}
    write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")
