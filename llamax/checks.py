"""Every check that the configuration alone decides: what stands behind `config.freeze` and `config.check_devices`.

What holds for one field alone is a row of the tables below; relations between fields follow, one short function each.
No jax: they run before a device is touched.
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from llamax import checks_model, checks_preference, checks_rows, checks_tune, stages, stripes
from llamax.config import (
    ATTN_SCALES,
    BIAS_UPDATES,
    CHOOSE_BY,
    COMPUTE_DTYPES,
    EVAL_KINDS,
    GATE_ON,
    ON_NONFINITE,
    ON_SPIKE,
    REFERENCES,
    REMATS,
    ROPE_RAMPS,
    ROPE_SCALINGS,
    ROUTER_SCORES,
    ROW_AXES,
    RULES,
    SCHEDULES,
    TEMPERATURE_WHEN,
    TEMPLATES,
    TOO_LONG,
    VISION_ENCODERS,
    Eval,
    Mesh,
    Model,
    Optim,
    Run,
)
from llamax.config_dict import ConfigError, divisors, nearest, nearest_divisor, nearest_multiple

# Every number of the schema is finite and more than 0, but for these ("*" stands for a source's or evaluation's name),
MAY_BE_ZERO = (
    *("seed", "model.n_shared_experts", "model.attn_temperature", "model.rope.attention_factor"),
    *("data.multimodal_steps", "data.workers", "data.align_tokens", "data.comparisons_per_row"),
    *("init.step", "train.steps", "train.expert_capacity", "optim.begins", "tune.lora_rank"),
    *("optim.warmup_steps", "optim.decay_steps", "optim.end_lr_ratio", "optim.b1", "optim.b2", "optim.weight_decay"),
    *("losses.next_token", "losses.router_balance", "losses.router_balance_seq", "losses.router_z"),
    *("losses.preference", "losses.reward", "reference.step", "router_bias.rate"),
    *("health.max_roll_backs", "train.pipeline_microbatches", "evals.*.every_steps", "evals.*.seed"),
    *("checkpoint.keep_every_steps", "data.sources.*.weight", *checks_preference.MAY_BE_ZERO),
)
# which some are bounded from above too,
AT_MOST = checks_preference.AT_MOST | {
    "seed": 2**32 - 1,
    "model.vision.max_tiles": 1024,  # the canvases are all of its products: time and memory go as its square
    "data.multimodal_steps": 1,
    "data.video_frames": 1024,
    "data.window_docs": 2**20,
    "data.workers": 1024,
    "data.comparisons_per_row": 2**16,
    "data.prefetch_batches": 1024,
    "health.spike_window": 100_000,
    "optim.end_lr_ratio": 1,
    "optim.b1": 0.9999,
    "optim.b2": 0.9999,
    "evals.*.depths": 1024,
    "evals.*.samples": 2**16,
    "evals.*.seed": 2**32 - 1,
    "evals.*.threshold": 1,
}
MOST_WHOLE = 2**31 - 1  # of every other whole number: steps and sizes are 32 bits on the devices
MOST_TOKENS = 1e15  # of a schedule of weights,
MOST_WEIGHT = 1e100  # and one of these
# and some strings are names out of a few.
CHOICES: dict[str, tuple[str, ...]] = checks_preference.CHOICES | {
    "model.rope.scaling": ROPE_SCALINGS,
    "model.rope.ramp": ROPE_RAMPS,
    "model.attn_scale": ATTN_SCALES,
    "model.attn_temperature_when": TEMPERATURE_WHEN,
    "model.router_score": ROUTER_SCORES,
    "model.choose_by": CHOOSE_BY,
    "model.gate_on": GATE_ON,
    "model.vision.encoder": VISION_ENCODERS,
    "data.too_long": TOO_LONG,
    "mesh.rules": RULES,
    "optim.moments_dtype": COMPUTE_DTYPES,
    "optim.schedule": SCHEDULES,
    "train.compute_dtype": COMPUTE_DTYPES,
    "train.remat": REMATS,
    "reference.source": REFERENCES,
    "router_bias.update": BIAS_UPDATES,
    "health.on_nonfinite": ON_NONFINITE,
    "health.on_spike": ON_SPIKE,
    "evals.*.kind": EVAL_KINDS,
    "evals.*.templates": TEMPLATES,
}


def check(run: Run) -> None:
    """Raises ConfigError at the first setting, or pair of settings, that cannot work."""
    _each(_fields(dataclasses.replace(run, stages={})))
    if not run.name:
        raise ConfigError("--config.name=''", "a run has a name", "Set --config.name to the recipe's name.")
    if run.stages:
        _stages(run)
        return
    checks_model.check(run.model)
    checks_rows.check(run)
    _sources(run)
    _schedule(run)
    _moments(run.optim)
    checks_tune.check(run)
    _mesh(run)
    _evals(run)
    _checkpoint(run)
    checks_preference.check(run)


def check_model(model: Model) -> None:
    """The same for a model by itself."""
    _each(_fields(model, "model", "model"))
    checks_model.check(model)


def resolve_mesh(run: Run, n_devices: int) -> Mesh:
    """See `config.check_devices`."""
    sizes = run.mesh.axes
    fixed = math.prod(n for n in sizes.values() if n != -1)
    left, rest = divmod(n_devices, fixed)
    free = next((axis for axis, n in sizes.items() if n == -1), None)
    if rest or (free is None and left != 1):
        asked = f"mesh: {_product(sizes)}" + (f" = {fixed} times {free}" if free else "")
        visible = f"{n_devices} device{' is' if n_devices == 1 else 's are'} visible"
        raise ConfigError(asked, visible, _fitting_mesh(sizes, n_devices))
    sizes = {axis: left if n == -1 else n for axis, n in sizes.items()}
    _slices(run.mesh.slices, sizes["data"])
    _split_rows(run, sizes)
    _split_model(run.model, sizes)
    _split_layers(run, sizes)
    _split_tokens(run, sizes)
    return dataclasses.replace(run.mesh, **sizes)


# ------------------------------------------------------------------------------------------------------ one field


def _fields(value: Any, path: str = "", pattern: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted path, the same with "*" for names that the recipe chose, value) of every field."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            here, like = (f"{p}.{f.name}".lstrip(".") for p in (path, pattern))
            yield from _fields(getattr(value, f.name), here, like)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _fields(entry, f"{path}.{name}", f"{pattern}.*")
    else:
        yield path, pattern, value


def _each(fields: Iterable[tuple[str, str, Any]]) -> None:
    """What holds for one field alone."""
    for path, pattern, value in fields:
        if isinstance(value, int | float) and not isinstance(value, bool) and not path.startswith("mesh."):
            _number(path, pattern, value)
        if isinstance(value, str):
            _text(path, value)
        if pattern in CHOICES:
            _choice(path, value, CHOICES[pattern])


def _number(path: str, pattern: str, value: float) -> None:
    asked, high = f"--config.{path}={value}", AT_MOST.get(pattern, MOST_WHOLE if isinstance(value, int) else math.inf)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(asked, "it is a finite number", f"Set --config.{path} to one.")
    if pattern in MAY_BE_ZERO and value < 0:
        raise ConfigError(asked, "it is 0 or more", f"Set --config.{path}=0.")
    if pattern not in MAY_BE_ZERO and value <= 0:
        change = f"Set --config.{path}=1 or more." if isinstance(value, int) else f"Set --config.{path} above 0."
        raise ConfigError(asked, "it is more than 0", change)
    if value > high:
        raise ConfigError(asked, f"it is at most {high}", f"Set --config.{path}={high}.")


def _text(path: str, value: str) -> None:
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in value):  # no path has them, and no file takes the latter
        asked, true = f"--config.{path}={value!r}", "it is text without control characters and of valid Unicode"
        raise ConfigError(asked, true, f"Set --config.{path} without them.")


def _choice(path: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = nearest(value, choices) or choices[0]
        asked, true = f"--config.{path}={value}", f"it is one of {', '.join(choices)}"
        raise ConfigError(asked, true, f"Set --config.{path}={close}.")


# ---------------------------------------------------------------------------------------------------------- the data


def _sources(run: Run) -> None:
    if not run.data.sources:
        change = "Name a manifest in the recipe: run.data.sources = dict(web=dict(path='data/web.toml', weight=1.0))."
        raise ConfigError("--config.data.sources={}", "a run reads at least one source", change)
    for name, source in run.data.sources.items():
        here = f"--config.data.sources.{name}"
        _named(name, "source", "data.sources")
        _manifest(here, source.path)
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


def _named(name: str, what: str, section: str) -> None:
    if not name.isidentifier():
        fits = "".join(c if c.isidentifier() or c.isdigit() else "_" for c in name)
        fits = fits if fits.isidentifier() else f"_{fits}"
        true = f"--config.{section}.NAME must be able to name it: letters, digits, underscores"
        raise ConfigError(f"{what} {name!r}", true, f"Call it {fits!r}.")


def _manifest(here: str, path: str) -> None:
    if not path.endswith(".toml"):
        true = "it is a manifest, a .toml file that says where the documents are"
        raise ConfigError(f"{here}.path={path!r}", true, f"Set {here}.path=data/NAME.toml.")


def check_evals(run: Run) -> None:
    """The part of `check` that is about `run.evals`, for a model that is evaluated and was not trained here."""
    _each(_fields(run.evals, "evals", "evals"))
    _evals(run)


def _evals(run: Run) -> None:
    for name, evaluation in run.evals.items():
        here = f"--config.evals.{name}"
        _named(name, "evaluation", "evals")
        _manifest(here, evaluation.path)
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


# -------------------------------------------------------------------------------------------------------- the stages


def _stages(run: Run) -> None:
    """Each stage is a run that works; rows grow from stage to stage, and hold whole chunks."""
    if run.train.steps:
        asked, true = f"--config.train.steps={run.train.steps}", "the run has stages, whose tokens say how long it is"
        raise ConfigError(asked, true, "Set --config.train.steps=0, and --config.stages.NAME.tokens.")
    for name in run.stages:
        _named(name, "stage", "stages")
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
            _each(_fields(part.run))
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


# ------------------------------------------------------------------------------------------- the schedule, the mesh


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


def _mesh(run: Run) -> None:
    """What holds for any number of devices: the axes' values, and rows that split over the fixed axes."""
    sizes = run.mesh.axes
    _slices(run.mesh.slices, sizes["data"])
    for axis, n in sizes.items():
        if not 1 <= n <= MOST_WHOLE and n != -1:
            true = f"an axis is 1 to {MOST_WHOLE}, or -1 for the devices that are left"
            raise ConfigError(f"--config.mesh.{axis}={n}", true, f"Set --config.mesh.{axis}=1.")
    free = [axis for axis, n in sizes.items() if n == -1]
    if len(free) > 1:
        asked = f"mesh: {_product(sizes)}"
        raise ConfigError(asked, "-1 is allowed once", f"Set --config.mesh.{free[-1]}=1.")
    _split_rows(run, sizes)
    _split_model(run.model, sizes)
    _split_layers(run, sizes)
    _split_tokens(run, sizes)


