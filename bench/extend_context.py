"""Context extension at a laptop's size: the recipe, and what changes if a part of it does; a table and a heat map.

    python bench/extend_context.py --out runs/extend                       # every arm; what is done is not done again
    python bench/extend_context.py "iRoPE" "llama, yarn" --out runs/extend # some, and what they begin with
    python bench/extend_context.py --table --plot docs/extend.png --out runs/extend   # of what is done

An arm is a run of `recipes/scout_context.py` with changes, in a folder of its own. Those of iRoPE begin where the
recipe's rows of 256 tokens end and go straight to 2,048, for STEPS steps; those named `llama` are a Llama-3-shaped
stack (4 dense layers, RoPE over the whole row) that was given the same data up to there. All are asked for the same 30
questions a task, at depths of fifths, and read the same documents.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from ml_collections import ConfigDict

from llamax import config, run
from llamax.observe import plots

RECIPE = "recipes/scout_context.py"
BATCH, STEPS = 4096, 60
SHORT, LONG, CHUNK = 256, 2048, 256
AT = 400  # the step at which the recipe's rows of 256 end
NEW_THETA = 160_000.0  # 16 times the old one, as Llama 3 to Llama 2's would be 50
QUICK = dict(peak_lr=1e-3, schedule="wsd", warmup_steps=10, decay_steps=30, end_lr_ratio=0.1)
DENSE = dict(plan=((("rope_full+dense",), 4),), qk_norm=False, attn_temperature=0.0)


class Arm(NamedTuple):
    size: str = "small"  # of the recipe
    begins: str = "small"  # an arm, at its step AT; "": from nothing
    model: dict[str, Any] = {}
    change: Callable[[ConfigDict], None] | None = None


# ----------------------------------------------------------------------------------------------------------- changes


def quickly(cfg: ConfigDict) -> None:
    """Straight from rows of 256 to rows of 2,048, in few steps."""
    data = cfg.stages.to_2048.data
    cfg.stages = ConfigDict({"to_2048": dict(tokens=STEPS * BATCH, data=data.to_dict(), optim=QUICK)})


def short_rows(cfg: ConfigDict) -> None:
    """As many tokens, on rows of 256."""
    sources = cfg.stages.at_256_whole.data.sources.to_dict()
    cfg.stages = ConfigDict({"to_2048": dict(tokens=STEPS * BATCH, data=dict(sources=sources), optim=QUICK)})


def no_short_text(cfg: ConfigDict) -> None:
    quickly(cfg)
    for name in ("docs", "python"):
        del cfg.data.sources[name]


def rows_of_256(cfg: ConfigDict) -> None:
    """The recipe up to where the ablations begin."""
    for name in ("to_512", "to_1024", "to_2048"):
        del cfg.stages[name]


SCALED = dict(original_len=SHORT, factor=8.0)  # of rows; of chunks that grow with them
LLAMA3 = dict(scaling="llama3", low_freq_factor=1.0, high_freq_factor=4.0, **SCALED)
WHOLE = dict(chunk_len=LONG)  # chunks that grow from 256 tokens to the row
ARMS = {
    "short": Arm("small_short", ""),
    "small": Arm("small", "short"),
    "iRoPE": Arm(),
    "iRoPE, rows of 256": Arm(change=short_rows),
    "iRoPE, no short text": Arm(change=no_short_text),
    "iRoPE, no temperature": Arm(model=dict(attn_temperature=0.0)),
    "iRoPE, SSMax": Arm(model=dict(attn_scale="ssmax", ssmax_len=SHORT)),
    "iRoPE, linear": Arm(model=dict(rope=dict(scaling="linear", factor=8.0))),
    "iRoPE, yarn": Arm(model=dict(rope=dict(scaling="yarn", **SCALED))),
    "grown chunk": Arm(model=WHOLE),
    "grown chunk, linear": Arm(model=dict(rope=dict(scaling="linear", factor=8.0), **WHOLE)),
    "grown chunk, yarn": Arm(model=dict(rope=dict(scaling="yarn", **SCALED), **WHOLE)),
    "grown chunk, new theta": Arm(model=dict(rope=dict(theta=NEW_THETA), **WHOLE)),
    "llama short": Arm("small_short", "", DENSE),
    "llama at 256": Arm("small", "llama short", DENSE, rows_of_256),
    "llama": Arm("small", "llama at 256", DENSE),
    "llama, linear": Arm("small", "llama at 256", DENSE | dict(rope=dict(scaling="linear", factor=8.0))),
    "llama, ntk": Arm("small", "llama at 256", DENSE | dict(rope=dict(scaling="ntk", factor=8.0))),
    "llama, yarn": Arm("small", "llama at 256", DENSE | dict(rope=dict(scaling="yarn", **SCALED))),
    "llama, llama3": Arm("small", "llama at 256", DENSE | dict(rope=LLAMA3)),
    "llama, new theta": Arm("small", "llama at 256", DENSE | dict(rope=dict(theta=NEW_THETA))),
}


# -------------------------------------------------------------------------------------------------------------- arms


def configured(out: Path, name: str) -> config.Run:
    arm = ARMS[name]
    cfg = config.load(f"{RECIPE}:{arm.size}")
    if arm.begins:
        cfg.init.path = str(folder(out, arm.begins))
    if arm.begins in ("small", "llama at 256") and arm.size == "small":
        cfg.init.step, cfg.init.differs = AT, ("rope.*", "chunk_len", "attn_*")
        cfg.model.chunk_len = CHUNK
        cfg.evals.far.samples = 5
        (arm.change or quickly)(cfg)
    elif arm.change:
        arm.change(cfg)
    cfg.model.update(arm.model)
    return config.freeze(cfg)


def train(out: Path, name: str) -> None:
    """Trains an arm, after what it begins with, and writes down its figures."""
    arm, here = ARMS[name], folder(out, name)
    if (here / "arm.json").exists():
        return
    if arm.begins:
        train(out, arm.begins)
    began = time.monotonic()
    result = run.train(configured(out, name), here)
    if not result.finished:
        raise SystemExit("stopped; the same command goes on")
    figures = {f"{k}/{key}": value for k, report in result.reports.items() for key, value in report.scalars.items()}
    cells = result.reports["far"].details["cells"]
    told = {"seconds": round(time.monotonic() - began), "figures": figures, "cells": cells}
    (here / "arm.json").write_text(json.dumps(told, indent=1))


def folder(out: Path, name: str) -> Path:
    return out / name.replace(",", "").replace(" ", "_")


def done(out: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what was written down) of every arm that is done."""
    for name in ARMS:
        if (told := folder(out, name) / "arm.json").exists():
            yield name, json.loads(told.read_text())


