"""What every memory lever does to one step: peak bytes of a device, and what they are paid with.

    python bench/memory_levers.py [--topology v5e:2x4] [--only NAME ...]

A Scout-shaped model of width 1024 (8 layers, 8 experts, 32,768 tokens of vocabulary; 16 rows of 2,048 tokens a step) is
compiled ahead of time for eight chips that need not be here (`pip install 'llamax[tpu]'`), once as it is and once with
each lever, the rest unchanged. State is what rests between two steps: parameters and the optimizer's moments. FLOPs and
bytes sent are read from the program (llamax/plan/hlo.py), of one device and one step; `data` is the slow axis.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from contextlib import ExitStack
from unittest import mock

from llamax import config, variants
from llamax.kernels.cross_entropy import slow_cross_entropy
from llamax.plan import hlo
from llamax.plan.topology import parse, prepare

BASE = dict(
    mesh=dict(data=2, fsdp=2, expert=2),
    train=dict(steps=100, compute_dtype="bfloat16", remat="period"),
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
    "train.compute_dtype=float32": dict(train=dict(compute_dtype="float32")),
    WHOLE: {},
}


def run_of(changes: dict) -> config.Run:
    small = dict(dim=1024, n_heads=8, n_kv_heads=4, expert_ffn_dim=1024, n_experts=8, vocab_size=32_768)
    plan = ((("rope_chunk+moe", "nope_full+moe"), 4),)
    model = dataclasses.replace(variants.scout(), vision=None, chunk_len=1024, plan=plan, **small)
    data = config.Data(seq_len=2048, batch_tokens=16 * 2048, multimodal_steps=0.0, sources={"random": config.Source()})
    sections = {name: BASE.get(name, {}) | changes.get(name, {}) for name in ("mesh", "train", "optim")}
    return config.Run(
        name="levers",
        model=model,
        data=data,
        mesh=config.Mesh(**sections["mesh"]),
        train=config.Train(**sections["train"]),
        optim=config.Optim(**sections["optim"]),
    )


def row(name: str, topology: str) -> str:
    from llamax.plan import compiled

    run, where = run_of(CASES[name]), parse(topology)
    began = time.monotonic()
    with ExitStack() as changed:
        if name == WHOLE:
            changed.enter_context(mock.patch("llamax.model.seam.cross_entropy", slow_cross_entropy))
        step = compiled.traced(run, where.devices())
        program = step.step.lower(step.state, step.batch).compile()
    found, cost = program.memory_analysis(), hlo.cost(program.as_text())
    sent = {True: 0.0, False: 0.0}
    for exchange, n in cost.sent.items():
        sent["data" in hlo.spanned(exchange.groups, dict(step.mesh.shape))] += n
    state = compiled.bytes_per_device((step.state.params, step.state.opt))
    sizes = (found.peak_memory_in_bytes, state, found.host_temp_size_in_bytes, sent[True], sent[False])
    cells = " | ".join(f"{x / 2**20:,.0f}" for x in sizes)
    flops = f"{cost.flops / 1e12:.2f} | {cost.recomputed / 1e12:.2f}"
    return f"| `{name}` | {cells} | {flops} | {time.monotonic() - began:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES))
    options = parser.parse_args()
    prepare()
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
        print(row(name, options.topology), flush=True)


if __name__ == "__main__":
    main()
