"""Advantages beside TRL's and verl's; closed forms; rewards that were not given; a slow twin; mistakes."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from llamax.config import Advantage
from llamax.post import advantages
from tests.losses import goldens
from tests.mutants import mutant

CLOSED = goldens.MANIFEST["closed_form"]
FAMILY = goldens.MANIFEST["families"]["advantages"]
PROMPTS = np.repeat(np.arange(3), 4)
SCALES = {"group": "prompt", "batch": "batch", "none": "none"}
TRL_ADVANTAGE = dict(rtol=1e-6, atol=1e-7)  # TRL's rewards are float32
VERL = {  # their names of ours
    "grpo": Advantage(scale="prompt"),
    "drgrpo": Advantage(),
    "passk": Advantage(baseline="best"),
    "rloo": Advantage(baseline="leave_one_out"),
}


def of_case(name: str, module: ModuleType = advantages) -> np.ndarray:
    asked, given = FAMILY[name], goldens.family("advantages")
    cfg = Advantage(scale=SCALES[asked["scale"]], eps=asked["eps"], each=asked["agg"] == "normalize_then_sum")
    rewards = given["in__rewards_nan" if name == "nan_rewards" else "in__rewards"]
    return module.of_kinds(rewards, asked["weights"], PROMPTS, cfg)


@pytest.mark.parametrize("name", FAMILY)
def test_trl_gives_the_same(name):
    np.testing.assert_allclose(of_case(name), goldens.wanted(f"advantages/{name}")["advantages"], **TRL_ADVANTAGE)


@pytest.mark.parametrize("name", VERL)
def test_verl_gives_the_same(name):
    given = goldens.family("adv_verl")
    found = advantages.advantages(given["in__scores"], given["in__group"], VERL[name])
    np.testing.assert_allclose(found, given[f"out__{name}"], rtol=1e-10, atol=1e-12)


def test_one_right_of_four_by_hand():
    def of(**how):
        return advantages.advantages(np.array([1.0, 0, 0, 0]), np.zeros(4, int), Advantage(**how))

    np.testing.assert_allclose(of(scale="prompt", eps=0.0), CLOSED["grpo_adv_1000_ddof1_eps0"])
    np.testing.assert_allclose(of(), CLOSED["drgrpo_adv_1000"])
    np.testing.assert_allclose(of(baseline="leave_one_out"), CLOSED["rloo_adv_1000"])
    assert of(baseline="best").tolist() == [1, 0, 0, 0]


BASELINES, NORMS = ("prompt", "leave_one_out", "batch", "best"), ("none", "prompt", "batch")


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", NORMS)
def test_equal_rewards_are_worth_exactly_nothing(baseline, scale):
    """0.1 three times: its mean in floats is another number, and divided by a deviation of 1e-17 it would be 1."""
    rewards = np.full(9, 0.1)
    found = advantages.advantages(rewards, np.repeat(np.arange(3), 3), Advantage(baseline=baseline, scale=scale, eps=0))
    assert found.tolist() == [0.0] * 9
    assert not advantages.informative(rewards, np.repeat(np.arange(3), 3))


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", NORMS)
def test_what_was_not_scored_moves_nothing(baseline, scale):
    """NaN, or infinite: as if the sample had not been drawn, and worth nothing itself. In any order."""
    rng = np.random.default_rng(0)
    prompts, rewards = np.repeat(np.arange(5), 4), rng.random(20)
    rewards[[3, 7, 8, 9, 10, 11]] = np.nan, np.inf, *[np.nan] * 4
    cfg, there = Advantage(baseline=baseline, scale=scale), np.isfinite(rewards)
    found = advantages.advantages(rewards, prompts, cfg)
    assert not found[~there].any() and np.isfinite(found).all()
    np.testing.assert_allclose(found[there], advantages.advantages(rewards[there], prompts[there], cfg), rtol=1e-12)
    order = rng.permutation(20)
    np.testing.assert_allclose(advantages.advantages(rewards[order], prompts[order], cfg), found[order], rtol=1e-9)
    assert not advantages.advantages(np.full(4, np.nan), np.zeros(4, int), cfg).any()
    assert advantages.advantages(np.array([5.0]), np.zeros(1, int), cfg)[0] == 0, "one sample alone"


def test_a_batch_s_mean_and_deviation_are_as_reinforce_has_them():
    rng = np.random.default_rng(1)
    rewards = rng.random(12)
    found = advantages.advantages(rewards, PROMPTS, Advantage(baseline="batch", scale="batch", eps=0.0))
    np.testing.assert_allclose(found, (rewards - rewards.mean()) / rewards.std(ddof=1))


def test_prompts_that_teach_something():
    rewards = np.array([1, 1, 0, 1, 0, 0, np.nan, 1, 0.5, np.nan, np.nan, np.nan])
    assert advantages.informative(rewards, PROMPTS) == {0, 1}


MUTATIONS = [  # (what stands there once, what is put there, the golden that has to notice)
    ("R.std(ddof=1)", "R.std(ddof=0)", "group"),
    ("_std(R_N[places]) + cfg.eps)", "_std(R_N[places]))", "group"),
    ('"batch": [np.flatnonzero(scored_N)]', '"batch": _groups(prompt_N, scored_N)', "batch"),
    ("centred = R - R.mean()", "centred = R.mean() - R", "none"),
    ('_divided(_centred(A_N, "batch"), _std(A_N) + cfg.eps)', "A_N", "gdpo"),
    ("rewards_NR * weights_R, 0)", "rewards_NR, 0)", "none"),
    ("scored_N = np.isfinite(R_N)", "scored_N = R_N == R_N; R_N = np.nan_to_num(R_N); scored_N |= True", "nan_rewards"),
]


@pytest.mark.parametrize(("old", "new", "name"), MUTATIONS, ids=[old[:30] for old, *_ in MUTATIONS])
def test_the_goldens_notice(old, new, name):
    theirs = goldens.wanted(f"advantages/{name}")["advantages"]
    assert not np.allclose(of_case(name, mutant("llamax.post.advantages", old, new)), theirs, **TRL_ADVANTAGE)
