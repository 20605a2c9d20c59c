"""Seconds that saving holds up training, and seconds that comparing a checkpoint with its sums adds to a start.

    python bench/checkpoint.py           # recipes/scout_pretrain.py:tiny, after `llamax data build`

Trains a few steps with a checkpoint every few of them, in a folder that is then removed. Blocked is the time inside of
`Checkpoints.save`, after the step before it is done; the rest of a save happens beside the next steps. Its share of the
wall time is for the interval that the recipe saves at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from llamax import config
from llamax.checkpoint import manager, sums
from llamax.run import train


class Timed(manager.Checkpoints):
    """Notes how long each save blocks, how long it takes in all, and how long hashing is of that."""

    blocked: list[float] = []

    def save(self, *args, **named) -> bool:
        started = time.perf_counter()
        saved = super().save(*args, **named)
        self.blocked.append(time.perf_counter() - started)
        return saved


def timed(function, into: list[float]):
    """`function`, which notes its seconds."""

    def call(*args, **named):
        started = time.perf_counter()
        result = function(*args, **named)
        into.append(time.perf_counter() - started)
        return result

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/scout_pretrain.py:tiny")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=15, help="steps between two saves here")
    args = parser.parse_args()
    usual = config.freeze(config.load(args.recipe)).checkpoint.every_steps
    overrides = {
        "train.steps": args.steps,
        "train.log_every_steps": 5,
        "evals": {},
        "checkpoint.every_steps": args.every,
    }
    overrides |= {"optim.warmup_steps": 1, "optim.decay_steps": 1}
    run = config.freeze(config.load(args.recipe, [f"--config.{key}={value}" for key, value in overrides.items()]))

    import llamax.run

    llamax.run.Checkpoints, hashing = Timed, []
    sums.write = timed(sums.write, hashing)
    with tempfile.TemporaryDirectory() as workdir:
        train(run, workdir)
        rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
        newest = Path(workdir) / "checkpoints" / str(args.steps)
        size, n_files = sum(sums.files(newest).values()), len(sums.files(newest))
        checking: list[float] = []
        for _ in range(5):
            assert timed(sums.check, checking)(newest) == []
    step_s = statistics.median(row["speed/step_s"] for row in rows[2:])  # the first windows compile
    interval = usual * step_s
    print(f"checkpoint: {size / 1e6:.1f} MB in {n_files} files; a step takes {step_s:.3f} s")
    for name, seconds in (("first save", Timed.blocked[:1]), ("later saves", Timed.blocked[1:])):
        each = statistics.mean(seconds)
        print(f"{name}: blocked {each:.3f} s each (at most {max(seconds):.3f}), {each / interval:.3%} of {usual} steps")
    print(f"sums written in the background: {statistics.median(hashing):.3f} s a save")
    check = statistics.median(checking)
    print(f"compared at a start: {check:.3f} s ({size / check / 1e6:.0f} MB/s)")


if __name__ == "__main__":
    main()