def _slices(slices: int, data: int) -> None:
    """Slices are equal parts of the axis `data`, as far as that is known."""
    if not 1 <= slices <= MOST_WHOLE:
        asked, true = f"--config.mesh.slices={slices}", f"there are 1 to {MOST_WHOLE}"
        raise ConfigError(asked, true, "Set --config.mesh.slices=1.")
    if data != -1 and data % slices:
        asked, true = f"--config.mesh.slices={slices}", f"each holds an equal part of mesh.data={data}"
        raise ConfigError(asked, true, f"Set --config.mesh.slices={nearest_divisor(data, slices)}.")


def _split_rows(run: Run, sizes: dict[str, int]) -> None:
    """A micro-batch's rows divide over the devices along the axes, as far as these are known."""
    sizes = {axis: n for axis, n in sizes.items() if axis in ROW_AXES}
    micro, ways = run.data.rows // run.train.accumulate, math.prod(n for n in sizes.values() if n != -1)
    if micro % ways:
        fits = nearest_multiple(ways, micro) * run.train.accumulate * run.data.seq_len
        asked = f"rows split {ways} ways by mesh: {_product(sizes)}"
        true = f"a micro-batch has {micro} rows (batch_tokens / seq_len / accumulate)"
        raise ConfigError(asked, true, f"Set --config.data.batch_tokens={fits}, or a smaller mesh axis.")


