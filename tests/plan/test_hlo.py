"""The walk over compiled programs, on eight simulated devices: FLOPs beside those of the jaxpr and of count.py,
collectives whose bytes are known by hand."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llamax import config
from llamax.batch import Batch
from llamax.kernels.cross_entropy import slow_cross_entropy
from llamax.model import count
from llamax.model.score import score
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from llamax.plan import hlo
from tests.model import twins
from tests.model.test_count import chosen_experts, matmul_flops, visible_attention

AXES = ("data", "fsdp")


@functools.cache
def mesh() -> Mesh:
    return jax.make_mesh((2, 4), AXES, axis_types=(AxisType.Auto,) * 2)


def cost_of(f, *shapes, **options) -> hlo.Cost:
    return hlo.cost(jax.jit(f, **options).lower(*shapes).compile().as_text())


def cost_of_text(text: str) -> dict:
    got = hlo.cost(text)
    return {exchange.kind: (sent, got.calls[exchange]) for exchange, sent in got.sent.items()}


def on_mesh(f, in_specs, out_specs, *shapes) -> dict:
    """(kind, axes) -> (bytes sent by a device, calls) of f run by every device on its own part."""
    split = jax.shard_map(f, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False)
    got = cost_of(split, *shapes)
    sizes = dict(mesh().shape)
    return {(e.kind, hlo.spanned(e.groups, sizes)): (sent, got.calls[e]) for e, sent in got.sent.items()}


def floats(*shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_loop_counts_as_often_as_it_runs():
    def f(x):
        def body(x, _):
            return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=3)[0] @ x, None

        return jax.lax.scan(body, x, None, length=5)[0]

    got = cost_of(f, floats(32, 32))
    assert got.flops == 5 * 4 * 2 * 32**3
    assert not got.endless


def test_a_loop_of_unknown_length_is_told():
    got = cost_of(lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: x @ x, x), floats(32, 32), 7)
    assert got.flops == 2 * 32**3
    assert len(got.endless) == 1


LOOP = """
%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %two = s32[] constant(STEP)
  %next = s32[] add(%i, %two)
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%next, %y)
}

