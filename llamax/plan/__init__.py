"""`llamax plan RECIPE --topology T`: what a run will need of a cluster that is not here.

The step that `llamax train` would run is compiled ahead of time for the topology (compiled.py) and read (hlo.py), or
all of it is estimated from formulas (estimate.py); what follows from that (roofline.py) is told by report.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from llamax import config
from llamax.config import ConfigError
from llamax.plan.topology import Topology, parse, prepare


def plan(run: config.Run, name: str, *, estimate: bool = False) -> Any:
    """The `report.Plan` of a run on the topology of that name.

    Without the topology's compiler it is an estimate, and says so.

    Raises:
        ConfigError: an unknown topology, or a mesh or batch that does not fit its devices; before any compile.
    """
    where = parse(name)
    sizes = config.check_devices(run, where.n_devices)
    prepare()
    notes = []
    if not estimate and not where.has_compiler():
        change = f"pip install 'llamax[{where.extra}]' compiles the real step"
        notes.append(f"estimated from formulas, for the compiler of {where.name} is not installed: {change}")
        estimate = True
    return _estimated(run, where, sizes.axes, notes) if estimate else _compiled(run, where, notes)


def _estimated(run: config.Run, where: Topology, sizes: Mapping[str, int], notes: list[str]) -> Any:
    from llamax.parallel.mesh import AXES
    from llamax.plan import estimate

    mesh = {axis: sizes.get(axis, 1) for axis in AXES}
    state = _state(run, mesh)
    beside = _beside(run, mesh, state)
    cost = estimate.exchanged(run, mesh, _leaves(run, state))
    _estimate_flops(cost, run, where, mesh)
    return _report(run, where, mesh, "estimated", state, beside, cost, where.counted_places(), notes)


def least(run: config.Run, where: Topology) -> list[Any]:
    """The `roofline.Traffic` that the run's mesh cannot do without."""
    from llamax.parallel.mesh import AXES
    from llamax.plan import estimate, roofline

    sizes = config.check_devices(run, where.n_devices).axes
    mesh = {axis: sizes.get(axis, 1) for axis in AXES}
    leaves = _leaves(run, _state(run, mesh))
    return roofline.traffic(estimate.exchanged(run, mesh, leaves, least=True), mesh, where.counted_places(), where)


def _compiled(run: config.Run, where: Topology, notes: list[str]) -> Any:
    from llamax.observe.progress import waiting
    from llamax.plan import ahead, compiled, estimate

    with waiting(f"compiling the step for {where.name}, a few minutes"):
        step = compiled.traced(run, where.devices())
        got = ahead.compile_step(run, where)
    mesh = dict(step.mesh.shape)
    cost, places = got.cost, compiled.places(step, where)
    if cost is None:
        notes.append("the compiler refused a program of that size: FLOPs and collectives are estimates")
        cost = estimate.exchanged(run, mesh, _leaves(run, step.state))
        _estimate_flops(cost, run, where, mesh)
    for loop in sorted(cost.endless):
        notes.append(f"the length of a loop is not known when compiling; counted once: {loop}")
    held = _held(run, step.state)
    beside = got.peak_bytes - held["parameters"] - held["optimizer"] - held["gradients"]
    return _report(run, where, mesh, "compiled", step.state, beside, cost, places, notes)


