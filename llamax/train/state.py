"""Everything that a training step carries from one step to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from llamax.model.skeleton import Skeleton

COUNTS = ("step", "bad_in_row", "skipped")  # the state's numbers, kept in a checkpoint's `extra`


class State(NamedTuple):
    step: Array  # int32: steps taken, skipped ones included
    params: Any
    router_bias: Any
    opt: Any
    rng: Array  # uint32 key data, split off for whatever a step must draw
    bad_in_row: Array  # int32: bad steps since the last good one
    skipped: Array  # int32: bad steps so far, whose update was not applied
    recent: Array  # float32 [2, W]: the last finite losses of steps without pictures and with; inf: not yet
    reference: Any = None  # (what is trained, router_bias) of a live reference: never changed, in no checkpoint


def init(skeleton: Skeleton, optimizer: optax.GradientTransformation, seed: int, spike_window: int) -> State:
    """A fresh state; pure, so that run.py can place it under one jit, or only take its shapes. The optimizer knows
    nothing of what is frozen."""
    key = jax.random.key(seed)
    init_key, run_key = jax.random.split(key)
    params, router_bias = skeleton.init(init_key)
    zero = jnp.zeros((), jnp.int32)
    recent = jnp.full((2, spike_window), jnp.inf, jnp.float32)
    opt = optimizer.init(skeleton.split(params)[0])
    return State(zero, params, router_bias, opt, jax.random.key_data(run_key), zero, zero, recent)
