"""RULER's eleven synthetic tasks, with its words: the same families as our own tasks, set as the paper sets them.

Its two tasks of questions and answers need its documents; an evaluation reads them from a user's file. Its essays are
the filler here, its word lists are words.py's, and the worked example before its lists and chains is left out. Source:
arXiv 2404.06654, table 2, and the configuration that its authors published.
"""

from __future__ import annotations

from llamax.data.tasks import counting, needles, tracking
from llamax.data.tasks.counting import CommonWords, FrequentWords
from llamax.data.tasks.needles import Needles
from llamax.data.tasks.tracking import Tracking

_NEEDLE = "One of the special magic {nouns} for {key} is: {value}."
_ONE = (
    "What is the special magic {noun} for {key} mentioned in the provided text? "
    "The special magic {noun} for {key} mentioned in the provided text is"
)
_ALL = (
    "What are all the special magic {nouns} for {key} mentioned in the provided text? "
    "The special magic {nouns} for {key} mentioned in the provided text are"
)
ONE = (
    needles.Wording(
        "ruler_one",
        "A special magic {noun} is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {noun} afterwards.\n",
        _NEEDLE,
        _ONE,
        _ALL,
    ),
)
ALL = (
    needles.Wording(
        "ruler_all",
        "Some special magic {nouns} are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {nouns} afterwards.\n",
        _NEEDLE,
        _ONE,
        _ALL,
    ),
)
CHAINS = (
    tracking.Wording(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        "VAR {name} = {value}",
        "VAR {name} = VAR {other}",
        "Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
        "chain(s) of variable assignment in the text above, {n} variables are assigned the value {value}, they are:",
    ),
)
COMMON = (
    counting.Wording(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n",
        "Question: What are the {n} most common words in the above list? Answer: The top {n} words that appear most "
        "often in the list are:",
    ),
)
FREQUENT = (
    counting.Wording(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. ",
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:",
    ),
)


def _one(haystack: str = "text", keys: int = 1, key_kind: str = "words", value_kind: str = "numbers") -> Needles:
    """One key is asked for, which has one value."""
    return Needles(keys=keys, key_kind=key_kind, value_kind=value_kind, haystack=haystack, seen=ONE, held_out=ONE)


RULER = {
    "niah_single_1": _one("noise"),
    "niah_single_2": _one(),
    "niah_single_3": _one(value_kind="uuids"),
    "niah_multikey_1": _one(keys=4),
    "niah_multikey_2": _one("needles"),
    "niah_multikey_3": _one("needles", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Needles(values=4, seen=ALL, held_out=ALL),
    "niah_multiquery": Needles(keys=4, queries=4, seen=ALL, held_out=ALL),
    "vt": Tracking(chains=1, hops=4, value_kind="five_digits", haystack="noise", seen=CHAINS, held_out=CHAINS),
    "cwe": CommonWords(common=10, often_long=30, seldom_long=3, numbered=True, seen=COMMON, held_out=COMMON),
    "fwe": FrequentWords(seen=FREQUENT, held_out=FREQUENT),
}
