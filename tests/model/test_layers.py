"""`linear` beside plain autodiff; the other layers are tested where they are used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.model.layers import linear
from tests.tolerances import TWIN_GRAD


@pytest.mark.parametrize("lead", [(), (5,), (3, 7)])
def test_linear_has_the_gradients_of_a_matmul(lead):
    keys, shapes = jax.random.split(jax.random.key(0), 3), ((*lead, 6), (6, 4), (*lead, 4))
    x, w, dy = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    ours, backward = jax.vjp(linear, x, w)
    plain, autodiff = jax.vjp(jnp.matmul, x, w)
    np.testing.assert_array_equal(ours, plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TWIN_GRAD), backward(dy), autodiff(dy))
