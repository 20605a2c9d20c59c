"""The losses that compare answers beside the slow twin, and what may not change them."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llamax import config
from llamax.losses.compared import places
from llamax.losses.preference import PREFERENCE, Compared, compare, count, margins, preference
from tests.losses.preference_rows import MISMATCHED, OF_THE_MICRO_BATCH, SETTINGS, Rows, S, random_rows, slow
from tests.tolerances import PREFERENCE_64, PREFERENCE_SLOPE

ROWS = random_rows()


@partial(jax.jit, static_argnames="names")
def program(logp, sides, ref, positions, collisions, names=tuple(SETTINGS)):
    """(sum, comparisons, gradient of the sum) of every setting."""

    def one(cfg, logp):
        found = preference(compare(logp, sides, ref, positions, S, cfg, collisions), cfg)
        return found.num, found.den

    found = {}
    for name in names:
        (num, den), grad = jax.value_and_grad(partial(one, SETTINGS[name]), has_aux=True)(logp)
        found[name] = num, den, grad
    return found


def in_float64(rows: Rows, **which) -> dict[str, tuple]:
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, program(*rows.arrays(), **which))


@cache
def base() -> dict[str, tuple]:
    return in_float64(ROWS)


def same(found: dict, wanted: dict, **tolerance) -> None:
    for name in found:
        for x, y in zip(found[name], wanted[name], strict=True):
            np.testing.assert_allclose(x, y, **(tolerance or PREFERENCE_64), err_msg=name)


def test_settings_cover_every_loss_and_every_knob():
    assert {name for cfg in SETTINGS.values() for name in cfg.weights} == set(PREFERENCE)
    assert {f for f in config.PreferenceLosses.__dataclass_fields__} == set(PREFERENCE)
    for knob in config.Preference.__dataclass_fields__.keys() - {"centring"}:  # of reward models: test_reward.py
        assert any(getattr(cfg, knob) != getattr(config.Preference(), knob) for cfg in SETTINGS.values()), knob


@pytest.mark.parametrize("name", SETTINGS)
def test_the_slow_twin_gives_the_same(name):
    num, den, grad = base()[name]
    total, n = slow(ROWS, SETTINGS[name])
    np.testing.assert_allclose(num, total, **PREFERENCE_64)
    assert den == n == 7
    rng = np.random.default_rng(1)
    for _ in range(2):  # the slope along a direction, by central differences
        way, step = rng.normal(size=ROWS.logp.shape), 1e-5
        there, back = (Rows(ROWS.logp + sign * step * way, *ROWS.arrays()[1:]) for sign in (1, -1))
        slope = (slow(there, SETTINGS[name], ROWS)[0] - slow(back, SETTINGS[name], ROWS)[0]) / (2 * step)
        np.testing.assert_allclose((grad * way).sum(), slope, **PREFERENCE_SLOPE)


def test_every_setting_is_another_loss():
    values = [round(float(num), 6) for num, _, _ in base().values()]
    assert len(set(values)) == len(values)


# ------------------------------------------------------------------------------------------ what changes nothing


def test_the_order_of_tokens_in_a_row_changes_nothing():
    order = np.random.default_rng(2).permutation(ROWS.logp.shape[1])
    found = in_float64(ROWS.map(lambda x: x[:, order]))
    same({name: (num, den, grad[:, np.argsort(order)]) for name, (num, den, grad) in found.items()}, base())


def test_the_order_of_rows_changes_nothing():
    order = np.array([2, 0, 3, 1])
    found = in_float64(ROWS.map(lambda x: x[order]))
    same({name: (num, den, grad[np.argsort(order)]) for name, (num, den, grad) in found.items()}, base())


def test_padding_changes_nothing():
    names = ("sigmoid", "per_token", "ld", "wpo", "bco_shift", "aot", "nll", "kto")
    found = in_float64(ROWS.map(lambda x: np.pad(x, ((0, 2), (3, 5)))), names=names)
    same({name: (num, den, grad[:-2, 3:-5]) for name, (num, den, grad) in found.items()}, base())
    assert all((grad[-2:] == 0).all() for _, _, grad in found.values())


def test_a_split_adds_up_but_for_statistics_of_the_micro_batch():
    here = [np.arange(4) % 2 == of for of in range(2)]  # each second row, as step.each_nth_row splits; the others empty
    parts = [in_float64(ROWS.map(lambda x, of=of: np.where(of[:, None], x, 0).astype(x.dtype))) for of in here]
    added = {name: tuple(sum(part[name][i] for part in parts) for i in range(3)) for name in SETTINGS}
    same({name: added[name] for name in SETTINGS.keys() - OF_THE_MICRO_BATCH}, base())
    for name in OF_THE_MICRO_BATCH:  # which really are
        assert abs(added[name][0] - base()[name][0]) > 1e-4, name
        assert added[name][1] == base()[name][1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_in_no_comparison_may_be_anything(bad):
    """Prompts, padding, and comparisons beyond the S that a row may hold."""
    outside = ROWS.sides == 0
    broken = [np.where(outside, bad, x) if x.dtype == float else x for x in ROWS.arrays()]
    found = in_float64(Rows(*broken))
    same(found, base())
    assert all((grad[outside] == 0).all() for _, _, grad in found.values())


HOLES = {"chosen": ("chosen", "ref_chosen", "n_chosen", "chosen_tail")}  # has_X: what it speaks for
HOLES["rejected"] = tuple(field.replace("chosen", "rejected") for field in HOLES["chosen"])
HOLES["mismatched"] = ("mismatched", "ref_mismatched")


@jax.jit
def of_answers(bad, spoil):
    """(sum, gradient for all of the answers' numbers) of every setting, what is not there being `bad` if `spoil`."""
    found = {}
    for name, cfg in SETTINGS.items():
        clean = compare(*(jnp.asarray(x) for x in ROWS.arrays()[:4]), S, cfg, ROWS.collisions)
        there = {field: getattr(clean, f"has_{of}") for of, fields in HOLES.items() for field in fields}
        there["weight"] = clean.has_chosen & clean.has_rejected
        there = {field: has for field, has in there.items() if getattr(clean, field) is not None}
        numbers = {field: jnp.where(has | ~spoil, getattr(clean, field), bad) for field, has in there.items()}
        found[name] = jax.value_and_grad(lambda x, cfg=cfg, c=clean: preference(c._replace(**x), cfg).num)(numbers)
    return found


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_not_there_may_be_anything(bad):
    """At the level of answers: has_chosen and has_rejected decide, not what the numbers are."""
    with jax.enable_x64(True):
        wanted, found = of_answers(bad, np.bool_(False)), of_answers(bad, np.bool_(True))
    jax.tree.map(partial(np.testing.assert_allclose, **PREFERENCE_64), found, wanted)


@pytest.mark.slow
def test_rows_cut_over_devices_change_nothing():
    """Rows over `data`, the tokens of a row over `context`: the program that the step is."""
    mesh = jax.make_mesh((2, 4), ("data", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.enable_x64(True):
        rows = jax.device_put(ROWS.arrays(), NamedSharding(mesh, P("data", "context")))
        same(jax.tree.map(np.asarray, program(*rows)), base())


# ------------------------------------------------------------------------------------------------- the smaller parts


def test_count_is_the_denominator_whatever_the_losses():
    assert count(ROWS.sides) == 7 == base()["sigmoid"][1]
    assert count(np.zeros((2, 8), np.int32)) == 0
    assert count(np.array([[MISMATCHED + 1, 3, 0, -3, 1], [-2, -2, 0, 0, 0]], np.int32)) == 3


def test_places_count_the_trained_tokens_before():
    sides = np.array([[0, 1, 0, 1, 0, -1, -1, 0, 0, 1]], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0, 4]], np.int32)
    trained = sides[0] != 0
    np.testing.assert_array_equal(places(sides, positions)[0, trained], np.array([0, 1, 0, 1, 2]))


def test_nothing_to_compare_is_a_loss_of_zero_with_no_gradient():
    for num, den, grad in in_float64(ROWS.map(np.zeros_like)).values():
        assert num == den == 0 and (grad == 0).all()


def test_margins_are_the_implicit_rewards():
    cfg = SETTINGS["sigmoid"]
    with jax.enable_x64(True):
        found = compare(ROWS.logp, ROWS.sides, ROWS.ref, ROWS.positions, S, cfg)
        chosen, rejected = margins(found, cfg)
        num = preference(found, cfg).num
    pairs = np.asarray(found.has_chosen & found.has_rejected)
    for row, k in np.ndindex(pairs.shape):
        for reward, side in ((chosen, k + 1), (rejected, -k - 1)):
            of = ROWS.sides[row] == side
            wanted = cfg.beta * (ROWS.logp[row, of] - ROWS.ref[row, of]).sum()
            np.testing.assert_allclose(reward[row, k], wanted, **PREFERENCE_64)
    np.testing.assert_allclose(np.log1p(np.exp(rejected - chosen))[pairs].sum(), num, **PREFERENCE_64)


def test_far_apart_answers_stay_finite():
    """Two thousand nats apart either way, in float32: no exponential overflows, nor its gradient."""
    cfgs = [SETTINGS[name] for name in ("forward_kl", "js", "alpha", "discopop", "exo_pair", "orpo", "kto")]

    @jax.jit
    def losses(x):
        def one(x, cfg):
            y, yes = jnp.full((1, 1), -2000.0), jnp.ones((1, 1), bool)
            compared = Compared(x, y, y, y, yes / 1, yes / 1, yes, yes)
            if cfg.losses.kto:
                compared = compared._replace(mismatched=x, ref_mismatched=y, has_mismatched=yes)
            return preference(compared, cfg).num

        return [jax.value_and_grad(one)(x, cfg) for cfg in cfgs]

    for x in (0.0, -4000.0):
        for value, grad in losses(jnp.full((1, 1), x)):
            assert np.isfinite(value) and np.isfinite(grad).all()
