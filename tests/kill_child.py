"""A small training run in a process of its own, which says where it is, so that tests can kill it there.

    python -m tests.kill_child WORKDIR --events FD [--steps 20] [--workers 2] [--slow saving=0.5 ...]

Run it from the project's root with the environment that tests/conftest.py sets. On the descriptor FD it writes a line
`PHASE NUMBER` whenever it comes to one of

    start 0     imports are done             step s      step s is about to be taken
    data 0      the data stream is opened    save s      checkpoint s goes to Orbax
    compile n   the n-th program             saving s    its temporary folder is there, all but renamed
    restore s   of checkpoint s              eval s      a batch is evaluated after step s

and sleeps there as `--slow` says: that changes when things happen and nothing else. WORKDIR.batches gets a line
`STEP HASH` for every batch that a step was given. The product code knows nothing of this: functions are wrapped here.
It exits as `llamax train` does.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamax import cli, config
from llamax import run as composition
from llamax.checkpoint.manager import Checkpoints, Summed
from llamax.data import pipeline
from llamax.evals import perplexity
from llamax.train import programs
from tests.runs import FIXTURES, tiny_run

STEPS, SAVE_EVERY = 20, 3
EVALUATE_EVERY = {"text": 5, "pictures": 6}  # steps; at step 6, 12 and 18 an evaluation follows a save
PHASES = ("start", "data", "compile", "restore", "step", "save", "saving", "eval")


def killable_run(steps: int, workers: int) -> config.Run:
    """A mixture of three sources, with pictures and packing; two evaluations, on text and on pictures."""
    evals = {
        name: config.Eval(path=str(FIXTURES / f"{name}.toml"), every_steps=every, max_docs=8)
        for name, every in EVALUATE_EVERY.items()
    }
    return tiny_run(
        steps,
        train=dict(log_every_steps=7),
        checkpoint=dict(every_steps=SAVE_EVERY),
        data=dict(workers=workers),
        evals=evals,
    )


def main() -> int:
    asked = arguments()

    def at(phase: str, number: int) -> None:
        os.write(asked.events, f"{phase} {number}\n".encode())
        time.sleep(asked.slow.get(phase, 0.0))

    report(at, Path(f"{asked.workdir}.batches"))
    at("start", 0)
    asked_for = config.to_config(killable_run(asked.steps, asked.workers))
    config.load = lambda *_: asked_for  # no recipe's file says what the tests train; all else is the command's
    composition.train = partial(composition.train, devices=jax.devices()[:1])
    return cli.main(["train", "RECIPE", "--workdir", asked.workdir])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--slow", nargs="*", default=[], metavar="PHASE=SECONDS")
    asked = parser.parse_args()
    asked.slow = {phase: float(seconds) for phase, _, seconds in (word.partition("=") for word in asked.slow)}
    assert asked.slow.keys() <= set(PHASES), asked.slow
    return asked


def report(at: Callable[[str, int], None], batches: Path) -> None:
    """Wraps what the phases go through."""
    compiled, taken = itertools.count(1), 0

    def restoring(checkpoints: Checkpoints, step: int, **_: Any) -> None:
        nonlocal taken
        taken = step
        at("restore", step)

    def stepping(_: Any, state: Any, batch: Any) -> None:
        nonlocal taken
        taken += 1
        digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(batch))).hexdigest()
        with batches.open("a") as file:
            file.write(f"{taken} {digest}\n")
        at("step", taken)

    def finalizing(path: Summed) -> None:
        name = path.get_final().name
        if name.isdigit():  # not an item's own folder
            at("saving", int(name))

    before(pipeline, "build", lambda *_: at("data", 0))
    before(programs, "_compile", lambda *_: at("compile", next(compiled)))
    before(programs.Programs, "__call__", stepping)
    before(Checkpoints, "restore", restoring)
    before(Checkpoints, "save", lambda _, step, **__: at("save", step))
    before(Summed, "finalize", finalizing)  # everything is written but for the sums and the last rename
    before(perplexity, "sums", lambda *_: at("eval", taken))


def before(owner: Any, name: str, do: Callable) -> None:
    """Calls `do` with the same arguments before every call of `owner.name`."""
    call = getattr(owner, name)

    def both(*args, **kwargs):
        do(*args, **kwargs)
        return call(*args, **kwargs)

    setattr(owner, name, both)


if __name__ == "__main__":
    sys.exit(main())
