"""Several processes: how they find each other, join and agree; every wrong start is told by all of them."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from jax._src.clusters import cloud_tpu_cluster

from llamax.config import ConfigError
from llamax.parallel import processes
from tests.jobs import CHILD, ROOT, Job, free_port, run_children
from tests.xla_flags import quick_flags

IN_TIME_S = 60  # of a wrong start

# --------------------------------------------------------------------------------------------------- joining, agreeing


def test_alone_nothing_is_started():
    processes.start({})
    assert not processes.several() and processes.is_first() and processes.number() == 0
    assert processes.from_first(lambda: 7) == 7
    assert processes.from_all("x", list) == ["x"] and processes.together(lambda: 8) == 8
    assert processes.largest(np.array([[3, 4]])).tolist() == [[3, 4]]
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


def set_all(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def found_here() -> dict | None:
    return processes.of_cluster(os.environ, 1)


def joins(address: str, n: int, number: int, **more) -> dict:
    plain = {"coordinator_address": address, "num_processes": n, "process_id": number}
    return plain | {"cluster_detection_method": "deactivate"} | more


# What `srun env` and `mpirun env` show of a process, in a job of 2 nodes x 2 tasks.
SLURM = {
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_slurm_is_found_by_its_variables(monkeypatch):
    assert found_here() is None
    set_all(monkeypatch, SLURM)
    assert found_here() == joins("node07:61445", 4, 3, local_device_ids=[1]), "a device for each task of a node"
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "2,3")
    assert found_here() == joins("node07:61445", 4, 3), "jax reads the variable"
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS")
    set_all(monkeypatch, {"SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NODELIST": "a1,node[07-09]", "SLURM_LOCALID": "0"})
    assert found_here() == joins("a1:61445", 4, 3), "all devices of its node"
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
    assert found_here() == joins("a1:1234", 4, 3)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert found_here() is None, "a job of one process starts nothing"


def test_open_mpi_is_found_by_its_variables(monkeypatch):
    set_all(monkeypatch, OPEN_MPI)
    port = 1531576320 // 2**12 % 2**12 + (65535 - 2**12 + 1)
    assert found_here() == joins(f"10.96.0.1:{port}", 4, 2, local_device_ids=[0])
    set_all(monkeypatch, {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    assert found_here() == joins(f"10.96.0.1:{port}", 4, 2)


def test_tpu_pods_are_found_by_variables_or_metadata(monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.2")
    one_slice = {"TPU_WORKER_HOSTNAMES": "t0.jobs,t1.jobs,t2.jobs,t3.jobs", "TPU_WORKER_ID": "2"}  # of GKE
    multi = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "m0.jobs:8080"}
    metadata = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unknown:unknown:10.130.0.5,unknown:unknown:10.130.0.6",
        "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\nWORKER_ID: '1'\n",
    }
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    with monkeypatch.context() as patch:
        set_all(patch, one_slice | {"TPU_SKIP_MDS_QUERY": "1", "MEGASCALE_COORDINATOR_ADDRESS": ""})
        set_all(patch, {"MEGASCALE_NUM_SLICES": "", "MEGASCALE_SLICE_ID": ""})
        assert found_here() == joins("t0.jobs:8482", 4, 2)
        set_all(patch, multi)
        assert found_here() == joins("m0.jobs:8482", 8, 6), "slice 1 comes after the four workers of slice 0"
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)  # jax sets it where there are no TPUs
    assert found_here() == joins("10.130.0.5:8482", 2, 1), "a pod of TPU VMs asks its metadata server"


def test_a_coordinator_without_a_name_is_told(monkeypatch):
    def unknown(name):
        raise socket.gaierror

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(socket, "gethostbyname", unknown)
    monkeypatch.setattr(cloud_tpu_cluster.time, "sleep", lambda _: time.perf_counter())
    variables = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
    set_all(monkeypatch, {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"} | dict.fromkeys(variables, ""))
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    with pytest.raises(processes.Missing, match=f"{platform.node()} belongs to, but .* address t0") as raised:
        found_here()
    assert raised.value.exit_code == 1, "another try may do"


def test_a_pod_of_its_own_is_alone(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # without the right to ask for others
    assert found_here() is None


def test_heartbeats_and_patience_are_handed_on(monkeypatch):
    asked = {}
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **how: asked.update(how))
    monkeypatch.setattr(processes.sys, "excepthook", sys.excepthook)
    job = {"LLAMAX_COORDINATOR": "host:1", "LLAMAX_PROCESSES": "2", "LLAMAX_PROCESS": "1"}
    preemption = processes.jax.config.jax_enable_preemption_service
    try:
        processes.start(job)
        assert asked["heartbeat_timeout_seconds"] == 100 and asked["initialization_timeout"] > 55
        processes.start(job | {"LLAMAX_HEARTBEAT_S": "10", "LLAMAX_JOIN_S": "600"})
        assert asked["heartbeat_timeout_seconds"] == 10 and asked["initialization_timeout"] > 600
    finally:
        processes.jax.config.update("jax_enable_preemption_service", preemption)


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        how = {"coordinator_address": f"127.0.0.1:{taken.getsockname()[1]}", "process_id": 0}
        with pytest.raises(ConfigError, match=f"port {taken.getsockname()[1]}, but .*in use"):
            processes.check_port(how)
    processes.check_port(how)


def test_two_processes_agree():
    said = run_children(2, "meet")
    for number in range(2):
        line = next(line for line in said.splitlines() if line.startswith(f"[{number}] {{"))
        found = json.loads(line.partition(" ")[2])
        assert found == {
            "agreed": [0, 0, 15, 0],
            "total": [2.0, 1.0],
            "refused": "A, but process 0 says no. C.",
            "decided": "by 0",
        }


# -------------------------------------------------------------------------------------------------------- wrong starts


def by_hand(number: int, n: int, port: int, *words: str, cwd: Path = ROOT, devices: int = 1, **environment: str) -> Job:
    """One process of a job, without a launcher that would end the others."""
    job = {"LLAMAX_COORDINATOR": f"127.0.0.1:{port}", "LLAMAX_PROCESSES": f"{n}", "LLAMAX_PROCESS": f"{number}"}
    return Job([*CHILD, *words], cwd, **job, XLA_FLAGS=quick_flags(devices), **environment)


def ends(*jobs: Job) -> list[tuple[int, str]]:
    """Exit code and words of each; within the minute that a wrong start may take."""
    start = time.monotonic()
    try:
        found = [(job.wait(IN_TIME_S), job.said) for job in jobs]
        assert time.monotonic() - start < IN_TIME_S
        return found
    finally:
        for job in jobs:
            job.process.kill()


def test_a_process_with_other_settings_is_named_by_all():
    said = run_children(2, "meet", "--differ", code=2)
    for number in range(2):
        assert f"[{number}] llamax: Process 1 on " in said
    assert said.count("its recipe and settings differ: {'seed': 1} there, {'seed': 0} in process 0") == 2


@pytest.mark.slow
def test_another_number_of_devices_is_told_by_all():
    port = free_port()
    for code, said in ends(by_hand(0, 2, port, "meet"), by_hand(1, 2, port, "meet", devices=2)):
        assert code == 2 and f"llamax: Process 1 on {platform.node()} in one job" in said
        assert "its devices differ: 2 there, 1 in process 0" in said


@pytest.mark.slow
def test_other_code_is_told_by_all(tmp_path):
    for folder in ("llamax", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    with (tmp_path / "llamax" / "run.py").open("a") as file:
        file.write("# changed\n")
    port = free_port()
    environment = {"PYTHONPATH": ""}  # the folder of the process comes first
    jobs = (by_hand(0, 2, port, "meet", **environment), by_hand(1, 2, port, "meet", cwd=tmp_path, **environment))
    for code, said in ends(*jobs):
        assert code == 2 and f"llamax: Process 1 on {platform.node()} in one job" in said
        assert "its code differ: {'run.py': " in said


@pytest.mark.slow
def test_what_one_host_alone_finds_wrong_is_told_by_all():
    port = free_port()
    for code, said in ends(*(by_hand(i, 2, port, "refuse") for i in range(2))):
        assert code == 2 and f"llamax: Process 1 on {platform.node()}: --x, but y is missing. Bring it." in said


@pytest.mark.slow
def test_a_port_in_use_ends_all():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        first, second = ends(*(by_hand(i, 2, port, "wait", LLAMAX_JOIN_S="8") for i in range(2)))
    assert first[0] == 2 and f"Process 0 on {platform.node()} at port {port}, but it cannot be had" in first[1]
    assert second[0] == 1 and f"127.0.0.1:{port}, but not all of them have come within 8 s" in second[1]


@pytest.mark.slow
@pytest.mark.parametrize("there", ((1, 2), (0, 1)), ids=("without the coordinator", "without another one"))
def test_one_that_is_missing_ends_all(there):
    port = free_port()
    for number, (code, said) in zip(
        there, ends(*(by_hand(i, 3, port, "wait", LLAMAX_JOIN_S="8") for i in there)), strict=True
    ):
        assert code == 1 and f"Process {number} on {platform.node()} in a job of 3" in said
        assert "not all of them have come within 8 s" in said


def test_a_process_that_never_comes(monkeypatch):
    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        patch.setattr(processes, "end", sys.exit)
        processes.give_up({"process_id": 1, "num_processes": 3, "coordinator_address": "h:1"}, 55)
    job = {"LLAMAX_COORDINATOR": "127.0.0.1:1", "LLAMAX_PROCESSES": "2", "LLAMAX_PROCESS": "1", "LLAMAX_JOIN_S": "1"}
    start = time.monotonic()
    done = subprocess.run([*CHILD, "wait"], cwd=ROOT, env=os.environ | job, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and time.monotonic() - start < 60
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
assert rows_here(mesh, 8) == tuple(range(4 * rank, 4 * rank + 4))
batch = put_batch(jax.tree.map(lambda x: x[mine], whole), mesh, 8)
for placed, back, want in zip(*map(jax.tree.leaves, (batch, fetch(batch), whole))):
    assert placed.shape == want.shape, (placed.shape, want.shape)
    assert all(s.data.shape[0] == 2 for s in placed.addressable_shards)
    np.testing.assert_array_equal(back, want)
across = make_mesh({"fsdp": 2, "context": 2})  # tokens over the devices of a process, rows over processes
apart = make_mesh({"data": 4}, [jax.devices()[i] for i in (0, 2, 1, 3)])  # a process's rows do not stand together
assert rows_here(apart, 8) == ((0, 1, 4, 5), (2, 3, 6, 7))[rank]
for mesh in (across, apart, make_mesh({"tensor": 2, "data": 2}), make_mesh({"tensor": 4}), make_mesh({"context": 4})):
    here = rows_here(mesh, 8)
    assert len(here) == (8 if mesh.shape["tensor"] == 4 or mesh.shape["context"] == 4 else 4), (mesh, here)
    share = jax.tree.map(lambda x: x[list(here)], whole)
    for batch in (put_batch(share, mesh, 8), put_whole_batch(whole, mesh)):
        for back, want in zip(fetch(batch), whole):
            np.testing.assert_array_equal(back, want)
np.testing.assert_array_equal(fetch(replicate(text, mesh)), text)
print("rank", rank, "agrees")
"""


@pytest.mark.slow
def test_each_process_puts_its_own_rows():
    """Two processes of two devices each, on meshes that split rows over processes, and on those that do not."""
    address = f"127.0.0.1:{free_port()}"
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
