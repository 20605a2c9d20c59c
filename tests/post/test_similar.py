"""Texts that say the same."""

from __future__ import annotations

import pytest

from llamax.post.similar import distinct, grams, jaccard, normal


@pytest.mark.parametrize(
    ("a", "b"), [("It is 4.", "it  is\n4"), ("ﬁne", "Fine!"), ("**Answer:** 5", "answer 5"), ("=>", " = > ")]
)
def test_the_same_but_for_signs(a, b):
    assert normal(a) == normal(b) and distinct([a, b], 1.0) == [0]


def test_shares_of_runs_of_three_words():
    a, b = "one two three four five", "one two three four six"
    assert grams(a) & grams(b) == {("one", "two", "three"), ("two", "three", "four")}
    assert jaccard(grams(a), grams(b)) == 2 / 4 and jaccard(grams(a), grams("ten")) == 0
    assert distinct([a, b], 0.6) == [0, 1] and distinct([a, b], 0.5) == [0]
    assert distinct([b, "x", a, "x", "y y"], 0.5) == [0, 1, 4] and distinct([], 0.5) == []
    assert distinct(["-3", "3", "4"], 0.8) == [0, 2]  # signs alone do not tell answers apart: the first is kept