def _split_model(model: Model, sizes: dict[str, int]) -> None:
    """Experts divide over the axis `expert`, heads and hidden widths over `tensor`; heads of keys and values divide, or
    are copied."""
    expert, tensor = (abs(sizes[axis]) for axis in ("expert", "tensor"))
    dense = any(kind.endswith("+dense") for kind in model.layers)
    moe = any(kind.endswith("+moe") for kind in model.layers)
    if moe and model.n_experts % expert:
        asked, true = f"--config.mesh.expert={expert}", f"it splits --config.model.n_experts={model.n_experts} evenly"
        raise ConfigError(asked, true, f"Set --config.mesh.expert={math.gcd(model.n_experts, expert)}.")
    split = {"n_heads": model.n_heads}
    split |= {"dense_ffn_dim": model.dense_ffn_dim} if dense else {}
    split |= {"expert_ffn_dim": model.expert_ffn_dim} if moe else {}
    for field, size in split.items():
        if size % tensor:
            asked, true = f"--config.mesh.tensor={tensor}", f"it splits --config.model.{field}={size} evenly"
            raise ConfigError(
                asked, true, f"Set --config.mesh.tensor={nearest_divisor(math.gcd(*split.values()), tensor)}."
            )
    kv = model.n_kv_heads
    if kv % tensor and tensor % kv:
        asked, true = f"--config.mesh.tensor={tensor}", f"n_kv_heads={kv} divide it, or it divides them"
        raise ConfigError(asked, true, f"Set --config.mesh.tensor={math.gcd(tensor, kv)}.")


