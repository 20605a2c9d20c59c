"""RULER's questions and answers (arXiv 2404.06654, section 3), from a user's file: contexts among other contexts.

A line of the JSONL file is {"question": str, "context": str | "contexts": [str, ...], "answers": [str, ...]}. Questions
with one context make the task qa_1, as SQuAD's do in the paper; those with several make qa_2, as HotpotQA's. The
contexts of other questions stand around a question's own, in any order, as many as its length holds; no context stands
there twice. One of the answers is enough.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llamax.config import ConfigError, resolve_path
from llamax.data.tasks import Sample, Tokens
from llamax.evals.samples import Make

ONLY = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
OPENING, CLOSING = f"{ONLY}\n\nThe following are given documents.\n\n", f"{ONLY}\n\nQuestion: "
EXAMPLE = '{"question": "Who?", "contexts": ["...", "..."], "answers": ["Ada"]}'


class Question(NamedTuple):
    question: str
    contexts: tuple[str, ...]
    answers: tuple[str, ...]


def makers(path: str, tokenizer: str, lengths: Sequence[int]) -> dict[str, Make]:
    """The tasks that the file has questions for. ConfigError if it cannot be used at these lengths."""
    questions, tokens = read(path), Tokens(tokenizer)
    contexts = list(dict.fromkeys(context for question in questions for context in question.contexts))
    total = tokens.count(*_documents(contexts))
    if total < lengths[-1]:
        true = f"its {len(contexts)} contexts have {total} tokens together, and none may stand there twice"
        change = f"Bring a file with more contexts, or lengths of at most {total}."
        raise ConfigError(f"questions of {path} at {lengths[-1]} tokens", true, change)
    longest = max((_bare_length(tokens, question), question) for question in questions)
    if longest[0] > lengths[0]:
        true = f"the question {longest[1].question[:60]!r} takes {longest[0]} tokens with its own contexts"
        raise ConfigError(f"questions of {path} at {lengths[0]} tokens", true, f"Use lengths from {longest[0]} up.")
    found: dict[str, Make] = {}
    for name, some in (
        ("qa_1", [q for q in questions if len(q.contexts) == 1]),
        ("qa_2", [q for q in questions if len(q.contexts) > 1]),
    ):
        if some:
            found[name] = _Asker(name, some, contexts, tokens)
    return found


@dataclass(frozen=True)
class _Asker:
    name: str
    questions: list[Question]
    contexts: list[str]
    tokens: Tokens

    def __call__(self, rng: random.Random, length: int, depth: float | None) -> Sample:
        del depth  # its contexts stand anywhere
        asked = rng.choice(self.questions)
        shown, free = list(asked.contexts), length - _bare_length(self.tokens, asked)
        for other in rng.sample(self.contexts, len(self.contexts)):
            taken = self.tokens.count(_document(len(shown) + 1, other))  # whichever will have the number
            if other in asked.contexts or taken > free:
                continue
            shown.append(other)
            free -= taken
            if free < length // 50:
                break
        rng.shuffle(shown)
        documents = "".join(_documents(shown))
        said = f" {asked.answers[0]}\n"
        pieces = (OPENING + documents, _asked(asked))
        about = {"task": self.name, "length": length, "depth": None, "said": said, "rule": "contains", "any": True}
        return Sample(pieces, asked.answers, about | {"tokens": self.tokens.count(*pieces)})


def _document(number: int, context: str) -> str:
    return f"Document {number}:\n{context}\n\n"


def _asked(question: Question) -> str:
    return f"{CLOSING}{question.question} Answer:"


def _documents(contexts: Sequence[str]) -> list[str]:
    return [_document(i, context) for i, context in enumerate(contexts, start=1)]


def _bare_length(tokens: Tokens, question: Question) -> int:
    """Tokens of a question with its own contexts and its answer."""
    own = "".join(_documents(question.contexts))
    return 1 + tokens.count(OPENING + own, _asked(question), f" {max(question.answers, key=len)}\n")


def read(path: str) -> list[Question]:
    """The questions of a JSONL file. ConfigError if it is none, with the line."""
    file = resolve_path(path)
    if not Path(file).is_file():
        raise ConfigError(
            f"questions of {path}", "there is no such file", f"Name a JSONL file of lines like {EXAMPLE}."
        )
    found = []
    # Not `splitlines`: JSON may hold U+2028 and its like as they are. A byte order mark is no part of line 1.
    for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").split("\n"), start=1):
        if line.strip():
            found.append(_parsed(line, f"line {number} of {path}"))
    if not found:
        raise ConfigError(f"questions of {path}", "it has no line", f"Write lines like {EXAMPLE}.")
    return found


def _parsed(line: str, where: str) -> Question:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        contexts = record.get("contexts", [record.get("context")])
        question, answers = record.get("question"), record.get("answers", [])
        if all(map(_texts, ([question], contexts, answers))):
            if any("\ud800" <= char <= "\udfff" for text in (question, *contexts, *answers) for char in text):
                true = "it has half of a surrogate pair, such as \\ud800, which is no character"
                raise ConfigError(where, true, "Write both halves, or leave it out.")
            return Question(question, tuple(dict.fromkeys(contexts)), tuple(answers))
    raise ConfigError(where, "it is no question with contexts and answers", f"Write it like {EXAMPLE}.")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)
