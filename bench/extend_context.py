"""Context extension at a laptop's size: the recipe, what it is compared with, and ablations; a table and heat maps.

    python bench/extend_context.py short extended --out runs/extend   # the recipe: 256 tokens a row, then 2,048
    python bench/extend_context.py all --out runs/extend              # every arm; what is done is not done again
    python bench/extend_context.py --table --out runs/extend          # the table of what is done

An arm is a run of `recipes/scout_context.py` with changes, in a folder of its own; it trains, goes on or is done.
Ablations begin where the recipe's first stage ends (keys of two words, rows of 256 tokens) and train for 60 steps on
rows of 2,048 tokens. Those named `llama` are of a Llama-3-shaped stack: 4 dense layers, RoPE over the whole row. All
are evaluated by the recipe's own evaluations.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from ml_collections import ConfigDict

from llamax import config, run

RECIPE = "recipes/scout_context.py"
BATCH, AT_256, STEPS = 4096, 250, 60
WHOLE = ((("rope_full+dense",), 4),)
NEW_THETA = 160_000.0  # 10,000 x 8^(128 / 126) would be NTK's; Llama 3.1 and Code Llama took about 16 times or more


class Arm(NamedTuple):
    size: str  # of the recipe
    begins: str = ""  # an arm
    at: int = 0  # step of it
    change: Callable[[ConfigDict], None] | None = None
    differs: tuple[str, ...] = ()


def long_rows_only(cfg: ConfigDict, model: dict | None = None) -> None:
    """Straight to rows of 2,048 tokens, in few steps."""
    last = cfg.stages.to_2048
    last.tokens = STEPS * BATCH
    last.optim = dict(peak_lr=1e-3, warmup_steps=10, decay_steps=30, end_lr_ratio=0.1)
    last.model = model or {}
    for name in ("at_256", "to_512", "to_1024"):
        del cfg.stages[name]


def with_model(**fields) -> Callable[[ConfigDict], None]:
    def change(cfg: ConfigDict) -> None:
        long_rows_only(cfg)
        cfg.model.update(fields)

    return change


def with_rope(chunk_len: int = 0, **fields) -> Callable[[ConfigDict], None]:
    def change(cfg: ConfigDict) -> None:
        long_rows_only(cfg)
        cfg.model.rope.update(fields)
        if chunk_len:
            cfg.model.chunk_len = chunk_len

    return change


def llama(cfg: ConfigDict) -> None:
    cfg.model.update(plan=WHOLE, dense_ffn_dim=256, qk_norm=False, attn_temperature=0.0)


def llama_short(cfg: ConfigDict) -> None:
    """Rows of 256 tokens with keys of two words, in one run."""
    llama(cfg)
    del cfg.stages["words_2_far"]
    tiny = config.load(f"{RECIPE}:tiny")
    cfg.stages.words_3_text.data.sources = tiny.data.sources.to_dict()
    cfg.stages.words_3_text.tokens = 500 * cfg.data.batch_tokens


def llama_with(**fields) -> Callable[[ConfigDict], None]:
    def change(cfg: ConfigDict) -> None:
        long_rows_only(cfg)
        llama(cfg)
        cfg.model.rope.update(fields)

    return change


def no_text(cfg: ConfigDict) -> None:
    long_rows_only(cfg)
    for name in ("docs", "python"):
        cfg.stages.to_2048.data.sources[name]["weight"] = 0.0
    cfg.stages.to_2048.data.sources.packages["weight"] = 0.5


def short_rows(cfg: ConfigDict) -> None:
    """As many tokens, on rows of 256."""
    long_rows_only(cfg)
    cfg.stages.to_2048.data = {}


SCALED = dict(original_len=256, factor=8.0)  # of rows
CHUNKS = dict(original_len=128, factor=8.0)  # of chunks
ARMS = {
    "short": Arm("tiny_pretrain"),
    "extended": Arm("tiny", "short"),
    "long rows": Arm("tiny", "extended", AT_256, long_rows_only),
    "short rows": Arm("tiny", "extended", AT_256, short_rows),
    "no short text": Arm("tiny", "extended", AT_256, no_text),
    "no temperature": Arm("tiny", "extended", AT_256, with_model(attn_temperature=0.0), ("attn_temperature",)),
    "ssmax": Arm("tiny", "extended", AT_256, with_model(attn_scale="ssmax", ssmax_len=256), ("attn_scale",)),
    "fixed chunk, yarn of no more": Arm(
        "tiny", "extended", AT_256, with_rope(scaling="yarn", original_len=128, factor=1.0), ("rope.*",)
    ),
    "chunk of 1,024": Arm("tiny", "extended", AT_256, with_rope(1024), ("chunk_len",)),
    "chunk of 1,024, linear": Arm(
        "tiny", "extended", AT_256, with_rope(1024, scaling="linear", factor=8.0), ("chunk_len", "rope.*")
    ),
    "chunk of 1,024, yarn": Arm(
        "tiny", "extended", AT_256, with_rope(1024, scaling="yarn", **CHUNKS), ("chunk_len", "rope.*")
    ),
    "chunk of 1,024, new theta": Arm(
        "tiny", "extended", AT_256, with_rope(1024, theta=NEW_THETA), ("chunk_len", "rope.*")
    ),
    "llama short": Arm("tiny_pretrain", change=llama_short),
    "llama": Arm("tiny", "llama short", 0, llama_with()),
    "llama, linear": Arm("tiny", "llama short", 0, llama_with(scaling="linear", factor=8.0), ("rope.*",)),
    "llama, ntk": Arm("tiny", "llama short", 0, llama_with(scaling="ntk", factor=8.0), ("rope.*",)),
    "llama, yarn": Arm("tiny", "llama short", 0, llama_with(scaling="yarn", **SCALED), ("rope.*",)),
    "llama, llama3": Arm(
        "tiny",
        "llama short",
        0,
        llama_with(scaling="llama3", low_freq_factor=1.0, high_freq_factor=4.0, **SCALED),
        ("rope.*",),
    ),
    "llama, new theta": Arm("tiny", "llama short", 0, llama_with(theta=NEW_THETA), ("rope.*",)),
}


def folder(out: Path, name: str) -> Path:
    return out / name.replace(", ", "-").replace(",", "").replace(" ", "_")


def train(out: Path, name: str) -> None:
    """Trains an arm, and what it begins with."""
    arm = ARMS[name]
    if (folder(out, name) / "done.json").exists():
        return
    if arm.begins:
        train(out, arm.begins)
    cfg = config.load(f"{RECIPE}:{arm.size}")
    if arm.begins:
        cfg.init.path, cfg.init.step, cfg.init.differs = str(folder(out, arm.begins)), arm.at, arm.differs
    if arm.change:
        arm.change(cfg)
    began = time.monotonic()
    run.train(config.freeze(cfg), folder(out, name))
    seconds = time.monotonic() - began
    (folder(out, name) / "done.json").write_text(json.dumps({"seconds": round(seconds)}))


def figures(out: Path, name: str) -> dict[str, float]:
    """The last figures that an arm wrote."""
    found: dict[str, float] = {}
    for line in (folder(out, name) / "metrics.jsonl").read_text().splitlines():
        found |= json.loads(line)
    return found | json.loads((folder(out, name) / "done.json").read_text())


COLUMNS = {
    "lookup at 256": "eval/far/key_value_short/256",
    "at 2,048": "eval/far/key_value_short/2048",
    "needle at 256": "eval/far/needle/256",
    "at 2,048 ": "eval/far/needle/2048",
    "records at 2,048": "eval/full/key_value/2048",
    "nats, first 256": "eval/position/nats_first",
    "last quarter": "eval/position/nats_last_quarter",
    "short text": "eval/short_python/nats/256",
    "seconds": "seconds",
}


def table(out: Path) -> str:
    """Markdown: a row for each arm that is done."""
    rows = ["| arm | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in ARMS:
        if (folder(out, name) / "done.json").exists():
            got = figures(out, name)
            rows.append(f"| {name} | " + " | ".join(told(got.get(key), key) for key in COLUMNS.values()) + " |")
    return "\n".join(rows)


def told(value: float | None, key: str) -> str:
    if value is None:
        return ""
    if key == "seconds":
        return f"{value:.0f}"
    return f"{value:.3f}" if "nats" in key else f"{value:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", help=f"all, or some of: {'; '.join(ARMS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/extend"))
    parser.add_argument("--table", action="store_true", help="print the table of what is done")
    asked = parser.parse_args()
    if unknown := set(asked.arms) - {*ARMS, "all"}:
        parser.error(f"there is no arm {', '.join(unknown)}; there are {'; '.join(ARMS)}")
    for name in list(ARMS) if "all" in asked.arms else asked.arms:
        train(asked.out.resolve(), name)
    print(table(asked.out))


if __name__ == "__main__":
    main()
