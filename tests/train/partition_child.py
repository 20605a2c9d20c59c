"""Compiles the steps of meshes without a cache, in a process of its own, for what the partitioner says on stderr.

    python tests/train/partition_child.py '[{"mesh": {"fsdp": 8}}, ...]'

Prints a JSON line for each: its settings, and the largest array with the vocabulary's columns among its dimensions.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.xla_flags import quick_flags  # noqa: E402

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": quick_flags(),
    "JAX_ENABLE_COMPILATION_CACHE": "0",  # what comes out of it has been partitioned before
    "TF_CPP_MIN_LOG_LEVEL": "1",  # warnings are shown
}

import jax  # noqa: E402

from llamax import config  # noqa: E402
from llamax.plan import hlo  # noqa: E402
from llamax.plan.compiled import traced  # noqa: E402
from tests.runs import tiny_run  # noqa: E402


def widest(text: str, columns: int) -> int:
    """Rows of the tallest matrix of so many columns."""
    shapes = (shape.dims for shape in map(shape_of, hlo.SHAPE.finditer(text)))
    return max((math.prod(dims[:-1]) for dims in shapes if dims and dims[-1] == columns), default=0)


def shape_of(found) -> hlo.Shape:
    return hlo.Shape(found[1], tuple(int(n) for n in found[2].split(",") if n))


def main(sections: list[dict]) -> None:
    for changes in sections:
        run: config.Run = tiny_run(**changes)
        step = traced(run, jax.devices()[: math.prod(run.mesh.axes.values())])
        text = step.step.lower(step.state, step.batch).compile().as_text()
        columns = run.model.vocab_size // run.mesh.tensor
        print(json.dumps({"asked": changes, "rows": widest(text, columns), "chunk": widest(text, 512)}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
