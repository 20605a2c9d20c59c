"""Real text as a haystack, and needles put between its sentences and lines.

A unit is a sentence or a line with the white space behind it, so that units joined are the text again. A haystack is
runs of units, each from a random place of a random text to that text's end. It is cut to the tokens that are free; its
last units are the longest of the next ones that still fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llamax.data.document import Picture
from llamax.data.tasks.sample import Ask, TooShort

NOISE = ("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n",)  # RULER's
_UNIT = re.compile(r".+?(?:(?<=[.!?])[ \t]+(?=\S)|\n+|\Z)|\n+", re.DOTALL)
MAX_UNIT_CHARS = 240  # longer sentences and lines are cut, at a space if there is one
MAX_FOREIGN_CHARS = 60  # the same where there are other letters than ASCII's, which may be several tokens each
LOOK_AHEAD = 24  # units among which the last ones are chosen
TRIES = 4  # of cutting a haystack to its tokens, once it fits
NEAR = 4  # tokens that may be left over without another try


class Needle(NamedTuple):
    text: str  # a sentence, without white space at its ends
    depth: float  # where it should stand
    picture: Picture | None = None  # behind the text
    alone: bool = False  # on a line of its own


class Haystack(NamedTuple):
    """A context with its needles, and for each needle the share of the haystack's tokens that stands before it."""

    pieces: tuple[str | Picture, ...]
    depths: list[float]


def units(text: str) -> list[str]:
    """The text in sentences and lines."""
    found = []
    for unit in _UNIT.findall(text):
        most = MAX_UNIT_CHARS if unit.isascii() else MAX_FOREIGN_CHARS
        while len(unit) > most:
            cut = unit.rfind(" ", 1, most) + 1 or most
            found.append(unit[:cut])
            unit = unit[cut:]
        found.append(unit)
    return found


def endless(ask: Ask, filler: Sequence[str]) -> Iterator[tuple[str, int]]:
    """(unit, its tokens) without end. A text ends with the end of a line."""
    while True:
        parts = units(filler[ask.rng.randrange(len(filler))])
        for unit in parts[0 if filler is NOISE else ask.rng.randrange(max(1, len(parts))) :]:
            yield unit, ask.tokens.count(unit)
        if parts and not parts[-1].endswith("\n"):
            yield "\n", 1


def draw(ask: Ask, filler: Sequence[str] | None = None) -> list[tuple[str, int]]:
    """Units with more tokens than the whole sample may have: joined they have fewer, and the last one is chosen."""
    drawn, total, spare = [], 0, LOOK_AHEAD
    for unit, n in endless(ask, ask.filler if filler is None else filler):
        drawn.append((unit, n))
        total += n
        spare -= total > 1.25 * ask.length
        if not spare:
            return drawn
    raise AssertionError("endless")


def fit(drawn: Sequence[tuple[str, int]], room: int) -> list[tuple[str, int]]:
    """The first units that fill the room, and the longest of the next ones that fit into what is left of it."""
    kept, left = [], room
    for i, (unit, n) in enumerate(drawn):
        if n > left:
            for part in sorted(drawn[i : i + LOOK_AHEAD], key=_tokens_of, reverse=True):
                if part[1] <= left:
                    kept.append(part)
                    left -= part[1]
            return kept
        kept.append((unit, n))
        left -= n
    return kept


def _tokens_of(part: tuple[str, int]) -> int:
    return part[1]


def hide(ask: Ask, drawn: Sequence[tuple[str, int]], needles: Sequence[Needle], room: int, opening: str) -> Haystack:
    """The opening and the haystack with its needles; `room` tokens are free for all of it but the opening.

    A needle stands at the boundary of two units that is nearest to its depth. Counted in one piece, as it is encoded,
    tokens are others than those of the units: the haystack is cut again by the difference. ConfigError if the needles
    alone take more than the room.
    """
    most, taken = room + ask.tokens.count(opening), ask.tokens.count(*(_spaced(needle) for needle in needles))
    free = room - taken - ask.tokens.count(*(needle.picture for needle in needles if needle.picture))
    found, left, tries = None, room, TRIES
    while free >= 0 and (tries or not found):
        pieces, depths = _put(fit(drawn, free), needles, opening)
        over = ask.tokens.count(*pieces) - most
        if 0 <= -over <= left:
            found, left = Haystack(pieces, depths), -over
        if found and left <= NEAR:
            break
        free, tries = free - over, max(0, tries - 1)
    if found:
        return found
    true = f"{room} are left for what it hides, which takes {room - free}"
    raise TooShort(f"task {ask.name} at {ask.length} tokens", true, "Ask for more tokens.")


def _spaced(needle: Needle) -> str:
    return f"{needle.text}\n" if needle.alone else f" {needle.text}\n"


def _put(kept: Sequence[tuple[str, int]], needles: Sequence[Needle], opening: str) -> tuple[tuple, list[float]]:
    """(pieces, depths)."""
    total = sum(n for _, n in kept)
    pieces: list[str | Picture] = []
    parts = [opening] if opening else []  # of the text that is open
    depths, before, done = [0.0] * len(needles), 0, 0
    order = sorted(range(len(needles)), key=[needle.depth for needle in needles].__getitem__)
    for unit, n in [*kept, ("", 0)]:
        while done < len(order) and (not unit or needles[order[done]].depth * total <= before + n / 2):
            depths[order[done]] = before / total if total else 0.0
            _add(pieces, parts, needles[order[done]])
            done += 1
        parts.append(unit)
        before += n
    return (*pieces, "".join(parts)), depths


def _add(pieces: list[str | Picture], parts: list[str], needle: Needle) -> None:
    """Puts a needle behind the open text, with white space before it, and behind it as there is before it."""
    begun = not parts or parts[-1].endswith("\n")
    spaced = (begun or parts[-1][-1].isspace()) and not needle.alone
    if needle.picture:
        pieces += ["".join([*parts, needle.text if begun else f"\n{needle.text}"]), needle.picture]
        parts[:] = ["\n"]
    elif begun:
        parts.append(f"{needle.text}\n")
    else:
        parts.append(f"{needle.text} " if spaced else f"\n{needle.text}\n")
