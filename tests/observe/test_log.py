"""Quiet libraries, and a metrics file without doubled or garbled lines."""

from __future__ import annotations

import json
import logging

import pytest
from absl import logging as absl_logging

from llamax.observe import log


@pytest.fixture
def restored():
    """Logging is global: what `setup` changes is put back."""
    names = ("", "llamax", *log.LOUD)
    loggers = [logging.getLogger(name) for name in names]
    before = [(x, x.level, x.propagate, x.handlers[:]) for x in loggers]
    verbosity = absl_logging.get_verbosity()
    yield
    absl_logging.set_verbosity(verbosity)
    for logger, level, propagate, handlers in before:
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


def test_llamax_speaks_and_libraries_only_warn(restored, capsys):
    logging.getLogger().setLevel(logging.INFO)  # as some libraries do
    log.setup()
    log.setup()
    logging.getLogger("llamax.train.loop").info("hello")
    assert capsys.readouterr().err.count("hello") == 1
    for name in ("orbax.checkpoint", "jax._src.dispatch", "absl"):
        assert not logging.getLogger(name).isEnabledFor(logging.INFO), name
        assert logging.getLogger(name).isEnabledFor(logging.WARNING), name


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_resume_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with log.MetricsFile(path) as file:
        for step in (10, 20, 30):
            file.write(step, {"loss": 1.0 * step, "bad": float("nan"), "worse": float("inf")})
            assert steps(path)[-1] == step, "on disk when write returns"
    path.write_text(path.read_text() + '{"step": 40, "los')  # killed while writing
    with log.MetricsFile(path, start_step=20) as file:
        assert steps(path) == [10, 20]
        file.write(30, {"loss": 3.0})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[0]["loss"] == 10 and rows[0]["bad"] is None and rows[0]["worse"] is None and rows[2]["loss"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"], "no temporary file is left"
    with log.MetricsFile(path, start_step=0):
        assert path.read_text() == "", "a run from step 0 begins anew"


class Full:
    """A file on a disk that takes some more bytes, and then none until there is room."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        n = min(self.room, len(data))
        self.room -= n
        return self.file.write(bytes(data[:n]))

    def close(self):
        self.file.close()


def test_a_full_disk_loses_no_line(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with log.MetricsFile(path) as file:
        file._file = Full(file._file, room=100)
        for step in range(1, 8):
            file.write(step, {"loss": 1.0})
        assert path.stat().st_size == 100 and caplog.text.count("the disk is full") == 1
        file._file.room = 10_000
        file.write(8, {"loss": 1.0})
        assert steps(path) == list(range(1, 9))
        file._file.room = 0
        file.write(9, {"loss": 1.0})
    assert steps(path) == list(range(1, 9)), "what never found room is lost; the run ends all the same"


def test_another_error_is_raised(tmp_path):
    file = log.MetricsFile(tmp_path / "metrics.jsonl")
    file._file.close()
    with pytest.raises(ValueError, match="closed file"):
        file.write(1, {})
