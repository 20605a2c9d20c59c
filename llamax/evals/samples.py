"""Samples of tasks (llamax/data/tasks) as the evaluations of long contexts ask them, and what the model says.

A sample follows from the evaluation's seed, its task, length, depth and number alone. All prompts of a length are read
in the same shapes, whatever their task, so each program is compiled at most once a length; one that reads pieces twice,
if some of them have pictures and some have not. What may be asked at once is bounded by the cache's budget.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from llamax import config
from llamax.config import ConfigError
from llamax.config_dict import nearest
from llamax.data.encode import Encoder
from llamax.data.sources import SKIP_REASONS, Document, open_source, read_manifest
from llamax.data.tasks import RULER, TASKS, Sample, Texts, Tokens, score
from llamax.data.tasks.sample import TooShort
from llamax.data.tasks.source import check_options
from llamax.evals.report import Context
from llamax.model.count import cache_bytes
from llamax.sample.engine import Prompt, generate
from llamax.sample.reading import most_tiles, rounded

BEYOND = 16  # tokens that may be said beside the answer
MOST_ROWS = 32  # prompts worked on together

Make = Callable[[random.Random, int, float | None], Sample]  # (rng, length, depth)


class Said(NamedTuple):
    """A sample, what the model said to it, and its score, 0 to 1."""

    sample: Sample
    text: str
    score: float


# ------------------------------------------------------------------------------------------ before anything is done


def check(run: config.Run, cfg: config.Eval, own: Sequence[str]) -> None:
    """ConfigError if a task does not exist, needs eyes, or cannot be made at a length; if a length does not fit the
    cache's budget; or if a setting is of no task that is asked."""
    for name in (*cfg.tasks, *cfg.options):
        if name not in TASKS:
            true = f"the tasks are {', '.join(TASKS)}"
            raise ConfigError(f"task {name!r}", true, f"Did you mean {nearest(name, TASKS) or 'needle'!r}?")
        if TASKS[name].pictures and run.model.vision is None:
            raise ConfigError(
                f"task {name!r}", "it shows pictures, and the model has no vision encoder", "Leave it out."
            )
    asked = cfg.tasks or own
    for name, options in cfg.options.items():
        check_options(name, options, f"{cfg.kind} evaluation", "options")
        if name not in asked:
            true = f"its tasks are {', '.join(asked)}"
            change = f"Take them out, or add {name} to its tasks."
            raise ConfigError(f"options of task {name} in a {cfg.kind} evaluation", true, change)
    if cfg.templates == "held_out" and all(name in RULER for name in asked):
        true = "RULER's tasks have one wording each, and no task of ours is among its tasks"
        raise ConfigError(f"{cfg.kind} evaluation with templates=held_out", true, "Set templates=seen.")
    check_cache(run, cfg, cfg.lengths[-1] + BEYOND)
    for name, make in makers(run, cfg, own).items():
        for length in cfg.lengths:
            for depth in (0.0, 1.0) if length == cfg.lengths[0] else (0.0,):  # a long sample takes seconds to make
                _try(cfg, name, make, length, depth)


def _try(cfg: config.Eval, name: str, make: Make, length: int, depth: float) -> None:
    """Makes the first sample. ConfigError, with task and length, if there is none: the text may lack room or words."""
    try:
        make(rng(cfg, name, length, depth, 0), length, depth)
    except ConfigError as error:
        true = error.true if isinstance(error, TooShort) else f"{error.asked}: {error.true}"
        raise ConfigError(f"{cfg.kind} evaluation, task {name} at {length} tokens", true, error.change) from None


def check_cache(run: config.Run, cfg: config.Eval, length: int) -> None:
    """ConfigError if one row of that length is more than the cache's budget."""
    most, needed = cfg.cache_gb * 1e9, row_bytes(run, length)
    if needed <= most:
        return
    fits = max((n for n in range(64, length, 64) if row_bytes(run, n) <= most), default=0)
    asked = f"{cfg.kind} evaluation at {cfg.lengths[-1]} tokens"
    true = f"keys and values of one row take {needed / 1e9:.3g} GB and cache_gb is {cfg.cache_gb:g}"
    raise ConfigError(
        asked,
        true,
        f"Set cache_gb={needed * 1.01 / 1e9:.3g} (--cache-gb), or lengths of at most {max(0, fits - BEYOND)}.",
    )


def row_bytes(run: config.Run, length: int) -> int:
    """Bytes of cache that a row of so many tokens takes, with the room that it is rounded up to."""
    return cache_bytes(run.model, rounded(length), 4 if run.train.compute_dtype == "float32" else 2)


