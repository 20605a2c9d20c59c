"""Milliseconds of the kernels, forward and backward: llamax's CPU functions beside their slow twins and jax's own.

    python bench/kernel_times.py [--rounds 10] [--only attention|experts|cross_entropy]

The programs of a row run in turn, round after round, and the least time of each counts, so that other work on the
machine moves a row's ratios less than its figures. "-" was not run: it would take too long or too much memory.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from llamax.kernels.attention import blocked_attention, slow_attention
from llamax.kernels.cross_entropy import cross_entropy, slow_cross_entropy
from llamax.kernels.grouped import Experts, ragged_experts, slow_experts, sorted_experts


def jax_attention(q, k, v, *, q_pos, k_pos, q_seg, k_seg, local_len=None):
    """jax.nn.dot_product_attention with the mask as an array, which is the only way to tell it of segments."""
    sees = (q_seg[:, :, None] == k_seg[:, None, :]) & (k_pos[:, None, :] <= q_pos[:, :, None])
    return jax.nn.dot_product_attention(q, k, v, mask=sees[:, None])


def packed(B: int, T: int, document: int | None, chunk: int | None):
    """Segment ids and positions of rows filled with documents of about that many tokens; None: one a row."""
    rng, seg, pos = np.random.default_rng(0), np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for b in range(B):
        at, number = 0, 1
        while at < T:
            end = min(T, at + (int(rng.exponential(document)) + 1 if document else T))
            seg[b, at:end], pos[b, at:end] = number, np.arange(end - at)
            at, number = end, number + 1
    return (seg * T + pos // chunk if chunk else seg), pos


def attention_rows():
    """(name, arguments of value_and_grad, {column: function})"""
    for B, T, H, K, Dh, document, chunk in (
        (8, 512, 8, 4, 64, None, None),
        (8, 512, 8, 4, 64, 150, None),
        (16, 256, 8, 4, 32, 100, None),
        (16, 256, 8, 4, 32, 100, 64),
        (1, 4096, 8, 8, 64, None, None),
        (1, 4096, 8, 8, 64, None, 512),
        (1, 16384, 8, 8, 64, None, 1024),
    ):
        seg, pos = packed(B, T, document, chunk)
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, do = (jax.random.normal(key, (B, T, h, Dh)) for key, h in zip(keys, (H, K, K, H), strict=True))

        def loss(attention, q, k, v, seg=seg, pos=pos, do=do, chunk=chunk):
            return (attention(q, k, v, q_pos=pos, k_pos=pos, q_seg=seg, k_seg=seg, local_len=chunk) * do).sum()

        name = f"attention B{B} T{T} H{H} K{K} Dh{Dh} documents {document or 'whole'} chunk {chunk or '-'}"
        others = {"slow": slow_attention, "jax": jax_attention} if T <= 1024 else {}
        yield name, loss, (q, k, v), others | {"fast": blocked_attention}


def experts_rows():
    for N, D, F, E, K, skew in (
        (4096, 256, 512, 16, 1, 0.0),
        (4096, 256, 512, 16, 1, 4.0),
        (2048, 128, 256, 8, 2, 0.0),
    ):
        keys = jax.random.split(jax.random.key(0), 7)
        shapes = (E, D, F), (E, D, F), (E, F, D)
        experts = Experts(*(jax.random.normal(k, s) * s[1] ** -0.5 for k, s in zip(keys[:3], shapes, strict=True)))
        x, dy = jax.random.normal(keys[3], (2, N, D))
        logits = jax.random.normal(keys[4], (N, E)) + skew * jnp.linspace(0, 1, E)
        gate, index = jax.nn.sigmoid(jax.random.normal(keys[5], (N, K))), jax.lax.top_k(logits, K)[1]

        def loss(run_experts, x, experts, gate, index=index, dy=dy):
            return (run_experts(x, experts, index, gate) * dy).sum()

        name = f"experts N{N} D{D} F{F} E{E} top-{K} largest share {np.bincount(index.ravel()).max() / index.size:.0%}"
        yield name, loss, (x, experts, gate), {"slow": slow_experts, "jax": ragged_experts, "fast": sorted_experts}


def cross_entropy_rows():
    for N, D, V in ((4096, 256, 4096), (2048, 128, 32_000)):
        keys = jax.random.split(jax.random.key(0), 3)
        hidden, head = jax.random.normal(keys[0], (N, D)), jax.random.normal(keys[1], (D, V)) * D**-0.5
        targets = jax.random.randint(keys[2], (N,), 0, V)

        def loss(f, hidden, head, targets=targets):
            nll, logz = f(hidden, head, targets)
            return nll.mean() + 1e-4 * (logz**2).mean()

        yield f"cross_entropy N{N} D{D} V{V}", loss, (hidden, head), {"slow": slow_cross_entropy, "fast": cross_entropy}


ROWS = {"attention": attention_rows, "experts": experts_rows, "cross_entropy": cross_entropy_rows}


def measure(loss, args, functions: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """(milliseconds, MiB of temporary memory) of every function."""
    programs = {}
    for column, f in functions.items():
        gradient = jax.value_and_grad(lambda *args, f=f: loss(f, *args), argnums=tuple(range(len(args))))
        programs[column] = jax.jit(gradient).lower(*args).compile()
        jax.block_until_ready(programs[column](*args))
    least = dict.fromkeys(programs, float("inf"))
    for _ in range(rounds):
        for column, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            least[column] = min(least[column], time.perf_counter() - start)
    return {c: (1e3 * least[c], p.memory_analysis().temp_size_in_bytes / 2**20) for c, p in programs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", choices=ROWS)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, float32, forward + backward, ms / MiB temporary")
    print(f"{'':76} {'slow twin':>12} {'jax':>12} {'fast':>12} {'slow/fast':>9} {'jax/fast':>9}")
    for kind in [options.only] if options.only else ROWS:
        for name, loss, args, functions in ROWS[kind]():
            result = measure(loss, args, functions, options.rounds)
            cells = [f"{ms:.1f} / {mib:.0f}" if ms else "-" for ms, mib in (result.get(c, (0, 0)) for c in COLUMNS)]
            ratio = [f"{result[c][0] / result['fast'][0]:.1f}" if c in result else "-" for c in COLUMNS[:2]]
            print(f"{name:76}", *(f"{c:>12}" for c in cells), *(f"{r:>9}" for r in ratio), flush=True)


COLUMNS = ("slow", "jax", "fast")

if __name__ == "__main__":
    main()
