"""A model in a folder, of whichever kind; and what the adapters of a run stand beside.

A run that trains adapters saves what it trains. The rest is where it began: run.json says where, of which step, and
with which sum (`fingerprint`), so that other weights in that place are noticed.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llamax.checkpoint import saved, sums
from llamax.checkpoint.hf_read import CONFIG, Shard, Source
from llamax.checkpoint.manager import Checkpoints
from llamax.checkpoint.saved import Saved
from llamax.config import ConfigError
from llamax.parallel import processes

SAMPLES, SAMPLE = 64, 2**12  # of a large file: places, evenly spread, and bytes at each


class Found(NamedTuple):
    """What a folder says of the model in it, and of one of ours the step whose weights are meant: a sound one."""

    said: Saved | Source
    step: int | None


def find(folder: str | Path, step: int | None = None) -> Found:
    """The model in `folder`; `step` of a run: None takes the newest sound checkpoint. All processes call it.

    Raises:
      ConfigError: no model is there, or no such step; its files are damaged.
    """
    said = processes.together(partial(_look, folder, step))
    if not isinstance(said, Saved):
        return Found(said, None)
    with Checkpoints(said.checkpoints) as checkpoints:
        step = checkpoints.sound(step)
    return Found(processes.together(partial(_look, folder, step)), step)


def _look(folder: str | Path, step: int | None) -> Saved | Source:
    folder = Path(folder)
    ours = saved.find(folder, step)
    if ours is not None:
        return ours
    if not (folder / CONFIG).exists():
        true = f"it holds neither a run.json, nor a {saved.MODEL}, nor a {CONFIG}"
        change = "Give the --workdir of a run, a converted model, or a folder in Hugging Face's format."
        raise ConfigError(f"A model in {folder}", true, change)
    return Source(folder)


# ------------------------------------------------------------------------------------------------ beneath the adapters


def about(found: Found) -> dict[str, Any]:
    """For run.json: whose weights a run begins with."""
    said = found.said
    return {"path": str(said.folder.absolute()), "step": found.step, "sum": fingerprint(found)}


def base_of(said: Saved) -> Found:
    """The model that the adapters of a run stand beside: the weights with which it began, and no others.

    Raises:
      ConfigError: they are not there any more, or have changed.
    """
    began = said.began or {}
    asked = f"The adapters in {said.folder}, which stand beside the weights in {began.get('path')}"
    change = f"Bring them back; or, if they have moved, name their folder in {said.folder / 'run.json'} (init.path)."
    try:
        found = find(began["path"], began["step"])
        same = processes.together(partial(fingerprint, found)) == began["sum"]
    except KeyError as error:
        raise ConfigError(asked, f"its run.json does not say where they began ({error})", change) from error
    except ConfigError as error:
        raise ConfigError(asked, f"these cannot be read: {error.asked}: {error.true}", change) from error
    if not same:
        raise ConfigError(asked, "these are not the weights with which it began", change)
    return found


def fingerprint(found: Found) -> str:
    """Tells weights from others: of a checkpoint the sum of its files' sums, and that of what its adapters stand
    beside; of tensors their names, shapes and places, and samples of them."""
    said = found.said
    if isinstance(said, Source):
        digest = hashlib.sha256(json.dumps(said.config, sort_keys=True).encode())
        for shard in said.shards:
            digest.update(f"{shard.path.name} {shard.bytes} {sorted(shard.entries.items())}".encode())
            for piece in _samples(shard):
                digest.update(piece)
        return digest.hexdigest()
    own = sums.whole(said.checkpoints / str(found.step))
    return own if not said.tune.lora_rank else f"{own} {(said.began or {}).get('sum')}"


def _samples(shard: Shard) -> list[bytes]:
    """All of a small file, pieces of a large one, its end among them."""
    step = max(SAMPLE, shard.bytes // SAMPLES)
    starts = [*range(0, shard.bytes, step), max(0, shard.bytes - SAMPLE)]
    return [shard.bytes_at(start, SAMPLE) for start in starts]
