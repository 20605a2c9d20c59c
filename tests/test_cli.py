"""The command line: what reaches the functions that work, what a person reads when they err, and how fast."""

from __future__ import annotations

import dataclasses
import importlib
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call, create_autospec

import pytest

from llamax import cli, config, show, variants
from llamax.post.drawing import Drawing
from llamax.run import Result
from llamax.sample.engine import Sampling
from llamax.train.loop import Stopped

ROOT = Path(__file__).resolve().parents[1]
TINY = "recipes/scout_pretrain.py:tiny"
SAMPLED = ["--temperature", "0.5", "--top-p", "0.9", "--seed", "2", "--dtype", "bfloat16"]
COMMANDS = [
    [],
    ["train"],
    ["show"],
    ["generate"],
    ["chat"],
    ["eval"],
    ["harness"],
    ["inspect"],
    ["data"],
    ["data", "build"],
    ["data", "show"],
    ["data", "tokenizer"],
    ["data", "unpack"],
    ["data", "grade"],
    ["data", "select"],
    ["data", "sample"],
    ["data", "pairs"],
]


@pytest.fixture(autouse=True)
def signals():
    """`llamax train` sets them for its whole process."""
    old = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, old)


def called(monkeypatch, target: str, **behaviour):
    """The function at `target`, replaced by one that only takes what the real one takes."""
    module, _, name = target.rpartition(".")
    real = getattr(importlib.import_module(module), name)
    double = create_autospec(real, **behaviour)
    monkeypatch.setattr(target, double)
    return double


# ----------------------------------------------------------------------------------------------------- what is called


def test_train(monkeypatch):
    train = called(monkeypatch, "llamax.run.train")
    words = ["--config.train.steps", "300", "--noconfig.model.qk_norm", "--workdir", "there"]
    assert cli.main(["train", TINY, *words]) == 0
    overrides = ["--config.train.steps=300", "--noconfig.model.qk_norm"]
    run = config.freeze(config.load(TINY, overrides))
    train.assert_called_once_with(run, "there", overrides=overrides, began=cli.STARTED)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_tells_its_signal(number, code, monkeypatch, capsys):
    """Before the first step, and after some."""
    called(monkeypatch, "llamax.run.train", side_effect=[Stopped(number), Result(None, {}, False, number)])
    assert cli.main(["train", TINY, "--workdir", "there"]) == code
    assert "before the first step; the same command starts again" in capsys.readouterr().err
    assert cli.main(["train", TINY, "--workdir", "there"]) == code


def test_generate(monkeypatch, capsys):
    generate = called(monkeypatch, "llamax.generating.generate", return_value=["and so on", "or not"])
    words = ["--prompt", "x", "--image", "y.png", "--image", "z.png", "--max-tokens", "5", "-n", "2", *SAMPLED]
    for folder in (["there"], ["--workdir", "there"]):
        assert cli.main(["generate", *folder, *words]) == 0
    how = dict(images=["y.png", "z.png"], n=2, max_tokens=5, sampling=Sampling(0.5, 0.9, 2), dtype="bfloat16")
    assert generate.call_args_list == [call("there", "x", **how)] * 2
    assert capsys.readouterr().out == "and so on\n\nor not\n" * 2
    for folder in ([], ["there", "--workdir", "there"]):
        assert cli.main(["generate", *folder, *words]) == 2
        assert "neither or both" in capsys.readouterr().err


def test_eval(monkeypatch):
    evaluate = called(monkeypatch, "llamax.evaluating.evaluate")
    assert cli.main(["eval", "there"]) == 0
    words = "needle position --lengths 256,1024 --depths 3 --samples 2 --tasks needle,key_value --filler x.toml"
    words += " --templates held_out --cache-gb 0.5 --seed 0 --out o --step 3 --dtype bfloat16 --recipe r.py"
    words += ' --options {"needle":{"keys":4}}'
    words += " --temperature-tuning 64,0.2 --positions rope.scaling=yarn --positions rope.factor=8"
    assert cli.main(["eval", "there", *words.split()]) == 0
    settings = dict(lengths=(256, 1024), depths=3, samples=2, tasks=("needle", "key_value"), path="x.toml")
    settings |= dict(templates="held_out", cache_gb=0.5, seed=0, options={"needle": {"keys": 4}})
    positions = {"attn_temperature_floor": 64, "attn_temperature": 0.2, "rope.scaling": "yarn", "rope.factor": 8}
    how = dict(recipe="r.py", out="o", step=3, dtype="bfloat16", positions=positions)
    assert evaluate.call_args_list == [
        call("there", [], settings={}, recipe=None, out=None, step=None, dtype="float32", positions={}),
        call("there", ["needle", "position"], settings=settings, **how),
    ]


