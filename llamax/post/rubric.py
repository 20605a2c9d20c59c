"""Rubrics: what a judge is asked about a conversation, which answers it may give and what each is worth. A TOML file:

    name = "difficulty"
    keep = "high"                        # which end is worth keeping: "high" or "low"
    [answers]
    easy = 1
    hard = 3
    [[votes]]                            # one phrasing each; the grade is their mean
    system = "You judge ..."             # may be left out
    prompt = "How difficult is {question}?"

A prompt has one of {question}, the last message of the user with its pictures; {answer}, the assistant's to it;
{conversation}, all messages by their roles. Other braces are written {{ and }}.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llamax import config
from llamax.config import ConfigError
from llamax.post.records import Record, text_of

FIELDS = ("question", "answer", "conversation")
FIELD = re.compile(r"\{\{|\}\}|\{(\w*)\}|[{}]")
SHIPPED = "data/rubrics"
MOST_BYTES = 2**20


class Vote(NamedTuple):
    system: str
    prompt: tuple[str, ...]  # texts, and fields between them: an odd place is a field


class Rubric(NamedTuple):
    name: str
    keep: str  # high | low
    answers: Mapping[str, float]
    votes: tuple[Vote, ...]

    @property
    def needs_answer(self) -> bool:
        """Whether nothing can be asked of a conversation that the assistant does not end."""
        return any("answer" in vote.prompt[1::2] for vote in self.votes)

    def identity(self) -> list[Any]:
        """All that a grade depends on."""
        return [self.name, dict(self.answers), [list(vote) for vote in self.votes]]


def read(name: str | Path) -> Rubric:
    """A rubric by its file, or by the name of one that is shipped. ConfigError if it is none."""
    path = _find(name)
    asked = f"--rubric {name}"
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(asked, f"{path} cannot be read as TOML: {error}", "Correct the file.") from None
    stray = [key for key in table if key not in ("name", "keep", "answers", "votes")]
    if stray:
        raise ConfigError(asked, f"it has a key {stray[0]!r}", "Its keys are name, keep, answers and votes.")
    keep = table.get("keep", "high")
    if keep not in ("high", "low"):
        raise ConfigError(asked, f"its keep is {keep!r}", 'Say keep = "high" or keep = "low".')
    named, votes = table.get("name", path.stem), table.get("votes")
    if not isinstance(named, str) or not named.isidentifier():
        raise ConfigError(asked, f"its name is {named!r}", "Give it a name of letters, digits and underscores.")
    if not isinstance(votes, list) or not votes:
        raise ConfigError(asked, "it asks nothing", 'Add [[votes]] with prompt = "... {question} ...".')
    return Rubric(named, keep, _answers(table.get("answers"), asked), tuple(_vote(vote, asked) for vote in votes))


def _find(name: str | Path) -> Path:
    path = config.resolve_path(name)
    shipped = config.resolve_path(Path(SHIPPED, f"{name}.toml"))
    if not path.is_file() and shipped.is_file():
        return shipped
    if not path.is_file():
        there = sorted(p.stem for p in config.resolve_path(SHIPPED).glob("*.toml"))
        true = "there is neither such a file nor a rubric of that name"
        raise ConfigError(f"--rubric {name}", true, f"Name a TOML file, or one of {', '.join(there) or SHIPPED}.")
    return path


def _answers(given: Any, asked: str) -> dict[str, float]:
    right = isinstance(given, dict) and len(given) > 1
    if not right or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in given.values()):
        true = f"its answers are {str(given)[:80]}"
        raise ConfigError(asked, true, "Give two or more with a number each: [answers], easy = 1, hard = 3.")
    if len(set(given.values())) == 1:
        raise ConfigError(asked, "all its answers are worth the same", "Give them different numbers.")
    return {str(word): float(value) for word, value in given.items()}


def _vote(given: Any, asked: str) -> Vote:
    prompt, system = (given.get(key, "") for key in ("prompt", "system")) if isinstance(given, dict) else (None, "")
    if not isinstance(prompt, str) or not isinstance(system, str) or not given.keys() <= {"prompt", "system"}:
        true = f"one of its votes is {str(given)[:80]}"
        raise ConfigError(asked, true, 'Give [[votes]] with prompt = "..." and, if need be, system = "...".')
    parts, at = [""], 0
    for found in FIELD.finditer(prompt.strip()):
        parts[-1] += prompt.strip()[at : found.start()]
        at = found.end()
        if found[0] in ("{{", "}}"):
            parts[-1] += found[0][0]
        elif found[1] in FIELDS:
            parts += [found[1], ""]
        else:
            change = f"Fields are {', '.join(f'{{{field}}}' for field in FIELDS)}; write other braces twice."
            raise ConfigError(asked, f"a prompt has {found[0]} in it", change)
    parts[-1] += prompt.strip()[at:]
    if len(parts) == 1:
        raise ConfigError(asked, "a prompt shows nothing of what is judged", "Put {question} or {conversation} in it.")
    return Vote(system, tuple(parts))


# ------------------------------------------------------------------------------------------------------------ asking


def messages(vote: Vote, record: Record) -> list[dict[str, Any]]:
    """What the judge is told: the vote's texts with what they show of the record, pictures in their places."""
    parts: list[dict[str, Any]] = []
    for place, text in enumerate(vote.prompt):
        parts += _shown(text, record) if place % 2 else [{"type": "text", "text": text}]
    system = [{"role": "system", "content": vote.system}] if vote.system else []
    return [*system, {"role": "user", "content": [part for part in parts if part.get("text") != ""]}]


def _shown(field: str, record: Record) -> list[dict[str, Any]]:
    if field == "answer":
        assert record.answer is not None, "whoever asks has looked"
        return [{"type": "text", "text": said(record.answer)}]
    if field == "question":
        asked = [message for message in record.prompt if message["role"] == "user"]
        return _parts(asked[-1]) if asked else _parts(record.prompt[-1])
    parts: list[dict[str, Any]] = []
    for number, message in enumerate(record.messages):
        opened = f"{chr(10) * 2 if number else ''}[{message['role']}]\n"
        parts += [{"type": "text", "text": opened}, *_parts(message)]
    return parts


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    if message["role"] in ("tool", "ipython") or not isinstance(content, list):
        return [{"type": "text", "text": said(message)}]
    return content


def said(message: Mapping[str, Any]) -> str:
    """A message as text, with the calls of tools that it makes."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    shown = [f"{call['name']}({call.get('arguments', '')})" for call in calls]
    return "\n".join([text for text in (text_of(message), *shown) if text])
