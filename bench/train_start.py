"""Seconds from the command to the first step, with an empty and a filled compilation cache, and the speed after it.

    python bench/train_start.py          # recipes/scout_pretrain.py:tiny, after `llamax data build`

Each run is a process of its own, as a user starts it. MFU is model FLOP/s over the machine's 2048^3 float32 matmul
rate, which the same process measures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(recipe: str, cache: Path, steps: int) -> dict[str, float]:
    """Figures of one run of `steps` steps without evaluations."""
    with tempfile.TemporaryDirectory() as workdir:
        overrides = {"train.steps": steps, "train.log_every_steps": 10, "evals": {}, "checkpoint.every_steps": steps}
        overrides |= {"optim.warmup_steps": 1, "optim.decay_steps": 1}
        command = [sys.executable, "-m", "llamax.cli", "train", recipe, "--workdir", workdir]
        command += [f"--config.{key}={value}" for key, value in overrides.items()]
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        started = time.time()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    steady = rows[2:]  # the first two windows compile a program each
    return {
        "first step s": rows[0]["time"] - started,
        "tokens/s": statistics.median(row["speed/tokens_per_s"] for row in steady),
        "MFU": statistics.median(row["speed/mfu"] for row in steady),
        "data wait": statistics.median(row["speed/data_wait"] for row in steady),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/scout_pretrain.py:tiny")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            figures = measure(args.recipe, Path(cache), args.steps)
            print(f"{name}: " + ", ".join(f"{key} {value:,.3g}" for key, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
