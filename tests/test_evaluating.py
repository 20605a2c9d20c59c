"""`llamax eval`: which evaluations of which model, what is written, and what is refused before the model is loaded."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from llamax import config, evaluating, loading
from llamax.checkpoint import saved
from llamax.checkpoint.saved import Saved
from llamax.config import ConfigError
from llamax.evals import Report
from llamax.loading import Loaded
from llamax.observe import provenance
from tests.runs import FIXTURES, tiny_run

TEXT, DOCS = (str(FIXTURES / name) for name in ("text.toml", "code.toml"))
OWN = {"held_out": config.Eval(path=DOCS), "late": config.Eval(kind="position", path=TEXT, lengths=(256,))}
RUN = tiny_run(3, evals=OWN)


class Model:
    """Stands where a model is loaded; notes what is evaluated of it."""

    def __init__(self):
        self.loaded, self.asked = [], []

    def load(self, folder, dtype, step, positions):
        self.loaded.append((folder, dtype, step, positions))
        return Loaded(RUN.model, None, {}, {}, loading.Tokenizer(RUN.data.tokenizer))

    def evaluate(self, ctx, cfg):
        self.asked.append((ctx, cfg))
        plots = {name: np.zeros((4, 6, 3), np.uint8) for name in cfg.tasks or ("one",)}
        details = {"cells": [{"score": np.float32(0.5)}]}
        return Report({"score": 0.5}, [("what", "50%", "chance")], plots=plots, details=details)


@pytest.fixture
def model(monkeypatch) -> Model:
    model = Model()
    monkeypatch.setattr(loading, "load", model.load)
    for kind in evaluating.EVALS:
        monkeypatch.setitem(evaluating.EVALS, kind, model.evaluate)
    return model


@pytest.fixture
def trained(tmp_path, monkeypatch) -> str:
    """A run's workdir, as far as it is looked at before weights are read."""
    folder = tmp_path / "run"
    folder.mkdir()
    provenance.record(folder, config.to_dict(RUN), [], {})
    said = saved.find(folder)
    monkeypatch.setattr(loading, "find", lambda folder, step: loading.Found(said, step or 3))
    return str(folder)


@pytest.fixture
def converted(tmp_path, monkeypatch) -> str:
    """A model without a run."""
    found = Saved(tmp_path, RUN.model, 0, RUN.data.tokenizer, None, {}, None)
    monkeypatch.setattr(loading, "find", lambda folder, step: loading.Found(found, None))
    return str(tmp_path)


def test_a_run_has_its_own_evaluations(model, trained, capsys):
    reports = evaluating.evaluate(trained, step=2)
    assert [cfg for _, cfg in model.asked] == list(OWN.values()) and list(reports) == list(OWN)
    ctx, _ = model.asked[0]
    assert ctx.run.data.seq_len == RUN.data.seq_len and ctx.run.model == RUN.model
    assert model.loaded == [(trained, "float32", 2, None)]
    assert "held_out" in capsys.readouterr().out


def test_any_kind_and_settings_by_name(model, trained):
    settings = dict(lengths=(128, 256), samples=2, path=TEXT)
    evaluating.evaluate(trained, ["needle", "held_out"], settings=settings, dtype="bfloat16")
    needle, own = (cfg for _, cfg in model.asked)
    assert needle == config.Eval(kind="needle", **settings)
    assert own == dataclasses.replace(OWN["held_out"], path=TEXT)  # which reads nothing else
    assert model.asked[0][0].run.train.compute_dtype == "bfloat16"


def test_a_model_of_conversations_can_be_asked_for_its_preferences(model, trained):
    evaluating.evaluate(trained, ["perplexity"], settings=dict(path=TEXT))
    evaluating.evaluate(trained, ["preference"], settings=dict(path=str(FIXTURES / "pairs.toml")))
    assert [ctx.run.data.comparisons_per_row for ctx, _ in model.asked] == [0, evaluating.COMPARISONS]


def test_a_step_is_evaluated_with_the_rows_of_its_stage(model, tmp_path, monkeypatch):
    """Of two stages that have one model."""
    tokens = 2 * RUN.data.batch_tokens
    parts = dict(first=config.Stage(tokens), second=config.Stage(tokens, data=dict(seq_len=256)))
    run = dataclasses.replace(RUN, stages=parts, train=dataclasses.replace(RUN.train, steps=0))
    provenance.record(tmp_path, config.to_dict(run), [], {})
    monkeypatch.setattr(loading, "find", lambda folder, step: loading.Found(saved.find(folder, step), step))
    for step in (2, 4):
        evaluating.evaluate(tmp_path, ["held_out"], step=step)
    assert [ctx.run.data.seq_len for ctx, _ in model.asked] == [128, 256]


def test_a_temperature_that_no_layer_has_is_told(model, tmp_path, monkeypatch):
    blunt = dataclasses.replace(RUN.model, plan=((("rope_chunk+dense",), 1),))
    found = Saved(tmp_path, blunt, 0, RUN.data.tokenizer, None, {}, None)
    monkeypatch.setattr(loading, "find", lambda folder, step: loading.Found(found, None))
    with pytest.raises(ConfigError, match=r"attn_temperature=0.0 \(--temperature-tuning\), but no layer"):
        settings = dict(path=TEXT)
        evaluating.evaluate(tmp_path, ["perplexity"], settings=settings, positions={"attn_temperature": 0.0})
    assert not model.loaded


