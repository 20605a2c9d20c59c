"""What a task gives: a context, questions on it and what should be said, all in text that a row of tokens holds.

    length = <|begin_of_text|> + context + questions + answers, in tokens of the run's tokenizer

A sample never has more tokens than it was asked for, and few per cent less. Evaluations ask one question (`Sample`);
training asks several on one context, one after the other (`Exam`), so that a row teaches more than one answer. All of a
sample follows from the state of its random generator.

`split` says which keys and values are drawn ("train" or "eval": disjoint, see words.py), `templates` which wordings
("seen" in training, or "held_out" of it).
"""

from __future__ import annotations

import abc
import dataclasses
import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

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


class Maker(abc.ABC):
    """Makes a task's exams: a frozen dataclass with the task's parameters."""

    pictures: ClassVar[bool] = False  # whether its contexts have some
    choices: ClassVar[Mapping[str, Collection[str]]] = {}  # what a parameter that is a name can be

    @abc.abstractmethod
    def __call__(self, ask: Ask) -> Exam:
        """Questions on a context."""

    @abc.abstractmethod
    def flaw(self, split: str) -> tuple[str, str] | None:
        """What its parameters ask for that there is not, though each is what it may be, and what to change."""


@dataclass(frozen=True)
class Task:
    """A task by its name: how its exams are made."""

    name: str
    make: Maker
    rule: str = "line"  # how answers are scored: line | contains (see `score`)

    @property
    def options(self) -> dict[str, Any]:
        """Its parameters that a manifest may change: numbers and names."""
        own = {f.name: getattr(self.make, f.name) for f in dataclasses.fields(self.make)}
        return {name: value for name, value in own.items() if isinstance(value, int | float | str)}

    @property
    def pictures(self) -> bool:
        return self.make.pictures

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

    Of our own tasks the first line counts, as a list of items with commas between: an answer is what an item begins or
    ends with, in whole words, so that "It is 4711." gives 4711 and a row of guesses without commas only two of them.
    Who lists more items than were asked for has the share of what was asked for in what is listed: saying all of the
    context is no answer. With meta["rule"] "contains" it is RULER's rule (arXiv 2404.06654): what the text contains
    anywhere; with meta["any"], of its questions and answers, one answer is enough.
    """
    text = text.strip().casefold()
    answers = [answer.casefold() for answer in sample.answers]
    if sample.meta.get("rule") == "contains":
        found = [answer in text for answer in answers]
        return float(any(found)) if sample.meta.get("any") else sum(found) / len(found)
    listed = _items(text.splitlines()[0] if text else "")
    asked = [_items(answer) for answer in answers]
    given = sum(_gives(", ".join(listed), ", ".join(answer)) for answer in asked)
    return given / len(answers) * min(1.0, sum(map(len, asked)) / max(1, len(listed)))


def _items(text: str) -> list[str]:
    """Of a list with commas; semicolons and slashes are as good."""
    return [item for item in map(str.strip, re.split("[,;/]", text)) if item]


def _gives(line: str, answer: str) -> bool:
    """Whether an item of the line, or several in a row, begin or end with the answer."""
    spelt = re.escape(answer)
    return bool(re.search(rf"(?:^|,)[^\w,-]*{spelt}(?![\w-])|(?<![\w-]){spelt}[^\w,-]*(?:,|$)", line))
