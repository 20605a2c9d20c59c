"""Experts over several devices: tokens travel to them and back, and nothing is dropped whatever the routing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from llamax.kernels.grouped import Experts, slow_experts, sorted_experts
from llamax.parallel.expert import SplitExperts
from llamax.parallel.mesh import make_mesh
from tests.splits import Seen, agree, normal

N, D, F, E = 32, 8, 16, 8
AXES = Experts(("experts", "embed", "ffn"), ("experts", "embed", "ffn"), ("experts", "ffn", "embed"))
ROUTES = {
    "even": lambda n, k: (n + 3 * k) % E,
    "all to one": lambda n, k: 5 + 0 * n + k,
    "few": lambda n, k: (n * n + k) % 3,
}


def inputs(route: str, top_k: int, width: int = F, experts: int = E):
    weights = Experts(normal(experts, D, width), normal(experts, D, width, seed=1), normal(experts, width, D, seed=2))
    index = ROUTES[route](jnp.arange(N)[:, None], jnp.arange(top_k)).astype(jnp.int32)
    return normal(N, D), weights, index, jax.nn.sigmoid(normal(N, top_k))


@pytest.mark.parametrize(("route", "buffer"), [("even", 1.0), ("few", 0.3), ("all to one", 0.3), ("all to one", 8.0)])
def test_no_token_is_lost(route, buffer):
    """As the slow twin has it: values and gradients, in as many passes as the routing needs."""
    kernel = Seen(slow_experts)
    split = SplitExperts(kernel, make_mesh({"data": 2, "expert": 4}), AXES, buffer)
    agree(slow_experts, split, inputs(route, 2), gate_on="input")
    assert kernel.shapes[1] == Experts((2, D, F), (2, D, F), (2, F, D))


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


def test_a_layer_exchanges_twice_there_and_once_back():
    """Tokens and the experts they want; the results. What is over a buffer waits behind a condition."""
    split = SplitExperts(slow_experts, make_mesh({"data": 2, "expert": 4}), AXES, 1.0)
    text = jax.jit(lambda *args: split(*args, gate_on="input")).lower(*inputs("even", 1)).as_text()
    always, _, behind = text.partition("stablehlo.case")
    assert always.count("stablehlo.all_to_all") + behind.count("stablehlo.all_to_all") == 6
    assert "stablehlo.case" in text
    worst = SplitExperts(slow_experts, make_mesh({"data": 2, "expert": 4}), AXES, 4.0)
    text = jax.jit(lambda *args: worst(*args, gate_on="input")).lower(*inputs("even", 1)).as_text()
    assert text.count("stablehlo.all_to_all") == 3
    assert "stablehlo.case" not in text
