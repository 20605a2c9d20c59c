"""What a reference model gives the answers of comparisons: computed once, kept on disk, read by every epoch.

    data.ref_logp/NAME-HASH/        of one manifest, as rows of the run's settings take it
        key.json                    what the numbers follow from: data, tokenizer, rows, weights, code
        00000.arrayrecord, ...      SHARD documents each (llamax/data/referenced.py)

A file takes its name when it is whole, so whatever ends the work in the middle, the same command goes on with the next
one. A folder whose key is another one is refused, with what has changed. The numbers come from the one scoring function
(model/score.py), in packed rows: like the policy's own, they depend on neither packing nor mesh but by rounding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.progress import track

from llamax import config
from llamax.batch import Batch
from llamax.config import ConfigError
from llamax.config_dict import flat
from llamax.data import pipeline, referenced
from llamax.data.referenced import digest
from llamax.data.sources import Manifest, open_source, read_manifest
from llamax.data.tasks.tokens import Tokens
from llamax.model.score import score
from llamax.model.skeleton import Skeleton
from llamax.observe import log, provenance
from llamax.parallel import place, processes

logger = logging.getLogger("llamax")

SHARD = 4096  # documents of a file
KEY = "key.json"
CODE = (  # of llamax: what the numbers follow from
    *("batch.py", "loading.py", "stripes.py", "checkpoint/hf_names.py", "checkpoint/hf_read.py"),
    *("data", "kernels", "model", "parallel"),
)


class Task(NamedTuple):
    """A manifest whose numbers are not all there."""

    manifest: Manifest
    folder: Path
    documents: int
    key: dict[str, str]
    shards: list[int]


class Scorer(NamedTuple):
    """How the reference is computed, as the run's own evaluations are."""

    skeleton: Skeleton
    put: Callable[[Batch], Batch]  # a host batch onto the mesh
    row_order: Callable[[np.ndarray], np.ndarray]  # of what comes back


def left(run: config.Run, weights: Any) -> list[Task]:
    """What is to be computed yet, of the run's sources and of evaluations that compare. `weights`: whose the reference
    is, as JSON takes it. ConfigError if a folder's numbers follow from something else. Nothing is written."""
    paths = [source.path for _, source in sorted(run.data.sources.items())]
    paths += [cfg.path for cfg in run.evals.values() if cfg.kind == "preference"]
    found = []
    for path in dict.fromkeys(paths):
        manifest = read_manifest(path)
        folder = referenced.folder_of(manifest.path, run.data, run.model.vision)
        key = key_of(run, manifest, weights)
        check(folder, key)
        n = len(open_source(manifest, Tokens(run.data.tokenizer, run.model.vision)))
        shards = [number for number in range(-(-n // SHARD)) if not (folder / _name(number)).is_file()]
        found += [Task(manifest, folder, n, key, shards)] if shards else []
    return found


def key_of(run: config.Run, manifest: Manifest, weights: Any) -> dict[str, str]:
    """What a manifest's numbers follow from, by name."""
    files = {file.name: _sha256(file) for file in manifest.files}  # a line that is corrected may be as long as it was
    return {
        "data": digest([manifest.format, manifest.kind, files, list(manifest.learnt)]),
        "tokenizer": hashlib.sha256(Path(run.data.tokenizer).read_bytes()).hexdigest(),
        "rows": digest(referenced.reading(run.data, run.model.vision)),
        "model": digest(flat(config.to_dict(run.model))),
        "dtype": run.train.compute_dtype,
        "weights": digest(weights),
        "code": code(),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code() -> str:
    """A hash of the sources that tokens and their log-probabilities follow from, template included."""
    package = Path(config.__file__).parent
    paths = sorted(file for name in CODE for file in [package / name, *(package / name).rglob("*")])
    kept = [path for path in paths if path.suffix in (".py", ".jinja")]
    return digest({str(path.relative_to(package)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept})


def check(folder: Path, key: dict[str, str]) -> None:
    """ConfigError if the folder's numbers follow from something else."""
    try:
        there = json.loads((folder / KEY).read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        there = {}
    changed = [name for name in {**key, **there} if there.get(name) != key.get(name)]
    if changed:
        true = f"it was computed from other {', '.join(changed)}"
        change = "Delete it, and the same command computes it again; or name another folder, --config.data.ref_logp."
        raise ConfigError(f"What the reference gave, in {folder}", true, change)


def fill(run: config.Run, tasks: Sequence[Task], scorer: Scorer, weights: Any, check_stop: Callable[[], None]) -> None:
    """Computes what is left. `weights`: (params, router_bias) of the reference. All processes call it; `check_stop`
    raises if the run is to stop, and what is written by then stays."""
    work = [(task, number) for task in tasks for number in task.shards]
    logger.info("computing what the reference gives: %d files in %s", len(work), run.data.ref_logp)
    for task, number in track(work, "reference", console=log.CONSOLE, disable=not processes.is_first()):
        numbers = range(number * SHARD, min(task.documents, (number + 1) * SHARD))
        found: dict[int, np.ndarray] = {}
        for some in _of_documents(run, task, numbers, scorer, weights):
            check_stop()
            found |= some
        if processes.is_first():
            task.folder.mkdir(parents=True, exist_ok=True)
            provenance.write_whole(task.folder / KEY, json.dumps(task.key, indent=1) + "\n")
            _write(task.folder / _name(number), [found.get(i, np.zeros(0, np.float32)) for i in numbers])
    processes.from_first(lambda: None)  # nobody reads before the files are there


def _of_documents(
    run: config.Run, task: Task, numbers: range, scorer: Scorer, weights: Any
) -> Iterator[dict[int, np.ndarray]]:
    """Of a batch after the other, by its number: the log-probabilities of a document's judged tokens."""
    data = dataclasses.replace(run.data, ref_logp="")
    for batch in pipeline.numbered(task.manifest.path, data, run.model.vision, numbers):
        assert batch.sides is not None
        found: dict[int, np.ndarray] = {}
        if batch.sides.any():
            plain = batch._replace(source_ids=np.zeros_like(batch.source_ids))
            logp_BT = scorer.row_order(place.fetch(logps(scorer.skeleton, *weights, scorer.put(plain))))
            for row, (of_row, sides) in enumerate(zip(batch.source_ids, batch.sides, strict=True)):
                for number in np.unique(of_row[sides != 0]):
                    found[int(number)] = logp_BT[row, (sides != 0) & (of_row == number)].astype(np.float32)
        yield found


@partial(jax.jit, static_argnums=0)
def logps(skeleton: Skeleton, params, router_bias, batch: Batch) -> jax.Array:
    return score(skeleton.bind(params, router_bias), batch).logp


def _write(path: Path, arrays: Sequence[np.ndarray]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several runs may fill one folder
    writer = ArrayRecordWriter(str(beside), "group_size:1")
    for array in arrays:
        writer.write(array.tobytes())
    writer.close()
    beside.rename(path)


def _name(number: int) -> str:
    return f"{number:05d}.arrayrecord"
