"""Settings of positions: what cannot work, what may change with the same weights, what a training step leaves out."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import jax
import numpy as np
import pytest

import llamax
from llamax import config, positions, stages, variants
from llamax.config import ConfigError, Rope
from llamax.data import pipeline
from llamax.loading import load
from llamax.model.score import score
from llamax.parallel import place
from llamax.parallel.mesh import make_mesh
from llamax.run import skeletons
from llamax.starting import split
from tests.model.twins import quick_jit
from tests.runs import tiny_run
from tests.test_run import losses, train

NOPE, LOCAL = ((("nope_full+moe",), 2),), ((("rope_chunk+dense",), 2),)


def yarn(**changes) -> Rope:
    return Rope(scaling="yarn", **changes)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "asked", "true"),
    [
        (dict(rope=Rope(scaling="linear", factor=0.25)), "rope.factor=0.25", "how many times longer"),
        (dict(rope=yarn(beta_fast=1.0)), "rope.beta_fast=1", "more often than beta_slow=1"),
        (dict(rope=yarn(beta_slow=40.0)), "rope.beta_fast=32", "more often than beta_slow=40"),
        (dict(rope=yarn(ramp="pairs", theta=1.0)), "rope.theta=1 with ramp=pairs", "slower above 1"),
        (dict(rope=yarn(ramp="lanes")), "rope.ramp=lanes", "one of turns, pairs"),
        (dict(rope=yarn(attention_factor=-1.0)), "rope.attention_factor=-1.0", "0 or more"),
        (dict(rope=Rope(scaling="yarm")), "rope.scaling=yarm", "none, linear, ntk, yarn, llama3"),
        (dict(rope=Rope(scaling="ntk"), head_dim=2), "rope.scaling=ntk", "head_dim=2 has one pair"),
        (dict(rope=yarn(), plan=NOPE), "rope.scaling=yarn", "no layer of .*plan rotates"),
        (dict(attn_scale="ssmax", plan=LOCAL), "attn_scale=ssmax", "rope_chunk only"),
        (dict(attn_scale="ssmax", ssmax_len=1), "ssmax_len=1", "ln 1 = 0"),
        (dict(attn_scale="ssmx"), "attn_scale=ssmx", "one of temperature, ssmax"),
        (dict(attn_temperature_when="inference", plan=LOCAL), "attn_temperature_when=inference", "no layer has"),
        (dict(attn_temperature_when="inference", attn_scale="ssmax"), "attn_temperature_when", "no layer has"),
        (dict(attn_temperature_when="training"), "attn_temperature_when=training", "one of always, inference"),
    ],
    ids=lambda x: "" if isinstance(x, dict) else x,
)
def test_settings_that_cannot_work_are_refused(changes, asked, true):
    with pytest.raises(ConfigError, match=true) as refused:
        config.freeze(config.to_config(tiny_run(model=dict(rope=Rope()) | changes)))
    assert f"--config.model.{asked}" in refused.value.asked and refused.value.change


def test_a_stage_cannot_bring_in_scalable_softmax():
    """It has parameters, and stages share them; what no parameter depends on may change."""
    run = replace(tiny_run(train=dict(steps=0)), stages={"a": config.Stage(tokens=1024)})
    for model, refused in ((dict(attn_scale="ssmax"), True), (dict(attn_temperature_when="inference"), False)):
        stage = config.Stage(tokens=1024, model=model)
        if refused:
            with pytest.raises(ConfigError, match="the same in all stages"):
                stages.parts(replace(run, stages={"a": stage}))
        else:
            assert stages.parts(replace(run, stages={"a": stage}))[0].run.model.attn_temperature_when == "inference"


# --------------------------------------------------------------------------------------------- what needs no new weight


def test_positions_change_by_name_and_all_else_stays():
    scout = variants.scout()
    changes = {"attn_temperature": 0, "rope.scaling": "yarn", "rope.factor": 32.0, "chunk_len": 16_384}
    rope = replace(scout.rope, scaling="yarn", factor=32.0)
    assert positions.changed(scout, changes) == replace(scout, attn_temperature=0.0, rope=rope, chunk_len=16_384)
    assert positions.changed(scout, {}) == scout
    with pytest.raises(ConfigError, match="positions: attn_temprature.*Did you mean attn_temperature"):
        positions.changed(scout, {"attn_temprature": 0.0})
    for key in ("attn_scale", "dim", "vision.dim", "rope"):
        with pytest.raises(ConfigError, match=f"positions: {key}, but without training"):
            positions.changed(scout, {key: 1})
    with pytest.raises(ConfigError, match="rope.factor='8'"):
        positions.changed(scout, {"rope.factor": "8"})


def test_no_parameter_depends_on_what_may_be_changed():
    """Every field of a model's positions is one that may be changed, but for those that bring parameters."""
    fields = {f.name for f in dataclasses.fields(config.Model) if f.name.startswith(("attn_", "chunk_"))}
    kept = {name for name in positions.WEIGHTLESS if "." not in name}
    assert fields - kept == {"attn_scale", "attn_temperature_when"}
    assert {f"rope.{f.name}" for f in dataclasses.fields(Rope)} == set(positions.WEIGHTLESS) - kept


