"""The shared expert computes while tokens travel: read from the schedule of a program compiled for TPUs that are not
here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llamax import config
from llamax.model.moe import MoE
from llamax.model.seam import make_seam
from llamax.parallel.mesh import make_mesh
from llamax.plan import hlo, topology
from llamax.train.programs import compiler_options
from tests.model import twins

D, F, E, T = 1024, 2048, 16, 4096


def schedule(chips: str, options: Callable) -> list[str]:
    """What one MoE layer's forward pass on four chips does, in its order: "start", "done" of an exchange, "exchange"
    where it waits for one, "shared" for a matmul of the shared expert, "experts" for one of the others."""
    mesh = make_mesh({"expert": 4}, topology.parse(chips).devices())
    model = replace(twins.TINY, dim=D, expert_ffn_dim=F, n_experts=E)
    graph, tree = twins.fresh(partial(MoE, model, make_seam(mesh, config.Train(expert_buffer=4.0)), out_gain=1.0))

    def at(x, spec: P, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=NamedSharding(mesh, spec))

    tree = jax.tree.map(lambda x: at(x, P("expert") if x.ndim == 3 else P()), tree)
    tree["router_bias"] = at(tree["router_bias"], P(), jnp.float32)
    x_BTD = at(jnp.zeros((4, T, 1)).repeat(D, 2), P("expert"))

    forward = jax.jit(lambda tree, x_BTD: twins.bind(graph, tree)(x_BTD)[0], compiler_options=options(mesh))
    text = forward.lower(tree, x_BTD).compile().as_text()
    assert "is_scheduled=true" in text  # its instructions stand in the order in which they are run
    computations, entry = hlo.parse(text)
    found = []
    for instruction in computations[entry].instructions.values():
        inside = [i for c in hlo._called(instruction) for i in computations[c].instructions.values()]
        if instruction.op.startswith("ragged-all-to-all"):
            found.append(instruction.op.removeprefix("ragged-all-to-all").strip("-") or "exchange")
        elif hlo.GROUPED.search(instruction.text):
            found.append("experts")
        elif any(i.op == "convolution" and 2 * i.shapes[0].size * F > 1e9 for i in inside):
            found.append("shared")
    return found


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="compiles for TPU: libtpu comes with the extra `tpu`"
)
@pytest.mark.parametrize("chips", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_shared_expert_computes_while_tokens_travel(chips):
    found = schedule(chips, compiler_options)
    assert found.count("start") == found.count("done") == 2 and "exchange" not in found
    under_way = [found[:i].count("start") - found[:i].count("done") for i in range(len(found))]
    shared = [n > 0 for x, n in zip(found, under_way, strict=True) if x == "shared"]
    assert len(shared) >= 2 and all(shared)  # its three matmuls, of which some are one operation
    assert "exchange" in schedule(chips, lambda mesh: None)  # what the options are for
