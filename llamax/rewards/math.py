"""`math`: the final answer has the value of the truth: numbers exactly, expressions by expression.py, lists item by
item. A sign for percent, money or degrees, the name of what is counted, and "x =" before a value do not matter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from llamax.rewards import expression
from llamax.rewards.expression import HUNDRED, Node, Unreadable
from llamax.rewards.final import MOST_CHARS, final_answer, plain

NUMBER = re.compile(
    r"[-+−]?+(?:(?>\d{1,3}(?:,\d{3})++|\d{1,300}+)(?:\.\d{1,300}+)?+|\.\d{1,300}+)(?:\s?/\s?\d{1,300}+)?+"
)
UNITS = re.compile(r"(?<=[\d}\s])(?:km/h|km|cm|mm|kg|mg|ml|mph|kWh|Hz|degrees?|[€£])(?:\^?[23])?$")
MATHS = re.compile(r"[\\^*/+=√∞∪]|\d\s*[-(]")  # what plain words do not have
LISTED = re.compile(r"\s(?:and|or)\s")
OPEN, CLOSE = "([{", ")]}"
MOST_ITEMS = 32
SHORT = 80  # characters of a text without marks that may be an answer as a whole


class Items(NamedTuple):
    """The values of an answer; several have an order if they stand in brackets."""

    values: tuple[Node, ...]
    brackets: str = ""


def score(answer: str, truth: Any, options: Mapping[str, Any]) -> float | None:
    """1 if the final answer is the truth, 0 if it is another or there is none.

    None where the truth has no value that is known here and is not what the answer says; and where the answer is maths
    that is not read here. Options: `marked`, only a final answer that is marked counts, else also a short text as a
    whole and the last number of a long one; `tolerance`, relative, of numbers.
    """
    if isinstance(truth, bool) or not isinstance(truth, str | int | float) or not str(truth).strip():
        return None
    wanted, tolerance = plain(str(truth)), options.get("tolerance", 0.0)
    tolerance = float(tolerance) if isinstance(tolerance, int | float) and 0 <= tolerance < 1 else 0.0
    finals = _finals(answer, bool(options.get("marked")))
    try:
        truths = items(wanted)
    except Unreadable:
        return 1.0 if finals and _same_words(finals[0], wanted) else None
    for text in finals:
        if _same_words(text, wanted):
            return 1.0
        try:
            return float(_same(items(text), truths, tolerance))
        except Unreadable:
            continue
    return None if any(MATHS.search(text) or len(text) > expression.MOST_CHARS for text in finals) else 0.0


def _finals(answer: str, marked: bool) -> list[str]:
    """What may be the final answer; the first that can be read is."""
    final = final_answer(answer)
    if final is not None or marked:
        return [final] if final else []
    answer = answer[-MOST_CHARS:].strip()
    whole = [plain(answer)] if 0 < len(answer) <= SHORT and "\n" not in answer else []
    return whole + NUMBER.findall(answer)[-1:]


def items(text: str) -> Items:
    """The values that a text lists: one, or several with commas between. Unreadable if one of them is none."""
    if len(text) > expression.MOST_CHARS:
        raise Unreadable("it is too long")
    text = expression.tidy(text.replace("\\{", "{").replace("\\}", "}"))
    parts, brackets = _parts(text), ""
    if len(parts) == 1 and text[:1] in OPEN and text[-1:] in CLOSE:
        inside = _parts(text[1:-1])
        if len(inside) > 1 or text[:1] == "{":
            parts, brackets = inside, "" if text[:1] == "{" else text[0] + text[-1]
    if len(parts) > MOST_ITEMS:
        raise Unreadable("it lists too many values")
    return Items(tuple(_value(part) for part in parts), brackets)


def _parts(text: str) -> list[str]:
    """Split at commas and semicolons outside of all brackets, at "and" and "or"."""
    parts, depth, begin = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in OPEN) - (char in CLOSE)
        if char in ",;" and depth == 0 and text[at - 1 : at] != "\\":
            parts.append(text[begin:at])
            begin = at + 1
    return [one.strip() for part in (*parts, text[begin:]) for one in LISTED.split(part) if one.strip()]


def _value(text: str) -> Node:
    """One value; of words with a single number in them, that number."""
    text = UNITS.sub("", text.rpartition("=")[2].strip()).strip()
    try:
        return expression.read(text)
    except Unreadable:
        numbers = NUMBER.findall(text)
        if len(numbers) != 1 or MATHS.search(text.replace(numbers[0], " ", 1)):
            raise
        return expression.read(numbers[0])


def _same(given: Items, wanted: Items, tolerance: float) -> bool:
    if len(given.values) != len(wanted.values):
        return False
    if given.brackets or wanted.brackets:
        agree = not (given.brackets and wanted.brackets) or given.brackets == wanted.brackets
        return agree and all(_equal(a, b, tolerance) for a, b in zip(given.values, wanted.values, strict=True))
    left = list(wanted.values)
    for one in given.values:
        match = next((i for i, other in enumerate(left) if _equal(one, other, tolerance)), None)
        if match is None:
            return False
        del left[match]
    return True


def _equal(a: Node, b: Node, tolerance: float) -> bool:
    """A sign for percent that one of the two lacks may be meant or not."""
    pairs = [(a, b)]
    if _percent(a) != _percent(b):
        pairs.append((a.parts[0], b) if _percent(a) else (a, b.parts[0]))
    return any(expression.same(x, y, tolerance) for x, y in pairs)


def _percent(node: Node) -> bool:
    return node.kind == "/" and node.parts[1] == HUNDRED


def _same_words(*texts: str) -> bool:
    return len({"".join(text.split()).casefold() for text in texts}) == 1
