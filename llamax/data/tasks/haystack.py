"""Real text as a haystack, and needles put between its sentences and lines.

A unit is a sentence or a line with the white space behind it, so that units joined are the text again. A haystack is
runs of units, each from a random place of a random text to that text's end. It is cut to the tokens that are free; the
last unit is the longest of the next ones that still fits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llamax.data.tasks.sample import Ask

NOISE = ("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n",)  # RULER's
_UNIT = re.compile(r".+?(?:(?<=[.!?])[ \t]+(?=\S)|\n+|\Z)|\n+", re.DOTALL)
MAX_UNIT_CHARS = 240  # longer sentences and lines are cut at a space
LOOK_AHEAD = 24  # units among which the last one is chosen


class Needle(NamedTuple):
    text: str  # a sentence, without white space at its ends
    depth: float  # where it should stand


class Haystack(NamedTuple):
    """A context with its needles, and for each needle the share of the haystack's tokens that stands before it."""

    text: str
    depths: list[float]


def units(text: str) -> list[str]:
    """The text in sentences and lines."""
    found = []
    for unit in _UNIT.findall(text):
        while len(unit) > MAX_UNIT_CHARS:
            cut = unit.rfind(" ", 1, MAX_UNIT_CHARS) + 1 or MAX_UNIT_CHARS
            found.append(unit[:cut])
            unit = unit[cut:]
        found.append(unit)
    return found


def endless(ask: Ask, filler: Sequence[str]) -> Iterator[tuple[str, int]]:
    """(unit, its tokens) without end. A text ends with the end of a line."""
    while True:
        parts = units(filler[ask.rng.randrange(len(filler))])
        for unit in parts[ask.rng.randrange(len(parts)) if len(parts) > 1 else 0 :]:
            yield unit, ask.tokens.count(unit)
        if parts and not parts[-1].endswith("\n"):
            yield "\n", 1


def draw(ask: Ask, filler: Sequence[str] | None = None) -> list[tuple[str, int]]:
    """Units with at least as many tokens as the whole sample may have, and some more to choose the last one from."""
    drawn, total, spare = [], 0, LOOK_AHEAD
    for unit, n in endless(ask, ask.filler if filler is None else filler):
        drawn.append((unit, n))
        total += n
        spare -= total > ask.length
        if not spare:
            return drawn
    raise AssertionError("endless")


def fit(drawn: Sequence[tuple[str, int]], room: int) -> list[tuple[str, int]]:
    """The first units that fill the room, and the longest of the next ones that fits into what is left of it."""
    kept, left = [], room
    for i, (unit, n) in enumerate(drawn):
        if n > left:
            ahead = [part for part in drawn[i : i + LOOK_AHEAD] if part[1] <= left]
            return kept + [max(ahead, key=_tokens_of)] if ahead else kept
        kept.append((unit, n))
        left -= n
    return kept


def _tokens_of(part: tuple[str, int]) -> int:
    return part[1]


def hide(ask: Ask, drawn: Sequence[tuple[str, int]], needles: Sequence[Needle], room: int, opening: str) -> Haystack:
    """The opening and the haystack with its needles; `room` tokens are free for all of it but the opening.

    A needle stands at the boundary of two units that is nearest to its depth. Counted in one piece, as it is encoded,
    tokens may be others than those of the units: then the haystack is cut again.
    """
    free = room - sum(ask.tokens.count(f" {needle.text}") + 1 for needle in needles)
    most = room + ask.tokens.count(opening)
    while True:
        kept = fit(drawn, free)
        text, depths = _put(kept, needles)
        text = opening + text
        over = ask.tokens.count(text) - most
        if over <= 0 or free <= 0:
            return Haystack(text, depths)
        free -= over


def _put(kept: Sequence[tuple[str, int]], needles: Sequence[Needle]) -> tuple[str, list[float]]:
    total = sum(n for _, n in kept)
    parts, depths, before, done = [], [0.0] * len(needles), 0, 0
    order = sorted(range(len(needles)), key=[needle.depth for needle in needles].__getitem__)
    for unit, n in [*kept, ("", 0)]:
        last = not unit
        while done < len(order) and (last or needles[order[done]].depth * total <= before + n / 2):
            depths[order[done]] = before / total if total else 0.0
            parts.append(_spaced(parts, needles[order[done]].text))
            done += 1
        parts.append(unit)
        before += n
    return "".join(parts), depths


def _spaced(parts: Sequence[str], needle: str) -> str:
    """The needle with the white space that it needs behind these parts, and behind it as there is before it."""
    if not parts or parts[-1].endswith("\n"):
        return needle + "\n"
    return f"{needle} " if parts[-1][-1].isspace() else f"\n{needle}\n"
