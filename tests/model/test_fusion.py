"""Fusion: features take the places of patch tokens in order, row by row."""

from __future__ import annotations

import numpy as np

from llamax.model.fusion import fuse


def slow_fuse(x_BTD, features_BFD, is_patch_BT):
    fused = x_BTD.copy()
    for row, patches in enumerate(is_patch_BT):
        for feature, t in enumerate(np.flatnonzero(patches)):
            fused[row, t] = features_BFD[row, feature]
    return fused


def test_features_fill_patch_tokens_in_order():
    """Rows with all slots used, some used, none; tiles apart and together, a patch first and a patch last."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 12, 4)).astype(np.float32)
    features = rng.normal(size=(3, 6, 4)).astype(np.float32)
    is_patch = np.zeros((3, 12), bool)
    is_patch[0, [0, 1, 2, 5, 6, 11]] = True
    is_patch[1, 4:7] = True
    np.testing.assert_array_equal(fuse(x, features, is_patch), slow_fuse(x, features, is_patch))


def test_fusion_keeps_the_activation_dtype():
    x = np.zeros((1, 2, 4), "bfloat16")
    assert fuse(x, np.ones((1, 1, 4), np.float32), np.array([[True, False]])).dtype == x.dtype
