"""What `llamax plan` says: as tables for people, as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from llamax.observe.progress import quantity, size
from llamax.plan.roofline import Roofline, Traffic


@dataclass(frozen=True)
class Bytes:
    """Of one device. The classes add up to the peak."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int  # what the forward pass leaves for the backward pass, by formula
    temporary: int  # the rest of the peak
    peak: int
    limit: int

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


@dataclass(frozen=True)
class Flops:
    """Of one device and one step."""

    model: float  # by model/count.py: what training needs
    total: float  # what the program computes
    recomputed: float  # of these, what it had computed before


@dataclass(frozen=True)
class Plan:
    recipe: str
    topology: str
    chip: str
    devices: int
    mesh: dict[str, int]
    how: str  # "compiled" or "estimated"
    parameters: int
    active: int  # of a text token
    tokens: int  # a step
    bytes: Bytes
    flops: Flops
    traffic: list[Traffic]
    roofline: Roofline
    levers: list[str] = field(default_factory=list)  # what would make it fit, the cheapest first
    notes: list[str] = field(default_factory=list)


def as_json(plan: Plan) -> str:
    told: dict[str, Any] = dataclasses.asdict(plan)
    told["bytes"]["fits"] = plan.bytes.fits
    for row, traffic in zip(told["traffic"], plan.traffic, strict=True):
        row["crosses_slow_link"] = traffic.crosses
    return json.dumps(told, indent=2)


def show(plan: Plan, console: Console) -> None:
    mesh = " x ".join(f"{axis}={n}" for axis, n in plan.mesh.items() if n > 1) or "one device"
    console.print(f"{plan.recipe} on {plan.topology}: {plan.devices} devices, {mesh}; {plan.how}", style="bold")
    console.print(f"parameters {plan.parameters:,}, of which {plan.active:,} are active for a text token")
    console.print(_bytes(plan.bytes))
    verdict = "fits" if plan.bytes.fits else "DOES NOT FIT"
    console.print(f"{verdict}: {size(plan.bytes.peak)} of {size(plan.bytes.limit)}, {_share(plan.bytes)}")
    for lever in plan.levers:
        console.print(f"  {lever}", soft_wrap=True)
    console.print()
    f = plan.flops
    console.print(
        f"FLOPs a device and step: {f.total:.4g}, of which {f.recomputed:.4g} recomputed; model {f.model:.4g}"
    )
    if plan.traffic:
        console.print(_traffic(plan.traffic))
    console.print(_roofline(plan.roofline))
    r = plan.roofline
    console.print(
        f"at best {r.step_s:.4g} s a step, {quantity(r.tokens_per_s)} tokens/s, MFU {r.mfu:.1%}; bound by {r.binds}"
    )
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _share(b: Bytes) -> str:
    return f"{b.peak / b.limit:.0%}"


def _bytes(b: Bytes) -> Table:
    table = Table(title="bytes a device", title_justify="left")
    for name in ("parameters", "optimizer", "gradients", "activations", "temporary", "peak", "limit"):
        table.add_column(name, justify="right")
    table.add_row(*(size(getattr(b, column.header)) for column in table.columns))
    return table


def _traffic(rows: list[Traffic]) -> Table:
    table = Table(title="sent by a device in a step", title_justify="left")
    for name in ("over axes", "bytes", "slow link", "seconds", "collectives"):
        table.add_column(name, justify="left" if name in ("over axes", "collectives") else "right")
    for t in rows:
        calls = ", ".join(f"{n} {kind}" for kind, n in sorted(t.calls.items()))
        slow = size(t.slow_bytes) if t.crosses else "no"
        table.add_row(t.axes, size(t.sent_bytes), slow, f"{t.seconds:.3g}", calls)
    return table


def _roofline(r: Roofline) -> Table:
    table = Table(title="seconds a step, at least", title_justify="left")
    for name in r.seconds:
        table.add_column(name, justify="right")
    table.add_row(*(f"{s:.3g}" for s in r.seconds.values()))
    return table
