"""Keys and values: drawn at random, for training and for evaluation from sets that share none.

A hash of its spelling says which of the two a key or value belongs to, so there is no list to keep and any number of
them; the same spelling is never in both. Kinds:

    short     one word that is one token where a space stands before it (tokens.py): for the smallest models
    pairs     two of these with a space between, two tokens: "amber fox"
    phrases   one to four of these with spaces between
    words     two of these with a hyphen, as RULER's adjectives and nouns: "amber-fox"
    digits    three digits
    five_digits
    numbers   seven digits, as in RULER
    uuids     as in RULER
    coded     six letters, as in RULER's coded text
    letters   five capitals: names of variables, as in RULER
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Iterable, Sequence

from llamax.config import ConfigError
from llamax.data.tasks.tokens import Tokens

EVAL_EVERY = 4  # a quarter of all keys and values is for evaluation
MAX_DRAWS = 1_000  # of one that has not been drawn yet
_WORDS = re.compile(r"\w+")
_FIELD = re.compile(r"\{\w+\}")  # of a template


def split_of(spelling: str) -> str:
    """Whether a key or value belongs to "train" or to "eval"."""
    return "eval" if hashlib.sha256(spelling.encode()).digest()[0] % EVAL_EVERY == 0 else "train"


def _short(rng: random.Random, words: Sequence[str]) -> str:
    return rng.choice(words)


def _pair(rng: random.Random, words: Sequence[str]) -> str:
    return " ".join(rng.sample(words, 2))


def _phrase(rng: random.Random, words: Sequence[str]) -> str:
    return " ".join(rng.sample(words, rng.randint(1, 4)))


def _hyphenated(rng: random.Random, words: Sequence[str]) -> str:
    return "-".join(rng.sample(words, 2))


def _digits(rng: random.Random, words: Sequence[str]) -> str:
    return str(rng.randrange(100, 1_000))


def _five_digits(rng: random.Random, words: Sequence[str]) -> str:
    return str(rng.randrange(10**4, 10**5))


def _number(rng: random.Random, words: Sequence[str]) -> str:
    return str(rng.randrange(10**6, 10**7))


def _uuid(rng: random.Random, words: Sequence[str]) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _coded(rng: random.Random, words: Sequence[str]) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=6))


def _letters(rng: random.Random, words: Sequence[str]) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=5))


KINDS: dict[str, Callable[[random.Random, Sequence[str]], str]] = {
    "short": _short,
    "pairs": _pair,
    "phrases": _phrase,
    "words": _hyphenated,
    "digits": _digits,
    "five_digits": _five_digits,
    "numbers": _number,
    "uuids": _uuid,
    "coded": _coded,
    "letters": _letters,
}


NAMES = tuple(kind for kind in KINDS if kind != "phrases")  # a phrase may be the beginning of another one
ONE_WORD = tuple(kind for kind in NAMES if kind != "pairs")  # where nothing says where one ends
OF_WORDS = {"short": (1,), "pairs": (2,), "words": (2,), "phrases": (1, 2, 3, 4)}  # of how many one is made
OF_DIGITS = {"digits": 900, "five_digits": 90_000, "numbers": 9_000_000}


def told(asked: str, key: str) -> str:
    """The beginning of a question up to its key's first word; nothing if the question ends there."""
    first = key.split(" ")[0]
    begun = asked[: asked.index(key) + len(first)]
    return begun if begun != asked else ""


@functools.cache
def few(words: Sequence[str], n: int) -> tuple[str, ...]:
    """n of the words, always the same ones; fewer are among more. They are of those that training draws as single ones,
    so that pairs of them, for training or evaluation, have no word that a small model could not know."""
    shuffled = list(words)
    random.Random(0).shuffle(shuffled)
    return tuple(word for word in shuffled if split_of(word) == "train")[:n]


def spellings(kind: str, n_words: int, split: str) -> float:
    """About how many of a kind a split has, made of n_words (0: of all words, which are taken for endless)."""
    share = 1 / EVAL_EVERY if split == "eval" else 1 - 1 / EVAL_EVERY
    if kind not in OF_WORDS or not n_words:
        return share * OF_DIGITS.get(kind, math.inf)
    if kind == "short":
        return n_words if split == "train" else 0  # see `few`
    if n_words < max(OF_WORDS[kind]):
        return 0
    return share * sum(math.perm(n_words, k) for k in OF_WORDS[kind])


def too_few(split: str, needed: Sequence[tuple[str, int]], n_words: int = 0) -> tuple[str, str] | None:
    """A flaw (sample.Maker) if a split has less than twice as many as are needed of (kind, n), (kind, n), ..."""
    for kind in dict(needed):
        n, there = sum(n for other, n in needed if other == kind), spellings(kind, n_words, split)
        if there < 2 * n:
            of = f" of {n_words} words" if n_words else ""
            true = f"needs {n} keys and values of the kind {kind!r}, and{of} there are about {there:.0f} for {split!r}"
            raise_it = "Raise n_words, or take" if n_words and (kind, split) != ("short", "eval") else "Take"
            return true, f'{raise_it} a kind with more, such as "uuids".'
    return None


class NoneLeft(ConfigError):
    """More keys and values than a kind has."""


def around(wording: Iterable[str], units: Iterable[tuple[str, int]] = ()) -> str:
    """What keys and values stand in: units of text, and what the wording's templates say beside them."""
    return "\n".join(["".join(unit for unit, _ in units), *(_FIELD.sub("\n", template) for template in wording)])


class Supply:
    """Draws keys and values of one split; none twice, and none that occurs in the text around them. They are made of
    `n_words` of the tokenizer's words, or of all (0)."""

    def __init__(self, rng: random.Random, tokens: Tokens, split: str, text: str = "", n_words: int = 0):
        self.rng, self.split, self.text = rng, split, text.lower()
        self.words = few(tokens.words, n_words) if n_words else tokens.words
        self._words_of_text = set(_WORDS.findall(self.text))
        self._drawn: set[str] = set()
        self._used_up: set[str] = set()  # kinds

    def draw(self, kind: str, n: int) -> list[str]:
        """n of a kind. NoneLeft if there are not so many."""
        return [self._one(kind) for _ in range(n)]

    def another(self, kind: str) -> str | None:
        """One of a kind; None from the first time on that none is left."""
        if kind not in self._used_up:
            try:
                return self._one(kind)
            except NoneLeft:
                self._used_up.add(kind)
        return None

    def _one(self, kind: str) -> str:
        if kind not in KINDS:
            raise ConfigError(f"keys or values of the kind {kind!r}", "there is none", f"Use one of {list(KINDS)}.")
        for _ in range(MAX_DRAWS):
            found = KINDS[kind](self.rng, self.words)
            if split_of(found) == self.split and found not in self._drawn and not self._occurs(found):
                self._drawn.add(found)
                return found
        raise self.none_left(kind)

    def none_left(self, kind: str) -> NoneLeft:
        true = f"{len(self._drawn)} are drawn, and no other is left that does not occur in the text"
        return NoneLeft(f"keys and values of the kind {kind!r}", true, 'Take a kind with more, such as "uuids".')

    def _occurs(self, spelling: str) -> bool:
        """Whether it stands in the text as a word, or anywhere if it is more than one."""
        lower = spelling.lower()
        return lower in self._words_of_text if _WORDS.fullmatch(spelling) else lower in self.text
