"""Rewards: what an answer is worth, by rule, from its text and the truth. Data is judged by them, and models are.

    reward(answer, truth, options) -> 0.0 .. 1.0, or None where that cannot be judged

None is never 0: an answer that nobody could judge says nothing of who gave it. A function here is pure, quick on any
text however long or deep (it looks at bounded parts of it, and at none by backtracking), and imports the standard
library only: evaluations, curation and training all ask the same ones.

A record says in its `meta` how its answers are judged:

    {"verify": "math", "answer": "3/4", "options": {"marked": true}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from llamax.config import ConfigError
from llamax.rewards import choice, exact, form, math
from llamax.rewards.final import final_answer

__all__ = ["REWARDS", "Reward", "check", "final_answer", "verifiable", "verify"]

Reward = Callable[[str, Any, Mapping[str, Any]], float | None]
Meta = Mapping[str, Any]

REWARDS: dict[str, Reward] = {
    "math": math.score,
    "choice": choice.score,
    "format": form.score,
    "exact": exact.score,
}
WITHOUT_TRUTH = ("format",)


def verify(answer: str, meta: Meta) -> float | None:
    """What an answer to a record with this `meta` is worth; None if the record does not say how that is told."""
    name, options = meta.get("verify"), meta.get("options") or {}
    if not (isinstance(name, str) and name in REWARDS and isinstance(options, Mapping)):
        return None
    return REWARDS[name](answer, meta.get("answer"), options)


def verifiable(meta: Meta) -> bool:
    """Whether answers to the record can be judged by a rule."""
    name = meta.get("verify")
    right = isinstance(name, str) and name in REWARDS and isinstance(meta.get("options") or {}, Mapping)
    return right and (meta.get("answer") is not None or name in WITHOUT_TRUTH)


def check(meta: Meta, where: str) -> None:
    """ConfigError if `meta` names no rule that there is, or options that are none."""
    name = meta.get("verify")
    if name is not None and (not isinstance(name, str) or name not in REWARDS):
        near = get_close_matches(str(name), REWARDS, 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(REWARDS)}."
        raise ConfigError(f"{where}, verify {name!r}", "there is no such rule", hint)
    if not isinstance(meta.get("options") or {}, Mapping):
        raise ConfigError(f"{where}, options", "they are no table", 'Write them as {"marked": true}.')