%condition (p.1: (s32[], f32[8,8])) -> pred[] {
  %p.1 = (s32[], f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %end = s32[] constant(9)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (x.1: f32[8,8]) -> f32[8,8] {
  %x.1 = f32[8,8]{1,0} parameter(0)
  %from = s32[] constant(1)
  %start = (s32[], f32[8,8]{1,0}) tuple(%from, %x.1)
  %loop = (s32[], f32[8,8]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,8]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(("step", "rounds"), [(1, 8), (2, 4), (3, 3)])
def test_a_loop_whose_length_is_not_noted(step, rounds):
    """From 1 to below 9, as TPU compilers write it, several rounds in one where they unrolled it."""
    assert hlo.cost(LOOP.replace("STEP", str(step))).flops == rounds * 2 * 8**3


def test_a_convolution_counts_pairs_inside_the_input():
    """ "SAME" over 5 numbers with a kernel of 3: 3 at each place but the ends, where 2 are inside: 13 pairs."""
    dims = jax.lax.conv_dimension_numbers((2, 5, 4), (3, 4, 6), ("NWC", "WIO", "NWC"))
    text = """
ENTRY %main (x: f32[2,5,4], w: f32[3,4,6]) -> f32[2,5,6] {
  %x = f32[2,5,4]{2,1,0} parameter(0)
  %w = f32[3,4,6]{2,1,0} parameter(1)
  ROOT %c = f32[2,5,6]{2,1,0} convolution(%x, %w), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
}
"""
    assert dims is not None
    assert hlo.cost(text).flops == 2 * (2 * 6) * 4 * 13


def test_what_is_computed_again_is_told_apart():
    w = floats(64, 64)

    def loss(w, x):
        layer = jax.checkpoint(lambda x, _: (jnp.tanh(x @ w) @ w, None), prevent_cse=False)
        return jax.lax.scan(layer, x, None, length=6)[0].sum()

    got = cost_of(jax.grad(loss), w, floats(32, 64))
    matmul = 2 * 32 * 64 * 64
    # Two forward and four backward; of the two again, the last one's result is not asked for.
    assert got.recomputed == 6 * matmul
    assert got.flops == 6 * 7 * matmul


@pytest.mark.parametrize("axes", [("fsdp",), ("data",), ("data", "fsdp")], ids="+".join)
def test_bytes_of_collectives_by_hand(axes):
    n = math.prod(dict(mesh().shape)[a] for a in axes)
    x, part = floats(64, 16), 64 * 16 * 4 // 8  # of 8 devices' parts, and the bytes of one
    gathered = on_mesh(lambda x: jax.lax.all_gather(x, axes, tiled=True), P(AXES), P(None), x)
    assert gathered == {("all-gather", axes): ((n - 1) * part, 1)}
    summed = on_mesh(lambda x: jax.lax.psum(x, axes), P(AXES), P(AXES), x)
    assert summed == {("all-reduce", axes): (2 * (n - 1) / n * part, 1)}
    scattered = on_mesh(lambda x: jax.lax.psum_scatter(x, axes, tiled=True), P(AXES), P(AXES), x)
    assert scattered == {("reduce-scatter", axes): ((n - 1) / n * part, 1)}


def test_a_permute_in_a_loop():
    def ring(x):
        step = [(i, (i + 1) % 4) for i in range(4)]
        return jax.lax.scan(lambda x, _: (jax.lax.ppermute(x, "fsdp", step) + 1, None), x, None, length=3)[0]

    got = on_mesh(ring, P(AXES), P(AXES), floats(64, 16))
    assert got == {("collective-permute", ("fsdp",)): (3 * 64 * 16 * 4 // 8, 3)}


def test_the_compiler_own_collectives_are_found():
    """A matmul over a split dimension: every device's part of the sum is added up over fsdp."""
    x, w = (NamedSharding(mesh(), P("data", "fsdp")), NamedSharding(mesh(), P("fsdp", None)))
    got = cost_of(
        lambda x, w: x @ w,
        *(floats(64, 128), floats(128, 32)),
        in_shardings=(x, w),
        out_shardings=NamedSharding(mesh(), P("data", None)),
    )
    assert got.flops == 2 * 64 * 128 * 32 / 8
    ((exchange, sent),) = got.sent.items()
    assert hlo.spanned(exchange.groups, dict(mesh().shape)) == ("fsdp",)
    assert sent == 2 * 3 / 4 * (32 * 32 * 4)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=1] {'axis_1'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_groups_in_every_spelling(text, groups):
    assert hlo._groups(f"%x = f32[4] all-reduce(%y), {text}, dimensions={{0}}") == groups


KERNELS = {
    # 4 heads of 128, 1024 tokens in 2 x 2 tiles of 512: 3 tiles touch the causal band.
    "splash_mha_fwd_segmented": 2 * (2 * 4 * 128 * 3 * 512**2),
    "splash_mha_dq_segmented": 3 * (2 * 4 * 128 * 3 * 512**2),
    "splash_mha_dkv_segmented": 4 * (2 * 4 * 128 * 3 * 512**2),
}


@pytest.mark.parametrize("name", KERNELS)
def test_attention_kernels_by_their_shapes(name):
    text = f"""
ENTRY %main (m: s8[1,2,2], q: bf16[1,4,1024,128]) -> bf16[1,4,1024,128] {{
  %m = s8[1,2,2]{{2,1,0}} parameter(0)
  %q = bf16[1,4,1024,128]{{3,2,1,0:T(8,128)(2,1)}} parameter(1)
  ROOT %{name}.1 = bf16[1,4,1024,128]{{3,2,1,0}} custom-call(%m, %q), custom_call_target="tpu_custom_call"
}}
"""
    assert hlo.cost(text).flops == KERNELS[name]


def test_grouped_matmuls_by_their_shapes():
    text = """
ENTRY %main (m: s32[5], x: bf16[64,16], w: bf16[4,16,32]) -> f32[64,32] {
  %m = s32[5]{0} parameter(0)
  %x = bf16[64,16]{1,0} parameter(1)
  %w = bf16[4,16,32]{2,1,0} parameter(2)
  ROOT %ragged-dot-none.1 = f32[64,32]{1,0} custom-call(%m, %x, %w), custom_call_target="tpu_custom_call"
}
"""
    assert hlo.cost(text).flops == 2 * 64 * 16 * 32


@pytest.mark.parametrize(
    "call",
    [
        'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(jvp(jit(tgmm)))/pallas_call"}',
        'custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="tokamax:{\\"op\\":\\"TritonRaggedDot\\"}"}',
    ],
)
def test_gradients_of_grouped_weights_by_their_shapes(call):
    """[E, D, F] of rows [M, D] and [M, F], each of one expert: as many FLOPs as the rows through one expert."""
    text = f"""
ENTRY %main (m: s32[5], x: bf16[64,16], y: bf16[64,32]) -> bf16[4,16,32] {{
  %m = s32[5]{{0}} parameter(0)
  %x = bf16[64,16]{{1,0}} parameter(1)
  %y = bf16[64,32]{{1,0}} parameter(2)
  ROOT %kernel.2 = bf16[4,16,32]{{2,1,0}} custom-call(%m, %x, %y), {call}
}}
"""
    assert hlo.cost(text).flops == 2 * 64 * 16 * 32
    assert (
        hlo.cost(text.replace("jit(f)", "jit(f)/filled_0.5000").replace("tokamax:", "filled_0.5000/")).flops
        == 64 * 16 * 32
    )


def test_a_collective_that_is_spread_over_fusions_counts_once():
    """As TPUs write it: begun in one, worked on in a loop in another, ended in a third; each names its channel."""
    chain = 'channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}'
    other = "channel_id=8, replica_groups={{0,1,2,3}}, dimensions={0}"
    part = "(x: f32[4,8]) -> f32[16,8] {{\n  %x = f32[4,8]{{1,0}} parameter(0)\n"
    gather = "  ROOT %all-gather.{} = f32[16,8]{{1,0}} all-gather(%x), {}\n}}\n"
    names = ("begin", "async_collective_fusion.1", "end")
    text = "\n".join(f"%{name} {part.format()}{gather.format(i, chain)}" for i, name in enumerate(names))
    calls = "\n".join(f"  %f.{i} = f32[16,8]{{1,0}} fusion(%x), kind=kCustom, calls=%{n}" for i, n in enumerate(names))
    text += f"\nENTRY %main {part.format()}{calls}\n{gather.format(9, other)}"
    got = cost_of_text(text)
    assert got == {"all-gather": (2 * 3 * 4 * 8 * 4, 2)}


@pytest.mark.parametrize(("scope", "n", "matmuls"), [("often", 32, 2), ("rarely", 48, 1)])
def test_of_a_condition_the_dear_branch_counts_but_for_what_is_rare(scope, n, matmuls):
    """Rare is what is over a buffer of tokens, and is not there when routing is even; nested in a loop too. Of another
    size each time: a cache of programs does not tell them apart by their names."""

    def f(more, x):
        def body(x, _):
            with jax.named_scope(scope):
                return jax.lax.cond(more, lambda x: x @ x @ x, lambda x: x @ x, x), None

        return jax.lax.scan(body, x, None, length=3)[0]

    assert cost_of(f, jax.ShapeDtypeStruct((), jnp.bool), floats(n, n)).flops == matmuls * 3 * 2 * n**3


def test_flops_of_a_model_are_those_of_count_and_of_the_jaxpr():
    """One row of Llama 4's layers on one device, in scans, with twins that do what is counted and nothing else."""
    model, tokens = twins.TINY, 11
    seam = Seam(attention=visible_attention, run_experts=chosen_experts, cross_entropy=slow_cross_entropy)
    bones = skeleton(model, seam, patch_id=0, train=config.Train(remat="none"))
    row = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    batch = Batch(*[row] * 6, tiles=jax.ShapeDtypeStruct((1, 0, 1, 1, 3), jnp.uint8))

    def loss(params, bias, batch):
        return score(bones.bind(params, bias), batch).logp.sum()

    gradient = jax.grad(loss)
    got = cost_of(gradient, *bones.shapes(), batch)
    assert got.flops == pytest.approx(count.row_flops(model, tokens), rel=0.05)
    assert got.flops == pytest.approx(matmul_flops(jax.make_jaxpr(gradient)(*bones.shapes(), batch).jaxpr), rel=0.05)
    assert not got.endless
