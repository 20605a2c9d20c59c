"""The vision encoder beside one tile, one patch, one head at a time."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from llamax.model.vision import VisionEncoder, normalise, patches, pixel_shuffle
from tests.model import twins
from tests.tolerances import ORACLE

TILES = np.random.default_rng(3).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def features():
    """(weights, features of three tiles) of an encoder whose biases, norms and embeddings are all random."""
    graph, tree = twins.fresh(partial(VisionEncoder, twins.VISION, remat=True))
    return tree, twins.quick_jit(lambda tree, x: twins.bind(graph, tree)(normalise(x, np.float32))[0])(tree, TILES)


def test_features_match_the_slow_twin(features):
    tree, ours = features
    assert ours.shape == (3, twins.VISION.tokens_per_tile, twins.VISION.adapter_dim)
    for tile, feature in zip(TILES, ours, strict=True):
        slow = twins.vision(twins.float64(tree), tile / 127.5 - 1, twins.VISION)
        np.testing.assert_allclose(feature, slow, **ORACLE)


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
