"""`llamax data unpack`, `grade`, `select`, `sample` and `pairs`: conversations judged, chosen, and made more of."""

from __future__ import annotations

import argparse
from typing import Any

from llamax.cli.words import PRECISION, command, count, named, words

FILE = 'conversations, {"messages": [...]} in lines (JSONL)'
MODEL = "a run's workdir, a converted model, or a folder in Hugging Face's format"


# ------------------------------------------------------------------------------------------------------ the handlers


def _unpack(args: argparse.Namespace) -> None:
    from llamax.post.unpack import unpack

    unpack(args.manifest, args.out, args.records)


def _grade(args: argparse.Namespace) -> None:
    from llamax.post.grade import grade

    if args.by != "pass":
        _unread(args, f"--by {args.by}", "it draws no answers", DRAWN)
    how = dict(by=args.by, rubrics=args.rubric, draw=_drawing(args) if args.by == "pass" else None)
    grade(args.file, judge=args.judge, grades=args.grades, samples=args.drawn, **how, **_read(args))


def _select(args: argparse.Namespace) -> None:
    from llamax.config import ConfigError
    from llamax.post.select import PRESETS, select

    if args.preset and (args.keep is not None or args.band):
        true = "a preset says how much is kept"
        raise ConfigError(f"--preset {args.preset} with --keep or --band", true, "Leave one of them out.")
    keep = PRESETS[args.preset] if args.preset else 1.0 if args.keep is None else args.keep
    by = args.by or ("difficulty" if args.preset else None)
    if by is None:
        of_grades = {"--end": None, "--judge": None, "--grades": None, "--band": None}
        _unread(args, "select without --by", "without grades records have no order that means anything", of_grades)
    tags = dict(keep_tags=args.keep_tag, drop_tags=args.drop_tag)
    how = dict(by=by, keep=keep, band=args.band, end=args.end, per_domain=args.per_domain, judge=args.judge)
    select(args.file, args.out, grades=args.grades, **how, **tags)


def _sample(args: argparse.Namespace) -> None:
    from llamax.post.sample import sample

    judged = dict(judge=args.judge, rubric_name=args.rubric, at_least=args.at_least)
    how = dict(keep=args.keep, similar=args.similar, samples=args.drawn)
    sample(args.file, args.out, model=args.model, draw=_drawing(args), **how, **judged, **_read(args))


def _pairs(args: argparse.Namespace) -> None:
    from llamax.post.corners import CORNERS
    from llamax.post.pairs import pairs

    corners = CORNERS if args.corners is None else tuple(filter(None, args.corners))
    how = dict(corners=corners, rule_share=args.rule_share, samples=args.drawn)
    pairs(args.file, args.out, model=args.model, draw=_drawing(args), **how, **_read(args))


# Options of what is drawn, and what they are if they are not given.
DRAWN = {"--samples": 8, "--max-tokens": 256, "--temperature": 1.0, "--top-p": 1.0, "--seed": 0, "--drawn": None}


def _unread(args: argparse.Namespace, asked: str, true: str, defaults: dict[str, Any]) -> None:
    """ConfigError for the first of these options that is given and that nothing would read."""
    from llamax.config import ConfigError

    for option, default in defaults.items():
        if getattr(args, option.strip("-").replace("-", "_")) != default:
            raise ConfigError(
                f"{asked} with {option}", f"{true}, and {option} would do nothing", f"Leave {option} out."
            )


def _drawing(args: argparse.Namespace) -> Any:
    from llamax.post.drawing import Drawing
    from llamax.sample.engine import Sampling

    return Drawing(args.samples, args.max_tokens, Sampling(args.temperature, args.top_p, args.seed))


def _read(args: argparse.Namespace) -> dict[str, Any]:
    return dict(step=args.step, dtype=args.dtype, batch_size=args.batch_size, max_tokens=args.max_length)


# -------------------------------------------------------------------------------------------------------- the parser


