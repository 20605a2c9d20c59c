"""Needles in a haystack: one key or several, one value each or several, one question or several at once.

Among `keys` keys with `values` values each, `queries` keys are asked for together. The other keys are distractors, made
alike. Where an exam has more questions than there are keys for, there are more keys. Source: RULER, arXiv 2404.06654,
section 3 (NIAH).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from llamax.data.tasks import distractors, haystack, words
from llamax.data.tasks.haystack import NOISE, Needle
from llamax.data.tasks.sample import Ask, Exam, Maker, Question


class Wording(NamedTuple):
    """{noun} and {nouns} are what a value is; {key} is one key, or in a question the keys that are asked for."""

    name: str
    opening: str
    needle: str
    asked: str  # for one value
    asked_all: str  # for several


SEEN = (
    Wording("plain", "", "Remember {key} {value}.", "Remember {key}", "Remember all of {key}:"),
    Wording(
        "secret",
        "",
        "The secret {noun} of {key} is {value}.",
        "Question: What is the secret {noun} of {key}? Answer:",
        "Question: What are the secret {nouns} of {key}? Answer:",
    ),
    Wording(
        "remember",
        "Read the text. It is asked for later.\n",
        "Remember that {key} has the {noun} {value}.",
        "Which {noun} does {key} have? It is",
        "Which {nouns} do {key} have? They are",
    ),
    Wording(
        "note",
        "",
        "Note: {key} stands for {value}.",
        "{key} stands for",
        "List all that is stood for by {key}:",
    ),
)
HELD_OUT = (
    Wording(
        "by_the_way",
        "Some facts are hidden in what follows.\n",
        "By the way, the {noun} that belongs to {key} is {value}.",
        "Tell the {noun} that belongs to {key}:",
        "Tell the {nouns} that belong to {key}:",
    ),
    Wording(
        "drawer",
        "",
        "In the drawer of {key} lies the {noun} {value}.",
        "Q: Which {noun} lies in the drawer of {key}? A:",
        "Q: Which {nouns} lie in the drawer of {key}? A:",
    ),
)
NOUNS = {
    "short": "word",
    "pairs": "word",
    "phrases": "word",
    "words": "word",
    "digits": "number",
    "five_digits": "number",
    "numbers": "number",
    "uuids": "uuid",
    "letters": "name",
    "coded": "word",
}


@dataclass(frozen=True)
class Needles(Maker):
    choices: ClassVar = {
        "haystack": ("text", "noise", "needles"),
        "key_kind": words.NAMES,
        "wording": ("any", *(wording.name for wording in SEEN)),
    }

    keys: int = 1
    values: int = 1  # of each key
    queries: int = 1  # keys of one question
    key_kind: str = "words"  # of words.KINDS
    value_kind: str = "numbers"
    n_words: int = 0  # of which keys and values are made; 0: all of the tokenizer's
    wording: str = "any"  # of those that are seen in training
    haystack: str = "text"  # | noise: RULER's five sentences | needles: more of them and nothing else
    seen: tuple[Wording, ...] = SEEN
    held_out: tuple[Wording, ...] = HELD_OUT

    def flaw(self, split: str) -> tuple[str, str] | None:
        keys, more = max(self.keys, self.queries), self.haystack == "needles"
        needed = [(self.key_kind, keys + more), (self.value_kind, keys * self.values + more)]
        return words.too_few(split, needed, self.n_words)

    def __call__(self, ask: Ask) -> Exam:
        wording = ask.named(self.wording, self.seen, self.held_out)
        drawn = [] if self.haystack == "needles" else haystack.draw(ask, NOISE if self.haystack == "noise" else None)
        said = () if wording.name == "plain" else [self._say(part, "", "") for part in wording[1:]]
        supply = words.Supply(ask.rng, ask.tokens, ask.split, words.around(said, drawn), self.n_words)
        n_keys = max(self.keys, self.queries * ask.questions)
        keys = supply.draw(self.key_kind, n_keys)
        values = [supply.draw(self.value_kind, self.values) for _ in keys]
        needles = self._needles(ask, wording, keys, values)
        asked = [
            self._question(wording, range(q * self.queries, (q + 1) * self.queries), keys, values, needles)
            for q in range(ask.questions)
        ]
        opening = self._say(wording.opening, "", "")
        room = ask.room(asked, opening)
        if self.haystack == "needles":
            say = functools.partial(self._say, wording.needle)
            drawn = distractors.fill(ask, supply, self.key_kind, self.value_kind, say, room)
        hay = haystack.hide(ask, drawn, needles, room, opening)
        depths = [hay.depths[q * self.queries * self.values] for q in range(ask.questions)]
        questions = [question._replace(depth=depth) for question, depth in zip(asked, depths, strict=True)]
        return Exam(hay.pieces, tuple(questions))

    def _needles(self, ask: Ask, wording: Wording, keys: list[str], values: list[list[str]]) -> list[Needle]:
        """Key after key. A key's values stand in their order in the text, the first of the first at ask.depth."""
        depths = ask.depths(len(keys) * self.values)
        return [
            Needle(self._say(wording.needle, key, value), depths[k * self.values + v])
            for k, key in enumerate(keys)
            for v, value in enumerate(values[k])
        ]

    def _question(self, wording: Wording, of: range, keys: list[str], values: list[list[str]], needles) -> Question:
        """A key's values are said in the order in which they stand in the text."""
        answers = []
        for k in of:
            stand = [needle.depth for needle in needles[k * self.values : (k + 1) * self.values]]
            answers += [values[k][v] for v in sorted(range(self.values), key=stand.__getitem__)]
        named = [keys[k] for k in of]
        said = ", ".join(named[:-1]) + f" and {named[-1]}" if len(named) > 1 else named[0]
        asked = "\n" + self._say(wording.asked if len(answers) == 1 else wording.asked_all, said, "")
        told = words.told(asked, said) if len(named) == 1 else ""
        return Question(asked, f" {', '.join(answers)}\n", tuple(answers), told=told)

    def _say(self, template: str, key: str, value: str) -> str:
        noun = NOUNS[self.value_kind]
        return template.format(key=key, value=value, noun=noun, nouns=f"{noun}s")