def test_harness(monkeypatch):
    ran = Mock()
    monkeypatch.setitem(sys.modules, "llamax.evals.harness", SimpleNamespace(run_harness=ran))  # lm_eval is an extra
    assert cli.main(["harness", "there", "--tasks", "a"]) == 0
    words = "--tasks a,b --include-path t --limit 3 --fewshot 0 --chat --batch-size 4 --max-length 64 --seed 1 --out o"
    assert cli.main(["harness", "there", *words.split(), "--step", "2", "--dtype", "bfloat16"]) == 0
    task = dict(include_path=None, limit=None, fewshot=None, chat_template=False, out=None)
    model = dict(dtype="float32", batch_size=8, max_length=None, step=None, seed=0)
    other = dict(include_path="t", limit=3, fewshot=0, chat_template=True, out="o")
    other |= dict(dtype="bfloat16", batch_size=4, max_length=64, step=2, seed=1)
    assert ran.call_args_list == [call("there", ("a",), **task, **model), call("there", ("a", "b"), **other)]


def test_temperature_tuning(monkeypatch, capsys):
    evaluate = called(monkeypatch, "llamax.evaluating.evaluate")
    assert cli.main(["eval", "there", "--temperature-tuning", "off"]) == 0
    assert evaluate.call_args.kwargs["positions"] == {"attn_temperature": 0.0}
    wrong = (["--temperature-tuning", "of"], ["--temperature-tuning", "8"], ["--positions", "rope.theta"])
    for words in (*wrong, ["--options", "needle.keys=4"], ["--options", "[4]"]):
        with pytest.raises(SystemExit):
            cli.main(["eval", "there", *words])
    assert "neither off nor a floor and a scale, as 8192,0.1" in capsys.readouterr().err


def test_every_setting_of_an_evaluation_has_an_option():
    fields = {field.name for field in dataclasses.fields(config.Eval)} - {"kind", "every_steps", "patience"}
    assert set(cli.EVAL_SETTINGS) == fields


def test_chat(monkeypatch):
    chat = called(monkeypatch, "llamax.generating.chat")
    assert cli.main(["chat", "there", "--system", "Be brief.", "--image", "y.png", *SAMPLED]) == 0
    how = dict(system="Be brief.", images=["y.png"], max_tokens=512, sampling=Sampling(0.5, 0.9, 2), dtype="bfloat16")
    chat.assert_called_once_with("there", **how)


@pytest.mark.parametrize(("sound", "code"), [(True, 0), (False, 1)])
def test_inspect(sound, code, monkeypatch):
    inspect = called(monkeypatch, "llamax.checkpoint.inspect.inspect", return_value=sound)
    assert cli.main(["inspect", "there"]) == code
    inspect.assert_called_once_with("there")


def test_data(monkeypatch):
    build = called(monkeypatch, "llamax.data.embedded.build.build")
    look = called(monkeypatch, "llamax.data.show.show")
    tokenizer = called(monkeypatch, "llamax.data.train_tokenizer.train_tokenizer")
    assert cli.main(["data", "build", "--out", "there", "--seed", "3", "--force"]) == 0
    assert cli.main(["data", "show", "x.toml", "-n", "2"]) == 0
    assert cli.main(["data", "tokenizer", "--out", "x.model", "--vocab", "300", "--seed", "4"]) == 0
    assert build.call_args.args == ("there",)
    assert build.call_args.kwargs["recipe"].seed == 3 and build.call_args.kwargs["force"]
    look.assert_called_once_with("x.toml", n=2)
    tokenizer.assert_called_once_with("x.model", 300, 4)


