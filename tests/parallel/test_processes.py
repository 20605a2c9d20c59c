"""Several processes through launch/local.py: how they join and agree, the same losses and rows as one, kills and stops.

The processes have one simulated device each, so that two of them have the mesh that one process has of two devices.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from llamax.config import ConfigError
from llamax.parallel import processes
from llamax.run import train
from llamax.train import programs
from tests.process_child import rows_of, shared_run

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCHER = [sys.executable, "launch/local.py"]
CHILD = [sys.executable, "-m", "tests.process_child"]
SAME_LOSS = 1e-5
END_S = 15  # after the death of one process
TIMEOUT_S = 300
TERMINATED = 143


class Job:
    """A launcher with its processes; `lines` holds what they have said so far."""

    def __init__(self, n: int, *words: str, devices: int = 1):
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        how = dict(cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.process = subprocess.Popen([*LAUNCHER, "-n", f"{n}", "--", *CHILD, *words], text=True, **how)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self._reader.start()

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        code = self.process.wait(timeout_s)
        self._reader.join(10)
        return code

    def wait_for(self, text: str, times: int = 1) -> list[str]:
        ends = time.monotonic() + TIMEOUT_S
        while len(found := [line for line in self.lines if text in line]) < times:
            assert time.monotonic() < ends and self.process.poll() is None, f"no {text!r} in\n{self.said}"
            time.sleep(0.02)
        return found

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()


def run_job(n: int, *words: str, code: int = 0, devices: int = 1) -> str:
    with Job(n, *words, devices=devices) as job:
        assert job.wait() == code, job.said
        return job.said


# --------------------------------------------------------------------------------------------------- joining, agreeing


def test_alone_nothing_is_started():
    processes.start({})
    assert not processes.several() and processes.is_first() and processes.number() == 0
    assert processes.from_first(lambda: 7) == 7
    assert processes.gather("x") == ["x"]
    assert processes.summed([2, 3.5]) == [2, 3.5]
    assert processes.explicit({"LLAMAX_COORDINATOR": "h:1", "LLAMAX_PROCESSES": "1", "LLAMAX_PROCESS": "0"}) is None


def test_explicit_variables():
    job = {"LLAMAX_COORDINATOR": "host:1234", "LLAMAX_PROCESSES": "4"}
    found = processes.explicit(job | {"LLAMAX_PROCESS": "3"})
    assert found == {
        "coordinator_address": "host:1234",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }
    assert processes.explicit(job | {"JOB_COMPLETION_INDEX": "2"})["process_id"] == 2, "Kubernetes numbers its pods"
    for wrong in (
        {},
        {"LLAMAX_PROCESS": "4"},
        {"LLAMAX_PROCESS": "x"},
        {"LLAMAX_PROCESS": "0", "LLAMAX_PROCESSES": ""},
    ):
        with pytest.raises(ConfigError, match="LLAMAX_PROCESSES=.*Set all three"):
            processes.explicit(job | wrong)


SLURM = {"SLURM_JOB_ID": "5", "SLURM_STEP_NODELIST": "node[07-09],x1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2", "TPU_WORKER_ID": "2", "TPU_SKIP_MDS_QUERY": "1"}


def test_clusters_are_found_by_their_variables(monkeypatch):
    assert processes.of_cluster(os.environ, 1) is None
    for name, value in (SLURM | {"SLURM_PROCID": "3"}).items():
        monkeypatch.setenv(name, value)
    found = processes.of_cluster(os.environ, 1)
    assert found == {"coordinator_address": "node07:61445", "num_processes": 4, "process_id": 3}
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert processes.of_cluster(os.environ, 1) is None, "a job of one process starts nothing"
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # a pod of its own, without the right to ask for others
    assert processes.of_cluster(os.environ, 1) is None


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        how = {"coordinator_address": f"127.0.0.1:{taken.getsockname()[1]}", "process_id": 0}
        with pytest.raises(ConfigError, match=f"port {taken.getsockname()[1]}, but .*in use"):
            processes.check_port(how)
    processes.check_port(how)


def test_two_processes_agree():
    said = run_job(2, "meet")
    for number in range(2):
        line = next(line for line in said.splitlines() if line.startswith(f"[{number}] {{"))
        found = json.loads(line.partition(" ")[2])
        assert found == {
            "agreed": [0, 0, 15, 0],
            "total": [2.0, 1.0],
            "refused": "A, but process 0 says no. C.",
            "decided": "by 0",
        }


def test_a_process_with_other_settings_is_named_by_all():
    said = run_job(2, "meet", "--differ", code=2)
    for number in range(2):
        assert f"[{number}] llamax: Process 1 on " in said
    assert said.count("its recipe and settings differ") == 2


def test_a_process_that_never_comes(monkeypatch):
    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        patch.setattr(processes, "leave", sys.exit)
        processes.give_up({"process_id": 1, "num_processes": 3, "coordinator_address": "h:1"}, 55)
    job = {"LLAMAX_COORDINATOR": "127.0.0.1:1", "LLAMAX_PROCESSES": "2", "LLAMAX_PROCESS": "1", "LLAMAX_JOIN_S": "1"}
    start = time.monotonic()
    done = subprocess.run([*CHILD, "wait"], cwd=ROOT, env=os.environ | job, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and time.monotonic() - start < 60
    assert "Process 1 on" in done.stderr and "127.0.0.1:1, but not all of them have come within 1 s" in done.stderr


# --------------------------------------------------------------------------------------------------------------- rows


PUTS_ITS_ROWS = """
import sys
import jax
import numpy as np

