"""Checks of `config.Eval`: fields that the kind of evaluation reads, lengths that it can have."""

from __future__ import annotations

from llamax.checks.fields import MOST_WHOLE, each, manifest, named, walk
from llamax.config import EVAL_KINDS, Eval, Run
from llamax.config_dict import ConfigError, divisors


def check_alone(run: Run) -> None:
    """The part of `check` that is about `run.evals`, for a model that is evaluated and was not trained here."""
    each(walk(run.evals, "evals", "evals"))
    check(run)


def check(run: Run) -> None:
    for name, evaluation in run.evals.items():
        here = f"--config.evals.{name}"
        named(name, "evaluation", "evals")
        manifest(here, evaluation.path)
        if evaluation.kind == "drawings" and run.model.vision is None:
            true = "it shows pictures, and the model has no vision encoder"
            raise ConfigError(f"{here}.kind={evaluation.kind}", true, f"Set {here}.kind=perplexity.")
        if not all(isinstance(task, str) for task in evaluation.tasks):
            asked, true = f"{here}.tasks={evaluation.tasks}", "they are names of tasks"
            raise ConfigError(asked, true, f"""Write it like {here}.tasks="('needle',)".""")
        for field in READ_BY:
            value = getattr(evaluation, field)
            if not reads(evaluation.kind, field) and value != getattr(Eval(), field):
                true = f"{readers(field)} alone read it, and this is a {evaluation.kind} evaluation"
                change = f"Take it out, or set {here}.kind={READ_BY[field][0]}."
                raise ConfigError(f"{here}.{field}={value}", true, change)
        if evaluation.kind in LONG_KINDS:
            _lengths(here, evaluation)


LONG_KINDS = ("needle", "ruler", "position", "answer")  # those with lengths
TASK_KINDS = ("needle", "ruler", "answer")
READ_BY = {  # fields of an evaluation that some kinds alone read
    "max_docs": ("perplexity", "drawings", "position", "preference", "reward", "instructions"),
    "max_tokens": ("instructions",),
    "lengths": LONG_KINDS,
    "cache_gb": LONG_KINDS,
    "buckets": ("position",),
    **dict.fromkeys(("samples", "tasks", "options", "templates", "seed"), TASK_KINDS),
    "depths": ("needle",),
    **dict.fromkeys(("qa", "threshold"), ("ruler",)),
}


def reads(kind: str, field: str) -> bool:
    """Whether evaluations of a kind look at a field of theirs."""
    return kind in READ_BY.get(field, EVAL_KINDS)


def readers(field: str) -> str:
    *most, last = READ_BY[field]
    return f"evaluations of the kind {', '.join(most)} or {last}" if most else f"{last} evaluations"


def _lengths(here: str, evaluation: Eval) -> None:
    lengths = evaluation.lengths
    asked, shape = f"{here}.lengths={lengths}", f'Write it like {here}.lengths="(1024, 4096)".'
    if not lengths:
        raise ConfigError(asked, f"a {evaluation.kind} evaluation is of some length", shape)
    if not all(type(n) is int and 1 <= n <= MOST_WHOLE for n in lengths) or list(lengths) != sorted(set(lengths)):
        raise ConfigError(asked, "they are numbers of tokens, the smaller ones first", shape)
    if evaluation.kind == "position":
        if len(lengths) > 1:
            raise ConfigError(asked, "a position evaluation has one", f'Set {here}.lengths="({lengths[-1]},)".')
        if lengths[0] % evaluation.buckets or lengths[0] < 2 * evaluation.buckets:
            asked, true = (
                f"{here}.buckets={evaluation.buckets}",
                f"they are equal parts of {lengths[0]} tokens, 2 or more",
            )
            fits = min(
                (d for d in divisors(lengths[0]) if 2 * d <= lengths[0]),
                key=lambda d: abs(d - evaluation.buckets),
                default=0,
            )
            raise ConfigError(asked, true, f"Set {here}.buckets={fits}." if fits else f'Set {here}.lengths="(1024,)".')
