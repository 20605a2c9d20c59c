"""Evaluations of answers: preferences, scores and instructions, of stand-ins whose figures a hand can count."""

from __future__ import annotations

import dataclasses
import json
import logging
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from llamax import config
from llamax.config import ConfigError
from llamax.data.tokenizer import Tokenizer
from llamax.evals import instructions, preference, reward
from llamax.evals.report import Context
from llamax.observe.log import MetricsFile
from llamax.sample.engine import Completion
from llamax.train import hooks
from tests.runs import tiny_run

RUN = tiny_run(data=dict(comparisons_per_row=4))
TOKENIZER = Tokenizer(RUN.data.tokenizer)
(YES,) = TOKENIZER.encode("blue")  # one token, as "red" is


class Named:
    """A skeleton whose models are the names of weights."""

    def bind(self, params, router_bias):
        return params

    def reference(self, params, own, router_bias):
        return own


def manifest(folder, records: list[dict]) -> str:
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path = folder / "data.toml"
    path.write_text('format = "jsonl"\nfiles = ["data.jsonl"]\nkind = "text"\n')
    return str(path)


def pair(chosen: str, rejected: str) -> dict:
    return {"prompt": [{"role": "user", "content": f"{chosen}?"}], "chosen": chosen, "rejected": rejected}


# ------------------------------------------------------------------------------------------------------- preferences


@pytest.fixture
def liking(monkeypatch) -> Context:
    """A policy that gives "blue" -1 and every other token -2, beside a reference that gives all -2."""

    def likes(weights, batch):
        policy = jnp.where(batch.targets == YES, -1.0, -2.0)
        return SimpleNamespace(logp=policy if weights["likes"].size else jnp.full(batch.targets.shape, -2.0))

    monkeypatch.setattr(preference, "score", likes)
    preference.compared.clear_cache()
    policy, other = {"likes": np.zeros(1)}, {"likes": np.zeros(0)}
    return Context(RUN, Named(), None, TOKENIZER, lambda batch: batch, 1, policy, {}, reference=(other, {}))


def test_an_answer_is_preferred_by_what_the_model_gives_it(liking, tmp_path):
    """Two of four pairs are won, one is lost, and in one neither side gains."""
    pairs = [pair("blue", "red"), pair("blue", "red"), pair("red", "blue"), pair("red", "if")]
    report = preference.run(liking, config.Eval(kind="preference", path=manifest(tmp_path, pairs)))
    won = report.scalars
    assert won["accuracy"] == 0.5 and won["reward_accuracy"] == (2 + 0.5) / 4
    np.testing.assert_allclose(won["margin"], (1 + 1 - 1 + 0) / 4)
    np.testing.assert_allclose((won["chosen_reward"], won["rejected_reward"]), (2 / 4, 1 / 4))
    assert set(report.plots) == {"length", "margins"} and report.rises == ("chosen_logp",)
    assert report.rows[0][:2] == ("right of 4 comparisons", "50.0%")


def test_without_a_reference_nothing_is_said_of_rewards(liking, tmp_path):
    pairs = [pair("blue", "red")]
    alone = liking._replace(reference=None)
    report = preference.run(alone, config.Eval(kind="preference", path=manifest(tmp_path, pairs)))
    assert report.scalars["accuracy"] == 1 and "margin" not in report.scalars and not report.plots
    assert report.rows[0][2] == "no reference"


def test_what_holds_no_comparison_is_refused(liking, tmp_path):
    no_room = tiny_run()
    cfg = config.Eval(kind="preference", path=manifest(tmp_path, [pair("blue", "blue")]))
    with pytest.raises(ConfigError, match="rows of this run hold no comparisons"):
        preference.check(no_room, cfg)
    with pytest.raises(ConfigError, match="no comparison in it can be used"):
        preference.run(liking, cfg)


def test_a_figure_that_falls_again_and_again_is_warned_of(tmp_path):
    """Three falls in a row, and not a fall, a rise, and two falls; also over a resumed run's lines."""
    said = []
    with MetricsFile(tmp_path / "metrics.jsonl", 0) as file:
        evaluate = hooks.Evaluate(RUN, None, None, file, None, said.append, said.append, end=9)
        for step, value in enumerate([-1.0, -1.1, -1.0, -1.2, -1.3], start=1):
            file.write(step, {"eval/p/chosen_logp": value})
            evaluate.look_back("eval/p/chosen_logp", 3)
    assert not said
    with MetricsFile(tmp_path / "metrics.jsonl", 5) as file:
        evaluate = hooks.Evaluate(RUN, None, None, file, None, said.append, said.append, end=9)
        file.write(6, {"eval/p/chosen_logp": -1.4})
        evaluate.look_back("eval/p/chosen_logp", 3)
    assert len(said) == 1 and "fell at 3 evaluations in a row: -1.0000, -1.2000, -1.3000, -1.4000" in said[0]


