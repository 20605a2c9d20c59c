"""`llamax data sample`: rejection sampling. K answers of a model to every prompt, the best of the right ones kept.

Right is what the record's rule says (llamax/rewards) and, with a judge, what it grades high enough; best is what the
judge grades highest, then what the model finds likeliest. Answers that are the same as, or nearly the same as, a better
one to their prompt are left out, and so is a prompt with its answer that was there before. What is written keeps the
sampled ids, so that nothing is tokenized a second time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from llamax import rewards
from llamax.config import ConfigError
from llamax.data import chat
from llamax.data.tokenizer import Tokenizer
from llamax.evals.continuations import power_of_two
from llamax.observe import log
from llamax.observe.progress import track
from llamax.post import drawing, methods, rubric
from llamax.post.corners import RIGHT
from llamax.post.drawing import Drawing, Sample
from llamax.post.grade import log_skipped, sorted_out
from llamax.post.ledger import Ledger, key_of
from llamax.post.methods import ByReward, ByRubric
from llamax.post.reader import MAX_TOKENS, Described, describe
from llamax.post.records import Record, Records, as_line, check_new, moved, pictured, write
from llamax.post.similar import distinct, normal

HARDNESS = ((0.8, "easy"), (0.3, "medium"), (0.0, "hard"))  # by the share of samples that were right, from above


class Scored(NamedTuple):
    sample: Sample
    rule: float | None  # by the record's rule
    judged: float | None  # by the judge

    @property
    def rank(self) -> tuple[float, float, float]:
        return (self.rule or 0.0, -math.inf if self.judged is None else self.judged, self.sample.logp)


def sample(
    file: str | Path,
    out: str | Path,
    *,
    model: str | Path,
    draw: Drawing,
    keep: int = 1,
    judge: str | Path | None = None,
    rubric_name: str | Path | None = None,
    at_least: float | None = None,
    similar: float = 0.8,
    samples: str | Path | None = None,
    step: int | None = None,
    dtype: str = "float32",
    batch_size: int = 8,
    max_tokens: int = MAX_TOKENS,
) -> Counter[str]:
    """Writes OUT, conversations for supervised tuning, with a manifest; what became of the prompts and samples.

    Args:
        keep: answers of a prompt, at most.
        judge, rubric_name: grade what the rule leaves, or, where there is no rule, all; `at_least` is the least grade.
            Without a rubric the judge is a reward model.
        similar: an answer that shares so much with a better one is left out; see similar.py.
        samples: what is drawn is kept there (FILE.samples.jsonl).

    Raises:
        ConfigError: before a model is loaded, if anything is missing or nothing can be judged.
    """
    log.setup()
    draw.check()
    path = check_new(out)
    if judge is None and (rubric_name is not None or at_least is not None):
        raise ConfigError("--rubric or --at-least", "there is no judge", "Give --judge, or leave them out.")
    grader = describe(judge, dtype=dtype) if judge is not None else None
    method = _method(grader, rubric_name)
    records = Records(file)
    log_skipped(records)
    about = describe(model, step=step, dtype=dtype, option="--model")
    able, counts = sorted_out(records, lambda record: _why_not(record, about, grader))
    if not able:
        true = f"no answer to its {len(records)} records can be judged: {dict(counts)}"
        raise ConfigError(f"{file}", true, 'Say how in their meta, {"verify": "math", "answer": "4"}, or give --judge.')
    reader, rows, tokenizer = cache(about.load), power_of_two(batch_size), about.tokenizer()
    with Ledger(samples or f"{file}.samples.jsonl") as ledger:
        drawn = drawing.drawn(ledger, records, able, draw, about, reader, rows, max_tokens)
        shown = track(drawn, f"drawing {draw.samples} answers each", len(able))
        found = dict(sorted((n, of) for n, of in shown if of is not None))
        if method is not None and grader is not None:
            scored = _judged(ledger, records, found, method, grader, tokenizer, rows, max_tokens)
        else:
            scored = {n: [Scored(one, drawing.score(one, records[n]), None) for one in of] for n, of in found.items()}
    counts["too long, or a picture that cannot be read"] += len(able) - len(found)
    lines = list(_lines(records, scored, path, about, tokenizer, keep, at_least, similar, counts))
    if not lines:
        raise ConfigError(f"--out {out}", f"no answer is worth keeping: {dict(counts)}", "Draw more, or ask for less.")
    how = f"the best {keep} right ones of {draw.samples} answers of {about.name} to each prompt of {records.path.name}"
    write(path, lines, pictures=any(pictured(records[n].prompt) for n in scored), description=how)
    log.CONSOLE.print(f"{path}: {dict(counts)}", markup=False)
    return counts


def _method(judge: Described | None, rubric_name: str | Path | None) -> ByRubric | ByReward | None:
    if rubric_name is not None:
        return ByRubric(rubric.read(rubric_name))
    return None if judge is None else methods.with_head(judge, f"--judge {judge.folder} without --rubric")


def _why_not(record: Record, model: Described, judge: Described | None) -> str:
    if judge is None and not rewards.verifiable(record.meta):
        return "no rule judges its answers"
    if judge is not None and pictured(record.prompt) and not judge.vision:
        return "it shows pictures, and the judge sees none"
    return drawing.why_not(record, model)


def _judged(
    ledger: Ledger,
    records: Records,
    found: dict[int, list[Sample]],
    method: ByRubric | ByReward,
    judge: Described,
    tokenizer: Tokenizer,
    rows: int,
    most: int,
) -> dict[int, list[Scored]]:
    """The samples with a judge's grades, of those that ended and that the rule, if there is one, finds right."""
    reader = cache(judge.load)
    scored = {n: [Scored(one, drawing.score(one, records[n]), None) for one in of] for n, of in found.items()}
    asked = []
    for n, of in scored.items():
        for i, one in enumerate(of):
            if one.sample.stopped and one.rule in (None, RIGHT):
                key = key_of(records.keys[n], one.sample.text, method.identity(), judge.identity)
                asked.append((n, i, key))
    missing = {key: (n, i) for n, i, key in reversed(asked) if key not in ledger}
    todo = list(missing.items())
    if todo:
        method.check(reader())

    def graded() -> Iterator[tuple[str, Any]]:
        for begin in range(0, len(todo), rows):
            some = todo[begin : begin + rows]
            answered = [_answered(records[n], scored[n][i].sample, tokenizer) for _, (n, i) in some]
            yield from zip((key for key, _ in some), method(reader(), answered, rows, most), strict=True)

    for key, values in track(graded(), f"grading {method.name}", len(todo)) if todo else ():
        ledger.add({"key": key, "grade": method.name, "judge": judge.name} | (values or {"value": None}))
    for n, i, key in asked:
        scored[n][i] = scored[n][i]._replace(judged=ledger[key]["value"])
    return scored