def add(verbs: Any) -> None:
    """The words of the five commands."""
    about = "write a manifest's records as lines of JSON, their pictures as files beside: what can be graded and chosen"
    unpack = command(verbs, "unpack", _unpack, about, UNPACK)
    unpack.add_argument("manifest", metavar="MANIFEST", help="a .toml file, of shards or of lines")
    unpack.add_argument("--out", required=True, type=named, metavar="FILE", help="the file to write (.jsonl)")
    unpack.add_argument("-n", "--records", type=count, default=0, metavar="N", help="the first N alone (all)")

    about = "grade conversations by a judge and a rubric, a model's loss, a reward model, or how often a model is right"
    grade = command(verbs, "grade", _grade, about, GRADE)
    grade.add_argument("file", metavar="FILE", help=FILE)
    grade.add_argument("--judge", required=True, type=named, metavar="CKPT", help=MODEL)
    by = "rubric: what the judge answers; loss: its loss on the answers; reward: what a reward model gives them; "
    by += "pass: how often it is right (%(default)s)"
    grade.add_argument("--by", choices=("rubric", "loss", "reward", "pass"), default="rubric", help=by)
    rubric = "a TOML file, or one of data/rubrics by name: difficulty, quality, safety; may be given several times"
    grade.add_argument("--rubric", action="append", default=[], metavar="R", help=rubric)
    _drawn(grade, samples="pass: answers to each prompt (%(default)s)")
    grade.add_argument("--grades", type=named, metavar="FILE", help="where grades are kept (FILE.grades.jsonl)")
    _model(grade)

    about = "choose a part of a file by its grades or tags; a new file, and a report"
    select = command(verbs, "select", _select, about, SELECT)
    select.add_argument("file", metavar="FILE", help=FILE)
    select.add_argument("--out", required=True, type=named, metavar="FILE", help="the file to write (.jsonl)")
    presets = "llama4 keeps the hardest half, behemoth the hardest 5%%, of each --by (difficulty)"
    select.add_argument("--preset", choices=("llama4", "behemoth"), help=presets)
    select.add_argument("--by", metavar="GRADE", help="the grade that ranks: a rubric's name, loss or pass")
    select.add_argument("--keep", type=float, metavar="X", help="the share that is kept (1)")
    band = "instead: from and to which share of the ranking, as 0.2,0.8"
    select.add_argument("--band", type=_band, metavar="X,X", help=band)
    select.add_argument("--end", choices=("high", "low"), help="which grades are kept (what the grade says)")
    select.add_argument("--per-domain", action="store_true", help="the share of each domain, not of all")
    select.add_argument(
        "--keep-tag", action="append", default=[], metavar="TAG", help="keep records with this tag only"
    )
    select.add_argument("--drop-tag", action="append", default=[], metavar="TAG", help="keep no record with this tag")
    select.add_argument("--judge", metavar="NAME", help="whose grades, as the file of grades names it (the last one's)")
    select.add_argument("--grades", type=named, metavar="FILE", help="where grades are kept (FILE.grades.jsonl)")

    about = "rejection sampling: draw answers, keep the best of the right ones as data to tune on"
    sample = _made(command(verbs, "sample", _sample, about, SAMPLE))
    sample.add_argument("--keep", type=count, default=1, metavar="N", help="answers of a prompt, at most (%(default)s)")
    near = "leave out an answer that shares so much with a better one, 0 to 1 (%(default)s)"
    sample.add_argument("--similar", type=float, default=0.8, metavar="X", help=near)
    judge = f"a model that grades answers, without --rubric a reward model: {MODEL}"
    sample.add_argument("--judge", type=named, metavar="CKPT", help=judge)
    sample.add_argument("--rubric", metavar="R", help="what the judge is asked, as of `llamax data grade`")
    sample.add_argument("--at-least", type=float, metavar="X", help="the least grade that is kept")

    about = "make comparisons: draw answers, the right against the wrong, ill-formed, over-long and refusing ones"
    pairs = _made(command(verbs, "pairs", _pairs, about, PAIRS))
    corners = 'besides wrong answers (format,long,refusal); "" for none'
    pairs.add_argument("--corners", type=words, metavar="NAME,NAME", help=corners)
    share = "records that get a corner by rule where no sample shows one, 0 to 1 (%(default)s)"
    pairs.add_argument("--rule-share", type=float, default=0.1, metavar="X", help=share)


def _made(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What both take that draw answers to write a file of them."""
    made.add_argument("file", metavar="FILE", help=f"{FILE}; a last answer is taken off, and asked for again")
    made.add_argument("--model", required=True, type=named, metavar="CKPT", help=MODEL)
    made.add_argument("--out", required=True, type=named, metavar="FILE", help="the file to write (.jsonl)")
    _drawn(made, samples="answers to each prompt (%(default)s)")
    _model(made)
    return made


def _drawn(parser: argparse.ArgumentParser, *, samples: str) -> None:
    parser.add_argument("-k", "--samples", type=count, default=8, metavar="K", help=samples)
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of an answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of the sampling (%(default)s)")
    nucleus = "sample among the likeliest tokens that have this probability together (%(default)s)"
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help=nucleus)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (%(default)s)")
    parser.add_argument("--drawn", type=named, metavar="FILE", help="where answers are kept (FILE.samples.jsonl)")


def _model(parser: argparse.ArgumentParser) -> None:
    together = "texts that are worked on together, rounded down to a power of two (%(default)s)"
    parser.add_argument("--batch-size", type=count, default=8, metavar="N", help=together)
    most = "leave out what has more tokens (%(default)s)"
    parser.add_argument("--max-length", type=count, default=8192, metavar="N", help=most)
    parser.add_argument("--step", type=int, metavar="N", help="of a run (the newest sound checkpoint)")
    parser.add_argument("--dtype", default="float32", metavar="TYPE", help=PRECISION)


def _band(text: str) -> tuple[float, float]:
    low, comma, high = text.partition(",")
    try:
        return float(low), float(high if comma else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no two shares, as 0.2,0.8") from None


UNPACK = """
    llamax data unpack data/built/instructions.toml --out data/instructions.jsonl
    llamax data unpack data/built/instructions.toml -n 200 --out data/some.jsonl
"""
GRADE = """
    llamax data grade chat.jsonl --judge models/scout_chat --rubric difficulty --rubric quality
    llamax data grade chat.jsonl --judge runs/quickstart --by loss
    llamax data grade sums.jsonl --judge runs/sft --by pass -k 8 --max-tokens 64
    llamax data grade chat.jsonl --judge runs/reward --by reward
"""
SELECT = """
    llamax data select chat.jsonl --preset llama4 --per-domain --out hard.jsonl
    llamax data select sums.jsonl --by pass --band 0.2,0.8 --out medium.jsonl
    llamax data select chat.jsonl --by loss --keep 0.5 --drop-tag unsafe --out unknown.jsonl
"""
SAMPLE = """
    llamax data sample sums.jsonl --model runs/sft -k 16 --out drawn.jsonl
    llamax data sample chat.jsonl --model runs/sft --judge models/judge --rubric quality --at-least 4 --out drawn.jsonl
    llamax data sample chat.jsonl --model runs/sft --judge runs/reward -k 16 --out drawn.jsonl
"""
PAIRS = """
    llamax data pairs sums.jsonl --model runs/sft -k 16 --out pairs.jsonl
    llamax data pairs sums.jsonl --model runs/sft --corners format,refusal --rule-share 0.3 --out pairs.jsonl
"""
