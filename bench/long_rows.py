"""CPU seconds and memory of a training step against the length of a row: local layers, iRoPE, layers that see all.

    python bench/long_rows.py [--longest 65536] [--plot docs/long_rows.png]

Three models of 4 dense layers (width 128, 4 query and 2 kv heads of 32) differ in their attention only: rope_chunk with
chunks of 512 tokens costs O(T C), rope_full costs O(T^2), and Llama 4's period has three of the one and one that sees
all. One row of T tokens, one document, a step: forward, backward with each layer computed again, AdamW. They run in
turn, at most `--rounds` rounds and no new one after 20 seconds; the least time of each counts. The exponent is the
slope of log CPU seconds (other work on the machine moves them less) over log T, between neighbours and over all T
from 2,048 on. Memory is what the compiled step holds beside its arguments (XLA).
"""

from __future__ import annotations

import argparse
import dataclasses
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
LOCAL, IROPE, WHOLE = "chunks of 512", "iRoPE", "whole rows"
KINDS = {  # the kinds of layer of a period, and how often it comes
    LOCAL: (("rope_chunk+dense",), 4),
    IROPE: (("rope_chunk+dense",) * 3 + ("nope_full+dense",), 1),
    WHOLE: (("rope_full+dense",), 4),
}


def stepper(segment: tuple, T: int) -> tuple[Callable[[], np.ndarray], int]:
    """A function that takes one step on a row of T tokens and returns its seconds and CPU seconds; and its bytes."""
    sizes = dict(dim=128, n_heads=4, n_kv_heads=2, head_dim=32, dense_ffn_dim=256, vocab_size=VOCAB)
    model = config.Model(**sizes, plan=(segment,), chunk_len=CHUNK)
    data = config.Data(seq_len=T, batch_tokens=T, sources={"random": config.Source()})
    run = config.Run(name="long_rows", model=model, data=data, optim=config.Optim(warmup_steps=1))
    run = dataclasses.replace(run, train=config.Train(remat="block"))
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

    return step, program.memory_analysis().temp_size_in_bytes


def plot(path: Path, seconds: dict[str, dict[int, float]], sizes: dict[str, dict[int, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(10, 4))
    for axes, figures, what in zip(both, (seconds, sizes), ("CPU seconds a step", "GiB beside the state"), strict=True):
        for name, of in figures.items():
            axes.loglog(list(of), list(of.values()), "o-", base=2, label=f"{name}: T^{exponent(of):.2f}")
        axes.set_xticks(list(of), [f"{T // 1024}k" for T in of])
        axes.set_xlabel("tokens a row")
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def exponent(seconds: dict[int, float]) -> float:
    """The slope of a figure's log over log T for T of 2,048 and more, by least squares."""
    lengths = [T for T in seconds if T >= 2048]
    return float(np.polyfit(np.log(lengths), np.log([seconds[T] for T in lengths]), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    lengths = [1024 * 2**n for n in range(7) if 1024 * 2**n <= options.longest]
    seconds: dict[str, dict[int, float]] = {name: {} for name in KINDS}
    sizes: dict[str, dict[int, float]] = {name: {} for name in KINDS}
    print("| tokens a row |", " | ".join(f"{name}, CPU s | exponent | GiB" for name in KINDS), "| whole rows / iRoPE |")
    print("|" + "---|" * (2 + 3 * len(KINDS)))
    for T in lengths:
        steps = {}
        for name, segment in KINDS.items():
            steps[name], n_bytes = stepper(segment, T)
            sizes[name][T] = n_bytes / 2**30
        rounds: list[dict[str, np.ndarray]] = []
        while len(rounds) < options.rounds and sum(taken[name][0] for taken in rounds for name in KINDS) < 20:
            rounds.append({name: step() for name, step in steps.items()})
        cells = []
        for name in KINDS:
            of = seconds[name]
            of[T] = min(taken[name][1] for taken in rounds)
            slope = f"{np.log2(of[T] / of[T // 2]):.2f}" if T // 2 in of else ""
            cells.append(f"{of[T]:.3f} | {slope} | {sizes[name][T]:.3f}")
        print(f"| {T:,} |", " | ".join(cells), f"| {seconds[WHOLE][T] / seconds[IROPE][T]:.2f} |", flush=True)
    for what, figures in (("CPU seconds", seconds), ("memory", sizes)):
        print(f"{what} over T >= 2,048:", ", ".join(f"{name} T^{exponent(of):.2f}" for name, of in figures.items()))
    if options.plot:
        plot(options.plot, seconds, sizes)


if __name__ == "__main__":
    main()
