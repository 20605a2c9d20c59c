"""Records in the order of a grade."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from llamax.post.records import Records

ALL = "all"


class Graded(NamedTuple):
    grade: str
    judge: str
    keep: str  # high | low
    values: dict[int, float]  # by number of the record


class Choice(NamedTuple):
    kept: frozenset[int]
    dropped: tuple[int, ...]  # of those that could have been kept
    left_out: Counter[str]  # of the others, by reason


def rank(numbers: Sequence[int], records: Records, graded: Graded | None) -> list[int]:
    """The records, first what is most worth keeping; without grades in an order by their keys."""
    sign = -1 if graded is not None and graded.keep == "high" else 1
    values = graded.values if graded is not None else dict.fromkeys(numbers, 0.0)
    return sorted(numbers, key=lambda number: (sign * values[number], records.keys[number], number))