def _answered(record: Record, one: Sample, tokenizer: Tokenizer) -> Record:
    """The record with the sample as its answer, as text: the judge's tokenizer may be another."""
    said = chat.parse(one.ids, tokenizer, record.tools)
    del said["token_ids"]
    return record._replace(messages=(*record.prompt, said))


# ------------------------------------------------------------------------------------------------------------ choosing


def _lines(
    records: Records,
    scored: dict[int, list[Scored]],
    out: Path,
    model: Described,
    tokenizer: Tokenizer,
    keep: int,
    at_least: float | None,
    similar: float,
    counts: Counter[str],
) -> Iterator[bytes]:
    seen: set[str] = set()
    for number, of in scored.items():
        record = records[number]
        counts["prompts"] += 1
        counts["samples"] += len(of)
        best = best_of(of, keep, at_least, similar, counts)
        for one in best:
            said = normal(one.sample.text)
            if (twin := f"{record.key} {said}") in seen:
                counts["duplicates"] += 1
                continue
            seen.add(twin)
            counts["kept"] += 1
            yield as_line(_record(record, one, of, model, tokenizer, records.path.parent, out.parent))


def best_of(
    scored: Sequence[Scored], keep: int, at_least: float | None, similar: float, counts: Counter[str]
) -> list[Scored]:
    """At most `keep` of the samples: ended, right, graded high enough, unlike each other; the best first."""
    counts["unfinished"] += sum(not one.sample.stopped for one in scored)
    ended = [one for one in scored if one.sample.stopped]
    right = [one for one in ended if (one.rule == RIGHT if one.rule is not None else one.judged is not None)]
    counts["wrong or not to be judged"] += len(ended) - len(right)
    if at_least is not None:
        graded = [one for one in right if one.judged is not None and one.judged >= at_least]
        counts["graded too low"] += len(right) - len(graded)
        right = graded
    ranked = sorted(right, key=lambda one: one.rank, reverse=True)
    unlike = [ranked[i] for i in distinct([one.sample.text for one in ranked], similar)]
    counts["duplicates"] += len(ranked) - len(unlike)
    return unlike[:keep]


def _record(
    record: Record, one: Scored, of: Sequence[Scored], model: Described, tokenizer: Tokenizer, old: Path, new: Path
) -> dict[str, Any]:
    """What is written: the prompt as it was, the answer by its ids, and how hard the prompt was."""
    raw = moved(record.raw, old, new)
    judged = [each.rule for each in of if each.rule is not None]
    made: dict[str, Any] = {"model": model.name, "samples": len(of)}
    meta = dict(record.meta)
    if judged:
        share = sum(score >= RIGHT for score in judged) / len(judged)
        made["right"] = sum(score >= RIGHT for score in judged)
        meta["difficulty"] = round(1 - share, 6)
        tag = next(name for least, name in HARDNESS if share >= least)
        meta["tags"] = sorted(record.tags - {name for _, name in HARDNESS} | {tag})
    if one.judged is not None:
        made["grade"] = one.judged
    answer = chat.parse(one.sample.ids, tokenizer, record.tools)
    messages = [*raw["messages"][: len(record.prompt)], answer]
    return {**raw, "messages": messages, "meta": meta | {"made": made}}
