"""Draws a run's learning curves from its metrics.jsonl, for the README and the docs.

    pip install -e '.[docs]'
    python docs/make_curves.py runs/quickstart docs/curves.png
    python docs/make_curves.py runs/quickstart speed.svg --panel speed/tokens_per_s --panel speed/data_wait

A panel is a list of metric names with wildcards; a panel without data is left out. For looking at a run as it goes
there is TensorBoard.
"""

from __future__ import annotations

import argparse
import json
import math
from fnmatch import fnmatchcase
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PANELS = ("loss/next_token loss/source/*", "experts/layer_*/max_over_mean")


def read(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Each metric's (step, value) points; a null, which stands for what was not finite, is a gap."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        del row["time"]
        for name, value in row.items():
            series.setdefault(name, []).append((step, math.nan if value is None else value))
    return series


def draw(series: dict[str, list[tuple[int, float]]], panels: list[str], title: str):
    """One figure, a plot for each panel that has data."""
    chosen = [{n: s for n, s in series.items() if any(fnmatchcase(n, g) for g in panel.split())} for panel in panels]
    chosen = [panel for panel in chosen if panel]
    if not chosen:
        raise SystemExit(f"No metric matches {panels}; there are: {', '.join(sorted(series))}")
    figure, axes = plt.subplots(1, len(chosen), figsize=(5 * len(chosen), 3.6), squeeze=False, layout="constrained")
    for ax, panel in zip(axes[0], chosen, strict=True):
        folder = next(iter(panel)).split("/")[0]
        for name, points in sorted(panel.items()):
            main = name == "loss/next_token"
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) < 8 else None
            ax.plot(steps, values, label=name.removeprefix(f"{folder}/"), marker=marker, lw=2.2 if main else 1.2)
        ax.set(xlabel="step", title=folder)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, frameon=False, ncols=1 + len(panel) // 12)
    figure.suptitle(title)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("out", type=Path, help="a .png or .svg file")
    parser.add_argument("--panel", action="append", help="metric names with wildcards; may be repeated")
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    figure = draw(read(args.workdir / "metrics.jsonl"), args.panel or list(PANELS), args.title)
    figure.savefig(args.out, dpi=110)
    print(f"{args.out}: {args.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
