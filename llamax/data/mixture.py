"""Which document comes n-th: sources mixed by token weight, a pure function of n.

    share of documents of source i  ~  (its token weight) / (its mean tokens a document)

The shares become counts c_i of a cycle of 10,000 to a million documents, in which every source is spread evenly; cycle
k takes each source's next c_i documents of its own shuffled, endlessly repeated order. Where weights follow a schedule
(schedule.py), shorter cycles with counts of their own come first.

When there are pictures, there are two streams. A share f of the steps (`data.multimodal_steps`) is multimodal and draws
from the picture sources plus just enough text that, with W the picture sources' share of all tokens,

    weights of multimodal steps:   picture source i: w_i / f      text source j: w_j (1 - W / f) / (1 - W)
    weights of text-only steps:                                   text source j: w_j / (1 - W)

so that over all steps every source has its w. A text source that feeds both streams deals its documents out, so that
within an epoch each document still comes once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import grain
import numpy as np

from llamax.config import ConfigError

CYCLE = 10_000  # documents at least in a cycle
LEAST_COUNT = 100  # documents of the rarest source in a cycle: its share is right to half a per cent
MAX_CYCLE = 1_000_000
ENDLESS = 2**62  # a length that no run reaches
TABLE = 2**16  # documents of a source whose order is kept as a table, 128 KiB at most


class Shares(NamedTuple):
    """Token weights of the two streams, by source; each sums to 1 or is empty."""

    text: dict[str, float]
    multimodal: dict[str, float]
    multimodal_steps: Fraction  # share of steps


def two_streams(
    weights: Mapping[str, float], multimodal: Sequence[str], multimodal_steps: float, ever: Collection[str] = ()
) -> Shares:
    """Splits token weights (any positive scale) into the two streams; sources of weight 0 are left out.

    With only text sources `multimodal_steps` is ignored; with only pictures all steps are multimodal. `ever`: sources
    that weigh something at another point of a schedule, which has one share of multimodal steps for all of it.
    ConfigError if pictures are asked to come in none, or weigh more than their share of steps could carry.
    """
    total = sum(weights.values())
    if not weights or min(weights.values()) < 0 or not 0 < total < math.inf:  # nor NaN
        raise ConfigError(
            f"data sources with weights {dict(weights)}", "no tokens can be drawn by them", "Give positive weights."
        )
    share = {name: weight / total for name, weight in sorted(weights.items()) if weight > 0}
    pictures = {name: w for name, w in share.items() if name in multimodal}
    text = {name: w for name, w in share.items() if name not in multimodal}
    W, f = sum(pictures.values()), _share_of_steps({*share, *ever}, multimodal, multimodal_steps)
    if (pictures and not f) or f + 1e-9 < W:  # a share below 1 in 20,000 rounds to none
        raise ConfigError(
            f"--config.data.multimodal_steps={multimodal_steps:g}",
            f"the sources with pictures ({', '.join(pictures)}) weigh {W:.3f} of all tokens",
            f"Set --config.data.multimodal_steps={math.ceil(W * 1000) / 1000:g} or more, or lower their weights.",
        )
    mixed = {name: w / float(f) for name, w in pictures.items()}
    rest = 1 - W / float(f) if f else 0
    if rest > 1e-6:
        mixed |= {name: w / (1 - W) * rest for name, w in text.items()}
    return Shares({name: w / (1 - W) for name, w in text.items()} if f < 1 else {}, mixed, f)


def _share_of_steps(names: Collection[str], multimodal: Sequence[str], multimodal_steps: float) -> Fraction:
    """The share of steps that are multimodal where these sources are read."""
    pictures = sorted(name for name in names if name in multimodal)
    if not pictures:
        return Fraction(0)
    if len(pictures) < len(names):
        return Fraction(multimodal_steps).limit_denominator(10_000)
    if not multimodal_steps:
        asked, true = "--config.data.multimodal_steps=0", f"all sources carry pictures ({', '.join(pictures)})"
        raise ConfigError(asked, true, "Set --config.data.multimodal_steps=1, or add a source of text.")
    return Fraction(1)


def is_multimodal(step: int, share: Fraction) -> bool:
    """Whether a step is multimodal: `share` of the steps are, evenly spread, the same on every host."""
    return (step + 1) * share // 1 > step * share // 1


class Deal(NamedTuple):
    """How a source's order is dealt out: one stream gets `share` of it, evenly spread, the other one the complement."""

    share: Fraction = Fraction(1)
    complement: bool = False  # the share counts what `Deal(1 - share)` leaves

    def position(self, n: int) -> int:
        """Where in the source's order this stream's n-th document stands.

        `Deal(p)` takes place j when floor((j + 1) p) > floor(j p), so its n-th is at ceil((n + 1) / p) - 1; of the
        places left over, a share 1 - p, the n-th is at floor(n / (1 - p)).
        """
        return n // self.share if self.complement else -(-(n + 1) // self.share) - 1


