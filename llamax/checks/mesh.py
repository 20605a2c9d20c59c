"""Checks of `config.Mesh`: what a run splits divides over its axes."""

from __future__ import annotations

import dataclasses
import math

from llamax import stripes
from llamax.checks.fields import MOST_WHOLE
from llamax.config import ROW_AXES, Mesh, Model, Run
from llamax.config_dict import ConfigError, nearest_divisor, nearest_multiple


def check(run: Run) -> None:
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


def resolve(run: Run, n_devices: int) -> Mesh:
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
