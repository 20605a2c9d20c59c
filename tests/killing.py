"""Starts `tests.kill_child`, strikes it, and reads everything that a run has left behind."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 240  # for anything that a child should come to; a few seconds on two free cores
STOP_S = 30  # a SIGTERM is obeyed within
BELONGS = {"checkpoints", "goodput.json", "metrics.jsonl", "run.json", "run.lock", "steps.jsonl", "tensorboard"}
COMPARED = ("loss/", "optim/", "experts/", "steps/", "data/left_out", "eval/")  # of a line of metrics.jsonl


class Child:
    """A training process in a group of its own; `said` holds the (phase, number) that it came to."""

    def __init__(self, workdir: Path, workers: int = 0, slow: tuple[str, ...] = ()):
        self.workdir, self.said = workdir, []
        self.log = Path(f"{workdir}.log")
        self._events, events = os.pipe()
        words = ["--workers", str(workers), "--events", str(events), *(["--slow", *slow] if slow else [])]
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.kill_child", str(workdir), *words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[events],
                start_new_session=True,
            )
        os.close(events)
        self._unread = b""

    def wait_for(self, phase: str, number: int | None = None) -> bool:
        """Returns once it says so (None: any number); False if it ends before."""
        ends = time.monotonic() + TIMEOUT_S
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if newline:
                self._unread = rest
                name, n = line.decode().split()
                self.said.append((name, int(n)))
                if name == phase and number in (None, int(n)):
                    return True
                continue
            ready, _, _ = select.select([self._events], [], [], max(0.0, ends - time.monotonic()))
            more = os.read(self._events, 65536) if ready else b""
            assert ready, f"no {phase} {number} within {TIMEOUT_S} s after {self.said[-3:]}\n{self.tail()}"
            if not more:
                return False
            self._unread += more

    def kill(self, everyone: bool = True) -> None:
        """SIGKILL to the main process, and to its loader processes unless told otherwise.

        Python's resource tracker lives on: it gives back the shared memory of those that cannot any more.
        """
        pids = [pid for pid in self.group() if b"resource_tracker" not in command(pid)] if everyone else []
        for pid in (self._process.pid, *pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def terminate(self, everyone: bool = True) -> None:
        """SIGTERM to the whole group, as schedulers do, or to the main process alone."""
        pids = self.group() if everyone else [self._process.pid]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit code, once it has ended by itself."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {timeout_s} s; {self.said[-3:]}\n{self.tail()}") from None

    def group(self) -> list[int]:
        """Process ids of what lives of its group."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                state, _, group = (path / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue  # it has just ended
            if int(group) == self._process.pid and state != "Z":
                found.append(int(path.name))
        return found

    def wait_until_all_are_gone(self, timeout_s: float) -> None:
        ends = time.monotonic() + timeout_s
        while group := self.group():
            assert time.monotonic() < ends, f"{[command(pid) for pid in group]} live on after {timeout_s} s"
            time.sleep(0.05)

    def tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-30:])

    def close(self) -> None:
        os.close(self._events)
        for pid in self.group():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def child(workdir: Path, workers: int = 0, slow: tuple[str, ...] = ()) -> Iterator[Child]:
    """A child that is gone at the end whatever happens."""
    it = Child(workdir, workers, slow)
    try:
        yield it
    finally:
        it.close()


def run_to_the_end(workdir: Path, workers: int = 0) -> None:
    with child(workdir, workers) as it:
        it.wait_for("nothing of the kind")  # reads what it says until it ends
        assert it.wait() == 0, it.tail()


class Record(NamedTuple):
    """All that has to be the same after kills as without; a difference is named by `differences`."""

    arrays: dict[str, str]  # of the last checkpoint, "opt/0/mu/embed" -> dtype, shape and a hash of the bits
    data: dict  # the data iterator's state in it
    extra: dict
    lines: dict[str, list]  # of metrics.jsonl: "step 7 loss/next_token" -> its values; one, unless it is there twice
    steps: dict[str, list]  # of steps.jsonl, likewise
    curves: dict[str, list]  # TensorBoard's scalars: "step 7 loss/next_token" -> likewise
    batches: dict[str, list]  # step -> the different batches that were taken for it
    debris: list[str]  # files that belong to no run


