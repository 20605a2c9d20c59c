"""Where a run came from: `run.json` in its workdir, and the check that a workdir belongs to the run that asks for it.

    {"config": {...}, "overrides": [...], "files": {name: hash}, "init": {"path", "step", "sum"} | null,
     "reference": the same of the model that answers are measured against | null,
     "git": {"commit", "dirty"}, "versions": {...}, "devices": {...}, "started": ["2026-11-21T08:26:23+00:00", ...],
     "changes": [{"step": 2000, "key": "data.sources.web.weight", "old": 0.7, "new": 0.5}, ...]}

Everything but `started` and `changes` is of the latest start. jax is imported late: the check comes before the backend
starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import fnmatch
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamax import stages
from llamax.config import ConfigError, Run
from llamax.config_dict import flat, from_dict, to_dict

PACKAGES = ("llamax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
WEIGHTS = ("data.sources.*.weight", "data.sources.*.later")  # of sources that stay
MAY_CHANGE = (  # between one start of a run and the next: it stays the same run
    "train.steps",
    "train.log_every_steps",
    "evals.*",
    "checkpoint.*",
    *(f"health.{name}" for name in ("on_nonfinite", "on_spike", "spike_sigmas", "max_bad_steps", "max_roll_backs")),
    *("health.norms_every_steps", "health.stall_s"),
    "mesh.*",
    "data.align_tokens",  # the data's state knows what the rows are aligned to
    "data.workers",
    "data.prefetch_batches",
    *WEIGHTS,  # the data's state knows which it has had
)
LEFT_OVER = re.compile(r".+\.\d+\.tmp")  # what `write_whole` leaves in a workdir if it is killed
SHOWN = 8  # differing keys that an error names


def read(workdir: str | Path) -> dict[str, Any] | None:
    """What `run.json` says; None if there is none. ConfigError if it cannot be read, or `workdir` is a file."""
    path = Path(workdir) / "run.json"
    asked, change = f"--workdir {workdir}", "Choose another --workdir, or delete the whole folder to start afresh."
    if Path(workdir).is_file():
        raise ConfigError(asked, "that is a file", change)
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        found["config"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(asked, f"its run.json cannot be read ({type(error).__name__}: {error})", change) from error
    return found


def latest_step(workdir: str | Path) -> int:
    """The newest checkpoint's step, told by the names of the folders alone; 0 if there is none."""
    folder = Path(workdir) / "checkpoints"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def check_same_run(workdir: str | Path, config: Mapping[str, Any]) -> None:
    """Refuses a workdir that belongs to another run.

    Args:
      workdir: may not exist yet.
      config: the resolved configuration, nested dicts.
    Raises:
      ConfigError: `run.json` has another value for a key outside MAY_CHANGE, or cannot be read.
    """
    found = read(workdir)
    if not latest_step(workdir):
        return  # nothing has been learnt that another run could spoil
    if found is None:
        true, change = (
            "it holds checkpoints and no run.json that says whose",
            "Bring it back, or choose another --workdir.",
        )
        raise ConfigError(f"Training {config.get('name')} in {workdir}", true, change)
    old, new = (taken(values, latest_step(workdir)) for values in (found["config"], config))
    said = flat(found["config"]) | flat(config)
    old, new = ({k: v for k, v in of.items() if k in said or k.startswith("stages.")} for of in (old, new))
    keys = differing(old, new)
    weights = [change["key"] for change in changes(workdir, config, 1) if _matches(change["key"], WEIGHTS)]
    if not keys and weights and "changes" not in found:
        raise ConfigError(
            f"Changing {', '.join(weights)} in {workdir}",
            "its checkpoints are from before weights could change, and do not say with which they were made",
            "Go on with the old weights until there is a new checkpoint, then change them.",
        )
    if keys:
        lines = [f"{key}: {_show(old, key)} → {_show(new, key)}" for key in keys[:SHOWN]]
        more = [f"and {len(keys) - SHOWN} more"] if len(keys) > SHOWN else []
        raise ConfigError(
            f"Training {new.get('name')} in {workdir}",
            f"that is a run of {old.get('name')} with another configuration ({'; '.join(lines + more)})",
            "Choose another --workdir, or change these back; between starts of one run only "
            f"{', '.join(MAY_CHANGE)} may change.",
        )