# ------------------------------------------------------------------------------------------------------------- scores


def test_scores_are_read_where_answers_end(monkeypatch, tmp_path):
    """A score that is the place of the token prefers the longer answer."""
    monkeypatch.setattr(reward, "score", lambda model, batch: SimpleNamespace(reward=batch.positions * 1.0))
    reward.scores.clear_cache()
    model = dataclasses.replace(RUN.model, reward_head=True)
    run = dataclasses.replace(RUN, model=model)
    ctx = Context(run, Named(), None, TOKENIZER, lambda batch: batch, 1, {}, {})
    pairs = [pair("blue blue blue", "red"), pair("red", "blue blue"), pair("blue blue", "red")]
    cfg = config.Eval(kind="reward", path=manifest(tmp_path, pairs))
    report = reward.run(ctx, cfg)
    np.testing.assert_allclose(report.scalars["accuracy"], 2 / 3)
    np.testing.assert_allclose(report.scalars["margin"], (2 - 1 + 1) / 3, rtol=1e-6)
    assert set(report.plots) == {"scores"}
    with pytest.raises(ConfigError, match="no head that scores"):
        reward.check(RUN, cfg)


# ------------------------------------------------------------------------------------------------------- instructions


def asked(question: str, answer: str, **meta) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"So.\nAnswer: {answer}"}]
    options = {"marked": True, "form": "{line}\nAnswer: {line}"}
    return {"messages": messages, "meta": {"verify": "exact", "answer": answer, "options": options} | meta}


def test_answers_are_judged_by_the_rules_of_their_records(monkeypatch, tmp_path):
    """A stand-in that says what the question says; it ends its answer itself if that is in the form."""
    said = {"a": "So.\nAnswer: one", "b": "So.\nAnswer: three", "c": "one", "d": "So.\nAnswer: 2/4"}
    seen = []

    def answer(skeleton, params, router_bias, prompts, **how):
        assert how["max_tokens"] == 7 and set(how["stop"]) == set(TOKENIZER.stop)
        for prompt in prompts:
            text = TOKENIZER.decode(prompt.tokens)
            seen.append(text)
            words = said[next(key for key in said if f"?{key}" in text)]
            yield [Completion(TOKENIZER.encode(words) + [TOKENIZER.eot] * ("\n" in words), [0.0], "\n" in words)]

    monkeypatch.setattr(instructions, "generate", answer)
    records = [
        asked("?a", "one", domain="x"),
        asked("?b", "two", domain="x"),
        asked("?c", "one", domain="y"),
        asked("?d", "0.5", domain="y", verify="math"),
        {**asked("?a", "one", domain="z"), "messages": asked("?a", "one")["messages"][:1]},  # nobody has answered it
        asked("?a", "one", options=["marked"]),  # options that are none
        asked("?a", "one", verify=["exact"]),
        {"messages": asked("?a", "one")["messages"]},  # no rule judges it
        pair("blue", "red"),
    ]
    ctx = Context(RUN, None, None, TOKENIZER, lambda batch: batch, 1, {}, {})
    report = instructions.run(ctx, config.Eval(kind="instructions", path=manifest(tmp_path, records), max_tokens=7))
    found = report.scalars
    assert (found["exact"], found["form"], found["ended"], found["left_out"]) == (0.6, 0.8, 0.8, 4)
    assert (found["x/exact"], found["y/exact"], found["y/form"]) == (0.5, 0.5, 0.5)
    assert all("Answer" not in text for text in seen), "the answer is not in the prompt"
    assert [row[0] for row in report.rows] == ["right of 5, all", "right of 2, x", "right of 2, y", "right of 1, z"]


def test_records_that_no_rule_can_judge_are_refused(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    cfg = config.Eval(kind="instructions", path=manifest(tmp_path, [pair("blue", "red")]))
    with pytest.raises(ConfigError, match="whose answer a rule can judge"):
        instructions.check(RUN, cfg)
