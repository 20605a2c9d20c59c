"""The experts of a mixture, run on the tokens that were routed to them; dropless for every routing.

    y_n = sum_k SwiGLU_e(gate[n, k] x_n) with e = index[n, k]; or, with gate_on="output", sum_k gate[n, k] SwiGLU_e(x_n)
    SwiGLU_e(z) = (silu(z @ gate_e) * (z @ up_e)) @ down_e

The router's gate scales an expert's input (Llama 4) or its output (everyone else); SwiGLU is not linear, so these are
two models. All functions have one signature. The fast ones sort the N * K rows by expert (a stable argsort), run every
expert on a contiguous stretch, and sort back; both sorts are permutations, whose gradients are gathers too, so no sum
depends on the order of a scatter.

Letters: N tokens, K experts a token, E experts, D model width, F hidden width, M = N * K rows, m rows a block.
The fast functions multiply in the dtype of x and add up in float32, the gradients of the weights too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from llamax.kernels.varying import full_like, vary_alike

BLOCK = 128  # rows of an expert that go through its matmuls at once on CPU
LANES = 128  # what widths on TPU are multiples of
TILES = (1024, 512, 256, 128)  # of the weights' gradient on TPU
FEW = 16  # rows, tokens times experts a token, up to which one at a time is faster


class Experts(NamedTuple):
    """The weights of E feed-forwards."""

    gate_EDF: Float[Array, "E D F"]
    up_EDF: Float[Array, "E D F"]
    down_EFD: Float[Array, "E F D"]


# ------------------------------------------------------------------------------------------------------ the slow twin


def slow_experts(
    x_ND: Float[Array, "N D"],
    experts: Experts,
    index_NK: Int[Array, "N K"],
    gate_NK: Float[Array, "N K"],
    *,
    gate_on: str = "input",
) -> Float[Array, "N D"]:
    """Every expert on every token, and then the chosen ones: the definition, E / K times the work.

    x_ND [N, D]; index_NK int32 [N, K] in [0, E); gate_NK [N, K]; gate_on "input" or "output". Returns y_ND in x's
    dtype.
    """
    x_f32, gate_f32, (gate_EDF, up_EDF, down_EFD) = jax.tree.map(
        lambda a: a.astype(jnp.float32), (x_ND, gate_NK, tuple(experts))
    )
    one_NK = jnp.ones_like(gate_f32)
    before_NK, after_NK = (gate_f32, one_NK) if gate_on == "input" else (one_NK, gate_f32)
    z_NKD = before_NK[..., None] * x_f32[:, None]
    g_NKEF = jnp.einsum("nkd,edf->nkef", z_NKD, gate_EDF)
    u_NKEF = jnp.einsum("nkd,edf->nkef", z_NKD, up_EDF)
    y_NKED = jnp.einsum("nkef,efd->nked", jax.nn.silu(g_NKEF) * u_NKEF, down_EFD)
    chosen_NKE = jax.nn.one_hot(index_NK, gate_EDF.shape[0]) * after_NK[..., None]
    return jnp.einsum("nked,nke->nd", y_NKED, chosen_NKE).astype(x_ND.dtype)


# ------------------------------------------------------------------------------------------ sort, run, and sort back


def sorted_experts(
    x_ND: Float[Array, "N D"],
    experts: Experts,
    index_NK: Int[Array, "N K"],
    gate_NK: Float[Array, "N K"],
    *,
    gate_on: str = "input",
) -> Float[Array, "N D"]:
    """`slow_experts` for CPU: one expert after another, m of its rows at a time, as many blocks as the routing needs.

    The work is that of the M rows plus at most m - 1 rows an expert, whatever the routing. On several devices, call it
    inside `jax.shard_map` over the tokens: the sort is over the tokens that it is given.
    """
    return _sort_and_run(_run_blocks, x_ND, experts, index_NK, gate_NK, gate_on)


def ragged_experts(
    x_ND: Float[Array, "N D"],
    experts: Experts,
    index_NK: Int[Array, "N K"],
    gate_NK: Float[Array, "N K"],
    *,
    gate_on: str = "input",
) -> Float[Array, "N D"]:
    """`slow_experts` on `jax.lax.ragged_dot`, for a GPU without tokamax.

    Correct everywhere, but on CPU and GPU XLA computes every expert for every row, on TPU for the gradient of the
    weights (jax 0.10 and 0.11, by default).
    """
    return _sort_and_run(partial(_run_ragged, jax.lax.ragged_dot), x_ND, experts, index_NK, gate_NK, gate_on)


def tpu_experts(
    x_ND: Float[Array, "N D"],
    experts: Experts,
    index_NK: Int[Array, "N K"],
    gate_NK: Float[Array, "N K"],
    *,
    gate_on: str = "input",
    interpret: bool = False,
) -> Float[Array, "N D"]:
    """`slow_experts` for TPU, on `jax.lax.ragged_dot`, which is a grouped kernel there, and for the gradient of the
    weights on jax's Pallas kernel `tgmm` (MegaBlocks, Gale et al. 2022, arXiv:2211.15841).

    That kernel needs D and F divisible by 128; other widths have the gradient of `ragged_experts`.
    """
    _, D, F = experts.gate_EDF.shape
    dot = partial(_megablox_dot, interpret) if fits_tpu(D, F) else jax.lax.ragged_dot
    return _sort_and_run(partial(_run_ragged, dot), x_ND, experts, index_NK, gate_NK, gate_on)


def tokamax_experts(
    x_ND: Float[Array, "N D"],
    experts: Experts,
    index_NK: Int[Array, "N K"],
    gate_NK: Float[Array, "N K"],
    *,
    gate_on: str = "input",
) -> Float[Array, "N D"]:
    """`slow_experts` for GPU, on tokamax's grouped matmul, which picks a kernel for the card (extra `cuda`)."""
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # else tokamax parses the command line, which is not its own
    return _sort_and_run(partial(_run_ragged, tokamax.ragged_dot), x_ND, experts, index_NK, gate_NK, gate_on)


