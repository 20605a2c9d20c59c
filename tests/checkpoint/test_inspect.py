"""`llamax inspect`: what it lists, what it says of each, its exit code, and that it starts without jax."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llamax import cli
from llamax.checkpoint import inspect
from tests.checkpoint.test_sums import flip, one_file, written  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def workdir(written, tmp_path):  # noqa: F811
    """A workdir with the steps 1 and 2, one that was set aside and one that is being written."""
    folder = Path(shutil.copytree(written[0], tmp_path / "checkpoints"))
    shutil.copytree(folder / "2", folder / "3.damaged")
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"config": {"name": "scout_pretrain"}}))
    return tmp_path


def lines(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_rows(workdir):
    rows = {row.name: row for row in inspect.look(workdir / "checkpoints")}
    assert list(rows) == ["1", "2", "3.damaged", "4.orbax-checkpoint-tmp"]
    assert [row.health for row in rows.values()] == ["sound", "sound", "set aside (damaged)", "unfinished"]
    two = workdir / "checkpoints/2"
    assert rows["2"].bytes == sum(p.stat().st_size for p in two.rglob("*") if p.is_file())
    assert rows["2"].items.keys() == {"params", "opt", "router_bias", "rng", "data", "extra"}
    assert rows["2"].items["opt"] == sum(p.stat().st_size for p in (two / "opt").rglob("*") if p.is_file())
    ago = two.stat().st_mtime - rows["2"].written.timestamp()
    assert abs(ago) < 60, "as Orbax noted it"


def test_a_sound_newest_one_is_0(workdir, capsys):
    for folder in (workdir, workdir / "checkpoints"):
        assert cli.main(["inspect", str(folder)]) == 0
        said = lines(capsys)
        assert "a run of scout_pretrain" in said and "The newest sound checkpoint is step 2." in said
        assert "params" in said and "unfinished" in said and "set aside (damaged)" in said


def test_a_damaged_newest_one_is_1_and_named(workdir, capsys):
    path = one_file(workdir / "checkpoints/2", "opt")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:4])
    assert cli.main(["inspect", str(workdir)]) == 1
    said = lines(capsys)
    name = path.relative_to(workdir / "checkpoints/2").as_posix()
    assert (
        f"Step 2 is damaged: {name} truncated {size} -> 4 bytes." in said
        and "The newest sound checkpoint is step 1." in said
    )
    (workdir / "checkpoints/1/checksums.json").unlink()
    assert cli.main(["inspect", str(workdir)]) == 1
    said = lines(capsys)
    assert "no checksums" in said and "No checkpoint is sound." in said


def test_only_what_is_set_aside_is_1(workdir, capsys):
    for step in ("1", "2"):
        shutil.rmtree(workdir / "checkpoints" / step)
    assert cli.main(["inspect", str(workdir)]) == 1


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_nothing_there_is_an_error(name, tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / name)]) == 2
    assert "but there are none. Give the --workdir of a run that has saved." in capsys.readouterr().err


def test_the_bar_reaches_its_end(workdir, monkeypatch):
    """It counts bytes: what is added up is what there is to read."""
    seen = []

    class Live(inspect.Live):
        def advance(self, task_id, advance=1):
            seen.append(advance)
            super().advance(task_id, advance)

        def add_task(self, *args, total, **kwargs):
            seen.append(-total)
            return super().add_task(*args, total=total, **kwargs)

    monkeypatch.setattr(inspect, "Live", Live)
    inspect.look(workdir / "checkpoints")
    assert len(seen) > 20 and sum(seen) == 0


def test_it_starts_without_jax(workdir):
    """jax alone takes half a second."""
    script = (
        f"import sys; from llamax.cli import main; code = main(['inspect', {str(workdir)!r}]); "
        "sys.exit(code or (9 if {'jax', 'orbax', 'numpy'} & set(sys.modules) else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr
