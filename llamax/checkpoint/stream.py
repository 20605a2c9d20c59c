"""Arrays to and from Orbax's files piece by piece, so that a model need not fit into memory.

Writing: a `Lazy` leaf is made while it is written, a few chunks at a time; a chunk holds one layer of a stacked leaf,
or part of one, so that a layer can be read alone. The files are those of any other checkpoint. Reading: `Stored` gives
layers; a leaf whose chunks hold several layers is staged once in a memory-mapped file.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from llamax.checkpoint import sums
from llamax.checkpoint.hf_names import Index, Shape
from llamax.checkpoint.manager import Summed

PIECE = 8 * 2**20  # bytes of a chunk, at most where the leaf can be cut
# Bits of equal weight side by side: exponents hardly differ, so bfloat16 shrinks by a quarter, as with Orbax's zstd and
# in half of its time. Zarr 3 spares a copy, element by element, that TensorStore's Zarr 2 makes.
COMPRESSOR = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 2**18}
MAKERS = 1 + min(8, os.cpu_count() or 1)  # threads that make chunks
FILE = 128 * 2**20  # bytes of a file: their sums are taken side by side
AT_ONCE = 4 * MAKERS  # chunks that are made or on their way to the disk, which may take its time


@dataclass(frozen=True)
class Lazy:
    """A leaf of a checkpoint that is made box by box. `make` is called from several threads, and `release` once what it
    gave for a box, which may be a view of a file, is written."""

    shape: Shape
    dtype: np.dtype
    chunk: Shape
    make: Callable[[Index], np.ndarray]
    release: Callable[[Index], None] = lambda box: None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def boxes(self) -> Iterator[Index]:
        """Its chunks, in order."""
        return boxes(self.shape, self.chunk)


def boxes(shape: Shape, chunk: Shape) -> Iterator[Index]:
    """The boxes of a regular grid; those at the end may be smaller."""
    sides = [[slice(i, min(i + step, n)) for i in range(0, n, step)] for n, step in zip(shape, chunk, strict=True)]
    return itertools.product(*sides)


def chunk_of(shape: Shape, itemsize: int, *, stacked: bool, slow: int) -> Shape:
    """The chunks of a leaf: whole if it is small, else a layer of a stacked one, cut further along dimension `slow` of
    the layer where that is larger than PIECE."""
    if math.prod(shape) * itemsize <= PIECE:
        return shape
    layer = shape[1:] if stacked else shape
    cuts = -(-math.prod(layer) * itemsize // PIECE)
    step = max(1, layer[slow] // cuts)
    cut = tuple(step if dim == slow else n for dim, n in enumerate(layer))
    return (1, *cut) if stacked else cut


class LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Lazy` leaves, AT_ONCE chunks of them at a time, in order."""

    def __init__(self, advance: Callable[[int], Any], stop: threading.Event):
        """`advance` is told of bytes written; once `stop` is set, no other chunk is made."""
        super().__init__(deepcopy_host_arrays=False)
        self._advance, self._stopped = advance, stop
        self.idle = threading.Event()  # nothing is being written
        self.idle.set()

    async def _background_serialize(self, values, infos, args=None) -> None:
        self.idle.clear()
        try:
            await self._write_all(values, infos, args)
            if self._stopped.is_set():
                logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs a traceback of what follows
                raise SystemExit  # or Orbax would complete the item; of this one a thread says nothing
        finally:
            self.idle.set()

    async def _write_all(self, values, infos, args) -> None:
        stores = [await self._open(leaf, info, arg) for leaf, info, arg in zip(values, infos, args, strict=True)]
        chunks = [(leaf, store, box) for leaf, store in zip(values, stores, strict=True) for box in leaf.boxes()]
        loop, room = asyncio.get_running_loop(), asyncio.Semaphore(AT_ONCE)

        async def one(leaf: Lazy, store: ts.TensorStore, box: Index) -> None:
            async with room:
                if self._stopped.is_set():
                    raise asyncio.CancelledError
                made = await loop.run_in_executor(pool, leaf.make, box)
                await store[box].write(made, can_reference_source_data_indefinitely=True)
                leaf.release(box)
                self._advance(made.nbytes)

        with ThreadPoolExecutor(MAKERS, "convert") as pool:
            try:
                async with asyncio.TaskGroup() as tasks:
                    for chunk in chunks:
                        tasks.create_task(one(*chunk))
            except BaseExceptionGroup as several:
                raise several.exceptions[0] from None

    async def _open(self, leaf: Lazy, info: Any, arg: Any) -> ts.TensorStore:
        await info.await_path_creation()
        spec = ocp.type_handlers.get_json_tspec_write(
            info,
            use_ocdbt=info.is_ocdbt_checkpoint,
            global_shape=leaf.shape,
            local_shape=leaf.chunk,
            dtype=leaf.dtype,
            process_index=0,
            arg=arg,
        )
        spec["metadata"] = {  # Orbax may cut chunks further
            "shape": leaf.shape,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": leaf.chunk}},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "blosc", "configuration": COMPRESSOR | {"typesize": leaf.dtype.itemsize}},
            ],
        }
        return await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)


