"""Tasks with exact answers, of any length and depth: a question on a context that has to be read to answer it.

    TASKS["needle"](rng, filler, length, depth, tokens, split="eval") -> Sample
    score(sample, text)  -> 0 .. 1

`rng` is a random.Random, `filler` a sequence of texts (filler.Texts of a manifest's documents), `tokens` a
`Tokens(tokenizer file, vision)`. A new task is a `Maker`, a frozen dataclass, and a line here.
"""

from __future__ import annotations

from llamax.data.tasks.counting import CommonWords, FrequentWords
from llamax.data.tasks.filler import Texts
from llamax.data.tasks.lookup import Lookup
from llamax.data.tasks.needles import Needles
from llamax.data.tasks.ordering import Ordering
from llamax.data.tasks.pictures import Pictures
from llamax.data.tasks.ruler import RULER
from llamax.data.tasks.sample import Exam, Question, Sample, Task, score
from llamax.data.tasks.tokens import Tokens
from llamax.data.tasks.tracking import Tracking

__all__ = ["RULER", "TASKS", "Exam", "Question", "Sample", "Task", "Texts", "Tokens", "score"]

MAKERS = {
    "needle": Needles(),
    "needle_multikey": Needles(keys=4),
    "needle_multivalue": Needles(values=4),
    "needle_multiquery": Needles(keys=4, queries=4),
    "key_value": Lookup(),
    "key_value_short": Lookup(records=16, key_kind="short", value_kind="short"),
    "tracking": Tracking(),
    "ordering": Ordering(),
    "common_words": CommonWords(),
    "frequent_words": FrequentWords(),
    "picture_needle": Pictures("content"),
    "picture_lookup": Pictures("name"),
    "picture_change": Pictures("change"),
    **RULER,
}
TASKS: dict[str, Task] = {
    name: Task(name, make, rule="contains" if name in RULER else "line") for name, make in MAKERS.items()
}
