"""A run's health: spikes and NaN, told, skipped, rolled back from; programs compiled once; nothing crosses unasked."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl

from llamax import config
from llamax.data import pipeline
from llamax.train import health, hooks, programs
from llamax.train.health import Diverged
from llamax.train.loop import RollBack
from tests.checkpoint.test_sums import flip, one_file
from tests.runs import tiny_run
from tests.test_run import lines, losses, same_bits, train

BAD = 13  # the stream's batch, counted from 0, that does harm: step 14's
ROLL_BACK = dict(on_nonfinite="roll_back", on_spike="roll_back", spike_window=4, spike_sigmas=3.0)


def run_of(health: dict | None = None, **sections):
    """All share their two programs."""
    sections = dict(checkpoint=dict(every_steps=4)) | sections
    return tiny_run(20, health=ROLL_BACK | (health or {}), **sections)


def harm(monkeypatch, kind: str, batches=(BAD,)) -> None:
    """Makes some batches of the stream hostile."""
    following = pipeline.StreamIterator.__next__

    def hostile(self):
        number = self._step
        batch = following(self)
        if number not in batches:
            return batch
        if kind == "nan":
            return batch._replace(loss_weights=np.where(batch.loss_weights > 0, np.inf, 0).astype(np.float32))
        noise = np.random.default_rng(0).integers(0, 4000, batch.targets.shape, dtype=np.int32)
        return batch._replace(targets=noise)

    monkeypatch.setattr(pipeline.StreamIterator, "__next__", hostile)


@pytest.mark.parametrize("kind", ["nan", pytest.param("spike", marks=pytest.mark.slow)])
def test_a_bad_step_takes_the_run_back_to_the_last_checkpoint(kind, tmp_path, monkeypatch, capsys):
    harm(monkeypatch, kind)
    result = train(run_of(), tmp_path)
    told = capsys.readouterr().err
    assert "step 14 was bad: back from step 14 to step 12" in told
    assert result.finished and int(result.state.step) == 20 and int(result.state.skipped) == 0
    steps = [line["step"] for line in lines(tmp_path) if "loss/next_token" in line]
    assert steps == sorted(set(steps)), "no step is shown twice"
    (note,) = [line for line in lines(tmp_path) if "health/rolled_back_from" in line]
    assert note["step"] == 12 and note["health/rolled_back_from"] == 14 and note["health/bad_step"] == 14
    assert json.loads((tmp_path / "goodput.json").read_text())["seconds"]["roll_back"] > 0
    assert [line["step"] for line in lines(tmp_path, "steps.jsonl")] == list(range(1, 21))


def test_a_roll_back_equals_a_run_that_never_saw_those_batches(tmp_path, monkeypatch):
    """To the bit: parameters, optimizer, router biases, spike window. Bad is step 14; back to step 12."""
    with pytest.MonkeyPatch.context() as patch:
        harm(patch, "nan")
        rolled = train(run_of(), tmp_path / "rolled")
    following = pipeline.StreamIterator.__next__

    def leave_out(self):
        """The batches of steps 13 and 14 are passed over: 12 and 13, counted from 0."""
        while self._step in (BAD - 1, BAD):
            following(self)
        return following(self)

    monkeypatch.setattr(pipeline.StreamIterator, "__next__", leave_out)
    never = train(run_of(), tmp_path / "never")
    assert same_bits(rolled.state, never.state)
    assert losses(tmp_path / "rolled", after=14) == losses(tmp_path / "never", after=14)


@pytest.mark.slow
@pytest.mark.parametrize("on", ["kill", "stop"])
def test_a_death_or_a_stop_before_a_bad_step_was_looked_at_changes_nothing(on, tmp_path, monkeypatch):
    """Logged every 10 steps and saved every 4; step 14 is bad; the run ends in step 15, and the same command goes on.

    The checkpoint of step 16 must not lie beyond a step that nobody has looked at, and a stop must not look earlier.
    """
    run = run_of(train=dict(log_every_steps=10))
    harm(monkeypatch, "nan")
    whole = train(run, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        log = hooks.Log.__call__

        def strike(self, event):
            if event.step == 15:
                if on == "kill":
                    raise Dead
                os.kill(os.getpid(), signal.SIGTERM)
            log(self, event)

        patch.setattr(hooks.Log, "__call__", strike)
        if on == "kill":
            with pytest.raises(Dead):
                train(run, tmp_path / "struck")
        else:
            assert not train(run, tmp_path / "struck").finished
    resumed = train(run, tmp_path / "struck")
    assert same_bits(resumed.state, whole.state)

    def told(name: str, workdir: Path) -> list[dict]:
        drop = ("time", "speed/", "goodput/")
        return [{k: v for k, v in line.items() if not k.startswith(drop)} for line in lines(workdir, name)]

    assert told("steps.jsonl", tmp_path / "struck") == told("steps.jsonl", tmp_path / "whole")
    if on == "kill":  # a stop logs once more, where it stops
        assert told("metrics.jsonl", tmp_path / "struck") == told("metrics.jsonl", tmp_path / "whole")


class Dead(BaseException):
    """Of a process that is killed: nothing after it happens."""


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert path.exists(), f"{path} has not come"


@pytest.mark.slow
def test_a_roll_back_does_not_trust_its_checkpoint(tmp_path, monkeypatch, capsys):
    """A bit of the checkpoint of step 12 has flipped since it was written: it is set aside, and step 8's is taken."""
    harm(monkeypatch, "nan")
    look = health.Health.roll_back

    def damage_first(self, first_bad, step):
        wait_for(tmp_path / "checkpoints" / "12")  # it is written in the background
        flip(one_file(tmp_path / "checkpoints" / "12", "params"), 99)
        look(self, first_bad, step)

    monkeypatch.setattr(health.Health, "roll_back", damage_first)
    result = train(run_of(), tmp_path)
    assert result.finished and int(result.state.step) == 20
    assert (tmp_path / "checkpoints" / "12.damaged").is_dir() and "12" in capsys.readouterr().err
    (note,) = [line for line in lines(tmp_path) if "health/rolled_back_from" in line]
    assert note["step"] == 8


