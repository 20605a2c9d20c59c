"""Where a run's state comes from: drawn at random, another model's weights, or a checkpoint of the run itself."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamax import config, loading
from llamax.checkpoint import found as folders
from llamax.checkpoint import saved
from llamax.checkpoint.manager import Checkpoints
from llamax.config import ConfigError
from llamax.config_dict import flat, merged
from llamax.data.tokenizer import Tokenizer
from llamax.loading import Found
from llamax.model import lora, tuned
from llamax.model.lora import ADAPTERS
from llamax.model.skeleton import Skeleton
from llamax.observe import provenance
from llamax.observe.goodput import Ledger
from llamax.parallel import processes
from llamax.stages import Part
from llamax.train import hooks
from llamax.train.health import Diverged
from llamax.train.loop import RollBack
from llamax.train.state import COUNTS, State

logger = logging.getLogger("llamax")

NO_FUNCTION = ("init_std", "ssmax_len", "reward_head")  # fields of a model that do not say what its tokens are like
# Fields that say where tokens stand: the same weights can be read with others, and are then another function.
POSITIONS = ("rope.*", "chunk_len", "attn_*")
SHOWN = 4  # differing fields that an error names
SAMPLE = "The quick brown fox: 12,345 != 0x3f; naïve façade 東京\n\tdef f(x):\n        return x**2\n"


def find(run: config.Run, workdir: Path, tokenizer: Tokenizer) -> Found | None:
    """What `run.init` names; None where the run starts from nothing, or goes on from a checkpoint of its own that has
    all of it. All processes call it.

    Raises:
        ConfigError: no model is there; it is another model, or reads positions in another way, and `init.differs` does
            not say that this is meant; its tokenizer is another one. Of a run that goes on with adapters: what they
            stand beside is gone, or has changed.
    """
    if not run.init.path:
        return None
    if processes.from_first(partial(provenance.latest_step, workdir)):
        ours = saved.find(workdir) if run.tune.lora_rank else None
        return ours and folders.base_of(ours)
    found = loading.find(config.resolve_path(run.init.path), run.init.step or None)

    def check() -> None:
        check_same_function(found.said.model, run, f"--config.init.path={run.init.path}")
        check_nothing_is_drawn(found.said.model, run)
        check_same_tokens(run, loading.tokenizer_of(found.said), tokenizer)

    processes.together(check)
    return found


def find_reference(run: config.Run, workdir: Path, tokenizer: Tokenizer) -> Found | None:
    """The model that the run is measured against, of a run that goes on the same as before; None where there is none.
    ConfigError as in `find`, or if the weights have changed since."""
    if run.reference.source == "none":
        return None
    path, step = (run.reference.path, run.reference.step) if run.reference.path else (run.init.path, run.init.step)
    before = processes.from_first(partial(said_of_reference, workdir))
    found = loading.find(config.resolve_path(path), before["step"] if before else step or None)
    if before and processes.together(partial(folders.fingerprint, found)) != before["sum"]:
        true, change = "these are not the weights with which it began", "Bring them back, or choose another --workdir."
        raise ConfigError(f"The reference {path} of the run in {workdir}", true, change)

    def check() -> None:
        check_same_function(found.said.model, run, f"--config.reference.path={path}")
        check_same_tokens(run, loading.tokenizer_of(found.said), tokenizer)

    processes.together(check)
    return found


def said_of_reference(workdir: Path) -> dict[str, Any] | None:
    """What run.json has of the reference, once there is a checkpoint: the run it names may have gone on since."""
    return (provenance.read(workdir) or {}).get("reference") if provenance.latest_step(workdir) else None


def with_reference(state: State, shapes: State, bones: Skeleton, found: Found | None) -> State:
    """The state with a live reference's weights, where the run has one; `found` as of `find_reference`."""
    if shapes.reference is None:
        return state
    assert found is not None
    own, bias = shapes.reference
    params, bias = loading.read(found, merged(own, bones.split(shapes.params)[1]), bias)
    return state._replace(reference=(bones.own(params), bias))


def about(found: Found | None) -> dict[str, Any] | None:
    """For run.json: whose weights a run begins with."""
    return found and folders.about(found)


