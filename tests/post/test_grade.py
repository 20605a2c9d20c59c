"""`llamax data grade`: nothing is graded twice, whatever ends a run; what changes is; what is refused before work."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from llamax.config import ConfigError
from llamax.post import drawing, grade, methods
from llamax.post.drawing import Drawing
from llamax.post.records import Records
from llamax.sample.engine import Completion, Sampling
from tests.post.small import MODEL, QUESTIONS, TOKENIZER, asked, rows, write

DRAW = Drawing(4, 16, Sampling(1.0, 1.0, 0))


class Asked:
    """Stands where a judge's answers are scored, and where a model's are drawn; notes what it was asked."""

    def __init__(self, monkeypatch):
        self.prompts: list[str] = []
        self.fail_at = 10**9
        monkeypatch.setattr(methods, "answer_logps", self.logps)
        monkeypatch.setattr(drawing.engine, "generate", self.generate)

    def __call__(self, prompt) -> str:
        if len(self.prompts) >= self.fail_at:
            raise KeyboardInterrupt
        self.prompts.append(TOKENIZER.decode(prompt.tokens))
        return self.prompts[-1]

    def logps(self, reader, prompts, *, answers, rows):
        """The judge's opinion follows from how long the question is."""
        lengths = [len(self(prompt)) for prompt in prompts]
        return np.array([[-(((i + 1) * n) % 7) / 2.0 for i in range(len(answers))] for n in lengths])

    def generate(self, skeleton, params, bias, prompts, *, max_tokens, stop, n, sampling, rows, numbers):
        """Sample k says k, or nothing that ends if k is 3."""
        found = []
        for prompt in prompts:
            self(prompt)
            texts = [TOKENIZER.encode(f"Answer: {k}") for k in range(n)]
            found.append(
                [Completion([*ids, TOKENIZER.eot], [-1.0 - k] * (len(ids) + 1), True) for k, ids in enumerate(texts)]
            )
            if n > 3:
                found[-1][3] = Completion(texts[3], [-1.0] * len(texts[3]), False)
        return found


@pytest.fixture
def model(monkeypatch) -> Asked:
    return Asked(monkeypatch)


@pytest.fixture
def file(tmp_path):
    """The fixture beside its pictures."""
    for path in (QUESTIONS, QUESTIONS.parent / "pictures"):
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, tmp_path / path.name)
    return tmp_path / QUESTIONS.name


def graded(file, models, judge="judge", **how):
    how = {"rubrics": ["difficulty"]} | how if how.get("by", "rubric") == "rubric" else how
    return grade.grade(file, judge=models.folder(judge, how.pop("seed", 0)), **how)


def test_every_record_is_graded_once(file, models, model):
    found = graded(file, models)
    assert found["difficulty"]["graded"] == 22 and len(model.prompts) == 3 * 22
    kept = rows(file.with_name("questions.jsonl.grades.jsonl"))
    assert {row["record"] for row in kept} == set(Records(file).keys)
    assert all(row["grade"] == "difficulty" and row["keep"] == "high" and 1 <= row["value"] <= 3 for row in kept)
    assert kept[0]["judge"].endswith("judge") and len(models.loaded) == 1
    again = graded(file, models)
    assert again["difficulty"]["there"] == 22 and not again["difficulty"]["graded"]
    assert len(model.prompts) == 3 * 22 and len(models.loaded) == 1  # it is not even loaded
    assert rows(file.with_name("questions.jsonl.grades.jsonl")) == kept


def test_a_second_rubric_adds_its_own(file, models, model):
    graded(file, models)
    found = graded(file, models, rubrics=["difficulty", "quality"])
    assert found["quality"]["graded"] == 22 and found["difficulty"]["there"] == 22
    assert len(model.prompts) == 3 * 22 + 2 * 22


def test_an_interrupted_run_goes_on(file, models, model):
    """Ctrl-C in the middle: whole batches stay, and the grades are in the end those of a run that was not."""
    model.fail_at = 3 * 10 + 1  # the second batch of eight fails
    with pytest.raises(KeyboardInterrupt):
        graded(file, models)
    path = file.with_name("questions.jsonl.grades.jsonl")
    assert len(rows(path)) == 8
    with path.open("a") as torn:
        torn.write('{"key": "')  # as a kill in mid-write would leave it
    model.fail_at, before = 10**9, len(model.prompts)
    found = graded(file, models)
    assert found["difficulty"]["there"] == 8 and found["difficulty"]["graded"] == 14
    assert len(model.prompts) - before == 3 * 14
    resumed = {row["key"]: row["value"] for row in rows(path)}
    path.unlink()
    graded(file, models, batch_size=4)
    assert {row["key"]: row["value"] for row in rows(path)} == resumed


