"""Compiling as far as figures need: to the compiler's own program and its plan of the memory, not to machine code.

Machine code takes nearly all of the time (a trial with three matmuls and sorts for TPU: 67 of 68 s), and says nothing
that a plan tells. No compiler offers to stop before it, but all of XLA's write down, when asked, what they have
when they begin with it. So a process of its own compiles with that asked for, and is ended once it is written.

Run as a program, this module is that process: `python -m llamax.plan.ahead FOLDER`.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax

from llamax import config
from llamax.config import ConfigError
from llamax.plan import compiled, hlo
from llamax.plan.topology import Topology, parse, prepare

ASKED, REFUSED, SAID = "asked.pickle", "refused.txt", "said.txt"
PROGRAM, MEMORY = "*jit_step*after_optimizations.txt", "*jit_step*memory-usage-report.txt"
CHILD = (sys.executable, "-m", "llamax.plan.ahead")
POLL_S = 0.5

# How compilers say what a program needs that is too large: of its first estimate, or of the arrays as they were placed.
NEEDED = re.compile(r"(?:Used |memory required for HLO temporaries \()(?P<n>[\d.]+)(?P<unit>[KMGT])")

DUMP = {"xla_dump_hlo_as_text": True}
OPTIONS = {
    "tpu": {},
    # Without a card to try them on there are no tile sizes for Triton's matmuls, and for some shapes the compiler finds
    # none; as calls of cuBLAS they have the same operands.
    "gpu": {"xla_gpu_enable_triton_gemm": False},
}


class Program(NamedTuple):
    text: str  # HLO
    peak_bytes: int  # of one device: all that is allocated at once, arguments included


class Compiled(NamedTuple):
    peak_bytes: int  # of one device; what the compiler says it needs if that is too much
    fits: bool  # as far as the compiler knows
    cost: hlo.Cost | None  # None if it did not fit: then there is no program


class Refused(Exception):
    """The compiler's own words."""


def compile_step(run: config.Run, topology: Topology) -> Compiled:
    try:
        got = program(run, topology)
    except Refused as refused:
        needed = NEEDED.search(str(refused))
        if "RESOURCE_EXHAUSTED" not in str(refused) or not needed:
            true = f"its compiler fails: {str(refused).splitlines()[0][:300]}"
            raise ConfigError(f"--topology {topology.name}", true, "Use --estimate, which needs none.") from refused
        return Compiled(int(float(needed["n"]) * 1024 ** (1 + "KMGT".index(needed["unit"]))), False, None)
    return Compiled(got.peak_bytes, True, hlo.cost(got.text))


def program(run: config.Run, topology: Topology) -> Program:
    """The run's step for the topology.

    Raises:
        Refused: the compiler's error; among them, that it needs more memory than there is.
    """
    with tempfile.TemporaryDirectory(prefix="llamax-plan-") as name:
        folder = Path(name)
        (folder / ASKED).write_bytes(pickle.dumps((run, topology.name)))
        prepare()
        with (folder / SAID).open("w") as said:
            child = subprocess.Popen([*CHILD, name], stdout=said, stderr=subprocess.STDOUT, env=_environment())
        try:
            found = _wait(folder, child)
        finally:
            child.kill()
            child.wait()
        if (folder / REFUSED).exists():
            raise Refused((folder / REFUSED).read_text())
        if found is None:
            words = (folder / SAID).read_text(errors="replace").split("\n")
            last = next((line for line in reversed(words) if line.strip()), "")
            raise Refused(f"it ended with exit code {child.returncode}: {last}")
        return Program(*found)


def _environment() -> dict[str, str]:
    """Ours, and where llamax is, should it not be installed."""
    here = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _wait(folder: Path, child: subprocess.Popen) -> tuple[str, int] | None:
    """(text, peak bytes) once both are there and grow no more; None if the child ends without."""
    before = None
    while True:
        ended = child.poll() is not None
        files = [*folder.glob(PROGRAM), *folder.glob(MEMORY)]
        sizes = [file.stat().st_size for file in files]
        if len(files) == 2 and (ended or sizes == before):
            return files[0].read_text(), peak_bytes(files[1].read_text())
        if ended:
            return None
        before = sizes
        time.sleep(POLL_S)


def peak_bytes(report: str) -> int:
    """Of the device's own memory, the first that a memory usage report is about."""
    total = re.search(r"Total bytes(?: used)?: (\d+)", report)
    assert total, f"no total in the compiler's report of memory: {report[:200]}"
    return int(total[1])


def main(folder: Path) -> None:
    run, name = pickle.loads((folder / ASKED).read_bytes())
    prepare()
    topology = parse(name)
    try:
        lowered = compiled.lower(compiled.traced(run, topology.devices()), topology)
        lowered.compile(compiler_options={"xla_dump_to": str(folder), **DUMP, **OPTIONS[topology.platform]})
    except jax.errors.JaxRuntimeError as error:
        (folder / REFUSED).write_text(str(error))
    except ConfigError as error:
        (folder / REFUSED).write_text(error.true)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