def rows_at(run: config.Run, cfg: config.Eval, length: int, n: int) -> int:
    """Rows that are worked on together of n: as many as the cache's budget holds, a power of two."""
    most = min(int(cfg.cache_gb * 1e9) // row_bytes(run, length), MOST_ROWS)
    return min(1 << (max(1, most).bit_length() - 1), 1 << (n - 1).bit_length())


# ----------------------------------------------------------------------------------------------------------- samples


def makers(run: config.Run, cfg: config.Eval, own: Sequence[str]) -> dict[str, Make]:
    """The evaluation's tasks by name, bound to its filler; `own` are the kind's if it names none."""
    tokens = Tokens(str(config.resolve_path(run.data.tokenizer)), run.model.vision)
    filler = Texts(open_source(read_manifest(config.resolve_path(cfg.path)), tokens))

    def bound(name: str) -> Make:
        task = TASKS[name].with_options(cfg.options.get(name, {}))
        return lambda rng, length, depth: task(rng, filler, length, depth, tokens, "eval", cfg.templates)

    return {name: bound(name) for name in cfg.tasks or own}


def rng(cfg: config.Eval, task: str, length: int, depth: float | None, number: int) -> random.Random:
    return random.Random(f"{cfg.seed}/{task}/{length}/{depth}/{number}")


def made(cfg: config.Eval, makers: Mapping[str, Make], length: int, depths: Sequence[float | None]) -> list[Sample]:
    """Task after task, depth after depth, `cfg.samples` of each; each says in its meta what it was asked to be."""
    found = []
    for task, make in makers.items():
        for depth in depths:
            for number in range(cfg.samples):
                sample = make(rng(cfg, task, length, depth, number), length, depth)
                found.append(sample._replace(meta=sample.meta | {"task": task, "length": length, "asked_depth": depth}))
    return found


def prompt_of(ctx: Context, pieces: Sequence) -> Prompt:
    """Tokens and tiles of pieces, behind the begin-of-text id."""
    encoder = Encoder(
        ctx.tokenizer.path, ctx.run.model.vision, where="a sample", video_frames=ctx.run.data.video_frames
    )
    encoded = encoder(Document(tuple(pieces)))
    assert not encoded.skip, f"{SKIP_REASONS[encoded.skip]}: {encoded.where}"
    return Prompt(encoded.tokens[:-1].tolist(), encoded.tiles)  # without the end-of-text id


def answer_of(ctx: Context, sample: Sample) -> list[int]:
    """What should be said, as tokens."""
    return ctx.tokenizer.encode(sample.meta["said"])


# ------------------------------------------------------------------------------------------------------------ asking


def asked(ctx: Context, cfg: config.Eval, samples: Sequence[Sample], length: int) -> list[Said]:
    """What the model says to samples of one length (0: whatever theirs is), greedily, and its scores."""
    max_tokens = max(len(answer_of(ctx, sample)) for sample in samples) + BEYOND
    prompts = [prompt_of(ctx, sample.pieces) for sample in samples]
    longest = max(length, *(len(prompt.tokens) for prompt in prompts))
    rows = rows_at(ctx.run, cfg, longest + max_tokens, len(prompts))
    how = dict(max_tokens=max_tokens, stop=ctx.tokenizer.stop, rows=rows, length=longest, tiles=most_tiles(prompts))
    how |= dict(row_multiple=-(-rows // ctx.row_multiple) * ctx.row_multiple)
    said = []
    where = f"at {length} tokens" if length else "without context"
    for first in ctx.track(range(0, len(prompts), rows), f"{cfg.kind} {where}"):
        ctx.check_stop()
        some = prompts[first : first + rows]
        found = generate(ctx.sampler, ctx.params, ctx.router_bias, some, **how)
        said += [ctx.tokenizer.decode(completion.text) for (completion,) in found]
    return [Said(sample, text, score(sample, text)) for sample, text in zip(samples, said, strict=True)]


def asked_blind(ctx: Context, cfg: config.Eval, samples: Sequence[Sample]) -> list[Said]:
    """The same without the context: what the question alone gives away, or luck."""
    return asked(ctx, cfg, [sample._replace(pieces=sample.pieces[-1:]) for sample in samples], 0)


def mean(said: Sequence[Said]) -> float:
    return sum(one.score for one in said) / len(said)


def by(said: Sequence[Said], *keys: str) -> dict[tuple, list[Said]]:
    """What was said, by entries of its samples' meta."""
    found: dict[tuple, list[Said]] = {}
    for one in said:
        found.setdefault(tuple(one.sample.meta[key] for key in keys), []).append(one)
    return found


def examples(said: Sequence[Said], n: int = 3) -> list[dict]:
    """Some of what was said, for people: the end of the question, what should have been said, and what was."""
    return [
        {
            "task": one.sample.meta["task"],
            "length": one.sample.meta["length"],
            "asked": str(one.sample.pieces[-1])[-200:],
            "answers": list(one.sample.answers),
            "said": one.text,
            "score": one.score,
        }
        for one in said[:: max(1, len(said) // n)][:n]
    ]
