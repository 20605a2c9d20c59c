"""Stand-ins for srun, scontrol, gcloud and kubectl: they run on this machine what the real ones would run on many.

    python tests/launch/fake_cluster.py srun --kill-on-bad-exit=1 COMMAND...
    python tests/launch/fake_cluster.py gcloud compute tpus tpu-vm ssh NAME --worker=all --command=COMMAND
    python tests/launch/fake_cluster.py kubectl apply -f -

FAKE_TASKS is how many processes there are (2), FAKE_LOG a file that gets each call's words. Told from the manuals: srun
hands a SIGTERM to its tasks and ends with their highest code; what gcloud started over ssh outlives gcloud; a JobSet
starts all pods again when one fails, maxRestarts times at most, and not after the exit codes of a FailJob rule.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TASKS = int(os.environ.get("FAKE_TASKS", "2"))


def main() -> int:
    name, *words = sys.argv[1:]
    if log := os.environ.get("FAKE_LOG"):
        with Path(log).open("a") as file:
            file.write(shlex.join([name, *words]) + "\n")
    return {"srun": srun, "scontrol": lambda _: 0, "gcloud": gcloud, "kubectl": kubectl}[name](words)


def run(commands: list[list[str]], environments: list[dict[str, str]], *, hand_on: bool, kill_on_bad_exit: bool) -> int:
    """All at once; the highest exit code."""
    tasks = [
        subprocess.Popen(command, env=os.environ | own, start_new_session=True)
        for command, own in zip(commands, environments, strict=True)
    ]

    def pass_on(signum: int, _: object) -> None:
        for task in tasks:
            if hand_on and task.poll() is None:
                task.send_signal(signum)
        if not hand_on:
            sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, pass_on)
    while any(task.poll() is None for task in tasks):
        if kill_on_bad_exit and any(task.poll() for task in tasks):
            time.sleep(1)
            for task in tasks:
                task.kill()
        time.sleep(0.02)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def srun(words: list[str]) -> int:
    options = [word for word in words if word.startswith("--")][: next(i for i, w in enumerate(words) if w[0] != "-")]
    shared = {
        "SLURM_JOB_ID": os.environ.get("SLURM_JOB_ID", "77"),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": f"{TASKS}",
        "SLURM_STEP_NUM_TASKS": f"{TASKS}",
        "SLURM_STEP_NUM_NODES": f"{TASKS}",
        "SLURM_LOCALID": "0",
    }
    own = [shared | {"SLURM_PROCID": f"{i}"} for i in range(TASKS)]
    command = words[len(options) :]
    return run([command] * TASKS, own, hand_on=True, kill_on_bad_exit="--kill-on-bad-exit=1" in options)


def gcloud(words: list[str]) -> int:
    assert words[:4] == ["compute", "tpus", "tpu-vm", "ssh"] and "--worker=all" in words, words
    [command] = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    homes = [Path(os.environ["FAKE_HOME"]) / f"{i}" for i in range(TASKS)]
    for home in homes:
        home.mkdir(parents=True, exist_ok=True)
    # The number stands for what jax would learn from the pod's metadata.
    own = [{"TMPDIR": f"{home}", "LLAMAX_PROCESS": f"{i}"} for i, home in enumerate(homes)]
    return run([["sh", "-c", command]] * TASKS, own, hand_on=False, kill_on_bad_exit=False)


def kubectl(words: list[str]) -> int:
    import yaml

    assert words == ["apply", "-f", "-"], words
    spec = yaml.safe_load(sys.stdin)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    final = job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    for _ in range(spec["failurePolicy"]["maxRestarts"] + 1):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"  # in the place of a name that the cluster's DNS knows
        shared = {entry["name"]: entry["value"] for entry in container["env"]}
        shared |= {"LLAMAX_COORDINATOR": address, "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
        own = [shared | {"JOB_COMPLETION_INDEX": f"{i}"} for i in range(job["completions"])]
        code = run([container["command"]] * job["completions"], own, hand_on=True, kill_on_bad_exit=True)
        if code == 0 or code in final or code == 128 + signal.SIGTERM:
            break
    return code


if __name__ == "__main__":
    sys.exit(main())
