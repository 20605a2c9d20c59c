"""Losses are sums, divided once, globally: accumulation, packing, padding, data parallelism then change nothing."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Sum(NamedTuple):
    """A numerator and what to divide it by. Add numerators and denominators, then take the mean."""

    num: Array
    den: Array

    def mean(self) -> Array:
        """num / den, and 0 where nothing was counted."""
        return jnp.where(self.den > 0, self.num / jnp.where(self.den > 0, self.den, 1), 0.0)
