"""Variable tracking: chains of assignments, and all variables that hold a value in the end.

    VAR A = 12345 ... VAR B = VAR A ... VAR C = VAR B          Which variables hold 12345? A, B, C

A chain's assignments stand in their order, spread over the haystack; `hops` follow the first. Other chains, alike, are
distractors. Source: RULER, arXiv 2404.06654, section 3 (variable tracking; there one chain of four hops).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from llamax.data.tasks import haystack, words
from llamax.data.tasks.haystack import NOISE, Needle
from llamax.data.tasks.sample import Ask, Exam, Maker, Question


class Wording(NamedTuple):
    opening: str
    first: str  # {name} gets {value}
    hop: str  # {name} gets what {other} has
    asked: str  # {value}, and the number {n} of variables


SEEN = (
    Wording("", "Let {name} be {value}.", "Let {name} be {other}.", "Which names are {value}? Answer:"),
    Wording(
        "Follow the assignments in this text.\n",
        "VAR {name} = {value}.",
        "VAR {name} = VAR {other}.",
        "Question: Which {n} variables have the value {value}? Answer:",
    ),
)
HELD_OUT = (
    Wording(
        "",
        "Room {name} is given the key {value}.",
        "Room {name} is given the key of room {other}.",
        "List the rooms with the key {value}:",
    ),
)


@dataclass(frozen=True)
class Tracking(Maker):
    choices: ClassVar = {"haystack": ("text", "noise"), "name_kind": words.ONE_WORD, "value_kind": words.ONE_WORD}

    chains: int = 2
    hops: int = 2
    name_kind: str = "letters"  # of words.KINDS
    value_kind: str = "numbers"
    haystack: str = "text"  # | noise: RULER's five sentences
    seen: tuple[Wording, ...] = SEEN
    held_out: tuple[Wording, ...] = HELD_OUT

    def flaw(self, split: str) -> tuple[str, str] | None:
        return words.too_few(split, [(self.name_kind, self.chains * (self.hops + 1)), (self.value_kind, self.chains)])

    def __call__(self, ask: Ask) -> Exam:
        wording = ask.choose(self.seen, self.held_out)
        drawn = haystack.draw(ask, NOISE if self.haystack == "noise" else None)
        supply = words.Supply(ask.rng, ask.tokens, ask.split, words.around(wording, drawn))
        needles, questions = [], []
        for number in range(max(self.chains, ask.questions)):
            (value,), names = supply.draw(self.value_kind, 1), supply.draw(self.name_kind, self.hops + 1)
            depths = self._depths(ask, ask.depth if number == 0 else None)
            needles += self._chain(wording, value, names, depths)
            asked = wording.asked.format(value=value, n=len(names))
            questions.append(Question(f"\n{asked}", f" {', '.join(names)}\n", tuple(names)))
        questions = questions[: ask.questions]
        hay = haystack.hide(ask, drawn, needles, ask.room(questions, wording.opening), wording.opening)
        starts = hay.depths[:: self.hops + 1]
        asked_at = [question._replace(depth=depth) for question, depth in zip(questions, starts, strict=False)]
        return Exam(hay.pieces, tuple(asked_at))

    def _depths(self, ask: Ask, first: float | None) -> list[float]:
        """In order; the others behind the first where that is given."""
        if first is None:
            return sorted(ask.rng.random() for _ in range(self.hops + 1))
        return [first, *sorted(ask.rng.uniform(first, 1) for _ in range(self.hops))]

    def _chain(self, wording: Wording, value: str, names: list[str], depths: list[float]) -> list[Needle]:
        said = [wording.first.format(name=names[0], value=value)]
        said += [wording.hop.format(name=names[i], other=names[i - 1]) for i in range(1, len(names))]
        return [Needle(text, depth) for text, depth in zip(said, depths, strict=True)]
