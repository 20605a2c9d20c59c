"""How a record is graded: by a judge's answers to a rubric, a model's loss on it, or how often a model gets it right.

    rubric   mean over votes of sum_a p(a) value(a),   p(a) = P(a) / sum_a P(a),   P(a) = prod P(token of a | question)
    loss     mean over the trained tokens of -ln P(token | all before it), in nats
    reward   what a reward model's head gives the answer where it ends, as in its training and its evaluation
    pass     pass@k = 1 - C(n - c, k) / C(n, k),   c of n samples right (Chen et al. 2021, arXiv:2107.03374)

All probabilities are those of model/score.py: by `score_tokens`, or, where every answer is one token, from the logits
behind the question, which are read once for all answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array

from llamax.config import ConfigError
from llamax.data.talk_encode import Unfit
from llamax.evals import reward
from llamax.parallel import place
from llamax.post import rubric as rubrics
from llamax.post.reader import Described, Reader
from llamax.post.records import Record, pictured
from llamax.post.rubric import Rubric
from llamax.sample.reading import Prompt, most_tiles, pack, read, rounded, score_tokens

NO_EYES = "it shows pictures, and the model sees none"
Values = dict[str, Any]  # "value", "spread" and what else is worth keeping


@dataclass(frozen=True)
class ByRubric:
    rubric: Rubric

    @property
    def name(self) -> str:
        return self.rubric.name

    @property
    def keep(self) -> str:
        return self.rubric.keep

    def identity(self) -> list[Any]:
        return ["rubric", *self.rubric.identity()]

    def why_not(self, record: Record, model: Described) -> str:
        """Why it cannot be graded; "" if it can."""
        if self.rubric.needs_answer and record.answer is None:
            return "the assistant does not have the last word"
        return NO_EYES if pictured(record.messages) and not model.vision else ""

    def check(self, reader: Reader) -> list[list[int]]:
        """The answers' tokens. ConfigError if one begins another: its probability has the other's in it."""
        ids = [reader.tokenizer.encode(word) for word in self.rubric.answers]
        words = list(self.rubric.answers)
        for i, a in enumerate(ids):
            for j, b in enumerate(ids):
                if i != j and b[: len(a)] == a:
                    true = f"to this tokenizer {words[i]!r} is the beginning of {words[j]!r}"
                    raise ConfigError(f"rubric {self.name}", true, "Give answers that begin in different ways.")
        return ids

    def __call__(self, reader: Reader, records: Sequence[Record], rows: int, most: int) -> list[Values | None]:
        ids, worth_K = self.check(reader), np.array(list(self.rubric.answers.values()))
        votes: list[list[tuple[float, float]]] = [[] for _ in records]
        for vote in self.rubric.votes:
            prompts = [_tried(reader.prompt, rubrics.messages(vote, record)) for record in records]
            places = _short(prompts, most)
            asked = [prompts[i] for i in places]
            logps = answer_logps(reader, asked, answers=ids, rows=rows) if asked else ()
            for i, logp_K in zip(places, logps, strict=True):
                votes[i].append(expected(logp_K, worth_K))
        return [_voted(cast) if len(cast) == len(self.rubric.votes) else None for cast in votes]


def expected(logp_K: np.ndarray, worth_K: np.ndarray) -> tuple[float, float]:
    """(the expected worth of an answer, the probability that one of them is given)."""
    highest = logp_K.max()
    p_K = np.exp(logp_K - highest)
    return float(p_K @ worth_K / p_K.sum()), float(p_K.sum() * np.exp(highest))


def _voted(votes: Sequence[tuple[float, float]]) -> Values:
    values, masses = zip(*votes, strict=True)
    return {
        "value": float(np.mean(values)),
        "spread": float(np.std(values)),
        "votes": [round(value, 6) for value in values],
        "mass": float(np.mean(masses)),  # of the judge's probability: near 0, it does not know what it is asked
    }


def answer_logps(
    reader: Reader, prompts: Sequence[Prompt], *, answers: Sequence[Sequence[int]], rows: int
) -> np.ndarray:
    """ln P of each answer's tokens behind each prompt, float64 [prompts, answers]."""
    if any(len(ids) != 1 for ids in answers):
        return slow_answer_logps(reader, prompts, answers=answers, rows=rows)
    room = rounded(max(len(prompt.tokens) for prompt in prompts))
    logits_BV, _ = read(*reader.weights, prompts, room, row_multiple=rows, tiles=most_tiles(prompts))
    logp_BK = place.fetch(_picked(logits_BV, np.array([ids[0] for ids in answers], np.int32)))
    return np.asarray(logp_BK, np.float64)[: len(prompts)]


def slow_answer_logps(
    reader: Reader, prompts: Sequence[Prompt], *, answers: Sequence[Sequence[int]], rows: int
) -> np.ndarray:
    """The same for answers of any length, each read behind the prompt."""
    columns = []
    for ids in answers:
        whole = [Prompt([*prompt.tokens, *ids], prompt.tiles) for prompt in prompts]
        firsts = [len(prompt.tokens) for prompt in prompts]
        how = dict(rows=rows, row_multiple=rows, tiles=most_tiles(prompts), likeliest=False)
        scored = score_tokens(*reader.weights, whole, firsts, **how)
        columns.append([one.logp.sum(dtype=np.float64) for one in scored])
    return np.array(columns).T