# ----------------------------------------------------------------------------------- temperature for inference only

WHEN = dict(attn_temperature=0.5, attn_temperature_floor=4, attn_temperature_when="inference")


def one_step(**model) -> config.Run:
    """On text alone, four rows of 64 tokens."""
    run = tiny_run(1, model=dict(vision=None) | model, optim=dict(warmup_steps=0, peak_lr=1e-6))
    text = dict(multimodal_steps=0.0, seq_len=64, batch_tokens=256, sources={"text": run.data.sources["text"]})
    return replace(run, data=replace(run.data, **text))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One step with a temperature for inference only."""
    workdir = tmp_path_factory.mktemp("inference")
    return workdir, train(one_step(**WHEN), workdir)


@pytest.mark.slow
def test_the_training_step_may_leave_the_temperature_out(trained, tmp_path):
    train(one_step(attn_temperature=0.0), tmp_path)
    assert losses(trained[0]) == losses(tmp_path)


def test_evaluation_and_sampling_have_it():
    run, mesh = tiny_run(model=WHEN), make_mesh({"data": 1}, jax.devices()[:1])
    step, scorer, sampler = skeletons(run, mesh, place.WHOLE, 1)
    without = replace(run, model=replace(run.model, attn_temperature=0.0))
    assert step == skeletons(without, mesh, place.WHOLE, 1)[0] != scorer
    assert step.make.args[0].attn_temperature == 0.0
    assert scorer.make.args[0] == sampler.make.args[0] == run.model
    step, scorer, _ = skeletons(tiny_run(), mesh, place.WHOLE, 1)
    assert step is scorer, "where nothing differs, nothing is built twice"


def test_a_model_is_loaded_with_its_temperature_or_another(trained):
    batch = next(iter(pipeline.build(one_step().data, None, 0)))

    def nats(**how):
        loaded = llamax.load(trained[0], **how)
        model = loaded.skeleton.bind(loaded.params, loaded.router_bias)
        return loaded.model, np.asarray(quick_jit(lambda batch: score(model, batch).logp)(batch))

    (model, warm), (plain, cold) = nats(), nats(positions={"attn_temperature": 0.0})
    assert (model.attn_temperature, plain.attn_temperature) == (0.5, 0.0)
    assert np.abs(warm - cold).max() > 1e-3
    with pytest.raises(ConfigError, match="attn_temperature_floor=0, but it is more than 0"):
        load(trained[0], positions={"attn_temperature_floor": 0})
    with pytest.raises(ConfigError, match="positions: dim"):
        load(trained[0], positions={"dim": 64})


# ------------------------------------------------------------------------------------- from a checkpoint that lacks it


@pytest.mark.slow
def test_a_run_with_scalable_softmax_starts_from_a_model_without(trained, tmp_path):
    """Its own parameter begins as configured; all else is the other model's."""
    run = one_step(attn_scale="ssmax", ssmax_len=100)
    differs = ("attn_scale", "attn_temperature*")
    with pytest.raises(ConfigError, match="attn_scale: temperature there, ssmax in the recipe"):
        train(replace(run, init=config.Init(path=str(trained[0]))), tmp_path)
    train(replace(run, init=config.Init(path=str(trained[0]), differs=differs)), tmp_path)
    ours, anew = split(jax.device_get(llamax.load(tmp_path).params), ("ssmax",))
    s = anew["stack"]["segment0"]["slot1"]["attention"]["ssmax"]
    np.testing.assert_allclose(s, np.full((2, 4), 1 / np.log(100)), atol=1e-5)
    theirs = jax.device_get(trained[1].state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
