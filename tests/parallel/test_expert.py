"""Experts over several devices: tokens travel to them and back, and nothing is dropped whatever the routing."""

from __future__ import annotations

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llamax.kernels.grouped import Experts, slow_experts, sorted_experts
from llamax.parallel.expert import Route, SplitExperts, padded, pick_exchange, ragged, travel
from llamax.parallel.mesh import make_mesh
from tests.splits import Seen, agree, normal

N, D, F, E = 32, 8, 16, 8
AXES = Experts(("experts", "embed", "ffn"), ("experts", "embed", "ffn"), ("experts", "ffn", "embed"))
ROUTES = {
    "even": lambda n, k: (n + 3 * k) % E,
    "all to one": lambda n, k: 5 + 0 * n + k,
    "few": lambda n, k: (n * n + k) % 3,
    "some to none": lambda n, k: jnp.where(n % 3, (n + k) % E, E),  # of no expert: what a capacity leaves out
}


def inputs(route: str, top_k: int, width: int = F, experts: int = E):
    weights = Experts(normal(experts, D, width), normal(experts, D, width, seed=1), normal(experts, width, D, seed=2))
    index = ROUTES[route](jnp.arange(N)[:, None], jnp.arange(top_k)).astype(jnp.int32)
    return normal(N, D), weights, index, jax.nn.sigmoid(normal(N, top_k))


@pytest.mark.parametrize(
    ("route", "buffer"), [("even", 1.0), ("few", 0.3), ("all to one", 0.3), ("all to one", 8.0), ("some to none", 0.3)]
)
def test_no_token_is_lost(route, buffer):
    """As the slow twin has it: values and gradients, in as many passes as the routing needs."""
    kernel = Seen(slow_experts)
    split = SplitExperts(kernel, make_mesh({"data": 2, "expert": 4}), AXES, buffer)
    agree(slow_experts, split, inputs(route, 2), gate_on="input")
    assert kernel.shapes[1] == Experts((2, D, F), (2, D, F), (2, F, D))
    assert kernel.shapes[0][0] == math.ceil(min(buffer, 4) * N * 2 / 8)  # the rows that a device takes at once


@pytest.mark.parametrize("gate_on", ["input", "output"])
@pytest.mark.parametrize(
    ("sizes", "width", "own"),
    [
        ({"expert": 4, "tensor": 2}, F, (2, F // 2)),
        ({"fsdp": 2, "expert": 2, "tensor": 2}, F, (4, F // 2)),
        ({"data": 2, "tensor": 4}, F, (8, F // 4)),
        ({"data": 2, "tensor": 4}, F + 2, (8, F + 2)),  # what does not divide stays whole
    ],
)
def test_each_device_runs_its_part_with_the_kernel_of_training(sizes, width, own, gate_on):
    kernel = Seen(sorted_experts)
    split = SplitExperts(kernel, make_mesh(sizes), AXES)
    agree(slow_experts, split, inputs("few", 1, width), gate_on=gate_on)
    assert kernel.shapes[1] == Experts((own[0], D, own[1]), (own[0], D, own[1]), (own[0], own[1], D))


def as_documented(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all`, which XLA for CPU lacks: every device is sent everything, and takes what is its.
    NaN where a caller breaks a rule of its documentation."""
    everyone = (operand, input_offsets, send_sizes, output_offsets)
    x_sSD, at_sd, size_sd, to_sd = (jax.lax.all_gather(x, axis_name) for x in everyone)
    me = jax.lax.axis_index(axis_name)
    good = (recv_sizes == size_sd[:, me]).all()
    for x_SD, at_d, size_d, to_d in zip(x_sSD, at_sd, size_sd, to_sd, strict=True):
        good &= (at_d[me] >= 0) & (at_d[me] + size_d[me] <= len(operand))
        good &= (to_d[me] >= 0) & (to_d[me] + size_d[me] <= len(output))
        place_R = jnp.arange(len(output)) - to_d[me]
        mine_R = (place_R >= 0) & (place_R < size_d[me])
        output = jnp.where(mine_R[:, None], x_SD[jnp.where(mine_R, at_d[me] + place_R, 0)], output)
    return jnp.where(good, output, jnp.nan)


@pytest.mark.parametrize(("route", "buffer"), [("even", 1.0), ("few", 0.3), ("all to one", 0.3)])
def test_no_token_is_lost_on_tpu_and_gpu(route, buffer, monkeypatch):
    """The same with exchanges of exactly what travels."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", as_documented)
    kernel = Seen(slow_experts)
    split = SplitExperts(kernel, make_mesh({"data": 2, "expert": 4}), AXES, buffer, ragged)
    agree(slow_experts, split, inputs(route, 2), gate_on="output")
    assert kernel.shapes[0] == (math.ceil(buffer * N * 2 / 8), D)  # the rows that a device takes at once


def test_what_travels_comes_from_and_goes_back_to_its_place():
    """Two devices, written out: values, and the gradient beside that of plain autodiff."""
    # Device 0 sends its row 1 to itself and rows 2, 3 to device 1; device 1 sends its row 0 to device 0.
    route = Route(*(jnp.array(x, jnp.int32) for x in ([[1, 2], [0, 0]], [[1, 2], [1, 0]], [[0, 1], [2, 0]])))
    x, weigh, zero = normal(2 * 4, D), normal(2 * 3, D, seed=1), np.zeros(D)
    split = partial(jax.shard_map, mesh=make_mesh({"expert": 2}, jax.devices()[:2]), check_vma=False)
    split = partial(split, in_specs=(P("expert"),), out_specs=P("expert"))

    @jax.jit
    def both(x):
        y, back = jax.vjp(split(lambda x: travel(padded, (4, 3), x, route)), x)
        plain, plain_back = jax.vjp(split(lambda x: padded(x, 3, route)), x)
        return (y, back(weigh)), (plain, plain_back(weigh))

    (there, dx), plain = both(x)
    np.testing.assert_array_equal(there, np.stack([x[1], zero, x[4], zero, x[2], x[3]]))
    np.testing.assert_array_equal(dx, np.stack([zero, weigh[0], weigh[4], weigh[5], weigh[2], zero, zero, zero])[None])
    jax.tree.map(np.testing.assert_array_equal, ((there,), dx), ((plain[0],), plain[1]))


def test_every_platform_has_an_exchange():
    assert [pick_exchange(platform) for platform in ("cpu", "gpu", "tpu")] == [padded, ragged, ragged]


def test_a_layer_exchanges_once_there_and_once_back():
    """Beside counts, which are few. What is over a buffer waits behind a condition; a buffer for all needs none."""
    for buffer, passes in ((1.0, 2), (4.0, 1)):
        split = SplitExperts(slow_experts, make_mesh({"data": 2, "expert": 4}), AXES, buffer)
        text = jax.jit(lambda *args, split=split: split(*args, gate_on="input")).lower(*inputs("even", 1)).as_text()
        always, _, behind = text.partition("stablehlo.case")
        assert always.count('"stablehlo.all_to_all"') + behind.count('"stablehlo.all_to_all"') == 2 * passes
        assert len(re.findall(r'"stablehlo.all_gather".*xi32>', text)) == 1
        assert bool(behind) == (passes > 1)