def test_data_grade(monkeypatch):
    grade = called(monkeypatch, "llamax.post.grade.grade")
    assert cli.main(["data", "grade", "x.jsonl", "--judge", "there", "--rubric", "a", "--rubric", "b.toml"]) == 0
    words = "--by pass -k 4 --max-tokens 9 --temperature 0.5 --top-p 0.9 --seed 2 --drawn d --grades g"
    read = "--batch-size 2 --max-length 99 --step 3 --dtype bfloat16"
    assert cli.main(["data", "grade", "x.jsonl", "--judge", "there", *words.split(), *read.split()]) == 0
    default = dict(step=None, dtype="float32", batch_size=8, max_tokens=8192)
    other = dict(step=3, dtype="bfloat16", batch_size=2, max_tokens=99)
    drawing = Drawing(4, 9, Sampling(0.5, 0.9, 2))
    first, second = grade.call_args_list
    how = dict(judge="there", grades=None, samples=None, by="rubric", rubrics=["a", "b.toml"], draw=None)
    assert first == call("x.jsonl", **how, **default)
    how |= dict(grades="g", samples="d", by="pass", rubrics=[], draw=drawing)
    assert second == call("x.jsonl", **how, **other)


def test_data_select(monkeypatch, capsys):
    select = called(monkeypatch, "llamax.post.select.select")
    assert cli.main(["data", "select", "x.jsonl", "--preset", "behemoth", "--per-domain", "--out", "o.jsonl"]) == 0
    words = (
        "--by pass --band 0.2,0.8 --end high --keep-tag a --drop-tag b --drop-tag c --judge j --grades g --out o.jsonl"
    )
    assert cli.main(["data", "select", "x.jsonl", *words.split()]) == 0
    assert cli.main(["data", "select", "x.jsonl", "--by", "loss", "--keep", "0.3", "--out", "o.jsonl"]) == 0
    plain = dict(grades=None, by="loss", keep=0.3, band=None, end=None, per_domain=False, judge=None)
    plain |= dict(keep_tags=[], drop_tags=[])
    other = dict(grades="g", by="pass", keep=1.0, band=(0.2, 0.8), end="high", judge="j")
    assert select.call_args_list == [
        call("x.jsonl", "o.jsonl", **plain | dict(by="difficulty", keep=0.05, per_domain=True)),
        call("x.jsonl", "o.jsonl", **plain | other | dict(keep_tags=["a"], drop_tags=["b", "c"])),
        call("x.jsonl", "o.jsonl", **plain),
    ]
    assert cli.main(["data", "select", "x.jsonl", "--preset", "llama4", "--keep", "0.3", "--out", "o.jsonl"]) == 2
    assert "a preset says how much is kept" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["data", "select", "x.jsonl", "--band", "0.2", "--out", "o.jsonl"])
    assert "0.2 is no two shares" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("grade x.jsonl --judge there --by loss -k 4", "--by loss with --samples"),
        ("grade x.jsonl --judge there --rubric a --drawn d", "--by rubric with --drawn"),
        ("select x.jsonl --out o.jsonl --keep-tag a --end low", "without --by with --end"),
        ("select x.jsonl --out o.jsonl --judge j", "without --by with --judge"),
    ],
)
def test_options_that_nothing_would_read_are_refused(words, said, capsys):
    assert cli.main(["data", *words.split()]) == 2
    assert said in capsys.readouterr().err


def test_data_sample_and_pairs(monkeypatch):
    sample = called(monkeypatch, "llamax.post.sample.sample")
    pairs = called(monkeypatch, "llamax.post.pairs.pairs")
    made = ["x.jsonl", *shlex.split("--model there --out o.jsonl -k 4 --drawn d")]
    own = shlex.split("--keep 2 --similar 0.5 --judge j --rubric quality --at-least 4")
    assert cli.main(["data", "sample", *made, *own]) == 0
    assert cli.main(["data", "pairs", *made, "--corners", "format,long", "--rule-share", "0.5"]) == 0
    assert cli.main(["data", "pairs", *made, "--corners", ""]) == 0
    read = dict(step=None, dtype="float32", batch_size=8, max_tokens=8192)
    how = dict(model="there", draw=Drawing(4, 256, Sampling(1.0, 1.0, 0)), samples="d") | read
    judged = dict(keep=2, similar=0.5, judge="j", rubric_name="quality", at_least=4.0)
    sample.assert_called_once_with("x.jsonl", "o.jsonl", **how | judged)
    assert pairs.call_args_list == [
        call("x.jsonl", "o.jsonl", **how, corners=("format", "long"), rule_share=0.5),
        call("x.jsonl", "o.jsonl", **how, corners=(), rule_share=0.1),
    ]


