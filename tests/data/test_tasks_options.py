"""Options of tasks: what passes the check can be made at any length, and its questions have one right answer each."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from llamax.config import ConfigError, Vision
from llamax.data.document import Picture
from llamax.data.sources import open_source, read_manifest
from llamax.data.tasks import RULER, TASKS, Texts, Tokens, score
from llamax.data.tasks.counting import CommonWords, FrequentWords
from llamax.data.tasks.lookup import Lookup
from llamax.data.tasks.needles import NOUNS, Needles
from llamax.data.tasks.ordering import Ordering
from llamax.data.tasks.sample import Sample, TooShort
from llamax.data.tasks.source import check_options
from llamax.data.tasks.tracking import Tracking
from llamax.data.tasks.words import KINDS, NoneLeft, few, spellings, split_of

DATA = Path(__file__).resolve().parents[2] / "data"
TOKENS = Tokens(str(DATA / "tokenizer.model"), Vision(tile_px=28, patch_px=7, max_tiles=1))
FILLER = Texts(open_source(read_manifest(DATA / "fixtures" / "text.toml")))
FEW = {"short", "digits"}  # kinds of which a long text may have all
WORD = r"([\w-]+(?: [\w-]+)*?)"  # a key or value


def drawn_options(rng: random.Random, name: str) -> dict:
    """Some of a task's options changed: to what they may be, and to what they may not be."""
    found = {}
    for key, own in TASKS[name].options.items():
        if rng.random() < 0.5:
            choices: tuple = (0, 1, 1, 2, 3, 5, 9, 64)
            if isinstance(own, str):
                choices = tuple(TASKS[name].make.choices.get(key, KINDS))
            elif isinstance(own, bool):
                choices = (True, False)
            elif isinstance(own, float):
                choices = (0.0, 1.0, 1.5, 2.0, 3.0, 9.0, math.inf, math.nan)
            elif key == "side":
                choices = (0, 1, 16, 28)
            found[key] = rng.choice(choices)
    return found


@pytest.mark.parametrize("name", sorted({*TASKS} - {*RULER}) + ["niah_multikey_2", "vt", "cwe"])
def test_what_passes_the_check_can_be_made(name):
    rng, made = random.Random(name), 0
    for number in range(16):
        options, split = drawn_options(rng, name), rng.choice(["train", "eval"])
        try:
            check_options(name, options, "here", "options", split)
        except ConfigError as error:
            assert error.asked and error.true and error.change
            continue
        task = TASKS[name].with_options(options)
        how = dict(split=split, templates=rng.choice(["seen", "held_out"]))
        for length, questions in ((250, 1), (1100, 1), (2500, 1), (2500, 4)):
            try:
                exam = task.exam(
                    random.Random(f"{name}/{number}"), FILLER, length, None, TOKENS, **how, questions=questions
                )
            except TooShort:
                continue
            except NoneLeft:  # several questions may need more keys
                kinds = {value for key, value in task.options.items() if key.endswith("kind")}
                assert FEW & kinds or questions > 1, options
                continue
            made += 1
            for question in exam.questions:
                sample = Sample((*exam.context, question.asked), question.answers, {"rule": task.rule})
                answers = right_answers(task.make, exam.context, question.asked)
                assert answers in ([sorted(question.answers)], None), options
                assert score(sample, question.said) == 1
                assert name in {"ordering", *RULER} or not score(sample, question.asked), "the question gives it away"
    assert made > 8


def right_answers(make, context, asked: str) -> list[list[str]] | None:
    """Read from the context and the question alone; None where pictures have to be seen."""
    if any(isinstance(piece, Picture) for piece in context):
        return None
    (text,) = context
    reader = READERS[type(make)]
    found = [reader(make, wording, text, asked.strip("\n")) for wording in (*make.seen, *make.held_out)]
    return [sorted(answers) for n, answers in enumerate(found) if answers and answers not in found[:n]]


def fields(template: str, **known: str) -> str:
    """A pattern of the template: what is known stands as it is, all else is a key or a value."""
    parts = re.split(r"\{(\w+)\}", template)
    return "".join(
        (re.escape(known[part]) if part in known else WORD) if n % 2 else re.escape(part)
        for n, part in enumerate(parts)
    )


def looked_up(make, wording, text, asked) -> list[str]:
    key = re.fullmatch(fields(wording.asked), asked)
    record = re.compile(fields(wording.record, key=key[1]) if key else "(?!)")
    return [found[1] for found in map(record.fullmatch, text.splitlines()) if found]


