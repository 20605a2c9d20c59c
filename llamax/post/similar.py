"""Whether texts say the same: to the letter but for case, space and signs, or nearly, by the words that they share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

WORD = re.compile(r"\w+")
GRAM = 3  # words


def normal(text: str) -> str:
    """Its words in small letters; of a text without any its signs, for those are then all that it says."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(WORD.findall(text)) or "".join(text.split())


def grams(text: str) -> frozenset[tuple[str, ...]]:
    """All runs of GRAM words of the normal text; the whole of a shorter one."""
    words = normal(text).split()
    return frozenset(tuple(words[i : i + GRAM]) for i in range(max(1, len(words) - GRAM + 1)))


def jaccard(a: frozenset, b: frozenset) -> float:
    """|a and b| / |a or b|"""
    return len(a & b) / len(a | b)


def distinct(texts: Sequence[str], most: float) -> list[int]:
    """The places of the texts, in order, that are not those of an earlier one and share less than `most` with each."""
    kept: list[int] = []
    seen: list[frozenset] = []
    for i, text in enumerate(texts):
        own = grams(text)
        if all(own != other and jaccard(own, other) < most for other in seen):
            kept.append(i)
            seen.append(own)
    return kept
