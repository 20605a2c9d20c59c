"""What one device needs when the tokens of a row are split over the mesh axis `context`: bytes, and what it sends.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python bench/context_memory.py
    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python bench/context_memory.py --tokens 4096

Compiles the training step of a small model with both kinds of layer, a row of `--tokens` tokens a step, for each size
of the axis, and runs nothing. Temporary bytes are activations, gradients and what kernels work with.
"""

from __future__ import annotations

import argparse

import jax

from llamax import config, stripes
from llamax.model.seam import make_seam
from llamax.model.skeleton import skeleton
from llamax.optim.build import optimizer
from llamax.parallel import place
from llamax.parallel.mesh import make_mesh
from llamax.plan import hlo
from llamax.train.programs import abstract_batch, build


def model(chunk_len: int) -> config.Model:
    return config.Model(
        vocab_size=4096,
        dim=64,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        plan=((("rope_chunk+moe", "rope_chunk+moe", "rope_chunk+moe", "nope_full+moe"), 2),),
        expert_ffn_dim=64,
        n_experts=4,
        chunk_len=chunk_len,
        attn_temperature_floor=chunk_len,
    )


def measure(run: config.Run, context: int) -> dict[str, float]:
    """Of one step on one device."""
    mesh = make_mesh({"context": context}, jax.devices()[:context])
    cut = stripes.of(run.model, run.data.seq_len, context)
    bones = skeleton(run.model, make_seam(mesh, stripes=cut), patch_id=0, train=run.train)
    step, state = build(run, bones, optimizer(run.optim, run.train.steps, bones.kinds), mesh)
    program = step.lower(state, abstract_batch(run, 0, place.batch_shardings(mesh))).compile()
    cost = hlo.cost(program.as_text())
    return {
        "temporary MiB": program.memory_analysis().temp_size_in_bytes / 2**20,
        "sent MiB": sum(cost.sent.values()) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="a row")
    parser.add_argument("--chunk", type=int, default=512, help="tokens that a local layer sees")
    parser.add_argument("--context", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    data = config.Data(seq_len=args.tokens, batch_tokens=args.tokens, multimodal_steps=0.0)
    run = config.Run(name="context", model=model(args.chunk), data=data)
    for context in args.context:
        figures = measure(run, context)
        print(f"context {context}: " + ", ".join(f"{name} {value:,.1f}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
