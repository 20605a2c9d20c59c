"""Grades beside slow twins: one conversation at a time, by the plain forward pass, and by counting all subsets."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.batch import Batch
from llamax.config import ConfigError
from llamax.data import chat
from llamax.model.score import Score, score
from llamax.post import methods, rubric
from llamax.post.methods import ByLoss, ByReward, ByRubric, answer_logps, expected, pass_at, passes, slow_answer_logps
from llamax.post.records import Records
from llamax.post.rubric import Rubric, Vote
from llamax.sample.reading import Scored
from tests.post.small import MODEL, QUESTIONS, TOKENIZER, make, reader_of
from tests.tolerances import ORACLE, TWIN

SOME = (0, 11, 15, 20)  # a sum, a choice, a picture, a system's message
QUALITY = rubric.read("quality")
LONGEST = 256


@pytest.fixture(scope="module")
def reader():
    return reader_of(make())


@pytest.fixture(scope="module")
def rewarding():
    """A reward model."""
    return reader_of(make(model=dataclasses.replace(MODEL, reward_head=True)))


@pytest.fixture(scope="module")
def some():
    records = Records(QUESTIONS)
    return [records[n] for n in SOME]


def slow_logps(reader, tokens, tiles) -> np.ndarray:
    """log p of tokens[1:], by one forward pass of them all."""
    return np.asarray(slow_rows(reader, tokens, tiles).logp)[0, : len(tokens) - 1]


def slow_rows(reader, tokens, tiles) -> Score:
    """One forward pass; padded at the end, so that there are few programs."""
    n, zeros = len(tokens), np.zeros((1, LONGEST), np.int32)
    row, segment = zeros.copy(), zeros.copy()
    row[0, :n], segment[0, :n] = tokens, 1
    tiles = tiles[None] if len(tiles) else np.zeros((1, 0, 1, 1, 3), np.uint8)
    weights, at = zeros.astype(np.float32), np.arange(LONGEST, dtype=np.int32)[None]
    batch = jax.tree.map(jnp.asarray, Batch(row, np.roll(row, -1), weights, segment, at, zeros, tiles))
    return forward(reader.model.skeleton, reader.model.params, reader.model.router_bias, batch)


@partial(jax.jit, static_argnums=0)
def forward(skeleton, params, router_bias, batch):
    return score(skeleton.bind(params, router_bias), batch)


def slow_grade(reader, made: Rubric, record) -> tuple[float, float]:
    """(mean, spread) of the votes: exp of every answer's log-probability, normalised, times its worth."""
    values = []
    for vote in made.votes:
        prompt = reader.prompt(rubric.messages(vote, record))
        p = {}
        for word in made.answers:
            ids = TOKENIZER.encode(word)
            logp = slow_logps(reader, [*prompt.tokens, *ids], prompt.tiles)
            p[word] = math.exp(float(np.float64(logp[-len(ids) :]).sum()))
        values.append(sum(p[word] * worth for word, worth in made.answers.items()) / sum(p.values()))
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def test_a_judge_s_grade_is_what_the_formula_says(reader, some):
    """Answers of one token, with a picture, in batches of four and alone."""
    assert all(len(TOKENIZER.encode(word)) == 1 for word in QUALITY.answers)
    found = ByRubric(QUALITY)(reader, some, 4, 4096)
    for record, values in zip(some, found, strict=True):
        mean, spread = slow_grade(reader, QUALITY, record)
        np.testing.assert_allclose((values["value"], values["spread"]), (mean, spread), **ORACLE)
        assert len(values["votes"]) == 2 and 0 < values["mass"] < 1 and values["spread"] > 0
    assert len({round(values["value"], 4) for values in found}) == len(some)


def test_answers_of_several_tokens_are_read_to_their_ends(reader, some):
    longer = Rubric("x", "high", {"harmful": 0.0, "proper": 2.0, "refused": 1.0}, QUALITY.votes[:1])
    assert any(len(TOKENIZER.encode(word)) > 1 for word in longer.answers)
    (values,) = ByRubric(longer)(reader, some[:1], 4, 4096)
    np.testing.assert_allclose(values["value"], slow_grade(reader, longer, some[0])[0], **ORACLE)


