"""Rows over several devices: ring attention is attention, local layers exchange nothing, tokens find their way back."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llamax.batch import COMPARING, Batch
from llamax.kernels.attention import slow_attention
from llamax.kernels.ring import Ring, ring_attention
from llamax.losses import TERMS, Facts
from llamax.model.attention import Attention, places
from llamax.model.moe import Routing
from llamax.model.remat import repeated
from llamax.model.score import Score
from llamax.model.seam import Seam, make_seam
from llamax.model.skeleton import skeleton
from llamax.parallel.context import LocalOrRing, SplitTokens, Tokens
from llamax.parallel.mesh import make_mesh
from llamax.parallel.place import batch_shardings
from llamax.parallel.tensor import SplitHeads
from llamax.plan import hlo
from llamax.stripes import Stripes
from llamax.train.step import in_row_order
from tests.runs import tiny_run
from tests.splits import agree, normal
from tests.tolerances import BF16, TWIN, TWIN_GRAD

B, T = 2, 32
# Of two rows: documents of one chunk and of all, shorter and longer than a shard, padding between and after them.
LENGTHS = ((T,), (3, -2, 9, 13, -5))
MESHES = [
    ({"data": 2, "context": 4}, 2, (4, 2)),
    ({"context": 4, "tensor": 2}, 1, (4, 2)),
    pytest.param({"context": 2, "tensor": 4}, 2, (4, 2), marks=pytest.mark.slow),
    pytest.param({"context": 8}, 2, (4, 4), marks=pytest.mark.slow),
    pytest.param({"context": 8}, 1, (4, 1), marks=pytest.mark.slow),
    pytest.param({"data": 2, "context": 2, "tensor": 2}, 1, (4, 2), marks=pytest.mark.slow),
]


def packed():
    """Positions and segments [B, T] of LENGTHS, in row order; a negative length is padding."""
    positions, segments = np.zeros((2, B, T), np.int32)
    for row, lengths in enumerate(LENGTHS):
        t = 0
        for segment, n in enumerate(lengths, start=1):
            if n > 0:
                positions[row, t : t + n], segments[row, t : t + n] = np.arange(n), segment
            t += abs(n)
    return positions, segments


@pytest.mark.parametrize(("sizes", "each", "heads"), MESHES, ids=str)
def test_ring_attention_is_attention(sizes, each, heads):
    """Values and gradients of the whole row, its tokens in shard order; padding's output is not looked at."""
    mesh, stripes, (H, K) = make_mesh(sizes), Stripes(sizes["context"], each), heads
    ring = SplitHeads(LocalOrRing(slow_attention, ring_attention, Ring("context", stripes.shards, each, 3)), mesh)
    places = stripes.places(T)
    positions, segments = packed()
    real = jnp.asarray(segments > 0, jnp.float32)[:, :, None, None]

    def whole(q, k, v):
        ids = dict(q_pos=positions, k_pos=positions, q_seg=segments, k_seg=segments)
        return real * slow_attention(q, k, v, **ids)

    def split(q, k, v):
        q, k, v = (x[:, places] for x in (q, k, v))
        pos, seg = jnp.asarray(positions[:, places]), jnp.asarray(segments[:, places])
        o = ring(q, k, v, q_pos=pos, k_pos=pos, q_seg=seg, k_seg=seg)
        return real * o[:, np.argsort(places)]

    qkv = normal(B, T, H, 4), normal(B, T, K, 4, seed=1), normal(B, T, K, 4, seed=2)
    agree(lambda qkv: whole(*qkv), lambda qkv: split(*qkv), (qkv,))


