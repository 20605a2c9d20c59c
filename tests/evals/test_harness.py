"""llamax in the lm-evaluation-harness: tasks from local files, beside one text at a time; the harness's own rules."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from llamax import cli, loading
from llamax.checkpoint.saved import Saved
from llamax.config import ConfigError
from llamax.evals import continuations
from llamax.evals.continuations import How
from llamax.sample.engine import Sampling
from tests.evals.harness_model import MODEL, TOKENIZER, make, slow
from tests.runs import FIXTURES
from tests.tolerances import ORACLE

LENGTH = 48  # tokens that the model is given
OURS = FIXTURES / "harness"
TASKS = ("python_choice", "python_next", "python_text")


def test_without_the_extra_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "llamax.evals.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["harness", "there", "--tasks", "x"]) == 2
    assert 'lm_eval is not installed. Install it: pip install "llamax[harness]".' in capsys.readouterr().err


@pytest.fixture
def harness():
    pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
    from llamax.evals import harness

    return harness


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture
def folder(monkeypatch, tmp_path, model) -> str:
    """A run's workdir, without its files."""
    said = Saved(tmp_path, MODEL, -1, TOKENIZER.path, None, {}, LENGTH)
    monkeypatch.setattr(loading, "find", lambda folder, step=None: loading.Found(said, 7))
    monkeypatch.setattr(loading, "load", lambda folder, **how: model)
    return str(tmp_path)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """In the repository's root, with a cache of its own."""
    import datasets

    monkeypatch.chdir(FIXTURES.parents[1])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def own_tasks(harness, offline, monkeypatch, tmp_path):
    """A folder of tasks, right and wrong ones; the harness's own, of which there are thousands, are not looked at."""
    monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))
    there = tmp_path / "tasks"
    shutil.copytree(OURS, there)
    choice = (OURS / "python_choice.yaml").read_text()
    (there / "no_data.yaml").write_text(choice.replace(": python_choice", ": no_data").replace(".jsonl", ".nothing"))
    for name, line in (("seen", "doc_to_image: picture"), ("run", "unsafe_code: true")):
        (there / f"{name}.yaml").write_text(choice.replace(": python_choice", f": {name}") + line + "\n")
    (there / "torn.yaml").write_text("task: torn\noutput_type: [multiple\n")
    (there / "inner.yaml").write_text("group: inner\ntask: [python_choice]\n")
    (there / "outer.yaml").write_text("group: outer\ntask: [inner, python_next]\n")
    return there


def unread(*_, **__):
    raise AssertionError("the model's weights are read")


def requests(*args):
    return [SimpleNamespace(args=of) for of in args]


