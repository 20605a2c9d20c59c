"""Samples of prompts, drawn once and kept: K answers of a model to each record, as ids and as text.

What is drawn for a record follows from the seed and the record alone, so a run that was interrupted goes on to the same
samples, whatever else is drawn beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llamax import rewards
from llamax.config import ConfigError
from llamax.data import chat
from llamax.post.ledger import Ledger, key_of
from llamax.post.reader import Described, Reader
from llamax.post.records import Record, Records, pictured
from llamax.sample import engine
from llamax.sample.engine import Sampling


class Sample(NamedTuple):
    ids: tuple[int, ...]  # as they were drawn, with the stop id
    text: str  # what they say, for rules and people
    logp: float  # the model's mean log-probability of them, nats a token
    stopped: bool  # it came to an end


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn."""

    samples: int
    max_tokens: int
    sampling: Sampling

    def check(self) -> None:
        engine.check(self.max_tokens, self.sampling, self.samples)
        if self.samples > 1 and self.sampling.temperature == 0:
            true = f"{self.samples} samples would be the same"
            raise ConfigError("--temperature 0", true, "Give a temperature above 0, or one sample.")

    def identity(self) -> list[Any]:
        return ["draw", self.samples, self.max_tokens, *self.sampling]

    def key(self, record: str, model: Described) -> str:
        return key_of(record, self.identity(), model.identity)


def why_not(record: Record, model: Described) -> str:
    """Why nothing can be drawn; "" if it can."""
    if record.prompt[-1]["role"] not in ("user", "tool", "ipython"):
        return "nobody asks anything at its end"
    return "it shows pictures, and the model sees none" if pictured(record.prompt) and not model.vision else ""


def drawn(
    ledger: Ledger,
    records: Records,
    numbers: Sequence[int],
    drawing: Drawing,
    model: Described,
    load: Callable[[], Reader],
    rows: int,
    max_prompt: int,
) -> Iterator[tuple[int, list[Sample] | None]]:
    """(number, samples) of each of the records: first what the ledger has, then what is drawn now and added to it. None
    for a prompt of more than `max_prompt` tokens, or with a picture that cannot be read. `load` is called if need be.
    """
    keys = {number: drawing.key(records.keys[number], model) for number in numbers}
    for number in numbers:
        if keys[number] in ledger:
            yield (
                number,
                [Sample(tuple(s["ids"]), s["text"], s["logp"], s["stopped"]) for s in ledger[keys[number]]["samples"]],
            )
    missing: dict[str, list[int]] = {}  # of each key its records: some are there twice
    for number in sorted(numbers, key=lambda number: -records.size(number)):
        if keys[number] not in ledger:
            missing.setdefault(keys[number], []).append(number)
    firsts = [same[0] for same in missing.values()]
    at_once = max(1, rows // drawing.samples)
    for begin in range(0, len(firsts), at_once):
        some = [records[number] for number in firsts[begin : begin + at_once]]
        for record, samples in zip(some, _draw(load(), some, drawing, rows, max_prompt), strict=True):
            key = keys[record.number]
            if samples is not None:
                row = {"key": key, "record": record.key, "model": model.name, "draw": drawing.identity()}
                ledger.add(row | {"samples": [sample._asdict() for sample in samples]})
            yield from ((number, samples) for number in missing[key])


def _draw(
    reader: Reader, records: Sequence[Record], drawing: Drawing, rows: int, max_prompt: int
) -> list[list[Sample] | None]:
    prompts = [_prompt(reader, record, max_prompt) for record in records]
    asked = [(i, prompt) for i, prompt in enumerate(prompts) if prompt is not None]
    found: list[list[Sample] | None] = [None] * len(records)
    if not asked:
        return found
    completions = engine.generate(
        *(*reader.weights, [prompt for _, prompt in asked]),
        max_tokens=drawing.max_tokens,
        stop=reader.tokenizer.stop,
        n=drawing.samples,
        sampling=drawing.sampling,
        rows=rows,
        numbers=[int(records[i].key[:8], 16) for i, _ in asked],
    )
    for (i, _), of_one in zip(asked, completions, strict=True):
        tools = records[i].tools
        found[i] = [
            Sample(tuple(c.tokens), said(reader, c.tokens, tools), sum(c.logp) / len(c.logp), c.stopped) for c in of_one
        ]
    return found


def _prompt(reader: Reader, record: Record, max_prompt: int) -> Any:
    try:
        prompt = reader.prompt(record.prompt, record.tools)
    except ConfigError:  # a picture that cannot be read
        return None
    return prompt if len(prompt.tokens) <= max_prompt else None


def said(reader: Reader, ids: Sequence[int], tools: Sequence[Any]) -> str:
    return chat.parse(ids, reader.tokenizer, tools)["content"]


def score(sample: Sample, record: Record) -> float | None:
    """By the rule that the record names."""
    return rewards.verify(sample.text, record.meta)
