"""Weights on a schedule over tokens, and weights changed in mid-run: shares, order, history. The streams themselves are
in test_changed_mixture.py."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamax.config import ConfigError, Source
from llamax.data import schedule
from llamax.data.mixture import CYCLE, Deal, Dealt, Mixture
from llamax.data.schedule import STREAMS, began, followed, plan

MEANS = {"a": 100.0, "b": 40.0, "c": 1000.0, "p": 150.0}  # tokens a document
PICTURES = ["p"]


def sources(**of):
    """`a=0.5` or `a=(0.5, (1000, 0.2))`: a weight, and the points of its schedule."""
    return {name: Source("", x[0], x[1:]) if isinstance(x, tuple) else Source("", x) for name, x in of.items()}


def planned(*of, opened=(), steps=0.5, window_docs=20):
    """(share of multimodal steps, streams) of a history: each of `of` from the windows `opened` on."""
    history = began(of[0])
    for number, (weights, windows) in enumerate(zip(of[1:], opened, strict=True), start=1):
        history = followed(history, weights, number, dict(zip(STREAMS, windows, strict=True)))
    return plan(history, PICTURES, steps, MEANS.__getitem__, lambda stream, weights: window_docs)


def interpolated(source: Source, tokens: np.ndarray) -> np.ndarray:
    """The twin of `Source.weight_at`."""
    points = np.array([(0, source.weight), *source.later], float)
    return np.interp(tokens, points[:, 0], points[:, 1])


def expected_tokens(of: dict[str, Source], total: float) -> dict[str, float]:
    """Tokens of each source among the first `total`: its share, integrated by a fine sum."""
    tokens = (np.arange(200_000) + 0.5) * total / 200_000
    weights = {name: interpolated(source, tokens) for name, source in of.items()}
    return {name: total * float(np.mean(w / sum(weights.values()))) for name, w in weights.items()}


def read_until(stream, total: float) -> dict[str, float]:
    """Tokens of each source, by its mean, in the documents of a stream up to `total` of them; walked one by one."""
    read = dict.fromkeys(stream.names, 0.0)
    for n in itertools.count():
        if sum(read.values()) >= total:
            return read
        name = stream.names[stream.mixture[n][0]]
        read[name] += MEANS[name]


def test_a_weight_is_linear_between_points_and_constant_after():
    source = Source("", 0.0, ((100, 1.0), (300, 0.5), (301, 2.0)))
    asked = {0: 0, 50: 0.5, 100: 1.0, 200: 0.75, 300: 0.5, 300.5: 1.25, 301: 2.0, 1e12: 2.0}
    assert [source.weight_at(tokens) for tokens in asked] == pytest.approx(list(asked.values()))
    assert Source("", 0.3).weight_at(1e9) == 0.3
    tokens = np.linspace(0, 400, 97)
    np.testing.assert_allclose([source.weight_at(t) for t in tokens], interpolated(source, tokens), atol=1e-12)
    assert schedule.shares({"x": source, "y": Source("", 1.0)}, 50) == pytest.approx({"x": 1 / 3, "y": 2 / 3})


SCHEDULES = {
    "anneal": sources(a=(0.8, (200_000, 0.1)), b=(0.2, (200_000, 0.9))),
    "begins and ends at nothing": sources(a=(1.0, (150_000, 0.0)), b=(0.0, (50_000, 0.0), (150_000, 0.7)), c=0.1),
    "a jump": sources(a=(0.9, (100_000, 0.9), (100_001, 0.2)), b=0.3),
    "long documents, seldom": sources(a=1.0, c=(0.0, (1_000_000, 0.02))),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_shares_of_tokens_follow_the_schedule(name):
    """At every point the tokens read so far are the integral of the weights, to two documents of each source."""
    _, streams = planned(SCHEDULES[name])
    for total in (20_000, 90_000, 170_000, 400_000):
        read, expected = read_until(streams["text"], total), expected_tokens(SCHEDULES[name], total)
        for source in read:
            assert abs(read[source] - expected[source]) < 2 * max(MEANS[s] for s in read), (source, total)


def test_both_streams_follow_a_schedule():
    """Over all steps every source has its share, though pictures begin at nothing; steps with pictures stay as many."""
    of = sources(a=0.6, b=(0.4, (300_000, 0.1)), p=(0.0, (300_000, 0.4)))
    share, streams = planned(of, steps=0.5)
    assert share == Fraction(1, 2) and streams.keys() == {"text", "multimodal"}
    for total in (50_000, 200_000, 600_000):
        parts = [read_until(streams[stream], total / 2) for stream in STREAMS]
        for name, tokens in expected_tokens(of, total).items():
            read = sum(part.get(name, 0.0) for part in parts)
            assert read == pytest.approx(tokens, rel=0.01, abs=4 * MEANS[name]), (name, total)


def test_what_weighs_nothing_anywhere_is_no_part_of_it():
    share, streams = planned(sources(a=0.5, b=0.0, p=0.0))
    assert share == 0 and [planned.names for planned in streams.values()] == [["a"]]
    share, streams = planned(sources(a=(0.5, (10, 0.1)), p=(0.0, (10, 0.1))))
    assert share == Fraction(1, 2) and set(streams["multimodal"].names) == {"a", "p"} and streams["text"].names == ["a"]
    assert planned(sources(p=0.5))[0] == 1
    # While pictures fill their steps, text of a has no place there; when they do not, a is gone. In between it has one.
    of = sources(p=(1.0, (100, 0.0)), a=(1.0, (100, 0.0)), b=(0.0, (100, 1.0)))
    assert set(planned(of)[1]["multimodal"].names) == {"p", "a", "b"}


def test_pictures_that_weigh_more_than_their_steps_are_refused_wherever_they_do():
    for later in (((100, 0.7),), ((100, 0.7), (200, 0.1))):
        with pytest.raises(ConfigError, match="weigh 0.700 of all tokens.*multimodal_steps=0.7 or more"):
            planned(sources(a=(1.0, (100, 0.3), (200, 0.9)), p=(0.0, *later)))


def test_the_order_is_a_pure_function_of_the_number():
    of = SCHEDULES["begins and ends at nothing"]
    numbers = [*range(0, 6000, 7), 10**6, 10**12]
    one, two = (planned(of)[1]["text"].mixture for _ in range(2))
    forward = [one[n] for n in numbers]
    assert [two[n] for n in reversed(numbers)] == forward[::-1]


def test_long_schedules_are_read_in_short_cycles():
    """3 trillion tokens: each of the 256 cycles has 10^8 documents, of which only a few thousand are ever listed."""
    of = sources(a=(1.0, (3e12, 0.5)), b=(0.0, (3e12, 0.5)))
    mixture = planned(of)[1]["text"].mixture
    for part in (0.0, 0.3, 0.999):
        share = schedule.shares(of, part * 3e12)
        first = n_at(mixture, part * 3e12)
        counts = Counter(mixture[first + n][0] for n in range(20_000))
        tokens = {"a": counts[0] * MEANS["a"], "b": counts[1] * MEANS["b"]}
        assert tokens["b"] / sum(tokens.values()) == pytest.approx(share["b"], abs=5e-3)
        assert len(mixture._cycle(first).source) <= CYCLE


def n_at(mixture: Mixture, tokens: float) -> int:
    """The first document after so many tokens, by halving."""
    low, high = 0, 2**50
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if mixture.tokens(middle) >= tokens else (middle + 1, high)
    return low


POINTS = st.lists(st.tuples(st.integers(1, 40_000), st.sampled_from([0.0, 0.2, 1.0])), max_size=3)
SOURCE = st.tuples(st.sampled_from([0.0, 0.5, 1.0]), POINTS)


def text_source(of) -> Source:
    weight, points = of
    return Source("", weight, tuple(sorted({tokens: (tokens, w) for tokens, w in points}.values())))


@given(SOURCE, SOURCE, SOURCE)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_schedule_takes_every_document_once_and_in_order(a, b, p):
    of = {"z": Source("", 0.3)} | {name: text_source(x) for name, x in zip("abp", (a, b, p), strict=True)}
    means = MEANS | {"z": 70.0}
    share, streams = plan(began(of), PICTURES, 1.0, means.__getitem__, lambda stream, weights: 20)
    for stream in streams.values():
        numbers = [stream.mixture[n] for n in range(900)]
        for source in range(len(stream.names)):
            taken = [position for i, position in numbers if i == source]
            assert taken == list(range(len(taken)))
            assert stream.mixture.taken(900)[source] == len(taken)


# ------------------------------------------------------------------------------------------------ changed in mid-run


def positions(streams, name: str, numbers: dict[str, int]) -> dict[str, list[int]]:
    """Where in a source's order the documents stand that each stream takes among its first `numbers`."""
    return {
        stream: [p for i, p in map(planned.mixture.__getitem__, range(numbers[stream])) if planned.names[i] == name]
        for stream, planned in streams.items()
    }


