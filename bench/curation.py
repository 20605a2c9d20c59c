"""Is the judged-hard half of the data worth more than a random half of the same size? A table, arm by arm.

    python bench/curation.py --out runs/curation           # after `make quickstart`; what is done is not done again
    python bench/curation.py --table --out runs/curation   # of what is done

From the quickstart's model a judge is trained on the first instructions of the embedded data, JUDGE_STEPS steps of
`recipes/maverick_sft.py:tiny`. It answers the next POOL of them and the held-out ones, DRAWN times each, and the share
of right answers is how easy a record is (`llamax data grade --by pass`). The hardest half of the pool (`llamax data
select`) and a random half, another for each seed, then train the quickstart's model for as many steps; the held-out
records fall into a hard and an easy half by the same judge, and both arms of a seed are asked the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from llamax import config, run
from llamax.post.drawing import Drawing
from llamax.post.grade import grade
from llamax.post.records import Records, write
from llamax.post.select import PRESETS, select
from llamax.post.unpack import unpack
from llamax.sample.engine import Sampling

RECIPE, BUILT = "recipes/maverick_sft.py:tiny", "data/built/{}.toml"
FOR_JUDGE, POOL = 3_000, 8_000  # records
JUDGE_STEPS, STEPS = 100, 150  # of 4,096 tokens
DRAWN, MOST = 4, 48  # answers to each prompt, tokens of one
ROWS = 128
SEEDS = (1, 2, 3)
HALF = PRESETS["llama4"]


# -------------------------------------------------------------------------------------------------------- the data


def data(out: Path) -> None:
    """What the judge learns, the pool, the held-out records, and the judge's grades of the latter two."""
    for name, built in (("all", "instructions"), ("heldout", "instructions_heldout")):
        if not (out / f"{name}.toml").exists():
            unpack(BUILT.format(built), out / f"{name}.jsonl")
    part(out, "for_judge", "all", range(FOR_JUDGE))
    part(out, "pool", "all", range(FOR_JUDGE, FOR_JUDGE + POOL))
    train(out, "judge", "for_judge", JUDGE_STEPS, seed=0, evals={})
    draw = Drawing(DRAWN, MOST, Sampling(1.0, 1.0, 0))
    for name in ("heldout", "pool"):
        grade(out / f"{name}.jsonl", judge=out / "judge", by="pass", draw=draw, batch_size=ROWS)
    kept = dict(by="pass", keep=HALF)
    for name, of, how in (
        ("hard", "pool", kept),
        ("heldout_hard", "heldout", kept),
        ("heldout_easy", "heldout", dict(by="pass", band=(HALF, 1.0))),
    ):
        if not (out / f"{name}.toml").exists():
            select(out / f"{of}.jsonl", out / f"{name}.jsonl", **how)
    n = len(Records(out / "hard.jsonl"))
    for seed in SEEDS:
        part(out, f"random_{seed}", "pool", sorted(random.Random(seed).sample(range(POOL), n)))


def part(out: Path, name: str, of: str, numbers: Any) -> None:
    """Some records of a file as another beside it, unless that is there."""
    if (out / f"{name}.toml").exists():
        return
    records = Records(out / f"{of}.jsonl")
    lines = (records.line(number) for number in numbers)
    write(out / f"{name}.jsonl", lines, pictures=True, description=f"{len(numbers):,} records of {of}.jsonl")


# ------------------------------------------------------------------------------------------------------------ the arms


def train(out: Path, name: str, source: str, steps: int, seed: int, evals: dict[str, Any]) -> None:
    """A run of the recipe on one source; its figures are written down."""
    if (out / name / "arm.json").exists():
        return
    cfg = config.load(RECIPE)
    cfg.seed = seed
    cfg.data.sources = {"instructions": {"path": str(out / f"{source}.toml"), "weight": 1.0}}
    cfg.train.steps = steps
    cfg.evals = evals
    began = time.monotonic()
    result = run.train(config.freeze(cfg), out / name)
    if not result.finished:
        raise SystemExit("stopped; the same command goes on")
    figures = {f"{k}/{key}": value for k, report in result.reports.items() for key, value in report.scalars.items()}
    told = {"seconds": round(time.monotonic() - began), "figures": figures}
    (out / name / "arm.json").write_text(json.dumps(told, indent=1))


def arm(out: Path, half: str, seed: int) -> None:
    source = "hard" if half == "hard" else f"random_{seed}"
    asked = {
        name: dict(kind="instructions", path=str(out / f"heldout_{name}.toml"), every_steps=0)
        for name in ("hard", "easy")
    }
    train(out, f"{half}_{seed}_sft", source, STEPS, seed, asked)


def table(out: Path) -> str:
    """Markdown: exact match on both held-out halves, a row for each seed."""
    rows = [
        "| seed | hard half: held-out hard | random half: held-out hard | hard half: easy | random half: easy |",
        "|---" * 5 + "|",
    ]
    for seed in SEEDS:
        told = [out / f"{half}_{seed}_sft" / "arm.json" for half in ("hard", "random")]
        if not all(path.exists() for path in told):
            continue
        of = [json.loads(path.read_text())["figures"] for path in told]
        cells = [f"{figures[f'{asked}/exact']:.1%}" for asked in ("hard", "easy") for figures in of]
        rows.append(f"| {seed} | {' | '.join(cells)} |")
    return "\n".join(rows)


def about(out: Path) -> str:
    """What the halves are made of, and how often the judge was right."""
    grades = {}
    for name in ("pool", "heldout"):
        with (out / f"{name}.jsonl.grades.jsonl").open() as file:
            grades |= {row["record"]: row["value"] for row in map(json.loads, file)}
    rows = ["| file | records | judge right | by domain |", "|---" * 4 + "|"]
    for name in ("pool", "hard", *(f"random_{seed}" for seed in SEEDS), "heldout_hard", "heldout_easy"):
        records = list(Records(out / f"{name}.jsonl"))
        right = np.mean([grades[record.key] for record in records])
        domains = sorted({record.domain for record in records})
        share = ", ".join(f"{d} {sum(r.domain == d for r in records) / len(records):.0%}" for d in domains)
        rows.append(f"| {name} | {len(records):,} | {right:.1%} | {share} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/curation"), help="where data and runs are")
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not options.table:
        data(out)
        for seed in SEEDS:
            for half in ("hard", "random"):
                arm(out, half, seed)
    print(about(out), table(out), sep="\n\n")


if __name__ == "__main__":
    main()