def test_positions_may_be_read_in_another_way(model, trained, tmp_path):
    off = {"attn_temperature": 0.0}
    evaluating.evaluate(trained, ["held_out"], positions=off, out=tmp_path)
    assert model.loaded[0][3] == off and model.asked[0][0].run.model.attn_temperature == 0
    said = json.loads((tmp_path / "held_out.json").read_text())
    assert said["positions"] == off and said["step"] == 3
    with pytest.raises(ConfigError, match="Did you mean rope.theta"):
        evaluating.evaluate(trained, ["held_out"], positions={"rope.teta": 1.0})


def test_a_model_without_a_run_takes_those_of_a_recipe(model, converted):
    with pytest.raises(ConfigError, match="no run that has evaluations of its own. Name one: perplexity"):
        evaluating.evaluate(converted)
    evaluating.evaluate(converted, ["text"], recipe="recipes/scout_pretrain.py:tiny", settings=dict(path=TEXT))
    ((ctx, cfg),) = model.asked
    assert cfg.kind == "perplexity" and cfg.max_docs == 64 and ctx.run.model == RUN.model


def test_what_was_found_is_written(model, converted, tmp_path):
    out = tmp_path / "results" / "here"
    settings = dict(lengths=(256,), path=TEXT)
    evaluating.evaluate(converted, ["position"], settings=settings, out=out)
    evaluating.evaluate(converted, ["needle"], settings=settings | dict(tasks=("needle", "key_value")), out=out)
    names = ["needle.json", "needle_key_value.png", "needle_needle.png", "position.json", "position.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    said = json.loads((out / "needle.json").read_text())
    assert said["scalars"] == {"score": 0.5} and said["cells"] == [{"score": 0.5}] and said["settings"]["samples"] == 8
    assert said["model"] == converted and said["step"] is None and said["evaluation"] == "needle"
    assert Image.open(out / "position.png").size == (6, 4)


def test_what_was_found_stays_when_the_next_is_interrupted(model, converted, tmp_path, monkeypatch):
    def interrupted(ctx, cfg):
        raise KeyboardInterrupt

    monkeypatch.setitem(evaluating.EVALS, "needle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        settings = dict(lengths=(256,), path=TEXT)
        evaluating.evaluate(converted, ["position", "needle"], settings=settings, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["position.json", "position.png"]


@pytest.mark.parametrize(
    "kinds, settings, said",
    [
        (["nedle"], {}, "evaluation 'nedle', but there are .* Did you mean 'needle'"),
        (["needle"], {}, "without --data, but it needs a manifest"),
        (["needle"], dict(path=TEXT), r"--lengths \(\), but a needle evaluation is of some length"),
        (["needle"], dict(path=TEXT, lengths=(512, 256)), "the smaller ones first"),
        (["needle"], dict(path=TEXT, lengths=(256,), cache_gb=1e-6), r"keys and values .* \(--cache-gb\)"),
        (["needle"], dict(path=TEXT, lengths=(256,), cache_gb=0.0), "--cache-gb 0.0, but it is more than 0"),
        (["needle"], dict(path=TEXT, lengths=(256,), templates="new"), "--templates new, but it is one of seen"),
        (["needle"], dict(path=TEXT, lengths=(256,), seed=-1), "--seed -1"),
        (["position"], dict(path=TEXT, lengths=(256, 512)), "a position evaluation has one"),
        (["position"], dict(path=TEXT, lengths=(250,)), "--buckets 8, but they are equal parts of 250 .*--buckets 10"),
        (["position"], dict(path=TEXT, lengths=(2**20,)), "its longest document has"),
        (["perplexity"], dict(path="data/none.toml"), "there is no such file"),
        (["ruler"], dict(path=TEXT, lengths=(4096,), threshold=1.5), "--threshold 1.5, but it is at most 1"),
        (["answer"], dict(path=TEXT, lengths=(256,), samples=1), "another sample"),
        (["perplexity"], dict(path=TEXT, lengths=(256,)), r"--lengths \(256,\) for perplexity, but .* needle, ruler, "),
        (["needle", "position"], dict(path=TEXT, lengths=(256,), qa="x"), "--qa x for .*, but ruler evaluations alone"),
    ],
)
def test_what_cannot_be_evaluated_is_told_before_the_model_is_loaded(model, converted, kinds, settings, said):
    with pytest.raises(ConfigError, match=said):
        evaluating.evaluate(converted, kinds, settings=settings)
    assert not model.loaded and not model.asked


def test_a_folder_without_a_model_or_a_tokenizer_is_told(model, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="it holds neither"):
        evaluating.evaluate(tmp_path, ["needle"])
    found = Saved(tmp_path, RUN.model, 0, None, None, {}, None)
    monkeypatch.setattr(loading, "find", lambda folder, step: loading.Found(found, None))
    with pytest.raises(ConfigError, match="it has no tokenizer that can be read"):
        evaluating.evaluate(tmp_path, ["needle"])
