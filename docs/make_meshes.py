"""Writes docs/meshes.md from what the matrix of meshes saw.

LLAMAX_MATRIX=matrix.jsonl .venv/bin/python -m pytest -n 2 -m "" tests/train/test_matrix.py
python docs/make_meshes.py matrix.jsonl docs/meshes.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TOP = """# The same numbers on every mesh

One row a mesh: the real training step with plain SGD on 8 packed rows of 128 tokens with pictures, beside one device,
in float32 on simulated CPU devices. Rows are chosen so that every token's choice of experts is clear: its k-th best
router logit is at least 1e-3 above the next. Relative differences; a gradient's is ||difference|| / ||gradient||,
the worst of all parameters.

    LLAMAX_MATRIX=matrix.jsonl .venv/bin/python -m pytest -n 2 -m "" tests/train/test_matrix.py
    .venv/bin/python docs/make_meshes.py matrix.jsonl docs/meshes.md

"scout" and "maverick" are the layers of those models (tests/train/matrix.py), one expert a token if nothing else is
said. The tests demand: loss 1e-5, no route that differs, gradients 1e-4, and after five small steps losses and
parameters 1e-4; larger steps soon meet tokens that tie.

| layers | mesh | loss | routes off | worst gradient | of | losses of five steps | parameters after |
|---|---|---|---|---|---|---|---|
"""


def row(case: dict) -> str:
    mesh = " x ".join(f"{axis} {n}" for axis, n in case["mesh"].items())
    worst = "/".join(part.strip("'") for part in case["worst"].strip("[]").split("]["))
    cells = [case["shape"], mesh, f"{case['loss']:.0e}", str(case["routes"]), f"{case['gradient']:.1e}", f"`{worst}`"]
    cells += [f"{case['losses']:.0e}", f"{case['params']:.1e}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seen", type=Path, help="the file that LLAMAX_MATRIX named")
    parser.add_argument("page", type=Path)
    args = parser.parse_args()
    cases = [json.loads(line) for line in args.seen.read_text(encoding="utf-8").splitlines()]
    newest = {(case["shape"], *case["mesh"].items()): case for case in cases}
    cases = sorted(newest.values(), key=lambda case: (case["shape"], len(case["mesh"]), str(case["mesh"])))
    worst = {key: max(case[key] for case in cases) for key in ("loss", "gradient", "losses", "params")}
    summary = f"{len(cases)} cases; the worst: " + ", ".join(f"{key} {value:.1e}" for key, value in worst.items())
    args.page.write_text(TOP + "\n".join(map(row, cases)) + f"\n\n{summary}.\n", encoding="utf-8")
    print(summary)


if __name__ == "__main__":
    main()
