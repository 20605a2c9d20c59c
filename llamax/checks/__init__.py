"""Every check that the configuration alone decides: what stands behind `config.freeze` and `config.check_devices`.

What holds for one field alone is a row of a table in fields.py; relations between fields are one short function each,
here or in the file of their section. No jax: they run before a device is touched.
"""

from __future__ import annotations

import dataclasses
import math

from llamax import stages, stripes
from llamax.checks import evals, mesh, model, preference, rows, tune
from llamax.checks.fields import MOST_TOKENS, MOST_WEIGHT, each, manifest, named, walk
from llamax.config import Model, Optim, Run
from llamax.config_dict import ConfigError, nearest_multiple


def check(run: Run) -> None:
    """Raises ConfigError at the first setting, or pair of settings, that cannot work."""
    each(walk(dataclasses.replace(run, stages={})))
    if not run.name:
        raise ConfigError("--config.name=''", "a run has a name", "Set --config.name to the recipe's name.")
    if run.stages:
        _stages(run)
        return
    model.check(run.model)
    rows.check(run)
    _sources(run)
    _schedule(run)
    _moments(run.optim)
    tune.check(run)
    mesh.check(run)
    evals.check(run)
    _checkpoint(run)
    preference.check(run)


def check_model(alone: Model) -> None:
    """The same for a model by itself."""
    each(walk(alone, "model", "model"))
    model.check(alone)


# ---------------------------------------------------------------------------------------------------------- the data


def _sources(run: Run) -> None:
    if not run.data.sources:
        change = "Name a manifest in the recipe: run.data.sources = dict(web=dict(path='data/web.toml', weight=1.0))."
        raise ConfigError("--config.data.sources={}", "a run reads at least one source", change)
    for name, source in run.data.sources.items():
        here = f"--config.data.sources.{name}"
        named(name, "source", "data.sources")
        manifest(here, source.path)
        _later(here, source.later)
    sources = run.data.sources
    for tokens in sorted({0.0} | {tokens for source in sources.values() for tokens, _ in source.later}):
        weights = [source.weight_at(tokens) for source in sources.values()]
        if not 0 < sum(weights) < math.inf:  # in between they are, too, if they are at every point
            asked, true = f"data.sources with weights {weights}", "no shares of tokens can be made of them"
            if not tokens:
                raise ConfigError(asked, true, f"Set {here}.weight=1.")
            constant = next(name for name, source in sources.items() if source.weight)
            change = f"Let one weigh more then, or leave --config.data.sources.{constant}.later out."
            raise ConfigError(f"{asked} after {tokens:g} tokens", true, change)


def _later(here: str, later: tuple) -> None:
    """A schedule is (tokens, weight), ...: more tokens at every point, finite weights."""
    reached = 0
    example = f'Write it like {here}.later="((1e9, 0.5), (2e9, 0.1))".'
    for point in later:
        if not (isinstance(point, tuple) and len(point) == 2 and all(type(x) in (int, float) for x in point)):
            raise ConfigError(f"{point!r} in {here}.later", "a point of a schedule is (tokens, weight)", example)
        tokens, weight = point
        if not reached < tokens <= MOST_TOKENS:
            after = f"it is more than {reached:g} tokens, where the point before is, and at most {MOST_TOKENS:g}"
            raise ConfigError(f"{point!r} in {here}.later", after, example)
        if not 0 <= weight <= MOST_WEIGHT:
            true = f"a weight is 0 or more, and at most {MOST_WEIGHT:g}"
            raise ConfigError(f"{point!r} in {here}.later", true, example)
        reached = tokens


# -------------------------------------------------------------------------------------------------------- the stages


def _stages(run: Run) -> None:
    """Each stage is a run that works; rows grow from stage to stage, and hold whole chunks."""
    if run.train.steps:
        asked, true = f"--config.train.steps={run.train.steps}", "the run has stages, whose tokens say how long it is"
        raise ConfigError(asked, true, "Set --config.train.steps=0, and --config.stages.NAME.tokens.")
    for name in run.stages:
        named(name, "stage", "stages")
    before, seq_len, chunk_len, found = "the run", run.data.seq_len, run.model.chunk_len, stages.parts(run)
    _rows_of_all(found)
    for part in found:
        with stages.in_stage(part.name):
            check(part.run)
            _grows("data.seq_len", part.run.data.seq_len, seq_len, before)
            _grows("model.chunk_len", part.run.model.chunk_len, chunk_len, before)
            _whole_chunks(part.run)
        before, seq_len, chunk_len = part.name, part.run.data.seq_len, part.run.model.chunk_len


