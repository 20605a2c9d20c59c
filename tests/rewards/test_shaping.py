"""Lengths and repetitions beside TRL's."""

from __future__ import annotations

import numpy as np
import pytest

from llamax.rewards.shaping import overlong, repetition
from tests.losses import goldens

GIVEN = goldens.family("shaping")


def test_trl_finds_the_same_answers_too_long():
    asked = goldens.MANIFEST["families"]["shaping"]["overlong"]
    found = [overlong(int(n), asked["max_len"], asked["cache"]) for n in GIVEN["in__lengths"]]
    np.testing.assert_allclose(found, GIVEN["out__overlong"], rtol=1e-12)
    assert overlong(90, 100, 20) == goldens.MANIFEST["closed_form"]["overlong_90_of_100_cache20"]


def test_trl_finds_the_same_repetitions():
    asked = goldens.MANIFEST["families"]["shaping"]["repetition_n2"]
    answers = [[int(t) for t in row if t >= 0] for row in GIVEN["in__rep_ids"]]
    found = [repetition(tokens, asked["n"], asked["max_penalty"]) for tokens in answers]
    np.testing.assert_allclose(found, GIVEN["out__repetition_n2"], rtol=1e-12)


@pytest.mark.parametrize("tokens", [[], [7]])
def test_what_is_shorter_than_one_repeats_nothing(tokens):
    assert repetition(tokens, 2) == 0