def test_reading_a_question_once_for_all_answers_is_reading_it_for_each(reader, some):
    prompts = [reader.prompt(rubric.messages(QUALITY.votes[0], record)) for record in some]
    ids = [TOKENIZER.encode(word) for word in QUALITY.answers]
    fast = answer_logps(reader, prompts, answers=ids, rows=4)
    np.testing.assert_allclose(fast, slow_answer_logps(reader, prompts, answers=ids, rows=4), **TWIN)
    assert fast.shape == (4, 5) and (fast < 0).all()


def test_expected_worth():
    logp = np.log([0.2, 0.1, 0.1])
    value, mass = expected(logp, np.array([1.0, 2.0, 3.0]))
    assert value == pytest.approx((0.2 + 0.2 + 0.3) / 0.4) and mass == pytest.approx(0.4)
    value, mass = expected(np.array([-1e4, -1e4 - 1]), np.array([0.0, 1.0]))  # exp alone would be 0 / 0
    assert value == pytest.approx(1 / (1 + math.e)) and mass == 0


def test_answers_that_begin_one_another_are_refused(reader):
    for words in ({"1": 1.0, "10": 3.0}, {"easy": 1.0, "easy ": 2.0}):
        made = Rubric("x", "high", words, QUALITY.votes)
        ids = [TOKENIZER.encode(word) for word in words]
        if any(a != b and b[: len(a)] == a for a, b in itertools.permutations(ids, 2)):
            with pytest.raises(ConfigError, match="is the beginning of"):
                ByRubric(made).check(reader)
            return
    pytest.fail("the tokenizer has no such words")


def test_the_loss_is_that_of_the_trained_tokens(reader, some):
    found = ByLoss()(reader, some, 4, 4096)
    for record, values in zip(some, found, strict=True):
        encoded = chat.encode(chat.render(record.messages), TOKENIZER, MODEL.vision)
        logp = slow_logps(reader, encoded.tokens.tolist(), encoded.tiles)
        trained = encoded.weights[1:] > 0
        np.testing.assert_allclose(values["value"], -logp[trained].mean(dtype=np.float64), **ORACLE)
        assert values["tokens"] == trained.sum()


@pytest.mark.parametrize("marks", [True, False])
def test_a_reward_stands_where_the_answer_ends(rewarding, some, marks):
    """At the token before the end of turn or, for a model that learnt without marks, before the last of the text."""
    reader = rewarding._replace(about=rewarding.about._replace(compare_marks=marks))
    found = ByReward()(reader, some, 4, LONGEST)
    for record, values in zip(some, found, strict=True):
        tokens = reader.encode(record.messages, record.tools)
        at = len(tokens.tokens) - (2 if marks else 3)
        assert tokens.tokens[-1] == TOKENIZER.eot
        scores = slow_rows(reader, tokens.tokens, tokens.tiles).reward
        np.testing.assert_allclose(values["value"], scores[0, at], **TWIN)
    assert len({values["value"] for values in found}) == len(some)
    assert ByReward()(reader, some, 4, 8) == [None] * len(some)  # all are longer


def test_what_is_too_long_is_left_out(reader, some, monkeypatch):
    def logps(skeleton, params, bias, prompts, firsts, **how):
        return [Scored(np.zeros(len(p.tokens) - n, np.float32), None) for p, n in zip(prompts, firsts, strict=True)]

    monkeypatch.setattr(methods, "score_tokens", logps)
    lengths = [len(reader.encode(record.messages).tokens) for record in some]
    found = ByLoss()(reader, some, 4, min(lengths))
    assert [values is not None for values in found] == [n == min(lengths) for n in lengths]
    assert ByLoss()(reader, some, 4, 3) == [None] * 4 and ByRubric(QUALITY)(reader, some[:1], 4, 3) == [None]


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n, c in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1) if c <= n else ():
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-12)
    assert pass_at(8, 2, 4) == pytest.approx(0.785714, abs=1e-6)  # the closed form of the reference


