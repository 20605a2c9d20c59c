"""Killed and resumed is uninterrupted, bit for bit; a SIGTERM leaves a complete checkpoint: real processes and signals.

`Strike("step", 5, 0.1)` is a tenth of a second after the process says that it is about to take step 5
(tests/kill_child.py has the phases).
"""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.killing import STOP_S, Child, Record, child, differences, newest_checkpoint, record, run_to_the_end
from tests.xla_flags import QUICK_FLAGS

try:
    import fcntl
except ImportError:
    pytest.skip("signals and file locks are POSIX", allow_module_level=True)

TERMINATED = 143  # 128 + SIGTERM, the shell's own
SLOW = ("compile=0.4", "saving=0.8", "eval=0.15")  # seconds: phases that would be over too soon to be struck
N_RANDOM = 30
WHERE = ("start", "data", "compile", "step", "step", "save", "saving", "saving", "eval", "eval")  # as often each


class Strike(NamedTuple):
    phase: str
    number: int | None = None  # None: the first one that there is
    delay_s: float = 0.0
    workers: int = 0  # loader processes of the run that is struck
    everyone: bool = True  # or the main process alone: its loader processes have to notice
    slow: tuple[str, ...] = SLOW


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Record:
    """The record of a run that nobody disturbs; pytest's own processes share it."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    workdir = folder / "uninterrupted"
    done = folder / "uninterrupted.done"
    with (folder / "uninterrupted.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            run_to_the_end(workdir)
            done.touch()
    found = record(workdir)
    assert not found.debris and len(found.batches) == 20
    return found


def killed(workdir: Path, strikes: list[Strike]) -> list[str]:
    """Starts the run, kills it, starts it again, ... and lets the last one go to the end.

    Returns the temporary checkpoint folders that the kills left behind.
    """
    left = []
    for strike in strikes:
        before = newest_checkpoint(workdir)
        with child(workdir, strike.workers, strike.slow) as it:
            assert it.wait_for(strike.phase, strike.number), f"it ended before {strike}:\n{it.tail()}"
            time.sleep(strike.delay_s)
            it.kill(strike.everyone)
            it.wait_until_all_are_gone(20)
            assert {step for phase, step in it.said if phase == "restore"} <= {before}, "it resumed from the newest"
            left += [path.name for path in workdir.glob("checkpoints/*tmp*")]
    run_to_the_end(workdir, strikes[-1].workers)
    return left


@pytest.mark.slow
def test_killed_three_times_and_resumed_is_uninterrupted_to_the_bit(uninterrupted, tmp_path):
    """In a step beyond a checkpoint; while a checkpoint is being written, and only the main process, so that nobody
    tells its loader processes; while the resumed run compiles."""
    strikes = [Strike("step", 5, 0.05), Strike("saving", 9, 0.1, 2, everyone=False), Strike("compile", 1, 0.2)]
    assert killed(tmp_path / "run", strikes), "the save was struck before its folder had its name"
    assert differences(record(tmp_path / "run"), uninterrupted) == []


@pytest.mark.slow
def test_the_program_that_users_run(tmp_path, monkeypatch):
    """Other tests compile without optimisation; this one as `llamax train` does."""
    monkeypatch.setenv("XLA_FLAGS", " ".join(x for x in os.environ["XLA_FLAGS"].split() if x not in QUICK_FLAGS))
    run_to_the_end(tmp_path / "whole")
    killed(tmp_path / "struck", [Strike("step", 8, 0.05), Strike("saving", 12, 0.1, 2)])
    assert differences(record(tmp_path / "struck"), record(tmp_path / "whole")) == []


@pytest.mark.slow
def test_evaluations_that_a_kill_cuts_off_are_made_up_for_and_none_is_there_twice(uninterrupted, tmp_path):
    """After step 6, whose checkpoint is complete by then; after the last step, between two evaluations."""
    strikes = [Strike("eval", 6, 3.0, slow=("eval=4",)), Strike("eval", 20, 2.0, slow=("eval=1.5",))]
    killed(tmp_path / "run", strikes)
    assert differences(record(tmp_path / "run"), uninterrupted) == []


def terminated(workdir: Path, strike: Strike, again_s: float | None = None) -> Child:
    """Starts the run, sends a SIGTERM, and perhaps another; it has ended with the code of the contract."""
    before = newest_checkpoint(workdir)
    with child(workdir, strike.workers, (*SLOW[:-1], "eval=1")) as it:
        assert it.wait_for(strike.phase, strike.number), f"it ended before {strike}:\n{it.tail()}"
        time.sleep(strike.delay_s)
        it.terminate(strike.everyone)
        asked = time.monotonic()
        if again_s is not None:
            time.sleep(again_s)
            it.terminate(strike.everyone)
        code = it.wait(STOP_S)
        print(f"{strike}: exit code {code} {time.monotonic() - asked:.1f} s after the SIGTERM")
        it.wait_for("nothing of the kind")
        it.wait_until_all_are_gone(5)
    assert code == TERMINATED, it.tail()
    taken = max((n for phase, n in it.said if phase == "step"), default=before)
    if taken <= 2:  # it may have been waiting for its program to be compiled, and was not taken then
        taken -= newest_checkpoint(workdir) == taken - 1
    assert newest_checkpoint(workdir) == taken, "a complete checkpoint of the last step that was taken"
    return it


def test_sigterm_in_a_step_and_in_a_save(uninterrupted, tmp_path):
    terminated(tmp_path / "run", Strike("step", 5, 0.05))
    terminated(tmp_path / "run", Strike("saving", 9, 0.1), again_s=0.05)
    run_to_the_end(tmp_path / "run")
    assert differences(record(tmp_path / "run"), uninterrupted, stopped=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers, again_s", [(0, None), (0, 0.05), (2, 0.5)])
def test_sigterm_anywhere(workers, again_s, uninterrupted, tmp_path):
    """One after the other in the same run: in start-up, compile, step, save, evaluation. Another changes nothing."""
    for phase, number, delay_s in (
        ("data", 0, 0.1),
        ("compile", 1, 0.1),
        ("step", 2, 0.0),
        ("compile", 2, 0.1),  # with a checkpoint to go on from
        ("saving", 6, 0.1),
        ("eval", 10, 0.2),
    ):
        everyone = phase not in ("data", "compile")  # loader processes that are still starting would die of it
        it = terminated(tmp_path / "run", Strike(phase, number, delay_s, workers, everyone), again_s)
        if phase == "eval":
            assert sum(phase == "eval" for phase, _ in it.said) <= 2, "abandoned at the next batch"
    run_to_the_end(tmp_path / "run", workers)
    assert differences(record(tmp_path / "run"), uninterrupted, stopped=True) == []


def random_strike(draw: random.Random, phase: str, step: int, workers: int, last: int = 20) -> Strike:
    """In this phase of a run that has taken up to `step` steps of 20; at step `last` at most."""
    number = None
    if phase == "compile":
        number = draw.choice((1, 2))
    elif phase == "step":
        number = draw.randint(step + 1, last)
    elif phase in ("save", "saving"):
        number = draw.choice([n for n in (3, 6, 9, 12, 15, 18, 20) if step < n <= last])
    elif phase == "eval":
        number = draw.choice([n for n in (5, 6, 10, 12, 15, 18, 20) if step < n <= last])
    longest = {"start": 3.0, "data": 1.5, "compile": 1.5, "saving": 0.6, "eval": 0.3}.get(phase, 0.25)
    return Strike(phase, number, round(draw.uniform(0, longest), 3), workers, everyone=draw.random() < 0.7)


@pytest.mark.slow
def test_killed_at_thirty_random_points(uninterrupted, tmp_path, capsys):
    """LLAMAX_KILL_SEED draws others. Every third run is struck twice; every second one has loader processes."""
    seed = int(os.environ.get("LLAMAX_KILL_SEED", time.time_ns() % 1_000_000))
    draw = random.Random(seed)
    phases = [phase for phase in WHERE for _ in range(N_RANDOM // len(WHERE))]
    draw.shuffle(phases)
    plans: list[list[Strike]] = []
    while phases:
        workers = 2 * (len(plans) % 2)
        steps = (0, 14)[: min(len(phases), 2 if len(plans) % 3 == 2 else 1)]
        plans.append(
            [random_strike(draw, phases.pop(), step, workers, 20 if step == steps[-1] else 14) for step in steps]
        )

    def attempt(number: int) -> list[str]:
        workdir = tmp_path / f"run{number}"
        try:
            killed(workdir, plans[number])
            return differences(record(workdir), uninterrupted)
        except AssertionError as error:
            return [str(error)]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(attempt, range(len(plans))))
    equal = sum(len(strikes) for strikes, wrong in zip(plans, found, strict=True) if not wrong)
    with capsys.disabled():
        print(f"\nkilled at random and resumed: {equal} of {N_RANDOM} equal bit for bit (LLAMAX_KILL_SEED={seed})")
        for strikes, wrong in zip(plans, found, strict=True):
            if wrong:
                print(f"  {strikes}", *wrong[:6], sep="\n    ")
    assert equal == N_RANDOM
