"""Recipe files and command-line overrides: what stands behind `config.load`.

A recipe is a Python file with `get_config(size) -> ConfigDict`, and perhaps LAYOUTS: what its full size changes on a
kind of cluster, by a name that stands for a size (`recipes/x.py:v5p_256`); and SIZES: more that it offers.
Overrides are parsed by ml_collections' own machinery (`config_flags`, on a private set of absl flags), so they are
typed and locked as its users know them:
`--config.train.steps=200`, `--config.model.qk_norm`, `--noconfig.model.qk_norm`, `--config.mesh="{'fsdp': 8}"`.
What this file adds is that every refusal is a three-part `ConfigError` with the nearest right key.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections
from absl import flags
from ml_collections import ConfigDict, config_flags

from llamax.config import PROJECT, SIZES, Run, resolve_path, to_config
from llamax.config_dict import KIND_NAMES, ConfigError, from_dict, merged, nearest, unknown_key

OVERRIDE = re.compile(r"--(no)?config\.(?P<path>[^=.]+(\.[^=.]+)*)(=.*)?", re.DOTALL)
REFUSALS = (flags.Error, ValueError, TypeError, LookupError, AttributeError)  # what ml_collections raises


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """See `config.load`."""
    name, colon, size = spec.rpartition(":")
    if not colon or "/" in size:
        name, size = spec, SIZES[0]
    recipe = _import(_find(name))
    layouts = getattr(recipe, "LAYOUTS", {})
    sizes = (*SIZES, *getattr(recipe, "SIZES", ()), *layouts)
    if size not in sizes:
        close = nearest(size, sizes) or SIZES[0]
        raise ConfigError(f"size {size} of {name}", f"its sizes are {', '.join(sizes)}", f"Use {name}:{close}.")
    cfg = to_config(from_dict(Run, _get_config(recipe, SIZES[0] if size in layouts else size)))
    if size in layouts:
        cfg = _laid_out(cfg, layouts[size])
    if overrides:
        cfg = to_config(from_dict(Run, override(cfg, overrides)))  # again, for an override may replace a section
    return cfg


def override(cfg: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """A copy of `cfg` with `--config.a.b=value` applied; ml_collections' semantics, ConfigError when it refuses."""
    cfg = cfg.copy_and_resolve_references()
    for one in overrides:
        _fill_stage(cfg, one)
        _check_path(cfg, one)
    try:
        return _parse(cfg, overrides)
    except REFUSALS as error:
        for one in overrides:  # which of them was it?
            try:
                _parse(cfg, [one])
            except REFUSALS as its_error:
                raise _refused(cfg, one, its_error) from None
        clash = f"together they clash: {str(error).rstrip('.')}"
        raise ConfigError(" ".join(overrides), clash, "Change their order.") from None


def _find(name: str) -> Path:
    path = resolve_path(name)
    if path.is_file():
        return path
    known = {p.stem: str(p.relative_to(PROJECT)) for p in sorted((PROJECT / "recipes").glob("*.py"))}
    close = nearest(Path(name).stem, known)
    change = f"Did you mean {known[close]}?" if close else f"There are: {', '.join(known.values())}."
    raise ConfigError(f"recipe {name}", "there is no such file", change)


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"recipe {path}", "it is not a Python file", "Give a file that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"recipe {path}", "it has no get_config(size)", "Start from recipes/scout_pretrain.py.")
    return module