def record(workdir: Path) -> Record:
    checkpoints = workdir / "checkpoints"
    steps = sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    newest = checkpoints / str(steps[-1])
    debris = [path.name for path in workdir.iterdir() if path.name not in BELONGS]
    debris += [str(path) for path in checkpoints.iterdir() if not path.name.isdigit()]
    debris += [str(checkpoints / str(step)) for step in steps if not complete(checkpoints / str(step))]
    debris += [f"{len(steps)} checkpoints"] if len(steps) > 3 else []
    json.loads((workdir / "run.json").read_text())
    return Record(
        arrays={name: x for item in ("params", "router_bias", "opt", "rng") for name, x in arrays(newest / item)},
        data=json.loads(next((newest / "data").glob("process_*.json")).read_text()),
        extra=json.loads((newest / "extra" / "metadata").read_text()),
        lines=json_lines(workdir / "metrics.jsonl", COMPARED),
        steps=json_lines(workdir / "steps.jsonl", ("",)),
        curves=curves(workdir / "tensorboard"),
        batches=batches(Path(f"{workdir}.batches")),
        debris=debris,
    )


def newest_checkpoint(workdir: Path) -> int:
    """The newest step that is there; 0 if there is none. It has to be complete."""
    newest = max((path for path in workdir.glob("checkpoints/*") if path.name.isdigit()), key=step_of, default=None)
    if newest is None:
        return 0
    assert complete(newest), f"{newest} lacks some of its items"
    return step_of(newest)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name)


def complete(checkpoint: Path) -> bool:
    """Every item of a checkpoint is there and was committed."""
    items = ("params", "router_bias", "opt", "rng", "data", "extra")
    return all((checkpoint / item / "commit_success.txt").exists() for item in items)


def arrays(item: Path) -> Iterator[tuple[str, str]]:
    """(name, dtype, shape and a hash of the bits) of every array of a checkpoint's item."""
    reader = ocp.PyTreeCheckpointer()
    stored = reader.metadata(item).item_metadata.tree
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
    for path, x in jax.tree_util.tree_leaves_with_path(reader.restore(item, restore_args=on_host)):
        bits = hashlib.sha256(x.tobytes()).hexdigest()
        yield f"{item.name}/{jax.tree_util.keystr(path, simple=True, separator='/')}", f"{x.dtype}{x.shape} {bits}"


def differences(got: Record, want: Record, stopped: bool = False) -> list[str]:
    """What is not the same, one line each; none if nothing was noticed of the kills.

    A run that was `stopped` logs once more where it stops, so that its windows differ; its steps do not.

    TensorBoard's files are written every few seconds: points of the last ones before a kill may be missing there (and
    are in metrics.jsonl), but none may be wrong or there twice.
    """
    found = [f"debris: {name}" for name in got.debris]
    got = got._replace(curves={**want.curves, **got.curves})
    for part in ("arrays", "data", "extra", "lines", "steps", "curves", "batches"):
        a, b = getattr(got, part), getattr(want, part)
        if stopped and part in ("lines", "curves"):
            a, b = ({name: x for name, x in of.items() if " eval/" in name} for of in (a, b))
        names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
        found += [f"{part}: {name}: {a.get(name)}, not {b.get(name)}" for name in names]
    return found


def json_lines(path: Path, compared: tuple[str, ...]) -> dict[str, list]:
    found: dict[str, list] = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        for name, value in values.items():
            if name.startswith(compared) and name != "time":
                found.setdefault(f"step {values['step']} {name}", []).append(value)
    return found


def curves(folder: Path) -> dict[str, list]:
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found: dict[str, list] = {}
    for name in board.Tags()["scalars"]:
        if name.startswith(COMPARED):
            for event in board.Scalars(name):
                found.setdefault(f"step {event.step} {name}", []).append(event.value)
    return found


def batches(path: Path) -> dict[str, list]:
    found: dict[str, set] = {}
    for line in path.read_text().splitlines():
        step, digest = line.split()
        found.setdefault(step, set()).add(digest)
    return {step: sorted(digests) for step, digests in found.items()}
