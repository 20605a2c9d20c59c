"""The data of bench/beside_trl.py: conversations and comparisons made by a rule, in the batches that llamax packs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import in_turn
import numpy as np

T, ROWS, STEPS = 512, 4, 20  # tokens a row, rows a step, steps of a round
EXAMPLES = {"sft": 400, "dpo": 240}  # more than STEPS steps take
COMPARISONS = 6  # a row, at most: it has room for fewer
EXCHANGES = (1, 1, 2, 2, 3, 3, 4, 6)  # questions and answers of a conversation
HEDGE = "I am not sure, but "
RATE = {"sft": 1e-3, "dpo": 1e-4}
BETA = 0.1
TOKENIZER = in_turn.ROOT / "data/tokenizer.model"


def write_data(task: str, folder: Path) -> None:
    """The examples as JSONL, and their manifest."""
    rng = random.Random(0)
    records = [conversation(rng) for _ in range(EXAMPLES[task])]
    if task == "sft":
        records = [{"messages": record["prompt"] + record["chosen"]} for record in records]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "data.toml").write_text('format = "jsonl"\nfiles = ["data.jsonl"]\n')


def conversation(rng: random.Random) -> dict[str, list[dict[str, str]]]:
    """Some answered questions, the last answer apart, and a worse one beside it."""
    from llamax.data.embedded.instructions import TASKS

    said: list[dict[str, str]] = []
    for _ in range(rng.choice(EXCHANGES)):
        asked = TASKS[rng.choice(("arithmetic", "code"))][0](rng, 0, False)
        good, bad = (sentence(asked, answer) for answer in (asked.answer, rng.choice(asked.others)))
        said += [{"role": "user", "content": asked.content[0]}, {"role": "assistant", "content": good}]
    worse = bad if rng.random() < 0.5 else HEDGE + good
    return {"prompt": said[:-1], "chosen": said[-1:], "rejected": [{"role": "assistant", "content": worse}]}


def sentence(asked: Any, answer: str) -> str:
    said = asked.sentence.format(answer)
    return f"{said[0].upper()}{said[1:]}\nAnswer: {answer}"


def our_data(task: str, folder: Path, ref_logp: str = ""):
    """The run's settings of data. All is one window, so that rows of every batch are full."""
    from llamax import config

    return config.Data(
        tokenizer=str(TOKENIZER),
        seq_len=T,
        batch_tokens=ROWS * T,
        sources={"chat": config.Source(path=str(folder / "data.toml"))},
        window_docs=EXAMPLES[task],
        comparisons_per_row=COMPARISONS if task == "dpo" else 0,
        ref_logp=ref_logp,
    )


def our_batches(data: Any) -> list[Any]:
    """The batches of a round as llamax packs them; `source_ids` are the numbers of the examples."""
    from llamax.data import pipeline

    (source,) = data.sources.values()
    batches = list(pipeline.numbered(source.path, data, None, range(data.window_docs)))[:STEPS]
    assert len(batches) == STEPS and (batches[-1].segment_ids > 0).mean() > 0.9, "more examples are needed"
    return batches


def examples_in(batch: Any) -> list[int]:
    return np.unique(batch.source_ids[batch.segment_ids > 0]).tolist()


def padded(batches: list[Any]) -> float:
    """The share of real tokens where every segment of a batch is as long as the longest."""
    real = places = 0
    for batch in batches:
        keys = batch.segment_ids.astype(np.int64) + np.arange(ROWS)[:, None] * T
        lengths = np.unique(keys[batch.segment_ids > 0], return_counts=True)[1]
        real, places = real + lengths.sum(), places + lengths.max() * len(lengths)
    return real / places
