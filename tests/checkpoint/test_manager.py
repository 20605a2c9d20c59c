"""Checkpoints: bit-equal round trips on any mesh, nothing half-saved, and errors that name what differs."""

from __future__ import annotations

import os
import shutil
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from llamax import config
from llamax.checkpoint.manager import Checkpoints

CFG = config.Checkpoint(keep=2)
EXTRA = {"tokens": 12_345_678_901_234, "note": "é"}


def stream():
    return iter(grain.MapDataset.range(1000).shuffle(seed=1).repeat().to_iter_dataset().batch(4))


def fsdp4():
    return NamedSharding(jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4]), P("fsdp"))


def data2():
    return NamedSharding(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]), P())


def state(sharding, n=8):
    """A run's state with every kind of leaf that it can have: lists, stacked weights, bf16, ints, optax's tuples."""
    rng = np.random.default_rng(0)
    put = lambda x: jax.device_put(x, sharding)  # noqa: E731
    params = {
        "segments": [{"slots": [{"w": put(rng.normal(size=(n, 3)).astype(np.float32))}]}],
        "half": put(rng.normal(size=(n,)).astype(jnp.bfloat16)),
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(1e-3, 9), mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    )
    opt = optimizer.init(params)
    opt = jax.tree.map(lambda x: x + jnp.asarray(3, x.dtype), opt)  # moments that are not all zero
    return dict(params=params, router_bias={}, opt=opt, rng={"key": jax.random.key(5), "seen": np.uint32(2**32 - 1)})


def abstract(trees, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), trees)


