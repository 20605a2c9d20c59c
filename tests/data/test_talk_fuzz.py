"""Damaged records of conversations: each is encoded as it says, or left out for a reason; nothing else.

No other exception, no token or weight beyond what the rest of the record says, no comparison with one side missing.
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax.config import ConfigError, Data, Source
from llamax.data.encode import Encoder
from llamax.data.encoded import Encoded, Row
from llamax.data.pipeline import build, cut, skipped
from llamax.data.sources import CUTS, SKIP_REASONS, ArrayRecord, open_source, read_manifest
from llamax.data.tokenizer import Tokenizer
from tests.fuzz import quick, thorough
from tests.runs import FIXTURES, tiny_run

RUN = tiny_run()
VISION = RUN.model.vision
TOKENIZER = Tokenizer(RUN.data.tokenizer)
GOOD = [
    json.loads(line)
    for name in ("chat", "pairs", "pairs_pictures", "labelled")
    for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[-12:]
]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 3.5, float("inf"), float("nan"), 10**400, "", " ", "x", "\ud800", "<|eot|>", "\0"),
    *([], {}, [[]], [{}], {"role": "user"}, "system", "user", "assistant", "tool", "ipython", "robot", ["text"]),
    *({"type": "image"}, {"type": "image", "image": "none.png"}, [{"type": "video", "video": 3}], {"type": "text"}),
    *([3968, 3976], [70, 3976], [10**9], [-1], [0.5], "\ud83d", "x" * 3000),
]
KEYS = ["train", "weight", "token_ids", "tool_calls", "tool_call_id", "content", "role", "messages", "prompt", "chosen"]
KEYS += ["rejected", "completion", "label", "margin", "tools", "meta", "id"]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of everything in a record."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in list(entries):
        yield value, key
        yield from places(inside)


def damaged(seed: int) -> dict:
    """A good record with one to three things changed, left out, put twice or put in."""
    rng = random.Random(seed)
    record = copy.deepcopy(rng.choice(GOOD))
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(list(places(record)) or [(record, "x")])
        turn = rng.random()
        if turn < 0.5:
            container[key] = copy.deepcopy(rng.choice(ODD))
        elif turn < 0.65 and key in (container if isinstance(container, dict) else range(len(container))):
            del container[key]
        elif turn < 0.8 and isinstance(container, list):
            container.insert(rng.randint(0, len(container)), copy.deepcopy(rng.choice([*container, *ODD])))
        elif isinstance(container, dict):
            container[rng.choice(KEYS)] = copy.deepcopy(rng.choice(ODD))
    return record


def judge(encoded: Encoded, row: Row) -> None:
    """What is promised of every document."""
    assert encoded.skip == "" or encoded.skip in SKIP_REASONS
    if encoded.skip:
        assert not len(encoded.tokens) and encoded.where
        return
    n, compared = len(encoded.tokens), encoded.sides is not None
    assert encoded.tokens.min() >= 0 and encoded.tokens.max() < TOKENIZER.vocab_size
    assert n - 1 - (encoded.second > 0) <= row.seq_len and len(encoded.tiles) <= row.tiles
    assert (encoded.tokens == TOKENIZER.patch).sum() == len(encoded.tiles) * VISION.tokens_per_tile
    assert encoded.cut in ("", row.too_long)
    assert encoded.weights.shape == (n,) and set(np.unique(encoded.weights)) <= {0, 1} and encoded.whole
    for begin, end, _ in encoded.pictures:
        assert not encoded.weights[begin:end].any()
    starts = [0, encoded.second] if encoded.second else [0]
    assert (np.flatnonzero(encoded.tokens == TOKENIZER.bos) == starts).all()
    if not compared:
        assert encoded.weights[1:].any() and not encoded.second
        return
    sides = encoded.sides
    for first, last in zip(starts, [*starts[1:], n], strict=True):
        assert np.abs(sides[first:last].sum()) == np.abs(sides[first:last]).sum() > 0, "one side a segment"
    np.testing.assert_array_equal(encoded.weights[sides != 0], (sides > 0)[sides != 0])
    assert not encoded.weights[sides == 0].any()
    if encoded.second:
        assert sides[: encoded.second].max() == 1 and sides[encoded.second :].min() == -1


def write(folder: Path, records: list[dict]) -> Path:
    (folder / "pictures").symlink_to(FIXTURES / "pictures")
    (folder / "x").write_text("\n".join(json.dumps(record) for record in records))
    (folder / "x.toml").write_text('format = "jsonl"\nfiles = ["x"]\nkind = "multimodal"\n')
    return folder / "x.toml"


SEEDS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=12)
POLICY = st.sampled_from(["skip", *CUTS])


def encode_each(seeds: list[int], policy: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        reader = open_source(read_manifest(write(Path(folder), [damaged(seed) for seed in seeds])))
        for seq_len in (10**6, 64):
            row = Row(seq_len, 4, 0, policy)
            encoder = Encoder(RUN.data.tokenizer, VISION, row=row)
            for document in reader:
                encoded = encoder(document)
                judge(encoded, row)


test_damaged_records = quick(60)(given(SEEDS, POLICY)(encode_each))


def stream_of(seeds: list[int], policy: str) -> None:
    """Damaged records among good ones in the real stream: every segment is one that a record alone gives."""
    records = [record for i, seed in enumerate(seeds) for record in (GOOD[i % len(GOOD)], damaged(seed))]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), records)
        of = dict(sources={"x": Source(str(path))}, tokenizer=RUN.data.tokenizer, seq_len=128, batch_tokens=256)
        of |= dict(multimodal_steps=1.0, tiles_per_row=4, window_docs=8, too_long=policy, comparisons_per_row=4)
        data = Data(**of, prefetch_batches=0)
        try:
            iterator = iter(build(data, VISION, 0))
            batches = [next(iterator) for _ in range(2)]
        except ConfigError as error:
            assert "can be used" in error.true or "label" in error.true
            return
        encoder = Encoder(RUN.data.tokenizer, VISION, row=Row(128, 4, 0, policy))
        alone = {part for document in open_source(read_manifest(path)) for part in segments(encoder(document))}
        for batch in batches:
            for b in range(len(batch.tokens)):
                for segment in range(1, batch.segment_ids[b].max() + 1):
                    at = batch.segment_ids[b] == segment
                    key = (batch.tokens[b, at], batch.targets[b, at], batch.loss_weights[b, at])
                    key += (np.sign(batch.sides[b, at]),)
                    assert tuple(x.astype(np.int32).tobytes() for x in key) in alone
                assert np.abs(batch.sides[b]).max() <= 4
        assert set(skipped(iterator, data).get("x", {})) <= set(SKIP_REASONS)
        assert set(cut(iterator, data).get("x", {})) <= {policy}


def segments(encoded: Encoded) -> Iterator[tuple[bytes, ...]]:
    """Tokens, targets, weights and sides of each segment of an encoded conversation."""
    if encoded.skip:
        return
    n, weights = len(encoded.tokens), encoded.weights
    sides = np.zeros(n, np.int32) if encoded.sides is None else encoded.sides
    bounds = [0, encoded.second, n] if encoded.second else [0, n]
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        here, there = slice(first, last - 1), slice(first + 1, last)
        parts = encoded.tokens[here], encoded.tokens[there], weights[there], sides[there]
        yield tuple(x.astype(np.int32).tobytes() for x in parts)


test_streams_with_damaged_records = quick(20)(given(SEEDS, POLICY)(stream_of))


class Held(ArrayRecord):
    """Records without a file."""

    @staticmethod
    def open(path: Path):
        del path
        return []


def one_arrayrecord(seeds: list[int], policy: str) -> None:
    """The same as msgpack, where a picture is bytes and a path is none."""
    source, encoder = (
        Held([FIXTURES / "chat.jsonl"], "en"),
        Encoder(RUN.data.tokenizer, VISION, row=Row(64, 4, 0, policy)),
    )
    for seed in seeds:
        try:
            line = msgpack.packb(damaged(seed))
        except (ValueError, OverflowError, UnicodeEncodeError):
            continue  # what no such record can hold
        source._shards, source._ends = [[line]], np.array([1])
        judge(encoder(source[0]), encoder.row)


test_damaged_msgpack = quick(40)(given(SEEDS, POLICY)(one_arrayrecord))
test_many_damaged_records = pytest.mark.slow(thorough(1500)(given(SEEDS, POLICY)(encode_each)))
test_many_streams = pytest.mark.slow(thorough(300)(given(SEEDS, POLICY)(stream_of)))
