"""What freezing and adapters save: peak memory and time of one training step, beside that of full training.

    python bench/tune.py [--rounds N]

A small mixture of experts with pictures, Scout's kinds of layers, on one device: every setting's step is compiled as in
a run, its peak is the compiler's (arguments + outputs - outputs that take over an argument's memory + temporaries), and
its time the least of N rounds in which all settings take a step in turn. The state is parameters and moments, as they
rest between steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from llamax import config, variants
from llamax.batch import Batch
from llamax.model.seam import make_seam
from llamax.model.skeleton import skeleton
from llamax.optim.build import optimizer
from llamax.parallel import place
from llamax.parallel.mesh import make_mesh
from llamax.plan.compiled import peak_of
from llamax.train.programs import abstract_batch, build
from llamax.train.state import init

MIB, PATCH = 2**20, 8191
VISION = config.Vision(
    tile_px=56, patch_px=7, max_tiles=1, dim=128, n_layers=2, n_heads=4, ffn_dim=256, adapter_dim=128
)
SMALL = dict(dim=256, n_heads=8, n_kv_heads=2, head_dim=32, expert_ffn_dim=512, n_experts=8, vocab_size=PATCH + 1)
MODEL = dataclasses.replace(variants.scout(), vision=VISION, chunk_len=256, plan=((variants.SCOUT_PERIOD, 2),), **SMALL)
LORA = config.Tune(lora_rank=8)
CASES = {
    "full": (config.Tune(), "period"),
    "routers frozen": (config.Tune(freeze=("*/router",)), "period"),
    "language model frozen": (config.Tune(freeze=("*", "!vision/*", "!projector")), "period"),
    "LoRA, rank 8": (LORA, "period"),
    "LoRA, rank 8, attention": (dataclasses.replace(LORA, lora_targets=("attention",)), "period"),
    "full, remat=none": (config.Tune(), "none"),
    "LoRA, rank 8, remat=none": (LORA, "none"),
}


class Case(NamedTuple):
    program: Any
    state: Any
    trained: int
    peak: int


def case(tune: config.Tune, remat: str) -> Case:
    data = config.Data(seq_len=512, batch_tokens=8 * 512, sources={"random": config.Source()}, tiles_per_row=2)
    train = config.Train(steps=100, remat=remat)
    run = config.Run(name="tune", model=MODEL, data=data, train=train, tune=tune)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    bones = skeleton(run.model, make_seam(mesh), patch_id=PATCH, train=train, tune=tune)
    tx = optimizer(run.optim, train.steps, bones.split(bones.kinds)[0])
    step, shapes = build(run, bones, tx, mesh)
    program = step.lower(shapes, abstract_batch(run, data.tiles_per_row, place.batch_shardings(mesh))).compile()
    fresh = jax.jit(partial(init, bones, tx, 0, run.health.spike_window), out_shardings=_places(shapes))
    trained = sum(x.size for x in jax.tree.leaves(bones.split(shapes.params)[0]))
    return Case(program, fresh(), trained, peak_of(program))


def _places(shapes: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, shapes)


def batch() -> Batch:
    """Random tokens, eight documents of one row each, a picture of two tiles at the beginning of each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, PATCH, (8, 512), dtype=np.int32)
    tokens[:, : 2 * VISION.tokens_per_tile] = PATCH
    ones = np.ones_like(tokens)
    tiles = rng.integers(0, 256, (8, 2, VISION.tile_px, VISION.tile_px, 3)).astype(np.uint8)
    positions = np.broadcast_to(np.arange(512, dtype=np.int32), tokens.shape)
    made = Batch(tokens, np.roll(tokens, -1, 1), ones.astype(np.float32), ones, positions, 0 * ones, tiles)
    return place.put_batch(made, mesh=make_mesh({"data": 1}, jax.devices()[:1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cases = {name: case(*how) for name, how in CASES.items()}
    states, rows = {name: one.state for name, one in cases.items()}, batch()
    least = dict.fromkeys(cases, float("inf"))
    for _ in range(options.rounds + 1):  # the first warms up
        for name, one in cases.items():
            began = time.perf_counter()
            states[name], _ = jax.block_until_ready(one.program(states[name], rows))
            least[name] = min(least[name], time.perf_counter() - began)
    whole = sum(x.size for x in jax.tree.leaves(cases["full"].state.params))
    print(f"{whole:,} parameters, {rows.tokens.size:,} tokens a step, {jax.devices()[0].device_kind}\n")
    print("| setting | trained | state, MiB | peak, MiB | step, s |\n|---|---|---|---|---|")
    for name, one in cases.items():
        held = sum(x.nbytes for x in jax.tree.leaves((states[name].params, states[name].opt)))
        cells = f"{one.trained:,} | {held / MIB:,.0f} | {one.peak / MIB:,.0f} | {least[name]:.2f}"
        print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
