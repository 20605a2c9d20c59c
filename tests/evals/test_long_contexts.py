"""Needle, RULER, loss by position and loss on the answer: stand-ins for a model whose scores are known beforehand."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llamax import config
from llamax.checks.evals import READ_BY
from llamax.config import ConfigError
from llamax.data.tasks import RULER, TASKS, Task, Tokens
from llamax.data.tasks.words import NoneLeft, few
from llamax.data.tokenizer import Tokenizer
from llamax.evals import CHECKS, EVALS, answer, needle, position, qa, ruler, samples
from llamax.evals.report import Context
from llamax.kernels.attention import blocked_attention
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from llamax.observe.goodput import Ledger
from llamax.observe.log import MetricsFile
from llamax.observe.tensorboard import TensorBoard
from llamax.sample import engine, reading
from llamax.sample.engine import Completion
from llamax.sample.reading import Scored
from llamax.train import hooks
from llamax.train.loop import Event
from tests.runs import FIXTURES, tiny_run

RUN = tiny_run()
TOKENIZER = Tokenizer(RUN.data.tokenizer)
CTX = Context(RUN, None, None, TOKENIZER, lambda batch: batch, 1, {}, {})
TEXT = str(FIXTURES / "text.toml")
SPECIAL = re.compile(r"<\|\w+\|>")


def text_of(prompt) -> str:
    return SPECIAL.sub("", TOKENIZER.decode(prompt.tokens))


def model_that(monkeypatch, says) -> list:
    """A stand-in for `generate` that says `says(text of the prompt)`; what it was asked, call by call."""
    calls = []

    def generate(skeleton, params, router_bias, prompts, **how):
        calls.append((prompts, how))
        said = [TOKENIZER.encode(says(text_of(prompt))) for prompt in prompts]
        return [[Completion(ids, [0.0] * len(ids), stopped=False)] for ids in said]

    monkeypatch.setattr(samples, "generate", generate)
    return calls


def numbers_of(text: str) -> str:
    return " ".join(re.findall(r"\b\d{7}\b", text))


def cfg_of(kind: str, **fields) -> config.Eval:
    return config.Eval(kind=kind, path=TEXT, **fields)


# ------------------------------------------------------------------------------------------------------------- needle


def test_every_setting_of_an_evaluation_is_read():
    """By a kind of evaluation, or by what calls them all."""
    folder = Path(needle.__file__).parent
    source = "".join(path.read_text() for path in [*folder.glob("*.py"), folder.parent / "train" / "hooks.py"])
    assert [f.name for f in dataclasses.fields(config.Eval) if f"cfg.{f.name}" not in source] == []


def test_what_kinds_read_is_what_is_said_of_them():
    source = {kind: inspect.getsource(sys.modules[run.__module__]) for kind, run in EVALS.items()}
    shared = inspect.getsource(samples)
    for field, kinds in READ_BY.items():
        found = {kind for kind, text in source.items() if f"cfg.{field}" in text}
        assert found == set(kinds) or (found < set(kinds) and f"cfg.{field}" in shared), field


def test_a_reader_of_the_second_half_finds_what_is_deep(monkeypatch):
    calls = model_that(monkeypatch, lambda text: numbers_of(text[len(text) // 2 :]))
    report = needle.run(CTX, cfg_of("needle", lengths=(256, 512), depths=3, samples=2))
    cells = {(c["length"], c["depth"]): c["score"] for c in report.details["cells"]}
    assert {key: score for key, score in cells.items() if key[1] != 0.5} == {
        (256, 0.0): 0.0, (256, 1.0): 1.0, (512, 0.0): 0.0, (512, 1.0): 1.0,
    }  # fmt: skip
    assert report.scalars["needle/256"] == np.mean([cells[256, depth] for depth in (0.0, 0.5, 1.0)])
    assert report.scalars["needle/no_context"] == 0 and "0.0% without the context" in report.rows[0][2]
    assert [row[0] for row in report.rows] == ["needle at 256 tokens", "needle at 512 tokens"]
    assert report.plots["needle"].dtype == np.uint8 and report.plots["needle"].shape[2] == 3
    assert all(len(p.tokens) <= how["length"] for prompts, how in calls for p in prompts)
    (blind, _) = calls[-1]
    assert all(text_of(prompt).count("\n") <= 2 for prompt in blind) and len(blind) == 6


def test_samples_follow_from_the_seed_and_are_for_evaluation(monkeypatch):
    asked = []
    for seed in (1, 1, 2):
        calls = model_that(monkeypatch, numbers_of)
        report = needle.run(CTX, cfg_of("needle", lengths=(128,), depths=1, samples=3, seed=seed))
        asked.append([text_of(p) for p in calls[0][0]])
        assert report.scalars["accuracy"] == 1
        assert {cell["depth"] for cell in report.details["cells"]} == {0.5}
    assert asked[0] == asked[1] != asked[2] and len(set(asked[0])) == 3
    model_that(monkeypatch, numbers_of)
    seen = []
    monkeypatch.setattr(
        type(TASKS["needle"]), "__call__", lambda task, *how: seen.append(how[-2:]) or asked_of(task, *how)
    )
    needle.run(CTX, cfg_of("needle", lengths=(128,), depths=1, samples=1, templates="held_out"))
    assert seen == [("eval", "held_out")]


asked_of = type(TASKS["needle"]).__call__


def test_tasks_are_asked_with_the_options_of_the_evaluation(monkeypatch):
    calls = model_that(monkeypatch, numbers_of)
    options = {"needle": {"wording": "plain", "key_kind": "pairs", "n_words": 2}}
    needle.run(CTX, cfg_of("needle", lengths=(128,), depths=1, samples=4, options=options))
    first, second = few(Tokens(RUN.data.tokenizer).words, 2)
    assert all(re.search(rf"Remember (?:{first} {second}|{second} {first})$", text_of(p)) for p in calls[0][0])


def test_a_budget_bounds_the_rows_and_all_batches_have_one_shape(monkeypatch):
    """Six prompts in a cache of two rows; and lengths that one row does not fit."""
    calls = model_that(monkeypatch, numbers_of)
    budget = 2.5 * samples.row_bytes(RUN, 256 + 32) / 1e9
    needle.run(CTX, cfg_of("needle", lengths=(256,), depths=3, samples=2, cache_gb=budget))
    assert [len(prompts) for prompts, _ in calls[:3]] == [2, 2, 2]
    assert {(how["row_multiple"], how["length"], how["max_tokens"]) for _, how in calls[:3]} == {
        (2, 256, calls[0][1]["max_tokens"])
    }
    with pytest.raises(ConfigError, match=r"needle evaluation at 4096 tokens, but keys and values of one row take"):
        CHECKS["needle"](RUN, cfg_of("needle", lengths=(256, 4096), cache_gb=budget))
    half = dataclasses.replace(RUN, train=config.Train(compute_dtype="bfloat16"))
    assert samples.row_bytes(half, 4096) * 2 == samples.row_bytes(RUN, 4096)


@pytest.mark.parametrize(
    "how, said",
    [
        (dict(tasks=("nedle",)), "Did you mean 'needle'"),
        (dict(lengths=(16,)), "Ask for more tokens"),
        (dict(tasks=("picture_needle",)), "no vision encoder"),
        (dict(options={"nedle": {}}), "Did you mean 'needle'"),
        (dict(options={"needle": {"keis": 2}}), "Did you mean 'keys'"),
        (dict(options={"needle": 2}), "options.needle is 2. Give a table of its fields"),
        (dict(options={"key_value": {"records": 4}}), "options of task key_value .*, but its tasks are needle. Take"),
        (dict(tasks=("vt",), templates="held_out"), "RULER's tasks have one wording each"),
    ],
)
def test_what_cannot_be_asked_is_told_before_any_work(how, said):
    blind = dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, vision=None))
    with pytest.raises(ConfigError, match=said):
        CHECKS["needle"](blind, cfg_of("needle", **(dict(lengths=(256,)) | how)))


def test_a_sample_of_every_length_is_made_before_any_work(monkeypatch):
    """Words run out at long lengths, room at short ones."""
    made = []

    def make(task, rng, filler, length, depth, *how):
        made.append((task.name, length, depth))
        if length > 512:
            raise NoneLeft("keys of the kind 'short'", "3 are drawn", "Take more.")

    monkeypatch.setattr(Task, "__call__", make)
    cfg = cfg_of("needle", lengths=(128, 256, 512), tasks=("needle", "vt"))
    CHECKS["needle"](RUN, cfg)
    assert made == [(t, n, d) for t in cfg.tasks for n, d in ((128, 0.0), (128, 1.0), (256, 0.0), (512, 0.0))]
    said = r"ruler evaluation, task vt at 1024 tokens, but keys of the kind 'short': 3 are drawn\. Take more\."
    with pytest.raises(ConfigError, match=said):
        CHECKS["ruler"](RUN, cfg_of("ruler", lengths=(128, 1024), tasks=("vt",)))


def test_a_needle_may_be_a_picture(monkeypatch):
    calls = model_that(monkeypatch, lambda text: "")
    needle.run(CTX, cfg_of("needle", lengths=(256,), depths=1, samples=1, tasks=("picture_needle",)))
    (prompt,), a_tile = calls[0][0], RUN.model.vision.tokens_per_tile
    assert len(prompt.tiles) * a_tile == prompt.tokens.count(TOKENIZER.patch) > 0


def test_every_program_is_compiled_once_a_length():
    """With a real model: tasks with pictures and without, several depths, batches of which the last are not full."""
    vision = dataclasses.replace(RUN.model.vision, encoder="linear")  # compiles in no time
    model = dataclasses.replace(RUN.model, plan=((("nope_full+dense",), 1),), vision=vision)
    train = config.Train(remat="none")
    bones = skeleton(model, Seam(attention=blocked_attention), patch_id=TOKENIZER.patch, train=train)
    params, bias = (jax.tree.map(lambda x: jnp.zeros(x.shape), tree) for tree in bones.shapes())
    run = dataclasses.replace(RUN, model=model)
    ctx = Context(run, bones, bones, TOKENIZER, lambda batch: batch, 1, params, bias)
    budget = 4.5 * samples.row_bytes(run, 136 + 32) / 1e9
    cfg = cfg_of("needle", lengths=(136,), depths=5, samples=1, tasks=("needle", "key_value"), cache_gb=budget)
    # Prompts of one task have at most 128 tokens, and of the other more, which rounds to 192.
    pictured = dataclasses.replace(cfg, tasks=(*cfg.tasks, "picture_needle"), options={"picture_needle": {"n": 2}})
    jax.clear_caches()
    needle.run(ctx, pictured)
    buckets = 2  # the length, and no context
    assert reading.prefill._cache_size() == buckets and engine.advance._cache_size() == buckets
    answer.run(ctx, dataclasses.replace(cfg, samples=5))
    assert reading.score_piece._cache_size() == buckets and reading.empty._cache_size() == buckets


def test_in_training_the_heat_map_goes_to_tensorboard(monkeypatch, tmp_path):
    """Beside the figures, under the evaluation's own name; metrics.jsonl has the figures."""
    model_that(monkeypatch, numbers_of)
    cfg = cfg_of("needle", lengths=(128, 192), depths=2, samples=1, every_steps=5)
    run = dataclasses.replace(RUN, evals={"far": cfg})
    state = SimpleNamespace(params={}, router_bias={}, reference=None)
    with MetricsFile(tmp_path / "metrics.jsonl", 0) as file, TensorBoard(tmp_path / "board") as board:
        evaluate = hooks.Evaluate(run, CTX, Ledger(), file, board, lambda text: None, lambda text: None, end=8)
        for step in (3, 5):
            evaluate(Event(step, False, state, None, None))
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert events.Tags()["images"] == ["eval/far/needle"]
    assert [event.step for event in events.Scalars("eval/far/needle/128")] == [5]
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["eval/far/needle/192"] == 1 and line["eval/far/accuracy"] == 1