def deal_text(shares: Shares) -> tuple[Deal, Deal]:
    """How every text source that feeds both streams deals its documents: (to the text stream, to the multimodal)."""
    name = next((name for name in shares.text if name in shares.multimodal), None)
    if name is None:
        return Deal(), Deal()
    f = float(shares.multimodal_steps)
    to_text, to_mixed = shares.text[name] * (1 - f), shares.multimodal[name] * f  # in tokens of all steps
    share = Fraction(to_text / (to_text + to_mixed)).limit_denominator(MAX_CYCLE)
    share = min(max(share, Fraction(1, MAX_CYCLE)), 1 - Fraction(1, MAX_CYCLE))  # 0 would deal a stream nothing
    return Deal(share), Deal(1 - share, complement=True)


class Dealt(NamedTuple):
    """How a source's order is dealt out to two streams from a change on: what neither had taken is dealt anew.

    So no document is left out or comes twice within an epoch, whatever each had taken, and whichever stream is new.
    """

    deals: tuple[Deal, Deal]  # of what was left
    taken: tuple[int, int] = (0, 0)  # documents of the source that each stream had taken before
    before: Dealt | None = None  # how they were dealt; None: from the beginning

    def position(self, stream: int, n: int) -> int:
        """Where in the source's order the n-th document of the stream stands."""
        if self.before and n < self.taken[stream]:
            return self.before.position(stream, n)
        return self._place(self.deals[stream].position(n - self.taken[stream]))

    def _place(self, n: int) -> int:
        """The n-th place that was left: those of the stream that was behind, then all after the other's last one."""
        if self.before is None:
            return n
        deals, taken = self.before.deals, [k - j for k, j in zip(self.taken, self.before.taken, strict=True)]
        last = [deal.position(k - 1) if k else -1 for deal, k in zip(deals, taken, strict=True)]
        behind, number = last.index(min(last)), sum(taken) + n
        return self.before._place(number if number > max(last) else deals[behind].position(taken[behind] + n))


class Part(NamedTuple):
    """One stream's part of what is dealt to two."""

    dealt: Dealt
    stream: int

    def position(self, n: int) -> int:
        return self.dealt.position(self.stream, n)


class Shuffled(Sequence):
    """A source's documents, epoch after epoch without end, each epoch in its own order."""

    def __init__(self, documents: Sequence, seed: int):
        self.documents, self.seed = documents, seed

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, n: int):
        epoch, i = divmod(n, len(self.documents))
        return self.documents[shuffled(i, len(self.documents), (self.seed + epoch) % 2**32)]


def shuffled(i: int, n: int, seed: int) -> int:
    """The i-th of 0 .. n - 1 in the order of a 32-bit seed.

    Large n: Grain's pseudo-random permutation, which needs no table. It walks over 2^16 numbers at least, so that its
    time goes as 2^16 / n (10 ms a call for n = 2): small n take a table.
    """
    if n > TABLE:
        return grain.experimental.index_shuffle(i, max_index=n - 1, seed=seed, rounds=4)
    return int(_permutation(n, seed)[i])


@functools.lru_cache(256)
def _permutation(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n).astype(np.uint16)