def fits_tpu(D: int, F: int) -> bool:
    """Whether `tpu_experts` computes the gradient of weights of these widths from each expert's own rows only."""
    return D % LANES == 0 and F % LANES == 0


def few_experts(
    x_ND: Float[Array, "N D"],
    experts: Experts,
    index_NK: Int[Array, "N K"],
    gate_NK: Float[Array, "N K"],
    *,
    gate_on: str = "input",
) -> Float[Array, "N D"]:
    """`slow_experts` for a handful of tokens on CPU, as decoding has them: one row after another through its expert's
    weights, and no other weights are read."""
    (N, D), K = x_ND.shape, index_NK.shape[1]
    before_NK, after_NK = (gate_NK, None) if gate_on == "input" else (jnp.ones_like(gate_NK), gate_NK)

    def run(row):
        z_1D, e = row
        gate_DF, up_DF, down_FD = (w[e] for w in experts)
        h_1F = jax.nn.silu(_matmul("md,df->mf", z_1D, gate_DF)) * _matmul("md,df->mf", z_1D, up_DF)
        return _matmul("mf,fd->md", h_1F.astype(z_1D.dtype), down_FD)

    z_M1D = (before_NK[..., None] * x_ND[:, None]).astype(x_ND.dtype).reshape(N * K, 1, D)
    y_NKD = jax.lax.map(run, (z_M1D, index_NK.reshape(-1))).reshape(N, K, D)
    return (y_NKD if after_NK is None else after_NK[..., None] * y_NKD).sum(1).astype(x_ND.dtype)


def cpu_experts(x_ND, experts: Experts, index_NK, gate_NK, *, gate_on: str = "input") -> Float[Array, "N D"]:
    """The faster of `few_experts` and `sorted_experts`, by the number of rows."""
    run = few_experts if index_NK.size <= FEW else sorted_experts
    return run(x_ND, experts, index_NK, gate_NK, gate_on=gate_on)


def _sort_and_run(run: Callable, x_ND, experts: Experts, index_NK, gate_NK, gate_on: str):
    (N, D), K, E = x_ND.shape, index_NK.shape[1], experts.gate_EDF.shape[0]
    x_ND, experts, index_NK, gate_NK = vary_alike(x_ND, experts, index_NK, gate_NK)
    z_NKD = gate_NK[..., None] * x_ND[:, None] if gate_on == "input" else jnp.broadcast_to(x_ND[:, None], (N, K, D))
    z_MD = z_NKD.astype(x_ND.dtype).reshape(N * K, D)
    index_M = index_NK.reshape(-1)
    order_M = jnp.argsort(index_M, stable=True)
    inverse_M = jnp.zeros_like(order_M).at[order_M].set(jnp.arange(N * K, dtype=order_M.dtype), unique_indices=True)
    count_E = (index_M[:, None] == jnp.arange(E)).sum(0, dtype=jnp.int32)
    y_MD = run(_permute(z_MD, order_M, inverse_M), Experts(*experts), count_E)
    y_NKD = _permute(y_MD, inverse_M, order_M).reshape(N, K, D)
    return (y_NKD if gate_on == "input" else gate_NK[..., None] * y_NKD).sum(1).astype(x_ND.dtype)