def test_what_is_asked_at_the_end_only_is_asked_at_the_end_of_the_run_and_not_of_a_stage(monkeypatch):
    model_that(monkeypatch, numbers_of)
    cfg = cfg_of("needle", lengths=(128,), depths=1, samples=1, every_steps=0)
    stage = dataclasses.replace(RUN, evals={"far": cfg}, train=dataclasses.replace(RUN.train, steps=4))
    state, seen = SimpleNamespace(params={}, router_bias={}, reference=None), []
    monkeypatch.setattr(hooks.Evaluate, "evaluate", lambda self, name, step, *weights, write=True: seen.append(step))
    evaluate = hooks.Evaluate(stage, CTX, Ledger(), None, None, lambda text: None, lambda text: None, end=8)
    for step in (3, 4, 8):
        evaluate(Event(step, False, state, None, None))
    assert seen == [8]


# -------------------------------------------------------------------------------------------------------------- ruler


def test_the_effective_length_is_the_longest_above_the_threshold():
    assert ruler.effective({4: 0.9, 8: 0.86, 16: 0.8}, 0.856) == 8
    assert ruler.effective({4: 0.9, 8: 0.8, 16: 0.857}, 0.856) == 16
    assert ruler.effective({4: 0.856}, 0.856) == 0


def test_ruler_means_over_eleven_tasks(monkeypatch):
    """A model that repeats the numbers: it knows what has a number for an answer, and nothing else."""
    model_that(monkeypatch, numbers_of)
    cfg = cfg_of("ruler", lengths=(1024, 1280), samples=1, threshold=0.5)
    CHECKS["ruler"](RUN, cfg)
    report = ruler.run(CTX, cfg)
    cells = {(c["task"], c["length"]): c["score"] for c in report.details["cells"]}
    assert {task for task, _ in cells} == set(RULER) and len(RULER) == 11
    knows = {t for t, make in RULER.items() if getattr(make, "value_kind", "") == "numbers"}
    assert {task for (task, n), score in cells.items() if score == 1} == knows
    for length in cfg.lengths:
        assert report.scalars[f"score/{length}"] == pytest.approx(np.mean([cells[t, length] for t in RULER]))
        assert report.scalars[f"score/{length}"] == pytest.approx(len(knows) / 11)
    assert report.scalars["effective_length"] == 1280 and report.rows[-1][1] == "1,280"


