"""`format`: the answer has the form that was asked for, whatever it says.

A form is a text with fields in it, and all of the answer has to be such a text:

    {text}      anything, lines and nothing too      {line}      the rest of a line, one character at least
    {number}    3, -1,234.5                          {letter}    one letter            {word}      letters and digits

    "{text}\\nAnswer: {line}"

So there is no pattern that takes long on any answer: between two {text} everything has one length at a given place, and
the first place that fits is as good as any later one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from llamax.rewards.final import MOST_CHARS

FORMS = {
    "answer": "{text}Answer: {line}",
    "boxed": "{text}\\boxed{{{line}",
    "think": "<think>{text}</think>{text}",
    "letter": "{letter}",
    "number": "{number}",
}
FIELDS = {  # possessive: a field gives nothing back, so that each has one length at a place
    "line": r"[^\n]{1,2000}+$",
    "number": r"[-+]?+(?>\d{1,3}(?:,\d{3})++|\d{1,400}+)(?:\.\d{1,400}+)?+",
    "letter": r"[^\W\d_](?!\w)",
    "word": r"\w{1,200}+",
}
MOST_FIELDS = 32
FIELD = re.compile(r"\{\{|\}\}|\{(\w{1,16})\}|[{}]")


def score(answer: str, truth: Any, options: Mapping[str, Any]) -> float | None:
    """1 if the answer, without white space around it, has the form; else 0. Nothing is asked of the truth.

    Options: `form`, the name of one of `FORMS` or a text with fields ("answer"); `most_chars`, of the whole answer.
    None if that is no form.
    """
    form = options.get("form", "answer")
    blocks = _blocks(FORMS.get(form, form)) if isinstance(form, str) else None
    most = options.get("most_chars", MOST_CHARS)
    if blocks is None or not isinstance(most, int):
        return None
    answer = answer.strip()
    return float(len(answer) <= min(most, MOST_CHARS) and _fits(answer, blocks))


@lru_cache(64)
def _blocks(form: str) -> tuple[re.Pattern, ...] | None:
    """What stands between the {text} of a form, as patterns; None if it has a field that is none."""
    blocks, at, fields = [""], 0, 0
    for found in FIELD.finditer(form):
        blocks[-1] += re.escape(form[at : found.start()])
        at, name = found.end(), found[1]
        fields += name is not None
        if found[0] in ("{{", "}}"):
            blocks[-1] += re.escape(found[0][0])
        elif name == "text":
            blocks.append("")
        elif name in FIELDS and fields <= MOST_FIELDS:
            blocks[-1] += FIELDS[name]
        else:
            return None
    blocks[-1] += re.escape(form[at:]) + r"\Z"
    return tuple(re.compile(block, re.MULTILINE) for block in blocks)


def _fits(text: str, blocks: tuple[re.Pattern, ...]) -> bool:
    """Whether the first block opens the text, the last one closes it, and the others stand between in their order."""
    found = blocks[0].match(text)
    for block in blocks[1:]:
        found = block.search(text, found.end()) if found else None
    return found is not None
