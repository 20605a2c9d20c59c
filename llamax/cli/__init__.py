"""The command line: parse, then call the function that does the work. Imports of the work are inside the handlers, so
that `llamax --help` and a wrong configuration answer at once, without jax.

Exit codes: 0 done; 1 `inspect` found the newest checkpoint not sound, what `plan` was asked for does not fit, or
another process of the job is missing; 2 a person's input is wrong (one line on stderr, no traceback); 3 too many bad
steps in a row; 4 the disk was full at the last save; 130 stopped by Ctrl-C, 143 by SIGTERM (a training run has saved
then, and the same command goes on). After 2, 3, 4, 130 and 143 the launchers in launch/ start nothing again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import llamax
from llamax.cli import data
from llamax.cli.words import FOLDERS, PRECISION, command, count, counts, examples, named, sentence, words

STARTED = time.time()
INTERRUPTED = 128 + signal.SIGINT
OVERRIDES = ("--config.", "--noconfig.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the console script `llamax`."""
    words, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    command_line = parser()
    args = command_line.parse_args(words)
    if overrides and "overrides" not in args:
        command_line.error(f"{overrides[0]}: only train, show and plan take --config overrides")
    args.overrides = overrides
    from llamax.config import ConfigError

    try:
        code = args.handler(args)
        sys.stdout.flush()
    except ConfigError as error:
        red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
        print(f"{red}llamax: {error}{plain}", file=sys.stderr)
        return leave(getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        print("llamax: interrupted; what was saved before stays as it is", file=sys.stderr)
        return leave(INTERRUPTED)
    except BrokenPipeError:  # `llamax show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return leave(code or 0)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the other words, overrides as `--config.a.b=value`); a value may also follow as a word of its own."""
    words: list[str] = []
    overrides: list[str] = []
    open_override = False  # the last word was an override without a value; a boolean one needs none
    for word in argv:
        if word.startswith(OVERRIDES):
            overrides.append(word)
            open_override = "=" not in word and not word.startswith("--no")
        elif open_override and not word.startswith("--"):
            overrides[-1] += f"={word}"
            open_override = False
        else:
            words.append(word)
            open_override = False
    return words, overrides


# ------------------------------------------------------------------------------------------------------ the handlers


def _train(args: argparse.Namespace) -> int:
    from llamax import config

    signal.signal(signal.SIGTERM, terminated)  # for the moments before those that `train` looks after
    run = config.freeze(config.load(args.recipe, args.overrides))  # before jax is imported
    from llamax.parallel import processes
    from llamax.run import train
    from llamax.train.loop import Stopped

    try:
        result = train(run, args.workdir, overrides=args.overrides, began=STARTED)
        processes.part()
    except Stopped as stopped:
        print(f"llamax: {stopped} before the first step; the same command starts again", file=sys.stderr)
        return 128 + stopped.signal
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is done: another one must not change the exit code
    return 0 if result.finished else 128 + (result.signal or signal.SIGINT)


def terminated(*_: Any) -> None:
    """Of a SIGTERM while there is nothing to save: the exit code is that of any other moment."""
    sys.exit(128 + signal.SIGTERM)


def leave(code: int) -> int:
    """The exit code; at once if a compiler is at work, which cannot be interrupted and which the interpreter would wait
    for, or if this is still one of several processes, for it would wait for them. All files are closed by now."""
    compiles = any(thread.name.startswith("compile") for thread in threading.enumerate())
    joined = sys.modules.get("llamax.parallel.processes")  # without it there is no jax yet
    if joined is not None and joined.several():
        joined.leave(code)
    if compiles:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _show(args: argparse.Namespace) -> None:
    from llamax import config
    from llamax.show import show

    show(config.freeze(config.load(args.recipe, args.overrides)))


def _plan(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, terminated)  # the process that compiles is ended too
    from llamax import config, stages
    from llamax.plan.topology import prepare

    run = stages.named(config.freeze(config.load(args.recipe, args.overrides)), args.stage)
    prepare()  # before jax is imported
    from llamax.observe import log
    from llamax.plan import plan, report

    log.setup(logging.ERROR)  # what stays unsharded is among the notes
    made = plan(run, args.topology, estimate=args.estimate)
    if args.json:
        print(report.as_json(made))
    else:
        report.show(made, log.CONSOLE)
    return 0 if made.bytes.fits else 1


def _generate(args: argparse.Namespace) -> None:
    from llamax.generating import generate
    from llamax.sample.engine import Sampling

    sampling = Sampling(args.temperature, args.top_p, args.seed)
    how = dict(images=args.image, n=args.samples, max_tokens=args.max_tokens, sampling=sampling, dtype=args.dtype)
    print("\n\n".join(generate(_folder(args), args.prompt, **how)))


def _eval(args: argparse.Namespace) -> None:
    from llamax.evaluating import evaluate

    given = {name: getattr(args, name) for name in EVAL_SETTINGS if getattr(args, name) is not None}
    positions = dict(args.temperature_tuning or {}) | dict(args.positions)
    how = dict(recipe=args.recipe, out=args.out, step=args.step, dtype=args.dtype, positions=positions)
    evaluate(args.folder, args.kinds, settings=given, **how)


def _harness(args: argparse.Namespace) -> None:
    from llamax.evals.harness import run_harness

    model = {name: getattr(args, name) for name in ("dtype", "batch_size", "max_length", "step", "seed")}
    how = dict(include_path=args.include_path, limit=args.limit, fewshot=args.fewshot, chat_template=args.chat)
    run_harness(args.folder, args.tasks, out=args.out, **how, **model)


def _chat(args: argparse.Namespace) -> None:
    from llamax.generating import chat
    from llamax.sample.engine import Sampling

    sampling = Sampling(args.temperature, args.top_p, args.seed)
    how = dict(images=args.image, max_tokens=args.max_tokens, sampling=sampling, dtype=args.dtype)
    chat(_folder(args), system=args.system, **how)


def _folder(args: argparse.Namespace) -> str:
    from llamax.config import ConfigError

    if bool(args.folder) == bool(args.workdir):
        true = "neither or both of MODEL and --workdir name it"
        change = "Give one folder: a run's, a converted model, or one in Hugging Face's format."
        raise ConfigError("A model", true, change)
    return args.folder or args.workdir


def _inspect(args: argparse.Namespace) -> int:
    from llamax.checkpoint.inspect import inspect

    return 0 if inspect(args.folder) else 1


def _from_hf(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, terminated)  # what is half-written is removed
    from llamax.checkpoint.hf import from_hf
    from llamax.observe import log

    log.setup()
    print(f"Converted to {from_hf(args.folder, args.out)}.")


def _to_hf(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, terminated)  # what is half-written is removed
    from llamax.checkpoint.hf import to_hf
    from llamax.observe import log

    log.setup()
    how = dict(dtype=args.dtype, step=args.step, max_shard_gb=args.max_shard_gb)
    print(f"Exported to {to_hf(args.folder, args.out, **how)}.")


# -------------------------------------------------------------------------------------------------------- the parser


def parser() -> argparse.ArgumentParser:
    """The commands and their words."""
    about = "Train Llama-4-style models (mixture of experts, text and pictures) in JAX, from a laptop to a cluster."
    top = argparse.ArgumentParser(prog="llamax", description=about, **examples(TOP))
    top.add_argument("--version", action="version", version=f"llamax {llamax.__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = command(commands, "train", _train, "train a recipe, or go on where it stopped", TRAIN)
    _recipe(train)
    train.add_argument(
        "--workdir", required=True, type=named, metavar="DIR", help="checkpoints, TensorBoard and run.json go here"
    )

    show = command(commands, "show", _show, "print a resolved recipe, its parameters and FLOPs; start nothing", SHOW)
    _recipe(show)

    about = "tell what a run needs of a cluster that is not here; exit code 1 if it does not fit"
    _planned(command(commands, "plan", _plan, about, PLAN))

    generate = command(commands, "generate", _generate, "continue a prompt with a trained model", GENERATE)
    _sampled(generate, max_tokens=64, temperature=0.0, top_p=1.0)
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    places = "a picture before the prompt, or for the next <|image|> in it; may be given several times"
    generate.add_argument("--image", action="append", default=[], metavar="FILE", help=places)
    generate.add_argument("-n", "--samples", type=int, default=1, metavar="N", help="continuations (%(default)s)")

    about = "evaluate a model: held-out loss, needles, RULER, loss by position; a table, JSON and PNG files"
    _evaluated(command(commands, "eval", _eval, about, EVAL))

    about = "evaluate a model on tasks of the lm-evaluation-harness (the extra `harness`)"
    _harnessed(command(commands, "harness", _harness, about, HARNESS))

    chat = command(commands, "chat", _chat, "talk with a trained model, pictures included", CHAT)
    _sampled(chat, max_tokens=512, temperature=0.6, top_p=0.9)
    chat.add_argument("--system", metavar="TEXT", help="the system's message, before all others")
    first = "a picture for the first message; may be given several times"
    chat.add_argument("--image", action="append", default=[], metavar="FILE", help=first)

    about = "list a run's checkpoints and compare their files with their sums; exit code 1 if the newest is not sound"
    inspect = command(commands, "inspect", _inspect, about, INSPECT)
    inspect.add_argument("folder", type=named, metavar="DIR", help="the --workdir of a run, or its checkpoints folder")

    about = "bring a model from Hugging Face's format, or leave with one"
    convert = commands.add_parser("convert", help=about, description=sentence(about), **examples(CONVERT))
    ways = convert.add_subparsers(title="commands", required=True, metavar="COMMAND")
    about = "convert a Hugging Face folder (Llama 4, or a dense Llama) to llamax's format"
    from_hf = command(ways, "from-hf", _from_hf, about, FROM_HF)
    from_hf.add_argument("folder", type=named, metavar="DIR", help="config.json and safetensors files")
    from_hf.add_argument("--out", required=True, type=named, metavar="CKPT", help="the folder to make")
    about = "export a run, or a converted model, to Hugging Face's format"
    to_hf = command(ways, "to-hf", _to_hf, about, TO_HF)
    to_hf.add_argument("folder", type=named, metavar="CKPT", help="the --workdir of a run, or a converted model")
    to_hf.add_argument("--out", required=True, type=named, metavar="DIR", help="the folder to make")
    dtypes = ("float32", "bfloat16", "float16")
    to_hf.add_argument("--dtype", choices=dtypes, help="of the tensors (as they are stored)")
    to_hf.add_argument("--step", type=int, metavar="N", help="of a run (the newest sound checkpoint)")
    most = "bytes of a file, in GB (%(default)s)"
    to_hf.add_argument("--max-shard-gb", type=float, default=5.0, metavar="N", help=most)

    data.add(commands)
    return top


def _planned(plan: argparse.ArgumentParser) -> None:
    _recipe(plan)
    cluster = "chips or nodes: v5p:8x8x4, v5e:16x16, v6e:16x16, tpu7x:4x4x4, h100:64x8 (nodes x GPUs), h200, b200"
    plan.add_argument("--topology", required=True, metavar="T", help=cluster)
    which = "of a run in stages, the one to plan (the last one)"
    plan.add_argument("--stage", metavar="NAME", help=which)
    plan.add_argument("--estimate", action="store_true", help="from formulas, in seconds; compiles nothing")
    plan.add_argument("--json", action="store_true", help="one object on stdout, for programs")


EVAL_SETTINGS = (  # fields of config.Eval that have an option
    *("path", "max_docs", "lengths", "depths", "samples", "tasks", "options", "templates", "qa", "threshold"),
    *("buckets", "seed", "cache_gb", "max_tokens"),
)


def _evaluated(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="MODEL", help=FOLDERS)
    kinds = "perplexity, drawings, needle, ruler, position, answer, preference, reward, instructions; or the run's own"
    kinds += " by name. None: all of these"
    command.add_argument("kinds", nargs="*", metavar="KIND", help=kinds)
    command.add_argument("--recipe", metavar="RECIPE[:SIZE]", help="take its evaluations for the model's own")
    text = "a manifest: held-out text, or the text around what is asked for"
    command.add_argument("--data", "--filler", dest="path", metavar="MANIFEST", help=text)
    command.add_argument("--lengths", type=counts, metavar="N,N", help="tokens of a sample, or of a document")
    command.add_argument("--depths", type=count, metavar="N", help="needle: places of what is asked for (5)")
    each = "of every task at every length, and depth (8)"
    command.add_argument("--samples", type=count, metavar="N", help=each)
    command.add_argument("--tasks", type=words, metavar="NAME,NAME", help="of llamax/data/tasks (the kind's own)")
    changed = """fields of tasks, in JSON: {"needle": {"keys": 4}}"""
    command.add_argument("--options", type=_table, metavar="JSON", help=changed)
    command.add_argument("--templates", metavar="SET", help="seen or held_out: how questions are worded (seen)")
    command.add_argument("--qa", metavar="FILE", help="ruler: questions with contexts and answers, JSONL")
    above = "ruler: a length is effective if it scores above (0.856)"
    command.add_argument("--threshold", type=float, metavar="X", help=above)
    command.add_argument("--buckets", type=count, metavar="N", help="position: parts of a document (8)")
    command.add_argument("--max-docs", type=count, metavar="N", help="documents, at most (512)")
    command.add_argument("--max-tokens", type=count, metavar="N", help="instructions: of an answer (64)")
    command.add_argument("--seed", type=int, metavar="N", help="of the samples (0)")
    command.add_argument("--cache-gb", type=float, metavar="N", help="what keys and values may take (4)")
    queries = "of layers without RoPE: off, or the floor in tokens and the scale (the model's own)"
    command.add_argument("--temperature-tuning", type=_temperature, metavar="off|N,X", help=queries)
    other = "how positions are read, which no weight depends on: rope.scaling=yarn; may be given several times"
    command.add_argument("--positions", type=_assigned, action="append", default=[], metavar="NAME=VALUE", help=other)
    command.add_argument("--out", type=named, metavar="DIR", help="write NAME.json and NAME.png here")
    command.add_argument("--step", type=int, metavar="N", help="of a run (the newest sound checkpoint)")
    command.add_argument("--dtype", default="float32", metavar="TYPE", help=PRECISION)


def _harnessed(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="MODEL", help=FOLDERS)
    what = "tasks, groups, tags or patterns of the harness, or of --include-path"
    command.add_argument("--tasks", required=True, type=words, metavar="NAME,NAME", help=what)
    own = "a folder with tasks of your own, YAML files"
    command.add_argument("--include-path", type=named, metavar="DIR", help=own)
    command.add_argument("--limit", type=count, metavar="N", help="the first N examples of each task only")
    command.add_argument("--fewshot", type=int, metavar="N", help="examples before each question (the task's own)")
    command.add_argument("--chat", action="store_true", help="ask in the chat template, as a user asks the assistant")
    together = "texts that are worked on together, rounded down to a power of two (%(default)s)"
    command.add_argument("--batch-size", type=count, default=8, metavar="N", help=together)
    most = "tokens that the model is given at most; contexts are cut from the left (a training row's)"
    command.add_argument("--max-length", type=count, metavar="N", help=most)
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of texts that a task samples (%(default)s)")
    command.add_argument("--out", type=named, metavar="DIR", help="write harness.json and every answer here")
    command.add_argument("--step", type=int, metavar="N", help="of a run (the newest sound checkpoint)")
    command.add_argument("--dtype", default="float32", metavar="TYPE", help=PRECISION)


def _temperature(text: str) -> dict[str, Any]:
    """Fields of config.Model for `off`, or FLOOR,SCALE."""
    if text == "off":
        return {"attn_temperature": 0.0}
    floor, _, scale = text.partition(",")
    try:
        return {"attn_temperature_floor": count(floor), "attn_temperature": float(scale)}
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text} is neither off nor a floor and a scale, as 8192,0.1") from None


def _assigned(text: str) -> tuple[str, Any]:
    """(name, value) of NAME=VALUE; what is no number is a word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is no NAME=VALUE")
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return name, number(value)
    return name, value


def _table(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(table := json.loads(text), dict):
            return table
    raise argparse.ArgumentTypeError(f'{text} is no table in JSON, as {{"needle": {{"keys": 4}}}}')


def _sampled(command: argparse.ArgumentParser, *, max_tokens: int, temperature: float, top_p: float) -> None:
    """What every command takes that samples from a model."""
    command.add_argument("folder", nargs="?", metavar="MODEL", help=FOLDERS)
    command.add_argument("--workdir", metavar="DIR", help="the same, by name")
    limit = f"stop after N tokens ({max_tokens})"
    command.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help=limit)
    likeliest = "0 takes the likeliest token (%(default)s)"
    command.add_argument("--temperature", type=float, default=temperature, metavar="T", help=likeliest)
    nucleus = "sample among the likeliest tokens that have this probability together (%(default)s)"
    command.add_argument("--top-p", type=float, default=top_p, metavar="P", help=nucleus)
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (%(default)s)")
    command.add_argument("--dtype", default="float32", metavar="TYPE", help=PRECISION)


def _recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE[:SIZE]", help="a recipe file; its sizes are full (default) and tiny")
    overrides = "any setting of the recipe; `llamax show RECIPE` lists them all"
    command.add_argument("--config.KEY", metavar="VALUE", dest="overrides", default=[], help=overrides)


TOP = """
    llamax data build                                                        # the embedded data, under a minute
    llamax train recipes/scout_pretrain.py:tiny --workdir runs/quickstart    # again: goes on where it stopped
    llamax generate runs/quickstart --prompt "def main("
"""
TRAIN = """
    llamax train recipes/scout_pretrain.py:tiny --workdir runs/scout
    llamax train recipes/scout_pretrain.py:tiny --workdir runs/wide --config.model.expert_ffn_dim=512
    llamax train recipes/scout_pretrain.py:tiny --workdir runs/norm --noconfig.model.qk_norm
"""
SHOW = """
    llamax show recipes/scout_pretrain.py
    llamax show recipes/maverick_pretrain.py:tiny --config.data.seq_len=256
"""
PLAN = """
    llamax plan recipes/scout_pretrain.py --topology v5p:8x8x4
    llamax plan recipes/scout_pretrain.py --topology h100:64x8 --estimate
    llamax plan recipes/scout_context.py:v5p_256 --topology v5p:8x8x4 --stage to_64k
    llamax plan recipes/scout_pretrain.py:tiny --topology v5e:2x2 --json
"""
GENERATE = """
    llamax generate runs/quickstart --prompt "import os" --max-tokens 100 --temperature 0.8
    llamax generate runs/quickstart --prompt "" --image drawing.png
    llamax generate models/scout --prompt "<|image|> is before <|image|>." --image a.png --image b.png -n 4
"""
EVAL = """
    llamax eval runs/quickstart                               # the run's own evaluations, on its newest checkpoint
    llamax eval runs/x needle --lengths 256,512,2048 --samples 8 --data data/built/docs_heldout.toml --out results
    llamax eval models/scout ruler --lengths 4096,32768 --data data/built/docs_heldout.toml --qa squad.jsonl
    llamax eval runs/x position --lengths 2048 --data data/built/docs_heldout.toml --temperature-tuning off
"""
HARNESS = """
    llamax harness runs/quickstart --tasks python_choice,python_next --include-path data/fixtures/harness --out results
    llamax harness models/scout --tasks hellaswag,arc_easy --limit 200 --batch-size 16 --dtype bfloat16
    llamax harness models/scout_chat --tasks gsm8k --chat --fewshot 4
"""
CHAT = """
    llamax chat models/scout
    llamax chat models/scout --image photo.jpg --temperature 0
    llamax chat runs/quickstart --system "Answer with one word."
"""
INSPECT = """
    llamax inspect runs/quickstart
    llamax inspect runs/quickstart/checkpoints
"""
CONVERT = """
    llamax convert from-hf Llama-3.2-1B --out models/llama32_1b
    llamax convert to-hf runs/quickstart --out exported
"""
FROM_HF = """
    llamax convert from-hf Llama-4-Scout-17B-16E --out models/scout
"""
TO_HF = """
    llamax convert to-hf models/scout --out exported
    llamax convert to-hf runs/quickstart --out exported --dtype bfloat16 --step 200
"""
