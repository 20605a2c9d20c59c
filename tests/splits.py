"""What tests of work that is split over devices share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.tolerances import MESH_GRAD


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


class Seen:
    """A kernel that notes the shapes that it is given."""

    def __init__(self, kernel):
        self.kernel, self.shapes = kernel, []

    def __call__(self, *args, **kwargs):
        self.shapes = jax.tree.map(jnp.shape, args)
        return self.kernel(*args, **kwargs)


def agree(whole, split, args, **kwargs):
    """The same values and gradients, with a weight of its own for each value."""

    def weighed(fn):
        def total(args):
            out = jax.tree.leaves(fn(*args, **kwargs))
            return sum(jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)) for y in out), out

        return jax.jit(jax.value_and_grad(total, has_aux=True, allow_int=True))

    (_, want), want_grads = weighed(whole)(args)
    (_, got), got_grads = weighed(split)(args)
    for a, b in zip(jax.tree.leaves((got, got_grads)), jax.tree.leaves((want, want_grads)), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), **MESH_GRAD)
