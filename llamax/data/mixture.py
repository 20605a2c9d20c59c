"""Which document comes n-th: sources mixed by token weight, a pure function of n.

    share of documents of source i  ~  (its token weight) / (its mean tokens a document)

The shares become counts c_i of a cycle of 10,000 to a million documents, in which every source is spread evenly; cycle
k takes each source's next c_i documents of its own shuffled, endlessly repeated order.

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
from collections.abc import Mapping, Sequence
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


def two_streams(weights: Mapping[str, float], multimodal: Sequence[str], multimodal_steps: float) -> Shares:
    """Splits token weights (any positive scale) into the two streams; sources of weight 0 are left out.

    With only text sources `multimodal_steps` is ignored; with only pictures all steps are multimodal. ConfigError
    if the latter is asked to be 0, or if the picture sources weigh more than that share of steps could carry.
    """
    total = sum(weights.values())
    if not weights or min(weights.values()) < 0 or not 0 < total < math.inf:  # nor NaN
        raise ConfigError(
            f"data sources with weights {dict(weights)}", "no tokens can be drawn by them", "Give positive weights."
        )
    share = {name: weight / total for name, weight in sorted(weights.items()) if weight > 0}
    pictures = {name: w for name, w in share.items() if name in multimodal}
    text = {name: w for name, w in share.items() if name not in multimodal}
    if not pictures:
        return Shares(text, {}, Fraction(0))
    if not text:
        if not multimodal_steps:
            asked, true = "--config.data.multimodal_steps=0", f"all sources carry pictures ({', '.join(pictures)})"
            raise ConfigError(asked, true, "Set --config.data.multimodal_steps=1, or add a source of text.")
        return Shares({}, pictures, Fraction(1))
    W, f = sum(pictures.values()), Fraction(multimodal_steps).limit_denominator(10_000)
    if not f or f + 1e-9 < W:  # a share below 1 in 20,000 rounds to none
        raise ConfigError(
            f"--config.data.multimodal_steps={multimodal_steps:g}",
            f"the sources with pictures ({', '.join(pictures)}) weigh {W:.3f} of all tokens",
            f"Set --config.data.multimodal_steps={math.ceil(W * 1000) / 1000:g} or more, or lower their weights.",
        )
    mixed = {name: w / float(f) for name, w in pictures.items()}
    rest = 1 - W / float(f)
    if rest > 1e-6:
        mixed |= {name: w / (1 - W) * rest for name, w in text.items()}
    if f == 1:
        return Shares({}, mixed, f)
    return Shares({name: w / (1 - W) for name, w in text.items()}, mixed, f)


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
    """Grain's selection map: n -> (index of the source, position in its order)."""

    def __init__(self, token_weights: Sequence[float], mean_tokens: Sequence[float], deals: Sequence[Deal]):
        documents = np.array(token_weights, float) / np.array(mean_tokens, float)
        documents /= documents.sum()
        if documents.min() * MAX_CYCLE < 1:
            rare = int(documents.argmin())
            raise ConfigError(
                f"data sources with token weights {[float(f'{w:.3g}') for w in token_weights]}",
                f"number {rare + 1} (documents of {mean_tokens[rare]:,.0f} tokens) would come less often than once in "
                f"{MAX_CYCLE:,} documents",
                "Raise its weight, or drop it.",
            )
        rarest = min(LEAST_COUNT, int(documents.min() * MAX_CYCLE))  # of a cycle in which its count is no fraction
        cycle = max(CYCLE, rarest / documents.min())
        self.counts = np.maximum(np.rint(documents * cycle), 1).astype(np.int64)  # a cycle, by source
        # The k-th of a source's c documents belongs at (k + 1/2) / c of the cycle.
        source = np.repeat(np.arange(len(self.counts)), self.counts)
        rank = np.concatenate([np.arange(count) for count in self.counts])
        order = np.argsort((rank + 0.5) / self.counts[source], kind="stable")
        self.source, self.rank = source[order], rank[order]
        self.deals = tuple(deals)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, n: int) -> tuple[int, int]:
        cycle, place = divmod(n, len(self.source))
        source = int(self.source[place])
        taken = cycle * int(self.counts[source]) + int(self.rank[place])
        return source, self.deals[source].position(taken)