def found_in_needles(make, wording, text, asked) -> list[str]:
    noun = NOUNS[make.value_kind]
    nouns = dict(noun=noun, nouns=f"{noun}s")
    forms = [fields(form, **nouns).replace(WORD, "(.+)") for form in (wording.asked, wording.asked_all)]
    keys = {key for m in (re.fullmatch(form, asked) for form in forms) if m for key in re.split(", | and ", m[1])}
    return [value for key in keys for value in re.findall(fields(wording.needle, key=key, **nouns), text)]


def followed(make, wording, text, asked) -> list[str]:
    value = re.fullmatch(fields(wording.asked, n=str(make.hops + 1)).replace(WORD, "(.+?)"), asked)
    hold: dict[str, str] = {}
    hops = {m.start(): m.groups() for form in (wording.first, wording.hop) for m in re.finditer(fields(form), text)}
    for _, (name, other) in sorted(hops.items()):
        hold[name] = hold.get(other, other)
    return [name for name, held in hold.items() if value and held == value[1]]


def in_order(make, wording, text, asked) -> list[str]:
    named = re.fullmatch(fields(wording.asked).replace(WORD, "(.+)"), asked)
    stand = [name for name in re.findall(fields(wording.event), text) if named and name in named[1].split(" / ")]
    return [", ".join(stand)] if stand else []


def most_frequent(make, wording, text, asked) -> list[str]:
    n = getattr(make, "common", 0) or make.asked
    if not text.startswith(wording.opening) or asked != wording.asked.format(n=n):
        return []
    counts = Counter(
        re.sub(r"\d+\. " if getattr(make, "numbered", False) else "(?!)", "", text[len(wording.opening) :]).split()
    )
    del counts["..."]
    ranked = counts.most_common()
    assert len(ranked) == n or ranked[n - 1][1] > ranked[n][1]
    return [word for word, _ in ranked[:n]]


READERS = {
    Lookup: looked_up,
    Needles: found_in_needles,
    Tracking: followed,
    Ordering: in_order,
    CommonWords: most_frequent,
    FrequentWords: most_frequent,
}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("common_words", dict(often=1), "has common words 1 times and others 1 times. Set often above seldom"),
        ("cwe", dict(seldom_long=30), "Set often_long above seldom_long"),
        ("common_words", dict(kind="pairs"), "kind is 'pairs'"),
        ("frequent_words", dict(alpha=1.0), "alpha=1.0. Set alpha to 1.5"),
        ("frequent_words", dict(alpha=math.nan), "alpha=nan"),
        ("ordering", dict(asked=1), "asks for the order of 1"),
        ("tracking", dict(name_kind="pairs"), "name_kind is 'pairs'"),
        ("key_value", dict(key_kind="phrases"), "key_kind is 'phrases'"),
        (
            "key_value",
            dict(n_words=1),
            "needs 4 keys and values of the kind 'pairs', and of 1 words .* 0 for 'eval'. Raise",
        ),
        ("key_value", dict(value_kind="phrases", key_kind="uuids", n_words=3), "needs 2 .* 'phrases'"),
        ("key_value_short", dict(n_words=500), "'short', and of 500 words there are about 0 for 'eval'. Take a kind"),
        ("key_value_short", dict(records=64, key_kind="pairs", value_kind="pairs", n_words=16), "needs 128"),
        ("needle", dict(keys=100, values=2, value_kind="digits"), "needs 200 .* about 225"),
        ("needle", dict(keys=10**9), "Give 100000 or less"),
        ("picture_needle", dict(side=4), "draws on 4 pixels"),
    ],
)
def test_options_that_cannot_be_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_options(name, options, "here", "options")
    assert error.value.asked == "here" and error.value.true.startswith("its options.") and error.value.change


def test_the_options_of_all_tasks_pass():
    for name in TASKS:
        for split in ("train", "eval"):
            check_options(name, {}, "here", "options", split)


def test_spellings_are_counted():
    """By listing all: of few words, and of digits."""
    made = set(few(TOKENS.words, 6))
    for kind, n in (("short", 6), ("pairs", 30), ("phrases", 6 + 30 + 120 + 360)):
        rng = random.Random(0)
        listed = {KINDS[kind](rng, sorted(made)) for _ in range(20_000)}
        assert len(listed) == n
        if kind != "short":
            assert spellings(kind, 6, "train") + spellings(kind, 6, "eval") == n
    assert (spellings("short", 6, "train"), spellings("short", 6, "eval")) == (6, 0)
    assert {split_of(word) for word in made} == {"train"}
    assert spellings("digits", 6, "eval") == 225 and spellings("uuids", 6, "eval") == math.inf == spellings(
        "pairs", 0, "train"
    )