def test_a_second_roll_back_goes_further():
    """The checkpoint right before a bad step may be what makes it bad. With progress, the count begins anew."""
    said = []
    saved = [4, 8, 12, 16]
    newest_before = lambda step: max((s for s in saved if s < step), default=None)  # noqa: E731
    watch = health.Health(
        config.Health(on_nonfinite="roll_back", max_roll_backs=3), (4,), newest_before, "", said.append
    )

    def bad(first_bad, step):
        with pytest.raises(RollBack) as back:
            watch.roll_back(first_bad, step)
        return back.value.to

    assert bad(14, 16) == 12 and bad(13, 16) == 8 and bad(16, 16) == 4
    with pytest.raises(Diverged, match="roll-backs to 12, 8, 4$|roll-backs to 12, 8, 4\\D"):
        watch.roll_back(13, 16)
    assert bad(18, 20) == 16, "past the trouble"
    watch.went_back, watch.furthest = [], 0
    watch.roll_back(3, 4)
    assert "no checkpoint was saved before it" in said[0]


@pytest.mark.slow
def test_a_harm_that_comes_again_stops_the_run(tmp_path, monkeypatch):
    """Every batch from there on: after as many roll-backs as allowed, Diverged, and the good checkpoint is there."""
    harm(monkeypatch, "nan", batches=range(6, 99))
    with pytest.raises(Diverged, match="max_roll_backs=2.*was bad again after roll-backs to 4, and no checkpoint"):
        train(run_of(dict(max_roll_backs=2)), tmp_path)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["4"], "and no checkpoint of a bad step"


@pytest.mark.slow
def test_without_a_checkpoint_a_bad_step_is_skipped(tmp_path, monkeypatch, capsys):
    harm(monkeypatch, "nan", batches=(1,))
    result = train(run_of(), tmp_path)
    assert result.finished and int(result.state.skipped) == 1
    assert "no checkpoint was saved before it to roll back to" in capsys.readouterr().err


def test_a_stall_is_told_while_the_run_goes_on(tmp_path, monkeypatch, capsys):
    following = pipeline.StreamIterator.__next__

    def hang(self):
        if self._step == 3:
            time.sleep(1.5)
        return following(self)

    monkeypatch.setattr(pipeline.StreamIterator, "__next__", hang)
    run = run_of(dict(stall_s=1.0), data=dict(prefetch_batches=0))
    assert train(run, tmp_path).finished
    assert "in phase 'data' (health.stall_s=1)" in capsys.readouterr().err
    texts = [path.read_text() for path in tmp_path.glob("stall-*.txt")]
    assert any("in hang" in text for text in texts)


def test_two_programs_and_no_compile_and_no_unasked_transfer_after(tmp_path, monkeypatch):
    """Twenty steps, half of them with pictures: one program each, compiled before its first step; nothing else compiles
    in the loop, and no array is fetched at a step that is neither logged nor saved."""
    compiled, per_step, fetched = Counter(), {}, Counter()
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.update([name.rsplit("/", 1)[-1]])
    )
    slots = []
    compile_step = programs._compile
    monkeypatch.setattr(
        programs, "_compile", lambda *args: slots.append(programs.slots(args[2])) or compile_step(*args)
    )
    log, value, here = hooks.Log.__call__, ArrayImpl._value, [0]

    def note(self, event):
        here[0] = event.step
        log(self, event)
        per_step[event.step] = compiled["backend_compile_duration"]

    monkeypatch.setattr(hooks.Log, "__call__", note)
    monkeypatch.setattr(ArrayImpl, "_value", property(lambda self: fetched.update([here[0]]) or value.fget(self)))
    run = run_of(train=dict(log_every_steps=10), checkpoint=dict(every_steps=100))
    train(run, tmp_path)
    monkeypatch.undo()
    assert sorted(slots) == [0, run.data.tiles_per_row]
    assert per_step[2] > 0 and per_step[20] == per_step[2], "both kinds have been taken by step 2"
    assert set(fetched) >= {10, 20}, "logged steps are fetched, so the count counts"
    assert not set(fetched) & {3, 5, 8, 12, 19}, fetched


def test_the_transfer_guard_is_on(tmp_path, monkeypatch):
    """What a careless hook would do: numbers of the host in the middle of a computation on the device."""
    monkeypatch.setattr(hooks.Save, "__call__", lambda self, event: jnp.add(event.state.skipped, np.ones(())))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(run_of(), tmp_path)
