"""What the launchers start in their tests: a process without jax.

    python tests/launch/worker.py FOLDER wait [CODE]      until a SIGTERM; then it says "saved" and ends (143, as a run)
    python tests/launch/worker.py FOLDER fail TIMES CODE  ends with CODE in its first TIMES starts, then with 0

Each start adds a line to FOLDER/starts: this process's number.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

folder, what, *more = sys.argv[1:]
names = ("LLAMAX_PROCESS", "SLURM_PROCID", "JOB_COMPLETION_INDEX")
number = next(os.environ[name] for name in names if name in os.environ)


def say(text: str) -> None:
    os.write(1, f"worker {number} {text}\n".encode())  # in one piece, for there are others


def stop(*_: object) -> None:
    say("saved")
    sys.exit(int(more[0]) if more else 143)


signal.signal(signal.SIGTERM, stop)
with (Path(folder) / "starts").open("a") as file:
    file.write(f"{number}\n")
say("is there")
if what == "wait":
    time.sleep(60)
    sys.exit("no signal came")
times, code = map(int, more)
time.sleep(0.3)  # all of them write before the first one ends
starts = (Path(folder) / "starts").read_text().split().count(number)
sys.exit(code if starts <= times else 0)
