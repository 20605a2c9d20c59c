"""What a step of Scout costs as rows grow: FLOPs and peak bytes of a device at 8k, 32k, 128k and 512k tokens a row.

    python bench/cost_growth.py                  # compiles for 256 TPU v5p (extra `tpu`); saves docs/cost_growth.png

Every step has the same 8.4M tokens on the same 256 devices, 16k of a row's tokens a device: context = tokens / 16k. So
what grows is what a token costs. Local layers see chunks of 8,192 tokens whatever the row's length, so theirs should
stay; layers that see the whole row grow with it. Text only.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llamax import config
from llamax.plan import ahead, hlo
from llamax.plan.topology import parse

ROOT = Path(__file__).resolve().parents[1]
DEVICES, TOKENS, TOPOLOGY = 256, 1024 * 8192, "v5p:8x8x4"
PARTS = {  # of an operation's name -> what it belongs to
    r"splash": "local attention",
    r"bkgt|bksd": "whole-row attention",
    r"ragged_dot|tgmm": "experts",
    r"": "other matmuls",
}


def run_of(seq_len: int) -> config.Run:
    context = max(1, seq_len // 16_384)
    split = [f"--config.mesh.context={context}", f"--config.mesh.fsdp={64 // context}", "--config.mesh.expert=4"]
    rows = [f"--config.data.seq_len={seq_len}", f"--config.data.batch_tokens={TOKENS}", "--config.data.lanes=1"]
    text = ["--config.data.multimodal_steps=0", "--config.train.remat=block"]
    return config.freeze(config.load(str(ROOT / "recipes" / "scout_pretrain.py"), [*split, *rows, *text]))


def parts_of(cost: hlo.Cost, layers: tuple[str, ...]) -> Counter[str]:
    """FLOPs by what they belong to. Where rows are not split, layers of both kinds run one kernel on the same rows."""
    found: Counter[str] = Counter()
    for name, flops in cost.by_name.items():
        found[next(part for pattern, part in PARTS.items() if re.search(pattern, name))] += flops
    if not found["whole-row attention"]:
        whole = sum(not kind.startswith("rope_chunk") for kind in layers) / len(layers)
        found["whole-row attention"] = whole * found["local attention"]
        found["local attention"] -= found["whole-row attention"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[8192, 32_768, 131_072, 524_288], help="tokens a row")
    parser.add_argument("--plot", default=str(ROOT / "docs" / "cost_growth.png"))
    args = parser.parse_args()
    columns = [*dict.fromkeys(PARTS.values()), "all"]
    table = Table(title=f"Scout on {TOPOLOGY}: a device's share of a step, 1e12 FLOPs")
    for name in ("tokens a row", "context", *columns, "peak GiB"):
        table.add_column(name, justify="right")
    measured = []
    for seq_len in args.rows:
        run = run_of(seq_len)
        program = ahead.program(run, parse(TOPOLOGY))
        found = parts_of(hlo.cost(program.text), run.model.layers)
        found["all"] = sum(found.values())
        measured.append((seq_len, found, program.peak_bytes))
        figures = (f"{found[name] / 1e12:,.0f}" for name in columns)
        table.add_row(f"{seq_len:,}", str(run.mesh.context), *figures, f"{program.peak_bytes / 2**30:.1f}")
        Console(width=120).print(table)
    if args.plot:
        plot(measured, columns, args.plot)


def plot(measured: list, columns: list[str], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lengths = [seq_len for seq_len, *_ in measured]
    for name in columns:
        left.plot(lengths, [found[name] / 1e12 for _, found, _ in measured], "o-", label=name)
    left.set(xscale="log", yscale="log", xlabel="tokens a row", title="10$^{12}$ FLOPs a device and step, same tokens")
    left.legend()
    right.plot(lengths, [peak / 2**30 for *_, peak in measured], "o-")
    right.set(xscale="log", xlabel="tokens a row", title="peak GiB a device", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