def write(
    folder: Path,
    params: Any,
    router_bias: Any,
    advance: Callable[[int], Any] = lambda n: None,
) -> None:
    """A checkpoint of step 0 in `folder`, with the sums of its files.

    Args:
      params: a tree of `Lazy`.
      router_bias: a tree of numpy arrays; without leaves it is left out, as in any checkpoint.
      advance: is told of bytes of `params` written, from other threads.
    """
    stop = threading.Event()
    writer = LazyHandler(advance, stop)
    registry = ocp.type_handlers.create_type_handler_registry(
        (Lazy, writer), (jax.Array, ocp.type_handlers.get_type_handler(jax.Array))
    )
    handlers = {
        "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_zarr3=True),
        "router_bias": ocp.StandardCheckpointHandler(),
    }
    items: dict[str, Any] = {"params": ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=FILE)}
    if jax.tree.leaves(router_bias):
        items["router_bias"] = ocp.args.StandardSave(router_bias)
    try:
        with sums.Ahead(folder) as ahead:
            summed = type("SummedAhead", (Summed,), {"ahead": ahead})
            options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, temporary_path_class=summed)
            with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager:
                manager.save(0, args=ocp.args.Composite(**items))
    finally:
        stop.set()  # after an interruption the threads must not go on: what they write comes back after its removal
        writer.idle.wait(60)


# -------------------------------------------------------------------------------------------------------- reading


class Stored:
    """One leaf of a checkpoint's item on the disk, read box by box."""

    def __init__(self, item: Path, name: str):
        """`item` is the folder FOLDER/STEP/ITEM, `name` the leaf's, such as "stack.segment0.slot0.moe.gate"."""
        metadata = json.loads((item / "_METADATA").read_text())
        spec = {
            "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
            "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}, "path": f"{name}/"},
        }
        self._store = ts.open(spec, read=True).result()
        self.shape: Shape = tuple(self._store.shape)
        self.dtype = np.dtype(self._store.dtype.numpy_dtype)
        self._chunk: Shape = tuple(self._store.chunk_layout.read_chunk.shape)

    @property
    def staged_bytes(self) -> int:
        """Bytes of the file that `by_layer` writes."""
        return 0 if self._chunk[0] == 1 else math.prod(self.shape) * self.dtype.itemsize

    def read(self, box: Index | None = None) -> np.ndarray:
        """A box of it, or all."""
        return (self._store if box is None else self._store[box]).read().result()

    def by_layer(self, scratch: Path) -> Callable[[int], np.ndarray]:
        """A function that gives layer r of a stacked leaf.

        Reading a layer takes the chunks that hold it. If they hold other layers too, the whole leaf is first copied to
        the file `scratch`, chunk by chunk, and read from its map; the file has no name any more once this returns.
        """
        if not self.staged_bytes:
            return lambda r: self._store[r].read().result()
        staged = np.memmap(scratch, self.dtype, "w+", shape=self.shape)
        scratch.unlink()
        for box in boxes(self.shape, self._chunk):
            staged[box] = self.read(box)
        return lambda r: staged[r]
