"""Checkpoints, written in the background by Orbax: all that a run needs to go on as if it had never stopped.

Layout: `FOLDER/STEP/ITEM`. Step s is the state after s updates. Items:

    params, router_bias, opt, rng   trees of arrays, sharded as they were; restored on any mesh
    data                            the Grain iterator's state, one file a process
    extra                           anything JSON

A step folder takes its name only once it is complete, so a run that dies in the middle of a save leaves the earlier
checkpoints as they were. An item whose tree has no arrays (`router_bias` of a dense model) has no folder: Orbax
refuses empty items.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from llamax import config
from llamax.config import ConfigError

Tree = Any  # a pytree of arrays, or of jax.ShapeDtypeStruct where only shapes, dtypes and shardings matter

ARRAYS = ("params", "router_bias", "opt", "rng")
SHOWN = 4  # differing leaves that an error names


class Checkpoints:
    """The checkpoints of one run. Without a `cfg` the folder is opened for reading only.

    Use it as a context manager: leaving waits for the save that is under way. An error of a background save is raised
    by the next `save`, `wait` or `close`.
    """

    def __init__(self, folder: str | epath.PathLike, cfg: config.Checkpoint | None = None):
        """Opens FOLDER; creates it, and clears what killed saves left there, unless reading only.

        Raises:
          ConfigError: reading only, and there is no such folder.
        """
        self.folder = epath.Path(folder).expanduser().absolute()
        if cfg is None and not self.folder.exists():
            raise self._nothing_found()
        self._reading_only = cfg is None
        if cfg is None:
            options = ocp.CheckpointManagerOptions(create=False)  # its read_only warns three times
        else:
            options = ocp.CheckpointManagerOptions(max_to_keep=cfg.keep, cleanup_tmp_directories=True)
        handlers = dict.fromkeys(ARRAYS, ocp.StandardCheckpointHandler) | {
            "data": grain.checkpoint.CheckpointHandler,
            "extra": ocp.JsonCheckpointHandler,
        }
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_handlers={name: handler() for name, handler in handlers.items()}
        )
        if cfg is not None:
            # A kill in the middle of deleting the oldest leaves part of it, which Orbax would count as a checkpoint.
            for step in sorted(self._manager.all_steps())[: -cfg.keep]:
                self._manager.delete(step)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def latest(self) -> int | None:
        """The newest step on disk, or None; waits for a save under way, which Orbax would count already."""
        self.wait()
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All steps on disk, in order; waits for a save under way."""
        self.wait()
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, *, params: Tree, router_bias: Tree, opt: Tree, rng: Tree, data_iterator, extra: Mapping
    ) -> bool:
        """Takes the state off the devices and starts writing it; the caller may donate the arrays right away.

        Waits for the save before this one. Returns False, and writes nothing, if `step` is already saved.
        """
        assert not self._reading_only, "opened for reading only"
        latest = self._manager.latest_step()
        assert latest is None or step >= latest, f"step {step} after {latest}: Orbax would drop it without a word"
        if step == latest:
            return False
        trees = zip(ARRAYS, (params, router_bias, opt, rng), strict=True)
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees if jax.tree.leaves(tree)}
        items["data"] = grain.checkpoint.CheckpointSave(data_iterator)
        items["extra"] = ocp.args.JsonSave(dict(extra))
        return self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(
        self, step: int | None = None, *, params: Tree, router_bias: Tree, opt: Tree, rng: Tree, data_iterator
    ) -> dict[str, Any]:
        """Everything of one step; None takes the newest.

        The trees hold `jax.ShapeDtypeStruct`s, whose shardings say where the arrays go (none: the first device).
        `data_iterator` is moved to where it stood.

        Returns:
          params, router_bias, opt, rng, extra.
        Raises:
          ConfigError: no such step, or its leaves differ in name, shape or dtype from those asked for.
        """
        step = self._existing(step)
        asked = dict(zip(ARRAYS, (params, router_bias, opt, rng), strict=True))
        self._check(step, asked, dtypes=True)
        items = {name: _restore_args(tree) for name, tree in asked.items() if jax.tree.leaves(tree)}
        items["data"] = grain.checkpoint.CheckpointRestore(data_iterator)
        items["extra"] = ocp.args.JsonRestore()
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {name: found.get(name, tree) for name, tree in asked.items()} | {"extra": found["extra"]}

    def restore_weights(self, step: int | None, *, params: Tree, router_bias: Tree) -> tuple[Tree, Tree]:
        """(params, router_bias) alone, for sampling and evaluation; cast to the dtypes asked for.

        Shapes, shardings and errors as in `restore`.
        """
        step = self._existing(step)
        asked = {"params": params, "router_bias": router_bias}
        self._check(step, asked, dtypes=False)
        items = {name: _restore_args(tree) for name, tree in asked.items() if jax.tree.leaves(tree)}
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        return found["params"], found.get("router_bias", router_bias)

    def wait(self) -> None:
        """Returns once the save under way is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets the folder go."""
        self._manager.close()

    # ----------------------------------------------------------------------------------------------------- what is true

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise self._nothing_found()
        if step is not None and step not in steps:
            true = f"{self.folder} holds {', '.join(map(str, steps))}"
            raise ConfigError(f"Checkpoint of step {step}", true, "Name one of these, or none for the newest.")
        return steps[-1] if step is None else step

    def _nothing_found(self) -> ConfigError:
        change = "Give the --workdir of a run that has saved, or train first: `llamax train RECIPE --workdir DIR`."
        return ConfigError(f"A checkpoint in {self.folder}", "there is none", change)

    def _check(self, step: int, asked: dict[str, Tree], *, dtypes: bool) -> None:
        """Compares names, shapes and dtypes before Orbax does: it says less, and casts dtypes without a word."""
        metadata = self._manager.item_metadata(step)
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