QUESTIONS = [
    {"question": "Who wrote it?", "context": "The book was written by Ada.", "answers": ["Ada", "Ada L."]},
    {"question": "Where?", "contexts": ["The house stands in Paris.", "Its garden has a tree."], "answers": ["Paris"]},
    *({"question": f"Q{i}?", "context": f"Context {i} is about {i}{i}{i}.", "answers": [f"{i}{i}"]} for i in range(9)),
]


@pytest.fixture
def questions(tmp_path) -> str:
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(line) + "\n\n" for line in QUESTIONS))
    return str(path)


def test_questions_stand_among_the_contexts_of_others(questions):
    makers = qa.makers(questions, RUN.data.tokenizer, (128, 150))
    assert list(makers) == ["qa_1", "qa_2"]
    shown = set()
    for number in range(20):
        for name, make in makers.items():
            cfg = cfg_of("ruler", seed=number)
            sample = make(samples.rng(cfg, name, 150, None, 0), 150, None)
            context, asked = sample.pieces
            question = next(q for q in QUESTIONS if f"Question: {q['question']} Answer:" in asked)
            own = question.get("contexts") or [question["context"]]
            assert all(context.count(text) == 1 for text in own) and (len(own) > 1) == (name == "qa_2")
            documents = re.findall(r"Document (\d+):\n(.+)\n", context)
            assert [int(n) for n, _ in documents] == list(range(1, len(documents) + 1)) and len(documents) > len(own)
            assert len({text for _, text in documents}) == len(documents)
            assert 1 + sample.meta["tokens"] + len(TOKENIZER.encode(sample.meta["said"])) <= 150
            assert sample.answers == tuple(question["answers"])
            shown.add(next(i for i, (_, text) in enumerate(documents) if text == own[0]))
    assert len(shown) > 2  # anywhere
    assert samples.score(sample._replace(answers=("x", "Paris")), "It is paris.") == 1


