"""Checkpoints, written in the background by Orbax: all that a run needs to go on as if it had never stopped.

Layout: `FOLDER/STEP/ITEM`. Step s is the state after s updates. Items:

    params, router_bias, opt, rng   trees of arrays, sharded as they were; restored on any mesh
    data                            the Grain iterator's state, which is that of all processes
    extra                           anything JSON

A step folder takes its name only once it is complete and has the sums of its files (sums.py), so a run that dies
in the middle of a save leaves the earlier checkpoints as they were, and nothing damaged is restored. An item whose
tree has no arrays (`router_bias` of a dense model) has no folder: Orbax refuses empty items.

Of several processes all call the same methods in the same order: each writes its shards, the first one all else, the
sums when the others have written too. What depends on the folder's state is decided by the first, for all.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.path import atomicity

from llamax import config
from llamax.checkpoint import space, sums
from llamax.config import ConfigError
from llamax.data.pipeline import merge
from llamax.parallel import processes

logger = logging.getLogger("llamax")
Tree = Any  # a pytree of arrays, or of jax.ShapeDtypeStruct where only shapes, dtypes and shardings matter

ARRAYS = ("params", "router_bias", "opt", "rng")
SHOWN = 4  # differing leaves that an error names
DATA_FILE = "process_0-of-1.json"  # Grain's own name, in its format, for a job of one process


class Summed(atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary folder, which gets the sums of its files before it takes its name; in the background thread."""

    _tmp_path: Any
    _final_path: Any
    ahead: sums.Ahead | None = None  # of a subclass: has taken some of the sums

    async def finalize(self) -> None:
        if sums.is_unfinished(self._final_path.parent):  # an item's folder inside of the step's
            return await super().finalize()
        # Orbax adds its last files and renames in one go. So it renames to a name that counts as unfinished still.
        final, whole = self._final_path, self._tmp_path.with_name(f"{self._tmp_path.name}-whole")
        self._final_path = whole
        try:
            if self.ahead is not None:
                self.ahead.stop()
            await super().finalize()
            await asyncio.to_thread(sums.write, Path(whole), self.ahead and self.ahead.known)
            await asyncio.to_thread(whole.rename, final)
        finally:
            self._final_path = final


class DataHandler(grain.checkpoint.CheckpointHandler):
    """The data's state, written once and read by all processes: any number of them goes on from it."""

    def save(self, directory: Any, item: Any = None, args: Any = None) -> None:
        if processes.is_first():
            (directory / DATA_FILE).write_text(json.dumps(item or args.item, indent=4))

    def restore(self, directory: Any, item: Any = None, args: Any = None) -> Any:
        iterator = item or args.item
        iterator.set_state(json.loads((directory / DATA_FILE).read_text()))
        iterator.start_prefetch()
        return iterator


@ocp.args.register_with_handler(DataHandler, for_save=True)
@dataclasses.dataclass
class DataSave(ocp.args.CheckpointArgs):
    item: Any  # the state, all of it


@ocp.args.register_with_handler(DataHandler, for_restore=True)
@dataclasses.dataclass
class DataRestore(ocp.args.CheckpointArgs):
    item: Any  # the iterator, which is moved


