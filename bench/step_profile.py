"""Where the time of L4-tiny's training step goes on the CPU: milliseconds by the source that asked for them.

    python bench/step_profile.py [--steps 8]

Random weights and tokens, otherwise the program of bench/l4_tiny.py. Events of jax's profiler are matched by name with
the compiled program's instructions, which carry the line of llamax that they come from; fused ones carry that of their
last operation. An event's time is its own, without what runs inside it, on the thread that ran it: a matmul that uses
both cores counts once, two small operations side by side count both. On a busy machine read the shares.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from memory import compiled, l4_tiny

from llamax.batch import Batch
from llamax.optim.build import optimizer
from llamax.train.state import init

PARTS = {  # the innermost file of llamax that an instruction comes from
    "kernels/grouped.py": "routed experts",
    "kernels/cross_entropy.py": "cross-entropy",
    "kernels/attention.py": "attention kernel",
    "model/attention.py": "q, k, v, o projections",
    "model/rope.py": "rotation",
    "model/moe.py": "router",
    "train/step.py": "update",
}


def sources(hlo: str) -> dict[str, tuple[str, bool]]:
    """Instruction -> (the part it belongs to, whether it is a matmul)."""

    def table(name: str) -> dict[int, str]:
        lines = re.search(rf"^{name}\n(.*?)\n\n", hlo, re.S | re.M).group(1).splitlines()
        return {int(number): rest for number, rest in (line.split(" ", 1) for line in lines)}

    def numbers(name: str) -> dict[int, dict[str, int]]:
        return {n: {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", row)} for n, row in table(name).items()}

    files, functions = table("FileNames"), table("FunctionNames")
    locations, frames = numbers("FileLocations"), numbers("StackFrames")

    def part(frame: int) -> str:
        inner: list[str] = []
        while frame and frame in frames:
            at = locations[frames[frame]["file_location_id"]]
            path, function = files[at["file_name_id"]].strip('"'), functions[at["function_name_id"]]
            inner.append(f"{path} {function}")
            parent = frames[frame].get("parent_frame_id", 0)
            frame = 0 if parent == frame else parent
        path, *function = next((f.split("/llamax/")[1] for f in inner if "/llamax/" in f), "- -").split(" ")
        if path == "model/layers.py":
            around = " ".join(inner)
            for name, of in (("SwiGLU", "dense and shared feed-forwards"), ("heads", "q, k, v, o projections")):
                if name in around:
                    return of
            return "norms" if "rms" in around or "RMSNorm" in around else "the rest"
        return PARTS.get(path, "update" if path == "-" else "the rest")

    found = {}
    for line in hlo.splitlines():
        if match := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line):
            frame = re.search(r"stack_frame_id=(\d+)", line)
            name = match.group(1)
            matmul = name.startswith(("dot", "ynn_fusion")) or "dot_general" in line
            found[name] = (part(int(frame.group(1)) if frame else 0), matmul)
    return found


def own_times(folder: Path) -> dict[str, float]:
    """Event name -> milliseconds on its thread, without the events inside it."""
    times: dict[str, float] = collections.Counter()
    trace = jax.profiler.ProfileData.from_file(str(next(folder.rglob("*.xplane.pb"))))
    for line in (line for plane in trace.planes for line in plane.lines):
        inside: list[tuple[float, str]] = []
        for event in sorted(line.events, key=lambda e: (e.start_ns, -e.duration_ns)):
            while inside and inside[-1][0] <= event.start_ns:
                inside.pop()
            if inside:
                times[inside[-1][1]] -= event.duration_ns / 1e6
            times[event.name] += event.duration_ns / 1e6
            inside.append((event.start_ns + event.duration_ns, event.name))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    run = l4_tiny()
    program, _, bones = compiled(run)
    state = jax.jit(lambda: init(bones, optimizer(run.optim, run.train.steps, bones.kinds), 0, 64))()
    tokens = np.random.default_rng(0).integers(0, run.model.vocab_size, (8, 257), dtype=np.int32)
    one, tiles = np.ones((8, 256), np.int32), np.zeros((8, 0, 0, 0, 3), np.uint8)
    positions = np.broadcast_to(np.arange(256, dtype=np.int32), (8, 256))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], one.astype(np.float32), one, positions, one - 1, tiles)
    batch = jax.tree.map(jax.device_put, batch)
    for _ in range(3):
        state, _ = program(state, batch)
    jax.block_until_ready(state)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(options.steps):
                state, _ = program(state, batch)
                jax.block_until_ready(state)
        times = own_times(Path(folder))
    known = sources(program.as_text())
    parts: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for name, ms in times.items():
        if name in known:
            part, matmul = known[name]
            parts[part][0 if matmul else 1] += ms / options.steps
    total = sum(map(sum, parts.values()))
    print("| part | matmuls, ms | the rest, ms | share |\n|---|---|---|---|")
    for part, (matmul, rest) in sorted(parts.items(), key=lambda row: -sum(row[1])):
        print(f"| {part} | {matmul:.0f} | {rest:.0f} | {(matmul + rest) / total:.1%} |")
    matmul, rest = (sum(row[i] for row in parts.values()) for i in (0, 1))
    print(f"| all | {matmul:.0f} | {rest:.0f} | 100% |")


if __name__ == "__main__":
    main()
