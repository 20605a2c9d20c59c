"""Seconds of a training step against the length of a row: layers that see chunks beside layers that see everything.

    python bench/long_rows.py [--longest 16384] [--plot docs/long_rows.png]

Two models of 2 dense layers (width 256, 8 query and 2 kv heads of 32) differ in their attention only: rope_chunk with
chunks of 512 tokens costs O(T C), rope_full costs O(T^2). One row of T tokens, one document, a step: forward, backward
with each period computed again, AdamW. The two run in turn, at most `--rounds` rounds and no new one after 20 seconds;
the least time of each counts. The exponent is the slope of log CPU seconds (other work on the machine moves them less)
over log T, between neighbours and over all T from 2,048 on. The plot needs matplotlib (extra `docs`).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from llamax import config
from llamax.batch import Batch
from llamax.model.seam import make_seam
from llamax.model.skeleton import skeleton
from llamax.optim.build import optimizer
from llamax.parallel.mesh import make_mesh
from llamax.train import state as states
from llamax.train.step import make_step

CHUNK, VOCAB = 512, 512
KINDS = {"chunks of 512": "rope_chunk+dense", "whole rows": "rope_full+dense"}


def stepper(kind: str, T: int) -> Callable[[], np.ndarray]:
    """A function that takes one step on a row of T tokens and returns its seconds and CPU seconds."""
    sizes = dict(dim=256, n_heads=8, n_kv_heads=2, head_dim=32, dense_ffn_dim=512, vocab_size=VOCAB)
    model = config.Model(**sizes, plan=(((kind,), 2),), chunk_len=CHUNK)
    data = config.Data(seq_len=T, batch_tokens=T, sources={"random": config.Source()})
    run = config.Run(name="long_rows", model=model, data=data, optim=config.Optim(warmup_steps=1))
    seam = make_seam(make_mesh({"data": 1}, jax.devices()[:1]))
    bones = skeleton(model, seam, patch_id=-1, train=run.train)
    tx = optimizer(run.optim, run.train.steps, bones.kinds)
    state = jax.jit(lambda: states.init(bones, tx, seed=0, spike_window=run.health.spike_window))()
    row = np.random.default_rng(0).integers(0, VOCAB, (1, T + 1), dtype=np.int32)
    one, positions, tiles = np.ones((1, T), np.int32), np.arange(T, dtype=np.int32)[None], np.zeros((1, 0, 0, 0, 3))
    batch = Batch(row[:, :-1], row[:, 1:], one.astype(np.float32), one, positions, one - 1, tiles.astype(np.uint8))
    program = jax.jit(make_step(run, bones, tx), donate_argnums=0).lower(state, batch).compile()

    def step() -> np.ndarray:
        nonlocal state
        start = np.array([time.perf_counter(), time.process_time()])
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics.loss)
        return np.array([time.perf_counter(), time.process_time()]) - start

    return step


def plot(path: Path, seconds: dict[str, dict[int, float]]) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (extra `docs`)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, of in seconds.items():
        axes.loglog(list(of), list(of.values()), "o-", base=2, label=f"{name}: T^{exponent(of):.2f}")
    axes.set_xticks(list(next(iter(seconds.values()))), [f"{T:,}" for T in next(iter(seconds.values()))])
    axes.set_xlabel("tokens a row")
    axes.set_ylabel("CPU seconds a step")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def exponent(seconds: dict[int, float]) -> float:
    """The slope of log seconds over log T for T of 2,048 and more, by least squares."""
    lengths = [T for T in seconds if T >= 2048]
    return float(np.polyfit(np.log(lengths), np.log([seconds[T] for T in lengths]), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    lengths = [1024 * 2**n for n in range(6) if 1024 * 2**n <= options.longest]
    seconds: dict[str, dict[int, float]] = {name: {} for name in KINDS}
    print("| tokens a row |", " | ".join(f"{name}, s | CPU s | exponent" for name in KINDS), "| ratio |")
    print("|" + "---|" * (2 + 3 * len(KINDS)))
    for T in lengths:
        steps = {name: stepper(kind, T) for name, kind in KINDS.items()}
        rounds: list[dict[str, np.ndarray]] = []
        while len(rounds) < options.rounds and sum(taken[name][0] for taken in rounds for name in KINDS) < 20:
            rounds.append({name: step() for name, step in steps.items()})
        cells = []
        for name in KINDS:
            of = seconds[name]
            wall, of[T] = np.min([taken[name] for taken in rounds], axis=0)
            slope = f"{np.log2(of[T] / of[T // 2]):.2f}" if T // 2 in of else ""
            cells.append(f"{wall:.3f} | {of[T]:.3f} | {slope}")
        local, full = (seconds[name][T] for name in KINDS)
        print(f"| {T:,} |", " | ".join(cells), f"| {full / local:.1f} |", flush=True)
    print("over T >= 2,048:", ", ".join(f"{name} T^{exponent(of):.2f}" for name, of in seconds.items()))
    if options.plot:
        plot(options.plot, seconds)


if __name__ == "__main__":
    main()
