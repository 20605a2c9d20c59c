"""Tasks as a source of documents: a manifest with a [tasks] table. Nothing is written; document n follows from n.

    format = "tasks"
    kind = "text"                              # "multimodal" where a task has pictures
    lang = "en"
    documents = 100_000

    [tasks]
    weights = {needle = 1.0, key_value = 2.0}  # share of the documents of each task
    filler = "built/docs.toml"                 # a manifest of text, relative to this one
    lengths = [512, 2048]                      # tokens, each as often; or length_range = [256, 2048], log-uniform
    questions = 8                              # on a context, one after the other; fewer where they do not fit
    split = "train"                            # or "eval": keys and values
    templates = "seen"                         # or "held_out": wordings
    seed = 0
    answer_weight = 1.0                        # in the loss, of what has to be said
    end_weight = 1.0                           # of the end of an answer's line
    question_weight = 0.0                      # of what follows from a key's first word: the rest of the question
    context_weight = 0.0                       # of all else
    options.key_value = {records = 64}         # fields of a task that differ from its own

A document asks in the middle of nothing else: context, question, answer, question, answer, ... One that cannot be made,
as all short words stand in its text, is left out (`skip`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamax.config import ConfigError
from llamax.data.document import Document
from llamax.data.tasks import TASKS
from llamax.data.tasks.filler import Texts
from llamax.data.tasks.sample import SPLITS, TEMPLATES, Question, Task, TooShort
from llamax.data.tasks.tokens import Tokens
from llamax.data.tasks.words import KINDS, NoneLeft

MOST = 100_000  # of anything that an option counts


@dataclass(frozen=True)
class Table:
    """A manifest's [tasks]."""

    weights: dict[str, float]
    filler: str
    lengths: list[int] = field(default_factory=list)
    length_range: list[int] = field(default_factory=list)
    questions: int = 1
    split: str = "train"
    templates: str = "seen"
    seed: int = 0
    answer_weight: float = 1.0
    end_weight: float | None = None  # None: as the answer
    question_weight: float | None = None  # None: as the context
    context_weight: float = 0.0
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        return max([*self.lengths, *self.length_range])

    @property
    def mean_tokens(self) -> float:
        """Of a document: the mean of the lengths, which are reached to a few per cent."""
        if self.lengths:
            return sum(self.lengths) / len(self.lengths)
        low, high = self.length_range
        return (high - low) / math.log(high / low) if high > low else low

    def length(self, rng: random.Random) -> int:
        if self.lengths:
            return rng.choice(self.lengths)
        low, high = self.length_range
        return min(high, int(low * (high / low) ** rng.random()))

    def task(self, name: str) -> Task:
        """With the options that this table gives it."""
        return TASKS[name].with_options(self.options.get(name, {}))


def read_table(table: Mapping[str, Any], where: str, kind: str) -> Table:
    """A [tasks] table, checked. ConfigError, in three parts, where it says what is not so."""
    _check_keys(table, [f.name for f in dataclasses.fields(Table)], where, "[tasks]")
    for key in ("weights", "filler"):
        if key not in table:
            raise ConfigError(where, f"its [tasks] has no {key}", f"Add {key}; llamax/data/tasks/source.py says how.")
    checks = {
        "weights": _is_weights,
        "filler": _is_text,
        "lengths": _is_lengths,
        "length_range": _is_range,
        "questions": _is_count,
        "seed": _is_integer,
        "answer_weight": _is_weight,
        "end_weight": _is_weight,
        "question_weight": _is_weight,
        "context_weight": _is_weight,
        "options": _is_tables,
    }
    for key, value in table.items():
        if key in checks and not checks[key](value):
            raise ConfigError(where, f"its tasks.{key} is {value!r}", f"Correct it: {checks[key].__doc__}")
    for key, allowed in (("split", SPLITS), ("templates", TEMPLATES)):
        if table.get(key, allowed[0]) not in allowed:
            raise ConfigError(where, f"its tasks.{key} is {table[key]!r}", f"Use one of {', '.join(allowed)}.")
    if ("lengths" in table) == ("length_range" in table):
        raise ConfigError(where, "its [tasks] needs either lengths or length_range", "Give one of them.")
    read = Table(**table)
    if not (read.answer_weight or read.question_weight or read.context_weight):
        raise ConfigError(where, "nothing of its tasks weighs in the loss", "Raise tasks.answer_weight.")
    _check_tasks(read, where, kind)
    return read


def _check_tasks(table: Table, where: str, kind: str) -> None:
    for name in [*table.weights, *table.options]:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(TASKS)}."
            raise ConfigError(where, f"it asks for a task {name!r}, which does not exist", hint)
        if TASKS[name].pictures and kind != "multimodal":
            raise ConfigError(where, f"its task {name} has pictures and its kind is {kind!r}", 'Say "multimodal".')
        check_options(name, table.options.get(name, {}), where, "tasks.options", table.split)