def test_what_has_changed_is_graded_anew(file, models, model, tmp_path):
    graded(file, models)

    def made(**how) -> int:
        before = len(model.prompts)
        counts = graded(file, models, **how)["difficulty"]
        assert len(model.prompts) - before == 3 * counts["graded"]
        return counts["graded"]

    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0].replace("1 + 2", "2 + 1"), *reversed(lines[1:])]))
    assert made() == 1  # one record's text, and the order of all
    assert made(judge="other", seed=1) == 22  # other weights
    assert made(judge="copy", seed=0) == 0  # a copy of the same
    changed = tmp_path / "difficulty.toml"
    shipped = QUESTIONS.parent.parent / "rubrics" / "difficulty.toml"
    changed.write_text(shipped.read_text().replace("hard = 3", "hard = 4"))
    assert made(rubrics=[changed]) == 22
    assert made(dtype="bfloat16") == 22


def test_a_record_that_is_there_twice_is_graded_once(tmp_path, models, model):
    file = write(tmp_path / "x.jsonl", *[asked("What?", "That.", domain=str(i)) for i in range(3)])
    assert graded(file, models)["difficulty"]["graded"] == 1 and len(model.prompts) == 3


def test_what_a_blind_judge_cannot_see_is_left_out(file, models, model):
    found = grade.grade(
        file, judge=models.folder("blind", 0, dataclasses.replace(MODEL, vision=None)), rubrics=["quality"]
    )
    assert found["quality"]["graded"] == 18 and found["quality"][methods.NO_EYES] == 4


def test_by_passing(file, models, model):
    """Samples 0, 1, 2 and one that never ends: of the sums only 1 + 2 = 3 could be among them."""
    found = graded(file, models, by="pass", draw=DRAW)["pass"]
    assert found["graded"] == 19 and found["its answer cannot be verified"] == 3 and len(model.prompts) == 19
    kept = {row["id"]: row for row in rows(file.with_name("questions.jsonl.grades.jsonl"))}
    assert kept["sums/0"]["value"] == 0.25 and kept["sums/0"]["pass"] == {"1": 0.25, "2": 0.5, "4": 1.0}
    assert kept["sums/1"]["right"] == 0 and kept["sums/1"]["keep"] == "low"
    drawn = rows(file.with_name("questions.jsonl.samples.jsonl"))
    assert len(drawn) == 19 and [s["stopped"] for s in drawn[0]["samples"]] == [True, True, True, False]
    assert drawn[0]["samples"][1]["text"] == "Answer: 1" and drawn[0]["samples"][1]["ids"][-1] == TOKENIZER.eot
    assert drawn[0]["samples"][1]["logp"] == -2.0
    graded(file, models, by="pass", draw=DRAW)
    file.with_name("questions.jsonl.grades.jsonl").unlink()
    graded(file, models, by="pass", draw=DRAW)
    assert len(model.prompts) == 19  # from the samples that are there
    graded(file, models, by="pass", draw=dataclasses.replace(DRAW, max_tokens=17))
    assert len(model.prompts) == 38


def test_a_judge_that_does_not_know_what_it_is_asked_is_told(file, models, model, monkeypatch, capsys):
    """Where next to nothing of its probability is on the answers, also when the grades were there before."""
    graded(file, models)
    assert "warning" not in capsys.readouterr().out

    def faint(reader, prompts, *, answers, rows):  # of every other question
        return np.array([[-9.0 * (len(model(prompt)) % 2)] * len(answers) for prompt in prompts])

    monkeypatch.setattr(methods, "answer_logps", faint)
    for _ in range(2):
        graded(file, models, judge="tiny", seed=1)
        said = " ".join(capsys.readouterr().out.split())
        kept = [row for row in rows(file.with_name("questions.jsonl.grades.jsonl")) if row["judge"].endswith("tiny")]
        some = sum(row["mass"] < 0.01 for row in kept)
        assert 0 < some < 22 and f"warning: in {some} of 22 records by difficulty" in said
    assert "less than 1% of its probability" in said and "mean next to nothing" in said


