"""Every launcher in launch/: it starts the command on all processes, hands a stop to them, starts again to a limit.

srun, gcloud and kubectl are stand-ins (fake_cluster.py) that run the commands here.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.jobs import CHILD, END_S, LAUNCHER, ROOT, TERMINATED, Job, children, free_port
from tests.launch.jobset_schema import JOB_SET, problems

SCRIPTS = [ROOT / "launch" / name for name in ("slurm.sbatch", "tpu_pod.sh", "k8s/submit.sh")]
WORKER = [sys.executable, f"{ROOT / 'tests' / 'launch' / 'worker.py'}"]
NAMES = ("local", "slurm", "tpu_pod", "k8s")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder on the PATH with srun, scontrol, gcloud and kubectl; `calls()` is what they were asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "scontrol", "gcloud", "kubectl"):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/launch/fake_cluster.py {name} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", f"{tmp_path / 'calls'}")
    monkeypatch.setenv("FAKE_HOME", f"{tmp_path / 'homes'}")
    for variable in ("LLAMAX_RESTARTS", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)
    return lambda: (tmp_path / "calls").read_text().splitlines()


def launched(name: str, *command: str, restarts: int = 0, dry_run: bool = False) -> tuple[list[str], dict[str, str]]:
    """The launcher's command, and its environment."""
    dry = ["--dry-run"] * dry_run
    again = ["--restarts", f"{restarts}"]
    folder = ROOT / "launch"
    if name == "local":
        return [*LAUNCHER, "-n", "2", *again, *dry, "--", *command], {}
    if name == "slurm":
        return ["bash", f"{folder / 'slurm.sbatch'}", *dry, *command], {"LLAMAX_RESTARTS": f"{restarts}"}
    if name == "tpu_pod":
        to = ["--name", "pod", "--zone", "z1", "--dir", f"{ROOT}"]
        return [f"{folder / 'tpu_pod.sh'}", *to, *again, *dry, "--", *command], {}
    to = ["--name", "scout", "--image", "registry/llamax:1", "--processes", "2", "--claim", "shared"]
    more = ["--resource", "nvidia.com/gpu=8", "--select", "gpu=h100"]
    return [f"{folder / 'k8s' / 'submit.sh'}", *to, *more, *again, *dry, "--", *command], {}


def launch(name: str, *command: str, restarts: int = 0) -> Job:
    words, environment = launched(name, *command, restarts=restarts)
    return Job(words, **environment)


def starts(tmp_path: Path) -> list[str]:
    return sorted((tmp_path / "starts").read_text().split())


# ---------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", NAMES)
def test_a_sigterm_reaches_the_processes_and_nothing_is_started_again(name, cluster, tmp_path):
    with launch(name, *WORKER, f"{tmp_path}", "wait", restarts=2) as job:
        job.wait_for("is there", times=2)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(30) == TERMINATED, job.said
        assert all(f"worker {number} saved" in job.said for number in range(2))
    assert starts(tmp_path) == ["0", "1"]