def check_same_function(theirs: config.Model, run: config.Run, asked: str) -> None:
    """ConfigError if the weights were trained as another model than `run.model`, but for what `init.differs` names."""
    if theirs.reward_head and not run.model.reward_head:
        true = "that is a reward model, and this recipe's has no head that scores"
        change = "Name the model that it began with, or set --config.model.reward_head=true, --config.losses.reward=1."
        raise ConfigError(asked, true, change)
    old, new = flat(config.to_dict(theirs)), flat(config.to_dict(run.model))
    keys = [key for key in {**new, **old} if old.get(key) != new.get(key) and key not in NO_FUNCTION]
    keys = [key for key in keys if not any(fnmatch.fnmatchcase(key, pattern) for pattern in run.init.differs)]
    if not keys:
        return
    shown = "; ".join(f"{key}: {old.get(key)} there, {new.get(key)} in the recipe" for key in keys[:SHOWN])
    more = f"; and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    true = f"that model differs from this recipe's ({shown}{more})"
    change = f"Set --config.model.{keys[0]}={old.get(keys[0])}"
    if all(any(fnmatch.fnmatchcase(key, pattern) for pattern in POSITIONS) for key in keys):
        meant = ", ".join(f"'{key}'" for key in keys)
        change += f', or, if the change is meant, --config.init.differs="({meant},)"'
    raise ConfigError(asked, true, f"{change}.")


def check_nothing_is_drawn(theirs: config.Model, run: config.Run) -> None:
    """ConfigError if what adapters stand beside has parameters that no folder holds."""
    drawn = run.model.reward_head and not theirs.reward_head
    if run.tune.lora_rank and drawn and not tuned.trains(run.tune, lora.HEAD):
        asked = f"--config.tune.freeze={run.tune.freeze} with --config.model.reward_head=true"
        true = "that model has no such head; it would be frozen as it is drawn, and saved nowhere"
        raise ConfigError(asked, true, f"Add '{tuned.AGAIN}{lora.HEAD}' behind the other rules.")
    if run.tune.lora_rank and run.model.attn_scale == "ssmax" != theirs.attn_scale:
        asked = f"--config.tune.lora_rank={run.tune.lora_rank} with --config.model.attn_scale=ssmax"
        true = "that model has no such factors; they would be frozen as they are drawn, and saved nowhere"
        change = (
            f"Set --config.model.attn_scale={theirs.attn_scale}, or train all of it first: --config.tune.lora_rank=0."
        )
        raise ConfigError(asked, true, change)


def check_same_tokens(run: config.Run, theirs: Tokenizer | None, ours: Tokenizer) -> None:
    """ConfigError if the two tokenizers cut or number a text in different ways."""
    if theirs is None or theirs.encode(SAMPLE) == ours.encode(SAMPLE):
        return
    true = f"its tokenizer ({theirs.path}) reads text as other ids than data.tokenizer={run.data.tokenizer}"
    raise ConfigError(f"--config.init.path={run.init.path}", true, f"Set --config.data.tokenizer={theirs.path}.")


def start(
    part: Part,
    fresh: Callable[[], State],
    shapes: State,
    checkpoints: Checkpoints,
    batches: Any,
    weights: Found | None,
    bones: Skeleton,
) -> tuple[State, int]:
    """The state to go on from, and its step: the newest checkpoint's, with the data iterator moved to where it stood.
    With adapters, `weights` are what they stand beside.

    Where there is none, a fresh one, with another model's weights if there are `weights`. At the beginning of a stage
    the data is left at its beginning: the checkpoint's is of the stage before.
    """
    shapes = shapes._replace(reference=None)
    latest = checkpoints.latest()  # preflight.sound_step has compared its files with their sums
    if (latest or 0) < part.first:
        asked, true = f"stage {part.name}", f"the stage before ended with a bad step {part.first}, which is not saved"
        raise Diverged(asked, true, f"Look at the data; the same command goes on from step {latest or 0}.")
    if latest is None:
        return begun(fresh, shapes, weights), 0
    at_its_beginning = latest == part.first > 0
    data = None if at_its_beginning else batches
    state = restore(shapes, checkpoints, latest, data, weights, bones, checked=True)
    if at_its_beginning:
        logger.info("stage %s begins after step %d", part.name, latest)
    else:
        logger.info("resumed from step %d in %s", latest, checkpoints.folder)
    return in_stage(part, state), latest


def in_stage(part: Part, state: State) -> State:
    """At a stage's beginning the last losses, which spikes are told by, are forgotten: they are of other data."""
    if int(jax.device_get(state.step)) != part.first:
        return state
    recent = np.full(state.recent.shape, np.inf, state.recent.dtype)
    return state._replace(recent=jax.device_put(recent, state.recent.sharding))