def test_a_ring_whose_outputs_are_kept_is_not_turned_again():
    """Remat `attention` keeps what backward needs of a ring: keys and values go round it twice, not three times."""
    mesh = make_mesh({"data": 2, "context": 4})
    ring = SplitHeads(LocalOrRing(slow_attention, ring_attention, Ring("context", 4, 2, 4)), mesh)
    ids = dict.fromkeys(("q_pos", "k_pos", "q_seg", "k_seg"), jnp.ones((B, T), jnp.int32))

    def passes(remat: str) -> int:
        def layer(x, item):
            q, k, v = (jnp.sin(x[..., :n, :]) for n in (4, 2, 2))
            return x + ring(q, k, v, **ids), item

        loss = jax.grad(lambda x: jax.lax.scan(repeated(layer, remat), x, jnp.zeros(2))[0].sum())
        return str(jax.make_jaxpr(loss)(normal(B, T, 4, 4))).count("ppermute[")

    assert passes("attention") == passes("none") < passes("period")


def test_rematted_ring_attention_keeps_no_masks():
    """Of 4 shards of 8 tokens in tiles of 2: no truth values are more than a tile's output, 4 heads of 4."""
    mesh, ring = make_mesh({"data": 2, "context": 4}), Ring("context", 4, 2, 2)
    rows = P("data", "context")

    def f(q, ids):
        @jax.checkpoint
        def attended(q):
            split = jax.shard_map(
                lambda q, ids: ring_attention(q, q, q, q_pos=ids, k_pos=ids, q_seg=ids, k_seg=ids, ring=ring),
                **dict(mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False),
            )
            return split(q, ids)

        return jnp.sum(jnp.sin(jax.lax.scan(lambda q, _: (attended(q), None), q, None, length=2)[0]))

    shapes = jax.ShapeDtypeStruct((2, 32, 4, 4), jnp.float32), jax.ShapeDtypeStruct((2, 32), jnp.int32)
    text = jax.jit(jax.grad(f)).lower(*shapes).compile().as_text()
    masks = [shape.size for shape in hlo.shapes_of(text) if shape.dtype == "pred"]
    assert masks and max(masks) <= 4 * 2 * 4


def test_ring_attention_in_bfloat16_is_near():
    """Sums and the softmax in float32; outputs and gradients of the inputs' dtype."""
    cut, (positions, _) = Stripes(4, 2), packed()
    ring = SplitHeads(
        LocalOrRing(slow_attention, ring_attention, Ring("context", 4, 2, 4)), make_mesh({"data": 2, "context": 4})
    )
    places = cut.places(T)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    ids = dict(
        zip(("q_pos", "k_pos", "q_seg", "k_seg"), (positions, positions, *[np.ones_like(positions)] * 2), strict=True)
    )
    q, k, v = (normal(B, T, n, 8, seed=n).astype(jnp.bfloat16) for n in (4, 2, 1))
    v = jnp.repeat(v, 2, axis=2)

    def value(attention, qkv, ids):
        o = attention(*qkv, **ids)
        return jnp.sum(o.astype(jnp.float32) ** 2), o

    def both(attention, qkv, ids):
        return jax.jit(jax.value_and_grad(lambda qkv: value(attention, qkv, ids), has_aux=True))(qkv)

    exact = both(slow_attention, [x.astype(jnp.float32) for x in (q, k, v)], ids)
    got = both(ring, [x[:, places] for x in (q, k, v)], {name: x[:, places] for name, x in ids.items()})
    for near, far in zip(jax.tree.leaves((got[0][1], got[1])), jax.tree.leaves((exact[0][1], exact[1])), strict=True):
        assert near.dtype == jnp.bfloat16
        far = np.asarray(far)[:, places]
        np.testing.assert_allclose(
            np.asarray(near, np.float32), far, rtol=BF16["rtol"], atol=BF16["atol"] * np.abs(far).max()
        )