def test_tasks_of_local_files(harness, offline, folder, model, tmp_path, capsys):
    """Multiple choice, generation and perplexity, from the command line: beside one text at a time."""
    out, n = tmp_path / "results", 3
    words = ["--tasks", ",".join(TASKS), "--include-path", str(OURS), "--out", str(out), "--limit", str(n)]
    assert cli.main(["harness", folder, *words, "--batch-size", "5"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in TASKS)
    results = json.loads((out / "harness.json").read_text())
    assert results["config"]["model_step"] == 7 and results["config"]["max_length"] == LENGTH
    samples = [json.loads(line) for line in (out / "harness_samples.jsonl").read_text().splitlines()]
    assert [sample["task"] for sample in samples] == [name for name in TASKS for _ in range(n)]

    right, nats, size = [], 0.0, 0
    for sample in samples:
        document, answers = sample["doc"], sample["filtered_resps"]
        if sample["task"] == "python_choice":
            pairs = [continuations.pair(document["question"], choice, TOKENIZER) for choice in document["choices"]]
            truth = [slow(model, *one) for one in pairs]
            np.testing.assert_allclose([logp for logp, _ in answers], [logp for logp, _ in truth], **ORACLE)
            assert [greedy for _, greedy in answers] == [greedy for _, greedy in truth]
            right.append(int(np.argmax([logp for logp, _ in truth])) == document["answer"])
        elif sample["task"] == "python_next":
            prompts = continuations.prompts_of([document["question"]], TOKENIZER, 8, LENGTH)
            assert answers == continuations.continued(model, prompts, How(8, ("\n",), Sampling()), 1)
        else:
            ids = TOKENIZER.encode(document["text"])
            assert len(ids) > LENGTH
            nats -= sum(slow(model, *one)[0] for one in continuations.windows(ids, TOKENIZER.bos, LENGTH))
            size += len(document["text"].encode())
    found = {name: results["results"][name] for name in TASKS}
    assert found["python_choice"]["acc,none"] == pytest.approx(np.mean(right))
    np.testing.assert_allclose(found["python_text"]["bits_per_byte,none"], nats / np.log(2) / size, **ORACLE)


def test_rules_are_the_harnesss(harness, folder):
    """Pairs and windows beside `TemplateLM` and `lm_eval.utils`."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class Theirs(TemplateLM):
        eot_token_id = TOKENIZER.eos
        prefix_token_id = TOKENIZER.bos
        loglikelihood_rolling = generate_until = None

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return TOKENIZER.encode(string) if add_special_tokens is False else continuations.encode(string, TOKENIZER)

        def _loglikelihood_tokens(self, asked, **kwargs):
            return [continuations.Pair(context, continuation) for _, context, continuation in asked]

    documents = map(json.loads, (OURS / "python_choice.jsonl").read_text().splitlines())
    texts = [(document["question"], choice) for document in documents for choice in document["choices"]]
    texts += [("", "import"), ("a \n", " b"), ("for i in range(10):\n", "    pass")]
    theirs = Theirs().loglikelihood(requests(*texts), disable_tqdm=True)
    melted = [text for text, one in zip(texts, theirs, strict=True) if not one.continuation]
    assert melted == [("def main(", "):\n")]  # which fails in the harness's own models
    for text, one in zip(texts, theirs, strict=True):
        assert text in melted or continuations.pair(*text, TOKENIZER) == one
    for n in (0, 1, 4, 5, 8, 11):
        rolling = utils.get_rolling_token_windows(list(range(n)), 99, 4, 1)
        assert continuations.windows(range(n), 99, 4) == [utils.make_disjoint_window(one) for one in rolling]


def test_answers_keep_their_order(harness, folder, model, caplog):
    lm = harness.LlamaxLM(folder, batch_size="2")
    asked = [("import os\n" * 20, "x"), ("a", "b"), ("import", " os"), ("c", "d" * 5)]
    found = lm.loglikelihood(requests(*asked), disable_tqdm=True)
    assert "1 of 4 contexts cut from the left" in caplog.text
    for text, (logp, greedy) in zip(asked, found, strict=True):
        truth = slow(model, *continuations.fit([continuations.pair(*text, TOKENIZER)], LENGTH)[0])
        np.testing.assert_allclose(logp, truth[0], **ORACLE)
        assert greedy == truth[1]
    settings = [{"max_gen_toks": 4}, {"max_gen_toks": 6, "until": ["\n"]}, {"max_gen_toks": 4}]
    texts = lm.generate_until(requests(*zip(["import", "a", "class"], settings, strict=True)), disable_tqdm=True)
    prompts = continuations.prompts_of(["import", "class"], TOKENIZER, 4, LENGTH)
    assert [texts[0], texts[2]] == continuations.continued(model, prompts, How(4, (), Sampling()), 2)
    many = ["a", "import os\n" * 3, "class A:", "def f(x):", "b = "]
    prompts = continuations.prompts_of(many, TOKENIZER, 4, LENGTH)
    for sampling, asked in ((Sampling(), {}), (Sampling(1.0), {"do_sample": True})):
        texts = lm.generate_until(requests(*((text, {"max_gen_toks": 4} | asked) for text in many)), disable_tqdm=True)
        assert texts == continuations.continued(model, prompts, How(4, (), sampling), 2) and len(set(texts)) > 1


def test_a_batch_of_generations_is_handed_to_the_cache_before_the_next(harness, folder, monkeypatch):
    lm, kept, calls = harness.LlamaxLM(folder, batch_size=2), [], []
    lm.cache_hook = SimpleNamespace(add_partial=lambda name, args, text: kept.append(args[0]))
    real = continuations.continued
    monkeypatch.setattr(continuations, "continued", lambda *a: calls.append(list(kept)) or real(*a))
    lm.generate_until(
        requests(("a b c", {"max_gen_toks": 4}), ("d", {"max_gen_toks": 4}), ("e f", {"max_gen_toks": 4}))
    )
    assert calls == [[], ["a b c", "e f"]] and kept == ["a b c", "e f", "d"]


def test_finished_answers_are_handed_to_the_harnesss_cache(harness, folder):
    lm, kept = harness.LlamaxLM(folder, batch_size=2), []
    lm.cache_hook = SimpleNamespace(add_partial=lambda *what: kept.append(what))
    found = lm.loglikelihood(requests(("a", "b"), ("import", " os")), disable_tqdm=True)
    assert sorted(kept) == sorted(
        [("loglikelihood", ("a", "b"), found[0]), ("loglikelihood", ("import", " os"), found[1])]
    )


def test_it_is_known_by_its_name(harness, folder):
    from lm_eval.api.registry import get_model

    lm = get_model("llamax").create_from_arg_string(
        f"path={folder},max_length=32", {"batch_size": 3, "device": "cuda:0"}
    )
    assert isinstance(lm, harness.LlamaxLM) and (lm.max_length, lm.rows) == (32, 2)
    messages = [{"role": "user", "content": "Hi"}]
    assert lm.apply_chat_template(messages).endswith("<|header_start|>assistant<|header_end|>\n\n")
    assert "header_start" in lm.chat_template(True) and lm.tokenizer_name == str(TOKENIZER.path)


def test_what_cannot_be_done_is_said_before_the_model_is_read(harness, folder, monkeypatch):
    monkeypatch.setattr(loading, "load", unread)
    monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))
    for given, said in (
        (dict(tasks=["python_chioce"]), "task 'python_chioce', but none of the .* Did you mean 'python_choice'?"),
        (dict(include_path="nowhere"), "--include-path nowhere, but there is no such folder"),
        (dict(fewshot=-1), "--fewshot=-1, but it is a whole number from 0 up"),
        (dict(batch_size="auto"), "batch_size=auto, but it is a whole number from 1 up"),
        (dict(max_lenght=3), "max_lenght=3, but the model llamax takes .* Did you mean max_length"),
    ):
        with pytest.raises(ConfigError, match=said):
            harness.run_harness(folder, **dict(tasks=["python_choice"], include_path=OURS) | given)
    with pytest.raises(ConfigError, match="model llamax without a path"):
        harness.LlamaxLM()


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (["no_data"], r"task 'no_data', but it cannot be read \(FileNotFoundError: .*nothing'\)\. Correct its files"),
        (
            ["torn"],
            "task 'torn', but .*; those that can be read in .*tasks are inner, no_data, outer, python_choice, ",
        ),
        (["python_next", "outer"], "tasks 'python_next' and 'outer', but both of them hold python_next. Name only one"),
        (["inner", "outer"], "tasks 'inner' and 'outer', but both of them hold python_choice"),
        (["seen"], "task 'seen', but it shows pictures .* only texts are asked"),
        (["run"], "task 'run', but it runs the code .* --confirm_run_unsafe_code"),
    ],
)
def test_tasks_that_cannot_be_asked_are_said_before_the_model_is_read(
    harness, folder, own_tasks, monkeypatch, tasks, said
):
    monkeypatch.setattr(loading, "load", unread)
    with pytest.raises(ConfigError, match=said):
        harness.run_harness(folder, tasks, include_path=own_tasks)


def test_patterns_and_groups_are_the_same_tasks(harness, folder, own_tasks):
    how = dict(include_path=own_tasks, limit=2, fewshot=1)
    plain = harness.run_harness(folder, ["python_choice", "python_next"], **how)
    for asked in (["outer"], ["python_[cn]*"], ["inner", "python_next", "python_next"]):
        found = harness.run_harness(folder, asked, **how)
        assert {name: found["results"][name] for name in plain["results"]} == plain["results"]
        assert found["n-shot"]["python_choice"] == 1
    assert "python_choice" in plain["results"] and len(plain["results"]) == 2


def test_the_length_that_a_folder_says(harness, tmp_path):
    said = Saved(tmp_path, MODEL, -1, None, tmp_path, {}, None)
    assert harness.length_of(said) == harness.UNKNOWN_LENGTH
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 77}}))
    assert harness.length_of(said) == 77
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 78}))
    assert harness.length_of(said) == 78 and harness.length_of(said._replace(seq_len=5)) == 5
