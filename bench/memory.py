"""Peak memory of the training step beside what it cannot do without, from the compiler's own figures.

    python bench/memory.py [--only NAME]

Each step is compiled for the CPU from shapes alone, with its state donated as in a run; nothing is allocated. The peak
is XLA's: arguments + outputs - outputs that take over an argument's memory + temporaries. It is held against

    params      parameters, float32
    optimizer   AdamW's two moments
    period      what one period's forward pass hands to its backward pass, for one micro-batch: the leaves of `jax.vjp`
                of a period as the model runs it, without the weights among them. Without rematerialisation, of all of
                them
    chunk       the logits of one chunk of the vocabulary, [N, 512] float32

and what is needed beside these is shown, but not counted into the ratio:

    gradients   as large as the parameters: the clip needs their norm before the first is used. Twice with
                accumulation: the sum, and the micro-batch's that is added to it
    inputs      with rematerialisation, the activations [N, D] that enter every period
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from llamax import config, variants
from llamax.kernels.cross_entropy import CHUNK
from llamax.model.attention import places
from llamax.model.seam import make_seam
from llamax.model.skeleton import Skeleton, skeleton
from llamax.optim.build import optimizer
from llamax.parallel import place
from llamax.parallel.mesh import make_mesh
from llamax.train.programs import abstract_batch, shape_at, state_shardings
from llamax.train.state import State, init
from llamax.train.step import make_step

MIB = 2**20


def l4_tiny() -> config.Run:
    """As in bench/l4_tiny.py: 8 rows of 256 tokens, no rematerialisation."""
    period = ("rope_chunk+dense", "rope_chunk+moe", "rope_chunk+dense", "nope_full+moe")
    sizes = dict(vocab_size=2048, dim=256, n_heads=8, n_kv_heads=2, head_dim=32, dense_ffn_dim=512, expert_ffn_dim=512)
    model = config.Model(**sizes, plan=((period, 1),), n_experts=8, chunk_len=128)
    return run_of(model, rows=8, seq_len=256, remat="none")


def scout(repeats: int, rows: int, accumulate: int = 1, remat: str = "period") -> config.Run:
    """Scout's shape at width 512 and with a vocabulary of 16,384: 4 layers a repeat, rows of 1,024 tokens."""
    small = dict(dim=512, n_heads=8, n_kv_heads=2, head_dim=64, expert_ffn_dim=1024, n_experts=8, vocab_size=16_384)
    plan = ((variants.SCOUT_PERIOD, repeats),)
    model = dataclasses.replace(variants.scout(), vision=None, chunk_len=512, plan=plan, **small)
    return run_of(model, rows=rows, seq_len=1024, remat=remat, accumulate=accumulate)


def run_of(model: config.Model, *, rows: int, seq_len: int, **train) -> config.Run:
    data = config.Data(seq_len=seq_len, batch_tokens=rows * seq_len, sources={"random": config.Source()})
    return config.Run(name="memory", model=model, data=data, train=config.Train(steps=100, **train))


CASES = {
    "L4-tiny": l4_tiny(),
    "Scout-shaped, 4 layers": scout(1, 16),
    "Scout-shaped, 12 layers": scout(3, 16),
    "the same, 4 micro-batches": scout(3, 64, accumulate=4),
}


def compiled(run: config.Run) -> tuple[jax.stages.Compiled, State, Skeleton]:
    """The step as `run.train` compiles it, the shapes of its state, and the model's skeleton."""
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    bones = skeleton(run.model, make_seam(mesh), patch_id=-1, train=run.train)
    tx = optimizer(run.optim, run.train.steps, bones.kinds)
    shardings, rows = state_shardings(bones, tx, run, mesh), place.batch_shardings(mesh)
    step = jax.jit(
        make_step(run, bones, tx),
        in_shardings=(shardings, rows),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    shapes = jax.tree.map(shape_at, jax.eval_shape(partial(init, bones, tx, 0, run.health.spike_window)), shardings)
    return step.lower(shapes, abstract_batch(run, 0, rows)).compile(), shapes, bones


def size(tree) -> float:
    """MiB."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / MIB


def period_activations(run: config.Run, bones: Skeleton, shapes: State, rows: int) -> float:
    """MiB that one period hands from its forward to its backward pass for these rows.

    It hands over its weights too, which twice as many rows have in common.
    """
    return handed(run, bones, shapes, 2 * rows) - handed(run, bones, shapes, rows)


def handed(run: config.Run, bones: Skeleton, shapes: State, rows: int) -> float:
    """MiB of all arrays that the backward pass of one period is handed."""
    B, T, D = rows, run.data.seq_len, run.model.dim

    def backward(params, x_BTD, positions_BT, segments_BT):
        model = bones.bind(params, shapes.router_bias)
        graph, state = nnx.split(model.stack.segment0)
        first = jax.tree.map(lambda w: jnp.zeros(w.shape[1:], w.dtype), state)
        at = places(positions_BT, segments_BT, run.model)
        return jax.vjp(lambda layer, x: nnx.merge(graph, layer)(x, at), first, x_BTD)[1]

    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    x_BTD = jax.ShapeDtypeStruct((B, T, D), jnp.float32)
    return size(jax.eval_shape(backward, shapes.params, x_BTD, ids, ids))


def row(name: str, run: config.Run) -> str:
    program, shapes, bones = compiled(run)
    found = program.memory_analysis()
    peak = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    peak = (peak + found.temp_size_in_bytes) / MIB
    micro, repeats = run.data.rows // run.train.accumulate, run.model.plan[0][1]
    tokens, remat = micro * run.data.seq_len, run.train.remat == "period"
    params, moments = size(shapes.params), size(shapes.opt)
    period = period_activations(run, bones, shapes, micro) * (1 if remat else repeats)
    chunk = tokens * CHUNK * 4 / MIB
    inputs = tokens * run.model.dim * 4 / MIB * repeats if remat else 0
    gradients = params * (2 if run.train.accumulate > 1 else 1)
    least = params + moments + period + chunk
    columns = (params, moments, period, chunk, least, peak)
    ratio, with_all = peak / least, peak / (least + gradients + inputs)
    cells = " | ".join(f"{value:,.0f}" for value in columns)
    return f"| {name} | {cells} | **{ratio:.2f}** | {gradients:,.0f} | {inputs:,.0f} | {with_all:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES)
    options = parser.parse_args()
    print("MiB\n")
    print("| model | params | optimizer | period | chunk | sum | peak | peak / sum | gradients | inputs | with these |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in [options.only] if options.only else CASES:
        print(row(name, CASES[name]), flush=True)


if __name__ == "__main__":
    main()
