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
