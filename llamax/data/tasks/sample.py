"""What a task gives: a context, questions on it and what should be said, all in text that a row of tokens holds.

    length = <|begin_of_text|> + context + questions + answers, in tokens of the run's tokenizer

A sample never has more tokens than it was asked for, and few per cent less. Evaluations ask one question (`Sample`);
training asks several on one context, one after the other (`Exam`), so that a row teaches more than one answer. All of a
sample follows from the state of its random generator.

`split` says which keys and values are drawn ("train" or "eval": disjoint, see words.py), `templates` which wordings
("seen" in training, or "held_out" of it).
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from llamax.config import ConfigError
from llamax.data.document import Picture
from llamax.data.tasks.tokens import Tokens

SPLITS = ("train", "eval")
TEMPLATES = ("seen", "held_out")

W = TypeVar("W")


class TooShort(ConfigError):
    """A length that does not hold a task."""


class Sample(NamedTuple):
    """A question on a context. The question stands last; what should be said follows at once, a space first."""

    pieces: tuple[str | Picture, ...]
    answers: tuple[str, ...]  # all of them have to be said, unless meta["any"]
    meta: dict[str, Any]  # task, length, depth (of the needle that is asked for), tokens (of the pieces), said, ...


class Question(NamedTuple):
    asked: str  # ends where the answer begins
    said: str  # the answer as it is learnt: a space before it, the end of the line behind
    answers: tuple[str, ...]
    depth: float | None = None  # share of the context before what is asked for; None where it is all over the context
    told: str = ""  # the beginning of `asked` from which the rest of it follows; "": it does not


class Exam(NamedTuple):
    """Questions on one context, in the order in which they are asked."""

    context: tuple[str | Picture, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Ask:
    """What is asked of a task."""

    rng: random.Random
    filler: Sequence[str]  # texts to draw distractors from
    length: int  # tokens
    depth: float | None  # 0 .. 1: where the needle of the first question stands; None: anywhere
    tokens: Tokens
    split: str
    templates: str
    questions: int
    name: str

    def choose(self, seen: Sequence[W], held_out: Sequence[W]) -> W:
        """One of the wordings."""
        return self.rng.choice(seen if self.templates == "seen" else held_out)

    def named(self, name: str, seen: Sequence[W], held_out: Sequence[W]) -> W:
        """The same; of those that are seen in training the one of that name, if any."""
        return self.choose([wording for wording in seen if name == wording.name] or seen, held_out)  # type: ignore[attr-defined]

    def depths(self, n: int) -> list[float]:
        """Of n needles, the first of which is asked for first."""
        drawn = [self.rng.random() for _ in range(n)]
        return drawn if self.depth is None else [self.depth, *drawn[1:]]

    def room(self, questions: Sequence[Question], *context: str | Picture) -> int:
        """Tokens that are left for the rest of the context. ConfigError if there are none."""
        spoken = [part for question in questions for part in (question.asked, question.said)]
        taken = 1 + self.tokens.count(*context, *spoken)
        if taken > self.length:
            true = f"its questions and what they ask for take {taken} tokens"
            raise TooShort(f"task {self.name} at {self.length} tokens", true, "Ask for more tokens.")
        return self.length - taken


@dataclass(frozen=True)
class Task:
    """A task by its name: how its exams are made."""

    name: str
    make: Callable[[Ask], Exam]  # a frozen dataclass with the task's parameters
    rule: str = "line"  # how answers are scored: line | contains (see `score`)

    @property
    def options(self) -> dict[str, Any]:
        """Its parameters that a manifest may change: numbers and names."""
        own = {f.name: getattr(self.make, f.name) for f in dataclasses.fields(self.make)}
        return {name: value for name, value in own.items() if isinstance(value, int | float | str)}

    @property
    def pictures(self) -> bool:
        return getattr(self.make, "pictures", False)

    def with_options(self, options: Mapping[str, Any]) -> Task:
        """The task with some of them changed."""
        make: Any = self.make
        return dataclasses.replace(self, make=dataclasses.replace(make, **options)) if options else self

    def __call__(
        self,
        rng: random.Random,
        filler: Sequence[str],
        length: int,
        depth: float | None,
        tokens: Tokens,
        split: str = "eval",
        templates: str = "seen",
    ) -> Sample:
        """One question. Raises ConfigError if the length does not hold it, or the text lacks words for its keys."""
        exam = self.exam(rng, filler, length, depth, tokens, split, templates)
        (question,) = exam.questions
        pieces = (*exam.context, question.asked)
        about = {
            "task": self.name,
            "length": length,
            "depth": question.depth,
            "split": split,
            "templates": templates,
            "said": question.said,
            "rule": self.rule,
            "tokens": tokens.count(*pieces),
        }
        return Sample(pieces, question.answers, about)

    def exam(
        self,
        rng: random.Random,
        filler: Sequence[str],
        length: int,
        depth: float | None,
        tokens: Tokens,
        split: str = "train",
        templates: str = "seen",
        questions: int = 1,
    ) -> Exam:
        """As many questions as asked for, or as the task can ask on one context."""
        for value, allowed in ((split, SPLITS), (templates, TEMPLATES)):
            if value not in allowed:
                raise ConfigError(f"task {self.name} of {value!r}", "there is none", f"Use one of {allowed}.")
        return self.make(Ask(rng, filler, length, depth, tokens, split, templates, questions, self.name))


def score(sample: Sample, text: str) -> float:
    """0 .. 1: the share of the answers that a text gives, in any case of letters.

    Of our own tasks the first line counts, and in it whole words; who lists more than was asked for has the share of
    what was asked for in what is listed, so that saying all of the context is no answer. With meta["rule"] "contains"
    it is RULER's rule (arXiv 2404.06654): what the text contains anywhere; with meta["any"], of its questions and
    answers, one answer is enough.
    """
    text = text.strip().lower()
    answers = [answer.lower() for answer in sample.answers]
    if sample.meta.get("rule") == "contains":
        found = [answer in text for answer in answers]
        return float(any(found)) if sample.meta.get("any") else sum(found) / len(found)
    line = text.partition("\n")[0]
    found = [bool(re.search(rf"(?<![\w-]){re.escape(answer)}(?![\w-])", line)) for answer in answers]
    asked, said = sum(map(_items, answers)), _items(line)
    return sum(found) / len(found) * min(1.0, asked / max(1, said))


def _items(text: str) -> int:
    """Of a list with commas."""
    return sum(bool(item.strip()) for item in text.split(","))