def test_ruler_takes_the_questions_in(monkeypatch, questions):
    model_that(monkeypatch, numbers_of)
    report = ruler.run(CTX, cfg_of("ruler", lengths=(160,), samples=1, tasks=("niah_single_2",), qa=questions))
    assert {cell["task"] for cell in report.details["cells"]} == {"niah_single_2", "qa_1", "qa_2"}


def test_questions_that_cannot_be_used_are_told(tmp_path, questions):
    with pytest.raises(ConfigError, match="contexts have .* tokens together, and none may stand there twice"):
        CHECKS["ruler"](RUN, cfg_of("ruler", lengths=(512, 5000), tasks=("vt",), qa=questions))
    with pytest.raises(ConfigError, match="takes .* tokens with its own contexts"):
        qa.makers(questions, RUN.data.tokenizer, (32, 150))
    with pytest.raises(ConfigError, match="no such file"):
        qa.read(str(tmp_path / "none.jsonl"))
    for line in ("", "{}", "no json", '{"question": "a", "contexts": [], "answers": ["b"]}'):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(line)
        with pytest.raises(ConfigError, match="it has no line" if not line else "line 1 of .* no question"):
            qa.read(str(bad))


def test_lines_of_questions_are_json_as_it_is(tmp_path):
    """Signs that end lines elsewhere, a byte order mark, a context that is given twice."""
    path = tmp_path / "qa.jsonl"
    contexts = ["One\u2028and\u0085two.", "Three.", "Three."]
    line = json.dumps(dict(question="Who?", contexts=contexts, answers=["two"]), ensure_ascii=False)
    path.write_text(f"\ufeff{line}\r\n{line}", encoding="utf-8")
    assert qa.read(str(path)) == [qa.Question("Who?", (contexts[0], "Three."), ("two",))] * 2
    path.write_text(f"{line}\n" + line.replace("Three", "\\ud800"), encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2 of .* half of a surrogate pair"):
        qa.read(str(path))


def test_documents_with_long_numbers_are_counted_too(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(f'{{"question": "{i}?", "context": "{i}.", "answers": ["a"]}}\n' for i in range(1500)))
    (make,) = qa.makers(str(path), RUN.data.tokenizer, (1024, 12_000)).values()
    for number in range(3):
        sample = make(samples.rng(cfg_of("ruler"), "qa_1", 12_000, None, number), 12_000, None)
        assert "Document 1001:" in sample.pieces[0]
        assert 12_000 * 0.97 < 1 + sample.meta["tokens"] + len(TOKENIZER.encode(sample.meta["said"])) <= 12_000


# ----------------------------------------------------------------------------------------------------------- position


def scores_that(monkeypatch, module, nats) -> list:
    """A stand-in for `score_tokens`: nats(prompt, number of the token) of every token that is asked about."""
    calls = []

    def score_tokens(skeleton, params, router_bias, prompts, firsts, **how):
        calls.append((prompts, firsts, how))
        logp = [
            np.array([-nats(p, i) for i in range(first, len(p.tokens))], np.float32)
            for p, first in zip(prompts, firsts, strict=True)
        ]
        return [Scored(x, x > 0) for x in logp]

    monkeypatch.setattr(module, "score_tokens", score_tokens)
    return calls


def test_loss_by_position_is_the_mean_of_each_part(monkeypatch):
    scores_that(monkeypatch, position, lambda prompt, i: float(i))
    cfg = cfg_of("position", lengths=(256,), buckets=4)
    CHECKS["position"](RUN, cfg)
    report = position.run(CTX, cfg)
    # The first part predicts tokens 1 to 63, the second 64 to 127, ...
    expected = [np.mean(range(1, 64)), *(np.mean(range(a, a + 64)) for a in (64, 128, 192))]
    np.testing.assert_allclose(report.details["nats"], expected)
    assert report.scalars["nats_first"] == expected[0] and report.scalars["nats_last_quarter"] == expected[3]
    texts = [document for document in position.documents(RUN, cfg) if len(document) >= 256]
    assert report.details["documents"] == len(texts) > 2 and report.plots["position"].ndim == 3
    assert report.rows[0][2].startswith(
        f"first 64 tokens {expected[0]:.3f}, so {expected[3] - expected[0]:+.3f} ± 0.000"
    )


def test_documents_are_cut_and_short_ones_left_out(monkeypatch):
    calls = scores_that(monkeypatch, position, lambda prompt, i: 1.0)
    position.run(CTX, cfg_of("position", lengths=(256,), buckets=4))
    prompts = [p for some, _, _ in calls for p in some]
    assert all(len(p.tokens) == 256 and p.tokens[0] == TOKENIZER.bos for p in prompts)
    longest = max(len(document) for document in position.documents(RUN, cfg_of("position")))
    with pytest.raises(ConfigError, match=rf"its longest document has {longest} .*Set lengths to {longest // 8 * 8}"):
        CHECKS["position"](RUN, cfg_of("position", lengths=(8 * longest,)))


# ------------------------------------------------------------------------------------------------------------- answer


def test_the_gain_is_what_the_right_context_is_worth(monkeypatch):
    """A model that loses 1 nat where the answer stands before, 3 where it does not, and 2 without any context."""

    def nats(prompt, i):
        asked = text_of(prompt)
        if len(prompt.tokens) < 100:
            return 2.0
        value = numbers_of(asked).split()[-1]
        return 1.0 if asked.count(value) > 1 else 3.0

    calls = scores_that(monkeypatch, answer, nats)
    cfg = cfg_of("answer", lengths=(256,), samples=4, tasks=("needle",))
    CHECKS["answer"](RUN, cfg)
    report = answer.run(CTX, cfg)
    assert report.scalars == {
        "needle/256/right": 1.0, "needle/256/shuffled": 3.0, "needle/256/none": 2.0, "needle/256/gain": 2.0
    }  # fmt: skip
    assert "(+2.000 ± 0.000, 1σ), 2.000 with none" in report.rows[0][2]
    for prompts, firsts, _ in calls:
        for prompt, first in zip(prompts, firsts, strict=True):
            assert re.fullmatch(r" \d{7}\n", TOKENIZER.decode(prompt.tokens[first:]))
    with pytest.raises(ConfigError, match="that of another sample"):
        CHECKS["answer"](RUN, dataclasses.replace(cfg, samples=1))


def test_others_are_of_the_same_task():
    found = list("abcdef")
    assert answer.others(found, 3) == list("bcaefd")