def check_options(name: str, given: Mapping[str, Any], where: str, what: str, split: str = "eval") -> None:
    """ConfigError if the fields that a task is given are not its own, or cannot be so, alone or together. `what` they
    are a part of."""
    own = TASKS[name].options
    if not isinstance(given, Mapping):
        raise ConfigError(where, f"its {what}.{name} is {given!r}", f"Give a table of its fields, {', '.join(own)}.")
    _check_keys(given, list(own), where, f"[{what}.{name}]")
    for key, value in given.items():
        true = f"its {what}.{name}.{key} is {value!r}"
        if type(value) is not type(own[key]):
            raise ConfigError(where, true, f"Give a value such as its own, {own[key]!r}.")
        if isinstance(value, str):
            choices = TASKS[name].make.choices.get(key, KINDS)
            if value not in choices:
                raise ConfigError(where, true, f"Use one of {', '.join(choices)}.")
        elif value < (least := min(1, own[key])):
            raise ConfigError(where, true, f"Give {least} or more.")
        elif type(value) is int and value > MOST:
            raise ConfigError(where, true, f"Give {MOST} or less.")
    if flaw := TASKS[name].with_options(given).make.flaw(split):
        raise ConfigError(where, f"its {what}.{name} {flaw[0]}", flaw[1])


def _check_keys(table: Mapping[str, Any], keys: Sequence[str], where: str, what: str) -> None:
    for key in table:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"The keys are {', '.join(keys)}."
            raise ConfigError(where, f"its {what} has an unknown key {key!r}", hint)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_weights(value: Any) -> bool:
    """a table of task = weight, not all of them 0."""
    return isinstance(value, dict) and all(map(_is_number, value.values())) and sum(value.values()) > 0


def _is_text(value: Any) -> bool:
    """a text."""
    return isinstance(value, str)


def _is_lengths(value: Any) -> bool:
    """a list of numbers of tokens."""
    return isinstance(value, list) and bool(value) and all(map(_is_count, value))


def _is_range(value: Any) -> bool:
    """two numbers of tokens, the larger one last."""
    return _is_lengths(value) and len(value) == 2 and value[0] <= value[1]


def _is_count(value: Any) -> bool:
    """a whole number, 1 or more."""
    return type(value) is int and value >= 1


def _is_integer(value: Any) -> bool:
    """a whole number."""
    return type(value) is int


def _is_weight(value: Any) -> bool:
    """a number, 0 or more."""
    return _is_number(value)


def _is_tables(value: Any) -> bool:
    """a table of options for each task."""
    return isinstance(value, dict) and all(isinstance(options, dict) for options in value.values())


class Exams(Sequence[Document]):
    """The documents of a [tasks] table, by random access; each is made when it is asked for, always the same."""

    def __init__(self, table: Table, n: int, lang: str, filler: Sequence[Document], tokens: Tokens, where: str | Path):
        """ConfigError if one of the tasks cannot be asked at the shortest or at the longest of the lengths."""
        self.table, self.n, self.lang, self.tokens, self.where = table, n, lang, tokens, str(where)
        self.filler = Texts(filler)
        self.tasks = {name: table.task(name) for name, weight in table.weights.items() if weight}
        for name in self.tasks:
            for length in {min([*table.lengths, *table.length_range]), table.longest}:
                try:
                    self._exam(random.Random(f"{table.seed}/{name}"), name, length)
                except (TooShort, NoneLeft) as error:
                    raise ConfigError(f"{self.where}: {error.asked}", error.true, error.change) from None

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, number: int) -> Document:
        if not 0 <= number < self.n:
            raise IndexError(number)
        rng = random.Random(f"{self.table.seed}/{number}")
        (name,) = rng.choices(list(self.tasks), [self.table.weights[name] for name in self.tasks])
        length = self.table.length(rng)
        where = f"document {number} of {self.where}"
        try:
            exam = self._exam(rng, name, length)
        except (TooShort, NoneLeft) as error:
            return Document((), self.lang, f"{name}/{number}", skip="task", where=where, detail=str(error))
        pieces, weights = list(exam.context), [self.table.context_weight] * len(exam.context)
        for question in exam.questions:
            for piece, weight in self._weighed(question):
                pieces.append(piece)
                weights.append(weight)
        depths = [question.depth for question in exam.questions if question.depth is not None]
        meta = {
            "task": name,
            "length": length,
            "depths": [round(depth, 3) for depth in depths],
            "answers": [list(question.answers) for question in exam.questions],
            "split": self.table.split,
            "templates": self.table.templates,
        }
        weighed = tuple(weights) if set(weights) != {1.0} else ()
        return Document(tuple(pieces), self.lang, f"{name}/{number}", meta, where=where, weights=weighed)

    def _weighed(self, question: Question) -> list[tuple[str, float]]:
        """What is asked and said, with weights in the loss."""
        table, asked = self.table, [(question.asked, self.table.context_weight)]
        if table.question_weight is not None and question.told:
            rest = question.asked[len(question.told) :]
            asked = [(question.told, table.context_weight), (rest, table.question_weight)]
        said = [(question.said, table.answer_weight)]
        if table.end_weight is not None:
            answer = question.said.rstrip("\n")
            said = [(answer, table.answer_weight), (question.said[len(answer) :], table.end_weight)]
        return [*asked, *said]

    def _exam(self, rng: random.Random, name: str, length: int):
        """With as many questions as fit and as there are words for, a quarter fewer each time. TooShort or NoneLeft if
        there cannot be one: a long text may have all words in it."""
        questions, state = self.table.questions, rng.getstate()
        while True:
            rng.setstate(state)
            try:
                table = self.table
                return self.tasks[name].exam(
                    rng, self.filler, length, None, self.tokens, table.split, table.templates, questions
                )
            except (TooShort, NoneLeft):
                if questions == 1:
                    raise
                questions = questions * 3 // 4
