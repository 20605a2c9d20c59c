"""Where master weights and the optimizer's state rest: every array in as many different shards as the rules say."""

from __future__ import annotations

import math

import jax
import numpy as np
import optax
import pytest

from llamax.config import ConfigError
from llamax.optim.build import optimizer
from llamax.parallel.mesh import make_mesh
from llamax.train import programs
from llamax.train.programs import copies, state_shardings
from llamax.train.state import init
from tests.runs import tiny_run
from tests.train.matrix import bones_on

SIZES = dict(data=2, fsdp=2, expert=2)
EXTRA = {"fsdp": ("fsdp", "expert"), "zero": ("fsdp", "expert", "data")}  # axes that split the model's width


def pieces(x: jax.Array) -> int:
    """Different parts of an array, over all devices."""
    return len({str(shard.index) for shard in x.addressable_shards})


def expected(names: tuple, shape: tuple[int, ...], preset: str) -> int:
    """The rules in words, without the table: experts go over `expert`; the width over the rest of what splits tokens,
    axis by axis as long as it divides."""
    free, n = list(EXTRA[preset]), 1
    for name, size in zip(names, shape, strict=True):
        wanted = ["expert"] if name == "experts" else list(EXTRA[preset]) if name == "embed" else []
        parts = 1
        for axis in wanted:
            if axis in free and size % (parts * SIZES[axis]) == 0:
                free.remove(axis)
                parts *= SIZES[axis]
        n *= parts
    return n


@pytest.mark.parametrize("preset", EXTRA)
def test_every_array_is_split_as_the_rules_say(preset):
    run = tiny_run(mesh=SIZES | dict(rules=preset))
    mesh = make_mesh(SIZES)
    bones = bones_on(run, mesh)
    tx = optimizer(run.optim, run.train.steps, bones.kinds)
    shapes = jax.eval_shape(lambda: init(bones, tx, 0, 8))
    host = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = jax.device_put(host, state_shardings(bones, tx, run, mesh))
    adam = optax.tree.get(state.opt, "mu"), optax.tree.get(state.opt, "nu")
    for tree in (state.params, *adam):
        for (path, x), names in zip(
            jax.tree_util.tree_leaves_with_path(tree),
            jax.tree.leaves(bones.axes, is_leaf=lambda x: isinstance(x, tuple)),
            strict=True,
        ):
            where = jax.tree_util.keystr(path)
            assert pieces(x) == expected(names, x.shape, preset), f"{where} {names} {x.shape} {x.sharding}"
            assert pieces(x) == math.prod(EXTRA_SIZES[preset]) or "embed" not in names, where
    every = sum(x.nbytes for x in jax.tree.leaves((state.params, adam)))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state.params, adam)))
    assert held < 1.1 * every / math.prod(EXTRA_SIZES[preset])  # norms are whole


EXTRA_SIZES = {preset: [SIZES[axis] for axis in axes] for preset, axes in EXTRA.items()}


def test_offload_is_refused_where_the_hosts_memory_is_out_of_reach(monkeypatch):
    """Before anything is compiled, and only if it was asked for."""
    mesh, asked = make_mesh(SIZES), tiny_run(train=dict(remat="offload"))
    programs.check_memories(asked, mesh)  # a CPU's memory is the host's
    monkeypatch.setattr(programs, "HOST", "another room")
    programs.check_memories(tiny_run(), mesh)
    with pytest.raises(ConfigError, match=r"remat=offload.*but no another room.*Set --config.train.remat=period"):
        bones = bones_on(asked, mesh)
        programs.build(asked, bones, optimizer(asked.optim, 4, bones.kinds), mesh)


def test_what_a_step_computes_with_is_copied_only_where_it_rests_elsewhere():
    """Matrices in the computation's dtype, but for the router; embeddings and what no rule splits stay as they are."""
    mesh = make_mesh(SIZES)
    run = tiny_run(mesh=SIZES | dict(rules="zero"), train=dict(compute_dtype="bfloat16"))
    bones = bones_on(run, mesh)
    shapes = bones.shapes()[0]
    tx = optax.sgd(1.0)
    found = copies(run, bones, state_shardings(bones, tx, run, mesh).params, shapes)
    params = jax.device_put(jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes), found.resting)
    copied = jax.jit(found)(params)
    moe = copied["stack"]["segment0"]["slot1"]["moe"]
    assert moe["up"].dtype == "bfloat16" and moe["router"].dtype == copied["embed"].dtype == "float32"
    assert pieces(moe["up"]) == 4 and pieces(params["stack"]["segment0"]["slot1"]["moe"]["up"]) == 8
    assert pieces(moe["router"]) == pieces(copied["embed"]) == 4
    plain = tiny_run(mesh=SIZES)
    assert copies(plain, bones, state_shardings(bones, tx, plain, mesh).params, shapes) is None
