"""Runs in stages, and runs that start from another model's weights."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import llamax
from llamax import config, stages
from llamax.config import ConfigError
from llamax.config_file import override
from llamax.data import pipeline
from llamax.observe import provenance
from llamax.run import Result, make_ready, newest_between
from tests.runs import tiny_run
from tests.test_run import lines, losses, same_bits, stop_at, train

ROWS = dict(seq_len=128)
KEPT = dict(every_steps=2, keep=2)
STAGES = {
    "to_128": config.Stage(tokens=4 * 1024, data=ROWS, optim=dict(peak_lr=1e-3, warmup_steps=0)),
    "to_256": config.Stage(
        tokens=3 * 1024 + 1,  # four steps: the last one counts as whole
        data=dict(seq_len=256, sources=dict(pictures=dict(weight=0.1))),
        model=dict(chunk_len=64, rope=dict(theta=1e6)),
        optim=dict(peak_lr=5e-4, warmup_steps=1),
        mesh=dict(fsdp=2),
        train=dict(remat="block"),
    ),
}


def staged(init: Path | str = "", names: tuple[str, ...] = tuple(STAGES), **sections) -> config.Run:
    short = dict(train=dict(steps=0, log_every_steps=2), data=dict(seq_len=64), mesh=dict(data=-1))
    run = tiny_run(**(short | sections))
    return dataclasses.replace(run, stages={n: STAGES[n] for n in names}, init=config.Init(path=str(init)))


def go(run: config.Run, workdir: Path) -> Result:
    from llamax.run import train as on

    return on(run, workdir, devices=jax.devices()[:2])


# ---------------------------------------------------------------------------------------------------- what a stage is


def test_each_stage_is_a_whole_run():
    run = staged()
    first, second = stages.parts(run)
    assert (first.name, first.first, first.end) == ("to_128", 0, 4)
    assert (second.name, second.first, second.end) == ("to_256", 4, 8)
    assert first.run.data.seq_len == 128 and second.run.data.rows == 4
    assert second.run.model.rope == dataclasses.replace(run.model.rope, theta=1e6), "all but theta is the run's"
    assert second.run.data.sources["pictures"] == dataclasses.replace(run.data.sources["pictures"], weight=0.1)
    assert second.run.data.sources["text"] == run.data.sources["text"]
    assert second.run.optim.begins == 4 and not second.run.stages
    assert [stages.at(run, step).name for step in (0, 1, 4, 5, 8)] == ["to_128"] * 3 + ["to_256"] * 2


def test_each_stage_reads_its_sources_in_an_order_of_its_own():
    """The first one in that of a run without stages."""
    run = staged(data=ROWS)
    run = dataclasses.replace(run, stages={name: config.Stage(tokens=2 * 1024) for name in ("a1", "a2", "a3")})
    read = [next(iter(make_ready(part, jax.devices()[:2]).data)).tokens for part in stages.parts(run)]
    assert (read[0] == next(iter(pipeline.build(run.data, run.model.vision, run.seed))).tokens).all()
    firsts = {tokens[0].tobytes() for tokens in read}
    assert len(firsts) == 3, "none begins with the documents that another began with"


def test_no_roll_back_goes_into_the_stage_before():
    assert newest_between([2, 4, 6], 4, 6) == 4, "its beginning is the end of the one before"
    assert newest_between([2, 4, 6], 4, 4) is None and newest_between([2], 0, 9) == 2


def test_a_number_in_a_name_counts_as_a_number():
    names = ["to_256k", "to_32k", "a10", "a9", "to_1M"]
    assert sorted(names, key=stages.in_order) == ["a9", "a10", "to_1M", "to_32k", "to_256k"]


VALUE = r"--config\.[\w.]+=[^\s,]+\b"  # a setting as it is advised


def changed(name: str, **fields) -> config.Run:
    run = staged()
    return dataclasses.replace(run, stages=run.stages | {name: dataclasses.replace(run.stages[name], **fields)})


@pytest.mark.parametrize(
    ("run", "asked", "true"),
    [
        (changed("to_256", data=dict(seq_len=64)), "stages.to_256.data.seq_len=64", "stages do not shrink, and to_128"),
        (changed("to_256", model=dict(chunk_len=16)), "stages.to_256.model.chunk_len=16", "has 32"),
        (changed("to_128", data=dict(seq_len=32)), "stages.to_128.data.seq_len=32", "the run, which comes before, has"),
        (changed("to_256", model=dict(chunk_len=96)), "stages.to_256.data.seq_len=256", "chunks of .*=96 tokens"),
        (changed("to_256", mesh=dict(context=8)), "stages.to_256.mesh.context=8", "whole chunks of 64"),
        (changed("to_256", mesh=dict(fsdp=3)), "fsdp=3", "has 4 rows"),
        (changed("to_256", data=dict(seq_len=192)), "config.data.batch_tokens=1", "of to_256 have seq_len=192"),
        (changed("to_256", optim=dict(warmup_steps=9)), "stages.to_256.optim.warmup_steps=9", "4 of them before"),
        (changed("to_256", train=dict(accumulate=3)), "stages.to_256.train.accumulate=3", "= 4 rows"),
        (staged(checkpoint=dict(keep_every_steps=3)), "--config.checkpoint.keep_every_steps=3", "every 2 steps"),
        (changed("to_256", data=dict(batch_tokens=512)), "stages.to_256.data.batch_tokens", "same in all stages"),
        (changed("to_256", model=dict(n_heads=2)), "stages.to_256.model.n_heads", "same in all stages"),
        (changed("to_256", model=dict(rope=dict(teta=2.0))), "stages.to_256.model.rope.teta", "no teta"),
        (changed("to_256", optim=dict(peak_lr="high")), "stages.to_256.optim.peak_lr='high'", "is a number"),
        (changed("to_256", tokens=0), "stages.to_256.tokens=0", "trains on some"),
        (staged(train=dict(steps=8)), "train.steps=8", "the run has stages"),
        (dataclasses.replace(tiny_run(), train=config.Train(steps=0)), "train.steps=0", "it is more than 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_no_stage_can_be_is_refused_before_anything_starts(run, asked, true):
    with pytest.raises(ConfigError, match=true) as refused:
        config.freeze(config.to_config(run))
    assert asked in refused.value.asked and refused.value.change
    assert not re.search(VALUE, refused.value.change) or followed(run, refused.value)


def followed(run: config.Run, refused: ConfigError) -> bool:
    """Whether the run works once the values that are advised are set on the command line."""
    for _ in range(3):  # one setting may ask for another
        advised = re.findall(VALUE, refused.change)
        cfg = override(config.to_config(run), advised[:1])
        try:
            config.freeze(cfg)
        except ConfigError as error:
            run, refused = config.from_dict(config.Run, cfg), error
        else:
            return True
    return False


def test_a_recipes_stages_can_be_set_on_the_command_line(tmp_path):
    (tmp_path / "r.py").write_text(
        "from llamax import config as lx, laptop, variants\n"
        "LAYOUTS = dict(v5p_8=dict(stages=dict(long=dict(mesh=dict(context=8)))))\n"
        "def get_config(size='full'):\n"
        "    run = laptop.pretrain(lx.recipe('r', variants.scout_tiny()), variants.scout_tiny())\n"
        "    run.train.steps, run.data.seq_len = 0, 512\n"
        "    run.stages = dict(long=dict(tokens=8192, data=dict(seq_len=1024), "
        "optim=dict(warmup_steps=0, decay_steps=1)))\n"
        "    return run\n"
    )
    spec, here = f"{tmp_path}/r.py", "--config.stages.long"
    overrides = [
        f"{here}.tokens=16384",
        f"{here}.data.seq_len=2048",
        f"{here}.model.rope.theta=1e6",
        f"{here}.mesh.fsdp=2",
    ]
    (part,) = stages.parts(config.freeze(config.load(f"{spec}:v5p_8", overrides)))
    assert part.end == 4 and part.run.data.seq_len == 2048 and part.run.model.rope.theta == 1e6
    assert part.run.mesh.axes | {} == {**config.Mesh(data=-1).axes, "fsdp": 2, "context": 8}
    with pytest.raises(ConfigError, match="long.model.rope has no tetha"):
        config.load(spec, [f"{here}.model.rope.tetha=1"])
    with pytest.raises(ConfigError, match="stages has no short"):
        config.load(spec, ["--config.stages.short.tokens=1"])


# ------------------------------------------------------------------------------------------------------------- running


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Two steps at 64 tokens a row."""
    workdir = tmp_path_factory.mktemp("pretrained")
    return workdir, train(tiny_run(2, data=dict(seq_len=64)), workdir)


