"""What a step of post-training costs beside one of pretraining: time a real token, peak memory, how full its rows are.

    python bench/post_training.py [--rounds 6] [--steps 3]      # after `llamax data build`

The recipes' `:tiny` sizes, one model: each run's real program (`programs.build`), on batches that its data stream packs
for it (`pipeline.build`); what the cached reference gave is zeros, which changes no time. All runs live in one process
and take `--steps` steps in turn; the first round warms up. Steps with and without pictures are two programs, told
apart. Post-training's recipes have pictures in every step, so their `text` is the data of bench/conversations.py.
`as the recipe` weighs the two kinds as `data.multimodal_steps` does. `16 tiles`: pretraining with fine-tuning's
`tiles_per_row`; `40 tiles`: fine-tuning with more than its rows fill.

full      share of a row's places that hold a token
tiles     share of the picture slots that hold a tile
ms        of a step, for a thousand real tokens; median of the rounds; CPU ms: of the process's CPU time
/ SFT     median of the rounds' ratios to fine-tuning's time in the same round
stream    CPU ms for a thousand real tokens that the data stream takes beside the step, in a thread or processes
peak      by the compiler: arguments + outputs - outputs that take over an argument's memory + temporaries
largest   elements of the program's largest array, as a share of the B x T x V logits: asserted to stay below 1 on CPU
          (on GPUs without tokamax the experts' products of all rows may be larger)

JAX_PLATFORMS=cuda runs it on a card; --only takes some of the runs, and then the data of these is enough; what else
follows (--config.model.dim=1024) changes all of them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import conversations
import jax
import numpy as np

from llamax import config, preflight
from llamax.batch import Batch
from llamax.data import pipeline
from llamax.data.tokenizer import Tokenizer
from llamax.model.seam import make_seam
from llamax.model.skeleton import skeleton
from llamax.optim.build import optimizer
from llamax.parallel import place
from llamax.parallel.mesh import make_mesh
from llamax.plan.compiled import peak_of
from llamax.train import programs
from llamax.train.state import init

MIB = 2**20
SHAPE = re.compile(r"[a-z\d]\[(\d[\d,]*)\]")  # of an array in a compiled program's text
SFT = "SFT"
RUNS = {  # recipe, what differs
    "pretraining": ("scout_pretrain.py:tiny", ()),
    "pretraining, 16 tiles": ("scout_pretrain.py:tiny", ("--config.data.tiles_per_row=16",)),
    SFT: ("maverick_sft.py:tiny", ()),
    "SFT, 40 tiles": ("maverick_sft.py:tiny", ("--config.data.tiles_per_row=40",)),
    "DPO, cached reference": ("maverick_dpo.py:tiny", ()),
    "DPO, live reference": ("maverick_dpo.py:tiny", ("--config.reference.source=live",)),
    "reward model": ("reward_model.py:tiny", ()),
}
KINDS = ("text", "pictures")


@dataclass
class Case:
    """One kind of step of a run."""

    program: Any
    batches: Any  # endless: (batch, its real tokens)
    full: float
    tiles: float
    stream: float  # CPU s a real token
    peak: int
    largest: float
    s_a_token: list[float] = field(default_factory=list)  # a round after the other
    cpu_s_a_token: list[float] = field(default_factory=list)


@dataclass
class Running:
    """A run: its state, which its programs hand on, and its two kinds of step."""

    state: Any
    shares: dict[str, float]  # of steps, in the recipe
    cases: dict[str, Case]

    def turn(self, kind: str, steps: int) -> None:
        case, tokens = self.cases[kind], 0
        began, cpu = time.perf_counter(), time.process_time()
        for batch, real in itertools.islice(case.batches, steps):
            self.state, metrics = case.program(self.state, batch)
            tokens += real
        jax.block_until_ready((self.state, metrics))
        case.s_a_token.append((time.perf_counter() - began) / tokens)
        case.cpu_s_a_token.append((time.process_time() - cpu) / tokens)

    def mixed(self, of: Callable[[Case], list[float]]) -> list[float]:
        """Seconds a real token of steps as the recipe mixes them, of every round."""
        tokens = {kind: share * self.cases[kind].full for kind, share in self.shares.items()}
        rounds = zip(*(of(self.cases[kind]) for kind in tokens), strict=True)
        return [float(np.average(of_kinds, weights=list(tokens.values()))) for of_kinds in rounds]


class Read(NamedTuple):
    """What a run's data stream yields of one kind."""

    batches: list[Batch]
    stream: float  # CPU s a real token


