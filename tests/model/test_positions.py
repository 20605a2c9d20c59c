"""What scales queries, beside the slow twin; and who reads a setting of positions: which layers, at which distances."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llamax import config
from llamax.kernels.attention import blocked_attention
from llamax.model import count
from llamax.model.attention import Attention, places
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from tests.model import twins
from tests.model.test_attention import X_BTD, compare
from tests.tolerances import ORACLE, TWIN

YARN = replace(twins.TINY.rope, scaling="yarn", beta_slow=0.5, beta_fast=4.0)
BY_METHOD = {
    "linear": replace(twins.TINY.rope, scaling="linear"),
    "ntk": replace(twins.TINY.rope, scaling="ntk"),
    "yarn": YARN,
    "pairs": replace(YARN, ramp="pairs", attention_factor=1.4),
    "llama3": twins.TINY.rope,
    "theta": config.Rope(theta=7.0),
}
SSMAX = replace(twins.TINY, attn_scale="ssmax", ssmax_len=12)


# ------------------------------------------------------------------------------------------------ beside the slow twin


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("kind", ["rope_chunk", "rope_full", "nope_full"])
def test_yarns_attention_factor_acts_after_the_norm_that_would_undo_it(kind, qk_norm):
    compare(replace(twins.TINY, rope=replace(YARN, attention_factor=1.7), qk_norm=qk_norm), kind)


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "pairs"])
def test_rescaled_layers_match_the_slow_twin(method):
    compare(replace(twins.TINY, rope=BY_METHOD[method]), "rope_full")


@pytest.mark.parametrize("kind", ["rope_full", "nope_full", "rope_chunk"])
def test_scalable_softmax_matches_the_slow_twin(kind):
    compare(replace(SSMAX, rope=YARN), kind)


def test_logits_are_scaled_by_the_square_of_the_attention_factor():
    """As if queries alone had been projected to f^2 as long."""
    model = replace(twins.TINY, qk_norm=False, rope=replace(YARN, attention_factor=1.7))
    tree = weights("rope_full")
    longer = tree | {"query": tree["query"] * np.float32(1.7**2)}
    plain = replace(model, rope=replace(YARN, attention_factor=1.0))
    np.testing.assert_allclose(layer(model, "rope_full", tree), layer(plain, "rope_full", longer), **TWIN)


def test_gradients_of_scalable_softmax_are_the_slow_twins():
    """By s of every head and by the queries' weights: small steps in float64."""
    kind, dy = "rope_full", np.random.default_rng(3).normal(size=(24, 16))
    graph, tree = twins.fresh(partial(Attention, SSMAX, kind, Seam(attention=blocked_attention), out_gain=1.0))
    at = places(jnp.asarray(twins.POSITIONS), jnp.asarray(twins.SEGMENTS), SSMAX)

    def ours(tree):
        return jnp.sum(twins.bind(graph, tree)(jnp.asarray(X_BTD), at)[0][1] * dy)

    def slow(w):
        y = twins.attention(w, X_BTD[1].astype(float), twins.POSITIONS[1], twins.SEGMENTS[1], SSMAX, kind)
        return np.sum(y * dy)

    grads, w = twins.quick_jit(jax.grad(ours))(tree), twins.float64(tree)
    for name, at_index in [("ssmax", (5,)), ("query", (3, 2, 1))]:
        step = np.zeros_like(w[name])
        step[at_index] = 1e-5
        slope = (slow(w | {name: w[name] + step}) - slow(w | {name: w[name] - step})) / 2e-5
        np.testing.assert_allclose(grads[name][at_index], slope, **ORACLE)
        assert abs(slope) > 0.01


# -------------------------------------------------------------------------------------------------- the new parameter


def test_scalable_softmax_begins_as_softmax_at_a_length():
    """Where a query sees ssmax_len keys, the layer with its first s is the one without."""
    graph, tree = twins.fresh(partial(Attention, SSMAX, "nope_full", Seam(), out_gain=1.0))
    del graph
    tree = tree | {"ssmax": np.asarray(fresh_ssmax(SSMAX))}
    ours, plain = layer(SSMAX, "nope_full", tree), layer(replace(twins.TINY, attn_temperature=0.0), "nope_full", tree)
    same = np.abs(ours - plain).max(axis=-1) < 1e-5
    assert same[1, 11] and not same[1, [5, 10, 12, 20]].any()
    assert same[1, 0], "a query that sees one key has no choice"


def fresh_ssmax(model: config.Model):
    return Attention(model, "nope_full", Seam(), out_gain=1.0, rngs=nnx.Rngs(0)).ssmax[...]


def test_the_parameter_is_one_number_a_head_without_decay():
    model = replace(SSMAX, plan=((("rope_chunk+dense", "nope_full+dense", "rope_full+moe"), 2),))
    bones = skeleton(model, Seam(), patch_id=0, train=config.Train())
    slots = bones.shapes()[0]["stack"]["segment0"]
    assert "ssmax" not in slots["slot0"]["attention"]
    for slot in ("slot1", "slot2"):
        assert slots[slot]["attention"]["ssmax"].shape == (2, model.n_heads)
        assert bones.axes["stack"]["segment0"][slot]["attention"]["ssmax"] == ("layers", "heads")
        assert bones.kinds["stack"]["segment0"][slot]["attention"]["ssmax"] == "norm"
    plain = count.parameters(replace(model, attn_scale="temperature"))
    assert count.parameters(model).text == plain.text + 4 * model.n_heads
    assert count.parameters(model).text_active == plain.text_active + 4 * model.n_heads


# ---------------------------------------------------------------------------------------------- who reads which setting


