"""Whole runs of post-training, stopped and gone on with, are those that were not stopped, to the bit: preferences
beside a reference on disk, live, and that of adapters; a reward model; answers with labels; from llamax's weights and
Hugging Face's."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from llamax import config
from llamax.checkpoint import hf
from tests.runs import FIXTURES
from tests.test_lora_run import adapting, model_in
from tests.test_run import lines, same_bits, train

LOSSES = {"next_token": 0.2, "preference": 1.0}
DPO = dict(preference=dict(losses=config.PreferenceLosses(sigmoid=1.0)), losses=LOSSES)
KTO = dict(preference=dict(losses=config.PreferenceLosses(kto=1.0)), losses=LOSSES | dict(next_token=0.0))
KINDS = {
    "cached": DPO | dict(reference=dict(source="cache")),
    "live": DPO | dict(reference=dict(source="live")),
    "adapters": DPO | dict(reference=dict(source="live")),
    "reward": dict(preference=dict(centring=0.01), losses=dict(next_token=0.0, preference=0.0, reward=1.0)),
    "labels": KTO | dict(reference=dict(source="live")),
}
QUICK = ("cached", "adapters")
CASES = [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in KINDS]


def run_of(kind: str, base, **sections) -> config.Run:
    """Four steps, with a checkpoint after two, from the model in `base`."""
    source = "labelled" if kind == "labels" else "pairs"
    data = dict(sources={source: config.Source(str(FIXTURES / f"{source}.toml"))}, mismatched=kind == "labels")
    run = adapting(base, **KINDS[kind] | sections)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, comparisons_per_row=2, **data))
    if kind != "adapters":
        run = dataclasses.replace(run, tune=config.Tune())
    if kind == "reward":
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, reward_head=True))
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return model_in(tmp_path_factory.mktemp("post") / "base")


def told(workdir, after: int = 0) -> list[dict]:
    """Everything that was logged of losses and comparisons beyond step `after`."""
    kept = ("loss/", "preference/", "step")
    found = [{k: v for k, v in line.items() if k.startswith(kept)} for line in lines(workdir) if "loss/total" in line]
    return [line for line in found if line["step"] > after]


@pytest.mark.parametrize("kind", CASES)
def test_a_run_that_goes_on_is_one_that_was_not_stopped(kind, base, tmp_path):
    run, whole, stopped = run_of(kind, base), tmp_path / "whole", tmp_path / "stopped"
    unbroken = train(run, whole)
    assert unbroken.finished and len(told(whole)) == 3 and "preference/margin" in told(whole)[0]
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints/4")
    again = train(run, stopped)
    assert same_bits(again.state.params, unbroken.state.params) and same_bits(again.state.opt, unbroken.state.opt)
    assert told(stopped, after=2) == told(whole, after=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cached", "reward"])
def test_weights_of_hugging_faces_are_where_a_run_can_begin(kind, base, tmp_path):
    """The same run, to the bit, as from llamax's own."""
    ours = train(run_of(kind, base), tmp_path / "ours")
    there = hf.to_hf(base, tmp_path / "hf")
    theirs = train(run_of(kind, there), tmp_path / "theirs")
    assert told(tmp_path / "ours") == told(tmp_path / "theirs")
    assert same_bits(theirs.state.params, ours.state.params)


@pytest.mark.slow
def test_a_reference_without_adapters_is_the_model_that_they_adapt(base, tmp_path):
    """Where adapters alone are trained, the reference of a later step is what it was: the base's own log-probabilities,
    as full training holds them live."""
    run = run_of("adapters", base, train=dict(log_every_steps=1))
    run = dataclasses.replace(run, tune=config.Tune(lora_rank=2))
    train(run, tmp_path / "adapters")
    first, *_, last = lines(tmp_path / "adapters")
    assert first["preference/kl"] == 0 and first["preference/margin"] == 0, "to the bit: B is zero"
    assert last["preference/margin"] != 0
    cached = dataclasses.replace(run, reference=config.Reference(source="cache"))
    train(cached, tmp_path / "cached")
    for a, b in zip(lines(tmp_path / "adapters"), lines(tmp_path / "cached"), strict=True):
        if "preference/margin" in a:
            np.testing.assert_allclose(a["preference/margin"], b["preference/margin"], rtol=0, atol=1e-4)
            np.testing.assert_allclose(a["loss/total"], b["loss/total"], rtol=1e-5)
