"""Key-value lookup: records, one a line, and the value of some of them.

With `records` records they stand spread over a haystack of text; with none stated they fill the context, and there is
no other text. The keys and values may be as short as a token each, and a question may be the beginning of its record:
the easiest way for a small model to show that it looks back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llamax.data.tasks import haystack, words
from llamax.data.tasks.haystack import Needle
from llamax.data.tasks.sample import Ask, Exam, Question


class Wording(NamedTuple):
    record: str
    asked: str


SEEN = (
    Wording("{key}: {value}", "{key}:"),
    Wording("{key} = {value}", "What is {key}? Answer:"),
    Wording("The value of {key} is {value}.", "The value of {key} is"),
)
HELD_OUT = (
    Wording("{key} -> {value}", "{key} ->"),
    Wording("Under {key} stands {value}.", "What stands under {key}? Answer:"),
)


@dataclass(frozen=True)
class Lookup:
    records: int = 0  # 0: as many as the context holds
    key_kind: str = "pairs"  # of words.KINDS
    value_kind: str = "pairs"
    seen: tuple[Wording, ...] = SEEN
    held_out: tuple[Wording, ...] = HELD_OUT

    def __call__(self, ask: Ask) -> Exam:
        wording = ask.choose(self.seen, self.held_out)
        drawn = haystack.draw(ask) if self.records else []
        supply = words.Supply(ask.rng, ask.tokens, ask.split, "".join(unit for unit, _ in drawn))
        records = [self._record(supply) for _ in range(max(self.records, ask.questions))]
        needles = [
            Needle(wording.record.format(key=key, value=value), depth)
            for (key, value), depth in zip(records, ask.depths(len(records)), strict=True)
        ]
        questions = [
            Question("\n" + wording.asked.format(key=key), f" {value}\n", (value,))
            for key, value in records[: ask.questions]
        ]
        room = ask.room(questions)
        if not self.records:
            drawn = self._fill(ask, wording, supply, room)
        hay = haystack.hide(ask, drawn, needles, room, "")
        questions = [q._replace(depth=depth) for q, depth in zip(questions, hay.depths, strict=False)]
        return Exam(hay.pieces, tuple(questions))

    def _record(self, supply: words.Supply) -> tuple[str, str]:
        (key,), (value,) = supply.draw(self.key_kind, 1), supply.draw(self.value_kind, 1)
        return key, value

    def _fill(self, ask: Ask, wording: Wording, supply: words.Supply, room: int) -> list[tuple[str, int]]:
        """Records that nobody asks for, as units."""
        drawn, total = [], 0
        while total <= room:
            key, value = self._record(supply)
            unit = wording.record.format(key=key, value=value) + "\n"
            drawn.append((unit, ask.tokens.count(unit)))
            total += drawn[-1][1]
        return drawn