@pytest.mark.parametrize("name", NAMES[:3])  # a JobSet that is deleted is gone
def test_a_failure_while_stopping_is_not_followed_by_another_start(name, cluster, tmp_path):
    with launch(name, *WORKER, f"{tmp_path}", "wait", "7", restarts=2) as job:
        job.wait_for("is there", times=2)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(30) == 7, job.said
    assert starts(tmp_path) == ["0", "1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_is_followed_by_another_start_to_a_limit(name, cluster, tmp_path):
    with launch(name, *WORKER, f"{tmp_path}", "fail", "9", "7", restarts=2) as job:
        assert job.wait(60) == 7, job.said
    assert starts(tmp_path) == ["0", "0", "0", "1", "1", "1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_that_passes_is_no_failure(name, cluster, tmp_path):
    with launch(name, *WORKER, f"{tmp_path}", "fail", "1", "7", restarts=2) as job:
        assert job.wait(60) == 0, job.said
    assert starts(tmp_path) == ["0", "0", "1", "1"]


@pytest.mark.parametrize("name", NAMES)
def test_wrong_input_is_not_tried_again(name, cluster, tmp_path):
    with launch(name, *WORKER, f"{tmp_path}", "fail", "9", "2", restarts=2) as job:
        assert job.wait(60) == 2, job.said
    assert starts(tmp_path) == ["0", "1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_shows_the_command_and_starts_nothing(name, tmp_path):
    command, environment = launched(name, "llamax", "train", "R", "--workdir", "a b", dry_run=True)
    environment = os.environ | environment | {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    shown = {
        "local": "LLAMAX_PROCESS=1 llamax train R --workdir 'a b'",
        "slurm": "srun --kill-on-bad-exit=1 llamax train R --workdir a\\ b",
        "tpu_pod": "gcloud compute tpus tpu-vm ssh pod --zone=z1 --worker=all --command=cd",
        "k8s": "command: ['llamax', 'train', 'R', '--workdir', 'a b']",
    }[name]
    assert shown in done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if shellcheck is None:
        pytest.skip("shellcheck is not there: pip install -e '.[dev]'")
    done = subprocess.run([shellcheck, f"{script}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", NAMES[1:])
def test_words_that_are_missing_are_named(name):
    script = dict(zip(NAMES[1:], SCRIPTS, strict=True))[name]
    done = subprocess.run(["bash", f"{script}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"{script.name}: no command" in done.stderr


# ---------------------------------------------------------------------------------------------------------------- Slurm


def test_before_the_time_limit_a_slurm_job_saves_and_queues_again(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with launch("slurm", *WORKER, f"{tmp_path}", "wait", restarts=2) as job:
        job.wait_for("is there", times=2)
        job.process.send_signal(signal.SIGUSR1)  # --signal=B:USR1@300
        assert job.wait(30) == 0, job.said
        assert "worker 1 saved" in job.said
    assert cluster()[1:] == ["scontrol requeue 77"]
    assert starts(tmp_path) == ["0", "1"]


def test_a_slurm_job_is_not_requeued_for_ever(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "101")
    with launch("slurm", *WORKER, f"{tmp_path}", "wait") as job:
        assert job.wait(30) == 1 and "started 101 times again" in job.said
    assert not (tmp_path / "starts").exists()


def test_slurm_reads_its_options():
    """One process a node, a signal before the time limit, into the queue again when a node dies."""
    lines = [line.split()[1] for line in SCRIPTS[0].read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"--ntasks-per-node=1", "--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(lines)


@pytest.mark.slow
def test_processes_meet_by_slurms_variables(cluster, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_PORT", f"{free_port()}")
    with launch("slurm", *CHILD, "meet") as job:
        assert job.wait() == 0, job.said
        assert job.said.count('"total": [2.0, 1.0]') == 2, job.said


# ----------------------------------------------------------------------------------------------------------- Kubernetes


def manifest(tmp_path, *words: str) -> dict:
    command, _ = launched("k8s", *words, restarts=5, dry_run=True)
    return yaml.safe_load(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)


def test_the_jobset_is_what_kubernetes_takes(tmp_path):
    found = manifest(tmp_path, "llamax", "train", 'it\'s "R"', "--config.data.lanes=4")
    assert problems(found, JOB_SET) == []
    assert found["metadata"]["name"] == found["spec"]["network"]["subdomain"] == "scout"
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 5
    [job] = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 2 and spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    port = container["ports"][0]["containerPort"]
    assert container["command"] == ["llamax", "train", 'it\'s "R"', "--config.data.lanes=4"], (
        "no shell: SIGTERM is its own"
    )
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables["LLAMAX_COORDINATOR"] == f"scout-{job['name']}-0-0.scout:{port}"
    assert variables["LLAMAX_PROCESSES"] == "2"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"} and pod["nodeSelector"] == {"gpu": "h100"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize(
    ("change", "told"),
    (
        (lambda s: s.update(parallelism="2"), "parallelism is str"),
        (lambda s: s.update(completionsMode="Indexed"), "completionsMode is unknown"),
        (lambda s: s.update(completionMode="indexed"), "completionMode is indexed"),
        (lambda s: s["template"]["spec"].pop("containers"), "containers is missing"),
        (lambda s: s["template"]["spec"]["containers"][0]["env"][0].update(value=3), "value is int"),
    ),
)
def test_the_schema_finds_mistakes(tmp_path, change, told):
    found = manifest(tmp_path, "llamax")
    change(found["spec"]["replicatedJobs"][0]["template"]["spec"])
    assert any(told in problem for problem in problems(found, JOB_SET)), problems(found, JOB_SET)


@pytest.mark.slow
def test_processes_meet_by_kubernetes_variables(cluster, monkeypatch):
    with launch("k8s", *CHILD, "meet") as job:
        assert job.wait() == 0, job.said
        assert job.said.count('"total": [2.0, 1.0]') == 2, job.said


# ------------------------------------------------------------------------------------------------------------- TPU pods


def test_what_a_broken_connection_leaves_is_ended_before_another_start(cluster, tmp_path):
    with launch("tpu_pod", *WORKER, f"{tmp_path}", "wait", restarts=1) as job:
        job.wait_for("is there", times=2)
        [gcloud] = subprocess.run(["pgrep", "-P", f"{job.process.pid}"], capture_output=True, text=True).stdout.split()
        lost = [int(path.read_text()) for path in (tmp_path / "homes").glob("*/llamax-pod.pid")]
        os.kill(int(gcloud), signal.SIGKILL)
        job.wait_for("is there", times=4)
        assert len(lost) == 2 and not any(Path(f"/proc/{pid}/cwd").exists() for pid in lost)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(30) == TERMINATED
    assert job.said.count("saved") == 2 and "starting again" in job.said


# ------------------------------------------------------------------------------------------------ launch/local.py alone


HOW = dict(cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_local_dry_run_and_help():
    words = ["-n", "2", "--gpus-each", "4", "--dry-run", "--", "llamax", "train", "R"]
    first, second = subprocess.run([*LAUNCHER, *words], **HOW).stdout.splitlines()
    assert "LLAMAX_PROCESSES=2" in first and "LLAMAX_PROCESS=0" in first and "LLAMAX_HEARTBEAT_S=10 " in first
    assert first.endswith("JAX_LOCAL_DEVICE_IDS=0,1,2,3 llamax train R")
    assert "LLAMAX_PROCESS=1" in second and "JAX_LOCAL_DEVICE_IDS=4,5,6,7" in second
    said = subprocess.run([*LAUNCHER, "--help"], **HOW).stdout
    assert "examples:" in said and "-n 4 -- llamax train" in said
    assert subprocess.run([*LAUNCHER, "-n", "0", "--", "true"], **HOW).returncode == 2
    missing = subprocess.run([*LAUNCHER, "-n", "2", "--", "no-such-command"], **HOW)
    assert missing.returncode == 2 and "no-such-command cannot be started" in missing.stderr


def test_one_killed_ends_the_others_in_time_and_is_named():
    with children(2, "wait") as job:
        pids = {line.split()[0]: int(line.split()[2]) for line in job.wait_for("] pid ", times=2)}
        time.sleep(0.5)
        os.kill(pids["[1]"], signal.SIGKILL)
        start = time.monotonic()
        code = job.wait(60)
        assert time.monotonic() - start < END_S, job.said
        assert code == 128 + signal.SIGKILL
        assert "process 1 was killed by SIGKILL" in job.said
        assert not Path(f"/proc/{pids['[0]']}").exists() or not hasattr(os, "sched_getaffinity")


@pytest.mark.slow
def test_one_that_does_not_end_by_itself_is_ended_in_time(tmp_path):
    script = f"test $LLAMAX_PROCESS = 0 && exit 7; exec {' '.join(WORKER)} {tmp_path} wait"
    start = time.monotonic()
    with Job([*LAUNCHER, "-n", "2", "--", "sh", "-c", script]) as job:
        assert job.wait(60) == 7 and time.monotonic() - start < END_S, job.said
        assert "process 0 ended with 7; the others end too" in job.said
