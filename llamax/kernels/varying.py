"""Manual mesh axes over which an array varies, for kernels that must also run inside `jax.shard_map`.

Inside shard_map (with its default check_vma=True) every value is typed by the mesh axes along which devices may hold
different values. Two rules bite a kernel with a custom gradient: a loop's carry must start with the type that it ends
with, and the cotangent of an input must have that input's type. Both hold once all inputs vary alike: the cast from
"the same everywhere" to "varying" is differentiable, and its transpose is the sum over devices that the gradient of a
replicated weight needs. Outside shard_map all of this does nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _axes(x: jax.Array) -> frozenset[str]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_alike(*trees):
    """The same pytrees, every array cast to vary along each manual axis along which any of them varies."""
    axes = frozenset().union(*(_axes(x) for x in jax.tree.leaves(trees)))

    def cast(x):
        missing = tuple(sorted(axes - _axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, trees)


def full_like(x: jax.Array, shape: tuple[int, ...], value: float = 0.0, dtype=jnp.float32) -> jax.Array:
    """A constant array [*shape] that varies along the same manual axes as x: the start of a loop's carry."""
    axes = tuple(sorted(_axes(x)))
    constant = jnp.full(shape, value, dtype)
    return jax.lax.pcast(constant, axes, to="varying") if axes else constant