rank, address = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(address, 2, rank)

from llamax.batch import Batch
from llamax.parallel.mesh import make_mesh
from llamax.parallel.place import fetch, put_batch, put_whole_batch, replicate, rows_here

mesh = make_mesh({"data": 2, "fsdp": 2})
text = np.arange(32, dtype=np.int32).reshape(8, 4)
tiles = np.arange(96, dtype=np.uint8).reshape(8, 1, 2, 2, 3)
whole = Batch(*[text + i for i in range(6)], tiles=tiles)
mine = slice(4 * rank, 4 * rank + 4)
assert rows_here(mesh, 8) == range(4 * rank, 4 * rank + 4)
batch = put_batch(Batch(*(x[mine] for x in whole)), mesh)
for placed, back, want in zip(batch, fetch(batch), whole):
    assert placed.shape == want.shape, (placed.shape, want.shape)
    assert all(s.data.shape[0] == 2 for s in placed.addressable_shards)
    np.testing.assert_array_equal(back, want)
across = make_mesh({"fsdp": 2, "context": 2})  # tokens over the devices of a process, rows over processes
for mesh in (across, make_mesh({"tensor": 2, "data": 2}), make_mesh({"tensor": 4}), make_mesh({"context": 4})):
    here = rows_here(mesh, 8)
    assert len(here) == (8 if mesh.shape["tensor"] == 4 or mesh.shape["context"] == 4 else 4), (mesh, here)
    share = Batch(*(x[here.start : here.stop] for x in whole))
    for batch in (put_batch(share, mesh, 8), put_whole_batch(whole, mesh)):
        for back, want in zip(fetch(batch), whole):
            np.testing.assert_array_equal(back, want)
np.testing.assert_array_equal(fetch(replicate(text, mesh)), text)
print("rank", rank, "agrees")
"""


@pytest.mark.slow
def test_each_process_puts_its_own_rows():
    """Two processes of two devices each, on meshes that split rows over processes, and on those that do not."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    pipes = dict(env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    workers = [
        subprocess.Popen([sys.executable, "-c", PUTS_ITS_ROWS, str(rank), address], **pipes) for rank in range(2)
    ]
    try:
        for rank, worker in enumerate(workers):
            output, _ = worker.communicate(timeout=120)
            assert f"rank {rank} agrees" in output, output
    finally:
        for worker in workers:
            worker.kill()


# -------------------------------------------------------------------------------------------------------- the launcher


