"""Several processes train: the same losses and rows as one, whatever their number and mesh, through stops and kills.

Most have one simulated device each, so that two of them have the mesh that one process has of two devices.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from llamax.run import train
from llamax.train import programs
from tests.jobs import CHILD, END_S, LAUNCHER, ROOT, TERMINATED, Job, children, run_children
from tests.process_child import asked_run, rows_of, shared_run, staged_run
from tests.xla_flags import quick_flags

SAME_LOSS = 1e-5
KILLED = 128 + signal.SIGKILL
STEPS = 6


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """Six steps of one process with two devices; rows recorded like those of the others."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    run_here(workdir)
    return workdir


def run_here(workdir: Path) -> None:
    call = programs.Programs.__call__

    def recording(self, state, batch):
        with Path(f"{workdir}.rows.0.jsonl").open("a") as file:
            for line in rows_of(int(jax.device_get(state.step)) + 1, batch):
                file.write(json.dumps(line) + "\n")
        return call(self, state, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs.Programs, "__call__", recording)
        assert train(shared_run(STEPS), workdir, devices=jax.devices()[:2]).finished


def rows(workdir: Path) -> dict[tuple[int, int], str]:
    """(step, row) -> its hash; a row that was read twice is the same."""
    found: dict[tuple[int, int], str] = {}
    for path in sorted(workdir.parent.glob(f"{workdir.name}.rows.*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            key = line["step"], line["row"]
            assert found.setdefault(key, line["sha"]) == line["sha"], f"{key} is not what it was"
    return found


def rows_of_process(workdir: Path, number: int) -> set[int]:
    return {line["row"] for line in map(json.loads, Path(f"{workdir}.rows.{number}.jsonl").read_text().splitlines())}


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in map(json.loads, (workdir / "steps.jsonl").read_text().splitlines())}


def checkpoints(workdir: Path) -> list[int]:
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]


def assert_same(workdir: Path, unbroken: Path, steps: int = STEPS) -> None:
    want, got = losses(unbroken), losses(workdir)
    assert list(got) == list(range(1, steps + 1))
    np.testing.assert_allclose([got[s] for s in got], [want[s] for s in got], rtol=0, atol=SAME_LOSS)
    assert rows(workdir) == {key: sha for key, sha in rows(unbroken).items() if key[0] <= steps}


def stopped_early(workdir: Path, unbroken: Path, n: int, *words: str, devices: int = 1) -> str:
    """A SIGTERM to the last process alone stops all after the same step, which is saved; what they said."""
    strike = f"3:{n - 1}"
    said = run_children(
        n, "train", f"{workdir}", f"{STEPS}", "--signal", strike, *words, code=TERMINATED, devices=devices
    )
    stopped = max(losses(workdir))
    assert 3 <= stopped < STEPS, said
    assert max(checkpoints(workdir)) == stopped, "what was done is saved"
    assert_same(workdir, unbroken, stopped)
    return said


def test_two_processes_then_one_are_one_unbroken_run(unbroken, tmp_path):
    workdir = tmp_path / "run"
    said = stopped_early(workdir, unbroken, 2)
    assert rows_of_process(workdir, 1) == {4, 5, 6, 7}, "process 1 has read its share alone"
    assert not [line for line in said.splitlines() if line.startswith("[1]") and "Gloo" not in line], said
    run_here(workdir)
    assert_same(workdir, unbroken)


@pytest.mark.slow
def test_two_processes_in_stages_are_one(unbroken, tmp_path):
    """From the weights of another run; stopped in the second stage, on another mesh, and gone on with."""
    alone, several = tmp_path / "alone", tmp_path / "several"
    assert train(staged_run(STEPS, f"{unbroken}"), alone, devices=jax.devices()[:2]).finished
    words = ("train", f"{several}", f"{STEPS}", "--stages", f"{unbroken}")
    run_children(2, *words, "--signal", "4:1", code=TERMINATED)
    assert STEPS // 2 < max(losses(several)) < STEPS, "in the second stage"
    run_children(2, *words)
    want, got = losses(alone), losses(several)
    assert list(got) == list(range(1, STEPS + 1)) and {STEPS // 2, STEPS} <= set(checkpoints(several))
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=0, atol=SAME_LOSS)