class Checkpoints:
    """The checkpoints of one run. Without a `cfg` the folder is opened for reading only.

    Use it as a context manager: leaving waits for the save that is under way. An error of a background save is raised
    by the next `save`, `wait` or `close`; a full disk is none of these errors, but for the last save: see `save`.
    """

    def __init__(self, folder: str | Path, cfg: config.Checkpoint | None = None, for_good: Collection[int] = ()):
        """Opens FOLDER; creates it, and clears what killed saves left there, unless reading only. `for_good`: steps
        whose checkpoints are kept, beside those that `cfg` keeps.

        Raises:
          ConfigError: reading only, and there is no such folder.
        """
        self.folder = Path(folder).expanduser().absolute()
        if cfg is None and not self.folder.exists():
            raise self._nothing_found()
        self._reading_only = cfg is None
        self._saving: tuple[int, int] | None = None  # the step that is being written, and its bytes
        self._unsaved: space.NotSaved | None = None  # why the newest save did not come about
        # Orbax would read the metadata of all steps, and fail if that of any is damaged.
        light = dict(lightweight_initialize=True)
        if cfg is None:
            self._options = ocp.CheckpointManagerOptions(create=False, **light)  # its read_only warns three times
        else:
            self._clear_unfinished()
            space.quiet()
            kept = _kept(cfg, for_good)
            self._options = ocp.CheckpointManagerOptions(preservation_policy=kept, temporary_path_class=Summed, **light)
        self._manager = self._open()
        if cfg is not None:
            self._delete_old(cfg, for_good)

    def _delete_old(self, cfg: config.Checkpoint, for_good: Collection[int]) -> None:
        """A kill in the middle of deleting the oldest leaves part of it, which Orbax would count as a checkpoint."""
        for step in self.steps()[: -cfg.keep]:
            if step not in for_good and (not cfg.keep_every_steps or step % cfg.keep_every_steps):
                self._manager.delete(step)

    def _open(self) -> ocp.CheckpointManager:
        handlers = dict.fromkeys(ARRAYS, ocp.StandardCheckpointHandler) | {
            "data": DataHandler,
            "extra": ocp.JsonCheckpointHandler,
        }
        return ocp.CheckpointManager(
            self.folder, options=self._options, item_handlers={name: handler() for name, handler in handlers.items()}
        )

    def _look_again(self) -> None:
        """Orbax keeps the steps in mind: after a change of the folder it has to be told (and its `reload` reads all
        metadata again)."""
        self._manager.close()
        self._manager = self._open()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            self.close()
        except space.NotSaved:  # has been logged; it must not hide what ended the run
            if kind is None:
                raise

    def latest(self) -> int | None:
        """The newest step on disk, or None; waits for a save under way, which Orbax would count already."""
        self.wait()
        return processes.from_first(self._manager.latest_step)

    def steps(self) -> list[int]:
        """All steps on disk, in order; waits for a save under way."""
        self.wait()
        return processes.from_first(lambda: sorted(self._manager.all_steps()))

    def save(
        self, step: int, *, params: Tree, router_bias: Tree, opt: Tree, rng: Tree, data_iterator, extra: Mapping
    ) -> bool:
        """Takes the state off the devices and starts writing it; the caller may donate the arrays right away.

        Waits for the save before this one. Returns False, and writes nothing, if `step` is already saved.

        A full disk, known beforehand or met while writing, is logged as an error with what is needed and what is free;
        the checkpoints before stay as they are, and the run may go on and try again. If it was the newest save, `close`
        raises NotSaved: what was learnt since the last good checkpoint would be lost without a word.
        """
        assert not self._reading_only, "opened for reading only"
        self.wait()
        latest = self._manager.latest_step()
        assert latest is None or step >= latest, f"step {step} after {latest}: Orbax would drop it without a word"
        self._unsaved = None
        if step == latest:
            return False
        trees = dict(zip(ARRAYS, (params, router_bias, opt, rng), strict=True))
        self._saving = step, space.needed([_data_of_key(leaf) for leaf in jax.tree.leaves(trees)])
        wanted = self._saving[1]
        if processes.from_first(lambda: space.free(self.folder) < wanted):
            self._not_saved(begun=False)
            return False
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items() if jax.tree.leaves(tree)}
        items["data"] = DataSave(processes.from_all(data_iterator.get_state(), merge))
        items["extra"] = ocp.args.JsonSave(dict(extra))
        return self._unless_full(lambda: self._manager.save(step, args=ocp.args.Composite(**items))) or False

    def restore(
        self,
        step: int | None = None,
        *,
        params: Tree,
        router_bias: Tree,
        opt: Tree,
        rng: Tree,
        data_iterator,
        checked: bool = False,
    ) -> dict[str, Any]:
        """Everything of one step; None takes the newest sound one, and sets damaged ones aside.

        The trees hold `jax.ShapeDtypeStruct`s, whose shardings say where the arrays go (none: the first device).
        `data_iterator` is moved to where it stood; None leaves the data alone. `checked`: the files were compared with
        their sums a moment ago.

        Returns:
          params, router_bias, opt, rng, extra.
        Raises:
          ConfigError: no such step; its files are damaged; or its leaves differ in name, shape or dtype from those
            asked for.
        """
        step = self._existing(step) if checked else self.sound(step)
        asked = dict(zip(ARRAYS, (params, router_bias, opt, rng), strict=True))
        self._check(step, asked, dtypes=True)
        items = {name: _restore_args(tree) for name, tree in asked.items() if jax.tree.leaves(tree)}
        if data_iterator is not None:
            items["data"] = DataRestore(data_iterator)
        items["extra"] = ocp.args.JsonRestore()
        found = self._read(step, lambda: self._manager.restore(step, args=ocp.args.Composite(**items)))
        return {name: found.get(name, tree) for name, tree in asked.items()} | {"extra": found["extra"]}

    def restore_weights(
        self, step: int | None, *, params: Tree, router_bias: Tree, checked: bool = False
    ) -> tuple[Tree, Tree]:
        """(params, router_bias) alone, for sampling and evaluation; cast to the dtypes asked for.

        Step, `checked`, shapes, shardings and errors as in `restore`; opened for reading only, nothing is set aside.
        """
        step = self._existing(step) if checked else self.sound(step)
        asked = {"params": params, "router_bias": router_bias}
        self._check(step, asked, dtypes=False)
        items = {name: _restore_args(tree) for name, tree in asked.items() if jax.tree.leaves(tree)}
        found = self._read(step, lambda: self._manager.restore(step, args=ocp.args.Composite(**items)))
        return found["params"], found.get("router_bias", router_bias)

    def checked(self, step: int | None, *, params: Tree, router_bias: Tree) -> Path:
        """The folder of a step whose weights are sound and of these names and shapes; for reading them piece by piece.

        Step and errors as in `restore_weights`.
        """
        step = self.sound(step)
        self._check(step, {"params": params, "router_bias": router_bias}, dtypes=False)
        return self.folder / str(step)

    def set_aside(self, step: int, why: str) -> Path:
        """Renames the folder of `step` to STEP.WHY (STEP.WHY-2 if taken); the step may then be saved anew.

        Waits for a save under way. Returns the new path.
        """
        assert not self._reading_only, "opened for reading only"
        self.wait()
        to = processes.from_first(lambda: str(sums.set_aside(self.folder / str(step), why)))
        self._look_again()
        return Path(to)

    def wait(self) -> None:
        """Returns once the save under way is on disk, or has failed for want of space."""
        self._unless_full(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits, then lets the folder go. NotSaved if the disk was full at the newest save."""
        try:
            self.wait()
        finally:
            self._manager.close()
        if self._unsaved is not None:
            raise self._unsaved

    # ------------------------------------------------------------------------------------------------------- full disks

    def _unless_full(self, call: Callable[[], Any]) -> Any:
        """What `call` returns; None where it fails for want of space, with the remains of that save removed."""
        try:
            return call()
        except Exception as error:
            if self._saving is None or not space.is_full(error):
                raise
            space.forget(error)
            self._clear_unfinished()
            self._look_again()  # it had counted the step, and dropped the oldest one
            self._not_saved(begun=True)
            return None

    def _not_saved(self, *, begun: bool) -> None:
        assert self._saving is not None
        step, bytes_needed = self._saving
        last_good = max(sums.steps(self.folder), default=None)
        self._unsaved = space.not_saved(self.folder, step, bytes_needed, last_good, begun=begun)
        if processes.is_first():
            logger.error(str(self._unsaved))

    def _clear_unfinished(self) -> None:
        for path in self.folder.glob(f"*{sums.UNFINISHED}*") if processes.is_first() else ():
            logger.info("removing %s, which a save did not finish", path)
            space.remove(path)

    # ----------------------------------------------------------------------------------------------------- what is true

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise self._nothing_found()
        if step is not None and step not in steps:
            true = f"{self.folder} holds {', '.join(map(str, steps))}"
            raise ConfigError(f"Checkpoint of step {step}", true, "Name one of these, or none for the newest.")
        return steps[-1] if step is None else step

    def sound(self, step: int | None) -> int:
        """The step itself, or the newest one, with files that are what was written."""
        if step is None:
            self.wait()
            step = processes.from_first(lambda: sums.newest_sound(self.folder, rename=not self._reading_only))
            if not self._reading_only:
                self._look_again()
            return self._existing(step or None)
        asked_for = self.folder / str(self._existing(step))
        problems = processes.from_first(lambda: sums.check(asked_for))
        if problems:
            asked, others = f"Checkpoint of step {step} in {self.folder}", [s for s in self.steps() if s != step]
            change = f"Name another: {', '.join(map(str, others))}." if others else "Bring it back from a copy."
            raise ConfigError(asked, f"it is damaged: {sums.summary(problems)}", change)
        return step

    def _read(self, step: int, call: Callable[[], Any]) -> Any:
        """What `call` reads of a step; a failure is no damage, since the files are what was written: no step before
        would do better, and nothing is set aside."""
        try:
            return call()
        except ConfigError:
            raise  # what has been read does not suit the run
        except Exception as error:
            raise ConfigError(
                f"Restoring step {step} of {self.folder}",
                f"its files are sound, and reading them failed ({type(error).__name__}: {error})",
                f"Mend what this says; or rename {self.folder / str(step)}, and the one before is taken.",
            ) from error

    def _nothing_found(self) -> ConfigError:
        change = "Give the --workdir of a run that has saved, or train first: `llamax train RECIPE --workdir DIR`."
        return ConfigError(f"A checkpoint in {self.folder}", "there is none", change)

    def _check(self, step: int, asked: dict[str, Tree], *, dtypes: bool) -> None:
        """Compares names, shapes and dtypes before Orbax does: it says less, and casts dtypes without a word."""
        metadata = self._read(step, lambda: self._manager.item_metadata(step))
        wrong = []
        for item, tree in asked.items():
            stored = metadata.get(item)
            wrong += _differences(item, _leaves(tree), {} if stored is None else _leaves(stored.tree), dtypes)
        if wrong:
            more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise ConfigError(
                f"Restoring step {step} of {self.folder}",
                f"it was saved by another configuration: {'; '.join(wrong[:SHOWN])}{more}",
                "Use the configuration in the workdir's run.json, or another --workdir.",
            )


def _kept(cfg: config.Checkpoint, for_good: Collection[int]) -> Any:
    """The newest `keep`, and for good these steps and every one that is a multiple of `keep_every_steps`."""
    policies = [ocp.checkpoint_managers.LatestN(cfg.keep), ocp.checkpoint_managers.CustomSteps(sorted(for_good))]
    if cfg.keep_every_steps:
        policies.append(ocp.checkpoint_managers.EveryNSteps(cfg.keep_every_steps))
    return ocp.checkpoint_managers.AnyPreservationPolicy(policies)


def _leaves(tree: Tree) -> dict[str, Any]:
    """Leaves by name, e.g. "0/mu/embed/table". Orbax's metadata has dicts where optax has named tuples: same names."""
    name = jax.tree_util.keystr
    leaves = {name(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return {name: _data_of_key(leaf) for name, leaf in leaves.items()}


def _data_of_key(leaf):
    """A typed random key as what Orbax stores of it, its uint32 data; any other leaf as it is."""
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf


def _differences(item: str, asked: dict[str, Any], stored: dict[str, Any], dtypes: bool) -> list[str]:
    def show(leaf) -> str:
        return f"{leaf.dtype}{list(leaf.shape)}"

    lines = [f"{item}/{name} is {show(asked[name])} here and not in the checkpoint" for name in asked.keys() - stored]
    lines += [f"{item}/{name} is {show(stored[name])} in the checkpoint and not here" for name in stored.keys() - asked]
    for name in asked.keys() & stored:
        a, s = asked[name], stored[name]
        if tuple(a.shape) != tuple(s.shape) or (dtypes and a.dtype != s.dtype):
            lines.append(f"{item}/{name} is {show(s)} in the checkpoint and {show(a)} here")
    return sorted(lines)


def _restore_args(tree: Tree) -> ocp.args.StandardRestore:
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf):
        # Without a sharding Orbax takes the one in the file, which names devices that may not be here.
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first)

    return ocp.args.StandardRestore(jax.tree.map(placed, tree))
