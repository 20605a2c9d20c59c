"""`exact`: the answer is the truth, letter by letter, but for case, white space, and marks around it."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from llamax.rewards.final import MOST_CHARS, final_answer

AROUND = " \t.,;:!?*_`'\"“”‘’()[]{}<>"


def score(answer: str, truth: Any, options: Mapping[str, Any]) -> float | None:
    """1 if the whole text, or the final answer that it marks, is the truth or one of several; else 0.

    Options: `marked`, only a final answer that is marked counts.
    """
    truths = truth if isinstance(truth, list | tuple) else [truth]
    wanted = {normal(str(one)) for one in truths if one is not None}
    if not wanted or "" in wanted:
        return None
    given = [final_answer(answer)] + ([] if options.get("marked") else [answer])
    return float(any(text is not None and normal(text) in wanted for text in given))


def normal(text: str) -> str:
    """The text by which two are the same: composed letters, no case, single spaces, nothing around it."""
    text = unicodedata.normalize("NFKC", text[:MOST_CHARS]).casefold()
    return " ".join(text.split()).strip(AROUND)
