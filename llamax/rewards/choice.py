"""`choice`: the answer names the right one of several choices, by its letter or in its words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llamax.rewards.exact import normal
from llamax.rewards.final import MOST_CHARS, final_answer

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A letter that opens the text, "B", "(B)", "B. blue", "B: blue", or stands alone in brackets.
OPENS = re.compile(r"\W{0,4}([A-Za-z])(?:[).:\]}]|\s*$|\s+[-–—]|\*)")
WORD = re.compile(r"[^\W_]+")
BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")


def score(answer: str, truth: Any, options: Mapping[str, Any]) -> float | None:
    """1 if the one choice that the answer names is the truth, 0 if it names another, none or several.

    `truth` is the letter, or the words, of the right one. Options: `choices`, their words, [words of A, words of B,
    ...] or {letter: words}; without them letters alone count, A to Z.
    """
    choices = _choices(options.get("choices"))
    right = None if choices is None else _letter(str(truth), choices)
    if choices is None or right is None:
        return None
    named = _named(answer[-MOST_CHARS:], choices)
    return float(named == right)


def _choices(given: Any) -> dict[str, str] | None:
    """Normal words by capital letter; None if that is what nobody can choose from."""
    if given is None:
        return dict.fromkeys(LETTERS, "")
    if isinstance(given, Mapping):
        found = {str(letter).upper(): normal(str(words)) for letter, words in given.items()}
    elif isinstance(given, Sequence) and not isinstance(given, str):
        found = {letter: normal(str(words)) for letter, words in zip(LETTERS, given, strict=False)}
    else:
        return None
    return found if found and all(len(letter) == 1 for letter in found) else None


def _letter(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the choice that a short text is, by letter or words."""
    text = text.strip()
    words = normal(text)
    by_words = [letter for letter, said in choices.items() if said and said == words]
    if len(by_words) == 1:
        return by_words[0]
    opened = OPENS.match(text)
    letter = opened[1].upper() if opened else ""
    return letter if letter in choices else None


def _named(text: str, choices: Mapping[str, str]) -> str | None:
    """The choice that an answer names at its end or as a whole; None for none, or several."""
    final = final_answer(text)
    if final is not None:
        return None if _several(final, choices) else _letter(final, choices) or _only(final, choices)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    whole = _letter(text, choices) if len(lines) == 1 and not _several(text, choices) else None
    return whole or _only(lines[-1], choices)


def _several(text: str, choices: Mapping[str, str]) -> bool:
    """Whether it lists letters: "A, B", "A or B", "A and C"."""
    listed = re.findall(r"\b([A-Z])\b(?=[)\]]?\s?(?:,|/|or\b|and\b|&))|(?:,|/|\bor|\band|&)\s?\(?([A-Z])\b", text)
    return len({a or b for a, b in listed} & choices.keys()) > 1


def _only(line: str, choices: Mapping[str, str]) -> str | None:
    """The one choice whose letter stands in brackets in a line, or whose words do, and in no longer choice's words."""
    letters = set(BRACKETED.findall(line)) & choices.keys()
    said = _spaced(normal(line))
    spoken = {letter: _spaced(words) for letter, words in choices.items() if words and _spaced(words) in said}
    within = {a for a, words in spoken.items() if any(words in other and words != other for other in spoken.values())}
    named = letters or spoken.keys() - within
    return next(iter(named)) if len(named) == 1 else None


def _spaced(text: str) -> str:
    """Its words with one space around each, so that one text has another in it by whole words."""
    return f" {' '.join(WORD.findall(text))} "
