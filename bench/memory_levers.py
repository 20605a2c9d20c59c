"""What every memory lever does to one step: peak bytes of a device, and what they are paid with.

    python bench/memory_levers.py [--topology v5e:2x4] [--only NAME ...]

A Scout-shaped model of width 512 (8 layers, 8 experts, 16,384 tokens of vocabulary; 16 rows of 1,024 tokens a step) is
compiled for eight devices, once as it is and once with each lever, the rest unchanged; nothing is allocated. The
devices are simulated CPUs, which compute in float32, or with `--topology` chips that need not be here, in bfloat16
(`pip install 'llamax[tpu]'`). State is what rests between two steps: parameters and the optimizer's moments. FLOPs and
bytes sent are read from the program (llamax/plan/hlo.py), of one device and one step; `data` is the slow axis.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from contextlib import ExitStack
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax

from llamax import config, variants
from llamax.kernels.cross_entropy import slow_cross_entropy
from llamax.plan import hlo
from llamax.plan.topology import parse, prepare

BASE = dict(
    mesh=dict(data=2, fsdp=2, expert=2),
    train=dict(steps=100, remat="period"),
    optim=dict(warmup_steps=2),
)
WHOLE = "logits whole"
CASES: dict[str, dict] = {
    "as it is": {},
    "train.remat=none": dict(train=dict(remat="none")),
    "train.remat=attention": dict(train=dict(remat="attention")),
    "train.remat=block": dict(train=dict(remat="block")),
    "train.remat=offload": dict(train=dict(remat="offload")),
    "train.accumulate=2": dict(train=dict(accumulate=2)),
    "mesh.rules=zero": dict(mesh=dict(rules="zero")),
    "mesh.rules=zero train.accumulate=2": dict(mesh=dict(rules="zero"), train=dict(accumulate=2)),
    "optim.moments_dtype=bfloat16": dict(optim=dict(moments_dtype="bfloat16")),
    "mesh.data=1 mesh.fsdp=4": dict(mesh=dict(data=1, fsdp=4)),
    "mesh.data=1 mesh.tensor=2": dict(mesh=dict(data=1, tensor=2)),
    WHOLE: {},
}


def run_of(changes: dict, dtype: str) -> config.Run:
    small = dict(dim=512, n_heads=4, n_kv_heads=2, expert_ffn_dim=1024, n_experts=8, vocab_size=16_384)
    plan = ((("rope_chunk+moe", "nope_full+moe"), 4),)
    model = dataclasses.replace(variants.scout(), vision=None, chunk_len=512, plan=plan, **small)
    data = config.Data(seq_len=1024, batch_tokens=16 * 1024, multimodal_steps=0.0, sources={"random": config.Source()})
    sections = {name: BASE.get(name, {}) | changes.get(name, {}) for name in ("mesh", "train", "optim")}
    return config.Run(
        name="levers",
        model=model,
        data=data,
        mesh=config.Mesh(**sections["mesh"]),
        train=config.Train(**{"compute_dtype": dtype} | sections["train"]),
        optim=config.Optim(**sections["optim"]),
    )


def row(name: str, devices: list) -> str:
    from llamax.plan import compiled

    run = run_of(CASES[name], "float32" if devices[0].platform == "cpu" else "bfloat16")
    began = time.monotonic()
    with ExitStack() as changed:
        if name == WHOLE:
            changed.enter_context(mock.patch("llamax.model.seam.cross_entropy", slow_cross_entropy))
        step = compiled.traced(run, devices)
        program = step.step.lower(step.state, step.batch).compile()
    found, cost = program.memory_analysis(), hlo.cost(program.as_text())
    sent = {True: 0.0, False: 0.0}
    for exchange, n in cost.sent.items():
        sent["data" in hlo.spanned(exchange.groups, dict(step.mesh.shape))] += n
    state = compiled.bytes_per_device((step.state.params, step.state.opt))
    sizes = (compiled.peak_of(program), state, found.host_temp_size_in_bytes, sent[True], sent[False])
    cells = " | ".join(f"{x / 2**20:,.0f}" for x in sizes)
    flops = f"{cost.flops / 1e12:.2f} | {cost.recomputed / 1e12:.2f}"
    return f"| `{name}` | {cells} | {flops} | {time.monotonic() - began:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", help="of `llamax plan`, with eight devices")
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES))
    options = parser.parse_args()
    if options.topology:
        prepare()
    devices = parse(options.topology).devices() if options.topology else jax.devices()
    print("MiB and TFLOP a device and step\n")
    heads = (
        "lever",
        "peak",
        "state",
        "on the host",
        "sent over data",
        "over other axes",
        "TFLOP",
        "again",
        "compile s",
    )
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in options.only:
        print(row(name, devices), flush=True)


if __name__ == "__main__":
    main()