def taken(config: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The settings, by dotted key, with which a run took its first `step` steps, but for those that may change. Later
    stages do not count yet, nor how long the stage goes on in which that step is."""
    config = _whole(config)
    whole = flat({key: value for key, value in config.items() if key != "stages"})
    parts = stages.parts(from_dict(Run, config)) if config.get("stages") else []
    for part in parts:
        if part.first < step:
            train = dataclasses.replace(part.run.train, steps=0)
            settings = flat(to_dict(dataclasses.replace(part.run, train=train)))
            settings["stages.end"] = min(part.end, step)
            whole |= {
                f"stages.{part.name}.{key}": value for key, value in settings.items() if not _matches(key, MAY_CHANGE)
            }
    return {key: value for key, value in json.loads(json.dumps(whole)).items() if not _matches(key, MAY_CHANGE)}


def changes(workdir: str | Path, config: Mapping[str, Any], step: int) -> list[dict[str, Any]]:
    """What `config` changes at `step` of the run that `run.json` tells of: {"step", "key", "old", "new"} each."""
    found = read(workdir)
    if found is None or not step:
        return []
    old, new = (flat(json.loads(json.dumps(_whole(values)))) for values in (found["config"], config))
    return [{"step": step, "key": key, "old": old.get(key), "new": new.get(key)} for key in differing(old, new)]


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys of flat configurations whose values are not the same."""
    return [key for key in {**old, **new} if old.get(key, _ABSENT) != new.get(key, _ABSENT)]


def _whole(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the defaults of fields that the schema had not when it was written."""
    with contextlib.suppress(ConfigError):
        return to_dict(from_dict(Run, config))
    return config


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def check_same_files(workdir: str | Path, files: Mapping[str, str]) -> None:
    """Refuses to go on with other data than the run started with; `files` is name -> hash.

    Raises:
      ConfigError: `run.json` has another hash for one of them.
    """
    old = (read(workdir) or {}).get("files", {}) if latest_step(workdir) else {}
    changed = [name for name, digest in files.items() if old.get(name, digest) != digest]
    if changed:
        raise ConfigError(
            f"Going on with the run in {workdir}",
            f"its data was made anew since it started and is not the same: {', '.join(changed)}",
            "Bring the old files back, or choose another --workdir and start afresh.",
        )


@contextlib.contextmanager
def alone(workdir: str | Path) -> Iterator[None]:
    """Holds the workdir for this process. ConfigError at once if another one on this machine holds it.

    The system lets go of it with the process, however that ends.
    """
    folder = Path(workdir)
    make_folder(folder)
    try:
        file = (folder / "run.lock").open("a")
    except OSError as error:
        true = f"nothing can be written there: {error}"
        raise ConfigError(f"--workdir {workdir}", true, "Make room or rights, or choose another --workdir.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            true, change = "another process is training in it", "Wait for it, end it, or choose another --workdir."
            raise ConfigError(f"--workdir {workdir}", true, change) from None
        except OSError:
            pass  # a file system without locks
        yield


def make_folder(folder: Path) -> None:
    """ConfigError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--workdir {folder}", f"it cannot be made: {error}", "Choose another --workdir.") from None


def record(
    workdir: str | Path,
    config: Mapping[str, Any],
    overrides: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
    init: Mapping[str, Any] | None = None,
    step: int = 0,
    reference: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes `run.json`, or adds this start at `step` to it; returns its content. Starts jax's backend.

    `init`: which model's weights the run begins with, `reference` which it is measured against; None leaves what an
    earlier start has written.

    Clears what a killed `write_whole` left in the workdir.
    """
    import jax

    folder = Path(workdir)
    make_folder(folder)
    for left in folder.glob("*.tmp"):
        if LEFT_OVER.fullmatch(left.name):
            left.unlink(missing_ok=True)
    path = folder / "run.json"
    before = read(folder) or {}
    devices = jax.devices()
    run = {
        "config": config,
        "overrides": list(overrides),
        "files": dict(files or {}),
        "init": dict(init) if init else before.get("init"),
        "reference": dict(reference) if reference else before.get("reference"),
        "git": git_state(Path(__file__).parent),
        "versions": versions(),
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "started": [*before.get("started", []), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")],
        "changes": [*(before.get("changes", []) if step else []), *changes(workdir, config, step)],
    }
    try:
        write_whole(path, json.dumps(run, indent=2) + "\n")
    except OSError as error:
        true = f"its run.json cannot be written: {error}"
        raise ConfigError(f"--workdir {workdir}", true, "Make room or rights, or choose another --workdir.") from None
    return run


def versions() -> dict[str, str | None]:
    """Of Python and the packages that a result depends on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository around `folder` and whether tracked files differ from it; None outside of one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is either the old one or the new one, whatever happens."""
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


_ABSENT = object()


def _show(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "(absent)"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
