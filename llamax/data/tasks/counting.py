"""Common words and frequent words: what stands most often in a context that is nothing but words.

Common words: `common` words stand `often` times each among others that stand `seldom` times. Frequent words: coded
words, of which the k-th most frequent has the share k^-alpha / zeta(alpha) of the text; the first is noise ("..."), the
next three are asked for. There is no needle, so no depth, and one question on a context. Source: RULER, arXiv
2404.06654, section 3 (CWE, FWE), with its repetitions below 4,096 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from llamax.data.tasks import words
from llamax.data.tasks.sample import Ask, Exam, Maker, Question, TooShort

TRIES = 6  # of listing words, once they fit
ALPHAS = 1.5, 4.0  # below most of the text would be words that stand there once, above it has few but the first
LONG = 4096  # tokens from which RULER repeats words more often


class Wording(NamedTuple):
    opening: str
    asked: str  # {n}: how many words


COMMON_SEEN = (
    Wording("Words:\n", "The {n} words that stand there most often are"),
    Wording("Count the words of this list.\n", "Question: Which {n} words are the most common? Answer:"),
)
COMMON_HELD_OUT = (Wording("Here is a long list.\n", "Name the {n} words that it repeats most:"),)
FREQUENT_SEEN = (
    Wording("Coded text:\n", "The {n} most frequent words, without the dots, are"),
    Wording("Read this code and count.\n", "Question: Which {n} codes are the most frequent? Answer:"),
)
FREQUENT_HELD_OUT = (Wording("A message in secret words.\n", "Name the {n} secret words that it has most of:"),)


@dataclass(frozen=True)
class CommonWords(Maker):
    choices: ClassVar = {"kind": words.ONE_WORD}

    common: int = 3
    often: int = 6
    seldom: int = 1
    often_long: int = 6  # the same from 4,096 tokens on
    seldom_long: int = 1
    numbered: bool = False
    kind: str = "words"  # of words.KINDS
    seen: tuple[Wording, ...] = COMMON_SEEN
    held_out: tuple[Wording, ...] = COMMON_HELD_OUT

    def flaw(self, split: str) -> tuple[str, str] | None:
        for often, seldom in (("often", "seldom"), ("often_long", "seldom_long")):
            n, others = getattr(self, often), getattr(self, seldom)
            if n <= others:
                return f"has common words {n} times and others {others} times", f"Set {often} above {seldom}."
        return words.too_few(split, [(self.kind, self.common)])

    def __call__(self, ask: Ask) -> Exam:
        wording = ask.choose(self.seen, self.held_out)
        often, seldom = (self.often, self.seldom) if ask.length < LONG else (self.often_long, self.seldom_long)
        supply = words.Supply(ask.rng, ask.tokens, ask.split, words.around(wording))
        common = supply.draw(self.kind, self.common)
        question = _question(wording, common)
        room = ask.room([question], wording.opening)
        mean = ask.tokens.count(self._listed(common * often)) / (self.common * often)
        others: list[str] = []

        def listed(n: int) -> list[str]:
            while len(others) < n and (word := supply.another(self.kind)):
                others.append(word)
            each = -(-n // len(others)) * seldom if others else n  # more than seldom where the others run out
            if each >= often or n > 0 and not others:
                raise supply.none_left(self.kind)
            every = common * often + [others[i % len(others)] for i in range(n)] * seldom
            return ask.rng.sample(every, len(every))

        n = max(0, int(room / mean - self.common * often) // seldom)
        found = _largest(ask, room, n, seldom * mean, listed, self._listed, wording.opening)
        question = _question(wording, sorted(common, key=found.index))
        return Exam((wording.opening + self._listed(found),), (question,))

    def _listed(self, listed: list[str]) -> str:
        return " ".join(f"{i}. {word}" if self.numbered else word for i, word in enumerate(listed, start=1))


@dataclass(frozen=True)
class FrequentWords(Maker):
    choices: ClassVar = {"kind": words.ONE_WORD}

    asked: int = 3
    alpha: float = 2.0
    kind: str = "coded"  # of words.KINDS
    seen: tuple[Wording, ...] = FREQUENT_SEEN
    held_out: tuple[Wording, ...] = FREQUENT_HELD_OUT

    def flaw(self, split: str) -> tuple[str, str] | None:
        if not ALPHAS[0] <= self.alpha <= ALPHAS[1]:
            return f"has the exponent alpha={self.alpha}", f"Set alpha to {ALPHAS[0]} ... {ALPHAS[1]}."
        return words.too_few(split, [(self.kind, self.asked + 2)])

    def __call__(self, ask: Ask) -> Exam:
        wording = ask.choose(self.seen, self.held_out)
        supply = words.Supply(ask.rng, ask.tokens, ask.split, words.around(wording))
        ranked = ["...", *supply.draw(self.kind, self.asked + 2)]
        while len(ranked) <= ask.length // 50 and (word := supply.another(self.kind)):
            ranked.append(word)
        question = _question(wording, ranked[1 : 1 + self.asked])
        room = ask.room([question], wording.opening)

        def listed(n: int) -> list[str]:
            counts = self._counts(n, len(ranked))
            every = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
            return ask.rng.sample(every, len(every))

        each = ask.tokens.count(" " + ranked[1])
        found = _largest(ask, room, room // each, each, listed, " ".join, wording.opening)
        if found.count(ranked[self.asked]) <= found.count(ranked[self.asked + 1]):
            true = "its most frequent words are no more frequent than others"
            raise TooShort(f"task {ask.name} at {ask.length} tokens", true, "Ask for more tokens.")
        return Exam((wording.opening + " ".join(found),), (question,))

    def _counts(self, n: int, ranks: int) -> list[int]:
        """Of each rank, in a text of n words."""
        zeta = sum(k**-self.alpha for k in range(1, 10_000)) + 10_000 ** (1 - self.alpha) / (self.alpha - 1)
        return [int(n * k**-self.alpha / zeta) for k in range(1, ranks + 1)]


def _largest(
    ask: Ask,
    room: int,
    n: int,
    each: float,
    listed: Callable[[int], list[str]],
    said: Callable[[list[str]], str],
    opening: str,
) -> list[str]:
    """The words listed(n) of about the largest n whose text fits into the room, from a first guess of n on.

    One more takes about `each` tokens.
    """
    found, most, tries = None, -1, TRIES
    while n >= 0 and (tries or found is None):
        tried = listed(n)
        taken = ask.tokens.count(opening + said(tried)) - ask.tokens.count(opening)
        if most < taken <= room:
            found, most = tried, taken
        change = (room - taken) / each
        if found is not None and change < 1 and most >= 0.99 * room:
            break
        n, tries = n + (math.floor(change) or (-1 if taken > room else 1)), max(0, tries - 1)
    if found is None:
        true = f"{room} are left for its words, and the fewest take more"
        raise TooShort(f"task {ask.name} at {ask.length} tokens", true, "Ask for more tokens.")
    return found


def _question(wording: Wording, answers: list[str]) -> Question:
    return Question("\n" + wording.asked.format(n=len(answers)), f" {', '.join(answers)}\n", tuple(answers))
