"""Whole runs on the fixture data: a golden loss curve, resuming, meshes, stopping, and what a workdir refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llamax import config, generating
from llamax.checkpoint import sums
from llamax.config import ConfigError
from llamax.data.tokenizer import Tokenizer
from llamax.observe import provenance
from llamax.run import Result
from llamax.run import train as train_on_all
from llamax.sample.engine import Sampling
from llamax.train import hooks, loop
from llamax.train.health import Diverged
from tests.checkpoint.test_sums import flip, one_file
from tests.runs import FIXTURES, tiny_run
from tests.tolerances import CURVE, MESH_CURVE

CURVE_FILE = Path(__file__).parent / "golden" / "loss_curve.json"


def same_bits(a, b) -> bool:
    """Every array equal to the last bit; NaN equals nothing."""
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b))


def train(run: config.Run, workdir: Path) -> Result:
    """On as many of the simulated devices as the run's mesh has."""
    return train_on_all(run, workdir, devices=jax.devices()[: math.prod(run.mesh.axes.values())])


def lines(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def losses(workdir: Path, after: int = 0) -> list[float]:
    """The logged losses beyond step `after`."""
    return [line["loss/next_token"] for line in lines(workdir) if "loss/next_token" in line and line["step"] > after]


SECTIONS = [c for c in vars(config).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
NO_READERS = ("checks", "config_dict", "config_file", "model.count", "show", "variants")  # they check, count or print
READ: set[str] = set()  # "Section.field" of every setting that the run of `unbroken` looked at


def no_reader(module: str) -> bool:
    return any(f"{module}.".startswith(f"llamax.{name}.") for name in NO_READERS)


def noting(cls: type):
    """A `__getattribute__` that notes which fields of a section the code of llamax reads."""
    names = {f.name for f in dataclasses.fields(cls)}

    def get(self, name):
        caller = sys._getframe(1)
        module = caller.f_globals.get("__name__", "")
        generated = caller.f_code.co_name in ("__eq__", "__hash__", "__repr__")  # they read all fields of a dataclass
        if name in names and module.startswith("llamax.") and not no_reader(module) and not generated:
            READ.add(f"{cls.__name__}.{name}")
        return object.__getattribute__(self, name)

    return get


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Twenty steps in one go, with an evaluation of each kind at the end."""
    workdir = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        for section in SECTIONS:
            patch.setattr(section, "__getattribute__", noting(section))
        began = time.time()
        result = twenty_steps(workdir)
        # Freeing programs and arrays comes after the ledger's last word.
        return workdir, result, (workdir / "goodput.json").stat().st_mtime - began


EVALS = {
    "text": config.Eval(path=str(FIXTURES / "text.toml"), max_docs=8),
    "drawings": config.Eval(kind="drawings", path=str(FIXTURES / "pictures.toml")),
}


def twenty_steps(workdir: Path) -> Result:
    return train(tiny_run(20, evals=EVALS), workdir)


def test_every_field_of_the_schema_is_read_by_code_that_acts(unbroken):
    """No setting is there in name only."""
    sizes = {f"Mesh.{f.name}" for f in dataclasses.fields(config.Mesh)}  # tests/train/test_meshes.py
    by_check_devices = {"Run.mesh"} | sizes  # it resolves the mesh that the run takes
    fields = {f"{c.__name__}.{f.name}" for c in SECTIONS for f in dataclasses.fields(c)}
    assert len(SECTIONS) == 22 and "Mesh.data" in fields
    by_stages = {f"{c.__name__}.{f.name}" for c in (config.Stage, config.Init) for f in dataclasses.fields(c)}
    by_long_contexts = {f"Eval.{f.name}" for f in dataclasses.fields(config.Eval)}  # tests/evals/test_long_contexts.py
    # tests/model/test_positions.py, tests/model/test_rope.py
    yarn = {"Rope.beta_slow", "Rope.beta_fast", "Rope.ramp", "Rope.attention_factor"}
    by_positions = yarn | {"Model.ssmax_len"}
    # tests/optim/test_schedules.py, below, tests/model/test_moe.py, tests/train/test_pipeline.py
    read_elsewhere = {"Optim.decay_steps", "Health.max_roll_backs", "Model.group_best", "Train.pipeline_microbatches"}
    # tests/losses, tests/train/test_preference.py, tests/post/test_reference.py, tests/test_lora_run.py
    comparing = (config.Preference, config.PreferenceLosses, config.Reference, config.Tune)
    by_comparisons = {f"{c.__name__}.{f.name}" for c in comparing for f in dataclasses.fields(c)}
    by_comparisons |= {"Losses.preference", "Losses.reward"}
    # tests/losses/test_policy.py, tests/post/test_advantages.py: no recipe has them yet
    by_policies = {f"{c.__name__}.{f.name}" for c in (config.Policy, config.Advantage) for f in dataclasses.fields(c)}
    by_comparisons |= by_policies
    elsewhere = by_check_devices | by_stages | by_long_contexts | by_positions | read_elsewhere | by_comparisons
    assert sorted(fields - READ - elsewhere) == []


def test_the_golden_loss_curve(unbroken):
    """Refresh after a change that is meant to move it: `python -m tests.test_run`."""
    workdir, result, _ = unbroken
    golden = json.loads(CURVE_FILE.read_text())
    np.testing.assert_allclose(losses(workdir), golden["loss"], **CURVE)
    learnt = losses(workdir)
    assert learnt[-1] < learnt[0] - 1.5


def test_the_ledger_sums_to_the_wall_time(unbroken):
    workdir, _, wall = unbroken
    seconds = json.loads((workdir / "goodput.json").read_text())["seconds"]
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.01, abs=0.1)
    assert all(seconds[phase] > 0 for phase in ("start", "compile", "data", "step", "save", "evaluate"))
    shares = [value for name, value in lines(workdir)[-3].items() if name.startswith("goodput/")]
    assert len(shares) == 8 and sum(shares) == pytest.approx(1)


def test_every_step_logs_its_routing_and_now_and_then_its_norms(unbroken):
    workdir, result, _ = unbroken
    model, routing = tiny_run().model, lines(workdir, "steps.jsonl")
    assert [line["step"] for line in routing] == list(range(1, 21))
    for line in routing:
        load_LE = np.array(line["load"])
        assert load_LE.shape == (2, model.n_experts) and np.allclose(load_LE.sum(1), 1, atol=1e-3)
        np.testing.assert_allclose(line["max_over_mean"], load_LE.max(1) * model.n_experts, atol=1e-3)
        assert len(line["entropy"]) == len(line["dead"]) == len(line["logit_norm"]) == 2
    board = EventAccumulator(str(workdir / "tensorboard")).Reload()
    assert {"experts/load", "experts/load_over_time"} <= set(board.Tags()["images"])
    bias = jax.tree.leaves(result.state.router_bias)[0]
    assert bias.shape == (2, 4) and len(np.unique(np.abs(bias))) > 2, "moved in steps of the rate, both ways"
    last = [line for line in lines(workdir) if "norms/gradient/layer_03" in line]
    assert len(last) == 1, "after the last step alone: every 100"
    names = {"gradient/embed", "gradient/vision_01", "gradient/layer_00", "activation/layer_00", "activation/layer_03"}
    assert all(last[0][f"norms/{name}"] > 0 for name in names)


def test_evaluations_report(unbroken):
    workdir, result, _ = unbroken
    text, drawings = result.reports["text"].scalars, result.reports["drawings"]
    assert 0 < text["bits_per_byte"] < 8 and 0 < text["zlib_bits_per_byte"] < text["unigram_bits_per_byte"]
    assert {"colour_accuracy", "shape_accuracy", "colour_accuracy_blank"} <= drawings.scalars.keys()
    assert drawings.pictures[0][0].shape == (28, 28, 3)
    names = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert "eval/drawings/shape_accuracy" in names


def test_what_a_run_leaves_behind(unbroken):
    workdir, *_ = unbroken
    first = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert {"loss/source/text", "loss/lang/python", "optim/lr", "optim/grad_norm", "speed/mfu", "experts/dead"} <= set(
        first
    )
    record = json.loads((workdir / "run.json").read_text())
    assert record["config"]["optim"]["peak_lr"] == 3e-3 and record["devices"]["platform"] == "cpu"
    assert list((workdir / "tensorboard").glob("events*"))


def test_stopped_and_resumed_is_uninterrupted_to_the_bit(unbroken, tmp_path):
    """Stops after 7 of 20 steps, between two checkpoints, in the middle of a data window; the same command goes on."""
    stop_at(7, lambda: train(tiny_run(20), tmp_path))
    resumed = train(tiny_run(20), tmp_path)
    assert same_bits(resumed.state, unbroken[1].state)
    assert losses(tmp_path, after=8) == losses(unbroken[0], after=8)


@pytest.mark.slow
def test_levers_stop_and_resume_to_the_bit(tmp_path):
    """Moments in bfloat16, master weights over `data`, copies of them and attention kept: all of it at once."""
    levers = dict(mesh=dict(data=2, fsdp=2, rules="zero"), optim=dict(moments_dtype="bfloat16"))
    run = tiny_run(8, train=dict(steps=8, remat="attention", log_every_steps=2), **levers)
    whole = train(run, tmp_path / "whole")
    stop_at(4, lambda: train(run, tmp_path / "parts"))
    assert same_bits(train(run, tmp_path / "parts").state, whole.state)


@pytest.mark.slow
def test_what_is_no_part_of_the_recipe_changes_no_bit(unbroken, tmp_path):
    """A second run, with the sources named in another order, two loader processes and another prefetch depth."""
    run = tiny_run(
        20, data=dict(sources=dict(reversed(tiny_run().data.sources.items())), workers=2, prefetch_batches=1)
    )
    again = train(run, tmp_path)
    assert same_bits(again.state, unbroken[1].state)
    assert losses(tmp_path) == losses(unbroken[0])


@pytest.mark.slow
def test_another_seed_is_another_run(unbroken, tmp_path):
    other = train(dataclasses.replace(tiny_run(20), seed=1), tmp_path)
    assert not same_bits(other.state.params, unbroken[1].state.params)
    assert not set(losses(tmp_path)) & set(losses(unbroken[0]))


def stop_at(step: int, run) -> None:
    """Ctrl-C after step `step` was logged."""
    log = hooks.Log.__call__

    def interrupt(self, event):
        log(self, event)
        if event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks.Log, "__call__", interrupt)
        result = run()
    assert not result.finished and int(result.state.step) == step


MESHES = [
    dict(data=2, fsdp=4),
    pytest.param(dict(data=8), marks=pytest.mark.slow),
    pytest.param(dict(data=1, fsdp=2, expert=2, tensor=2), marks=pytest.mark.slow),
    pytest.param(dict(pipeline=2, data=1, fsdp=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_any_mesh_gives_the_numbers_of_one_device(mesh, unbroken, tmp_path):
    """Steps with and without pictures; the state's shards are where the rules say."""
    result = train(tiny_run(20, mesh=mesh), tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(unbroken[0]), **MESH_CURVE)
    embed = result.state.params["embed"]
    ways = mesh.get("fsdp", 1) * mesh.get("expert", 1)  # what is no expert is split over both
    assert embed.sharding.shard_shape(embed.shape)[1] == embed.shape[1] // ways
    moments = [x for x in jax.tree.leaves(result.state.opt) if x.shape == embed.shape]
    assert moments and all(x.sharding == embed.sharding for x in moments)


@pytest.mark.slow
def test_a_checkpoint_resumes_on_another_mesh(unbroken, tmp_path):
    stop_at(7, lambda: train(tiny_run(20, mesh=dict(data=1, fsdp=4)), tmp_path))
    train(tiny_run(20, mesh=dict(data=4)), tmp_path)
    np.testing.assert_allclose(losses(tmp_path, after=8), losses(unbroken[0], after=8), **MESH_CURVE)


@pytest.mark.slow
def test_a_pipeline_goes_on_on_one_device_and_back(unbroken, tmp_path):
    """Evaluations too: they score on all stages, and draw tokens with every layer on every device."""

    def go(**mesh):
        return train(dataclasses.replace(tiny_run(20, mesh=mesh), evals=EVALS), tmp_path)

    stop_at(7, lambda: go(pipeline=2, data=2))
    stop_at(13, lambda: go(data=1))
    result = go(pipeline=2, data=2)
    np.testing.assert_allclose(losses(tmp_path, after=14), losses(unbroken[0], after=14), **MESH_CURVE)
    assert result.reports.keys() == unbroken[1].reports.keys()
    text, alone = (reports["text"].scalars for reports in (result.reports, unbroken[1].reports))
    assert text.keys() == alone.keys() and text
    np.testing.assert_allclose(list(text.values()), list(alone.values()), **MESH_CURVE)


def test_a_finished_run_is_evaluated_again_and_goes_no_way_back(unbroken):
    workdir, result, _ = unbroken
    before = (workdir / "metrics.jsonl").read_text()
    again = twenty_steps(workdir)
    assert again.finished and same_bits(again.state, result.state)
    assert (workdir / "metrics.jsonl").read_text() == before, "what is known is not written twice"
    assert {name: r.scalars for name, r in again.reports.items()} == {n: r.scalars for n, r in result.reports.items()}
    with pytest.raises(ConfigError, match="has taken 20 steps already"):
        train(tiny_run(10), workdir)


@pytest.mark.slow
def test_a_run_with_relative_paths_resumes_from_any_folder_with_other_weights(tmp_path, monkeypatch, capsys):
    """The change of weights is said, stands in run.json, and shows in the shares of every log."""
    monkeypatch.chdir(tmp_path)
    before, after = {"text": 0.5, "code": 0.3, "pictures": 0.2}, {"text": 0.1, "code": 0.8, "pictures": 0.1}
    old = tiny_run(20, data=dict(tokenizer="data/tokenizer.model"))
    sources = {name: dataclasses.replace(s, weight=after[name]) for name, s in old.data.sources.items()}
    stop_at(4, lambda: train(old, tmp_path / "run"))
    changed = dataclasses.replace(old, data=dataclasses.replace(old.data, sources=sources))
    stop_at(12, lambda: train(changed, tmp_path / "run"))
    assert "from step 4 on, data.sources.code.weight is 0.8 and no longer 0.3" in capsys.readouterr().err
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["changes"]
    said = {(c["step"], c["key"], c["old"], c["new"]) for c in recorded}
    assert said == {(4, f"data.sources.{name}.weight", before[name], after[name]) for name in before}
    logged = {line["step"]: line for line in lines(tmp_path / "run")}
    asked, read = ([{name: line[f"data/{kind}/{name}"] for name in before} for line in (logged[4], logged[12])]
                   for kind in ("share_asked", "share"))  # fmt: skip
    assert asked == [pytest.approx(before), pytest.approx(after)]
    assert [sum(shares.values()) for shares in read] == pytest.approx([1, 1])
    assert read[1]["code"] > 0.6 > 0.5 > read[0]["code"]


def test_documents_left_out_are_told_and_other_data_is_refused(tmp_path, capsys):
    texts = (FIXTURES / "text.jsonl").read_text() + 100 * (json.dumps({"text": "  "}) + "\n")
    (tmp_path / "text.jsonl").write_text(texts)
    (tmp_path / "text.toml").write_text((FIXTURES / "text.toml").read_text().split("documents")[0])
    sources = tiny_run().data.sources | {"text": config.Source(str(tmp_path / "text.toml"), 0.5)}
    run = tiny_run(20, data=dict(sources=sources))
    stop_at(8, lambda: train(run, tmp_path / "run"))
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["data/left_out/text/empty"] >= 1
    assert "documents of text left out so far: the document has neither a picture" in capsys.readouterr().err
    (tmp_path / "text.jsonl").write_text(texts + texts)
    with pytest.raises(ConfigError, match="not the same: text"):
        train(run, tmp_path / "run")


@pytest.mark.slow
def test_too_many_bad_steps_stop_the_run(tmp_path):
    """A learning rate that warms up from 0 to 1e16: the second update ruins the parameters, the third step is NaN. What
    step 2 saved is the ruin."""
    ruin = dict(peak_lr=1e16, warmup_steps=4)
    broken = tiny_run(20, optim=ruin, health=dict(max_bad_steps=3), checkpoint=dict(every_steps=1))
    with pytest.raises(Diverged, match="3 to 5, were not finite.* last good checkpoint is step 1"):
        train(broken, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_run_over_a_damaged_newest_checkpoint_ends_with_the_same_bits(unbroken, tmp_path, capsys):
    """The damaged one is the last, so that the run looks finished until its files are compared with their sums."""
    workdir = Path(shutil.copytree(unbroken[0], tmp_path / "run"))
    folder = workdir / "checkpoints"
    flip(one_file(folder / "20", "params"), 99)
    (workdir / "run.json.123.tmp").write_text("{")  # what a killed start leaves
    (workdir / "mine.tmp").write_text("a person's")
    again = train(tiny_run(20), workdir)
    said = capsys.readouterr().err
    assert "step 20 is damaged (params/" in said and "resumed from step 18" in said
    assert same_bits(again.state, unbroken[1].state)
    assert sorted(path.name for path in folder.iterdir()) == ["16", "18", "20", "20.damaged"]
    assert sums.check(folder / "20") == [] and sums.check(folder / "20.damaged") != []
    assert {path.name for path in workdir.glob("*.tmp")} == {"mine.tmp"}
    for step in sums.steps(folder):
        (folder / str(step) / "checksums.json").write_text("")
    for _ in range(2):  # now, and at the next start
        with pytest.raises(
            ConfigError, match=r"all that are there are damaged \(16.damaged, 18.damaged, 20.damaged, 20.d"
        ):
            train(tiny_run(20), workdir)


def test_a_workdir_of_another_run_is_refused(unbroken):
    workdir, *_ = unbroken
    before = (workdir / "run.json").read_text()
    with pytest.raises(ConfigError, match="optim.peak_lr"):
        train(tiny_run(20, optim=dict(peak_lr=1e-4)), workdir)
    assert (workdir / "run.json").read_text() == before


def test_evaluations_that_were_cut_off_are_made_up(unbroken, tmp_path):
    """A death after the checkpoint of step 20 and before its evaluations."""
    workdir = Path(shutil.copytree(unbroken[0], tmp_path / "run"))
    known = lines(workdir)
    kept = [line for line in known if not any(name.startswith("eval/") for name in line)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert twenty_steps(workdir).finished
    assert [{**line, "time": 0} for line in lines(workdir)] == [{**line, "time": 0} for line in known]


def test_a_workdir_is_for_one_process_at_a_time(tmp_path):
    with provenance.alone(tmp_path), pytest.raises(ConfigError, match="another process is training in it"):
        train(tiny_run(20), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.lock"], "nothing was written"
    with provenance.alone(tmp_path):
        pass


def test_wrong_input_is_refused_before_anything_is_written(tmp_path):
    missing = {"text": config.Source(str(tmp_path / "nothing.toml"))}
    for run in (
        tiny_run(2, data=dict(sources=missing)),
        tiny_run(2, mesh=dict(data=3)),  # 8 rows
        dataclasses.replace(tiny_run(2), evals={"x": config.Eval(path="nothing.toml")}),
        tiny_run(2, model=dict(vocab_size=5000)),
    ):
        with pytest.raises(ConfigError):
            train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_generate_asks_the_newest_checkpoint_with_the_picture(unbroken, monkeypatch):
    workdir, result, _ = unbroken
    picture, asked = FIXTURES / "pictures" / "red_circle.png", {}
    continued = generating.complete

    def note(bones, params, router_bias, prompts, **how):
        asked.update(params=params, prompt=prompts[0], new=continued(bones, params, router_bias, prompts, **how))
        return asked["new"]

    monkeypatch.setattr(generating, "complete", note)
    question, sampling = "Question: what is this? Answer:", Sampling(9.0)
    (said,) = generating.generate(workdir, question, images=[picture], max_tokens=4, sampling=sampling)
    tokenizer = Tokenizer(tiny_run().data.tokenizer)
    assert said == tokenizer.decode(asked["new"][0][0].text) and said
    assert same_bits(asked["params"], result.state.params)
    assert len(asked["prompt"].tiles) == asked["prompt"].tokens.count(tokenizer.image) == 1
    assert tokenizer.decode(asked["prompt"].tokens).endswith("Question: what is this? Answer:")


def test_a_second_interrupt_does_not_wait():
    with loop.StopRequest() as stop:
        stop.at_once = False
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_before_the_first_step_a_stop_is_obeyed_at_once():
    with loop.StopRequest() as stop:
        with pytest.raises(loop.Stopped, match="SIGTERM") as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.signal == stop.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        train(tiny_run(20), folder)
        CURVE_FILE.write_text(json.dumps({"loss": losses(Path(folder))}, indent=1) + "\n")


@pytest.mark.slow
def test_a_run_whose_rows_are_cut_goes_on_on_one_device(tmp_path):
    """Four devices, two a row: rows aligned to what they need, evaluations of both kinds. Then one device, which is
    told the alignment and goes on with the same data to the losses that it would have had alone."""

    def run(steps: int, **sections) -> config.Run:
        return tiny_run(steps, evals=evals, checkpoint=dict(every_steps=2), **sections)

    evals = {
        "text": config.Eval(path=str(FIXTURES / "text.toml"), max_docs=8, every_steps=2),
        "drawings": config.Eval(kind="drawings", path=str(FIXTURES / "pictures.toml"), every_steps=2),
    }
    alone = dict(data=dict(align_tokens=32))
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    train(run(2, mesh=dict(data=2, context=2)), cut)
    assert json.loads(next(cut.glob("checkpoints/2/data/**/*.json")).read_text())["align_tokens"] == 32
    with pytest.raises(ConfigError, match="data.align_tokens=32"):
        train(run(4), cut)
    train(run(4, **alone), cut)
    train(run(4, **alone), whole)
    np.testing.assert_allclose(losses(cut), losses(whole), **MESH_CURVE)
    both = [
        [line["eval/text/bits_per_byte"] for line in lines(w) if "eval/text/bits_per_byte" in line]
        for w in (cut, whole)
    ]
    np.testing.assert_allclose(*both, **MESH_CURVE)
