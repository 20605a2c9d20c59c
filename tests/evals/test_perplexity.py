"""Bits per byte of a model that knows nothing, and baselines counted by hand."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from llamax import config
from llamax.config import ConfigError
from llamax.data.tokenizer import Tokenizer
from llamax.evals import perplexity
from llamax.evals.report import Context
from tests.runs import tiny_run
from tests.tolerances import ORACLE

RUN = tiny_run()
TOKENIZER = Tokenizer(RUN.data.tokenizer)
TEXTS = ["def f(x):\n    return x\n" * 30, "naïve — text, in English. " * 4, "short"]


class Ignorant:
    """A skeleton whose model gives every token of the vocabulary the same probability."""

    def bind(self, params, router_bias):
        return self


@pytest.fixture
def ctx(monkeypatch) -> Context:
    def uniform(model, batch):
        return SimpleNamespace(logp=jnp.full(batch.targets.shape, -math.log(TOKENIZER.vocab_size), jnp.float32))

    monkeypatch.setattr(perplexity, "score", uniform)
    perplexity.sums.clear_cache()
    return Context(RUN, Ignorant(), None, TOKENIZER, lambda batch: batch, 1, {}, {})


def manifest(folder, lines: list[dict], kind: str = "multimodal") -> str:
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = folder / "data.toml"
    path.write_text(f'format = "jsonl"\nfiles = ["data.jsonl"]\nkind = "{kind}"\nlang = "en"\n')
    return str(path)


def test_ignorance_costs_the_logarithm_of_the_vocabulary(ctx, tmp_path):
    report = perplexity.run(ctx, config.Eval(path=manifest(tmp_path, [{"text": text} for text in TEXTS])))
    tokens = sum(len(TOKENIZER.encode(text)) + 1 for text in TEXTS)  # the end of each document too
    size = sum(len(text.encode()) for text in TEXTS)
    expected = tokens * math.log2(TOKENIZER.vocab_size) / size
    np.testing.assert_allclose(report.scalars["bits_per_byte"], expected, **ORACLE)
    np.testing.assert_allclose(report.scalars["nats_per_token"], math.log(TOKENIZER.vocab_size), **ORACLE)
    assert f"{expected:.3f}" in report.rows[0]


def test_documents_left_out_count_in_neither_text_nor_baselines(ctx, tmp_path):
    good = perplexity.run(ctx, config.Eval(path=manifest(tmp_path, [{"text": text} for text in TEXTS])))
    lost = {"pieces": [{"image": "nowhere.png"}, {"text": "lost " * 500}]}
    lines = [lost, *({"text": text} for text in TEXTS), {"text": " "}, {"txt": "malformed"}]
    holes = perplexity.run(ctx, config.Eval(path=manifest(tmp_path, lines)))
    assert good.scalars["left_out"] == 0 and "left out" not in good.rows[0][2]
    assert holes.scalars == pytest.approx(good.scalars | {"left_out": 3})
    assert holes.rows == [(*good.rows[0][:2], good.rows[0][2] + "; 3 of 6 documents left out")]
    with pytest.raises(ConfigError, match="no document has text"):
        perplexity.run(ctx, config.Eval(path=manifest(tmp_path, [lost])))


def test_baselines_are_what_a_hand_counts(ctx):
    ids = TOKENIZER.encode("a b a")
    assert len(ids) == len(set(ids)) == 3  # "a", " b", " a"
    np.testing.assert_allclose(perplexity.unigram_bits(ctx, ["a b a"]), 3 * math.log2(3), **ORACLE)
    np.testing.assert_allclose(perplexity.unigram_bits(ctx, ["a", "a"]), 0.0, **ORACLE)
    assert perplexity.zlib_bits(["ab" * 500, "ab" * 500]) < 8 * 40
