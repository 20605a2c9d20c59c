"""The folders that hold a model of ours, told apart and described: a training run's workdir, and a converted model.

A converted model, what `llamax convert from-hf` writes:

    FOLDER/model.json             {"model": config.Model, "patch_id", "tokenizer", "source", "dtypes", "versions"}
    FOLDER/checkpoints/0/...      the items `params` and `router_bias` of a checkpoint, and the sums of its files
    FOLDER/hf/...                 the source's own small files, its tokenizer too: an export gives them back as they are
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from llamax import config, stages
from llamax.config import ConfigError
from llamax.data.tokenizer import Tokenizer
from llamax.observe import provenance

MODEL, CHECKPOINTS, HF = "model.json", "checkpoints", "hf"


class Saved(NamedTuple):
    """What a folder says of the model in it."""

    folder: Path
    model: config.Model
    patch_id: int  # the token that a picture's features replace; -1 without pictures
    tokenizer: Path | None
    hf: Path | None  # the files that the model came with
    dtypes: dict[str, str]  # of those tensors of the source whose dtype is not that of their stacked leaf
    seq_len: int | None  # tokens of a row in training
    tune: config.Tune = config.Tune()  # what it trains: with adapters, a checkpoint holds that alone,
    began: dict[str, Any] | None = None  # and this says where the rest is (found.about)
    compare_marks: bool = True  # whether answers that it compares end behind their marks

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS


def find(folder: str | Path, step: int | None = None) -> Saved | None:
    """The model of ours in `folder`; None if it holds neither run.json nor model.json.

    `step`: of a run in stages, whose settings change; None takes its newest checkpoint.

    Raises:
      ConfigError: what is there cannot be read.
    """
    folder = Path(folder)
    run = provenance.read(folder)
    if run is not None:
        return _of_run(folder, config.from_dict(config.Run, run["config"]), step, run.get("init"))
    if not (folder / MODEL).exists():
        return None
    try:
        said = json.loads((folder / MODEL).read_text())
        model, patch_id, name = said["model"], int(said["patch_id"]), said["tokenizer"]
        dtypes = dict(said["dtypes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        true = f"it cannot be read ({type(error).__name__}: {error})"
        raise ConfigError(f"{folder / MODEL}", true, "Convert the model again.") from error
    tokenizer = folder / name if name else None
    hf = folder / HF if (folder / HF).is_dir() else None
    return Saved(folder, config.from_dict(config.Model, model), patch_id, tokenizer, hf, dtypes, None)


def _of_run(folder: Path, run: config.Run, step: int | None, began: dict[str, Any] | None) -> Saved:
    if run.stages:
        run = stages.at(run, provenance.latest_step(folder) if step is None else step).run
    tokenizer = config.resolve_path(run.data.tokenizer)
    patch_id = Tokenizer(tokenizer).patch if run.model.vision is not None else -1
    of_rows = dict(seq_len=run.data.seq_len, compare_marks=run.data.compare_marks)
    return Saved(folder, run.model, patch_id, tokenizer, None, {}, tune=run.tune, began=began, **of_rows)


def record(
    folder: Path,
    model: config.Model,
    *,
    patch_id: int,
    tokenizer: str | None,
    dtypes: dict[str, str],
    source: dict[str, Any],
) -> None:
    """Writes model.json; the arguments are those of `Saved`."""
    said = {
        "model": config.to_dict(model),
        "patch_id": patch_id,
        "tokenizer": tokenizer,
        "source": source,
        "dtypes": dtypes,
        "versions": provenance.versions(),
    }
    provenance.write_whole(folder / MODEL, json.dumps(said, indent=2) + "\n")
