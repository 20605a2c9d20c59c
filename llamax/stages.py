"""A run in stages: parts with settings of their own, one after the other, each with the weights of the one before.

A stage is written as what differs from the run (`config.Stage`); here each becomes a whole `config.Run`, so that
little else knows of stages. Steps go on counting; the schedule of the learning rate begins anew, and so do the data,
whose rows have another length now, in an order of the stage's own. A stage of S tokens takes
ceil(S / data.batch_tokens) steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from llamax.config import Run, Stage
from llamax.config_dict import ConfigError, flat, from_dict, merged, nearest, to_dict

MAY_DIFFER = (  # of a stage; all else belongs to the run: shapes, what a step counts, tokenizer, seed
    *("model.rope.*", "model.chunk_len", "model.attn_temperature*"),
    *("data.seq_len", "data.sources.*", "data.multimodal_steps", "data.tiles_per_row", "data.video_frames"),
    *("data.window_docs", "data.lanes", "data.align_tokens", "data.workers", "data.prefetch_batches"),
    "mesh.*",
    *("optim.peak_lr", "optim.schedule", "optim.warmup_steps", "optim.decay_steps", "optim.end_lr_ratio"),
    *("optim.vision_lr_ratio", "optim.b1", "optim.b2", "optim.eps", "optim.weight_decay", "optim.clip_norm"),
    *("train.accumulate", "train.remat", "train.pipeline_microbatches"),
    *("train.expert_buffer", "train.expert_capacity"),
)
SECTIONS = tuple(f.name for f in dataclasses.fields(Stage) if f.name != "tokens")


class Part(NamedTuple):
    """The steps after `first`, up to `run.train.steps`, of a run: all of them, or a stage's."""

    name: str  # of the stage; "" of a run without any
    first: int
    run: Run

    @property
    def end(self) -> int:
        return self.run.train.steps

    @property
    def data_seed(self) -> int:
        """Of the order of documents: the run's seed, of 32 bits, and above it the steps before this part, so that a
        source that several parts read is dealt anew in each. Of the first part it is the run's own."""
        return self.run.seed + (self.first << 32)


def parts(run: Run) -> list[Part]:
    """The parts of a run, in order; the run itself where it has no stages.

    Raises:
        ConfigError: a stage changes what it may not, or something that the schema does not have; or its `tokens` are no
            number of steps.
    """
    if not run.stages:
        return [Part("", 0, run)]
    found: list[Part] = []
    for name in sorted(run.stages, key=in_order):
        first = found[-1].end if found else 0
        found.append(Part(name, first, _resolved(run, name, first)))
    return found


def in_order(name: str) -> list[Any]:
    """What names are sorted by: to_32k comes before to_256k."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name) if piece]


def at(run: Run, step: int) -> Part:
    """The part that a checkpoint of this step was written in: that of the last step taken."""
    found = parts(run)
    return next((part for part in found if step <= part.end), found[-1])


def named(run: Run, name: str | None = None) -> Run:
    """A stage as a run by itself, to plan it: the last one, whose rows are longest, unless it is named.

    Raises:
        ConfigError: the run has no such stage.
    """
    found = {part.name: part.run for part in parts(run)}
    if not run.stages and name is None:
        return run
    wanted = list(found)[-1] if name is None else name
    if wanted not in found or not wanted:
        true = f"its stages are {', '.join(found)}" if run.stages else "it has none"
        close = nearest(wanted, found)
        raise ConfigError(f"stage {wanted} of {run.name}", true, f"Name {close}." if close else "Leave it out.")
    return dataclasses.replace(found[wanted], name=f"{run.name}, stage {wanted}")


def _resolved(run: Run, name: str, first: int) -> Run:
    stage, asked = run.stages[name], f"--config.stages.{name}"
    if stage.tokens < 1:
        change = f"Set {asked}.tokens to a number of tokens."
        raise ConfigError(f"{asked}.tokens={stage.tokens}", "a stage trains on some", change)
    changes = {section: getattr(stage, section) for section in SECTIONS}
    for key in flat(changes):
        if not may_differ(key):
            true = "it is the same in all stages, or no setting at all: a stage may set " + ", ".join(MAY_DIFFER)
            raise ConfigError(f"{asked}.{key}", true, f"Set --config.{key} for the whole run, or take it out.")
    values = merged(to_dict(run), changes) | {"stages": {}}
    steps = -(-stage.tokens // run.data.batch_tokens)
    values["train"] = values["train"] | {"steps": first + steps}
    values["optim"] = values["optim"] | {"begins": first}
    with in_stage(name):
        return from_dict(Run, values)


def may_differ(key: str) -> bool:
    """Whether a stage may set this field."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in MAY_DIFFER)


@contextlib.contextmanager
def in_stage(name: str) -> Iterator[None]:
    """ConfigErrors that are raised inside speak of the stage's settings where it may have such; "" changes nothing."""
    try:
        yield
    except ConfigError as error:
        if not name:
            raise
        said = (_of_stage(name, text) for text in (error.asked, error.true, error.change))
        raise type(error)(*said) from None


def _of_stage(name: str, text: str) -> str:
    """Settings that a stage may have of its own are called the stage's; the others can be changed in the run only."""

    def key(found: re.Match[str]) -> str:
        if found[1] == "train.steps":
            return f"--config.stages.{name}.tokens"
        return f"--config.stages.{name}.{found[1]}" if may_differ(found[1]) else found[0]

    return re.sub(r"--config\.(\w+(?:\.\w+)*)", key, text)