def _report(
    run: config.Run,
    where: Topology,
    mesh: Mapping[str, int],
    how: str,
    state: Any,
    beside: float,
    cost: Any,
    places: Any,
    notes: list[str],
) -> Any:
    """`beside`: bytes of the peak that are neither parameters nor optimizer nor gradients."""
    from llamax.model import count
    from llamax.plan import estimate, report, roofline

    held = _held(run, state)
    kept = min(max(0.0, beside), estimate.memory(run, mesh, _tiles(run)).kept)
    peak = sum(held.values()) + beside
    limit = where.chip.hbm_bytes
    sizes = report.Bytes(**held, activations=int(kept), temporary=int(beside - kept), peak=int(peak), limit=limit)
    model = count.step_flops(run, _tiles(run)) / where.n_devices
    moved = roofline.traffic(cost, mesh, places, where)
    # At least: the state read and written, gradients too, and what arrives from other devices written and read.
    through = 2 * sum(held.values()) + 2 * sum(t.sent_bytes for t in moved)
    n = count.parameters(run.model)
    return report.Plan(
        recipe=run.name,
        topology=where.name,
        chip=where.chip.kind,
        devices=where.n_devices,
        mesh=dict(mesh),
        how=how,
        parameters=n.total,
        active=n.text_active,
        tokens=run.data.batch_tokens,
        bytes=sizes,
        flops=report.Flops(model, cost.flops, cost.recomputed),
        traffic=moved,
        roofline=roofline.roofline(cost.flops, model, through, moved, run.data.batch_tokens, where),
        levers=[] if sizes.fits else list(_levers(run, where, mesh, peak)),
        notes=[*notes, *_wasted(model, cost), *_pipeline(run, mesh), *_whole(run, mesh)],
    )


def _leaves(run: config.Run, state: Any) -> list[Any]:
    from llamax.plan import estimate

    bones = _bones(run.model, run.tune)
    return estimate.split_of(state.params, bones.axes, bones.trained, pictures=_tiles(run) > 0)


def _beside(run: config.Run, mesh: Mapping[str, int], state: Any) -> float:
    """Estimated bytes of the peak that are neither parameters nor optimizer nor gradients."""
    from llamax.plan import estimate

    needs = estimate.memory(run, mesh, _tiles(run))
    return needs.kept + needs.working + estimate.cast(run, _held(run, state)["parameters"])


def _estimate_flops(cost: Any, run: config.Run, where: Topology, mesh: Mapping[str, int]) -> None:
    from llamax.kernels.grouped import fits_tpu
    from llamax.plan import estimate

    tile = 512 if where.chip.dims else 128  # of the attention kernel
    wide = run.model.expert_ffn_dim // mesh.get("tensor", 1)
    masked = where.platform == "tpu" and not fits_tpu(run.model.dim, wide)
    how = dict(every_expert=masked, context=mesh["context"], bubble=estimate.pipeline_of(run, mesh).bubble)
    got = estimate.flops(run, _tiles(run), tile, **how)
    cost.flops, cost.recomputed = (x / where.n_devices for x in got)


def _wasted(model: float, cost: Any) -> Iterator[str]:
    """A note if the program computes more than recomputation explains."""
    extra = (cost.flops - cost.recomputed) / model
    if extra > 1.05:
        yield f"beside what is recomputed, the program computes {extra:.3g} times what the model needs"


def _pipeline(run: config.Run, mesh: Mapping[str, int]) -> Iterator[str]:
    """A note on what the stages of a pipeline wait for each other."""
    from llamax.plan import estimate

    if mesh["pipeline"] > 1:
        yield f"{estimate.pipeline_of(run, mesh)}"


def _held(run: config.Run, state: Any) -> dict[str, int]:
    """Bytes of the classes that shapes and places decide, on one device. What is frozen has parameters alone."""
    from llamax.plan.compiled import bytes_per_device

    trained, _ = _bones(run.model, run.tune).split(state.params)
    parameters, gradients = bytes_per_device(state.params), bytes_per_device(trained)
    return {"parameters": parameters, "optimizer": bytes_per_device(state.opt), "gradients": gradients}


def _state(run: config.Run, mesh: Mapping[str, int]) -> Any:
    """The state's shapes and places on a mesh of no devices."""
    import jax

    from llamax.train.programs import places_of, shape_at

    nowhere = jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh))
    shapes = _shapes(run.model, run.tune, run.optim)
    return jax.tree.map(shape_at, shapes, places_of(_bones(run.model, run.tune), shapes, nowhere, run.mesh.rules))


@functools.lru_cache(maxsize=4)  # tracing the initialisation takes seconds, and levers ask for it again and again
def _shapes(model: config.Model, tune: config.Tune, optim: config.Optim) -> Any:
    import jax

    from llamax.optim.build import optimizer
    from llamax.train.state import init

    bones = _bones(model, tune)
    tx = optimizer(optim, config.Train().steps, bones.split(bones.kinds)[0])
    return jax.eval_shape(functools.partial(init, bones, tx, 0, config.Health().spike_window))


