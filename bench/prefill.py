"""Reading 64k tokens into a cache, piece by piece: tokens a second, and the most memory that the process ever held.

    python bench/prefill.py                      # Scout's tiny size, 65,536 tokens, one row
    python bench/prefill.py --tokens 16384 65536

Random tokens and weights: neither changes what is computed. Every length has a process of its own; the first pass
compiles and is not timed.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import numpy as np


def measure(tokens: int, rounds: int) -> None:
    import jax

    from llamax import config, variants
    from llamax.model.count import cache_bytes
    from llamax.model.seam import make_seam
    from llamax.model.skeleton import skeleton
    from llamax.parallel.mesh import make_mesh
    from llamax.sample import reading

    model = variants.scout_tiny()
    bones = skeleton(model, make_seam(make_mesh({"data": 1}, jax.devices()[:1])), patch_id=-1, train=config.Train())
    params, bias = jax.jit(bones.init)(jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, model.vocab_size, tokens)
    prompt = reading.Prompt(ids.tolist(), np.zeros((0, 1, 1, 3), np.uint8))
    room, seconds = reading.rounded(tokens), []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        jax.block_until_ready(reading.read(bones, params, bias, [prompt], room))
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    best = min(seconds[1:])
    print(f"{tokens:,} tokens in pieces of {reading.PIECE}: {best:.1f} s, {tokens / best:,.0f} tokens/s", end="")
    print(f" ({seconds[0]:.1f} s with compiling, {reading.extend._cache_size()} program); peak {peak:.2f} GiB", end="")
    print(f" resident, of it {cache_bytes(model, room, 4) / 2**20:.0f} MiB of cache", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65_536])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    if len(options.tokens) == 1:
        return measure(options.tokens[0], options.rounds)
    for tokens in options.tokens:
        command = [sys.executable, __file__, "--tokens", str(tokens), "--rounds", str(options.rounds)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
