"""Streams whose weights follow a schedule or change in mid-run: exact to resume, documents once, shares as asked."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from llamax.config import ConfigError, Source
from llamax.data import pipeline, schedule
from llamax.data.pipeline import build, merge, tile_slots
from llamax.data.tokenizer import Tokenizer
from tests.data.test_pipeline import (  # noqa: F401 (fixtures)
    VISION,
    config,
    folder,
    joined,
    same,
    share,
    starts,
    take,
    tokenizer_path,
)

CHANGED = dict(web=0.2, notes=0.7, drawings=0.1)


def weighing(data, **weights):
    """The settings with other weights: a number, or (number, point, ...)."""
    of = {name: w if isinstance(w, tuple) else (w,) for name, w in weights.items()}
    sources = {name: Source(source.path, of[name][0], of[name][1:]) for name, source in data.sources.items()}
    return dataclasses.replace(data, sources=sources)


def through_json(state):
    return json.loads(json.dumps(state))


def read(batches, n=3):
    """Tokens of each source."""
    return sum(np.bincount(b.source_ids[b.segment_ids > 0], minlength=n) for b in batches)


@pytest.fixture(scope="module")
def small(config):  # noqa: F811
    """Many short windows."""
    return dataclasses.replace(config, window_docs=6)


@pytest.fixture(scope="module", autouse=True)
def short_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "MIN_WINDOW_ROWS", 2)
        yield


@pytest.fixture(scope="module")
def gone_on(small):
    """A run that changes its weights after 9 steps and again, a schedule now, after 24: the iterator's state before
    every batch, the batches, and the settings with which each was read."""
    settings = [small, weighing(small, **CHANGED), weighing(small, web=0.5, notes=(0.9, (9000, 0.1)), drawings=0.1)]
    states, batches, with_which = [], [], []
    state = None
    for data, steps in zip(settings, (9, 15, 16), strict=True):
        iterator = iter(build(data, VISION, 3))
        if state:
            iterator.set_state(state)
        for _ in range(steps):
            states.append(through_json(iterator.get_state()))
            batches.append(next(iterator))
            with_which.append(data)
        state = through_json(iterator.get_state())
    return states, batches, with_which


def test_resume_is_exact_before_in_and_after_a_change(gone_on):
    states, batches, settings = gone_on
    assert [len(state["mixture"]) for state in (states[8], states[9], states[23], states[24])] == [1, 2, 2, 3]
    for point in (0, 4, 8, 9, 10, 13, 23, 24, 25, 31, 36):
        resumed = iter(build(settings[point], VISION, 3))
        resumed.set_state(states[point])
        assert through_json(resumed.get_state()) == states[point], "the same weights again change nothing"
        n = sum(data is settings[point] for data in settings[point : point + 4])
        same(take(resumed, n), batches[point : point + n])


def test_an_older_checkpoint_takes_the_change_again(gone_on):
    """The change is asked for from a state before it, of step 8 instead of 9, as after a damaged checkpoint."""
    states, batches, settings = gone_on
    resumed = iter(build(settings[9], VISION, 3))
    resumed.set_state(states[8])
    entry = resumed.get_state()["mixture"][1]
    assert entry["step"] == 8 and entry["text"] <= states[9]["mixture"][1]["text"]
    again = iter(build(settings[9], VISION, 3))
    again.set_state(states[8])
    same(take(resumed, 3), take(again, 3))


@pytest.mark.parametrize("lanes", (1, 2))
def test_windows_that_were_opened_stay_what_they_were(config, lanes):  # noqa: F811
    """Batches go on as without the change until one needs a window that no lane had opened; from there on, others."""
    data = dataclasses.replace(config, lanes=lanes)
    old, new = iter(build(data, VISION, 3)), iter(build(weighing(data, **CHANGED), VISION, 3))
    take(old, 9)
    new.set_state(through_json(old.get_state()))
    entry, kept, other = new.get_state()["mixture"][1], 0, 0
    for _ in range(30):
        ours, theirs = next(new), next(old)
        stream = "multimodal" if ours.tiles.shape[1] else "text"
        places = [place for key, place in old.get_state().items() if key.split("/")[0] == stream]
        if max(place["window"] - (0 if place["row"] else lanes) for place in places) < entry[stream]:
            same([ours], [theirs])
            kept += 1
        other += not np.array_equal(ours.tokens, theirs.tokens)
    assert kept and other > 10


def test_no_document_comes_twice_or_is_left_out_by_a_change(small, tokenizer_path):  # noqa: F811
    """Text alone, one epoch of 150 and some of 100: three changes, the last one back to the beginning."""
    tokenizer, text = Tokenizer(tokenizer_path), dataclasses.replace(small, multimodal_steps=0.0, batch_tokens=256)
    weights = [dict(web=0.5, notes=0.5), dict(web=0.9, notes=0.1), dict(web=0.0, notes=1.0), dict(web=0.5, notes=0.5)]
    state, batches = None, []
    for number, of in enumerate(weights):
        iterator = iter(build(weighing(text, **of, drawings=0.0), None, 5))
        if state:
            iterator.set_state(state)
        while iterator.get_state()["text"]["row"] or iterator.get_state()["text"]["window"] < 17 * (number + 1):
            batches.append(next(iterator))  # to the end of a window: all its documents have come
        state = through_json(iterator.get_state())
    begun = list(starts(batches, tokenizer))
    for kind, n in (("w", 150), ("s", 100)):
        of_kind = [name for name in begun if name.startswith(kind)]
        epochs, rest = divmod(len(of_kind), n)
        counts = np.unique(of_kind, return_counts=True)[1]
        assert len(of_kind) > 60 and (epochs, sum(counts == epochs + 1)) == (epochs, rest if rest else 0)
        assert set(counts.tolist()) <= {epochs, epochs + 1}


def test_pictures_come_and_go(small):
    """Their stream begins at its first window, stands still without them, and goes on where it stood."""
    without = weighing(small, web=0.7, notes=0.3, drawings=0.0)
    assert tile_slots(without) == [0] and tile_slots(small) == [0, 16]
    iterator = iter(build(without, VISION, 4))
    take(iterator, 5)
    states, kinds = [through_json(iterator.get_state())], []
    assert "multimodal" not in states[0]
    for data in (small, without, small):
        iterator = iter(build(data, VISION, 4))
        iterator.set_state(states[-1])
        batches = take(iterator, 8)
        kinds.append({batch.tiles.shape[1] for batch in batches})
        states.append(through_json(iterator.get_state()))
        again = iter(build(data, VISION, 4))
        again.set_state(states[-2])
        same(take(again, 8), batches)
    assert kinds == [{0, 16}, {0}, {0, 16}]
    assert states[1]["multimodal"] == states[2]["multimodal"]
    assert states[3]["multimodal"]["window"] > states[2]["multimodal"]["window"] > 0
    assert [entry["multimodal"] for entry in states[3]["mixture"]][:2] == [0, 0]


def test_a_picture_source_that_begins_at_nothing_has_its_steps_from_the_start(small):
    data = weighing(small, web=0.7, notes=0.3, drawings=(0.0, (20_000, 0.0), (20_001, 0.5)))
    assert tile_slots(data) == [0, 16]
    batches = take(iter(build(data, VISION, 4)), 8)
    assert {batch.tiles.shape[1] for batch in batches} == {0, 16} and read(batches)[0] == 0
    with pytest.raises(ConfigError, match="multimodal_steps"):
        tile_slots(weighing(small, web=0.7, notes=0.3, drawings=(0.0, (100, 3.0), (200, 0.1))))


@pytest.mark.parametrize("lanes", (1, 4))
def test_any_number_of_processes_goes_on_with_other_weights(small, lanes):
    small = dataclasses.replace(small, lanes=lanes, window_docs=3)
    changed = weighing(small, **CHANGED)
    before = {n: [iter(build(small, VISION, 11, share(i, n))) for i in range(n)] for n in (1, 2)}
    for iterators in before.values():
        for iterator in iterators:
            take(iterator, 15)
    state, of_two = (through_json(merge([it.get_state() for it in iterators])) for iterators in before.values())
    assert state == of_two
    after = {n: [iter(build(changed, VISION, 11, share(i, n))) for i in range(n)] for n in (1, 2, 4)}
    for iterators in after.values():
        for iterator in iterators:
            iterator.set_state(state)
    whole = [joined(after[1]) for _ in range(14)]
    for n in (2, 4):
        same([joined(after[n]) for _ in range(14)], whole)
        assert merge([it.get_state() for it in after[n]]) == after[1][0].get_state()
    entry = after[1][0].get_state()["mixture"][1]
    for stream in schedule.STREAMS:
        places = [place for key, place in state.items() if key.split("/")[0] == stream]
        opened = [place["window"] if place["row"] else place["window"] - lanes for place in places]
        assert entry[stream] == max(opened) + 1 and len(places) == lanes
    assert read(whole)[1] > 1.5 * read([joined(before[1]) for _ in range(14)])[1]


def test_loader_processes_and_prefetching_change_nothing_about_a_change(gone_on):
    states, batches, settings = gone_on
    data = dataclasses.replace(settings[24], workers=2, prefetch_batches=2)
    loaded = iter(build(data, VISION, 3))
    try:
        loaded.set_state(states[23])  # reads with the weights of before, and then others
        loaded.set_state(states[24])
        same(take(loaded, 8), batches[24:32])
        assert through_json(loaded.get_state()) == states[32]
    finally:
        loaded.close()


def test_a_state_without_history_is_of_the_weights_that_are_asked_for(small):
    iterator = iter(build(small, VISION, 3))
    take(iterator, 7)
    state = through_json(iterator.get_state())
    del state["mixture"]
    resumed = iter(build(small, VISION, 3))
    resumed.set_state(state)
    same(take(resumed, 4), take(iterator, 4))
    assert len(resumed.get_state()["mixture"]) == 1


def test_the_tokens_read_follow_a_schedule(small):
    """With the documents' true lengths: in each sixth of the schedule, the share of it that the weights ask for."""
    end = 60_000
    data = weighing(small, web=(0.8, (end, 0.1)), notes=(0.2, (end, 0.3)), drawings=(0.0, (end, 0.4)))
    iterator, parts, tokens = iter(build(data, VISION, 9)), np.zeros((6, 3)), 0
    while tokens < end:
        of = read([next(iterator)])
        parts[int(6 * tokens / end)] += of
        tokens += of.sum()
    asked = [schedule.shares(data.sources, (i + 0.5) * end / 6) for i in range(6)]
    found = parts / parts.sum(1, keepdims=True)
    np.testing.assert_allclose(found, [[a[name] for name in sorted(a)] for a in asked], atol=0.1)
    total = parts.sum(0) / parts.sum()
    mean = np.mean([[schedule.shares(data.sources, t)[n] for n in sorted(data.sources)] for t in range(0, end, 100)], 0)
    np.testing.assert_allclose(total, mean, atol=0.03)
