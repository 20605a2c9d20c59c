"""How full the rows of a source are: the share of their places that hold a token, beside rows of one document each.

    python bench/packing.py data/fixtures/chat.toml --seq-len 1024
    python bench/packing.py data/built/instructions.toml data/built/preferences.toml
    python bench/packing.py data/fixtures/pairs.toml --align 128      # as mesh.context wants them

Every manifest by itself, an epoch or the first `--documents` of it, in windows as a run has them (`--window-docs`, more
where documents are short).
`alone`: the share of real tokens if each segment had a row as long as the longest of its batch of `--rows`, at random.
"""

from __future__ import annotations

import argparse

import numpy as np

from llamax import config, variants
from llamax.data import pipeline
from llamax.data.packing import Window
from llamax.data.sources import read_manifest


def measure(path: str, data: config.Data, vision: config.Vision, most: int) -> dict[str, float]:
    """Figures of one manifest."""
    data.sources["it"] = config.Source(path)
    pictures = read_manifest(path).kind == "multimodal"
    windows = pipeline.Windows(data, vision, 0, {"it": read_manifest(path)}, ["it"] if pictures else [])
    _, streams = windows.of(pipeline.schedule.began(data.sources))
    (packed,), n = streams.values(), len(windows._open("it").reader)
    taken: list[Window] = []
    while sum(len(window.taken) + sum(window.skipped.values()) for window in taken) < min(n, most):
        taken.append(packed[len(taken)])
    real = np.concatenate([(window.rows.segment_ids > 0).sum(1) for window in taken])
    lengths = np.random.default_rng(0).permutation([length for window in taken for length in segments(window)])
    learnt = sum(float((window.rows.loss_weights > 0).sum()) for window in taken)
    return {
        "documents": sum(len(window.taken) for window in taken),
        "rows": len(real),
        "rows full": real.sum() / (len(real) * data.seq_len),
        "alone": lengths.sum() / sum(batch.max() * len(batch) for batch in chunks(lengths, data.rows)),
        "segments a row": len(lengths) / len(real),
        "learnt": learnt / real.sum(),
        "left out": sum(sum(window.skipped.values()) for window in taken),
        "cut": sum(sum(window.cut.values()) for window in taken),
    }


def segments(window: Window) -> list[int]:
    """Tokens of each segment."""
    ids = window.rows.segment_ids
    return [int(n) for row in ids for n in np.bincount(row)[1:]]


def chunks(values: np.ndarray, n: int) -> list[np.ndarray]:
    return [values[first : first + n] for first in range(0, len(values), n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="+", metavar="MANIFEST")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tiles", type=int, default=64, help="tiles a row")
    parser.add_argument("--align", type=int, default=0)
    parser.add_argument("--comparisons", type=int, default=64, help="a row")
    parser.add_argument("--too-long", default="skip", choices=config.TOO_LONG)
    parser.add_argument("--window-docs", type=int, default=256)
    parser.add_argument("--documents", type=int, default=2000)
    args = parser.parse_args()
    for path in args.manifests:
        data = config.Data(
            tokenizer=str(config.resolve_path("data/tokenizer.model")),
            seq_len=args.seq_len,
            batch_tokens=args.rows * args.seq_len,
            multimodal_steps=1.0,
            tiles_per_row=args.tiles,
            align_tokens=args.align,
            comparisons_per_row=args.comparisons,
            too_long=args.too_long,
            window_docs=args.window_docs,
        )
        figures = measure(path, data, variants.scout_tiny().vision, args.documents)
        print(f"{path}: " + ", ".join(f"{name} {value:,.3g}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