class Mixture:
    """Grain's selection map: n -> (index of the source, position in its order).

    The first documents follow `ramp`, cycles of so many tokens with weights of their own, which may be 0; endless
    cycles of `token_weights` follow. From its document `first` on a mixture takes the place of `before`, and each
    source goes on where that left it.
    """

    def __init__(
        self,
        token_weights: Sequence[float],
        mean_tokens: Sequence[float],
        deals: Sequence[Deal | Part],
        ramp: Sequence[tuple[float, Sequence[float]]] = (),
        before: Mixture | None = None,
        first: int = 0,
    ):
        self.mean_tokens, self.deals, self.before, self.first = tuple(mean_tokens), tuple(deals), before, first
        self.counts = counts_of_cycle(np.array(token_weights, float), np.array(mean_tokens, float))
        documents = [tokens * np.array(weights, float) / np.array(mean_tokens, float) for tokens, weights in ramp]
        # Rounded sums, not sums of what was rounded: a source that comes once in many cycles is still right.
        sums = np.rint(np.cumsum([np.zeros(len(mean_tokens)), *documents], axis=0)).astype(np.int64)
        base = before.taken(first) if before else np.zeros(len(mean_tokens), np.int64)
        self.begins = base + sums  # documents of each source before each cycle of the ramp, and before the endless ones
        self.numbers = first + sums.sum(1)  # of all sources
        self._last: Cycle | None = None  # found

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, n: int) -> tuple[int, int]:
        source, taken = self._numbered(n)
        return source, self.deals[source].position(taken)

    def taken(self, n: int) -> np.ndarray:
        """How many of each source the first n documents are: int64 [sources]."""
        if self.before and n < self.first:
            return self.before.taken(n)
        cycle = self._cycle(n)
        return cycle.begin + np.bincount(cycle.source[: n - cycle.first], minlength=len(cycle.begin))

    def tokens(self, n: int) -> float:
        """About how many tokens the first n documents have, by the sources' means."""
        return sum(float(k) * mean for k, mean in zip(self.taken(n), self.mean_tokens, strict=True))

    def _numbered(self, n: int) -> tuple[int, int]:
        """(source of document n, how many came of it before)."""
        if self.before and n < self.first:
            return self.before._numbered(n)
        cycle = self._cycle(n)
        source = int(cycle.source[n - cycle.first])
        return source, int(cycle.begin[source]) + int(cycle.rank[n - cycle.first])

    def _cycle(self, n: int) -> Cycle:
        """That which holds document n."""
        last = self._last
        if last and last.first <= n < last.first + len(last.source):
            return last
        if n >= self.numbers[-1]:
            k = (n - int(self.numbers[-1])) // int(self.counts.sum())
            begin, first = self.begins[-1] + k * self.counts, int(self.numbers[-1]) + k * int(self.counts.sum())
            end = begin + self.counts
        else:
            i = int(np.searchsorted(self.numbers, n, side="right")) - 1
            begin, end, first = self.begins[i], self.begins[i + 1], int(self.numbers[i])
            while (end - begin).sum() > CYCLE:  # a long one is halved, so that its order stays a short table
                middle = (begin + end) // 2
                half = int((middle - begin).sum())
                begin, end, first = (begin, middle, first) if n < first + half else (middle, end, first + half)
        self._last = cycle = Cycle(first, begin, *spread(tuple((end - begin).tolist())))
        return cycle


class Cycle(NamedTuple):
    """Documents from number `first` on."""

    first: int
    begin: np.ndarray  # int64 [sources]: documents of each that came before
    source: np.ndarray  # of each document
    rank: np.ndarray  # of each document among those of its source


def counts_of_cycle(token_weights: np.ndarray, mean_tokens: np.ndarray) -> np.ndarray:
    """Documents of each source in an endlessly repeated cycle; none of a source of weight 0."""
    some = token_weights > 0
    documents = token_weights[some] / mean_tokens[some]
    documents /= documents.sum()
    if documents.min() * MAX_CYCLE < 1:
        rare = int(documents.argmin())
        raise ConfigError(
            f"data sources with token weights {[float(f'{w:.3g}') for w in token_weights[some]]}",
            f"number {rare + 1} (documents of {mean_tokens[some][rare]:,.0f} tokens) would come less often than once "
            f"in {MAX_CYCLE:,} documents",
            "Raise its weight, or drop it.",
        )
    rarest = min(LEAST_COUNT, int(documents.min() * MAX_CYCLE))  # of a cycle in which its count is no fraction
    cycle = max(CYCLE, rarest / documents.min())
    counts = np.zeros(len(token_weights), np.int64)
    counts[some] = np.maximum(np.rint(documents * cycle), 1).astype(np.int64)
    return counts


@functools.lru_cache(16)
def spread(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(source, rank among its own) of each document of a cycle, every source spread evenly over it.

    The k-th of a source's c documents belongs at (k + 1/2) / c of the cycle.
    """
    source = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((rank + 0.5) / np.array(counts)[source], kind="stable")
    return source[order], rank[order]