def _rows_of_all(parts: list[stages.Part]) -> None:
    """Tokens a step are the same in all stages: whole rows of each, for what suits one may not suit the next."""
    for part in parts:
        with stages.in_stage(part.name):
            each(walk(part.run))
    for part in parts:
        data = part.run.data
        if data.batch_tokens % data.seq_len:
            unit = math.lcm(*(other.run.data.seq_len * other.run.train.accumulate for other in parts))
            asked = f"--config.data.batch_tokens={data.batch_tokens}"
            true = f"rows of {part.name} have seq_len={data.seq_len} tokens, and a step is whole rows in each"
            fits = nearest_multiple(unit, data.batch_tokens)
            raise ConfigError(asked, true, f"Set --config.data.batch_tokens={fits}.")


def _grows(field: str, here: int, there: int, before: str) -> None:
    if here < there:
        asked, true = f"--config.{field}={here}", f"stages do not shrink, and {before}, which comes before, has {there}"
        change = f"Set --config.{field}={there} or more, or name the stages in the order in which they come."
        raise ConfigError(asked, true, change)


def _whole_chunks(run: Run) -> None:
    """A row longer than a chunk holds whole chunks: what is left over would be a chunk that is never trained whole."""
    chunk, seq_len = stripes.chunk_len(run.model), run.data.seq_len
    if chunk and seq_len > chunk and seq_len % chunk:
        asked, true = f"--config.data.seq_len={seq_len}", f"local layers see chunks of model.chunk_len={chunk} tokens"
        raise ConfigError(asked, true, f"Set --config.data.seq_len={nearest_multiple(chunk, seq_len)}.")


# --------------------------------------------------------------------------------------- the schedule, checkpoints


def _schedule(run: Run) -> None:
    optim, steps = run.optim, run.train.steps
    if steps <= optim.begins:
        asked, true = (
            f"--config.train.steps={steps}",
            f"it is more than {optim.begins}, the steps before the schedule begins",
        )
        raise ConfigError(asked, true, f"Set --config.train.steps={optim.begins + 1} or more.")
    steps -= optim.begins
    if optim.warmup_steps >= steps:
        asked, true = f"--config.optim.warmup_steps={optim.warmup_steps}", f"the run has train.steps={run.train.steps}"
        true += f", {optim.begins} of them before the schedule begins" if optim.begins else ""
        raise ConfigError(asked, true, f"Set --config.optim.warmup_steps={steps // 10}, or raise --config.train.steps.")
    if optim.schedule == "wsd":
        rest = steps - optim.warmup_steps
        if not 1 <= optim.decay_steps <= rest:
            asked = f"--config.optim.decay_steps={optim.decay_steps}"
            true = f"wsd decays over 1 to {rest} steps, those after the warm-up ({steps} - {optim.warmup_steps})"
            raise ConfigError(asked, true, f"Set --config.optim.decay_steps={max(1, rest // 5)}.")


def _moments(optim: Optim) -> None:
    """bfloat16 rounds a change of less than 2^-9 of a number away: a moment that decays by less would never shrink."""
    for field in ("b1", "b2"):
        decay, most = getattr(optim, field), 1 - 2**-8
        if optim.moments_dtype == "bfloat16" and decay > most:
            asked = f"--config.optim.{field}={decay} with moments_dtype=bfloat16"
            true = f"bfloat16 rounds what such a moment loses in a step away; it is at most {most:.3f}"
            raise ConfigError(asked, true, f"Set --config.optim.{field}=0.995, or moments_dtype=float32.")


def _checkpoint(run: Run) -> None:
    every, for_good = run.checkpoint.every_steps, run.checkpoint.keep_every_steps
    if for_good % every:
        asked = f"--config.checkpoint.keep_every_steps={for_good}"
        true = f"checkpoints are written every {every} steps (checkpoint.every_steps)"
        fits = nearest_multiple(every, for_good)
        raise ConfigError(asked, true, f"Set --config.checkpoint.keep_every_steps={fits}.")
