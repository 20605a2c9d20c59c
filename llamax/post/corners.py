"""Which of a record's samples are worse than a right answer to it, and why; and worse answers made by rule."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from llamax import rewards
from llamax.data import chat
from llamax.data.tokenizer import Tokenizer
from llamax.post import drawing
from llamax.post.drawing import Sample
from llamax.post.records import Record, text_of
from llamax.rewards import form

RIGHT = 1.0
CORNERS = ("format", "long", "refusal")
SAMPLED, REFERENCE, BY_RULE = "sampled", "reference", "by rule"
HARMFUL = {"unsafe", "harmful"}  # tags of requests that should be refused
LONG, LEAST_LONG = 3, 32  # times the right answer's tokens; and so many tokens
REFUSALS = re.compile(
    r"""\W{0,8}(?: (?:i['’]?m|i\ am)\ (?:very\ |so\ )?(?:sorry|unable|not\ able) | sorry\b | as\ an\ ai\b
        | i\ must\ decline
        | i\ (?:can['’]?t|cannot|can\ not|won['’]?t|will\ not)\ (?:help|assist|answer|do|provide|comply) )""",
    re.IGNORECASE | re.VERBOSE,
)
REFUSAL = "I'm sorry, but I can't help with that."


class Side(NamedTuple):
    message: dict[str, Any]
    text: str
    tokens: int
    source: str  # sampled | reference | by rule


class Pair(NamedTuple):
    of: str  # wrong, or one of CORNERS
    chosen: Side
    rejected: Side


def pairs_of(
    record: Record, samples: Sequence[Sample], tokenizer: Tokenizer, corners: Collection[str], rule_share: float
) -> list[Pair]:
    """At most one pair of a kind: with the likeliest sample that shows it, or by rule; none without a right answer."""
    scored = [(sample, drawing.score(sample, record)) for sample in sorted(samples, key=lambda one: -one.logp)]
    good = right_side(record, scored, tokenizer)
    if good is None:
        return []
    rejected: dict[str, Side] = {}
    for sample, score in scored:
        for kind in kinds(sample, score, record, good):
            rejected.setdefault(kind, sampled_side(sample, record, tokenizer))
    missing = [name for name in corners if name not in rejected]
    if int(record.key[8:16], 16) < rule_share * 2**32:  # a share of the records, always the same ones
        made = {name: side for name in missing if (side := by_rule(name, record, good, tokenizer)) is not None}
        names = sorted(made)
        rejected |= {name: made[name] for name in names[int(record.key[16:24], 16) % len(names) :][:1]} if names else {}
    wanted = [kind for kind in ("wrong", *CORNERS) if kind == "wrong" or kind in corners]
    return [Pair(kind, good, rejected[kind]) for kind in wanted if kind in rejected]


def right_side(record: Record, scored: Sequence[tuple[Sample, float | None]], tokenizer: Tokenizer) -> Side | None:
    """The first sample that is right, ended and in the form that the record asks for; else the record's own answer."""
    asked = (record.meta.get("options") or {}).get("form")
    for sample, score in scored:
        if sample.stopped and score == RIGHT and (not asked or form.score(sample.text, None, {"form": asked}) == RIGHT):
            return sampled_side(sample, record, tokenizer)
    if record.answer is None:
        return None
    text = text_of(record.answer)
    if rewards.verify(text, record.meta) != RIGHT:
        return None
    return Side(record.raw["messages"][-1], text, len(tokenizer.encode(text)), REFERENCE)


def sampled_side(sample: Sample, record: Record, tokenizer: Tokenizer) -> Side:
    return Side(chat.parse(sample.ids, tokenizer, record.tools), sample.text, len(sample.ids), SAMPLED)


def kinds(sample: Sample, score: float | None, record: Record, good: Side) -> Iterator[str]:
    """All ways in which a sample is worse than the right answer."""
    if REFUSALS.match(sample.text):
        if not record.tags & HARMFUL:
            yield "refusal"
        return
    if not sample.stopped or len(sample.ids) >= too_long(good):
        yield "long"
        return
    shape = shape_of(record, good)
    if shape and form.score(sample.text, None, {"form": shape}) != RIGHT:
        yield "format"
    if score == 0:
        yield "wrong"


def too_long(good: Side) -> int:
    """Tokens from which an answer is over-long beside the right one."""
    return max(LEAST_LONG, LONG * good.tokens)


def shape_of(record: Record, good: Side) -> str:
    """The form that answers should have: what the record asks for, or else that of the right answer's marks; "" for
    none."""
    asked = (record.meta.get("options") or {}).get("form")
    shapes = [asked] if isinstance(asked, str) else ["answer", "boxed"]
    return next((shape for shape in shapes if form.score(good.text, None, {"form": shape}) == RIGHT), "")


def by_rule(name: str, record: Record, good: Side, tokenizer: Tokenizer) -> Side | None:
    """A worse answer made from the right one; None if there is no such way."""
    if name == "refusal":
        text = "" if record.tags & HARMFUL else REFUSAL
    elif name == "long":
        text = "\n\n".join([good.text] * math.ceil(too_long(good) / max(1, good.tokens)))
    else:
        text, shape = rewards.final_answer(good.text) or "", shape_of(record, good)
        if not shape or form.score(text, None, {"form": shape}) == RIGHT:
            return None
    if not text or text == good.text:
        return None
    return Side({"role": "assistant", "content": text}, text, len(tokenizer.encode(text)), BY_RULE)