def begun(fresh: Callable[[], State], shapes: State, weights: Found | None) -> State:
    """A state of no steps. Random numbers take long to compile well, and this program runs once."""
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    platform = next(iter(shapes.step.sharding.device_set)).platform
    options = {"xla_backend_optimization_level": 0} if platform == "cpu" else None
    if weights is None:
        return jax.jit(fresh, out_shardings=shardings, compiler_options=options)()
    theirs_has = dict(ssmax=weights.said.model.attn_scale == "ssmax", reward=weights.said.model.reward_head)
    lacking = (*ADAPTERS, *(name for name, there in theirs_has.items() if not there))
    theirs, ours = split(shapes.params, lacking)

    def rest_of(state: State) -> State:
        return state._replace(params=split(state.params, lacking)[1], router_bias=None)

    # What is drawn for their weights is left out of the program: they never exist twice.
    rest = jax.jit(lambda: rest_of(fresh()), out_shardings=rest_of(shardings), compiler_options=options)()
    params, router_bias = loading.read(weights, theirs, shapes.router_bias)
    if ours:
        logger.info("drawn anew, since that model has none: %s", ", ".join(sorted(names_in(ours))))
    logger.info("starting from %s%s", weights.said.folder, f", step {weights.step}" if weights.step else "")
    return rest._replace(params=merged(params, rest.params), router_bias=router_bias)


def names_in(tree: dict[str, Any]) -> set[str]:
    """Of the leaves; adapters are one name."""
    found: set[str] = set()
    for key, value in tree.items():
        found |= names_in(value) if isinstance(value, dict) else {"adapters" if key.endswith((lora.A, lora.B)) else key}
    return found


def split(tree: dict[str, Any], names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nested dicts as two: without the entries of these names (patterns), at any depth, and with those alone."""
    rest: dict[str, Any] = {}
    taken: dict[str, Any] = {}
    for key, value in tree.items():
        if any(fnmatch.fnmatchcase(key, name) for name in names):
            taken[key] = value
        elif isinstance(value, dict):
            inner = split(value, names)
            rest |= {key: inner[0]}
            taken |= {key: inner[1]} if inner[1] else {}
        else:
            rest[key] = value
    return rest, taken


def restore(
    shapes: State,
    checkpoints: Checkpoints,
    step: int | None,
    batches: Any,
    weights: Found | None,
    bones: Skeleton,
    *,
    checked: bool = False,
) -> State:
    """The state of a step's checkpoint; the data iterator is moved to where it stood, if there is one.

    `step` None and `checked` are those of `Checkpoints.restore`; `weights` what adapters stand beside.
    """
    kept = bones.kept(shapes.params)
    found = checkpoints.restore(
        step,
        params=kept,
        router_bias=shapes.router_bias,
        opt=shapes.opt,
        rng={"key": shapes.rng, "recent": shapes.recent},
        data_iterator=batches,
        checked=checked,
    )
    counts = {name: jax.device_put(np.int32(found["extra"][name]), shapes.step.sharding) for name in COUNTS}
    trees = {name: found[name] for name in ("params", "router_bias", "opt")}
    if bones.plain is not None:
        assert weights is not None, "adapters stand beside something"
        beneath, _ = loading.read(weights, lora.beneath(shapes.params, weights.said.model), shapes.router_bias)
        trees["params"] = merged(beneath, found["params"])
    return State(rng=found["rng"]["key"], recent=found["rng"]["recent"], **trees, **counts)


def go_back(
    part: Part,
    shapes: State,
    checkpoints: Checkpoints,
    weights: Found | None,
    bones: Skeleton,
    written: hooks.Log,
    ledger: Ledger,
    back: RollBack,
) -> State:
    """The state to go on from after a roll-back. The data stays where it is: past the batches that did harm."""
    logger.log(logging.WARNING if processes.is_first() else logging.DEBUG, "%s, past the batches in between", back)
    for step in reversed(checkpoints.steps()):  # the newest first: a death in between leaves no gap
        if step > back.to:
            checkpoints.set_aside(step, "rolled-back")
    # The one before, should its files be damaged by now.
    state = in_stage(part, restore(shapes._replace(reference=None), checkpoints, None, None, weights, bones))
    to = int(jax.device_get(state.step))
    written.rewind(to)
    ledger.lose_steps_after(to)
    written.file.write(to, {"health/rolled_back_from": back.now, "health/bad_step": back.bad})
    return state
