"""`llamax data sample` and `pairs`: what is kept of scripted samples, ids as they were drawn, and with a real model."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest

from llamax.config import ConfigError
from llamax.data import chat
from llamax.data.sources import read_manifest
from llamax.post import corners, drawing, methods
from llamax.post.corners import pairs_of
from llamax.post.drawing import Drawing, Sample
from llamax.post.pairs import pairs
from llamax.post.records import Records
from llamax.post.sample import Scored, best_of, sample
from llamax.sample.engine import Completion, Sampling
from tests.post.small import MODEL, QUESTIONS, TOKENIZER, asked, rows, write

DRAW = Drawing(4, 32, Sampling(1.0, 1.0, 0))
SUM = "What is 1 + 2? End with Answer: and the number."


class Script:
    """Stands where answers are drawn: those that are written down for a question, with falling log-probabilities."""

    def __init__(self, monkeypatch):
        self.said: dict[str, list[str]] = {}
        self.calls = 0
        monkeypatch.setattr(drawing.engine, "generate", self.generate)

    def generate(self, skeleton, params, bias, prompts, *, max_tokens, stop, n, sampling, rows, numbers):
        self.calls += 1
        return [self._of(TOKENIZER.decode(prompt.tokens), n) for prompt in prompts]

    def _of(self, shown: str, n: int) -> list[Completion]:
        texts = next(texts for question, texts in self.said.items() if question in shown)
        found = []
        for k, text in enumerate(itertools.islice(itertools.cycle(texts), n)):
            cut = text.endswith("...")
            ids = [*TOKENIZER.encode(text.removesuffix("...")), *([] if cut else [TOKENIZER.eot])]
            found.append(Completion(ids, [-0.1 * (k + 1)] * len(ids), not cut))
        return found


@pytest.fixture
def script(monkeypatch) -> Script:
    return Script(monkeypatch)


def made(tmp_path, models, *records, command=sample, **how):
    """(what the command counted, what it wrote)."""
    out = tmp_path / "out" / "x.jsonl"
    file = write(tmp_path / "in.jsonl", *records)
    counts = command(file, out, model=models.folder("model"), draw=how.pop("draw", DRAW), **how)
    return counts, rows(out)


# --------------------------------------------------------------------------------------------------- rejection sampling


def test_the_likeliest_right_sample_is_kept_with_its_ids(tmp_path, models, script):
    script.said["1 + 2"] = ["Answer: 4", "So it is\nAnswer: 3", "Answer: 3 ...", "Answer: 3"]
    record = asked(SUM, "Answer: 3", verify="math", answer="3", domain="sums", tags=["arithmetic", "easy"])
    counts, (row,) = made(tmp_path, models, record | {"id": "one"})
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"] and row["id"] == "one"
    answer = row["messages"][-1]
    assert answer["content"] == "So it is\nAnswer: 3"
    assert answer["token_ids"] == [*TOKENIZER.encode("So it is\nAnswer: 3"), TOKENIZER.eot]
    assert row["meta"]["made"]["right"] == 3 and row["meta"]["made"]["samples"] == 4
    assert row["meta"]["difficulty"] == 0.25 and row["meta"]["tags"] == ["arithmetic", "medium"]
    assert row["meta"]["verify"] == "math" and row["meta"]["domain"] == "sums"
    assert (counts["kept"], counts["unfinished"], counts["wrong or not to be judged"]) == (1, 1, 1)
    encoded = chat.encode(chat.render(row["messages"]), TOKENIZER)
    assert encoded.tokens[encoded.weights > 0].tolist() == answer["token_ids"]  # nothing is tokenized again
    manifest = read_manifest(tmp_path / "out" / "x.toml")
    assert manifest.documents == 1 and "in.jsonl" in manifest.description


def test_several_answers_that_are_unlike_each_other(tmp_path, models, script):
    script.said["1 + 2"] = ["Answer: 3", "answer: 3.", "Well, that is easy.\nAnswer: 3", "Answer: 3"]
    record = asked(SUM, verify="math", answer="3")
    counts, found = made(tmp_path, models, record, record, keep=4)
    assert [row["messages"][-1]["content"] for row in found] == ["Answer: 3", "Well, that is easy.\nAnswer: 3"]
    assert counts["duplicates"] == 2 + 2 + 2  # in each of the two prompts, and the second prompt's two


def test_what_is_drawn_is_drawn_once(tmp_path, models, script):
    script.said["1 + 2"] = ["Answer: 3"]
    made(tmp_path, models, asked(SUM, verify="math", answer="3"))
    calls, loaded = script.calls, len(models.loaded)
    (tmp_path / "out" / "x.jsonl").unlink()
    (tmp_path / "out" / "x.toml").unlink()
    made(tmp_path, models, asked(SUM, verify="math", answer="3"), command=pairs, rule_share=1.0)
    assert script.calls == calls and len(models.loaded) == loaded


def test_a_judge_chooses_among_the_right_ones(tmp_path, models, script, monkeypatch):
    """It likes long answers, and is asked about those alone that a rule does not refuse."""
    script.said["1 + 2"] = ["Answer: 3", "One and two are three.\nAnswer: 3", "Answer: 5", "Answer: 3"]
    script.said["Hello"] = ["Hi", "Good day to you", "Hi", "Hm..."]
    judged = []

    def logps(reader, prompts, *, answers, rows):
        judged.extend(len(prompt.tokens) for prompt in prompts)
        return np.array([[-abs(n % 89 - 8 * i) for i in range(len(answers))] for n in judged[-len(prompts) :]], float)

    monkeypatch.setattr(methods, "answer_logps", logps)
    how = dict(judge=models.folder("judge", 1), rubric_name="quality")
    counts, found = made(tmp_path, models, asked(SUM, verify="math", answer="3"), asked("Hello"), **how)
    said = {row["messages"][0]["content"]: row for row in found}
    assert len(judged) == 2 * 4  # two votes on two unlike answers to each prompt: one of a text is enough
    best = {}
    for question, row in said.items():
        best[question] = row["meta"]["made"]["grade"]
    assert set(best) == {SUM, "Hello"} and "difficulty" not in said["Hello"]["meta"]
    assert counts["kept"] == 2
    before = len(judged)
    (tmp_path / "out" / "x.jsonl").unlink()
    (tmp_path / "out" / "x.toml").unlink()
    least = max(best.values())
    counts, found = made(tmp_path, models, asked(SUM, verify="math", answer="3"), asked("Hello"), at_least=least, **how)
    assert len(judged) == before and counts["graded too low"] > 0
    assert all(row["meta"]["made"]["grade"] >= least for row in found)


def test_the_best_of_k_by_a_reward_model(tmp_path, models, script, monkeypatch):
    """Whose scores may all be below 0; without a rule every answer that ended is in the running. No head: refused."""
    script.said["1 + 2"] = ["Answer: 3", "One and two are three.\nAnswer: 3", "Answer: 5", "Answer: 3"]
    script.said["Hello"] = ["Hi", "Good day to you", "Good day to all of you...", "Hm"]

    def longest(self, reader, records, rows, most):
        assert reader.model.model.reward_head and all("token_ids" not in record.answer for record in records)
        return [{"value": len(record.answer["content"]) - 99.0} for record in records]

    monkeypatch.setattr(methods.ByReward, "__call__", longest)
    some = asked(SUM, verify="math", answer="3"), asked("Hello")
    with pytest.raises(ConfigError, match="--judge .*plain without --rubric, but .* has no head that scores"):
        made(tmp_path, models, *some, judge=models.folder("plain"))
    assert not models.loaded and not script.calls
    judge = models.folder("reward", 1, dataclasses.replace(MODEL, reward_head=True))
    _, found = made(tmp_path, models, *some, judge=judge)
    assert [row["messages"][-1]["content"] for row in found] == ["One and two are three.\nAnswer: 3", "Good day to you"]
    assert [row["meta"]["made"]["grade"] for row in found] == [32 - 99.0, 15 - 99.0]


def test_ranks():
    """The rule first, then the judge, then the likelihood."""

    def one(text, rule, judged, logp, stopped=True):
        return Scored(Sample((1,), text, logp, stopped), rule, judged)

    scored = [one("a", 1.0, 2.0, -1), one("b", 1.0, 3.0, -2), one("c", 0.0, 5.0, 0), one("d", None, 3.0, -1)]
    scored += [one("e", 1.0, 9.0, 0, stopped=False), one("f", None, None, 0), one("g", 1.0, 3.0, -1)]
    counts = Counter()
    assert [one.sample.text for one in best_of(scored, 9, None, 0.8, counts)] == ["g", "b", "a", "d"]
    assert counts == {"unfinished": 1, "wrong or not to be judged": 2, "duplicates": 0}
    assert [one.sample.text for one in best_of(scored, 1, 3.0, 0.8, Counter())] == ["g"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (dict(rubric_name="quality"), "there is no judge"),
        (dict(at_least=2.0), "there is no judge"),
        (dict(draw=Drawing(0, 8, Sampling())), "-n 0"),
    ],
)
def test_what_cannot_be_sampled_is_told_before_the_model_is_loaded(tmp_path, models, script, how, said):
    with pytest.raises(ConfigError, match=said):
        made(tmp_path, models, asked(SUM, verify="math", answer="3"), **how)
    assert not models.loaded and not script.calls


def test_files_that_give_nothing_are_told(tmp_path, models, script):
    for command, said in ((sample, "no answer to its 1 records can be judged"), (pairs, "can be verified")):
        with pytest.raises(ConfigError, match=said):
            made(tmp_path, models, asked("Hello"), command=command)
    assert not models.loaded
    script.said["1 + 2"] = ["Answer: 4"]
    with pytest.raises(ConfigError, match="no answer is worth keeping"):
        made(tmp_path, models, asked(SUM, verify="math", answer="3"))
    with pytest.raises(ConfigError, match="no pair to write"):
        made(tmp_path, models, asked(SUM, verify="math", answer="3"), command=pairs)
    assert not (tmp_path / "out" / "x.jsonl").exists()
    (tmp_path / "out" / "x.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is there already"):
        made(tmp_path, models, asked(SUM, verify="math", answer="3"))


# ---------------------------------------------------------------------------------------------------------- comparisons


def record_of(tmp_path, **how):
    return Records(write(tmp_path / "x.jsonl", asked(SUM, **({"verify": "math", "answer": "3"} | how))))[0]


def samples_of(*texts) -> list[Sample]:
    """The first is the likeliest; one that ends in ... has not come to its end."""
    found = []
    for k, text in enumerate(texts):
        said = text.removesuffix("...")
        ids = (*TOKENIZER.encode(said), *([] if said != text else [TOKENIZER.eot]))
        found.append(Sample(ids, said, -0.1 * k, said == text))
    return found


def found(record, *texts, names=corners.CORNERS, rule_share=0.0):
    return {pair.of: pair for pair in pairs_of(record, samples_of(*texts), TOKENIZER, names, rule_share)}


def test_samples_that_show_the_corners(tmp_path):
    ramble = "I will think about it once more, and then again. " * 10
    texts = ("Answer: 4", "Answer: 3", "3", "I'm sorry, but I cannot do sums.", ramble + "Answer: 3", "1 and 2...")
    of = found(record_of(tmp_path), *texts)
    assert {kind: pair.rejected.text for kind, pair in of.items()} == {
        "wrong": "Answer: 4",
        "format": "3",
        "refusal": "I'm sorry, but I cannot do sums.",
        "long": ramble + "Answer: 3",
    }
    assert all(pair.chosen.text == "Answer: 3" and pair.chosen.source == "sampled" for pair in of.values())
    assert all(pair.rejected.source == "sampled" for pair in of.values())
    assert of["wrong"].rejected.message["token_ids"] == [*TOKENIZER.encode("Answer: 4"), TOKENIZER.eot]
    assert found(record_of(tmp_path), *texts, names=()).keys() == {"wrong"}
    assert found(record_of(tmp_path), "Answer: 3", "1 and 2...")["long"].rejected.text == "1 and 2"


def test_without_a_right_sample_the_record_s_own_answer_is_chosen(tmp_path):
    own = write(tmp_path / "x.jsonl", asked(SUM, "Sure.\nAnswer: 3", verify="math", answer="3"))
    of = found(Records(own)[0], "Answer: 4")
    assert of["wrong"].chosen.source == "reference" and of["wrong"].chosen.text == "Sure.\nAnswer: 3"
    wrong = write(tmp_path / "x.jsonl", asked(SUM, "Answer: 5", verify="math", answer="3"))
    assert found(Records(wrong)[0], "Answer: 4") == {} == found(record_of(tmp_path), "Answer: 4")


def test_corners_by_rule(tmp_path):
    """One a record at most, of those that no sample shows; always the same."""
    seen = {}
    for n in range(12):
        record = record_of(tmp_path, answer="3", options={"n": n})
        of = found(record, "I think so.\nAnswer: 3", rule_share=1.0)
        assert len(of) == 1 and of == found(record, "I think so.\nAnswer: 3", rule_share=1.0)
        seen |= of
    assert {kind: pair.rejected.source for kind, pair in seen.items()} == dict.fromkeys(corners.CORNERS, "by rule")
    assert seen["format"].rejected.text == "3" and seen["refusal"].rejected.text == corners.REFUSAL
    long = seen["long"].rejected
    assert long.tokens >= corners.LEAST_LONG and long.text.startswith("I think so.\nAnswer: 3\n\nI think so.")
    assert "token_ids" not in long.message
    shares = [bool(found(record_of(tmp_path, options={"n": n}), "Answer: 3", rule_share=0.3)) for n in range(60)]
    assert 0.1 < sum(shares) / 60 < 0.5


def test_a_harmful_request_may_be_refused(tmp_path):
    record = record_of(tmp_path, tags=["unsafe"])
    of = found(record, "Answer: 3", "I'm sorry, I can't help with that.", rule_share=1.0, names=("refusal",))
    assert of == {}


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m unable to see pictures.", True),
        ("Sorry, no.", True),
        ("As an AI language model, I", True),
        ("I cannot assist with this request.", True),
        ("I can help with that.", False),
        ("Answer: I'm sorry", False),
        ("I can't believe how easy that is: 3", False),
        (" " * 10**6, False),
    ],
)
def test_refusals(text, refused):
    assert bool(corners.REFUSALS.match(text)) == refused


def test_forms(tmp_path):
    """Boxes too; and what the record asks for."""
    of = found(record_of(tmp_path), "\\boxed{3}", "3")
    assert of["format"].rejected.text == "3"
    asked_for = record_of(tmp_path, options={"form": "number"})
    of = found(asked_for, "Answer: 3", "3")
    assert of["format"].chosen.text == "3" and of["format"].rejected.text == "Answer: 3"
    assert "format" not in found(record_of(tmp_path), "3", "3.")


def test_pairs_are_written_as_comparisons(tmp_path, models, script):
    script.said["1 + 2"] = ["Answer: 3", "Answer: 4", "3", "Answer: 3"]
    system = {"role": "system", "content": "Be brief."}
    record = asked(SUM, "Answer: 3", verify="math", answer="3")
    record["messages"].insert(0, system)
    counts, written = made(tmp_path, models, record | {"id": "one"}, command=pairs, rule_share=0.0)
    assert [row["meta"]["pair"]["of"] for row in written] == ["wrong", "format"] and counts["wrong"] == 1
    assert all([m["role"] for m in row["prompt"]] == ["system", "user"] for row in written)
    assert written[0]["chosen"]["content"] == "Answer: 3" and written[0]["rejected"]["content"] == "Answer: 4"
    assert written[0]["id"] == "one" and written[0]["meta"]["answer"] == "3" and "messages" not in written[0]
    for row in written:
        for side in ("chosen", "rejected"):
            chat.encode(chat.render([*row["prompt"], row[side]]), TOKENIZER)
    with pytest.raises(ConfigError, match="--corners shape"):
        made(tmp_path, models, record, command=pairs, corners=("shape",))
    with pytest.raises(ConfigError, match="--rule-share 2"):
        made(tmp_path, models, record, command=pairs, rule_share=2.0)


# --------------------------------------------------------------------------------------------------------- a real model


@pytest.mark.slow  # programs for two sizes of batches; tests/sample/test_engine.py has numbered prompts
def test_samples_do_not_depend_on_their_company(tmp_path, models):
    """Pictures among them; interrupted and gone on with is drawn as at once."""
    lines = QUESTIONS.read_text().splitlines()[14:17]
    (tmp_path / "pictures").symlink_to(QUESTIONS.parent / "pictures")
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(lines))
    how = dict(model=models.folder("model"), draw=Drawing(2, 8, Sampling(1.0, 1.0, 3)), corners=(), rule_share=0.0)

    def drawn(batch_size) -> dict:
        with pytest.raises(ConfigError, match="no pair to write"):  # a random model says nothing that is right
            own = [json.loads(line) for line in file.read_text().splitlines()]
            write(file, *[row | {"messages": row["messages"][:1]} for row in own])
            pairs(file, tmp_path / "x.jsonl", batch_size=batch_size, **how)
        kept = tmp_path / "in.jsonl.samples.jsonl"
        return {row["record"]: [s["ids"] for s in row["samples"]] for row in rows(kept)}

    together = drawn(8)
    assert len(together) == 3 and len({str(ids) for of in together.values() for ids in of}) == 6
    kept = tmp_path / "in.jsonl.samples.jsonl"
    kept.write_text(kept.read_text().splitlines()[1] + "\n")  # as if interrupted
    assert drawn(2) == together