@jax.jit
def _picked(logits_BV: Array, ids_K: Array) -> Array:
    return jax.nn.log_softmax(logits_BV)[:, ids_K]


@dataclass(frozen=True)
class ByLoss:
    name: str = "loss"
    keep: str = "high"  # what the model cannot say yet is what it can learn

    def identity(self) -> list[Any]:
        return ["loss"]

    def why_not(self, record: Record, model: Described) -> str:
        if not any(message["role"] == "assistant" for message in record.messages):
            return "the assistant says nothing"
        return NO_EYES if pictured(record.messages) and not model.vision else ""

    def check(self, reader: Reader) -> None:
        """Nothing can be wrong."""

    def __call__(self, reader: Reader, records: Sequence[Record], rows: int, most: int) -> list[Values | None]:
        encoded = [_tried(reader.encode, record.messages, record.tools) for record in records]
        prompts = [None if one is None else Prompt(one.tokens.tolist(), one.tiles) for one in encoded]
        found: list[Values | None] = [None] * len(records)
        places = [i for i in _short(prompts, most) if encoded[i].weights.any()]
        if not places:
            return found
        trained = [np.flatnonzero(encoded[i].weights > 0) for i in places]
        some = [prompts[i] for i in places]
        how = dict(rows=rows, row_multiple=rows, tiles=most_tiles(some), likeliest=False)
        scored = score_tokens(*reader.weights, some, [int(at[0]) for at in trained], **how)
        for i, at, one in zip(places, trained, scored, strict=True):
            logp = one.logp[at - at[0]].astype(np.float64)
            found[i] = {"value": -float(logp.mean()), "spread": float(logp.std()), "tokens": len(logp)}
        return found


@dataclass(frozen=True)
class ByReward:
    name: str = "reward"
    keep: str = "high"

    def identity(self) -> list[Any]:
        return ["reward"]

    def why_not(self, record: Record, model: Described) -> str:
        if record.answer is None:
            return "the assistant does not have the last word"
        return NO_EYES if pictured(record.messages) and not model.vision else ""

    def check(self, reader: Reader) -> None:
        """Nothing can be wrong that `with_head` has not told."""

    def __call__(self, reader: Reader, records: Sequence[Record], rows: int, most: int) -> list[Values | None]:
        encoded = [_tried(reader.answered, record.prompt, record.answer, record.tools) for record in records]
        prompts = [None if one is None else Prompt(one.tokens.tolist(), one.tiles) for one in encoded]
        found: list[Values | None] = [None] * len(records)
        places = _short(prompts, most)
        if not places:
            return found
        some = [prompts[i] for i in places]
        batch = pack(some, rows, tiles=most_tiles(some))
        sides_BT = np.zeros_like(batch.tokens)
        for row, i in enumerate(places):
            sides_BT[row, : len(encoded[i].sides) - 1] = encoded[i].sides[1:]  # by targets, as in a training batch
        skeleton, params, bias = reader.weights
        (scores_B1, _), _ = place.fetch(reward.scores(skeleton, 1, params, bias, batch._replace(sides=sides_BT)))
        for row, i in enumerate(places):
            found[i] = {"value": float(scores_B1[row, 0]), "spread": 0.0}
        return found


Method = ByRubric | ByLoss | ByReward


def with_head(model: Described, asked: str) -> ByReward:
    """The method of a reward model. ConfigError if the model is none."""
    if not model.reward:
        true = f"{model.name} has no head that scores (model.reward_head)"
        raise ConfigError(asked, true, "Name a reward model, as recipes/reward_model.py trains one, or a --rubric.")
    return ByReward()


def _tried(encode: Any, *what: Any) -> Any:
    """None where a picture cannot be read, or an answer says nothing."""
    try:
        return encode(*what)
    except (ConfigError, Unfit):
        return None


def _short(prompts: Sequence[Prompt | None], most: int) -> list[int]:
    """The places of those prompts that have at most so many tokens."""
    return [i for i, prompt in enumerate(prompts) if prompt is not None and len(prompt.tokens) <= most]


def passes(scores: Sequence[float | None]) -> Values | None:
    """pass@k for k = 1, 2, 4, ... up to the number of samples that could be judged; None if none could be."""
    judged = [score for score in scores if score is not None]
    if not judged:
        return None
    n, c = len(judged), sum(score >= 1 for score in judged)
    ks = [1 << i for i in range(n.bit_length())]
    return {
        "value": pass_at(n, c, 1),
        "spread": float(np.std(judged)),
        "samples": n,
        "right": c,
        "pass": {str(k): pass_at(n, c, k) for k in ks},
    }


def pass_at(n: int, c: int, k: int) -> float:
    """The chance that of k samples one is right, from c of n that were; unbiased."""
    assert 0 <= c <= n and 1 <= k <= n
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
