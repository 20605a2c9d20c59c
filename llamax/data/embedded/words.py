"""Words for scenes: short, regular English that follows from the scene graph alone."""

from __future__ import annotations

from collections.abc import Sequence

from llamax.data.embedded.scene import Shape

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
WHAT = "Question: what is this? Answer:"  # the prompt on which the held-out drawings are scored


def a(words: str) -> str:
    """With its indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def at(position: str) -> str:
    return f"{'on' if position in ('left', 'right') else 'at'} the {position}"


def caption(shape: Shape) -> str:
    return f"{a(f'{shape.size} {shape.name}')} {at(shape.position)}"


def listing(parts: Sequence[str]) -> str:
    """ "x", "x and y", "x, y and z"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def question(asked: str, answer: str) -> str:
    return f"Question: {asked}? Answer: {answer}."


def what_is_this(shape: Shape) -> str:
    return f"{WHAT} {shape.name}."