def test_windows_before_a_change_are_what_they_were_and_later_ones_follow_it():
    old, new = sources(a=0.8, b=0.2), sources(a=0.2, b=0.8)
    before, after = planned(old)[1]["text"], planned(old, new, opened=[(50, 0)])[1]["text"]
    assert [before.mixture[n] for n in range(1000)] == [after.mixture[n] for n in range(1000)]
    then = Counter(after.mixture[n][0] for n in range(1000, 6000))
    tokens = {i: then[i] * MEANS[name] for i, name in enumerate(after.names)}
    assert tokens[1] / sum(tokens.values()) == pytest.approx(0.8, abs=5e-3)
    for source in (0, 1):
        taken = [p for i, p in map(after.mixture.__getitem__, range(6000)) if i == source]
        assert taken == list(range(len(taken)))


def test_a_schedule_that_a_change_brings_goes_by_the_tokens_of_the_run():
    """b is to reach 0.5 after 100,000 tokens; the change comes at 60,000 or so, where it should be at 0.3."""
    of = sources(a=1.0, b=(0.0, (100_000, 1.0)))
    mixture = planned(sources(a=1.0, b=0.0), of, opened=[(30, 0)])[1]["text"].mixture
    assert mixture.tokens(600) == pytest.approx(60_000)
    read = mixture.taken(n_at(mixture, 90_000)) - mixture.taken(600)
    expected = {name: tokens - {"a": expected_tokens(of, 60_000)["a"], "b": expected_tokens(of, 60_000)["b"]}[name]
                for name, tokens in expected_tokens(of, 90_000).items()}  # fmt: skip
    assert read[0] * MEANS["a"] == pytest.approx(expected["a"], abs=200)
    assert read[1] * MEANS["b"] == pytest.approx(expected["b"], abs=200)


