"""Records that nobody asks for, worded as those that are, as many as a context has room for.

A few words make few keys and values: in a long context they run out. Then values stand in several records, and once
there are no more keys whole records stand there again; of half of the records only, and in any order, so that what is
asked for is not told by being there once. Its own key and value are never among them.
"""

from __future__ import annotations

from collections.abc import Callable

from llamax.data.tasks.sample import Ask
from llamax.data.tasks.words import Supply


def fill(
    ask: Ask, supply: Supply, key_kind: str, value_kind: str, say: Callable[[str, str], str], room: int
) -> list[tuple[str, int]]:
    """Units (a line, its tokens) with more tokens than there is room for. NoneLeft if there are no words for one."""
    drawn: list[tuple[str, int]] = []
    records: list[tuple[str, str]] = []
    again: list[tuple[str, str]] = []  # records of which a key or value may stand there again
    total = 0
    while total <= room:
        key, value = supply.another(key_kind), supply.another(value_kind)
        if not (key and value or again):
            again = records[len(records) // 2 :]
            if not again:
                raise supply.none_left(value_kind if key else key_kind)
        if not key:
            key, value = ask.rng.choice(again)
        elif not value:
            _, value = ask.rng.choice(again)
        records.append((key, value))
        unit = f"{say(key, value)}\n"
        drawn.append((unit, ask.tokens.count(unit)))
        total += drawn[-1][1]
    if again:
        ask.rng.shuffle(drawn)
    return drawn
