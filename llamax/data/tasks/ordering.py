"""Ordering: events in a haystack, and the order in which some of them stand there.

The question names the events in a random order. The answer is all of them in one string, so that naming them is not
enough: for three, one guess in six is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from llamax.data.tasks import haystack, words
from llamax.data.tasks.haystack import Needle
from llamax.data.tasks.sample import Ask, Exam, Maker, Question


class Wording(NamedTuple):
    event: str  # {name}
    asked: str  # {names}


SEEN = (
    Wording("Here {name} came in.", "In which order did these come in: {names}? Answer:"),
    Wording("Stop: {name}.", "Order of the stops {names}:"),
)
HELD_OUT = (Wording("Now {name} is on the list.", "Sort {names} as they were put on the list:"),)


@dataclass(frozen=True)
class Ordering(Maker):
    choices: ClassVar = {"kind": words.NAMES}

    events: int = 5
    asked: int = 3  # of them, in one question
    kind: str = "words"  # of words.KINDS
    seen: tuple[Wording, ...] = SEEN
    held_out: tuple[Wording, ...] = HELD_OUT

    def flaw(self, split: str) -> tuple[str, str] | None:
        if self.asked < 2:
            return f"asks for the order of {self.asked}", "Set asked to 2 or more."
        return words.too_few(split, [(self.kind, max(self.events, self.asked))])

    def __call__(self, ask: Ask) -> Exam:
        wording = ask.choose(self.seen, self.held_out)
        drawn = haystack.draw(ask)
        supply = words.Supply(ask.rng, ask.tokens, ask.split, words.around(wording, drawn))
        names = supply.draw(self.kind, max(self.events, self.asked * ask.questions))
        depths = ask.depths(len(names))
        groups = [range(q * self.asked, (q + 1) * self.asked) for q in range(ask.questions)]
        questions = [self._question(ask, wording, [names[i] for i in g], [depths[i] for i in g]) for g in groups]
        needles = [Needle(wording.event.format(name=name), d) for name, d in zip(names, depths, strict=True)]
        hay = haystack.hide(ask, drawn, needles, ask.room(questions), "")
        asked_at = [q._replace(depth=hay.depths[g[0]]) for q, g in zip(questions, groups, strict=True)]
        return Exam(hay.pieces, tuple(asked_at))

    def _question(self, ask: Ask, wording: Wording, names: list[str], depths: list[float]) -> Question:
        ordered = [names[i] for i in sorted(range(len(names)), key=depths.__getitem__)]
        asked = wording.asked.format(names=" / ".join(ask.rng.sample(names, len(names))))
        answer = ", ".join(ordered)
        return Question(f"\n{asked}", f" {answer}\n", (answer,))