@pytest.fixture(scope="module")
def unbroken(pretrained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("staged")
    return workdir, go(staged(pretrained[0], checkpoint=KEPT), workdir)


def test_a_run_starts_from_another_models_weights_with_a_fresh_optimizer(pretrained, unbroken, tmp_path):
    """The first stage alone, as a plain run from the same weights, takes the same steps."""
    run = tiny_run(4, data=ROWS, optim=dict(peak_lr=1e-3, warmup_steps=0), mesh=dict(data=-1))
    alone = go(dataclasses.replace(run, init=config.Init(path=str(pretrained[0]))), tmp_path / "alone")
    assert losses(tmp_path / "alone") == losses(unbroken[0])[: len(losses(tmp_path / "alone"))]
    assert losses(tmp_path / "alone")[0] < losses(pretrained[0])[0], "two steps have taught something"
    assert int(alone.state.opt[1][0].count) == 4
    record = json.loads((tmp_path / "alone" / "run.json").read_text())
    assert record["init"].items() >= {"path": str(pretrained[0]), "step": 2}.items()


def test_stages_follow_each_other(unbroken):
    workdir, result = unbroken
    assert result.finished and int(result.state.step) == 8
    assert [line["step"] for line in lines(workdir, "steps.jsonl")] == list(range(1, 9))
    rates = {line["step"]: line["optim/lr"] for line in lines(workdir) if "optim/lr" in line}
    assert rates[4] < rates[2] < 1e-3 and rates[6] == pytest.approx(5e-4 / 2), "each has its own schedule"
    assert int(result.state.opt[1][0].count) == 8, "the optimizer goes on"
    assert np.isfinite(result.state.recent).sum() == 4, "spikes are told by losses of the stage"
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert steps == [4, 6, 8], "the end of a stage is kept, beside the newest two"


SLOW = pytest.mark.slow


@pytest.mark.parametrize("step", [4, 6])
def test_a_run_goes_on_from_the_end_of_a_stage_or_within_one_to_the_bit(step, pretrained, unbroken, tmp_path):
    """As if it had died behind that checkpoint."""
    shutil.copytree(unbroken[0], tmp_path, dirs_exist_ok=True)
    for saved in (tmp_path / "checkpoints").iterdir():
        if int(saved.name) > step:
            shutil.rmtree(saved)
    assert same_bits(go(staged(pretrained[0], checkpoint=KEPT), tmp_path).state, unbroken[1].state)
    assert [line["step"] for line in lines(tmp_path, "steps.jsonl")] == list(range(1, 9))


@SLOW
@pytest.mark.parametrize("step", [2, 4, 7])
def test_a_run_stopped_in_or_between_stages_goes_on_to_the_bit(step, pretrained, unbroken, tmp_path):
    run = staged(pretrained[0])
    stop_at(step, lambda: go(run, tmp_path))
    assert same_bits(go(run, tmp_path).state, unbroken[1].state)


def test_a_checkpoint_is_read_as_the_model_of_its_stage(unbroken):
    newest, first = llamax.load(unbroken[0]), llamax.load(unbroken[0], step=4)
    assert (newest.model.chunk_len, newest.model.rope.theta) == (64, 1e6)
    assert (first.model.chunk_len, first.model.rope.theta) == (32, 5e5)


@SLOW
def test_what_comes_later_may_change_and_what_was_taken_may_not(pretrained, unbroken, tmp_path):
    one = staged(pretrained[0], names=("to_128",))
    go(one, tmp_path)
    longer = staged(pretrained[0])
    assert same_bits(go(longer, tmp_path).state, unbroken[1].state), "a stage was added"
    other = dataclasses.replace(STAGES["to_128"], optim=dict(peak_lr=1.0, warmup_steps=0))
    with pytest.raises(ConfigError, match="stages.to_128.optim.peak_lr: 0.001 → 1.0"):
        go(dataclasses.replace(longer, stages=longer.stages | {"to_128": other}), tmp_path)
    with pytest.raises(ConfigError, match="stages.to_256"):
        go(one, tmp_path)


# ----------------------------------------------------------------------------------------------------- bad beginnings


@pytest.mark.parametrize(
    ("changes", "true"),
    [
        (dict(rope=config.Rope(theta=1e4)), "rope.theta: 500000.0 there, 10000.0 in the recipe"),
        (dict(chunk_len=64), "chunk_len: 32 there, 64 in the recipe"),
        (dict(top_k=2), "top_k: 1 there, 2 in the recipe"),
    ],
)
def test_weights_of_another_function_are_refused(changes, true, pretrained, tmp_path):
    run = tiny_run(4, model=changes)
    run = dataclasses.replace(run, init=config.Init(path=str(pretrained[0])))
    with pytest.raises(ConfigError, match=true) as refused:
        train(run, tmp_path)
    assert not list(tmp_path.iterdir()), "nothing was written"
    assert ("init.differs" in refused.value.change) == ("top_k" not in changes)


def test_another_reading_of_positions_may_be_meant(pretrained, tmp_path):
    run = tiny_run(1, model=dict(rope=config.Rope(theta=1e4)), optim=dict(warmup_steps=0))
    train(dataclasses.replace(run, init=config.Init(path=str(pretrained[0]), differs=("rope.*",))), tmp_path)
    assert math.isfinite(losses(tmp_path)[0])


def test_weights_that_are_not_there_or_of_other_tokens_are_refused(pretrained, tmp_path):
    run = tiny_run(4)
    with pytest.raises(ConfigError, match="neither a run.json"):
        train(dataclasses.replace(run, init=config.Init(path=str(tmp_path / "nowhere"))), tmp_path / "run")
    with pytest.raises(ConfigError, match="Checkpoint of step 7.* holds 2"):
        train(dataclasses.replace(run, init=config.Init(path=str(pretrained[0]), step=7)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_old_record_without_todays_fields_is_still_the_same_run(pretrained, tmp_path):
    values = config.to_dict(tiny_run(4))
    old = json.loads(json.dumps(values))
    del old["init"], old["stages"], old["optim"]["begins"]
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "run.json").write_text(json.dumps({"config": old}))
    provenance.check_same_run(tmp_path, values)
    old["optim"]["b1"] = 0.5
    (tmp_path / "run.json").write_text(json.dumps({"config": old}))
    with pytest.raises(ConfigError, match="optim.b1: 0.5 → 0.9"):
        provenance.check_same_run(tmp_path, values)