@pytest.mark.parametrize(("kind", "expected"), [("rope_chunk", set()), ("nope_full", {"context"})])
def test_local_layers_exchange_nothing_along_context(kind, expected):
    """Projections and attention of one layer, and the gradient of what goes in: which axes do collectives span?"""
    mesh, cut, model = make_mesh({"data": 2, "context": 2, "tensor": 2}), Stripes(2, 2), tiny_run().model
    layer = Attention(model, kind, make_seam(mesh, stripes=cut), out_gain=1.0, rngs=nnx.Rngs(0))
    where = NamedSharding(mesh, P("data", "context"))
    positions = jnp.asarray(np.tile(cut.places(128), (2, 1)))
    at = places(positions, jnp.ones_like(positions), model)  # once for all layers
    x_BTD, at = jax.device_put((normal(2, 128, model.dim), at), where)

    def there_and_back(x_BTD, at):
        y_BTD, back = jax.vjp(lambda x: layer(x, at)[0], x_BTD)
        return y_BTD, back(y_BTD)[0]

    program = jax.jit(there_and_back, out_shardings=where).lower(x_BTD, at).compile()
    sent = hlo.cost(program.as_text()).calls
    spans = {axis for exchange in sent for axis in hlo.spanned(exchange.groups, dict(mesh.shape))}
    assert spans & {"context"} == expected, sent


def test_scalable_softmax_is_split_by_heads_and_follows_its_tokens():
    """A layer with YaRN on rows cut over `context`, its heads over `tensor`: output, and gradients of x and of s."""
    mesh, cut, plain = make_mesh({"data": 2, "context": 2, "tensor": 2}), Stripes(2, 2), tiny_run().model
    model = replace(plain, attn_scale="ssmax", rope=replace(plain.rope, scaling="yarn", beta_fast=8.0))
    x_BTD, dy = normal(B, T, model.dim), normal(B, T, model.dim, seed=1)
    positions, segments = packed()
    gains = np.linspace(0.2, 0.5, model.n_heads, dtype=np.float32)

    def run(seam, order, where=None, by_head=None):
        graph, state = nnx.split(Attention(model, "rope_full", seam, out_gain=1.0, rngs=nnx.Rngs(0)))
        state = nnx.to_pure_dict(state)
        ids = (jnp.asarray(x[:, order]) for x in (positions, segments))
        rows = jax.device_put((x_BTD[:, order], dy[:, order], places(*ids, model)), where)

        @jax.jit
        def there_and_back(s, x, dy, at):
            def of(s, x):
                bound = nnx.merge(graph, nnx.State(state | {"ssmax": s}))
                return jnp.where(at.segments[..., None] > 0, bound(x, at)[0], 0.0)

            y, back = jax.vjp(of, s, x)
            return y, *back(dy)

        y, ds, dx = there_and_back(jax.device_put(gains, by_head), *rows)
        return y[:, np.argsort(order)], ds, dx[:, np.argsort(order)]

    rows, heads = NamedSharding(mesh, P("data", "context")), NamedSharding(mesh, P("tensor"))
    whole = run(Seam(), np.arange(T))
    for got, expected in zip(run(make_seam(mesh, stripes=cut), cut.places(T), rows, heads), whole, strict=True):
        np.testing.assert_allclose(got, expected, **TWIN_GRAD)
    assert np.abs(whole[1]).min() > 1e-3


def test_devices_that_share_rows_share_the_work_on_their_pictures():
    """Every tile is encoded once: the matmuls of one of four devices."""
    run = tiny_run()
    blank = {name: jnp.zeros((2, 128), jnp.int32) for name in Batch._fields if name not in COMPARING}
    batch = Batch(**blank | {"tiles": jnp.zeros((2, 8, 28, 28, 3), jnp.uint8)})

    def flops(sizes, cut):
        mesh = make_mesh(sizes, jax.devices()[: cut.shards])
        bones = skeleton(run.model, make_seam(mesh, stripes=cut), patch_id=1, train=run.train)

        def encode(params, bias, batch):
            return jax.grad(lambda params: jnp.sum(bones.bind(params, bias).embed_batch(batch)[0] ** 2))(params)[
                "vision"
            ]

        places = NamedSharding(mesh, P()), NamedSharding(mesh, P()), batch_shardings(mesh)
        program = jax.jit(encode, in_shardings=places).lower(*bones.shapes(), batch).compile()
        return hlo.cost(program.as_text()).flops

    assert flops({"context": 4}, Stripes(4, 1)) / flops({}, Stripes()) == pytest.approx(1 / 4, rel=0.05)