@pytest.mark.slow  # programs for two sizes of batches; test_methods.py has the values
def test_by_loss_with_a_real_model(file, models):
    """Grades do not depend on the batch; a picture's file may be damaged."""
    (file.parent / "pictures" / "blue_star.png").write_bytes(b"no picture")
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[12:20]))
    found = graded(file, models, by="loss")["loss"]
    assert found["graded"] == 6 and found[grade.LEFT_OUT] == 2
    path = file.with_name("questions.jsonl.grades.jsonl")
    first = {row["id"]: row["value"] for row in rows(path)}
    path.unlink()
    graded(file, models, by="loss", batch_size=2)
    second = {row["id"]: row["value"] for row in rows(path)}
    assert first == pytest.approx(second, rel=1e-5) and len(set(first.values())) == 6


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (dict(rubrics=[]), "--by rubric without --rubric"),
        (dict(rubrics=["hardness"]), "neither such a file nor a rubric"),
        (dict(rubrics=["quality", "quality"]), "two rubrics named quality"),
        (dict(by="loss", rubrics=["quality"]), "a rubric is for --by rubric alone"),
        (dict(by="pass", draw=dataclasses.replace(DRAW, samples=0)), "-n 0"),
        (dict(by="pass", draw=dataclasses.replace(DRAW, sampling=Sampling())), "4 samples would be the same"),
    ],
)
def test_what_cannot_be_asked_is_told_before_the_model_is_loaded(file, models, model, how, said):
    with pytest.raises(ConfigError, match=said):
        grade.grade(file, judge=models.folder("judge"), **how)
    assert not models.loaded and not file.with_name("questions.jsonl.grades.jsonl").exists()


def test_records_that_cannot_be_graded_are_told_before_the_model_is_loaded(tmp_path, models, model):
    file = write(tmp_path / "x.jsonl", asked("What?"), {"text": "no"})
    judge = models.folder("judge")
    for how, said in (
        (dict(rubrics=["quality"]), "quality of .*none of its 1 records .*the last word"),
        (dict(by="loss"), "the assistant says nothing"),
        (dict(by="pass", draw=DRAW), "no answer to its 1 records can be verified"),
    ):
        with pytest.raises(ConfigError, match=said):
            grade.grade(file, judge=judge, **how)
    with pytest.raises(ConfigError, match="is a conversation"):
        grade.grade(write(tmp_path / "y.jsonl", {"text": "no"}), judge=judge, rubrics=["quality"])
    assert not models.loaded


def test_by_reward_takes_a_reward_model(file, models, model, monkeypatch):
    """One without a head is refused before it is loaded; a reward model's grades are kept like others."""
    with pytest.raises(ConfigError, match="--by reward --judge .*judge has no head that scores"):
        graded(file, models, by="reward")
    assert not models.loaded

    def call(self, reader, some, rows, most):
        assert reader.model.model.reward_head
        return [{"value": -float(len(record.messages)), "spread": 0.0} for record in some]

    monkeypatch.setattr(methods.ByReward, "__call__", call)
    judge = models.folder("reward", 0, dataclasses.replace(MODEL, reward_head=True))
    found = grade.grade(file, judge=judge, by="reward")["reward"]
    assert found["graded"] == grade.grade(file, judge=judge, by="reward")["reward"]["there"] > 0
    kept = rows(file.with_name("questions.jsonl.grades.jsonl"))
    assert all(row["grade"] == "reward" and row["keep"] == "high" and row["value"] < 0 for row in kept)


def test_a_judge_without_words_is_told(file, models, model, monkeypatch):
    from llamax import loading

    monkeypatch.setattr(loading, "tokenizer_of", lambda said: None)
    with pytest.raises(ConfigError, match="--judge .*judge, but it has no tokenizer"):
        graded(file, models)


def test_identities_are_of_weights(models):
    from llamax.post.reader import describe

    one, copy, other = (describe(models.folder(name, seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert one.identity == copy.identity != other.identity and one.name.endswith("a")
    assert describe(one.folder, dtype="bfloat16").identity != one.identity
    assert json.loads(json.dumps(one.identity)) == one.identity
