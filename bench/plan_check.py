"""A plan beside what one accelerator really does: peak memory and the time of a step, planned, compiled and measured.

    python bench/plan_check.py            # the accelerator that is here, about two minutes
    python bench/plan_check.py --tiny     # a small model; a CPU will do, and knows no peak

A model of Llama 4's layers, dense and with experts, 1.2B parameters, takes a few steps on random tokens. Beside what
was measured stand the estimate (`llamax plan --estimate`), what the compiler says of the very program that runs, and,
with `--ahead`, what it says without the card (`llamax plan`, which needs its plugin). No file is read, nothing is
written.

The step's time at least is the roofline's: how far a run stays behind it is what no plan knows.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from llamax import config, variants
from llamax.batch import Batch
from llamax.observe.metrics import peak as peak_of_devices
from llamax.observe.progress import size
from llamax.optim.build import optimizer
from llamax.plan import compiled, hlo, plan, report
from llamax.train.state import init

KINDS = {  # part of jax's device_kind -> the topology of one
    "H100": "h100:1x1",
    "H200": "h200:1x1",
    "B200": "b200:1x1",
    "TPU v4": "v4:1x1x1",
    "TPU v5 lite": "v5e:1x1",
    "TPU v5": "v5p:1x1x1",
    "TPU v6": "v6e:1x1",
}
WARM, STEPS = 2, 8


def run_of(tiny: bool, rows: int, seq_len: int) -> config.Run:
    """Maverick's period twice: 4 layers of 8 experts beside 4 dense ones."""
    sizes = dict(vocab_size=32_768, dim=2048, n_heads=16, n_kv_heads=4, head_dim=128)
    widths = dict(dense_ffn_dim=8192, expert_ffn_dim=4096, n_experts=8, chunk_len=2048)
    if tiny:
        sizes = dict(vocab_size=2048, dim=128, n_heads=4, n_kv_heads=2, head_dim=32)
        widths = dict(dense_ffn_dim=256, expert_ffn_dim=256, n_experts=4, chunk_len=64)
    model = config.Model(**sizes, **widths, plan=((variants.MAVERICK_PERIOD, 2),), qk_norm=False)
    return config.Run(
        name="plan_check",
        model=model,
        data=config.Data(seq_len=seq_len, batch_tokens=rows * seq_len, multimodal_steps=0),
        mesh=config.Mesh(data=1),
        train=config.Train(compute_dtype="float32" if tiny else "bfloat16", remat="period"),
    )


def random_batch(step: compiled.Traced, vocabulary: int) -> Batch:
    """One document a row."""
    rng = np.random.default_rng(0)
    shape = step.batch.tokens.shape
    filled = {
        "tokens": rng.integers(0, vocabulary, shape),
        "targets": rng.integers(0, vocabulary, shape),
        "loss_weights": np.ones(shape),
        "segment_ids": np.ones(shape),
        "positions": np.broadcast_to(np.arange(shape[1]), shape),
    }
    empty = {name: np.zeros(x.shape) for name, x in step.batch.of_tokens().items()} | {
        "tiles": np.zeros(step.batch.tiles.shape)
    }
    return Batch(
        **{
            name: jax.device_put(value.astype(getattr(step.batch, name).dtype), getattr(step.batch, name).sharding)
            for name, value in {**empty, **filled}.items()
        }
    )


def fresh_state(run: config.Run, step: compiled.Traced) -> Any:
    bones = compiled.bones_of(run, step.mesh)
    tx = optimizer(run.optim, run.train.steps, bones.kinds)
    places = jax.tree.map(lambda x: x.sharding, step.state)
    return jax.jit(lambda: init(bones, tx, run.seed, run.health.spike_window), out_shardings=places)()


def measured(run: config.Run, step: compiled.Traced, program: Any) -> tuple[float, int | None]:
    """(seconds a step, the device's peak bytes, None if it does not tell)."""
    state, batch = fresh_state(run, step), random_batch(step, run.model.vocab_size)
    seconds = []
    for _ in range(WARM + STEPS):
        start = time.perf_counter()
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics.loss)
        seconds.append(time.perf_counter() - start)
    assert bool(metrics.finite), "the loss or its gradient is not finite"
    told = jax.devices()[0].memory_stats() or {}
    return float(np.median(seconds[WARM:])), told.get("peak_bytes_in_use")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model in float32")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=None, help="tokens a row; 4096, or 256 with --tiny")
    parser.add_argument("--ahead", action="store_true", help="compile as `llamax plan` does, too")
    args = parser.parse_args()
    run = run_of(args.tiny, args.rows, args.seq_len or (256 if args.tiny else 4096))
    device = jax.devices()[0]
    name = next((name for kind, name in KINDS.items() if kind in device.device_kind), "h100:1x1")
    print(f"{device.device_kind}, jax {jax.__version__}; planned for {name}", flush=True)

    guess = plan(run, name, estimate=True)
    step = compiled.traced(run, [device])
    start = time.perf_counter()
    program = step.step.lower(step.state, step.batch).compile()
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    peak, cost = compiled.peak_of(program), hlo.cost(program.as_text())
    step_s, used = measured(run, step, program)
    ahead: report.Plan | None = plan(run, name) if args.ahead else None

    table = Table(title=f"{guess.parameters / 1e9:.2f}B parameters, {args.rows} rows of {run.data.seq_len} tokens")
    for column in ("", "peak", "FLOPs", "seconds a step"):
        table.add_column(column, justify="left" if not column else "right")
    for how, made in (("estimated", guess), ("compiled without the card", ahead)):
        if made:
            at_least = f">= {made.roofline.step_s:.4g}"
            table.add_row(f"{how} ({made.how})", size(made.bytes.peak), f"{made.flops.total:.4g}", at_least)
    table.add_row("compiled here", size(peak), f"{cost.flops:.4g}", "")
    table.add_row("measured", size(used) if used else "not told", "", f"{step_s:.4g}")
    Console(width=110).print(table)
    rate = guess.flops.model / step_s
    print(f"model FLOPs {guess.flops.model:.4g} a step: {rate / 1e12:.4g} TFLOP/s,", end=" ")
    print(f"MFU {rate / peak_of_devices([device]).flops_per_s:.1%}; the bound is {guess.roofline.mfu:.1%}")


if __name__ == "__main__":
    main()
