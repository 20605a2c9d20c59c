"""What a run trains and what it leaves as it is: rules, and steps that leave what is frozen as it was, to the bit."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from llamax import config
from llamax.config import ConfigError
from llamax.config_dict import merged
from llamax.model import tuned
from llamax.model.seam import Seam, make_seam
from llamax.model.skeleton import skeleton
from llamax.optim.build import optimizer
from llamax.parallel import place
from llamax.parallel.mesh import make_mesh
from llamax.train.programs import build
from llamax.train.state import init
from llamax.train.step import make_gradient, make_step
from tests.model import twins
from tests.tolerances import MESH_GRAD

MODEL = replace(twins.TINY, plan=((("rope_chunk+moe",), 1),), vision=twins.VISION)
RUN = config.Run(
    model=MODEL,
    data=config.Data(sources={"a": config.Source(), "b": config.Source()}),
    optim=config.Optim(peak_lr=3e-2, warmup_steps=1),
    losses=config.Losses(router_balance=0.0),  # a statistic of each micro-batch
    router_bias=config.RouterBias(rate=1e-2),
    train=config.Train(steps=100, accumulate=2),
)
ALIGNING = ("*", "!vision/*", "!projector")
ROUTERS = ("*/router",)


@functools.cache
def bones_of(*rules: str, seam: Seam = Seam()):  # noqa: B008, it is immutable
    how = dict(patch_id=twins.PATCH, train=RUN.train)
    return skeleton(MODEL, seam, tune=config.Tune(freeze=rules), **how)


def by_path(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}


# ---------------------------------------------------------------------------------------------------------- the rules

MOE = "stack/segment0/slot0/moe"


@pytest.mark.parametrize(
    "rules, path, trained",
    [
        ((), "embed", True),
        (ALIGNING, "embed", False),
        (ALIGNING, f"{MOE}/gate", False),
        (ALIGNING, "vision/blocks/query/weight", True),
        (ALIGNING, "vision/adapter_out/weight", True),
        (ALIGNING, "projector", True),
        (ROUTERS, f"{MOE}/router", False),
        (ROUTERS, f"{MOE}/gate", True),
        (("!vision/*", "*"), "projector", None),  # the last one counts: nothing is left
        (("*", "!*/moe/*", "*/shared/*"), f"{MOE}/shared/up", False),
        (("*", "!*/moe/*", "*/shared/*"), f"{MOE}/up", True),
        (("EMBED",), "embed", None),  # no pattern of ours
    ],
)
def test_of_several_rules_that_match_the_last_one_counts(rules, path, trained):
    params = bones_of().axes
    if trained is None:
        with pytest.raises(ConfigError):
            tuned.trained(config.Tune(freeze=rules), params)
        return
    mask = tuned.trained(config.Tune(freeze=rules), params)
    assert dict(zip(tuned.paths_of(mask), jax.tree.leaves(mask), strict=False)).keys() == set(tuned.paths_of(params))
    for key in path.split("/"):
        mask = mask[key]
    assert mask is trained


def test_a_tree_is_two_and_one_again():
    bones = bones_of(*ALIGNING)
    params = bones.shapes()[0]
    trained, frozen = bones.split(params)
    assert trained.keys() == {"vision", "projector"} and "vision" not in frozen and "projector" not in frozen
    assert merged(trained, frozen) == params == merged(frozen, trained)
    assert bones_of().split(params) == (params, {})


@pytest.mark.parametrize(
    "rules, said",
    [
        (("*/ruter",), r"'\*/ruter' in --config.tune.freeze, but no .*nearest are router.*\('\*/router',\)"),
        (("*", "!vison/*"), r"'!vison/\*' in .*nearest are vision.*freeze=\"\('\*', '!vision/\*'\)\""),
        (("embd",), r"nearest are embed.*freeze=\"\('embed',\)\""),
        (("*",), r"it freezes every parameter.*!PATTERN after the others"),
    ],
)
def test_rules_that_do_not_suit_the_model_are_refused(rules, said):
    with pytest.raises(ConfigError, match=said):
        bones_of(*rules)


# ---------------------------------------------------------------------------------------------------------- the step

TWO = twins.batch(tiles=(2, 1))
ROWS = jax.tree.map(lambda x: np.concatenate([x, x]), TWO)
POISONED = ROWS._replace(loss_weights=np.where(ROWS.loss_weights > 0, np.inf, 0).astype(np.float32))
PARTS = ("*", "!*/moe/up", "!vision/blocks/*", "!embed")  # of a layer, of the vision side, of the rest


def started(bones, tx):
    """A state whose parameters have no value that initialisation gives: all gradients are there."""
    fresh = jax.eval_shape(lambda: init(bones, tx, 0, RUN.health.spike_window))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0.2, 0.2, x.shape).astype(np.float32), fresh.params)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), fresh)
    return zeros._replace(params=params, opt=tx.init(bones.split(params)[0]))


def optimizer_of(bones):
    return optimizer(RUN.optim, RUN.train.steps, bones.split(bones.kinds)[0])


def check(bones, states, metrics):
    """After steps of which the last was bad."""
    first, before, last = states[0], states[-2], states[-1]
    trained, frozen = (by_path(part) for part in bones.split(first.params))
    assert trained and frozen
    after = by_path(last.params)
    for path, x in frozen.items():
        np.testing.assert_array_equal(after[path], x, err_msg=path)
    for path, x in trained.items():
        assert (after[path] != x).any(), path
    for moment in ("mu", "nu"):
        moments = by_path(optax.tree.get(last.opt, moment))
        assert {path: x.shape for path, x in moments.items()} == {path: x.shape for path, x in trained.items()}
    for path, x in by_path(last.router_bias).items():
        np.testing.assert_array_equal(x, 0, err_msg=path)  # their router is frozen
    for path, x in by_path((before.params, before.opt)).items():
        np.testing.assert_array_equal(by_path((last.params, last.opt))[path], x, err_msg=path)
    assert metrics.skipped == 1


def test_what_is_frozen_stays_to_the_bit_and_the_rest_has_its_own_gradient():
    """Two micro-batches, weight decay, a bad step. The gradient is part of the whole model's, from Adam's moment."""
    bones = bones_of(*PARTS)
    tx = optimizer_of(bones)
    step, states = twins.quick_jit(make_step(RUN, bones, tx)), [started(bones, tx)]
    for batch in (ROWS, ROWS, POISONED):
        state, metrics = step(states[-1], batch)
        states.append(jax.device_get(state))
    check(bones, states, metrics)
    assert metrics.grad_squares.keys() == {"layer", "vision", "embed"}
    clip = min(1.0, RUN.optim.clip_norm / float(step(states[0], ROWS)[1].grad_norm))
    got = by_path(jax.tree.map(lambda m: m / (1 - RUN.optim.b1) / clip, optax.tree.get(states[1].opt, "mu")))
    once = replace(RUN, train=replace(RUN.train, accumulate=1))
    every = by_path(twins.quick_jit(make_gradient(once, bones_of()))(states[0].params, states[0].router_bias, TWO)[0])
    assert set(got) == {path for path in every if path.startswith("vision/blocks/")} | {"embed", f"{MOE}/up"}
    for path, x in got.items():
        np.testing.assert_allclose(x, every[path], **MESH_GRAD, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("rules", [ALIGNING, ROUTERS], ids=str)
def test_so_does_it_where_masters_rest_elsewhere_and_are_given_away(rules):
    """The real step with its places pinned: masters split over more than they are computed with."""
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    bones = bones_of(*rules, seam=make_seam(mesh, RUN.train))
    tx = optimizer_of(bones)
    run = replace(RUN, mesh=config.Mesh(data=2, rules="zero"), tune=config.Tune(freeze=rules))
    step, shapes = build(run, bones, tx, mesh)
    state = jax.device_put(started(bones, tx), jax.tree.map(lambda x: x.sharding, shapes))
    states = [jax.device_get(state)]
    for batch in (ROWS, ROWS, POISONED):
        state, metrics = step(state, place.put_batch(batch, mesh=mesh))
        states.append(jax.device_get(state))
    assert step._cache_size() == 1
    check(bones, states, metrics)
    blocks = {"vision", "vision_rest", "projector"}
    assert metrics.grad_squares.keys() == (blocks if rules == ALIGNING else blocks | {"layer", "embed", "head", "norm"})