def test_split_overrides():
    words = ["train", "--config.a=1", "r.py", "--config.b", "-1", "--workdir", "w", "--config.c", "--noconfig.d", "x"]
    assert cli.split_overrides(words) == (
        ["train", "r.py", "--workdir", "w", "x"],
        ["--config.a=1", "--config.b=-1", "--config.c", "--noconfig.d"],
    )


# -------------------------------------------------------------------------------------------------- what a person reads


def test_a_wrong_configuration_is_one_line_on_stderr(capsys):
    assert cli.main(["train", TINY, "--workdir", "w", "--config.train.step=3"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    text = "--config.train.step, but train has no step. Did you mean --config.train.steps?"
    assert err == f"llamax: {text}\n"


def test_the_line_is_red_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli.main(["show", "qqqq"]) == 2
    assert capsys.readouterr().err.startswith("\033[31mllamax: recipe qqqq")
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main(["show", "qqqq"]) == 2
    assert capsys.readouterr().err.startswith("llamax: recipe qqqq")


def test_ctrl_c_says_one_line(monkeypatch, capsys):
    called(monkeypatch, "llamax.data.show.show", side_effect=KeyboardInterrupt)
    assert cli.main(["data", "show", "x.toml"]) == 130
    assert capsys.readouterr() == ("", "llamax: interrupted; what was saved before stays as it is\n")


def test_our_own_errors_keep_their_traceback(monkeypatch):
    called(monkeypatch, "llamax.data.show.show", side_effect=ValueError("ours"))
    with pytest.raises(ValueError, match="ours"):
        cli.main(["data", "show", "x.toml"])


def test_overrides_belong_to_train_and_show(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "build", "--config.seed=1"])
    assert caught.value.code == 2
    assert "--config.seed=1" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    examples = text.split("examples:\n")[1].strip().splitlines()
    assert examples and all(line.strip().startswith(" ".join(["llamax", *command])) for line in examples)
    for line in examples:  # and they parse
        words, _ = cli.split_overrides(shlex.split(line, comments=True)[1:])
        cli.parser().parse_args(words)


# -------------------------------------------------------------------------------------------------------------- show


def test_show_prints_the_run_and_its_sizes(capsys):
    assert cli.main(["show", "recipes/scout_pretrain.py", "--config.optim.b1=0.8"]) == 0
    text = capsys.readouterr().out
    lines = dict(line.strip("* ").split(maxsplit=1) for line in text.splitlines() if line.strip())
    assert lines["optim.b1"].strip() == "0.8" and lines["data.seq_len"].strip() == "8192"
    assert lines["model.plan"].strip() == "(3 x rope_chunk+moe, nope_full+moe) x 12"
    assert lines["parameters"].strip() == "108,641,793,536"
    for fact in ("107,769,861,120", "17,172,894,720", "871,932,416", "8,388,608 = 1,024 rows", "9.136e+17", "16 + 1"):
        assert fact in text


def test_show_marks_what_is_not_default(capsys):
    cli.main(["show", TINY, "--config.optim.b1=0.8"])
    lines = capsys.readouterr().out.splitlines()
    marked = {line.split()[1] for line in lines if line.startswith("*")}
    assert {"optim.b1", "name", "model.chunk_len", "data.sources.docs.weight"} <= marked
    assert not {"optim.b2", "model.top_k", "losses.next_token"} & marked


def test_plan_is_compact():
    assert show.plan(variants.maverick()) == "(rope_chunk+dense, rope_chunk+moe, rope_chunk+dense, nope_full+moe) x 12"
    model = config.Model(plan=((("rope_full+dense",), 2), (("nope_full+moe", "nope_full+moe"), 1)))
    assert show.plan(model) == "(rope_full+dense) x 2, (2 x nope_full+moe) x 1"


# ------------------------------------------------------------------------------------------------------- how it starts


def cpu_seconds(*words: str) -> float:
    """CPU time of a fresh interpreter: wall time would measure the other tests too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_and_import_are_quick():
    assert cpu_seconds("-m", "llamax.cli", "--help") <= 0.5
    assert cpu_seconds("-c", "import llamax") <= 1.5


def test_show_imports_no_jax():
    code = "import sys; from llamax import cli; cli.main(sys.argv[1:]); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, "show", TINY], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_a_closed_pipe_is_quiet():
    done = subprocess.run(
        f"{sys.executable} -m llamax.cli show {TINY} | head -1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == "" and done.stdout.count("\n") == 1