def test_samples_that_cannot_be_judged_do_not_count():
    values = passes([1.0, None, 0.0, 0.0, None, 0.5])
    assert values["samples"] == 4 and values["right"] == 1 and values["value"] == 0.25
    assert values["pass"] == {"1": 0.25, "2": 0.5, "4": 1.0}
    assert passes([None, None]) is None and passes([]) is None


# -------------------------------------------------------------------------------------------------------------- rubrics


@pytest.mark.parametrize("name", ["difficulty", "quality", "safety"])
def test_shipped_rubrics(name, reader, some):
    made = rubric.read(name)
    assert made.name == name and len(made.votes) >= 2
    ByRubric(made).check(reader)
    for vote, record in itertools.product(made.votes, some):
        reader.prompt(rubric.messages(vote, record))


def test_a_question_is_shown_with_its_pictures_in_their_places(some):
    record = some[2]
    shown = rubric.messages(Vote("", ("Look: ", "question", " -> ", "answer", "")), record)
    assert [m["role"] for m in shown] == ["user"]
    kinds = [part.get("text", part["type"]) for part in shown[0]["content"]]
    assert kinds == ["Look: ", "image", "What colour is the shape? One word.", " -> ", "red"]
    system, told = rubric.messages(Vote("Judge.", ("", "conversation", "")), some[3])
    assert system["content"] == "Judge."
    texts = "".join(part["text"] for part in told["content"])
    assert texts.startswith("[system]\nYou are brief.\n\n[user]\nWrite") and texts.endswith("home again.")


GOOD = '[answers]\na = 1\nb = 2\n[[votes]]\nprompt = "{question}"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[answers", "cannot be read as TOML"),
        ('nam = "x"\n' + GOOD, "a key 'nam'"),
        ('keep = "both"\n' + GOOD, "its keep is 'both'"),
        ('name = "a b"\n' + GOOD, "its name is 'a b'"),
        ("[answers]\na = 1\nb = 2\n", "it asks nothing"),
        (GOOD.replace("b = 2", ""), "its answers are"),
        (GOOD.replace("b = 2", "b = true"), "its answers are"),
        (GOOD.replace("b = 2", "b = 1"), "all its answers are worth the same"),
        (GOOD.replace("{question}", "{quest}"), "a prompt has {quest} in it"),
        (GOOD.replace("{question}", "{"), "a prompt has { in it"),
        (GOOD.replace("{question}", "hm"), "shows nothing of what is judged"),
        (GOOD + "system = 3\n", "one of its votes is"),
    ],
)
def test_what_is_no_rubric_is_told(tmp_path, text, said):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        rubric.read(path)


def test_a_rubric_may_spell_braces(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(GOOD.replace("{question}", "{{x}} {question}"))
    made = rubric.read(path)
    assert made.name == "r" and made.keep == "high" and made.votes[0].prompt == ("{x} ", "question", "")
    with pytest.raises(ConfigError, match="neither such a file nor a rubric .* difficulty, quality, safety"):
        rubric.read("hardness")


def test_methods_say_what_they_cannot_grade(some):
    blind = reader_of(make()).about._replace(vision=False)
    pictured, unanswered = some[2], some[0]._replace(messages=some[0].messages[:1])
    assert methods.ByRubric(QUALITY).why_not(pictured, blind) == methods.NO_EYES
    assert methods.ByLoss().why_not(pictured, blind) == methods.NO_EYES
    assert "last word" in methods.ByRubric(QUALITY).why_not(unanswered, blind)
    assert methods.ByRubric(rubric.read("difficulty")).why_not(unanswered, blind) == ""
    assert methods.ByLoss().why_not(unanswered, blind) == "the assistant says nothing"