@functools.lru_cache(maxsize=4)
def _bones(model: config.Model, tune: config.Tune) -> Any:
    from llamax.model.seam import Seam
    from llamax.model.skeleton import skeleton

    return skeleton(model, Seam(), patch_id=0, train=config.Train(), tune=tune)


def _whole(run: config.Run, mesh: Mapping[str, int]) -> Iterator[str]:
    """What the rules would split and the sizes forbid, in one line."""
    import jax

    from llamax.parallel import rules

    nowhere = jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh))
    lines = rules.unsharded(_bones(run.model, run.tune).axes, _state(run, mesh).params, nowhere)
    if lines:
        yield f"{len(lines)} dimensions stay whole on every device, for instance {lines[0]}"


def _levers(run: config.Run, where: Topology, mesh: Mapping[str, int], peak: float) -> Iterator[str]:
    """Settings that would make it fit, by the estimate's difference to the setting as it is; the cheapest first."""

    def needed(changed: config.Run, sizes: Mapping[str, int]) -> float:
        state = _state(changed, sizes)
        return sum(_held(changed, state).values()) + _beside(changed, sizes, state)

    now, found = needed(run, mesh), False
    for words, changed in changes(run, mesh):
        try:
            sizes = {**mesh, **config.check_devices(changed, where.n_devices).axes}
        except ConfigError:
            continue
        after = peak + needed(changed, sizes) - now
        if after <= where.chip.hbm_bytes:
            found = True
            yield f"would fit with {words}: about {after / 2**30:.3g} GiB a device"
    if not found:
        devices = where.n_devices
        while devices < 2**16:
            devices *= 2
            wide = {**mesh, "fsdp": mesh["fsdp"] * devices // where.n_devices}
            if peak + needed(run, wide) - now <= where.chip.hbm_bytes:
                yield f"would fit on {devices} devices along fsdp, with a batch that fills them"
                return
        yield "no setting that is tried here makes it fit: take chips with more memory, or a smaller model"


def changes(run: config.Run, mesh: Mapping[str, int]) -> Iterator[tuple[str, config.Run]]:
    """Levers one at a time, then together: (as it would be typed, the run with it)."""
    train, change = run.train, dataclasses.replace
    less = {"none": ("attention", "period"), "attention": ("period",)}.get(train.remat, ())
    for remat in less:
        yield f"--config.train.remat={remat}", change(run, train=change(train, remat=remat))
    if train.compute_dtype == "float32":
        words = "--config.train.compute_dtype=bfloat16"
        yield words, change(run, train=change(train, compute_dtype="bfloat16"))
    if mesh["data"] > 1 and run.mesh.rules != "zero":
        yield "--config.mesh.rules=zero", change(run, mesh=change(run.mesh, rules="zero"))
    ways = math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp", "expert"))
    for base, sharded in ((run, ""), (_sharded(run, mesh), f" --config.mesh.data=1 --config.mesh.fsdp={_wide(mesh)}")):
        if sharded and mesh["data"] == 1:
            continue
        if sharded:
            yield sharded.strip(), base
        n = 2 * train.accumulate
        while run.data.rows % n == 0 and run.data.rows // n >= ways:
            yield f"--config.train.accumulate={n}{sharded}", change(base, train=change(train, accumulate=n))
            n *= 2
    if run.optim.moments_dtype == "float32":
        words = "--config.optim.moments_dtype=bfloat16"
        yield words, change(run, optim=change(run.optim, moments_dtype="bfloat16"))


def _wide(mesh: Mapping[str, int]) -> int:
    return mesh["data"] * mesh["fsdp"]


def _sharded(run: config.Run, mesh: Mapping[str, int]) -> config.Run:
    return dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, data=1, fsdp=_wide(mesh)))


def _tiles(run: config.Run) -> int:
    """Picture tiles of the larger kind of step, all of them filled."""
    return run.data.rows * run.data.tiles_per_row if run.model.vision and run.data.multimodal_steps else 0
