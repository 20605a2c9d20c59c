"""Plots are pictures: their colours say what the numbers do."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from llamax.observe import plots


def test_a_heat_map_is_red_where_nothing_is_right_and_green_where_all_is():
    labels = dict(x=["256", "512"], y=["0%", "50%", "100%"], title="needle")
    none, all_right = (plots.heat_map(np.full((3, 2), value), **labels).astype(int) for value in (0.0, 1.0))
    assert none.shape == all_right.shape and none.dtype == all_right.dtype
    middle = np.s_[none.shape[0] // 3 : none.shape[0] // 2, none.shape[1] // 2 :]
    red, green = (picture[middle].reshape(-1, 3).mean(axis=0) for picture in (none, all_right))
    assert red[0] > red[1] + 50 and green[1] > green[0] + 50
    first = np.zeros((3, 2))
    first[0] = 1
    upper, lower = (np.array_split(plots.heat_map(first, **labels).astype(int), 2)[i].mean(axis=(0, 1)) for i in (0, 1))
    assert upper[1] - upper[0] > lower[1] - lower[0]  # the first row is on top


def test_curves_show_every_line_and_a_png_is_the_same_picture():
    flat, rising = (plots.curves([1, 2, 3], {"a": y}, title="nats") for y in ([1, 1, 1], [1, 2, 3]))
    assert flat.dtype == np.uint8 and flat.shape[2] == 3 and not np.array_equal(flat, rising)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(plots.png(rising)))), rising)


def test_a_histogram_stacks_its_kinds_in_common_bins():
    empty, low, both = (
        plots.histogram(values, title="grades").astype(int)
        for values in (
            {"kept": [], "dropped": []},
            {"kept": [], "dropped": [1, 1, 2]},
            {"kept": [2, 2], "dropped": [1, 1, 2]},
        )
    )
    assert empty.shape[2] == 3 and not np.array_equal(low, both)
    blue = [(picture[..., 2] - picture[..., 0] > 60).sum() for picture in (empty, low, both)]
    orange = [(picture[..., 0] - picture[..., 2] > 60).sum() for picture in (empty, low, both)]
    assert 0 < blue[0] == blue[1] < blue[2] / 2 and orange[0] < orange[1] / 2  # the legend has both