def _get_config(recipe: ModuleType, size: str) -> ConfigDict:
    """`recipe.get_config(size)`; what ml_collections refuses inside it is a person's slip, with a file and a line."""
    try:
        cfg = recipe.get_config(size)
    except (AttributeError, KeyError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not Path(frames[-1].filename).is_relative_to(Path(ml_collections.__file__).parent):
            raise
        line = next(f for f in reversed(frames) if f.filename == recipe.__file__)
        where = f"{Path(line.filename).name}:{line.lineno}: {line.line}"
        key = re.search(r'Key "(\w+)" does not exist|^[\'"]+(\w+)[\'"]', str(error))
        if key is None:  # a value of another type
            true, change = str(error).strip("'\""), "Give the type that llamax/config.py names."
        else:
            asked = key[1] or key[2]
            change = unknown_key(asked, (), Run).change.replace("--config.", "run.")
            true = f"there is no field {asked} in that place"
        raise ConfigError(where, true, change) from error
    if not isinstance(cfg, ConfigDict):
        true = f"get_config({size!r}) returned {type(cfg).__name__}, not a ConfigDict"
        raise ConfigError(
            f"recipe {recipe.__file__}", true, "End it with `return run`, as in recipes/scout_pretrain.py."
        )
    return cfg


def _laid_out(cfg: ConfigDict, layout: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
    """The full size on one kind of cluster: `layout` holds fields by section. The mesh is the defaults, but for these;
    other sections are as they were, but for these."""
    values = cfg.to_dict()
    if "mesh" in layout:
        values["mesh"] = {}
    return to_config(from_dict(Run, merged(values, layout)))


def _parse(cfg: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    cfg = cfg.copy_and_resolve_references()
    argv = ["llamax", *overrides]
    values = flags.FlagValues()  # ours: absl's global flags stay out of it
    config_flags.DEFINE_config_dict("config", cfg, flag_values=values, sys_argv=argv)
    values(argv)
    return values["config"].value


def _fill_stage(cfg: ConfigDict, one: str) -> None:
    """A stage holds only what differs from the run: for an override of something else in it, the run's value first."""
    match = OVERRIDE.fullmatch(one)
    first, *path = match["path"].split(".") if match else [""]
    if first != "stages" or len(path) < 3 or path[0] not in cfg.stages:
        return
    stage, run = cfg.stages[path[0]], cfg
    for key in path[1:-1]:
        if key not in run or not isinstance(run[key], ConfigDict):
            return
        run = run[key]
        if key not in stage:
            with stage.unlocked():
                stage[key] = {}
        stage = stage[key]
    if path[-1] in run and path[-1] not in stage:
        with stage.unlocked():
            stage[path[-1]] = run[path[-1]]


def _check_path(cfg: ConfigDict, one: str) -> None:
    """Refuses an override whose path does not exist, with the nearest one that does."""
    match = OVERRIDE.fullmatch(one)
    if match is None:
        raise ConfigError(one, "an override reads --config.KEY=VALUE", "For instance --config.train.steps=200.")
    here: Any = cfg
    walked: list[str] = []
    for key in match["path"].split("."):
        name = key.partition("[")[0]  # plan[0] is ml_collections' to judge
        if not isinstance(here, ConfigDict):
            true = f"{'.'.join(walked)} is {here!r} and has no fields"
            raise ConfigError(one, true, f"Set --config.{'.'.join(walked)} itself.")
        if name not in here:
            raise unknown_key(".".join([*walked, name]), list(here), Run)
        here, walked = here[name], [*walked, name]


def _refused(cfg: ConfigDict, one: str, error: Exception) -> ConfigError:
    """The three parts for a value that ml_collections refused."""
    path, _, text = one.partition("config.")[2].partition("=")
    if "[" in path:
        return ConfigError(one, f"it is refused: {error}", f"Set --config.{path.partition('[')[0]} as a whole.")
    now = cfg
    for key in path.split("."):
        now = now[key]
    if isinstance(now, ConfigDict):
        field = next(iter(now), "NAME")
        return ConfigError(one, f"{path} is a section, a dict of its fields", f"Set one, like --config.{path}.{field}.")
    example = str(now).lower() if isinstance(now, bool) else now
    if type(now) is int:
        with contextlib.suppress(ValueError, OverflowError):
            example = int(float(text))  # 1e3 was meant as 1000
    return ConfigError(one, f"{path} is {KIND_NAMES[type(now)]}", f"Write it like --config.{path}={example}.")