CHANGES = {
    "other weights": (sources(a=0.5, b=0.2, p=0.3), sources(a=0.2, b=0.6, p=0.2)),
    "pictures go": (sources(a=0.5, b=0.2, p=0.3), sources(a=0.5, b=0.2, p=0.0)),
    "pictures come": (sources(a=0.5, b=0.2, p=0.0), sources(a=0.5, b=0.2, p=0.3)),
    "all steps are full": (sources(a=0.5, b=0.2, p=0.3), sources(a=0.5, p=0.5, b=0.0)),
    "a schedule": (sources(a=0.5, b=0.2, p=0.3), sources(a=(0.9, (90_000, 0.1)), b=0.2, p=(0.0, (90_000, 0.3)))),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("back", [False, True])
def test_a_change_leaves_out_and_repeats_no_document(name, back):
    """Of a source that both streams read or may come to read: one position of its order each, and no gaps behind."""
    weights = [*CHANGES[name], *([CHANGES[name][0]] if back else [])]
    opened = [(9, 5), (40, 5 if name == "pictures go" else 31)]
    if name == "pictures come":
        opened = [(9, 0), (40, 31)]
    share, streams = planned(*weights, opened=opened[: len(weights) - 1])
    mixed = 3000 if share else 20 * opened[len(weights) - 2][1]  # without pictures this stream stands still
    for source in ("a", "b"):
        of = positions(streams, source, {"text": 3000, "multimodal": mixed})
        both = sorted(sum(of.values(), []))
        assert len(both) == len(set(both)), "none twice"
        end = min(max(of[stream]) for stream in (STREAMS if share and of["multimodal"] else ["text"]))
        assert len(both) > 100 and [p for p in both if p <= end] == list(range(end + 1)), "none left out"
    pictures = positions(streams, "p", {"text": 0, "multimodal": mixed})["multimodal"]
    assert pictures and pictures == list(range(len(pictures)))


@given(st.lists(st.tuples(st.integers(1, 7), st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_orders_that_are_dealt_anew_again_and_again_are_dealt_whole(rounds):
    """Each round: how the order is dealt (share of 8; 7 means that the first stream gets all), and how many documents
    each stream takes of it. Whatever they take, every place is taken once, and the places taken are at most behind by
    what one stream still has to take."""
    dealt, taken, seen = None, [0, 0], []
    for share, *more in rounds:
        new = (Deal(), Deal()) if share == 7 else (Deal(Fraction(share, 8)), Deal(1 - Fraction(share, 8), True))
        dealt = Dealt(new, tuple(taken), dealt)
        for stream in (0,) if share == 7 else (0, 1):
            seen += [dealt.position(stream, n) for n in range(taken[stream], taken[stream] + more[stream])]
            taken[stream] += more[stream]
    assert len(seen) == len(set(seen))
    all_to_one = Dealt((Deal(), Deal()), tuple(taken), dealt)
    rest = [all_to_one.position(0, taken[0] + n) for n in range(1000)]
    assert rest == sorted(rest)
    assert sorted([*seen, *rest]) == list(range(len(seen) + 1000))


def test_the_window_size_is_that_of_the_beginning():
    asked = []

    def window_docs(stream, weights):
        asked.append((stream, weights))
        return int(1 / weights["a"]) if stream == "text" else 5

    history = followed(began(sources(a=0.5, b=0.5)), sources(a=0.1, b=0.5, p=0.2), 3, {"text": 8, "multimodal": 0})
    _, streams = plan(history, PICTURES, 0.5, MEANS.__getitem__, window_docs)
    assert streams["text"].window_docs == 2 and streams["multimodal"].window_docs == 5
    assert [stream for stream, _ in asked] == ["text", "multimodal"]
    _, streams = plan(began(sources(a=(0.2, (100, 0.8)), b=0.5)), PICTURES, 0.5, MEANS.__getitem__, window_docs)
    assert streams["text"].window_docs == 1, "the fewest of the schedule's points"


def test_history():
    old, new = sources(a=0.5, b=(0.1, (100, 0.2))), sources(a=0.5, b=0.3)
    history = began(old)
    assert history == [{"step": 0, "text": 0, "multimodal": 0, "weights": {"a": [0.5, []], "b": [0.1, [[100.0, 0.2]]]}}]
    assert followed(history, old, 7, {"text": 3}) is history, "nothing new"
    changed = followed(history, new, 7, {"text": 3, "multimodal": 1})
    assert changed[0] == history[0] and changed[1]["step"] == 7 and len(history) == 1
    assert (changed[1]["text"], changed[1]["multimodal"]) == (3, 1)
    assert followed(changed, new, 9, {"text": 4, "multimodal": 2}) is changed
    assert followed(changed, old, 7, {"text": 3, "multimodal": 1}) == history, "taken back before it did anything"
    other = followed(changed, sources(a=1.0, b=0.3), 7, {"text": 3, "multimodal": 1})
    assert [entry["step"] for entry in other] == [0, 7] and other[1]["weights"]["a"] == [1.0, []]
    assert len(followed(changed, old, 9, {"text": 3, "multimodal": 2})) == 3, "one stream has gone on"
    assert followed(began(old), new, 0, {}) == began(new), "nothing has been read"
