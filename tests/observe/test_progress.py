"""The live line, in its two forms."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llamax.observe import log, progress

VALUES = {
    "loss/next_token": 3.21456,
    "speed/tokens_per_s": 12_345.0,
    "speed/mfu": 0.314,
    "speed/data_wait": 0.004,
    "speed/step_s": 0.5,
}


def test_plain_lines_only_when_logged(capsys):
    """pytest's output is no terminal."""
    with progress.Progress(1200, start=100) as line:
        for step in range(101, 121):
            line.step(step)
            if step % 10 == 0:
                line.log(step, VALUES)
    lines = capsys.readouterr().out.splitlines()
    tail = "loss 3.2146  12.3k tokens/s  MFU 31.4%  data wait 0.4%"
    assert lines == [f"step  110/1200  {tail}  ETA 9:05", f"step  120/1200  {tail}  ETA 9:00"]


def test_a_terminal_gets_one_line_that_moves_at_every_step(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140, highlight=False)
    for module in (log, progress):
        monkeypatch.setattr(module, "CONSOLE", console)
    monkeypatch.setattr(progress, "is_terminal", lambda: True)
    with progress.Progress(100, start=10) as line:
        line.log(20, VALUES)
        line.step(23)
    shown = screen.getvalue()
    assert "compiling the first step" in shown
    assert "step  23/100  loss 3.2146" in shown and "ETA 0:38" in shown
    assert list(progress.track(iter("abc"), "reading", total=3)) == ["a", "b", "c"] and "reading" in screen.getvalue()


def test_what_a_run_is_about_is_what_its_line_tells():
    told = {"loss/next_token": 0.5, "preference/accuracy": 0.75, "preference/reward_accuracy": 0.875}
    assert progress.line(3, 20, told | {"loss/preference": 0.25}) == "step  3/20  loss 0.2500  preferred 75%"
    assert progress.line(3, 20, told | {"loss/reward": 0.125}) == "step  3/20  loss 0.1250  preferred 88%"


def test_what_is_missing_is_left_out():
    assert progress.line(3, 20, {"loss/next_token": float("nan")}) == "step  3/20  loss nan"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (65.4, "1:05"), (3725, "1:02:05"), (172_800 + 4 * 3600, "2d 4h"), (float("inf"), "?")],
)
def test_duration(seconds, shown):
    assert progress.duration(seconds) == shown


def test_quantity():
    assert [progress.quantity(x) for x in (0, 999, 12_345, 3.4e6, 8.8e9, 1.5e12)] == [
        "0",
        "999",
        "12.3k",
        "3.4M",
        "8.8G",
        "1.5T",
    ]


def test_track_yields_everything_and_says_so(capsys):
    assert list(progress.track([1, 2, 3], "packing")) == [1, 2, 3]
    assert capsys.readouterr().out == "packing: 3 in 0:00\n"
