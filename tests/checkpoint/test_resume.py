"""Whole runs over damaged checkpoints and a full disk."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest

from llamax.checkpoint import health, space
from llamax.config import ConfigError
from llamax.run import train
from tests.checkpoint.test_health import flip, one_file
from tests.runs import tiny_run


def run(workdir, steps: int = 20):
    return train(tiny_run(steps), workdir, devices=jax.devices()[:1])


def test_a_run_over_a_damaged_newest_checkpoint_ends_with_the_same_bits(tmp_path, capsys):
    """The damaged one is the last, so that the run looks finished until its files are compared with their sums."""
    folder = tmp_path / "checkpoints"
    whole = run(tmp_path)
    assert health.steps(folder) == [16, 18, 20]
    flip(one_file(folder / "20", "params"), 99)
    (tmp_path / "run.json.123.tmp").write_text("{")
    (tmp_path / "mine.tmp").write_text("a person's")
    again = run(tmp_path)
    said = capsys.readouterr().err
    assert "step 20 is damaged (params/" in said and "resumed from step 18" in said
    assert sorted(path.name for path in folder.iterdir()) == ["16", "18", "20", "20.damaged"]
    assert health.check(folder / "20") == [] and health.check(folder / "20.damaged") != []
    assert jax.tree.all(
        jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), again.state, whole.state)
    )
    assert {path.name for path in tmp_path.glob("*.tmp")} == {"mine.tmp"}

    for step in health.steps(folder):
        (folder / str(step) / "checksums.json").write_text("")
    with pytest.raises(ConfigError, match=r"all that are there are damaged \(16.damaged, 18.damaged, 20.damaged, 20.d"):
        run(tmp_path)
    with pytest.raises(ConfigError, match="move these away to start afresh"):
        run(tmp_path)


@pytest.mark.slow
def test_a_full_disk_ends_no_run_before_its_end(tmp_path, monkeypatch, capsys):
    """Steps 2 and 4 are saved, then there is no room; all steps are taken all the same, and then it is an error."""
    usage, free = shutil.disk_usage(tmp_path), space.free
    none = usage._replace(free=12_345)
    monkeypatch.setattr(space, "free", lambda at: none.free if health.steps(at)[-1:] == [4] else free(at))
    with pytest.raises(space.NotSaved, match=r"Saving step 20 .* needs 5.2MB, and 12.3kB are free; .* is step 4"):
        run(tmp_path)
    assert capsys.readouterr().err.count("but it needs") == 8
    assert (
        health.steps(tmp_path / "checkpoints") == [2, 4] and (tmp_path / "metrics.jsonl").read_text().count("\n") == 11
    )