@jax.custom_vjp
def _permute(x_MD, order_M, inverse_M):
    """x[order]; its gradient is dy[inverse], a gather, where autodiff would add up a scatter."""
    del inverse_M
    return x_MD[order_M]


_permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, dy: (dy[inverse], None, None))


def _run_ragged(ragged_dot: Callable, z_MD, experts: Experts, count_E):
    dot = partial(ragged_dot, group_sizes=count_E, preferred_element_type=jnp.float32)
    gate_EDF, up_EDF, down_EFD = (w.astype(z_MD.dtype) for w in experts)
    # Rows of no expert come last. Kernels may leave their results, and so their gradients, as memory was.
    some_M1 = (jnp.arange(len(z_MD)) < count_E.sum())[:, None]
    z_MD = jnp.where(some_M1, z_MD, 0)
    h_MF = jax.nn.silu(dot(z_MD, gate_EDF)) * dot(z_MD, up_EDF)
    return jnp.where(some_M1, dot(h_MF.astype(z_MD.dtype), down_EFD), 0)


# ------------------------------------------------------------------------------ the gradient of the weights, for TPU


def _megablox_dot(interpret: bool, z_MD, w_EDF, group_sizes, preferred_element_type):
    """`jax.lax.ragged_dot`, whose gradient XLA for TPU would compute from every row for every expert."""
    return _grouped_dot(interpret, z_MD, w_EDF, group_sizes).astype(preferred_element_type)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_dot(interpret, z_MD, w_EDF, count_E):
    """float32 [M, F]: z[m] @ w[e] for the rows of expert e, which stand together; zeros for rows of no expert."""
    del interpret
    return jax.lax.ragged_dot(z_MD, w_EDF, count_E, preferred_element_type=jnp.float32)


def _grouped_forward(interpret, z_MD, w_EDF, count_E):
    return _grouped_dot(interpret, z_MD, w_EDF, count_E), (z_MD, w_EDF, count_E)


def _grouped_backward(interpret, saved, dy_MF):
    z_MD, w_EDF, count_E = saved
    dy_MF = dy_MF.astype(z_MD.dtype)
    dz_MD = jax.lax.ragged_dot(dy_MF, w_EDF.swapaxes(1, 2), count_E, preferred_element_type=jnp.float32)
    return dz_MD.astype(z_MD.dtype), _grouped_outer(z_MD, dy_MF, count_E, w_EDF.dtype, interpret), None


_grouped_dot.defvjp(_grouped_forward, _grouped_backward)


