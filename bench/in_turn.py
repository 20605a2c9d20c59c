"""Two frameworks measured in turn: each lives in a process of its own and sleeps while the other works."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def missing(*packages: str) -> str:
    """Why there is nothing to compare with, torch and transformers unless told; empty if there is."""
    packages = packages or ("torch", "transformers")
    lacking = " and ".join(name for name in packages if importlib.util.find_spec(name) is None)
    return f"skipped: {lacking} not installed, and this compares llamax with {packages[-1]}" if lacking else ""


def serve(make: Callable[[], dict[str, Callable]]) -> None:
    """Makes the commands, then reads "command times" a line and answers with a line of JSON: [wall seconds, CPU
    seconds, result] for each time."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed, while the commands are made too, is no answer
    commands = make()
    for line in sys.stdin:
        command, number = line.split()
        rows = []
        for _ in range(int(number)):
            start, cpu = time.perf_counter(), time.process_time()
            result = commands[command]()
            rows.append((time.perf_counter() - start, time.process_time() - cpu, result))
        print(json.dumps(rows), file=answers, flush=True)


class Process:
    """`script --serve SIDE --folder FOLDER`, which calls `serve`."""

    def __init__(self, script: str, side: str, folder: Path):
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, script, "--serve", side, "--folder", str(folder)]
        self.side = side
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, command: str, times: int = 1) -> list:
        print(command, times, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of {self.side} ended: {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
