"""Weights of the two streams, and the order in which they take documents."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from llamax.config import ConfigError
from llamax.data.mixture import CYCLE, TABLE, Deal, Mixture, Shuffled, deal_text, is_multimodal, two_streams


def overall(shares):
    """Token share of each source over all steps."""
    f = float(shares.multimodal_steps)
    names = {**shares.text, **shares.multimodal}
    return {name: (1 - f) * shares.text.get(name, 0) + f * shares.multimodal.get(name, 0) for name in names}


def test_two_streams_hold_the_overall_weights():
    weights = dict(web=3.0, code=1.0, drawings=0.5, clips=0.5)
    shares = two_streams(weights, ["drawings", "clips"], 0.4)
    assert overall(shares) == pytest.approx({name: w / 5 for name, w in weights.items()})
    assert sum(shares.text.values()) == pytest.approx(1) and sum(shares.multimodal.values()) == pytest.approx(1)
    assert set(shares.text) == {"web", "code"}
    assert shares.multimodal["drawings"] == pytest.approx(0.1 / 0.4)


def test_only_one_kind_of_source_makes_one_stream():
    text = two_streams(dict(a=1, b=0), [], 0.5)
    assert (text.text, text.multimodal, text.multimodal_steps) == ({"a": 1.0}, {}, 0)
    pictures = two_streams(dict(a=1, b=1), ["a", "b"], 0.5)
    assert (pictures.text, pictures.multimodal, pictures.multimodal_steps) == ({}, {"a": 0.5, "b": 0.5}, 1)
    exact = two_streams(dict(a=1, b=1), ["b"], 0.5)  # pictures fill their steps: no text with them
    assert exact.multimodal == {"b": 1.0} and exact.text == {"a": 1.0}
    whole = two_streams(dict(a=1, b=1), ["b"], 1.0)  # every step is multimodal
    assert whole.text == {} and whole.multimodal == {"a": 0.5, "b": 0.5}


def test_impossible_weights_are_refused():
    with pytest.raises(ConfigError, match="Set --config.data.multimodal_steps=0.6 or more"):
        two_streams(dict(a=0.4, b=0.6), ["b"], 0.5)
    with pytest.raises(ConfigError, match="all sources carry pictures"):
        two_streams(dict(b=1.0), ["b"], 0.0)
    with pytest.raises(ConfigError, match="less often than once in 1,000,000 documents"):
        Mixture([0.99, 0.01], [50, 5e6], [Deal()] * 2)
    for weights in ({}, {"a": 0.0}, {"a": -1.0, "b": 2.0}):
        with pytest.raises(ConfigError, match="positive weights"):
            two_streams(weights, [], 0.5)


def test_multimodal_steps_are_evenly_spread():
    for share in (Fraction(1, 3), Fraction(1, 2), Fraction(7, 10), Fraction(0), Fraction(1)):
        steps = [is_multimodal(step, share) for step in range(1000)]
        counts = np.cumsum(steps)
        assert np.all(np.abs(counts - np.arange(1, 1001) * float(share)) < 1 + 1e-9)


def test_mixture_holds_the_shares_of_documents_everywhere():
    mixture = Mixture([0.5, 0.3, 0.2], [1000, 100, 10], [Deal()] * 3)
    expected = np.array([0.5 / 1000, 0.3 / 100, 0.2 / 10])
    expected /= expected.sum()
    for start in (0, 777, 3 * CYCLE - 5, 10**12):
        taken = Counter(mixture[n][0] for n in range(start, start + 4000))
        assert [taken[i] / 4000 for i in range(3)] == pytest.approx(expected, abs=2e-3)


def test_a_few_long_documents_get_their_weight_in_tokens():
    mixture = Mixture([0.99, 0.01], [50, 500_000], [Deal()] * 2)
    tokens = mixture.counts * [50, 500_000]
    assert tokens[1] / tokens.sum() == pytest.approx(0.01, rel=5e-3)


def test_mixture_takes_every_document_once_and_in_order():
    mixture = Mixture([1, 1], [3, 1], [Deal(), Deal()])
    taken = {0: [], 1: []}
    for n in range(2 * CYCLE + 100):
        source, position = mixture[n]
        taken[source].append(position)
    for positions in taken.values():
        assert positions == list(range(len(positions)))


@pytest.mark.parametrize("share", [Fraction(1, 2), Fraction(2, 3), Fraction(1, 1000), Fraction(617, 811)])
def test_two_deals_share_an_order_out_without_loss_or_double(share):
    ours, theirs = Deal(share), Deal(1 - share, complement=True)
    mine = [ours.position(n) for n in range(3000)]
    rest = [theirs.position(n) for n in range(3000)]
    assert mine == sorted(set(mine)) and rest == sorted(set(rest))
    end = min(mine[-1], rest[-1])
    assert sorted([p for p in mine + rest if p <= end]) == list(range(end + 1))
    assert len([p for p in mine if p <= end]) == pytest.approx(float(share) * (end + 1), abs=1)


def test_text_is_dealt_by_the_tokens_that_each_stream_needs():
    shares = two_streams(dict(a=0.8, b=0.2), ["b"], 0.5)  # text: 0.5 of all tokens in text steps, 0.3 beside pictures
    to_text, to_mixed = deal_text(shares)
    assert float(to_text.share) == pytest.approx(0.5 / 0.8) and to_mixed == Deal(1 - to_text.share, True)
    assert deal_text(two_streams(dict(a=1, b=1), ["b"], 0.5)) == (Deal(), Deal())


@pytest.mark.parametrize("n", [1, 2, 50, TABLE + 3])
def test_every_epoch_holds_every_document_once_in_its_own_order(n):
    documents = Shuffled(range(n), seed=5)
    epochs = [[documents[epoch * n + i] for i in range(n)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 2:
        assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(n))
        assert [Shuffled(range(n), seed=6)[i] for i in range(n)] != epochs[0]
    assert [Shuffled(range(n), seed=5)[2 * n + i] for i in range(n)] == epochs[2]
