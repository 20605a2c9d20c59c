"""A run that stands still is noticed; one that goes on is left alone."""

from __future__ import annotations

import threading
import time

from llamax.observe.goodput import Ledger
from llamax.observe.watchdog import Watchdog


def test_a_stall_names_its_phase_and_dumps_stacks_and_progress_does_not(tmp_path):
    said, ledger = [], Ledger()
    with Watchdog(ledger, 0.3, tmp_path, said.append):
        for _ in range(8):  # progress: a new batch every now and then
            with ledger.during("data"):
                time.sleep(0.05)
        assert not said
        with ledger.during("data"):
            a_file_system_that_hangs(1.0)
    assert 1 <= len(said) <= 2, "at 0.3 s, and at 0.6 s again"
    assert "phase 'data'" in said[0] and "health.stall_s=0.3" in said[0]
    reports = sorted(tmp_path.iterdir())
    assert len(reports) == len(said) and f"{reports[0]}" in said[0]
    text = reports[0].read_text()
    assert "phase 'data'" in text and "a_file_system_that_hangs" in text and "watchdog" in text
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def a_file_system_that_hangs(seconds: float) -> None:
    time.sleep(seconds)


def test_a_folder_that_is_gone_does_not_end_the_watch(tmp_path):
    said = []
    with Watchdog(Ledger(), 0.1, tmp_path / "nowhere", said.append):
        time.sleep(0.4)
    assert said and "could not be written" in said[0]
