"""One process of a small training run that several share, or one that only meets the others; for launch/local.py.

    python -m tests.process_child train WORKDIR STEPS [--signal STEP:P] [--kill STEP:P] [--mesh data=2,fsdp=2]
                                  [--stages INIT] [--ask]
    python -m tests.process_child meet [--differ]
    python -m tests.process_child refuse
    python -m tests.process_child wait

`train` writes WORKDIR.rows.P.jsonl, a line `{"step", "row", "sha"}` for each row of each batch that this process's
devices hold; process P of `--signal` gets a SIGTERM before that step, and of `--kill` a SIGKILL, whose time it writes
to WORKDIR.killed. `--stages`: in two stages, from the weights in INIT; `--ask`: with evaluations. It exits as `llamax
train` does. Run it from the project's root with the environment that tests/conftest.py sets.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamax import cli, config, preflight
from llamax.config import ConfigError
from llamax.parallel import processes
from llamax.train import programs
from tests.runs import FIXTURES, KINDS, tiny_run

MESH = dict(data=1, fsdp=2)
SAVE_EVERY = 2
LANES = 4  # of 8 rows: each of 4 processes reads one, each of 2 reads two


def shared_run(steps: int, mesh: dict[str, int] = MESH) -> config.Run:
    """Two layers on text, for a short compile."""
    run = tiny_run(steps, mesh=mesh, data=dict(lanes=LANES, window_docs=8), checkpoint=dict(every_steps=SAVE_EVERY))
    sources = {name: source for name, source in run.data.sources.items() if name != "pictures"}
    model = dataclasses.replace(run.model, vision=None, plan=((KINDS, 1),))
    return dataclasses.replace(
        run, model=model, data=dataclasses.replace(run.data, sources=sources, multimodal_steps=0)
    )


def staged_run(steps: int, init: str) -> config.Run:
    """As many steps in two stages: half on rows of 128 tokens, half on rows of 256 and another mesh."""
    run = shared_run(0, dict(data=-1, fsdp=2))
    tokens = steps // 2 * run.data.batch_tokens
    longer = config.Stage(tokens, data=dict(seq_len=256), model=dict(chunk_len=64), mesh=dict(data=2, fsdp=1))
    return dataclasses.replace(run, init=config.Init(init), stages=dict(first=config.Stage(tokens), second=longer))


def asked_run(steps: int) -> config.Run:
    """Evaluated at the end, needles in two batches, of which the last is not full."""
    how = dict(path=str(FIXTURES / "text.toml"), every_steps=0)
    evals = {
        "far": config.Eval(kind="needle", lengths=(128,), depths=3, samples=1, cache_gb=7e-5, **how),
        "position": config.Eval(kind="position", lengths=(256,), buckets=4, max_docs=32, **how),
    }
    return dataclasses.replace(shared_run(steps), evals=evals)


def train(asked: argparse.Namespace) -> int:
    call, taken = programs.Programs.__call__, 0
    me = processes.number

    def recording(self: Any, state: Any, batch: Any) -> Any:
        nonlocal taken
        taken = int(jax.device_get(state.step)) + 1
        with Path(f"{asked.workdir}.rows.{me()}.jsonl").open("a") as file:
            for line in rows_of(taken, batch):
                file.write(json.dumps(line) + "\n")
        if asked.signal == f"{taken}:{me()}":
            os.kill(os.getpid(), signal.SIGTERM)
        if asked.kill == f"{taken}:{me()}":
            Path(f"{asked.workdir}.killed").write_text(f"{time.time()}")
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, state, batch)

    programs.Programs.__call__ = recording
    mesh = {axis: int(n) for axis, _, n in (part.partition("=") for part in asked.mesh.split(",") if part)}
    run = shared_run(asked.steps, {"data": 1} | mesh if mesh else MESH)
    run = staged_run(asked.steps, asked.stages) if asked.stages else asked_run(asked.steps) if asked.ask else run
    asked_for = config.to_config(run)
    config.load = lambda *_: asked_for  # no recipe's file says what the tests train; all else is the command's
    return cli.main(["train", "RECIPE", "--workdir", asked.workdir])


def rows_of(step: int, batch: Any) -> list[dict[str, Any]]:
    """A hash of every row, tiles too, that is on a device of this process."""
    shards: dict[int, dict[str, bytes]] = {}
    for name, field in (batch.of_tokens() | {"tiles": batch.tiles}).items():
        for shard in field.addressable_shards:  # copies of a row overwrite each other
            for row, values in zip(range(*shard.index[0].indices(field.shape[0])), np.asarray(shard.data), strict=True):
                shards.setdefault(row, {})[name] = values.tobytes()
    joined = {row: b"".join(fields.values()) for row, fields in sorted(shards.items())}
    return [{"step": step, "row": row, "sha": hashlib.sha256(data).hexdigest()} for row, data in joined.items()]


def meet(asked: argparse.Namespace) -> int:
    """Prints what the processes agree on, as JSON."""
    processes.start()
    me = processes.number()
    agreement, said = processes.Agreement(), []
    with jax.transfer_guard("disallow"):  # as in the training loop
        said += [agreement(15 if (me, call) == (1, 1) else 0) for call in range(4)]
        total = processes.summed([1.0, me])

    def refuse() -> None:
        raise ConfigError("A", f"process {me} says no", "C.")

    try:
        processes.from_first(refuse)
        refused = ""
    except ConfigError as error:
        refused = str(error)
    decided = processes.from_first(lambda: f"by {me}")
    print(json.dumps({"agreed": said, "total": total, "refused": refused, "decided": decided}), flush=True)
    try:
        preflight.check_processes({"seed": me if asked.differ else 0}, Path("w"), jax.local_device_count())
    except ConfigError as error:
        print(f"llamax: {error}", flush=True)
        return cli.leave(2)
    processes.part()
    return 0


def refuse(_: argparse.Namespace) -> int:
    """Process 1 alone finds a file wrong."""
    processes.start()

    def look() -> int:
        if processes.number() == 1:
            raise ConfigError("--x", "y is missing", "Bring it.")
        return 3

    try:
        processes.together(look)
    except ConfigError as error:
        print(f"llamax: {error}", flush=True)
        return cli.leave(2)
    return 0


def wait(_: argparse.Namespace) -> int:
    """Joins, and does nothing that would show it the end of another one."""
    processes.start()
    print(f"pid {os.getpid()}", flush=True)
    time.sleep(3600)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("train")
    verb.add_argument("workdir")
    verb.add_argument("steps", type=int)
    verb.add_argument("--signal")
    verb.add_argument("--kill")
    verb.add_argument("--mesh", default="")
    verb.add_argument("--stages", default="")
    verb.add_argument("--ask", action="store_true")
    verb.set_defaults(do=train)
    verb = verbs.add_parser("meet")
    verb.add_argument("--differ", action="store_true")
    verb.set_defaults(do=meet)
    verbs.add_parser("refuse").set_defaults(do=refuse)
    verbs.add_parser("wait").set_defaults(do=wait)
    asked = parser.parse_args()
    try:
        return asked.do(asked)
    except ConfigError as error:  # in the start, before there is a job
        print(f"llamax: {error}", flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
