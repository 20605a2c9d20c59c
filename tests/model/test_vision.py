"""Both ways from pixels to embeddings beside one tile, one patch, one head at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import optax
import pytest

from llamax import config
from llamax.batch import Batch
from llamax.model.score import score
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from llamax.model.vision import LinearPatches, VisionEncoder, normalise, patches, pixel_shuffle
from tests.model import twins
from tests.tolerances import ORACLE

TILES = np.random.default_rng(3).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def features():
    """(weights, features of three tiles) of an encoder whose biases, norms and embeddings are all random."""
    graph, tree = twins.fresh(partial(VisionEncoder, twins.VISION, remat="period"))
    return tree, twins.quick_jit(lambda tree, x: twins.bind(graph, tree)(normalise(x, np.float32))[0])(tree, TILES)


def test_features_match_the_slow_twin(features):
    tree, ours = features
    assert ours.shape == (3, twins.VISION.tokens_per_tile, twins.VISION.adapter_dim)
    for tile, feature in zip(TILES, ours, strict=True):
        slow = twins.vision(twins.float64(tree), tile / 127.5 - 1, twins.VISION)
        np.testing.assert_allclose(feature, slow, **ORACLE)


def test_linear_patches_match_the_slow_twin():
    """Blocks of 4 x 4 pixels, row by row, colour by colour, straight to the decoder's 16 numbers."""
    model = replace(twins.TINY, vision=replace(twins.VISION, encoder="linear"))
    graph, tree = twins.fresh(partial(LinearPatches, model.vision, model.dim, std=0.5))
    assert {name: w.shape for name, w in tree["projection"].items()} == {"weight": (48, 16), "bias": (16,)}
    ours, squares = twins.quick_jit(lambda tree, x: twins.bind(graph, tree)(normalise(x, np.float32)))(tree, TILES)
    assert ours.shape == (3, model.vision.tokens_per_tile, model.dim) and squares.shape == (0, 3)
    for tile, feature in zip(TILES, ours, strict=True):
        slow = twins.picture_tokens({"vision": twins.float64(tree)}, tile / 127.5 - 1, model)
        np.testing.assert_allclose(feature, slow, **ORACLE)


def test_linear_patches_learn_what_only_the_picture_tells():
    """The token after a picture of one of four colours is its colour: the loss falls to nothing, on new pictures too,
    and with pictures that belong to other rows it cannot."""
    vision = config.Vision(encoder="linear", tile_px=4, patch_px=2, shuffle=2, max_tiles=1)
    model = replace(twins.TINY, plan=((("rope_full+dense",), 1),), vision=vision, init_std=0.3)
    bones = skeleton(model, Seam(), patch_id=twins.PATCH, train=config.Train(remat="none"))
    rng, rows = np.random.default_rng(0), 32
    tx = optax.adam(1e-2)

    def pictures() -> Batch:
        colour_B = rng.integers(0, 4, rows)
        base = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]])[colour_B]
        tiles = np.clip(base[:, None, None, None] + rng.integers(-60, 60, (rows, 1, 4, 4, 3)), 0, 255).astype(np.uint8)
        tokens = np.broadcast_to(np.array([twins.PATCH, 1], np.int32), (rows, 2))
        targets = np.stack([np.zeros(rows, np.int32), colour_B.astype(np.int32)], axis=1)
        weights = np.broadcast_to(np.array([0, 1], np.float32), (rows, 2))
        ones, at = np.ones((rows, 2), np.int32), np.broadcast_to(np.arange(2, dtype=np.int32), (rows, 2))
        return Batch(tokens, targets, weights, ones, at, ones, tiles)

    def loss(params, batch):
        return -(score(bones.bind(params, {}), batch).logp * batch.loss_weights).sum() / rows

    @twins.quick_jit
    def step(params, opt, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt, value, grads["vision"]

    params, _ = twins.quick_jit(bones.init)(jax.random.key(0))
    start = np.std(params["vision"]["projection"]["weight"]) * 48**0.5  # of a feature of white pixels
    np.testing.assert_allclose(start, model.init_std, rtol=0.2)
    opt, losses = tx.init(params), []
    for i in range(40):
        params, opt, value, grad = step(params, opt, pictures())
        losses.append(float(value))
        assert i or all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(grad))  # weight and bias, from the first step
    assert losses[0] > 1.0 and losses[-1] < 0.1
    unseen = pictures()
    *_, of_others, _ = step(params, opt, unseen._replace(tiles=np.roll(unseen.tiles, 1, axis=0)))
    assert of_others > 1.0


def test_patches_are_row_major_and_colour_first():
    ours = np.asarray(patches(TILES, 2))
    assert ours.shape == (3, 16, 12)
    for tile, vectors in zip(TILES, ours, strict=True):
        np.testing.assert_array_equal(vectors, twins.patch_vectors(tile, 2))


@pytest.mark.parametrize("shuffle", [2, 4])
def test_pixel_shuffle_joins_neighbours(shuffle):
    x_SPW = np.arange(2 * 64 * 3).reshape(2, 64, 3)
    ours = pixel_shuffle(x_SPW, shuffle)
    for x_PW, joined in zip(x_SPW, ours, strict=True):
        np.testing.assert_array_equal(joined, twins.shuffled(x_PW, shuffle))


def test_pixels_become_minus_one_to_one():
    ends = np.array([[0, 255]], np.uint8)
    np.testing.assert_array_equal(normalise(ends, np.float32), [[-1, 1]])
    floats = np.array([[0.25, -1.0]], np.float32)
    np.testing.assert_array_equal(normalise(floats, np.float32), floats)
