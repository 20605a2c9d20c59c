"""Killed saves and full disks: what was saved before stays, what is left over goes, and a person is told how much."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from llamax.checkpoint import space, sums
from llamax.checkpoint.manager import Checkpoints
from llamax.run import train
from tests.checkpoint.test_manager import CFG, stream
from tests.checkpoint.test_sums import messages  # noqa: F401
from tests.runs import tiny_run

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
    import os, shutil, signal, sys
    from pathlib import Path
    import grain, jax, numpy as np
    from llamax import config
    from llamax.checkpoint import sums, space
    from llamax.checkpoint.manager import Checkpoints

    folder = Path(sys.argv[1])
    stream = lambda: iter(grain.MapDataset.range(9).to_iter_dataset())

    def trees(mib):  # noise: it must not be compressed
        n = mib * 2**18
        w = jax.device_put(np.random.default_rng(mib).integers(0, 2**32, n, dtype=np.uint32))
        return dict(params={"w": w}, router_bias={}, opt={}, rng={})
"""


def run_child(body: str, *arguments: Path, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    script = textwrap.dedent(CHILD) + textwrap.dedent(body)
    command = [*before, sys.executable, "-c", script, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)


def tiny(seed=0):
    w = jax.device_put(np.random.default_rng(seed).normal(size=1000).astype(np.float32))
    return dict(params={"w": w}, router_bias={}, opt={}, rng={})


def save(checkpoints: Checkpoints, step: int) -> bool:
    return checkpoints.save(step, **tiny(step), data_iterator=stream(), extra={})


def fill(monkeypatch, left: int) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=left))


