"""What holds for every test: a CPU that looks like eight devices, a compile cache on disk, two workers that share the
cores. The environment has to be set before jax is imported, so this file comes first and imports no llamax."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tests.xla_flags import quick_flags

ROOT = Path(__file__).resolve().parent.parent
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = str(max(1, CORES // WORKERS))

assert "jax" not in sys.modules, "jax was imported before tests/conftest.py could set the number of devices"

os.environ["JAX_PLATFORMS"] = os.environ.get("LLAMAX_TEST_PLATFORM", "cpu")  # see CONTRIBUTING.md
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick_flags()}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the cache's remarks about the machine's features
for variable in ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):  # NPROC is XLA's
    os.environ.setdefault(variable, THREADS)

import pytest  # noqa: E402
from absl import flags  # noqa: E402

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, and pytest never parses them


@pytest.fixture(autouse=True)
def quiet_again():
    """Logging is global, and pytest listens to a logger that is cut off from the root a second time: what a run's
    `log.setup` changes ends with its test."""
    yield
    logger = logging.getLogger("llamax")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def golden():
    """`golden("llama4/scout_like")` is the path of a committed reference; a missing one is a broken checkout."""

    def path(name: str) -> Path:
        found = ROOT / "tests" / "golden" / name
        assert found.exists(), f"tests/golden/{name} does not exist"
        return found

    return path
