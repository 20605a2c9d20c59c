"""How long a step must take at least: what each part of a device is asked for, over what it can do.

    compute    FLOPs / peak
    memory     bytes through HBM / bandwidth
    links      bytes sent along each set of mesh axes / bandwidth of the links that it can use

The bound takes the slowest of the three, as if everything else were hidden behind it: no step is faster. Collectives
over different axes may use different links, so only those of one set of axes are added up, and the slowest set counts;
slow links (between slices, or between nodes) are a part of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llamax.plan import hlo
from llamax.plan.topology import Topology


@dataclass(frozen=True)
class Traffic:
    """Collectives along one set of mesh axes, a step, of one device."""

    axes: str  # "fsdp", or "data+fsdp"
    sent_bytes: float
    slow_bytes: float  # of these, over the slow links: a device's share of what leaves its node
    seconds: float  # at the bandwidth of the links that it can use
    calls: dict[str, int]  # by kind

    @property
    def crosses(self) -> bool:
        """Whether the slow links carry some of it."""
        return self.slow_bytes > 0


def traffic(cost: hlo.Cost, mesh_shape: Mapping[str, int], places: np.ndarray, topology: Topology) -> list[Traffic]:
    """By axes, most bytes first. `places` [n, dims]: where the devices stand, in the mesh's order."""
    found: dict[str, Traffic] = {}
    for exchange, sent in cost.sent.items():
        axes = "+".join(hlo.spanned(exchange.groups, dict(mesh_shape))) or "none"
        slow, seconds = over_links(exchange, sent, places, topology)
        old = found.get(axes, Traffic(axes, 0.0, 0.0, 0.0, {}))
        calls = old.calls | {exchange.kind: old.calls.get(exchange.kind, 0) + cost.calls[exchange]}
        found[axes] = Traffic(axes, old.sent_bytes + sent, old.slow_bytes + slow, old.seconds + seconds, calls)
    return sorted(found.values(), key=lambda t: -t.sent_bytes)


def over_links(exchange: hlo.Exchange, sent: float, places: np.ndarray, topology: Topology) -> tuple[float, float]:
    """(bytes over slow links, seconds) of one device's share, in the worst of the groups.

    A ring of n devices, r of them in every node, leaves a node r times less often than it has members there: with an
    adapter for each GPU, one sends 1/r of what it would alone. On a torus a group uses the links of every side along
    which its members differ, in both directions.

    An all-to-all is no ring: of n - 1 messages, those to members elsewhere leave the node, each by itself; on a torus a
    message passes a quarter of every side on its way.
    """
    chip = topology.chip
    worst = (0.0, 0.0)
    for group in exchange.groups:
        at = places[list(group)]
        direct = exchange.kind.endswith("all-to-all")
        if chip.dims:
            lengths = [len(np.unique(at[:, side])) for side in range(chip.dims)]
            sides = sum(n > 1 for n in lengths)
            hops = max(1.0, max(lengths) / 4 * sides) if direct else 1.0
            # Devices of one chip share its memory and exchange through it.
            seconds = sent * hops / (2 * sides * chip.link_bandwidth) if sides else sent / chip.hbm_bandwidth
            worst = max(worst, (0.0, seconds), key=lambda w: w[1])
            continue
        nodes, members = np.unique(at[:, 0], return_counts=True)
        n, here = len(group), int(members.min())
        share = (n - here) / (n - 1) if direct else 1 / here
        slow = 0.0 if len(nodes) == 1 else sent * share
        worst = max(worst, (slow, max(slow / chip.slow_bandwidth, sent / chip.link_bandwidth)), key=lambda w: w[1])
    return worst


@dataclass(frozen=True)
class Roofline:
    seconds: dict[str, float]  # by what is asked for: compute, memory, links over AXES
    step_s: float
    binds: str  # the slowest of them
    tokens_per_s: float
    mfu: float  # model FLOPs / (step_s x peak): no run has more


def roofline(
    flops: float, model_flops: float, hbm_bytes: float, moved: list[Traffic], tokens: int, topology: Topology
) -> Roofline:
    """`flops`, `model_flops` and `hbm_bytes` of one device; `tokens` of a step, all devices."""
    chip = topology.chip
    seconds = {"compute": flops / chip.flops_per_s, "memory": hbm_bytes / chip.hbm_bandwidth}
    seconds |= {f"links over {t.axes}": t.seconds for t in moved}
    binds = max(seconds, key=lambda name: seconds[name])
    step_s = seconds[binds]
    return Roofline(seconds, step_s, binds, tokens / step_s, model_flops / (step_s * chip.flops_per_s))