def bits(tree):
    def host(x):
        key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if key else x)

    return [(x.dtype, x.shape, x.tobytes()) for x in map(host, jax.tree.leaves(tree))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with step 7 in it, saved from fsdp=4, and what went in."""
    folder = tmp_path_factory.mktemp("saved")
    trees, it = state(fsdp4()), stream()
    drawn = [next(it) for _ in range(3)]
    with Checkpoints(folder, CFG) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.save(7, **trees, data_iterator=it, extra=EXTRA)
        assert not checkpoints.save(7, **trees, data_iterator=it, extra=EXTRA), "already there"
    return folder, trees, len(drawn)


@pytest.mark.parametrize("sharding", [fsdp4, data2])
def test_restored_is_bit_equal_on_any_mesh(saved, sharding):
    folder, trees, drawn = saved
    it, same = stream(), stream()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest() == 7
        back = checkpoints.restore(**abstract(trees), data_iterator=it)
        tree = abstract({k: v for k, v in trees.items() if k == "params"}, sharding())["params"]
        params, _ = checkpoints.restore_weights(7, params=tree, router_bias={})
    assert back.pop("extra") == EXTRA
    assert jax.tree.structure(back) == jax.tree.structure(trees)
    assert bits(back) == bits(trees) and bits(params) == bits(trees["params"])
    assert all(x.sharding == sharding() for x in jax.tree.leaves(params))
    assert isinstance(jax.tree.leaves(back["params"])[0].sharding, SingleDeviceSharding), "the default"
    for _ in range(drawn):
        next(same)
    assert np.array_equal(next(it), next(same))


def test_router_bias_is_an_item_when_there_is_one(tmp_path):
    trees = state(data2()) | dict(router_bias={"layer": jnp.arange(4.0)})
    with Checkpoints(tmp_path, CFG) as checkpoints:
        checkpoints.save(1, **trees, data_iterator=stream(), extra={})
        back = checkpoints.restore(1, **abstract(trees), data_iterator=stream())
        assert bits(back["router_bias"]) == bits(trees["router_bias"]) and back["extra"] == {}
        asked = abstract({name: trees[name] for name in ("params", "router_bias")})
        assert bits(checkpoints.restore_weights(None, **asked)[1]) == bits(trees["router_bias"])
        # A dense model must not quietly lose the bias of a sparse one.
        with pytest.raises(config.ConfigError, match="router_bias/layer is float32.4. in the checkpoint and not here"):
            checkpoints.restore(1, **abstract(trees | dict(router_bias={})), data_iterator=stream())


def test_params_cast_to_what_sampling_asks_for(saved):
    folder, trees, _ = saved
    asked = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), trees["params"])
    with Checkpoints(folder) as checkpoints:
        got, _ = checkpoints.restore_weights(None, params=asked, router_bias={})
    assert bits(got) == bits(jax.tree.map(lambda x: x.astype(jnp.bfloat16), trees["params"]))


def test_save_does_not_see_what_happens_after_it(tmp_path):
    """The step donates the state that is still being written, and the stream moves on. (On a CPU Orbax writes from a
    view of the very array, and XLA refuses to donate what is viewed; on a device it has copied first.)"""
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    it = stream()
    trees = state(data2())
    big = jnp.arange(4 * 2**20, dtype=jnp.float32)
    want, next_batch = np.array(big), next(stream())
    with Checkpoints(tmp_path, CFG) as checkpoints:
        checkpoints.save(1, **trees | dict(params={"big": big}), data_iterator=it, extra={})
        for _ in range(4):
            big = advance(big)
            next(it)
        jax.block_until_ready(big)
        checkpoints.wait()
        trees["params"] = {"big": jax.ShapeDtypeStruct(want.shape, want.dtype)}
        it = stream()
        back = checkpoints.restore(1, **abstract(trees), data_iterator=it)
    assert np.array_equal(back["params"]["big"], want) and np.array_equal(next(it), next_batch)


def test_keeps_the_newest_and_clears_what_a_killed_save_left(tmp_path):
    trees, small = state(data2()), {"w": jnp.ones(2)}
    killed = tmp_path / "9.orbax-checkpoint-tmp"
    killed.mkdir()
    with Checkpoints(tmp_path) as reader:
        assert reader.latest() is None, "a half-written step counts for nothing"
        time.sleep(0.2)  # Orbax clears in the background
        assert killed.exists(), "a reader must not clear a writer's work"
        with pytest.raises(AssertionError, match="reading only"):
            reader.save(1, **trees, data_iterator=stream(), extra={})
    with Checkpoints(tmp_path, CFG) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, **trees | dict(params=small, opt=small), data_iterator=stream(), extra={})
        checkpoints.wait()
        assert checkpoints.latest() == 4
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]


def test_what_a_kill_left_of_a_deleted_checkpoint_is_cleared(tmp_path):
    with Checkpoints(tmp_path, config.Checkpoint(keep=3)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, **state(data2()), data_iterator=stream(), extra=EXTRA)
    shutil.rmtree(tmp_path / "1" / "params")
    with Checkpoints(tmp_path, CFG) as checkpoints:
        assert checkpoints.steps() == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    with Checkpoints(tmp_path, config.Checkpoint(keep=1, keep_every_steps=2)) as checkpoints:
        assert checkpoints.steps() == [2, 3], "what is kept for good"
    with Checkpoints(tmp_path, config.Checkpoint(keep=1)) as checkpoints:
        assert checkpoints.steps() == [3]


def test_errors_name_what_differs(saved, tmp_path):
    folder, trees, _ = saved
    wide = abstract(state(data2(), n=16))
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(config.ConfigError, match=r"half is bfloat16\[8\] in the checkpoint and bfloat16\[16\]"):
            checkpoints.restore_weights(7, params=wide["params"], router_bias={})
        with pytest.raises(config.ConfigError, match=r"; and \d+ more. Use the configuration"):
            checkpoints.restore(7, **wide, data_iterator=stream())
        renamed = abstract(trees["params"]) | {"new": jax.ShapeDtypeStruct((2,), jnp.float32)}
        with pytest.raises(config.ConfigError, match=r"params/new is float32\[2\] here and not in the checkpoint"):
            checkpoints.restore_weights(7, params=renamed, router_bias={})
        retyped = abstract(trees)
        retyped["params"]["half"] = jax.ShapeDtypeStruct((8,), jnp.float32)
        with pytest.raises(config.ConfigError, match="half is bfloat16"):
            checkpoints.restore(7, **retyped, data_iterator=stream())
        with pytest.raises(config.ConfigError, match="step 8, but .* holds 7. Name one of these"):
            checkpoints.restore_weights(8, params=abstract(trees["params"]), router_bias={})
    with pytest.raises(config.ConfigError, match="there is none"):
        Checkpoints(tmp_path / "nowhere")
    with Checkpoints(tmp_path, CFG) as checkpoints, pytest.raises(config.ConfigError, match="there is none"):
        checkpoints.restore_weights(None, params=abstract(trees["params"]), router_bias={})