@pytest.mark.slow
def test_two_processes_are_asked_as_one_is(tmp_path):
    """Needles and loss by position at the end of training, with weights and rows over the devices of both."""
    alone, several = tmp_path / "alone", tmp_path / "several"
    assert train(asked_run(3), alone, devices=jax.devices()[:2]).finished
    run_children(2, "train", f"{several}", "3", "--ask")
    want, got = figures(alone), figures(several)
    assert {"eval/far/accuracy", "eval/far/needle/128", "eval/position/nats/256"} <= want.keys() == got.keys()
    np.testing.assert_allclose([got[name] for name in want], list(want.values()), rtol=0, atol=SAME_LOSS)


def figures(workdir: Path) -> dict[str, float]:
    """Of evaluations."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {name: value for line in lines for name, value in line.items() if name.startswith("eval/")}


@pytest.mark.slow
def test_one_process_then_four(unbroken, tmp_path):
    workdir = tmp_path / "run"
    stopped_early(workdir, unbroken, 1, devices=2)
    run_children(4, "train", f"{workdir}", f"{STEPS}", "--mesh", "fsdp=4")
    assert_same(workdir, unbroken)
    assert rows_of_process(workdir, 3) == {6, 7}


@pytest.mark.slow
def test_four_processes_then_one(unbroken, tmp_path):
    workdir = tmp_path / "run"
    stopped_early(workdir, unbroken, 4, "--mesh", "data=4")
    run_here(workdir)
    assert_same(workdir, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("third", ("expert", "tensor"))
def test_a_mesh_of_2x2x2_goes_on_as_4x1x1(unbroken, tmp_path, third):
    """Four processes of two devices each, then of one."""
    workdir = tmp_path / "run"
    stopped_early(workdir, unbroken, 4, "--mesh", f"data=2,fsdp=2,{third}=2", devices=2)
    run_children(4, "train", f"{workdir}", f"{STEPS}", "--mesh", "data=4")
    assert_same(workdir, unbroken)


def killed(workdir: Path, n: int, victim: int) -> None:
    """Process `victim` dies before step 4, of which the others have begun their part."""
    with children(n, "train", f"{workdir}", f"{STEPS}", "--mesh", f"fsdp={n}", "--kill", f"4:{victim}") as job:
        code = job.wait()
        took = time.time() - float(Path(f"{workdir}.killed").read_text())
        assert took < END_S, f"{took} s\n{job.said}"
        assert code == KILLED, job.said
        assert f"process {victim} was killed by SIGKILL; the others end too" in job.said


@pytest.mark.slow
@pytest.mark.parametrize(("n", "victim"), ((2, 1), (2, 0), (4, 2)))
def test_a_kill_ends_all_in_time_and_the_next_start_goes_on(unbroken, tmp_path, n, victim):
    workdir = tmp_path / "run"
    killed(workdir, n, victim)
    assert max(checkpoints(workdir), default=0) < 4
    run_children(n, "train", f"{workdir}", f"{STEPS}", "--mesh", f"fsdp={n}")
    assert_same(workdir, unbroken)


@pytest.mark.slow
def test_the_launcher_starts_again_after_a_kill(unbroken, tmp_path):
    workdir = tmp_path / "run"
    once = f'test -e {workdir}.killed || words="--kill 4:1"; exec {" ".join(CHILD)} train {workdir} {STEPS} $words'
    command = [*LAUNCHER, "-n", "2", "--restarts", "1", "--", "sh", "-c", once]
    with Job(command, XLA_FLAGS=quick_flags(1)) as job:
        assert job.wait() == 0, job.said
        assert "starting all of them again" in job.said
    assert_same(workdir, unbroken)


RECIPE = """
from llamax import config
from tests.process_child import shared_run


def get_config(size="full"):
    return config.to_config(shared_run(6))
"""


@pytest.mark.slow
def test_four_processes_by_the_command_line(unbroken, tmp_path):
    """As a person types it: launch/local.py -n 4 -- llamax train RECIPE ..."""
    recipe, llamax = tmp_path / "recipe.py", Path(sys.executable).with_name("llamax")
    recipe.write_text(RECIPE)
    words = ["train", f"{recipe}", "--workdir", f"{tmp_path / 'run'}", "--config.mesh.data=-1", "--config.mesh.fsdp=1"]
    command = [*LAUNCHER, "-n", "4", "--", f"{llamax}", *words]
    with Job(command, XLA_FLAGS=quick_flags(1), PYTHONPATH=f"{ROOT}") as job:
        assert job.wait() == 0, job.said
    want, got = losses(unbroken), losses(tmp_path / "run")
    np.testing.assert_allclose([*got.values()], [*want.values()], rtol=0, atol=SAME_LOSS)