def test_what_a_killed_save_leaves_is_cleared_at_the_next_start(tmp_path):
    """A process that is really killed while Orbax writes 128 MiB in the background."""
    folder = tmp_path / "checkpoints"
    child = run_child(
        """
        checkpoints = Checkpoints(folder, config.Checkpoint())
        checkpoints.save(1, **trees(1), data_iterator=stream(), extra={})
        checkpoints.wait()
        checkpoints.save(2, **trees(128), data_iterator=stream(), extra={})
        while not any(path.is_file() for path in folder.glob("2.*/params*/**/*")):
            pass
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        folder,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    left = sorted(path.name for path in folder.iterdir())
    assert len(left) == 2 and left[0] == "1" and sums.is_unfinished(folder / left[1])
    with Checkpoints(folder, CFG) as checkpoints:
        assert [path.name for path in folder.iterdir()] == ["1"], "at once, not when the next save comes"
        assert checkpoints.latest() == 1 and sums.check(folder / "1") == []
        assert save(checkpoints, 2)
    assert sums.steps(folder) == [1, 2]


def test_killed_between_the_sums_and_the_name(tmp_path):
    (tmp_path / "3.orbax-checkpoint-tmp-whole").mkdir()
    with Checkpoints(tmp_path) as reader:
        assert reader.latest() is None
    with Checkpoints(tmp_path, CFG) as checkpoints:
        assert checkpoints.latest() is None and not list(tmp_path.iterdir())


def test_too_little_space_starts_no_save_and_says_how_much_it_takes(tmp_path, monkeypatch, messages):  # noqa: F811
    with Checkpoints(tmp_path, CFG) as checkpoints:
        assert save(checkpoints, 1)
        with monkeypatch.context() as patch:
            fill(patch, left=500_000)
            assert not save(checkpoints, 2), "and the run goes on"
        assert "Saving step 2 in" in messages.text
        assert "it needs 1.1MB, and 500.0kB are free; the last good checkpoint is step 1" in messages.text
        assert save(checkpoints, 3), "there is room again"
    assert sums.steps(tmp_path) == [1, 3], "and what failed in between ends nothing"


def test_if_the_newest_save_had_no_space_the_end_is_an_error(tmp_path, monkeypatch):
    fill(monkeypatch, left=0)
    with (
        pytest.raises(space.NotSaved, match="none was saved before. Free some space"),
        Checkpoints(tmp_path, CFG) as it,
    ):
        save(it, 1)
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, CFG) as it:  # what ended the run is not hidden
        save(it, 1)
        raise ZeroDivisionError


def test_needed_counts_every_array():
    leaves = [np.zeros((10, 100), np.float32), jax.ShapeDtypeStruct((5,), "bfloat16"), np.uint8(1)]
    assert space.needed(leaves) - space.MARGIN_BYTES == pytest.approx(4011 * 1.01, abs=1)


def test_free_looks_at_the_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert space.free(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_other_errors_of_a_background_save_are_raised(tmp_path, monkeypatch):
    def fail(folder, known):
        raise PermissionError(13, "not allowed")

    with Checkpoints(tmp_path, CFG) as checkpoints:
        monkeypatch.setattr(sums, "write", fail)
        save(checkpoints, 1)
        with pytest.raises(PermissionError, match="not allowed"):
            checkpoints.wait()


def test_a_full_disk_that_the_sums_meet(tmp_path, monkeypatch, messages):  # noqa: F811
    """Written, and then no room for checksums.json: the step does not come to be."""

    def fail(folder, known):
        raise OSError(28, "No space left on device")

    with pytest.raises(space.NotSaved), Checkpoints(tmp_path, CFG) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        monkeypatch.setattr(sums, "write", fail)
        save(checkpoints, 2)
        assert checkpoints.steps() == [1] and "the disk was full before all was written" in messages.text
        assert [path.name for path in tmp_path.iterdir()] == ["1"]


def may_mount() -> bool:
    """Whether this machine lets us mount a small file system of our own."""
    if not (shutil.which("unshare") and shutil.which("mount")):
        return False
    return (
        subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not may_mount(), reason="this machine allows no mount in a user namespace")
def test_a_disk_that_is_really_full(tmp_path):
    """On 10 MiB: three saves of 4 MiB, told beforehand that there is room. The third fails in Orbax's threads."""
    before = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=10m none "$4" && exec "$@"', "sh")
    child = run_child(
        """
        space.free = lambda folder: 2**40
        told = []
        try:
            with Checkpoints(folder / "checkpoints", config.Checkpoint(keep=2)) as checkpoints:
                for step in (1, 2, 3):
                    checkpoints.save(step, **trees(4), data_iterator=stream(), extra={})
                    checkpoints.wait()
                assert checkpoints.steps() == [1, 2], "the oldest is not given up for one that failed"
                assert {path.name for path in (folder / "checkpoints").iterdir()} == {"1", "2"}
                assert not sums.check(folder / "checkpoints/2")
                checkpoints.save(4, **trees(1), data_iterator=stream(), extra={})
                checkpoints.wait()
                assert checkpoints.steps() == [2, 4], "room for a small one, and the oldest goes"
                checkpoints.save(5, **trees(8), data_iterator=stream(), extra={})
        except space.NotSaved as error:
            print(error)
        """,
        tmp_path,
        before=before,
    )
    assert child.returncode == 0, child.stderr
    assert (
        "Saving step 5" in child.stdout and "the disk was full before all was written: it needs 9.5MB" in child.stdout
    )
    assert "the last good checkpoint is step 4" in child.stdout
    assert "Traceback" not in child.stderr, "one message is enough"


def test_a_write_that_ends_after_its_save_was_given_up_is_not_told(monkeypatch):
    """TensorStore's threads print such an error (`sys.excepthook`) or report it as one that nobody can catch."""
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: told.append(error))
    monkeypatch.setattr(sys, "unraisablehook", lambda what: told.append(what.exc_value))
    space.quiet()
    others = [RuntimeError("another"), OSError("Event loop is closed"), None]
    for error in (RuntimeError("Event loop is closed"), *others):
        sys.excepthook(type(error), error, None)
        sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    assert told == [error for error in others for _ in range(2)]


@pytest.mark.slow
def test_a_full_disk_ends_no_run_before_its_end(tmp_path, monkeypatch, capsys):
    """Steps 2 and 4 are saved, then there is no room; all steps are taken all the same, and then it is an error."""
    usage, free = shutil.disk_usage(tmp_path), space.free
    none = usage._replace(free=12_345)
    monkeypatch.setattr(space, "free", lambda at: none.free if sums.steps(at)[-1:] == [4] else free(at))
    with pytest.raises(space.NotSaved, match=r"Saving step 20 .* needs 5.\dMB, and 12.3kB are free; .* is step 4"):
        train(tiny_run(20), tmp_path, devices=jax.devices()[:1])
    assert capsys.readouterr().err.count("but it needs") == 8
    assert sums.steps(tmp_path / "checkpoints") == [2, 4] and (tmp_path / "metrics.jsonl").read_text().count("\n") == 11
