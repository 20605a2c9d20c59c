"""Cached decoding: beside transformers on the same weights; at long contexts; bytes of cache a token.

    python bench/decode.py [--rounds 3] [--tokens 128]

1. L4-tiny (bench/l4_tiny.py), greedy, prompts of 64 random tokens, 1 row and 8: new tokens a second of llamax
   (`sample/engine.py: generate`) and of transformers' `generate` with its cache, in turn, each in a process of its own;
   the tokens have to be the same. Needs torch and transformers >= 5; skipped where they are missing.
2. Milliseconds of a decode step with 8k and 64k tokens in the cache, of stacks with chunked layers only, full ones
   only, and Scout's three to one (width 256, 8 layers, chunks of 2,048, 1 row).
3. Bytes of cache a token at a million tokens, Scout beside the same model with full attention everywhere.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import in_turn
import numpy as np

PROMPT, ROWS = 64, (1, 8)
CONTEXTS = (8192, 65_536)


def prompts(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2048, (rows, PROMPT), dtype=np.int64)


# ------------------------------------------------------------------------------------------------- the two frameworks


def transformers_side(folder: Path, tokens: int) -> dict[str, Callable]:
    """Also writes the model into `folder`."""
    import torch
    from l4_tiny import their_settings
    from transformers import Llama4ForCausalLM

    torch.manual_seed(0)
    settings = their_settings()
    settings.use_cache = True
    model = Llama4ForCausalLM(settings).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0)  # with opinions: at the initialisation's size the likeliest token wins by 1e-3
    model.save_pretrained(folder / "hf")

    def run(rows: int) -> list:
        ids = torch.from_numpy(prompts(rows))
        how = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        return out[:, PROMPT:].tolist()

    return {f"rows{rows}": lambda rows=rows: run(rows) for rows in ROWS}


def llamax_side(folder: Path, tokens: int) -> dict[str, Callable]:
    from llamax.loading import load
    from llamax.sample.engine import Prompt, generate

    loaded = load(folder / "hf")
    none = np.zeros((0, 1, 1, 3), np.uint8)

    def run(rows: int) -> list:
        asked = [Prompt(row.tolist(), none) for row in prompts(rows)]
        weights = (loaded.skeleton, loaded.params, loaded.router_bias)
        return [c.tokens for (c,) in generate(*weights, asked, max_tokens=tokens, stop=())]

    return {f"rows{rows}": lambda rows=rows: run(rows) for rows in ROWS}


SIDES = {"transformers": transformers_side, "llamax": llamax_side}


def beside_transformers(rounds: int, tokens: int) -> None:
    if reason := in_turn.missing():
        return print(reason)
    with tempfile.TemporaryDirectory() as name:
        os.environ["DECODE_TOKENS"] = str(tokens)
        processes, first = {}, {}
        for side in SIDES:  # transformers first: it writes the weights
            processes[side] = in_turn.Process(__file__, side, Path(name))
            first[side] = {rows: processes[side].ask(f"rows{rows}")[0][2] for rows in ROWS}
        same = [a == b for rows in ROWS for a, b in zip(*(first[side][rows] for side in SIDES), strict=True)]
        print(f"greedy tokens are the same in {sum(same)} of {len(same)} rows")
        seconds: dict[tuple, list[float]] = {}
        for _ in range(rounds):
            for rows in ROWS:
                for side, process in processes.items():
                    seconds.setdefault((side, rows), []).append(process.ask(f"rows{rows}")[0][0])
        for process in processes.values():
            process.close()
    for rows in ROWS:
        rate = {side: rows * tokens / statistics.median(seconds[side, rows]) for side in SIDES}
        shown = ", ".join(f"{side} {value:,.0f} tokens/s" for side, value in rate.items())
        ratios = [a / b for a, b in zip(seconds["transformers", rows], seconds["llamax", rows], strict=True)]
        print(f"{rows} row{'s' * (rows > 1)}: {shown}; llamax {rate['llamax'] / rate['transformers']:.2f} x", end="")
        print(f" (rounds {', '.join(f'{r:.2f}' for r in ratios)})", flush=True)


# ------------------------------------------------------------------------------------------------------ long contexts


def at_long_contexts() -> None:
    import jax
    import jax.numpy as jnp

    from llamax import config
    from llamax.model import cache as caches
    from llamax.model.seam import make_seam
    from llamax.model.skeleton import skeleton
    from llamax.parallel.mesh import make_mesh
    from llamax.sample import engine

    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    for name, period in (
        ("chunked", ("rope_chunk+dense",) * 4),
        ("full", ("nope_full+dense",) * 4),
        ("three to one", ("rope_chunk+dense",) * 3 + ("nope_full+dense",)),
    ):
        sizes = dict(vocab_size=2048, dim=256, n_heads=8, n_kv_heads=2, head_dim=32, dense_ffn_dim=512)
        model = config.Model(plan=((period, 2),), chunk_len=2048, **sizes)
        bones = skeleton(model, make_seam(mesh), patch_id=-1, train=config.Train(remat="none"))
        params, bias = jax.jit(bones.init)(jax.random.key(0))
        how = engine.How(bones, (), False, False)
        times = []
        for context in CONTEXTS:
            cache = caches.empty(model, 1, context + 1024, jnp.float32)._replace(length=jnp.full(1, context, jnp.int32))
            state = engine.begin(jnp.zeros((1, 2048)), cache, 1024, 1)
            may, keys, chance = np.ones(2048, bool), engine.keys(0, [(0, 0)], 1), (np.float32(0), np.float32(1))

            def advance(state, until):
                state = engine.advance(how, params, bias, state, np.int32(until), chance, may, keys)  # noqa: B023
                return jax.block_until_ready(state)

            state = advance(state, 8)
            taken = []
            for until in range(24, 120, 16):
                start = time.perf_counter()
                state = advance(state, until)
                taken.append((time.perf_counter() - start) / 16)
            times.append(statistics.median(taken))
        shown = ", ".join(f"{c // 1024}k {1e3 * t:.2f} ms" for c, t in zip(CONTEXTS, times, strict=True))
        print(f"{name} layers: {shown} a step, {times[1] / times[0]:.2f} x", flush=True)


def bytes_of_cache() -> None:
    import dataclasses

    import jax
    import jax.numpy as jnp

    from llamax import variants
    from llamax.model import cache as caches

    room = 2**20
    scout = variants.scout()
    full = dataclasses.replace(scout, plan=((("rope_full+moe", "nope_full+moe"), 24),))
    sizes = []
    for model in (scout, full):
        cache = jax.eval_shape(lambda: caches.empty(model, 1, room, jnp.bfloat16))  # noqa: B023
        sizes.append(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers)))
    scout_bytes, full_bytes = (size / room for size in sizes)
    print(f"Scout at {room:,} tokens, bfloat16: {scout_bytes:,.0f} bytes of cache a token ({sizes[0] / 2**30:.1f} GiB)")
    print(f"with full attention in all layers {full_bytes:,.0f}: {scout_bytes / full_bytes:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a prompt")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return in_turn.serve(lambda: SIDES[options.serve](options.folder, int(os.environ["DECODE_TOKENS"])))
    beside_transformers(options.rounds, options.tokens)
    at_long_contexts()
    bytes_of_cache()


if __name__ == "__main__":
    main()
