"""`llamax convert`: what it says, its exit codes, and what a signal leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from llamax import cli
from tests import hf_folders

ROOT = Path(__file__).resolve().parent.parent


def test_there_and_back(tmp_path, capsys):
    source = hf_folders.golden(tmp_path / "source", "llama32_tied")
    assert cli.main(["convert", "from-hf", str(source), "--out", str(tmp_path / "ckpt")]) == 0
    assert cli.main(["inspect", str(tmp_path / "ckpt")]) == 0
    words = [
        "convert",
        "to-hf",
        str(tmp_path / "ckpt"),
        "--out",
        str(tmp_path / "deep" / "back"),
        "--dtype",
        "bfloat16",
    ]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert f"Converted to {tmp_path / 'ckpt'}." in out and f"Exported to {tmp_path / 'deep' / 'back'}." in out
    assert "converting source: 411.4kB" in out and "exporting ckpt: 205.7kB" in out
    assert (tmp_path / "deep" / "back" / "model.safetensors").is_file()


def test_a_wrong_folder_is_one_line(tmp_path, capsys):
    assert cli.main(["convert", "from-hf", str(tmp_path), "--out", str(tmp_path / "ckpt")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.json, but there is no such file" in error


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(tmp_path, number):
    like = hf_folders.ODD_DENSE | {"hidden_size": 1536, "intermediate_size": 8192, "num_hidden_layers": 12}
    source = hf_folders.write(tmp_path / "source", like, hf_folders.random(like))
    words = [sys.executable, "-m", "llamax.cli", "convert", "from-hf", str(source), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a test's process may ignore it, and hand that on
    how = dict(env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    with subprocess.Popen(words, **how) as run:
        while not list(tmp_path.glob(".out.*.tmp/checkpoints/0.*/params*")):
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(number)
        error = run.communicate(timeout=60)[1]
    assert run.returncode == 128 + number and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
