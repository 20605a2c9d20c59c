"""Key-value lookup: records, one a line, and the value of some of them.

With `records` records they stand spread over a haystack of text; with none stated they fill the context, and there is
no other text. With `fewest` their number is drawn, and text stands between: what a model learns from that looks back
beyond what is near. The keys and values may be as short as a token each, of few words, and a question may be the
beginning of its record: the easiest way for a small model to show that it looks back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from llamax.data.tasks import distractors, haystack, words
from llamax.data.tasks.haystack import Needle
from llamax.data.tasks.sample import Ask, Exam, Maker, Question


class Wording(NamedTuple):
    name: str
    record: str
    asked: str

    def said(self, key: str, value: str) -> str:
        return self.record.format(key=key, value=value)


SEEN = (
    Wording("plain", " {key} {value}", " {key}"),  # the space: every word is the token that it is within a line
    Wording("colon", "{key}: {value}", "{key}:"),
    Wording("question", "{key} = {value}", "What is {key}? Answer:"),
    Wording("sentence", "The value of {key} is {value}.", "The value of {key} is"),
)
HELD_OUT = (
    Wording("arrow", "{key} -> {value}", "{key} ->"),
    Wording("stands", "Under {key} stands {value}.", "What stands under {key}? Answer:"),
)


@dataclass(frozen=True)
class Lookup(Maker):
    choices: ClassVar = {"wording": ("any", *(wording.name for wording in SEEN)), "key_kind": words.NAMES}

    records: int = 0  # 0: as many as the context holds
    fewest: int = 0  # if there is text between: log-uniform from so many to as many as take a third of the length
    key_kind: str = "pairs"  # of words.KINDS
    value_kind: str = "pairs"
    n_words: int = 0  # of which keys and values are made; 0: all of the tokenizer's
    wording: str = "any"  # of those that are seen in training
    seen: tuple[Wording, ...] = SEEN
    held_out: tuple[Wording, ...] = HELD_OUT

    def flaw(self, split: str) -> tuple[str, str] | None:
        n = self.fewest or self.records or 2  # one that is asked for and one that is not
        return words.too_few(split, [(self.key_kind, n), (self.value_kind, n)], self.n_words)

    def __call__(self, ask: Ask) -> Exam:
        wording = ask.named(self.wording, self.seen, self.held_out)
        drawn = haystack.draw(ask) if self.records or self.fewest else []
        text = words.around(wording[1:], drawn)
        supply = words.Supply(ask.rng, ask.tokens, ask.split, text, self.n_words)
        records = self._drawn(ask, wording, supply) if self.fewest else self._stated(ask, wording, supply)
        needles = [
            Needle(wording.said(*record), depth, alone=True)
            for record, depth in zip(records, ask.depths(len(records)), strict=True)
        ]
        questions = [self._question(wording, *record) for record in records[: ask.questions]]
        room = ask.room(questions)
        if not drawn:
            drawn = distractors.fill(ask, supply, self.key_kind, self.value_kind, wording.said, room)
        hay = haystack.hide(ask, drawn, needles, room - 1, "")
        (context,) = hay.pieces
        questions = [q._replace(depth=depth) for q, depth in zip(questions, hay.depths, strict=False)]
        return Exam((context if str(context).endswith("\n") else f"{context}\n",), tuple(questions))

    def _question(self, wording: Wording, key: str, value: str) -> Question:
        asked = wording.asked.format(key=key)
        return Question(asked, f" {value}\n", (value,), told=words.told(asked, key))

    def _stated(self, ask: Ask, wording: Wording, supply: words.Supply) -> list[tuple[str, str]]:
        """Those that are asked for, and of a stated number the others."""
        if self.records:
            return self._some(supply, max(self.records, ask.questions), least=self.records)
        first = self._record(supply)
        most = (ask.length - 2) // (2 * self._tokens_of(ask, wording, first))  # of each, a record and a question
        return [first, *self._some(supply, min(ask.questions, most) - 1, least=0)]

    def _drawn(self, ask: Ask, wording: Wording, supply: words.Supply) -> list[tuple[str, str]]:
        """As many records as are drawn."""
        first = self._record(supply)
        most = ask.length // (3 * self._tokens_of(ask, wording, first))
        n = round(self.fewest * max(1.0, most / self.fewest) ** ask.rng.random())
        return [first, *self._some(supply, n - 1, least=self.fewest - 1)]

    def _tokens_of(self, ask: Ask, wording: Wording, record: tuple[str, str]) -> int:
        return ask.tokens.count(f"{wording.said(*record)}\n")

    def _some(self, supply: words.Supply, n: int, least: int) -> list[tuple[str, str]]:
        """n records, or fewer if words are used up before."""
        records: list[tuple[str, str]] = []
        try:
            while len(records) < n:
                records.append(self._record(supply))
        except words.NoneLeft:
            if len(records) < least:
                raise
        return records

    def _record(self, supply: words.Supply) -> tuple[str, str]:
        (key,), (value,) = supply.draw(self.key_kind, 1), supply.draw(self.value_kind, 1)
        return key, value