def test_dry_run_and_help():
    how = dict(cwd=ROOT, capture_output=True, text=True, timeout=60)
    done = subprocess.run([*LAUNCHER, "-n", "2", "--gpus-each", "4", "--dry-run", "--", "llamax", "train", "R"], **how)
    first, second = done.stdout.splitlines()
    assert "LLAMAX_PROCESSES=2 LLAMAX_PROCESS=0" in first and first.endswith(
        "JAX_LOCAL_DEVICE_IDS=0,1,2,3 llamax train R"
    )
    assert "LLAMAX_PROCESS=1" in second and "JAX_LOCAL_DEVICE_IDS=4,5,6,7" in second
    said = subprocess.run([*LAUNCHER, "--help"], **how).stdout
    assert "examples:" in said and "-n 4 -- llamax train" in said
    assert subprocess.run([*LAUNCHER, "-n", "0", "--", "true"], **how).returncode == 2
    missing = subprocess.run([*LAUNCHER, "-n", "2", "--", "no-such-command"], **how)
    assert missing.returncode == 2 and "no-such-command cannot be started" in missing.stderr


def test_one_killed_ends_the_others_in_time_and_is_named():
    with Job(2, "wait") as job:
        pids = {line.split()[0]: int(line.split()[2]) for line in job.wait_for("] pid ", times=2)}
        time.sleep(0.5)
        os.kill(pids["[1]"], signal.SIGKILL)
        start = time.monotonic()
        code = job.wait(60)
        assert time.monotonic() - start < END_S, job.said
        assert code == 128 + signal.SIGKILL
        assert "process 1 was killed by SIGKILL" in job.said
        assert not Path(f"/proc/{pids['[0]']}").exists() or not hasattr(os, "sched_getaffinity")


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """Six steps of one process with two devices; rows recorded like those of the others."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    run_here(workdir, 6)
    return workdir


def run_here(workdir: Path, steps: int) -> None:
    call = programs.Programs.__call__

    def recording(self, state, batch):
        with Path(f"{workdir}.rows.0.jsonl").open("a") as file:
            for line in rows_of(int(jax.device_get(state.step)) + 1, batch):
                file.write(json.dumps(line) + "\n")
        return call(self, state, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs.Programs, "__call__", recording)
        assert train(shared_run(steps), workdir, devices=jax.devices()[:2]).finished


def rows(workdir: Path) -> dict[tuple[int, int], str]:
    """(step, row) -> its hash; a row that was read twice is the same."""
    found: dict[tuple[int, int], str] = {}
    for path in sorted(workdir.parent.glob(f"{workdir.name}.rows.*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            key = line["step"], line["row"]
            assert found.setdefault(key, line["sha"]) == line["sha"], f"{key} is not what it was"
    return found


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in map(json.loads, (workdir / "steps.jsonl").read_text().splitlines())}


def assert_same(workdir: Path, unbroken: Path, steps: int) -> None:
    want, got = losses(unbroken), losses(workdir)
    assert list(got) == list(range(1, steps + 1))
    np.testing.assert_allclose([got[s] for s in got], [want[s] for s in got], rtol=0, atol=SAME_LOSS)
    assert rows(workdir) == {key: sha for key, sha in rows(unbroken).items() if key[0] <= steps}


def test_two_processes_then_one_are_one_unbroken_run(unbroken, tmp_path):
    """A SIGTERM to process 1 alone stops both after the same step; one process goes on from what they saved."""
    workdir = tmp_path / "run"
    said = run_job(2, "train", f"{workdir}", "6", "--signal", "3:1", code=TERMINATED)
    stopped = max(losses(workdir))
    assert 3 <= stopped <= 5, said
    assert max(checkpoints(workdir)) == stopped, "what was done is saved"
    mine = {line["row"] for line in map(json.loads, Path(f"{workdir}.rows.1.jsonl").read_text().splitlines())}
    assert mine == {4, 5, 6, 7}, "process 1 has read its share alone"
    assert not [line for line in said.splitlines() if line.startswith("[1]") and "Gloo" not in line], said
    assert_same(workdir, unbroken, stopped)
    run_here(workdir, 6)
    assert_same(workdir, unbroken, 6)


def checkpoints(workdir: Path) -> list[int]:
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
