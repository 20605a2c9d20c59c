"""A process that compiles is ended once its program and its report of memory are written; what it says is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from llamax.config import ConfigError
from llamax.plan import ahead
from llamax.plan.topology import parse
from tests.runs import tiny_run

WHERE = parse("v5e:2x2")
WRITES = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
(Path({home!r}) / "pid").write_text(str(os.getpid()))
(folder / "module_0.jit_step.x.before_optimizations.txt").write_text("not this one")
(folder / "module_0.jit_step.x.after_optimizations.txt").write_text("HloModule")
with (folder / "module_0.jit_step.x.after_optimizations-memory-usage-report.txt").open("w") as report:
    report.write("Memory Space: default (color=0)\\nTotal bytes: 12"), report.flush(), time.sleep({slow})
    report.write("345 (12KiB)\\nMemory Space: other (color=1)\\nTotal bytes: 7 (7B)\\n"), report.flush()
time.sleep({then})
"""


def child(monkeypatch, tmp_path, text: str) -> None:
    script = tmp_path / "child.py"
    script.write_text(text)
    monkeypatch.setattr(ahead, "CHILD", (sys.executable, str(script)))


PLAN = """
import sys
from llamax import cli, plan
from llamax.plan import ahead
from llamax.plan.topology import parse
ahead.CHILD = ({python!r}, {script!r})
plan.plan = lambda run, topology, estimate: ahead.program(run, parse(topology))
sys.exit(cli.main(["plan", "recipes/scout_pretrain.py:tiny", "--topology", "v5e:2x4"]))
"""


def test_a_plan_that_is_told_to_end_ends_its_compile(tmp_path):
    pid, script = tmp_path / "pid", tmp_path / "child.py"
    script.write_text(f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    text = PLAN.format(python=sys.executable, script=str(script))
    command = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()) and command.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        command.terminate()
        assert command.wait(30) == 128 + signal.SIGTERM
    finally:
        command.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize("then", [60, 0], ids=["goes on to machine code", "is done"])
def test_it_is_ended_once_both_are_written_whole(monkeypatch, tmp_path, then):
    monkeypatch.setattr(ahead, "POLL_S", 0.4)
    child(monkeypatch, tmp_path, WRITES.format(home=str(tmp_path), slow=0.2, then=then))
    start = time.monotonic()
    assert ahead.program(tiny_run(), WHERE) == ahead.Program("HloModule", 12345)
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import sys; print('hm'); sys.exit('no such flag')", "exit code 1: no such flag"),
        (
            "import sys, pathlib; (pathlib.Path(sys.argv[1]) / 'refused.txt').write_text('UNIMPLEMENTED: that')",
            "UNIMPL",
        ),
    ],
)
def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path, text, says):
    child(monkeypatch, tmp_path, text)
    with pytest.raises(ahead.Refused, match=says):
        ahead.program(tiny_run(), WHERE)
    with pytest.raises(ConfigError, match=says):
        ahead.compile_step(tiny_run(), WHERE)


@pytest.mark.parametrize(
    "words",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory. Used 48.5G of 15.75G hbm.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (48.5G) exceeds "
        "available HBM (15.75G).",
    ],
)
def test_too_much_memory_is_told_in_bytes(monkeypatch, tmp_path, words):
    child(
        monkeypatch, tmp_path, f"import sys, pathlib; (pathlib.Path(sys.argv[1]) / 'refused.txt').write_text({words!r})"
    )
    assert ahead.compile_step(tiny_run(), WHERE) == ahead.Compiled(int(48.5 * 2**30), False, None)