COLUMNS = {
    "400 records": f"far/key_value/{LONG}",
    "16 in text": f"far/key_value_short/{LONG}",
    "needle": f"far/needle/{LONG}",
    "the three at 256": "",
    "nats, first 256 of 2,048": "position/nats_first",
    "last quarter": "position/nats_last_quarter",
    "Python, rows of 256": "short_python/nats/256",
    "documents": "short_docs/nats/256",
    "seconds": "seconds",
}


def table(out: Path) -> str:
    """Markdown: a row for each arm that is done."""
    rows = ["| arm | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, told in done(out):
        rows.append(f"| {name} | " + " | ".join(figure(told, key) for key in COLUMNS.values()) + " |")
    return "\n".join(rows)


def figure(told: dict[str, Any], key: str) -> str:
    if key == "seconds":
        return str(told[key])
    if not key:
        return ", ".join(
            f"{told['figures'][f'far/{task}/{SHORT}']:.0%}" for task in ("key_value", "key_value_short", "needle")
        )
    return f"{told['figures'][key]:.2f}" if "nats" in key else f"{told['figures'][key]:.0%}"


def picture(out: Path, path: Path, task: str) -> None:
    """A heat map: an arm a row, a depth a column."""
    arms = dict(done(out))
    cells = {
        name: {c["depth"]: c["score"] for c in told["cells"] if c["task"] == task and c["length"] == LONG}
        for name, told in arms.items()
    }
    depths = sorted(next(iter(cells.values())))
    grid = np.array([[row[depth] for depth in depths] for row in cells.values()])
    labels = dict(x=[f"{depth:.0%}" for depth in depths], y=list(cells))
    axes = dict(x_title="depth of what is asked for", y_title="")
    path.write_bytes(
        plots.png(plots.heat_map(grid, **labels, **axes, title=f"{task} at {LONG:,} tokens: answers that are right"))
    )
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of {'; '.join(ARMS)}. None: all of them")
    parser.add_argument("--out", type=Path, default=Path("runs/extend"), help="where their runs are")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="write a heat map of --task")
    parser.add_argument("--task", default="needle", choices=("needle", "key_value", "key_value_short"))
    asked = parser.parse_args()
    if unknown := set(asked.arms) - set(ARMS):
        parser.error(f"there is no arm {', '.join(unknown)}; there are {'; '.join(ARMS)}")
    out = asked.out.resolve()
    for name in () if asked.table else asked.arms or ARMS:
        train(out, name)
    print(table(out))
    if asked.plot:
        picture(out, asked.plot, asked.task)


if __name__ == "__main__":
    main()
