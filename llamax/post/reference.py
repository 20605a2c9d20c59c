"""What a reference model gives the answers of comparisons: computed once, kept on disk, read by every epoch.

    FOLDER/NAME-HASH/               of one manifest, as rows of these settings take it
        key.json                    what the numbers follow from: data, tokenizer, template, weights, code
        00000.arrayrecord, ...      SHARD documents each (llamax/data/referenced.py)

A file takes its name when it is whole, so whatever ends the work in the middle, the same command goes on with the next
one. A folder whose key is another one is refused, with what has changed. The numbers come from the one scoring function
(model/score.py), in packed rows: like the policy's own, they depend on neither packing nor mesh but by rounding.
"""

from __future__ import annotations

import hashlib
import json
import logging
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
from llamax.data import referenced
from llamax.data.encoded import row_of
from llamax.data.pipeline import HeldOut
from llamax.data.sources import read_manifest
from llamax.model.score import score
from llamax.model.skeleton import Skeleton
from llamax.observe import log, provenance
from llamax.parallel import place, processes

logger = logging.getLogger("llamax")

SHARD = 4096  # documents of a file
KEY = "key.json"
CODE = ("batch.py", "stripes.py", "data", "kernels", "model")  # of llamax: what the numbers follow from


class Scorer(NamedTuple):
    """How the reference is computed, as the run's own evaluations are."""

    skeleton: Skeleton
    put: Callable[[Batch], Batch]  # a host batch onto the mesh
    row_order: Callable[[np.ndarray], np.ndarray]  # of what comes back


def manifests(run: config.Run) -> list[str]:
    """Those whose answers are compared: the sources' and the evaluations'."""
    if not run.data.comparisons_per_row:
        return []
    asked = [source.path for _, source in sorted(run.data.sources.items())]
    return list(dict.fromkeys([*asked, *(cfg.path for cfg in run.evals.values() if cfg.kind == "preference")]))


def folder_of(run: config.Run, root: Path, path: str) -> Path:
    """Where a manifest's numbers lie; rows that take documents in another way have another folder."""
    return root / f"{Path(path).stem}-{_digest([str(Path(path).absolute()), reading(run)])[:8]}"


def reading(run: config.Run) -> dict[str, Any]:
    """The settings that decide which tokens a document becomes."""
    rows = {str(vision is None): row_of(run.data, vision)._asdict() for vision in (None, run.model.vision)}
    vision = run.model.vision and config.to_dict(run.model.vision)
    return dict(rows=rows, vision=vision, video_frames=run.data.video_frames, template=1)


def key_of(run: config.Run, path: str, weights: dict[str, Any]) -> dict[str, str]:
    """What a manifest's numbers follow from, by name, as hashes."""
    manifest = read_manifest(path)
    sizes = {file.name: file.stat().st_size for file in manifest.files}
    return {
        "data": _digest([manifest.format, manifest.sha256 or sizes, list(manifest.learnt)]),
        "tokenizer": hashlib.sha256(Path(config.resolve_path(run.data.tokenizer)).read_bytes()).hexdigest(),
        "rows": _digest(reading(run)),
        "model": _digest(flat(config.to_dict(run.model))),
        "dtype": run.train.compute_dtype,
        "weights": _digest(weights),
        "code": code(),
    }


def code() -> str:
    """A hash of the sources that tokens and their log-probabilities follow from, template included."""
    package = Path(config.__file__).parent
    paths = sorted(file for name in CODE for file in [package / name, *(package / name).rglob("*")] if file.is_file())
    kept = [path for path in paths if path.suffix in (".py", ".jinja")]
    return _digest({str(path.relative_to(package)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept})


def check(folder: Path, key: dict[str, str]) -> None:
    """ConfigError if the folder's numbers follow from something else."""
    try:
        there = json.loads((folder / KEY).read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        there = {}
        logger.warning("%s cannot be read: %s", folder / KEY, error)
    changed = [name for name in {**key, **there} if there.get(name) != key.get(name)]
    if changed:
        true = f"it was computed from other {', '.join(changed)}"
        change = "Delete it, and the same command computes it again; or name another --config.reference.cache."
        raise ConfigError(f"The reference's log-probabilities in {folder}", true, change)


def missing(folder: Path, documents: int) -> list[int]:
    """The numbers of the files that are not there yet."""
    n = -(-documents // SHARD)
    return [number for number in range(n) if not (folder / _name(number)).is_file()]


def fill(run: config.Run, path: str, folder: Path, key: dict[str, str], scorer: Scorer, weights: Any) -> None:
    """Computes the files that are missing. `weights`: (params, router_bias) of the reference. All processes call it."""
    held_out = HeldOut(path, run.data, run.model.vision, numbered=True)
    n = held_out.documents
    numbers = processes.from_first(partial(missing, folder, n))
    if numbers and processes.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        provenance.write_whole(folder / KEY, json.dumps(key, indent=1) + "\n")
    shown = track(numbers, f"reference of {Path(path).stem}", console=log.CONSOLE, disable=not processes.is_first())
    for number in shown:
        held_out.only = range(number * SHARD, min(n, (number + 1) * SHARD))
        found = dict(_of_documents(held_out, scorer, weights))
        if processes.is_first():
            _write(folder / _name(number), [found.get(i, np.zeros(0, np.float32)) for i in held_out.only])


def _of_documents(held_out: HeldOut, scorer: Scorer, weights: Any) -> Iterator[tuple[int, np.ndarray]]:
    """(number, log-probabilities of its judged tokens) of every document that can be used."""
    for batch in held_out:
        logp_BT = scorer.row_order(place.fetch(logps(scorer.skeleton, *weights, scorer.put(batch))))
        for row, (numbers, sides) in enumerate(zip(batch.source_ids, batch.sides, strict=True)):
            judged = sides != 0
            for number in np.unique(numbers[judged]):
                yield int(number), logp_BT[row, judged & (numbers == number)].astype(np.float32)


@partial(jax.jit, static_argnums=0)
def logps(skeleton: Skeleton, params, router_bias, batch: Batch) -> jax.Array:
    return score(skeleton.bind(params, router_bias), batch._replace(source_ids=batch.source_ids * 0)).logp


def _write(path: Path, arrays: Sequence[np.ndarray]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    beside = path.with_suffix(".tmp")
    writer = ArrayRecordWriter(str(beside), "group_size:1")
    for array in arrays:
        writer.write(array.tobytes())
    writer.close()
    beside.rename(path)


def _name(number: int) -> str:
    return f"{number:05d}.arrayrecord"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


__all__ = ["Scorer", "check", "fill", "folder_of", "key_of", "manifests", "missing", "referenced"]
