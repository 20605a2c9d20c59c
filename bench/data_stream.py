"""Tokens a second of the data stream alone, and how full its rows are.

    python bench/data_stream.py          # recipes/scout_pretrain.py:tiny, after `llamax data build`
    python bench/data_stream.py recipes/maverick_pretrain.py:tiny --workers 0 4 --steps 500
    python bench/data_stream.py --workers 0 --align 0 128 64    # rows as mesh.context=1, 2 and 4 want them

For each number of loader processes and each alignment (data.align_tokens): seconds to the first batch, then tokens
(real ones, no padding) a second over `--steps` batches that nothing consumes. Loader processes fill their queues
meanwhile; use enough steps to drain them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time

import numpy as np

from llamax import config
from llamax.data import pipeline


def measure(run: config.Run, workers: int, align: int, steps: int) -> dict[str, float]:
    """Figures of one stream."""
    data = dataclasses.replace(run.data, workers=workers, align_tokens=align)
    start = time.perf_counter()
    iterator = iter(pipeline.build(data, run.model.vision, run.seed))
    next(iterator)
    first = time.perf_counter() - start
    real, places, fill, slots = 0, 0, {True: [], False: []}, []
    start = time.perf_counter()
    for _ in range(steps):
        batch = next(iterator)
        used = np.count_nonzero(batch.segment_ids)
        pictures = batch.tiles.shape[1] > 0
        real, places = real + used, places + batch.segment_ids.size
        fill[pictures].append(used / batch.segment_ids.size)
        if pictures:
            slots.append(batch.tiles.any((2, 3, 4)).mean())
    seconds = time.perf_counter() - start
    iterator.close()
    mean = {kind: float(np.mean(values)) if values else 0.0 for kind, values in fill.items()}
    return {
        "first batch s": first,
        "tokens/s": real / seconds,
        "rows full": real / places,
        "rows full, text": mean[False],
        "rows full, multimodal": mean[True],
        "tile slots full": float(np.mean(slots)) if slots else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/scout_pretrain.py:tiny")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--align", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    run = config.freeze(config.load(args.recipe))
    for workers, align in itertools.product(args.workers, args.align):
        figures = measure(run, workers, align, args.steps)
        text = ", ".join(f"{name} {value:,.3g}" for name, value in figures.items())
        print(f"workers {workers}, align {align}: {text}", flush=True)


if __name__ == "__main__":
    main()