@cache
def weights(kind: str) -> dict:
    return twins.fresh(partial(Attention, twins.TINY, kind, Seam(), out_gain=1.0))[1]


def layer(model: config.Model, kind: str, tree: dict, x=X_BTD, positions=twins.POSITIONS, segments=twins.SEGMENTS):
    """[B, T, D] of one layer with the weights in `tree`, by the fast kernel."""
    known = {name: tree[name] for name in tree if name != "ssmax" or model.attn_scale == "ssmax"}
    graph, _ = twins.fresh(partial(Attention, model, kind, Seam(attention=blocked_attention), out_gain=1.0))
    at = places(jnp.asarray(positions), jnp.asarray(segments), model)
    return np.asarray(twins.quick_jit(lambda tree, x: twins.bind(graph, tree)(x, at)[0])(known, jnp.asarray(x)))


@pytest.mark.parametrize("method", BY_METHOD)
def test_layers_without_rope_read_no_setting_of_it(method):
    plain = replace(twins.TINY, rope=config.Rope(theta=100.0))
    with_it = replace(twins.TINY, rope=BY_METHOD[method])
    bits = [layer(model, "nope_full", weights("nope_full")).tobytes() for model in (plain, with_it)]
    assert bits[0] == bits[1]
    moved = layer(plain, "rope_full", weights("rope_full")) - layer(with_it, "rope_full", weights("rope_full"))
    assert np.abs(moved).max() > 1e-3, "and layers with RoPE do"


def test_local_layers_read_neither_temperature_nor_scalable_softmax():
    tree = weights("rope_chunk")
    changes = (dict(attn_scale="ssmax"), dict(attn_temperature=0.9), dict(attn_temperature_floor=1))
    plain = layer(twins.TINY, "rope_chunk", tree).tobytes()
    assert all(layer(replace(twins.TINY, **change), "rope_chunk", tree).tobytes() == plain for change in changes)


# -------------------------------------------------------------------------- with the chunk fixed, no distance is new

C = 64
LONG = replace(twins.TINY, chunk_len=C, rope=config.Rope(theta=500_000.0))
ROW = np.random.default_rng(5).normal(size=(1, 2048, 16)).astype(np.float32)


class Spy:
    """In place of attention: writes down the distances from every query to the keys that it may see."""

    def __init__(self):
        self.distances: set[int] = set()

    def __call__(self, q, k, v, *, q_pos, k_pos, q_seg, k_seg, local_len):
        away = np.asarray(q_pos)[0, :, None] - np.asarray(k_pos)[0, None, :]
        seen = (away >= 0) & (np.asarray(q_seg)[0, :, None] == np.asarray(k_seg)[0, None, :])
        self.distances |= set(np.flatnonzero(np.bincount(away[seen])).tolist())
        return q


def distances(model: config.Model, kind: str, T: int) -> set[int]:
    spy = Spy()
    graph, tree = twins.fresh(partial(Attention, model, kind, Seam(attention=spy), out_gain=1.0))
    at = places(jnp.arange(T)[None], jnp.ones((1, T), jnp.int32), model)
    twins.bind(graph, tree)(jnp.asarray(ROW[:, :T]), at)
    return spy.distances


def test_a_longer_row_shows_a_local_layer_no_new_distance():
    """And no new angle; layers that see all, and a chunk that grows, meet distances that were never trained."""
    assert distances(LONG, "rope_chunk", 256) == distances(LONG, "rope_chunk", 2048) == set(range(C))
    short, long = (places(jnp.arange(T)[None], jnp.ones((1, T), jnp.int32), LONG).chunk_rotation for T in (256, 2048))
    for mine, theirs in zip(short, long, strict=True):
        np.testing.assert_array_equal(np.unique(mine, axis=1), np.unique(theirs, axis=1))
    assert max(distances(LONG, "rope_full", 2048)) == 2047 > max(distances(LONG, "rope_full", 256)) == 255
    assert max(distances(replace(LONG, chunk_len=512), "rope_chunk", 2048)) == 511


def there_and_back(model: config.Model, kind: str, x, dy):
    """The layer's output, and the gradient of its input."""
    graph, tree = twins.fresh(partial(Attention, model, kind, Seam(attention=blocked_attention), out_gain=1.0))
    at = places(jnp.arange(x.shape[1])[None], jnp.ones(x.shape[:2], jnp.int32), model)

    @twins.quick_jit
    def run(x, dy):
        y, back = jax.vjp(lambda x: twins.bind(graph, tree)(x, at)[0], x)
        return y, back(dy)[0]

    return run(x, dy)


@pytest.mark.parametrize(
    ("kind", "chunk_len", "same"),
    [("rope_chunk", C, True), ("rope_full", C, False), ("rope_chunk", 4 * C, False)],
    ids=["local", "all", "a grown chunk"],
)
def test_a_chunk_is_the_same_wherever_it_stands_and_however_long_the_row(kind, chunk_len, same):
    """One chunk's tokens, in the middle of a row of 1,024 and at the end of one of 256: values and gradients."""
    model, row, dy = replace(LONG, chunk_len=chunk_len), ROW[:, : 16 * C], ROW[:, : -16 * C - 1 : -1]
    far, near = slice(9 * C, 10 * C), slice(3 * C, 4 * C)
    x, dx = row[:, : 4 * C].copy(), dy[:, : 4 * C].copy()
    x[:, near], dx[:, near] = row[:, far], dy[:, far]
    for long, short in zip(there_and_back(model, kind, row, dy), there_and_back(model, kind, x, dx), strict=True):
        assert np.allclose(long[:, far], short[:, near], **TWIN) == same