def _grouped_outer(z_MD, dy_MF, count_E, dtype, interpret: bool):
    """[E, D, F]: z^T dy over the rows of each expert, added up in float32."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    (M, D), F, E = z_MD.shape, dy_MF.shape[1], len(count_E)
    rows = min(512, -(-M // LANES) * LANES)
    tile = (rows, *(next(c for c in most if size % c == 0) for size, most in ((D, TILES[1:]), (F, TILES))))
    # Its groups are to cover whole tiles of rows: those of no expert are one group more, which is not computed.
    z_MD, dy_MF = (jnp.pad(x, ((0, -M % rows), (0, 0))) for x in (z_MD, dy_MF))
    rest = jnp.asarray(len(z_MD), jnp.int32) - count_E.sum(dtype=jnp.int32)
    groups = jnp.append(count_E, rest)
    return tgmm(z_MD.T, dy_MF, groups, dtype, tile, num_actual_groups=E, interpret=interpret)


# ----------------------------------------------------------------------------------------- blocks of rows, in plain JAX
#
# Rows are sorted by expert. Block t of expert e covers m rows from start[e] + t m on; the last one may reach into the
# rows of the next expert. What it writes there is wrong, and is written again by the expert that owns them, which comes
# later; what it would add to a weight's gradient there is masked. The arrays carry m more rows for the last expert.


@jax.custom_vjp
def _run_blocks(z_MD, experts: Experts, count_E):
    """z_MD [M, D] sorted by expert, count_E rows an expert -> y_MD float32."""
    return _blocks_forward(z_MD, experts, count_E)[0]


def _matmul(spec, a, b):
    return jnp.einsum(spec, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _pad(x_MD):
    return jnp.pad(x_MD, ((0, BLOCK), (0, 0)))


def _rows(x_MD, start):
    return jax.lax.dynamic_slice_in_dim(x_MD, start, BLOCK)


def _put(x_MD, block_mD, start):
    return jax.lax.dynamic_update_slice_in_dim(x_MD, block_mD.astype(x_MD.dtype), start, 0)


def _blocks_forward(z_MD, experts, count_E):
    (M, D), F = z_MD.shape, experts.gate_EDF.shape[2]
    z_pad = _pad(z_MD)

    def run_expert(carry, expert):
        (gate_DF, up_DF, down_FD), start, count = expert

        def run_block(t, carry):
            y, g, u = carry
            at = start + t * BLOCK
            z_mD = _rows(z_pad, at)
            g_mF, u_mF = _matmul("md,df->mf", z_mD, gate_DF), _matmul("md,df->mf", z_mD, up_DF)
            h_mF = (jax.nn.silu(g_mF) * u_mF).astype(z_mD.dtype)
            return _put(y, _matmul("mf,fd->md", h_mF, down_FD), at), _put(g, g_mF, at), _put(u, u_mF, at)

        return jax.lax.fori_loop(0, -(-count // BLOCK), run_block, carry), None

    rows = M + BLOCK
    carry = (full_like(z_MD, (rows, D)), *(full_like(z_MD, (rows, F), dtype=z_MD.dtype) for _ in "gu"))
    (y, g, u), _ = jax.lax.scan(run_expert, carry, (experts, jnp.cumsum(count_E) - count_E, count_E))
    return y[:M], (z_MD, experts, count_E, g, u)


def _blocks_backward(saved, dy_MD):
    z_MD, experts, count_E, g, u = saved
    z_pad, dy_pad, dtype = _pad(z_MD), _pad(dy_MD), z_MD.dtype

    def run_expert(dz, expert):
        (gate_DF, up_DF, down_FD), start, count = expert

        def run_block(t, carry):
            dz, dgate_DF, dup_DF, ddown_FD = carry
            at = start + t * BLOCK
            mine = (jnp.arange(BLOCK) < count - t * BLOCK)[:, None]
            z_mD, dy_mD = _rows(z_pad, at), jnp.where(mine, _rows(dy_pad, at), 0).astype(dtype)
            g_mF, u_mF = _rows(g, at).astype(jnp.float32), _rows(u, at).astype(jnp.float32)
            s_mF = jax.nn.sigmoid(g_mF)
            dh_mF = _matmul("md,fd->mf", dy_mD, down_FD)
            dg_mF = (dh_mF * u_mF * s_mF * (1 + g_mF * (1 - s_mF))).astype(dtype)
            du_mF = (dh_mF * g_mF * s_mF).astype(dtype)
            h_mF = (g_mF * s_mF * u_mF).astype(dtype)
            dz_mD = _matmul("mf,df->md", dg_mF, gate_DF) + _matmul("mf,df->md", du_mF, up_DF)
            return (
                _put(dz, dz_mD, at),
                dgate_DF + _matmul("md,mf->df", z_mD, dg_mF),
                dup_DF + _matmul("md,mf->df", z_mD, du_mF),
                ddown_FD + _matmul("mf,md->fd", h_mF, dy_mD),
            )

        sums = (full_like(dz, w.shape) for w in (gate_DF, up_DF, down_FD))
        dz, *dweights = jax.lax.fori_loop(0, -(-count // BLOCK), run_block, (dz, *sums))
        return dz, Experts(*(dw.astype(w.dtype) for dw, w in zip(dweights, (gate_DF, up_DF, down_FD), strict=True)))

    dz, dexperts = jax.lax.scan(
        run_expert, full_like(z_MD, z_pad.shape, dtype=dtype), (experts, jnp.cumsum(count_E) - count_E, count_E)
    )
    return dz[: z_MD.shape[0]], dexperts, None


_run_blocks.defvjp(_blocks_forward, _blocks_backward)


def pick_experts(platform: str) -> Callable:
    """The fastest of the functions above on "gpu" or "tpu"; the one in plain JAX everywhere else."""
    if platform == "gpu":
        return tokamax_experts if has_tokamax() else ragged_experts
    return {"tpu": tpu_experts}.get(platform, cpu_experts)


def has_tokamax() -> bool:
    """Whether tokamax is here and its kernels for GPUs work: those of 0.0.12 use what jax 0.11 no longer has."""
    return importlib.util.find_spec("tokamax") is not None and jax.__version_info__ < (0, 11)
