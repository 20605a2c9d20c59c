"""The plan without a compiler: names, refusals, the report's sums, the roofline by hand, levers, the command line."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax import cli, config
from llamax.config import ConfigError
from llamax.model import count
from llamax.observe.metrics import PEAK_BF16
from llamax.plan import _held, _leaves, _state, changes, compiled, estimate, hlo, plan, report, roofline
from llamax.plan.chips import CHIPS
from llamax.plan.topology import TARGETS, Topology, parse
from tests.runs import tiny_run

TINY = "recipes/scout_pretrain.py:tiny"


def tiny(devices: int, **sections) -> config.Run:
    return tiny_run(mesh=dict(data=-1, fsdp=devices), **sections)


# ------------------------------------------------------------------------------------------------- topologies, chips


@pytest.mark.parametrize(
    ("name", "devices", "platform"),
    [
        ("v5p:8x8x4", 256, "tpu"),
        ("v5e:16x16", 256, "tpu"),
        ("v6e:16x16", 256, "tpu"),
        ("tpu7x:4x4x4", 128, "tpu"),
        ("h100:64x8", 512, "gpu"),
        ("b200:2x8", 16, "gpu"),
    ],
)
def test_names(name, devices, platform):
    where = parse(name)
    assert (where.n_devices, where.platform) == (devices, platform)
    assert len(where.counted_places()) == devices


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5p-256", "Did you mean v5p:"),
        ("v5pp:8x8x4", "Did you mean v5p:"),
        ("h1000:64x8", "Did you mean h100:"),
        ("v5p:8x8", "chips x chips x chips"),
        ("h100:64", "nodes x GPUs a node"),
        ("h100:0x8", "nodes x GPUs a node"),
        ("v5e:16x", "v5e:16x16"),
        ("", "its kind is one of"),
    ],
)
def test_other_names_are_refused_with_advice(name, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse(name)


def test_a_mesh_that_does_not_fit_the_devices_is_refused_before_anything_else():
    with pytest.raises(ConfigError, match=r"3 .*4 devices"):
        plan(tiny(3), "v5e:2x2")


@pytest.mark.parametrize("kind", CHIPS)
def test_chips_are_whole(kind):
    chip = CHIPS[kind]
    assert chip.flops_per_s == PEAK_BF16[chip.kind]
    assert 10e9 < chip.hbm_bytes < 300e9
    # What a chip can do in a second falls by orders: matmuls, memory, fast links, slow links.
    assert chip.flops_per_s > 50 * chip.hbm_bandwidth > 50 * chip.link_bandwidth > 100 * chip.slow_bandwidth
    if not chip.dims:
        target = (TARGETS / f"{kind}.txtpb").read_text()
        assert float(re.search(r"memory_bandwidth: (\d+)", target)[1]) == chip.hbm_bandwidth
        assert float(re.search(r"device_memory_size: (\d+)", target)[1]) >= chip.hbm_bytes


# ----------------------------------------------------------------------------------------------------- the roofline


def test_links_by_hand():
    """On a torus, both directions of the sides along which a group differs; on GPUs, a ring through two nodes."""
    torus = parse("v5p:2x2x1")
    ring = hlo.Exchange("all-gather", ((0, 1), (2, 3)))
    assert roofline.over_links(ring, 1e9, torus.counted_places(), torus) == (0, 1e9 / 200e9)
    both = hlo.Exchange("all-gather", ((0, 1, 2, 3),))
    assert roofline.over_links(both, 1e9, torus.counted_places(), torus) == (0, 1e9 / 400e9)
    nodes = parse("h100:2x4")
    inside = hlo.Exchange("all-gather", ((0, 1, 2, 3), (4, 5, 6, 7)))
    assert roofline.over_links(inside, 1e9, nodes.counted_places(), nodes) == (0, 1e9 / 450e9)
    across = hlo.Exchange("all-gather", ((0, 4),))  # one of each node: all of it leaves
    assert roofline.over_links(across, 1e9, nodes.counted_places(), nodes) == (1e9, 1e9 / 50e9)
    everyone = hlo.Exchange("all-gather", (tuple(range(8)),))  # four adapters share what leaves a node
    assert roofline.over_links(everyone, 1e9, nodes.counted_places(), nodes) == (1e9 / 4, 1e9 / 4 / 50e9)


def test_traffic_is_told_by_axes():
    where, mesh = parse("h100:2x4"), {"data": 2, "fsdp": 4}
    cost = hlo.Cost()
    for kind, axes, sent in (
        ("all-reduce", ("data",), 5.0),
        ("all-gather", ("fsdp",), 8.0),
        ("all-to-all", ("fsdp",), 1.0),
    ):
        exchange = hlo.Exchange(kind, estimate.groups_over(axes, mesh))
        cost.sent[exchange] += sent
        cost.calls[exchange] += 2
    fsdp, data = roofline.traffic(cost, mesh, where.counted_places(), where)
    assert (fsdp.axes, fsdp.sent_bytes, fsdp.crosses) == ("fsdp", 9.0, False)
    assert fsdp.calls == {"all-gather": 2, "all-to-all": 2}
    assert (data.axes, data.slow_bytes, data.crosses) == ("data", 5.0, True)


def test_the_slowest_part_binds():
    where = parse("v5e:2x2")
    slow = roofline.Traffic("fsdp", 1.0, 0.0, 7.0, {})
    got = roofline.roofline(197e12, 98.5e12, 819e9 * 2, [slow], 100, where)
    assert got.seconds == {"compute": 1.0, "memory": 2.0, "links over fsdp": 7.0}
    assert (got.binds, got.step_s, got.tokens_per_s) == ("links over fsdp", 7.0, 100 / 7)
    assert got.mfu == pytest.approx(0.5 / 7)


# ----------------------------------------------------------------------------------------------------- the estimate


def test_an_estimate_counts_what_the_arrays_have():
    run = tiny(4)
    made = plan(run, "v5e:2x2", estimate=True)
    n = count.parameters(run.model)
    b = made.bytes
    assert (made.parameters, made.active, made.devices) == (n.total, n.text_active, 4)
    assert b.parameters + b.optimizer + b.gradients + b.activations + b.temporary == pytest.approx(b.peak, abs=2)
    assert 4 * n.total / 4 <= b.parameters < 1.1 * 4 * n.total / 4  # norms stay whole
    assert b.optimizer == pytest.approx(2 * b.parameters, rel=0.01)
    assert made.flops.model == count.step_flops(run, 8 * run.data.tiles_per_row) / 4
    assert made.flops.total > made.flops.model
    assert b.fits and not made.levers


def test_exchanged_bytes_by_hand():
    """A matrix of 1000 numbers in quarters over fsdp, two copies; bfloat16 on the wire, gathered again with remat."""
    run = tiny(4, train=dict(compute_dtype="bfloat16", remat="period"))
    mesh = {"data": 2, "fsdp": 4}
    got = estimate.exchanged(run, mesh, [estimate.Leaf(1000, ("fsdp",))])
    by_kind = {exchange.kind: sent for exchange, sent in got.sent.items()}
    embedded = 2 * (8 / 8 * 128) * 32 * 2 * 3 / 4  # one row a device there and back, 3 of 4 parts from others
    want = {"all-gather": 2 * 3 * 500, "reduce-scatter": 3 * 500, "all-reduce": 2 * (1 / 2) * 500}
    assert by_kind == {**want, "all-to-all": embedded}


def test_tokens_travel_instead_of_their_experts_by_hand():
    """8 tokens of width 4 in bfloat16 a device, 2 layers of which one has experts: 4 trips, and 1 again; experts'
    weights are gathered over fsdp only."""
    run = tiny(2, train=dict(compute_dtype="bfloat16", remat="period"))
    mesh = {"data": 1, "fsdp": 2, "expert": 4}
    experts, other = estimate.Leaf(800, ("expert", "fsdp"), stays=("expert",)), estimate.Leaf(800, ("fsdp", "expert"))
    by_axes = {}
    for leaf in (experts, other):
        got = estimate.exchanged(run, mesh, [leaf])
        by_axes[leaf] = {
            (e.kind, hlo.spanned(e.groups, {"data": 1, "fsdp": 2, "expert": 4})): sent for e, sent in got.sent.items()
        }
    stream = 128 * 32 * 2
    for sums in by_axes.values():
        assert sums["all-to-all", ("expert",)] == 2 * (4 + 1) * stream * 3 / 4  # of 2 repeats
    assert by_axes[experts]["all-gather", ("fsdp",)] == 2 * 100 * 2
    assert by_axes[other]["all-gather", ("fsdp", "expert")] == 2 * 7 * 100 * 2
    least = estimate.exchanged(run, mesh, [other], least=True)
    by_kind = {exchange.kind: sent for exchange, sent in least.sent.items() if exchange.kind == "all-gather"}
    assert by_kind == {"all-gather": 2 * 7 * 100 * 2}


def test_all_to_alls_take_their_own_way():
    """Of 7 messages 4 leave a node of 4 GPUs, each by itself; along a side of 16 chips they pass 4 on average."""
    nodes = parse("h100:2x4")
    everyone = hlo.Exchange("all-to-all", (tuple(range(8)),))
    assert roofline.over_links(everyone, 7e9, nodes.counted_places(), nodes)[0] == pytest.approx(4e9)
    torus = parse("v5e:1x16")
    side = hlo.Exchange("ragged-all-to-all", (tuple(range(16)),))
    assert roofline.over_links(side, 1e9, torus.counted_places(), torus)[1] == pytest.approx(4e9 / 100e9)


def test_a_pipeline_by_hand():
    """Two stages of one period each and four micro-batches: five ticks, each way, of a quarter of the rows; weights of
    the layers are gathered for every micro-batch."""
    run = tiny(8, train=dict(compute_dtype="bfloat16", remat="period", pipeline_microbatches=4))
    mesh = {"pipeline": 2, "data": 1, "fsdp": 2, "tensor": 1}
    got = estimate.exchanged(run, mesh, [estimate.Leaf(1000, ("pipeline", "fsdp"))])
    by_kind = {exchange.kind: sent for exchange, sent in got.sent.items()}
    handed = run.data.batch_tokens / 4 / 2 * run.model.dim * 2
    embedded = 2 * run.data.batch_tokens / 4 * run.model.dim * 2 / 2  # as of `test_exchanged_bytes_by_hand`
    sent = {"all-gather": 4 * 2 * 500, "reduce-scatter": 4 * 500, "collective-permute": 2 * 5 * handed}
    assert by_kind == {**sent, "all-to-all": embedded}
    pairs = next(exchange.groups for exchange in got.sent if exchange.kind == "collective-permute")
    assert sorted(pairs) == [(0, 2), (1, 3), (2, 0), (3, 1)]
    assert estimate.pipeline_of(run, mesh).bubble == 1 / 5
    layers = estimate.flops(run, 0, 64, bubble=0.2)[0] - estimate.flops(run, 0, 64)[0]
    head = 8 * run.model.vocab_size * run.model.dim * run.data.batch_tokens
    assert layers == pytest.approx((estimate.flops(run, 0, 64)[0] - head) / 4), "a fifth of the time does nothing"


def test_estimates_move_the_right_way():
    run = tiny(4)
    mesh = {"data": 1, "fsdp": 4}
    base = estimate.memory(run, mesh)
    twice = dataclasses.replace(run, train=dataclasses.replace(run.train, accumulate=2))
    assert estimate.memory(twice, mesh).kept == pytest.approx(base.kept / 2)
    all_kept = dataclasses.replace(run, train=dataclasses.replace(run.train, remat="none"))
    assert estimate.memory(all_kept, mesh).kept > 3 * base.kept
    assert estimate.flops(all_kept, 0, 64)[1] < estimate.flops(run, 0, 64)[1]


def test_where_weights_are_gathered_those_of_one_more_layer_are_there():
    """Of the tiny model, with a vocabulary so small that its scores are not the most there is."""
    run = tiny(4)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=8))
    split, copied = (estimate.memory(run, mesh).working for mesh in ({"data": 1, "fsdp": 4}, {"data": 4, "fsdp": 1}))
    assert split - copied == max(estimate.layer(run, {"fsdp": 4}, kind).weights for kind in run.model.layers)


def test_what_would_make_it_fit(monkeypatch):
    """A chip with room for the step in two parts but not for it whole."""
    bfloat16 = dict(train=dict(compute_dtype="bfloat16"), optim=dict(moments_dtype="bfloat16"))
    run = tiny(1, data=dict(batch_tokens=64 * 128), **bfloat16)
    whole = plan(run, "v5e:1x1", estimate=True).bytes
    small = dataclasses.replace(CHIPS["v5e"], hbm_bytes=whole.peak - whole.activations // 3)
    monkeypatch.setitem(CHIPS, "v5e", small)
    made = plan(run, "v5e:1x1", estimate=True)
    assert not made.bytes.fits
    assert made.levers[0].startswith("would fit with --config.train.accumulate=2")
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(small, hbm_bytes=1000))
    assert "no setting" in plan(run, "v5e:1x1", estimate=True).levers[-1]


def test_levers_of_memory_are_offered_and_free_what_they_say():
    run = tiny_run(mesh=dict(data=4, fsdp=2), train=dict(remat="none"))
    mesh = run.mesh.axes
    offered = {words: changed for words, changed in changes(run, mesh) if " " not in words}
    assert list(offered)[:2] == ["--config.train.remat=attention", "--config.train.remat=period"]
    kept = [estimate.memory(changed, mesh).kept for changed in (run, *offered.values())]
    assert kept[0] > kept[1] > kept[2]
    shapes = {words: _held(changed, _state(changed, mesh)) for words, changed in offered.items()}
    base = _held(run, _state(run, mesh))
    assert shapes["--config.mesh.rules=zero"]["optimizer"] < 0.3 * base["optimizer"]
    assert shapes["--config.optim.moments_dtype=bfloat16"]["optimizer"] == pytest.approx(
        base["optimizer"] / 2, rel=0.01
    )
    zero = offered["--config.mesh.rules=zero"]
    assert estimate.memory(zero, mesh).kept > estimate.memory(run, mesh).kept  # the copies
    assert not any("zero" in words for words, _ in changes(zero, mesh))


def test_what_is_frozen_is_held_and_gathered_and_no_more():
    """Neither gradients nor moments, nor sums of gradients on their way."""
    whole = tiny_run(mesh=dict(data=1, fsdp=4))
    frozen = dataclasses.replace(whole, tune=config.Tune(freeze=("*", "!projector")))
    mesh = whole.mesh.axes
    n = 32 * 32 // 4  # the projector's numbers on a device
    held = _held(frozen, _state(frozen, mesh))
    counters = held["optimizer"] - 2 * 4 * n
    assert held["gradients"] == 4 * n and 0 <= counters < 32
    assert held["parameters"] == _held(whole, _state(whole, mesh))["parameters"] > 100 * held["gradients"]
    sent = {kind: 0.0 for kind in ("all-gather", "reduce-scatter")}
    for run, sign in ((whole, 1), (frozen, -1)):
        for exchange, n_bytes in estimate.exchanged(run, mesh, _leaves(run, _state(run, mesh))).sent.items():
            if exchange.kind in sent:
                sent[exchange.kind] += sign * n_bytes
    assert sent["all-gather"] == 0 < sent["reduce-scatter"]


def test_exchanged_bytes_of_masters_over_data_by_hand():
    """A matrix in eighths over fsdp and data, experts over expert first: gathered over `data` once, whatever N is."""
    run = tiny_run(mesh=dict(rules="zero"), train=dict(compute_dtype="bfloat16", remat="period", accumulate=2))
    mesh = {"data": 2, "fsdp": 4, "expert": 2}

    def sent(split, *stays):
        got = estimate.exchanged(run, mesh, [estimate.Leaf(1000, split, stays)])
        return {(e.kind, hlo.spanned(e.groups, mesh)): n for e, n in got.sent.items()}

    dense, experts = sent(("fsdp", "expert", "data")), sent(("expert", "fsdp", "data"), "expert")
    assert dense["all-gather", ("data",)] == experts["all-gather", ("data",)] == 125
    assert dense["reduce-scatter", ("data",)] == 2 * 125
    assert dense["all-gather", ("fsdp", "expert")] == 2 * 2 * 7 * 250
    assert experts["all-gather", ("fsdp",)] == 2 * 2 * 3 * 250


def test_without_the_extra_it_is_an_estimate_and_says_so(monkeypatch):
    monkeypatch.setattr(Topology, "has_compiler", lambda self: False)
    made = plan(tiny(4), "v5e:2x2")
    assert made.how == "estimated" and any("pip install 'llamax[tpu]'" in note for note in made.notes)
    assert any("llamax[cuda]" in note for note in plan(tiny(4), "h100:1x4").notes)


def test_the_command(capsys, monkeypatch):
    assert cli.main(["plan", TINY, "--topology", "v5e:2x2", "--estimate", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["devices"] == 4 and told["bytes"]["fits"] and told["how"] == "estimated"
    assert all("crosses_slow_link" in row for row in told["traffic"])
    assert cli.main(["plan", TINY, "--topology", "v5x:2x2", "--estimate"]) == 2
    assert "its kind is one of" in capsys.readouterr().err


def test_the_report_names_everything(capsys):
    from rich.console import Console

    console = Console(width=200, highlight=False)
    with console.capture() as text:
        report.show(plan(tiny(8), "h100:2x4", estimate=True), console)
    for words in ("parameters", "optimizer", "gradients", "activations", "temporary", "peak", "limit", "fits"):
        assert words in text.get()
    for words in ("MFU", "tokens/s", "bound by", "slow link", "FLOPs"):
        assert words in text.get()


def test_places_follow_the_mesh():
    assert estimate.groups_over(("data",), {"data": 2, "fsdp": 2}) == ((0, 2), (1, 3))
    assert hlo.spanned(((0, 2), (1, 3)), {"data": 2, "fsdp": 2}) == ("data",)
    devices = np.array(jax.devices()[:4])
    assert parse("h100:2x2").places(devices).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_a_peak_counts_what_is_temporary():
    """On a CPU, too, whose compiler's own figure leaves it out: outer products that a sum is taken of."""
    program = jax.jit(lambda x: jnp.tanh(jnp.sin(x[:, None] @ x[None]) @ x)).lower(jnp.ones(512)).compile()
    assert compiled.peak_of(program) >= 512 * 512 * 4