def _split_layers(run: Run, sizes: dict[str, int]) -> None:
    """The stages along `pipeline` share one segment's periods, and a micro-batch's rows make equal ones for them."""
    stages = abs(sizes["pipeline"])
    if stages == 1:
        return
    (_, repeats), *more = run.model.plan
    asked = f"--config.mesh.pipeline={stages}"
    if more:
        true = f"its stages share the periods of one segment, and --config.model.plan has {1 + len(more)}"
        raise ConfigError(asked, true, "Set --config.mesh.pipeline=1, or a plan of one period and its repeats.")
    if repeats % stages:
        true = f"it splits the {repeats} repeats of the period in --config.model.plan evenly"
        raise ConfigError(asked, true, f"Set --config.mesh.pipeline={nearest_divisor(repeats, stages)}.")
    parts = run.train.pipeline_microbatches or stages
    if parts % stages:
        asked = f"--config.train.pipeline_microbatches={parts}"
        true = f"they go through the mesh.pipeline={stages} stages in groups of as many"
        raise ConfigError(asked, true, f"Set --config.train.pipeline_microbatches={nearest_multiple(stages, parts)}.")
    ways = parts * math.prod(n for axis, n in sizes.items() if axis in ROW_AXES and axis != "pipeline" and n != -1)
    rows = run.data.rows // run.train.accumulate
    if rows % ways:
        asked = f"{parts} micro-batches through mesh: {_product(sizes)}"
        true = f"a step's {rows} rows (batch_tokens / seq_len / accumulate) do not split into {ways} equal parts"
        fits = nearest_multiple(ways, rows) * run.train.accumulate * run.data.seq_len
        change = f"Set --config.data.batch_tokens={fits}, or --config.train.pipeline_microbatches={stages}."
        raise ConfigError(asked, true, change)


def _split_tokens(run: Run, sizes: dict[str, int]) -> None:
    """Rows are cut over the axis `context` into equal parts of whole chunks; so are the slots of picture tiles."""
    data, context = run.data, abs(sizes["context"])
    chunk = stripes.chunk_len(run.model)
    whole = f"chunks of {chunk} (model.chunk_len)" if chunk else "tokens"
    if context > 1 and data.seq_len % (context * (chunk or 1)):
        asked, true = f"--config.mesh.context={context}", f"it cuts rows of seq_len={data.seq_len} into whole {whole}"
        fits = nearest_divisor(data.seq_len // chunk, context) if chunk and data.seq_len % chunk == 0 else 1
        fits = fits if chunk else nearest_divisor(data.seq_len, context)
        raise ConfigError(asked, true, f"Set --config.mesh.context={fits}.")
    if data.multimodal_steps and data.tiles_per_row % context:
        fits = -(-data.tiles_per_row // context) * context
        asked, true = f"--config.data.tiles_per_row={data.tiles_per_row}", f"mesh.context={context} splits them evenly"
        raise ConfigError(asked, true, f"Set --config.data.tiles_per_row={fits}.")
    if not data.align_tokens:
        return
    asked, stripe = f"--config.data.align_tokens={data.align_tokens}", data.seq_len
    true = f"a row of seq_len={data.seq_len} is a whole number of stripes"
    if context > 1:
        stripe = data.seq_len // stripes.of(run.model, data.seq_len, context).n
        true = f"it divides the {stripe} tokens of a stripe (mesh.context={context})"
    if stripe % data.align_tokens or data.align_tokens % (chunk or 1):
        fits = (chunk or 1) * nearest_divisor(stripe // (chunk or 1), data.align_tokens // (chunk or 1))
        fits = fits if stripe % fits == 0 else 0
        raise ConfigError(asked, f"{true}, of whole {whole}", f"Set --config.data.align_tokens={fits}.")


def _product(sizes: dict[str, int]) -> str:
    """Axes of size 1 are left out; of several sizes that are known, what they multiply to is told."""
    shown = {axis: n for axis, n in sizes.items() if n != 1} or {"data": 1}
    text = " * ".join(f"{axis}={n}" for axis, n in shown.items())
    known = len(shown) > 1 and -1 not in shown.values()
    return f"{text} = {math.prod(shown.values())}" if known else text


def _fitting_mesh(sizes: dict[str, int], n_devices: int) -> str:
    """The advice for axes that do not multiply to the devices: one axis changed so that they do."""
    free = -1 in sizes.values()
    for axis, n in sizes.items():
        others = math.prod(m for name, m in sizes.items() if name != axis and m != -1)
        if n != -1 and n_devices % others == 0:
            if free:
                return f"Set --config.mesh.{axis}={nearest_divisor(n_devices // others, n)}."
            return f"Set --config.mesh.{axis}={n_devices // others}, or -1 to take the rest."
    return "Set one axis to -1 and every other to 1."
