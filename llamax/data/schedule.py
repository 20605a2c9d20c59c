"""The mixture over a run: weights that follow a schedule over tokens, and weights that were changed in mid-run.

    history = [{"step": 0, "text": 0, "multimodal": 0, "weights": {"web": [0.7, []], "books": [0, [[1e9, 0.3]]]}}, ...]

An entry's weights, [weight, later] of each source, hold from its windows of the two streams on. The history is part of
the data iterator's state, so that a resumed run reads the windows it had begun as it would have, and a run whose
recipe says other weights now follows them from the first windows that nobody has opened yet.

The tokens that a schedule counts are those of the documents, padding aside, by each source's mean. Between two points
where it bends a stream has RESOLUTION cycles, each with the weights of its middle, and after the last one the endless
cycles of a mixture without schedule.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from llamax.config import Source
from llamax.data.mixture import Deal, Dealt, Mixture, Part, Shares, deal_text, two_streams

STREAMS = ("text", "multimodal")
RESOLUTION = 256  # cycles from one point of a schedule to the next
History = list[dict[str, Any]]


class Planned(NamedTuple):
    """The documents of a stream."""

    names: list[str]  # of the sources that it reads, now or ever
    mixture: Mixture  # of these
    window_docs: int  # documents of a window


def began(sources: Mapping[str, Source]) -> History:
    """The history of a run that begins."""
    return [_entry(sources, 0, {})]


def followed(history: History, sources: Mapping[str, Source], step: int, opened: Mapping[str, int]) -> History:
    """The history of a run that goes on after `step` with the weights that it is asked for now.

    Args:
      opened: of each stream, the first window that no lane has opened.
    """
    new = _entry(sources, step, opened)
    if history[-1]["weights"] == new["weights"]:
        return history
    kept = [entry for entry in history if any(entry[stream] < new[stream] for stream in STREAMS)]
    return kept if kept and kept[-1]["weights"] == new["weights"] else [*kept, new]


def shares(sources: Mapping[str, Source], tokens: float) -> dict[str, float]:
    """The share of tokens that each source is asked for, after so many tokens of the run."""
    weights = _weights(sources, tokens)
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def multimodal_steps(sources: Mapping[str, Source], pictures: Sequence[str], asked: float) -> Fraction:
    """The share of steps that are multimodal."""
    return _Era(sources, pictures, asked).probes[0].multimodal_steps


def ever_read(sources: Mapping[str, Source]) -> set[str]:
    """The sources that weigh something at some point of the schedule."""
    return {name for name, source in sources.items() if source.weight or any(weight for _, weight in source.later)}


def plan(
    history: History,
    pictures: Sequence[str],
    asked_steps: float,
    mean_tokens: Callable[[str], float],
    window_docs: Callable[[str, dict[str, float]], int],
) -> tuple[Fraction, dict[str, Planned]]:
    """What a history makes of the two streams: the share of multimodal steps now, and each stream's documents.

    Args:
      pictures: the sources that carry pictures.
      asked_steps: `data.multimodal_steps`.
      mean_tokens: of a source's documents.
      window_docs: (stream, its sources' weights) -> documents of a window. The first entry with the stream decides, by
        the point of its schedule that allows the fewest: later ones find the windows numbered.
    """
    eras = [_Era(_sources(entry), pictures, asked_steps) for entry in history]
    names = {stream: _names([getattr(s, stream) for era in eras for s in era.probes]) for stream in STREAMS}
    streams: dict[str, Planned] = {}
    dealt: dict[str, Dealt] = {}  # of the text sources, to the two streams
    for entry, era in zip(history, eras, strict=True):
        first = {stream: entry[stream] * planned.window_docs for stream, planned in streams.items()}
        tokens = sum(streams[stream].mixture.tokens(n) for stream, n in first.items())
        ramp = era.ramp(tokens)
        taken = {stream: streams[stream].mixture.taken(n).tolist() for stream, n in first.items()}
        for name in (name for name in names["text"] if name in names["multimodal"]):
            text, multimodal = (taken[s][names[s].index(name)] if s in taken else 0 for s in STREAMS)
            dealt[name] = Dealt(era.deal(name, ramp), (text, multimodal), dealt.get(name))
        for number, (stream, rate) in enumerate(zip(STREAMS, (1 - era.steps, era.steps), strict=True)):
            if not rate:
                continue
            before = streams.get(stream)
            docs = before.window_docs if before else min(window_docs(stream, getattr(s, stream)) for s in era.probes)
            mixture = Mixture(
                _vector(getattr(era.probes[-1], stream), names[stream]),
                [mean_tokens(name) for name in names[stream]],
                [Part(dealt[name], number) if name in dealt else Deal() for name in names[stream]],
                [(n * float(rate), _vector(getattr(s, stream), names[stream])) for n, s in ramp],
                before.mixture if before else None,
                first.get(stream, 0),
            )
            streams[stream] = Planned(names[stream], mixture, docs)
    return eras[-1].steps, streams


class _Era:
    """From one change to the next: weights at every point, and the streams' shares that follow from them."""

    def __init__(self, sources: Mapping[str, Source], pictures: Sequence[str], asked_steps: float):
        self.sources, self.pictures, self.asked_steps = sources, pictures, asked_steps
        self.points = sorted({0.0} | {float(tokens) for source in sources.values() for tokens, _ in source.later})
        # Where the schedule bends, and halfway between: what a source weighs anywhere it weighs at one of these.
        between = [(a + b) / 2 for a, b in itertools.pairwise(self.points)]
        self.probes = [self.at(tokens) for tokens in sorted([*self.points, *between])]
        self.steps = self.probes[0].multimodal_steps

    def at(self, tokens: float) -> Shares:
        return two_streams(_weights(self.sources, tokens), self.pictures, self.asked_steps, ever_read(self.sources))

    def ramp(self, begin: float) -> list[tuple[float, Shares]]:
        """The schedule from `begin` tokens on: cycles of so many tokens of the run, and their shares."""
        points = [begin, *(tokens for tokens in self.points if tokens > begin)]
        spans = [(a, (b - a) / RESOLUTION) for a, b in itertools.pairwise(points)]
        return [(span, self.at(a + (i + 0.5) * span)) for a, span in spans for i in range(RESOLUTION)]

    def deal(self, name: str, ramp: Sequence[tuple[float, Shares]]) -> tuple[Deal, Deal]:
        """How a source that feeds both streams deals its documents out to them: by the mean of the schedule.

        The streams' parts of its order are disjoint, so that no document comes twice within an epoch whatever the
        shares are at one point: the stream that asks for more than in the mean is only further in its part.
        """
        if not ramp:
            now = self.probes[-1]
            return deal_text(now) if name in now.text and name in now.multimodal else (Deal(), Deal())
        cycles = [*ramp, (ramp[-1][0], self.probes[-1])]
        text, multimodal = (sum(n * getattr(s, stream).get(name, 0.0) for n, s in cycles) for stream in STREAMS)
        if not (text and multimodal):
            return Deal(), Deal()
        total = sum(n for n, _ in cycles)
        return deal_text(Shares({name: text / total}, {name: multimodal / total}, self.steps))


def _entry(sources: Mapping[str, Source], step: int, windows: Mapping[str, int]) -> dict[str, Any]:
    weights = {
        name: [float(source.weight), [[float(tokens), float(weight)] for tokens, weight in source.later]]
        for name, source in sorted(sources.items())
    }
    return {"step": step} | {stream: windows.get(stream, 0) for stream in STREAMS} | {"weights": weights}


def _sources(entry: Mapping[str, Any]) -> dict[str, Source]:
    return {name: Source("", weight, later) for name, (weight, later) in entry["weights"].items()}


def _weights(sources: Mapping[str, Source], tokens: float) -> dict[str, float]:
    return {name: source.weight_at(tokens) for name, source in sources.items()}


def _names(of: Sequence[Mapping[str, float]]) -> list[str]:
    """All keys, in the order of the first to have them."""
    return list(dict.fromkeys(name for shares in of for name in shares))


def _vector(shares: Mapping[str, float], names: Sequence[str]) -> list[float]:
    return [shares.get(name, 0.0) for name in names]
