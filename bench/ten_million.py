"""Scout on a row of 10,485,760 tokens: the plan of a training step on 256 chips, and what decoding keeps.

    python bench/ten_million.py             # compiles (extra `tpu`), some minutes; --estimate takes seconds

A step is one row, so the tokens of a step are 10.5M here and not the recipe's 8.4M: a stage of its own, with all chips
along the row (context=128) but for two that share heads and hidden widths (tensor=2).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from llamax import config, stages
from llamax.model import count
from llamax.observe import log
from llamax.plan import plan, report

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "scout_context.py"
ROW = 10 * 2**20  # tokens
CHIP_BYTES = 95 * 2**30  # of a v5p
STAGE = config.Stage(
    tokens=100 * ROW,
    data=dict(seq_len=ROW, lanes=1, multimodal_steps=0.0),
    mesh=dict(data=1, fsdp=1, context=128, tensor=2),
    optim=dict(warmup_steps=10),
)


def stage() -> config.Run:
    run = config.freeze(config.load(str(RECIPE)))
    data = dataclasses.replace(run.data, batch_tokens=ROW)
    return stages.named(dataclasses.replace(run, data=data, stages={"to_10240k": STAGE}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:8x8x4")
    parser.add_argument("--estimate", action="store_true")
    options = parser.parse_args()
    run = stage()
    report.show(plan(run, options.topology, estimate=options.estimate), log.CONSOLE)
    weights = 2 * count.parameters(run.model).total
    print("\n| tokens | cache, GiB | of 8 chips each, with bfloat16 weights | FLOPs of reading them |")
    print("|---:|---:|---:|---:|")
    for tokens in (2**18, 2**20, ROW):
        cache = count.cache_bytes(run.model, tokens)
        each = (cache + weights) / 8
        share = f"{each / 2**30:.1f} GiB, {each / CHIP_BYTES:.0%}"
        forward = count.token_flops(run.model, tokens) * tokens / 3
        print(f"| {tokens:,} | {cache / 2**30:.1f} | {share} | {forward:.3g} |")


if __name__ == "__main__":
    main()
