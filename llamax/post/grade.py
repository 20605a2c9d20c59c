"""`llamax data grade`: what each record of a file is worth, kept beside the file as rows that are never made twice.

    FILE.grades.jsonl      {"key": ..., "record": ..., "grade": "difficulty", "value": 2.3, "spread": 0.2, ...}
    FILE.samples.jsonl     what was drawn for pass@k; `llamax data sample` and `pairs` take it from there

A row's key is a hash of the record (its pictures by their bytes), of the method (the rubric's every word) and of the
judge (its weights' sums, its tokenizer, the chat template, the precision): what has changed is graded anew, what has
not is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from llamax import rewards
from llamax.config import ConfigError
from llamax.evals.continuations import power_of_two
from llamax.observe import log
from llamax.observe.progress import track
from llamax.post import drawing, methods, rubric
from llamax.post.drawing import Drawing
from llamax.post.ledger import Ledger, key_of
from llamax.post.methods import ByLoss, ByReward, ByRubric, Method
from llamax.post.reader import MAX_TOKENS, Described, Reader, describe
from llamax.post.records import Record, Records

LEFT_OUT = "too long, or a picture that cannot be read"
PASS, REWARD = "pass", "reward"
ALONE: dict[str, type[ByLoss | ByReward]] = {"loss": ByLoss, REWARD: ByReward}  # what needs nothing but the model
LEAST_MASS = 0.01  # of a judge's probability on the answers that it may give: with less, it does not know what is asked


def grade(
    file: str | Path,
    *,
    judge: str | Path,
    by: str = "rubric",
    rubrics: Sequence[str | Path] = (),
    draw: Drawing | None = None,
    grades: str | Path | None = None,
    samples: str | Path | None = None,
    step: int | None = None,
    dtype: str = "float32",
    batch_size: int = 8,
    max_tokens: int = MAX_TOKENS,
) -> dict[str, Counter]:
    """Grades the records of a file; of each grade how many were made, were there, and were left out for what reason.

    Args:
        by: "rubric", "loss", "reward" or "pass"; `rubrics` are of the first, `draw` is of the last.
        grades, samples: the files that keep them (FILE.grades.jsonl, FILE.samples.jsonl).
        max_tokens: records of more are left out.

    Raises:
        ConfigError: before the model is loaded, if anything is missing or no record can be graded so.
    """
    log.setup()
    asked = _methods(by, rubrics, draw)
    records = Records(file)
    log_skipped(records)
    model = describe(judge, step=step, dtype=dtype)
    if by == REWARD:
        methods.with_head(model, f"--by {by} --judge {judge}")
    able = {method.name: _able(method, records, model) for method in asked} if by != PASS else {}
    drawable = able_to_pass(records, model, f"--by pass of {file}") if by == PASS else None
    reader = cache(model.load)  # once, and only if something is missing
    rows, found = power_of_two(batch_size), {}
    with Ledger(grades or f"{file}.grades.jsonl") as ledger:
        for method in asked:
            found[method.name] = _by_method(ledger, records, method, able[method.name], model, reader, rows, max_tokens)
        if drawable is not None and draw is not None:
            with Ledger(samples or f"{file}.samples.jsonl") as drawn:
                found[PASS] = _by_passing(ledger, drawn, records, draw, drawable, model, reader, rows, max_tokens)
        _show(ledger, records, found, model)
        for method in asked:
            _warn(method, _masses(ledger, records, method, able[method.name][0], model), model)
    return found


def _methods(by: str, rubrics: Sequence[str | Path], draw: Drawing | None) -> Sequence[Method]:
    if by == "rubric" and not rubrics:
        true = "a judge is asked by a rubric, and none is named"
        raise ConfigError("--by rubric without --rubric", true, "Give --rubric difficulty, or --by loss or --by pass.")
    if by != "rubric" and rubrics:
        raise ConfigError(f"--by {by} --rubric {rubrics[0]}", "a rubric is for --by rubric alone", "Leave one out.")
    if by == PASS:
        assert draw is not None
        draw.check()
        return []
    if by in ALONE:
        return [ALONE[by]()]
    read = [ByRubric(rubric.read(name)) for name in rubrics]
    twice = [name for name, n in Counter(method.name for method in read).items() if n > 1]
    if twice:
        raise ConfigError(f"two rubrics named {twice[0]}", "a grade goes by its rubric's name", "Rename one of them.")
    return read


def log_skipped(records: Records) -> None:
    for why, n in records.skipped.items():
        log.CONSOLE.print(f"left out: {why}" if why != "others" else f"left out: {n} more lines", markup=False)


Why = Callable[[Record], str]


def sorted_out(records: Records, why_not: Why) -> tuple[list[int], Counter[str]]:
    """(numbers of the records that can be used, how many cannot by reason)."""
    able, reasons = [], Counter[str]()
    for number in range(len(records)):
        why = why_not(records[number])
        if why:
            reasons[why] += 1
        else:
            able.append(number)
    return able, reasons


Able = tuple[list[int], Counter[str]]


class Grade(NamedTuple):
    """What a row says of how its value was found."""

    name: str
    keep: str  # the end that is worth keeping
    identity: Any  # of a rubric every word, of sampling every setting


def _able(method: Method, records: Records, model: Described) -> Able:
    able, reasons = sorted_out(records, lambda record: method.why_not(record, model))
    if not able:
        true = f"none of its {len(records)} records can be graded: {_listed(reasons)}"
        raise ConfigError(f"{method.name} of {records.path}", true, "Take other records, another rubric or judge.")
    return able, reasons


def able_to_pass(records: Records, model: Described, asked: str) -> Able:
    """The records that can be asked again and verified."""

    def why_not(record: Record) -> str:
        return drawing.why_not(record, model) if rewards.verifiable(record.meta) else "its answer cannot be verified"

    able, reasons = sorted_out(records, why_not)
    if not able:
        true = f"no answer to its {len(records)} records can be verified: {_listed(reasons)}"
        change = 'Say how in their meta: {"verify": "math", "answer": "4"}.'
        raise ConfigError(asked, true, change)
    return able, reasons


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{why} ({n})" for why, n in reasons.most_common())


# ---------------------------------------------------------------------------------------------------------- the work


def _by_method(
    ledger: Ledger,
    records: Records,
    method: Method,
    able: Able,
    model: Described,
    reader: Callable[[], Reader],
    rows: int,
    most: int,
) -> Counter[str]:
    numbers, counts = able[0], Counter(able[1])
    grade = Grade(method.name, method.keep, method.identity())
    keys = {n: key_of(records.keys[n], grade.identity, model.identity) for n in numbers}
    counts["there"] = sum(key in ledger for key in keys.values())
    todo = {key: n for n, key in reversed(keys.items()) if key not in ledger}  # a record that is there twice, once
    order = sorted(todo.values(), key=lambda n: -records.size(n))  # of about one length together, the longest first
    if order:
        method.check(reader())

    def graded() -> Iterator[tuple[int, methods.Values | None]]:
        for begin in range(0, len(order), rows):
            some = order[begin : begin + rows]
            yield from zip(some, method(reader(), [records[n] for n in some], rows, most), strict=True)

    for number, values in track(graded(), f"grading {method.name}", len(order)) if order else ():
        counts["graded" if values else LEFT_OUT] += 1
        if values:
            ledger.add(_row(keys[number], records[number], grade, model, values))
    return counts


def _by_passing(
    ledger: Ledger,
    drawn: Ledger,
    records: Records,
    draw: Drawing,
    able: Able,
    model: Described,
    reader: Callable[[], Reader],
    rows: int,
    most: int,
) -> Counter[str]:
    numbers, counts = able[0], Counter(able[1])
    grade = Grade(PASS, "low", [PASS, *draw.identity()])
    keys = {n: key_of(records.keys[n], grade.identity, model.identity) for n in numbers}
    counts["there"] = sum(key in ledger for key in keys.values())
    todo = [n for n in numbers if keys[n] not in ledger]
    sampled = drawing.drawn(drawn, records, todo, draw, model, reader, rows, most)
    for number, samples in track(sampled, f"drawing {draw.samples} answers each", len(todo)) if todo else ():
        record = records[number]
        values = methods.passes([drawing.score(sample, record) for sample in samples]) if samples else None
        counts["graded" if values else LEFT_OUT if samples is None else "no answer could be judged"] += 1
        if values and keys[number] not in ledger:
            ledger.add(_row(keys[number], record, grade, model, values))
    return counts


def _row(key: str, record: Record, grade: Grade, model: Described, values: dict[str, Any]) -> dict[str, Any]:
    about = {"key": key, "record": record.key, "id": record.id, "grade": grade.name, "keep": grade.keep}
    return (
        about | {"judge": model.name, "identity": model.identity[:16], "method": key_of(grade.identity)[:16]} | values
    )


def _masses(ledger: Ledger, records: Records, method: Method, numbers: Sequence[int], model: Described) -> list[float]:
    """Of each of these records that a judge was asked about: the probability that it gave to the rubric's answers."""
    keys = {key_of(records.keys[n], method.identity(), model.identity) for n in numbers}
    return [row["mass"] for row in (ledger[key] for key in keys if key in ledger) if "mass" in row]


def _warn(method: Method, masses: Sequence[float], model: Described) -> None:
    faint = sum(mass < LEAST_MASS for mass in masses)
    if not faint:
        return
    told = (
        f"warning: in {faint} of {len(masses)} records by {method.name}, {model.name} gave the rubric's answers less",
        f"than {LEAST_MASS:.0%} of its probability together (the mean of all: {np.mean(masses):.2g}). It would have",
        "said something else: it does not know what it is asked, and these grades mean next to nothing. Take a judge",
        "that follows instructions, answers that it would give, or --by loss or --by pass.",
    )
    log.CONSOLE.print(" ".join(told), markup=False)


def _show(ledger: Ledger, records: Records, found: dict[str, Counter], model: Described) -> None:
    table = Table(title=f"{records.path} by {model.name}")
    for heading in ("grade", "made now", "there before", "left out"):
        table.add_column(heading)
    for name, counts in found.items():
        rest = Counter({why: n for why, n in counts.items() if why not in ("graded", "there")})
        table.add_row(name, str(counts["graded"]), str(counts["there"]), _listed(rest) or "0")
    log.CONSOLE.print(table)
    log.CONSOLE.print(f"{ledger.path} has the grades; `llamax data select` chooses by them.", markup=False)
