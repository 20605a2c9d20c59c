"""Commands in the background, for the tests: what they say, how they end, several processes by launch/local.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.xla_flags import quick_flags

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = [sys.executable, "launch/local.py"]
CHILD = [sys.executable, "-m", "tests.process_child"]
TIMEOUT_S = 300
TERMINATED = 143  # exit code of a SIGTERM
END_S = 15  # after the death of one process, all have ended under launch/local.py


class Job:
    """A command that goes on by itself; `lines` holds what it has said so far."""

    def __init__(self, command: Sequence[str], cwd: Path = ROOT, **environment: str):
        how = dict(cwd=cwd, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.process = subprocess.Popen(command, text=True, **how)
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


def children(n: int, *words: str, devices: int = 1, launcher: Sequence[str] = ()) -> Job:
    """`tests.process_child` N times by launch/local.py, with so many simulated devices each."""
    return Job([*LAUNCHER, "-n", f"{n}", *launcher, "--", *CHILD, *words], XLA_FLAGS=quick_flags(devices))


def run_children(n: int, *words: str, code: int = 0, devices: int = 1) -> str:
    with children(n, *words, devices=devices) as job:
        assert job.wait() == code, job.said
        return job.said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