SPLIT = SplitTokens(make_mesh({"data": 2, "context": 4}), Stripes(4, 2))


def placed(x):
    """A [B, T, ...] in shard order on SPLIT's mesh."""
    return jax.device_put(
        x[:, SPLIT.stripes.places(T)], NamedSharding(SPLIT.mesh, P(("data", "fsdp", "expert"), "context"))
    )


def test_tokens_find_their_way():
    x = np.arange(B * T * 3).reshape(B, T, 3)
    np.testing.assert_array_equal(jax.jit(SPLIT.row_order)(placed(x)), x)
    running = jax.jit(SPLIT.running)(placed(x[..., 0] % 2))
    np.testing.assert_array_equal(jax.jit(SPLIT.row_order)(running), Tokens().running(jnp.asarray(x[..., 0] % 2)))
    back = jax.jit(lambda x: SPLIT.unflat(SPLIT.flat(x), B))(placed(x))
    np.testing.assert_array_equal(back, placed(x))


def test_flat_moves_nothing_between_devices():
    """Nor does its gradient: along `tensor` too, where all have the same."""
    split = SplitTokens(make_mesh({"data": 2, "context": 2, "tensor": 2}), Stripes(2, 2))
    where = NamedSharding(split.mesh, P("data", "context"))
    x = jax.device_put(normal(4, T, 3), where)
    weighed = jax.grad(lambda x: jnp.sum(jnp.sin(split.unflat(jnp.tanh(split.flat(x)), 4))))
    program = jax.jit(weighed, out_shardings=where).lower(x).compile()
    assert not hlo.cost(program.as_text()).calls
    np.testing.assert_allclose(program(x), jax.grad(lambda x: jnp.sum(jnp.sin(jnp.tanh(x))))(x), **TWIN)


def test_the_balance_of_a_document_is_taken_in_row_order():
    """Its running counts take documents to stand together."""
    positions, segments = packed()
    logits = np.asarray(normal(3, B, T, 4))
    text = [segments] * 3 + [segments, positions, segments]
    batch = Batch(*text, tiles=np.zeros((B, 0, 0, 0, 3), np.uint8))
    routing = Routing(jnp.asarray(logits), jax.lax.top_k(logits, 2)[1])
    scored, facts = Score(None, None, None, routing, None), Facts.of(tiny_run())
    term = TERMS["router_balance_seq"]
    want = term.of(scored, batch, facts)
    places = SPLIT.stripes.places(T)
    cut = batch._replace(**{name: placed(x) for name, x in batch.of_tokens().items()})
    moved = scored._replace(routing=jax.tree.map(lambda x: x[:, :, places], routing))
    got = jax.jit(lambda moved, cut: term.of(*in_row_order(moved, cut, SPLIT.row_order), facts))(moved, cut)
    np.testing.assert_allclose(got.num, want.num, rtol=1e-6)
    assert term.in_row_order and not abs(term.of(moved, cut, facts).num / want.num - 1) < 1e-3


@pytest.mark.parametrize("each", [1, 2])
def test_every_device_has_the_same_work(each):
    """Pairs of tokens of a causal row that each shard computes, by stripes."""
    cut = Stripes(4, each)
    held = np.array(cut.order).reshape(4, each)
    assert sorted(cut.order) == list(range(cut.n))
    work = [
        sum((held[i][q] >= held[j][k]) for j in range(4) for q in range(each) for k in range(each)) for i in range(4)
    ]
    assert (len(set(work)) == 1) == (each == 2)
