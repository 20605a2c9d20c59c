"""Where the wall time goes: every second in one phase, over restarts and roll-backs."""

from __future__ import annotations

import json
import time

import pytest

from llamax.observe import goodput
from llamax.observe.goodput import PHASES, Goodput, Ledger


@pytest.fixture
def clock(monkeypatch):
    """Time that a test moves: [seconds]."""
    now = [1000.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(goodput.time, "time", lambda: 7000.0 + now[0])
    return now


def spend(ledger, clock, **phases):
    for phase, seconds in phases.items():
        with ledger.during(phase):
            clock[0] += seconds


def test_phases_nest_and_sum_to_the_wall_time(clock):
    ledger = Ledger(began=7000.0 + clock[0] - 3)  # the process is three seconds old
    clock[0] += 2
    ledger.enter("step")
    with ledger.during("save"):
        clock[0] += 5
        with ledger.during("evaluate"):
            clock[0] += 7
        clock[0] += 1
    clock[0] += 4  # running
    expected = dict.fromkeys(PHASES, 0.0) | {"start": 5, "save": 6, "evaluate": 7, "step": 4}
    assert ledger.seconds() == expected and ledger.wall() == sum(expected.values())


def test_a_death_costs_the_steps_since_the_last_save_and_the_time_until_the_next_start(tmp_path, clock):
    path = tmp_path / "goodput.json"
    first = Ledger()
    book = Goodput(path, first, first=0)
    spend(first, clock, start=3, step=20)
    first.mark(10)
    spend(first, clock, save=1, step=8)
    book.reached = 14
    book.write(now=True)
    clock[0] += 50  # dead
    second = Ledger()
    book = Goodput(path, second, first=10)
    spend(second, clock, start=2, step=30)
    total = book.total()
    assert total == dict.fromkeys(PHASES, 0.0) | {"start": 5, "step": 50, "save": 1, "roll_back": 8, "idle": 50}
    assert sum(book.shares().values()) == pytest.approx(1) and book.shares()["goodput/step"] == 50 / 114
    second.mark(20)
    book.reached = 20
    book.write(now=True)
    clock[0] += 6
    third = Ledger()  # no checkpoint was good: all steps so far are lost, and no second is forgotten
    book = Goodput(path, third, first=0)
    assert book.total() == total | {"step": 0, "roll_back": 58, "idle": 56}


def test_going_back_beyond_an_earlier_start_loses_all_of_its_steps(tmp_path, clock):
    path = tmp_path / "goodput.json"
    for began_at, seconds in ((0, 10), (8, 20)):
        ledger = Ledger()
        book = Goodput(path, ledger, first=began_at)
        spend(ledger, clock, step=seconds / 2)
        ledger.mark(began_at + 4)
        spend(ledger, clock, step=seconds / 2)
        book.reached = began_at + 8
        book.write(now=True)
    book = Goodput(path, Ledger(), first=4)  # which the first start had saved
    total = book.total()
    assert total["step"] == 5 and total["roll_back"] == 25 and sum(total.values()) == 30


def test_a_roll_back_loses_the_steps_since_its_checkpoint(clock):
    ledger = Ledger()
    ledger.mark(0)
    spend(ledger, clock, step=10)
    ledger.mark(5)
    spend(ledger, clock, step=3)
    with ledger.during("roll_back"):
        clock[0] += 2
        ledger.lose_steps_after(5)
    seconds = ledger.seconds()
    assert seconds["step"] == 10 and seconds["roll_back"] == 5 and sum(seconds.values()) == ledger.wall()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"starts": [{"seconds": {}}]}'])
def test_a_broken_file_stops_nothing(tmp_path, text):
    path = tmp_path / "goodput.json"
    path.write_text(text)
    Goodput(path, Ledger(), first=5)
    assert len(json.loads(path.read_text())["starts"]) == 1


def test_what_is_written_is_what_was_spent(tmp_path):
    """Real time; tests/test_run.py compares a whole run's sum with its wall time."""
    ledger = Ledger()
    book = Goodput(tmp_path / "goodput.json", ledger, first=0)
    for phase in PHASES[1:]:
        with ledger.during(phase):
            time.sleep(0.02)
    book.write(now=True)
    stored = json.loads((tmp_path / "goodput.json").read_text())
    assert all(stored["seconds"][phase] >= 0.02 for phase in PHASES[1:])
    assert sum(stored["seconds"].values()) <= ledger.wall() + 1e-3
