"""The final answer in a longer text: what stands in the last `\\boxed{...}`, behind the last `####`, behind the last
"Answer:" of a line, or behind the last "answer is"; in this order."""

from __future__ import annotations

MOST_CHARS = 2**16  # of a text, its end: an answer that stands before them is not the final one
MOST_FINAL = 4096  # of a final answer
BOXES = ("\\boxed{", "\\fbox{")
MARKS = ("####", "answer:", "answer is:", "answer is")  # in small letters


def final_answer(text: str) -> str | None:
    """The final answer without the marks around it; None if the text marks none. "" is one that was left empty."""
    text = text[-MOST_CHARS:]
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    small = text.casefold() if len(text.casefold()) == len(text) else text.lower()
    if len(small) != len(text):  # letters that grow when they are made small: places would shift
        small = "".join(c.lower() if c.isascii() else c for c in text)
    for mark in MARKS:
        at = small.rfind(mark)
        if at >= 0:
            return plain(text[at + len(mark) :].lstrip(" \t*:_").split("\n", 1)[0])
    return None


def _boxed(text: str) -> str | None:
    """What the last box holds, to the brace that closes it."""
    begin = max(at + len(box) if (at := text.rfind(box)) >= 0 else -1 for box in BOXES)
    if begin < 0:
        return None
    open_braces = 1
    for at, char in enumerate(text[begin : begin + MOST_FINAL], begin):
        open_braces += (char == "{") - (char == "}")
        if not open_braces:
            return plain(text[begin:at])
    return None  # it is never closed


def plain(text: str) -> str:
    """Without white space, emphasis, quotes and dollar signs around it, and without the full stop behind it."""
    text = text[:MOST_FINAL].strip().strip("*_`$\"'“”").strip()
    return text[:-1].rstrip().rstrip("*_`$\"'“”").strip() if text.endswith(".") else text
