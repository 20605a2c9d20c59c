"""The plans of docs/plans.md: every named layout of every recipe, compiled for its cluster; a table.

    python bench/plans.py                        # all of them (extras `tpu` and `cuda`), a few minutes each
    python bench/plans.py --only scout --keep runs/plans   # some; keeps what `llamax plan --json` prints, and reuses it
    python bench/plans.py --only maverick_context --estimate   # by formulas, in seconds

Beside what a device sends along each set of mesh axes stands the least that this mesh allows: every weight gathered
twice, for the forward and the backward pass, and its gradient sent once; tokens to their experts and back, forward and
backward; an embedding and its gradient; sums over `tensor` after attention and feed-forward, forward and backward; keys
and values once round the ring of `context`, and once more with their gradients.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from llamax import config, plan, stages
from llamax.plan import report
from llamax.plan.topology import parse

ROOT = Path(__file__).resolve().parents[1]
PLANS = (  # recipe and layout, cluster; of a run in stages, which
    ("scout_pretrain.py:v5p_256", "v5p:8x8x4"),
    ("scout_pretrain.py:h100_256", "h100:32x8"),
    ("scout_pretrain.py:v5p_256_long", "v5p:8x8x4"),
    ("maverick_pretrain.py:v5p_512", "v5p:8x8x8"),
    ("maverick_pretrain.py:h200_512", "h200:64x8"),
    ("behemoth_pretrain.py:v5p_2048", "v5p:8x16x16"),
    ("behemoth_pretrain.py:h200_2048", "h200:256x8"),
    ("scout_context.py:v5p_256", "v5p:8x8x4", "to_64k"),
    ("scout_context.py:v5p_256", "v5p:8x8x4", "to_256k"),
    ("maverick_context.py:v5p_512", "v5p:8x8x8", "to_64k"),
    ("maverick_context.py:v5p_512", "v5p:8x8x8", "to_256k"),
)


class Planned(NamedTuple):
    """What is planned, and by what."""

    spec: str
    topology: str
    stage: str | None = None
    estimate: bool = False

    @property
    def title(self) -> str:
        return f"{self.spec.replace('.py', '')}{f' {self.stage}' if self.stage else ''}"

    @property
    def how(self) -> str:
        return ", estimated" if self.estimate else ""

    @property
    def run(self) -> config.Run:
        return stages.named(config.freeze(config.load(str(ROOT / "recipes" / self.spec))), self.stage)


def told(what: Planned, kept: Path | None) -> dict[str, Any]:
    """What `llamax plan recipes/SPEC --topology TOPOLOGY --stage STAGE --json` prints."""
    file = kept / f"{what.title.replace(':', '-').replace(' ', '-')}.json" if kept else None
    if file and file.exists():
        return json.loads(file.read_text())
    text = report.as_json(plan.plan(what.run, what.topology, estimate=what.estimate))
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return json.loads(text)


def least(what: Planned) -> dict[str, float]:
    """Bytes by axes."""
    return {t.axes: t.sent_bytes for t in plan.least(what.run, parse(what.topology))}


def row(what: Planned, made: dict[str, Any]) -> str:
    mesh = " x ".join(f"{axis}={n}" for axis, n in made["mesh"].items() if n > 1)
    size, flops, roofline = made["bytes"], made["flops"], made["roofline"]
    limit = f"{size['peak'] / 2**30:.1f} of {size['limit'] / 2**30:.1f} GiB"
    useful = (flops["total"] - flops["recomputed"]) / flops["model"]
    cells = [
        f"`{what.title}` on `{what.topology}`{what.how}",
        f"{mesh}",
        f"{limit}{'' if size['fits'] else ', does not fit'}",
        f"{flops['total']:.3g}, {flops['recomputed'] / flops['total']:.0%} again; rest / model {useful:.3f}",
        f"{roofline['step_s']:.3g} s, {roofline['tokens_per_s'] / 1e6:.3g}M tokens/s",
        f"{roofline['mfu']:.1%}, {roofline['binds']}",
    ]
    return f"| {' | '.join(cells)} |"


def rows_of_traffic(what: Planned, made: dict[str, Any]) -> list[str]:
    floor = least(what)
    tokens = made["tokens"] / made["devices"]
    lines = []
    sent = {t["axes"]: t for t in made["traffic"] if t["sent_bytes"] > 0.001 * made["traffic"][0]["sent_bytes"]}
    for axes in sent | {name: None for name, n in floor.items() if n > 0.001 * max(floor.values())}:
        t, low = sent.get(axes), floor.get(axes, 0.0)
        much, slow = (t["sent_bytes"], t["slow_bytes"]) if t else (0.0, 0.0)
        lines.append(_cells(what, axes, much, low, tokens, slow))
    much, low = sum(t["sent_bytes"] for t in made["traffic"]), math.fsum(floor.values())
    return [*lines, _cells(what, "all", much, low, tokens, sum(t["slow_bytes"] for t in made["traffic"]))]


def _cells(what: Planned, axes: str, much: float, low: float, tokens: float, slow: float) -> str:
    ratio = f"{much / low:.2f}" if low else ""
    cells = [f"`{what.title}`{what.how}", axes, f"{much / tokens / 1e6:.3g}", f"{low / tokens / 1e6:.3g}", ratio]
    return f"| {' | '.join([*cells, f'{slow / tokens / 1e6:.3g}' if slow else 'no'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="of these names only")
    parser.add_argument("--estimate", action="store_true", help="by formulas")
    parser.add_argument("--keep", type=Path, help="a folder")
    args = parser.parse_args()
    chosen = [Planned(*one)._replace(estimate=args.estimate) for one in PLANS if args.only in one[0]]
    made = [(what, told(what, args.keep)) for what in chosen]
    print("| plan | mesh | peak | FLOPs a device and step | at best | MFU bound, what binds |\n|" + "---|" * 6)
    print("\n".join(row(*each) for each in made))
    print("\n| plan | axes | MB a token | least | ratio | over slow links |\n|" + "---|" * 6)
    print("\n".join(line for each in made for line in rows_of_traffic(*each)))


if __name__ == "__main__":
    main()
