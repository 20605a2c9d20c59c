"""`llamax eval`: evaluations of the model in any folder that holds one, as a table, JSON and PNG files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from llamax import config, loading, stages
from llamax.checkpoint.hf_read import Source
from llamax.checkpoint.saved import Saved
from llamax.checks.evals import check_alone, readers, reads
from llamax.config import ConfigError
from llamax.config_dict import nearest
from llamax.data.sources import read_manifest
from llamax.evals import CHECKS, EVALS, Context, Report
from llamax.observe import log, plots, provenance
from llamax.observe.progress import track, waiting
from llamax.positions import changed

COMPARISONS = 8  # a row, where a model that knows of none is asked for its preferences
OF_CONFIG = re.compile(r"--config\.evals\.\w+\.(\w+)(=?)")


def evaluate(
    folder: str | Path,
    kinds: Sequence[str] = (),
    *,
    recipe: str | None = None,
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    step: int | None = None,
    dtype: str = "float32",
    positions: Mapping[str, Any] | None = None,
) -> dict[str, Report]:
    """The reports, by name, of what `kinds` names: kinds of evaluations, or the run's own (or the recipe's) by name.

    Without any, all of these. `settings` replace fields of `config.Eval` in the evaluations that read them; `positions`
    change how the model reads positions, as in `llamax.load`. With `out`, NAME.json and a PNG for each plot are written
    there, one evaluation after the other as they end. One device does it.

    Raises:
        ConfigError: there is no such model or evaluation, or it cannot be done with its settings, model or data; before
            any work.
    """
    log.setup()
    found = loading.find(folder, step)
    run = run_of(found, dtype, recipe)
    evals = chosen(run, kinds, dict(settings or {}), folder)
    model_changed = changed(run.model, positions) if positions else run.model
    run = dataclasses.replace(run, evals=evals, model=model_changed, data=comparing(run.data, evals))
    check(run)
    if out is not None:
        _make(Path(out))
    with waiting(f"loading {folder}"):
        model = loading.load(folder, dtype=dtype, step=step, positions=positions)
    assert model.tokenizer is not None  # `run_of` has found it
    weights = dict(params=model.params, router_bias=model.router_bias, track=track)
    ctx = Context(run, model.skeleton, model.skeleton, model.tokenizer, jax.device_put, 1, **weights)
    about = {"model": str(folder), "step": found.step, "dtype": dtype, "positions": dict(positions or {})}
    about |= {"versions": provenance.versions()}
    reports = {}
    for name, cfg in evals.items():
        reports[name] = EVALS[cfg.kind](ctx, cfg)
        if out is not None:
            write(Path(out), name, cfg, reports[name], about)
    show(f"{folder}", reports)
    return reports


def run_of(found: loading.Found, dtype: str, recipe: str | None) -> config.Run:
    """The run that the model belongs to, as the stage of its step was, or one that is made up around the model.

    Its evaluations are the run's own, or those of the recipe.
    """
    model, tokenizer = found.said.model, _tokenizer(found.said)
    said = provenance.read(found.said.folder)
    if said is not None:
        run = config.from_dict(config.Run, said["config"])
        evals = run.evals
        assert found.step is not None, "a run's weights are those of a step"
        run = stages.at(run, found.step).run
    else:
        evals, tiles = {}, model.vision.max_tiles + 1 if model.vision else 1
        data = config.Data(seq_len=2048, batch_tokens=4 * 2048, tiles_per_row=max(32, tiles))
        run = config.Run(name="model", data=data)
    data = dataclasses.replace(run.data, tokenizer=str(tokenizer), ref_logp="")
    if recipe is not None:
        theirs = config.freeze(config.load(recipe))
        evals = theirs.evals
        if theirs.data.comparisons_per_row:  # both answers fit in its rows
            rows = {name: getattr(theirs.data, name) for name in ("seq_len", "batch_tokens", "comparisons_per_row")}
            data = dataclasses.replace(data, **rows, tiles_per_row=theirs.data.tiles_per_row)
    train = dataclasses.replace(run.train, compute_dtype=dtype)
    return dataclasses.replace(run, model=model, data=data, train=train, evals=evals, stages={})


def comparing(data: config.Data, evals: Mapping[str, config.Eval]) -> config.Data:
    """The rows, with room for comparisons where an evaluation reads some."""
    reads_some = any(cfg.kind in ("preference", "reward") for cfg in evals.values())
    return dataclasses.replace(data, comparisons_per_row=data.comparisons_per_row or COMPARISONS * reads_some)


def _tokenizer(found: Saved | Source) -> Path:
    tokenizer = loading.tokenizer_of(found)
    if tokenizer is None:
        change = "Put the model's tokenizer.model (tiktoken's format) or tokenizer.json beside it."
        raise ConfigError(f"Evaluations of the model in {found.folder}", "it has no tokenizer that can be read", change)
    return Path(tokenizer.path)


def chosen(
    run: config.Run, names: Sequence[str], settings: dict[str, Any], folder: str | Path
) -> dict[str, config.Eval]:
    """What is asked for, with its settings and the paths of this machine. ConfigError if there is no such thing."""
    known = (*run.evals, *(kind for kind in config.EVAL_KINDS if kind not in run.evals))
    if not names and not run.evals:
        true = "it is no run that has evaluations of its own"
        change = f"Name one: {', '.join(config.EVAL_KINDS)}; or --recipe."
        raise ConfigError(f"Evaluations of {folder}", true, change)
    evals = {}
    for name in dict.fromkeys(names or run.evals):
        if name not in known:
            true, close = f"there are {', '.join(known)}", nearest(name, known) or known[0]
            raise ConfigError(f"evaluation {name!r}", true, f"Did you mean {close!r}?")
        cfg = run.evals.get(name) or config.Eval(kind=name)
        cfg = dataclasses.replace(cfg, **{field: v for field, v in settings.items() if reads(cfg.kind, field)})
        if not cfg.path:
            asked, true = f"evaluation {name!r} without --data", "it needs a manifest of held-out text"
            raise ConfigError(asked, true, "Give --data data/built/docs_heldout.toml.")
        evals[name] = dataclasses.replace(cfg, path=str(config.resolve_path(cfg.path)))
    for field, value in settings.items():
        if not any(reads(cfg.kind, field) for cfg in evals.values()):
            asked, true = f"{_option(field)} {value} for {', '.join(evals)}", f"{readers(field)} alone read it"
            raise ConfigError(asked, true, "Leave it out, or name one of these.")
    return evals


def check(run: config.Run) -> None:
    """ConfigError, in words of the command line, for what cannot be evaluated."""
    try:
        check_alone(run)
        for cfg in run.evals.values():
            read_manifest(cfg.path)
            if cfg.kind in CHECKS:
                CHECKS[cfg.kind](run, cfg)
    except ConfigError as error:
        raise ConfigError(*map(_as_option, (error.asked, error.true, error.change))) from None


def _as_option(text: str) -> str:
    """--config.evals.needle.cache_gb=4 as --cache-gb 4."""
    return OF_CONFIG.sub(lambda m: f"{_option(m[1])}{' ' if m[2] else ''}", text)


def _option(field: str) -> str:
    return f"--{OPTIONS.get(field, field).replace('_', '-')}"


OPTIONS = {"path": "data"}  # fields of config.Eval whose option has another name


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}", f"it cannot be made: {error}", "Choose another folder.") from None


def write(out: Path, name: str, cfg: config.Eval, report: Report, about: Mapping[str, Any]) -> None:
    """NAME.json, and NAME.png or, of several plots, NAME_PLOT.png."""
    said = dict(about) | {"evaluation": name, "settings": config.to_dict(cfg), "scalars": report.scalars}
    said |= {"rows": report.rows, **report.details}
    provenance.write_whole(out / f"{name}.json", json.dumps(said, indent=2, default=float) + "\n")
    for plot, picture in report.plots.items():
        file = f"{name}.png" if len(report.plots) == 1 else f"{name}_{plot}.png"
        (out / file).write_bytes(plots.png(picture))


def show(title: str, reports: Mapping[str, Report]) -> None:
    shown = Table(title=title)
    for heading in ("evaluation", "what", "model", "compared with"):
        shown.add_column(heading)
    for name, report in reports.items():
        for row in report.rows:
            shown.add_row(name, *row)
    log.CONSOLE.print(shown)