def running(recipe: str, overrides: tuple[str, ...], talks: Path, n_batches: int) -> Running:
    asked = config.freeze(config.load(f"recipes/{recipe}", overrides))
    run = preflight.with_paths(replace(asked, evals={}), Path("runs"))
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    patch_id = Tokenizer(run.data.tokenizer).patch
    bones = skeleton(run.model.in_training, make_seam(mesh, run.train), patch_id=patch_id, train=run.train)
    tx = optimizer(run.optim, run.train.steps, bones.split(bones.kinds)[0])
    step, shapes = programs.build(run, bones, tx, mesh)
    state = jax.jit(partial(init, bones, tx, run.seed, run.health.spike_window))()
    if shapes.reference is not None:
        state = state._replace(reference=jax.tree.map(np.array, (state.params, state.router_bias)))
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, shapes))
    found = read(run, n_batches)
    shares = {kind: 1.0 if len(found) == 1 else share for kind, share in mixture(run).items() if kind in found}
    if "text" not in found:
        task = "dpo" if run.data.comparisons_per_row else "sft"
        sources = {"chat": config.Source(path=str(talks / task / "data.toml"))}
        found |= read(replace(run, data=replace(run.data, sources=sources)), n_batches)
    return Running(state, shares, {kind: case(run, step, shapes, mesh, found[kind]) for kind in KINDS})


def mixture(run: config.Run) -> dict[str, float]:
    return {"text": 1 - run.data.multimodal_steps, "pictures": run.data.multimodal_steps}


def read(run: config.Run, n: int) -> dict[str, Read]:
    """`n` batches of each kind that the run's data makes."""
    found: dict[str, list[Batch]] = {KINDS[slots > 0]: [] for slots in pipeline.tile_slots(run.data)}
    data = replace(run.data, ref_logp="", prefetch_batches=0)
    stream = iter(pipeline.build(data, run.model.vision, run.seed))
    took, tokens = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0)
    while min(len(batches) for batches in found.values()) < n:
        began = time.process_time()
        batch = next(stream)
        kind = KINDS[programs.slots(batch) > 0]
        took[kind] += time.process_time() - began
        tokens[kind] += int((batch.segment_ids > 0).sum())
        cached = np.zeros(batch.tokens.shape, np.float32) if run.data.ref_logp else None
        found[kind].append(batch._replace(ref_logp=cached))
    return {kind: Read(batches[:n], took[kind] / tokens[kind]) for kind, batches in found.items()}


def case(run: config.Run, step: Any, shapes: Any, mesh: Any, read: Read) -> Case:
    placed = [(place.put_batch(batch, mesh), int((batch.segment_ids > 0).sum())) for batch in read.batches]
    program = step.lower(shapes, placed[0][0]).compile()
    logits = run.data.batch_tokens * run.model.vocab_size
    largest = max(math.prod(map(int, dims.split(","))) for dims in SHAPE.findall(program.as_text()))
    if jax.default_backend() == "cpu":
        assert largest < logits, f"the program has an array of {largest:,} elements; all logits are {logits:,}"
    full = sum(real for _, real in placed) / (len(placed) * run.data.batch_tokens)
    filled = [batch.tiles.any(axis=(2, 3, 4)) for batch in read.batches]
    tiles = float(np.mean(filled)) if filled[0].size else 0.0
    return Case(program, itertools.cycle(placed), full, tiles, read.stream, peak_of(program), largest / logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="of each kind, in a round")
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=RUNS, metavar="RUN", help="and fine-tuning")
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        talks = Path(name)
        for task in conversations.EXAMPLES:
            (talks / task).mkdir()
            conversations.write_data(task, talks / task)
        asked = {name: how for name, how in RUNS.items() if name in (SFT, *options.only)}
        runs = {
            name: running(recipe, (*differs, *overrides), talks, n_batches=4 * options.steps)
            for name, (recipe, differs) in asked.items()
        }
    for number in range(options.rounds + 1):
        for kind in KINDS:
            for one in runs.values():
                one.turn(kind, options.steps)
        print(f"round {number} of {options.rounds}; load {os.getloadavg()[0]:.1f}", flush=True)
    for one in runs.values():
        for of_kind in one.cases.values():
            del of_kind.s_a_token[0], of_kind.cpu_s_a_token[0]
    show(runs)


def show(runs: dict[str, Running]) -> None:
    print("\n| run | steps | full | tiles | ms | / SFT | CPU ms | / SFT | stream | peak, MiB | / SFT | largest |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        base = runs[SFT].cases[kind]
        for name, one in runs.items():
            it = one.cases[kind]
            times = cells(it.s_a_token, base.s_a_token) + cells(it.cpu_s_a_token, base.cpu_s_a_token)
            peak = f"{1e6 * it.stream:.0f} | {it.peak / MIB:,.1f} | {it.peak / base.peak:.2f}"
            print(f"| {name} | {kind} | {it.full:.1%} | {it.tiles:.0%} | {times}{peak} | {it.largest:.2f} |")
    for name, one in runs.items():
        times = "".join(cells(one.mixed(of), runs[SFT].mixed(of)) for of in (wall, cpu))
        full = sum(share * one.cases[kind].full for kind, share in one.shares.items())
        print(f"| {name} | as the recipe | {full:.1%} | | {times}| | | |")


def wall(it: Case) -> list[float]:
    return it.s_a_token


def cpu(it: Case) -> list[float]:
    return it.cpu_s_a_token


def cells(taken: list[float], base: list[float]) -> str:
    ratio = statistics.median(mine / other for mine, other in zip(taken, base, strict=True))
    return f"{1e6 * statistics.median(taken):.0f} | {ratio:.2f} | "


if __name__ == "__main__":
    main()
