"""What a block's forward and backward pass gather, read from the compiled program."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llamax.model.attention import places
from llamax.model.seam import make_seam
from llamax.model.stack import Block
from llamax.parallel import rules
from llamax.parallel.mesh import make_mesh
from llamax.plan import hlo
from tests.model import twins

B, T = 8, 32
MESH = {"fsdp": 2, "expert": 2, "tensor": 2}
# The shared expert's three matrices have one size, queries and output another, and no other array has either.
MODEL = replace(twins.TINY, dim=24, n_heads=4, n_kv_heads=2, expert_ffn_dim=40, n_experts=4, n_shared_experts=3)


def placed(shape, dtype, spec: P, mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


@cache
def gathered() -> Counter[int]:
    """How many all-gathers make an array of so many numbers, in a block that is computed again for its gradient."""
    mesh = make_mesh(MESH)
    make = partial(Block, MODEL, "nope_full+moe", make_seam(mesh))
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    at = places(*(jnp.broadcast_to(x, (B, T)) for x in (jnp.arange(T), jnp.ones(T, jnp.int32))), MODEL)

    @jax.checkpoint
    def block(tree, x_BTD):
        return twins.bind(graph, tree)(x_BTD, at)[0]

    flat = {
        path: placed(v.shape, v.dtype, rules.fitting(v.get_metadata("axes"), v.shape, rules.PARAMETERS, mesh), mesh)
        for path, v in nnx.to_flat_state(state)
    }
    x = placed((B, T, MODEL.dim), jnp.float32, P(rules.ROWS), mesh)
    tree = nnx.to_pure_dict(nnx.from_flat_state(flat))
    where = jax.tree.map(lambda x: x.sharding, (tree, x))
    step = jax.jit(jax.grad(lambda tree, x: (block(tree, x) ** 2).sum(), (0, 1)), out_shardings=where)
    computations, _ = hlo.parse(step.lower(tree, x).compile().as_text())
    found = [i for c in computations.values() for i in c.instructions.values() if i.op.startswith("all-gather")]
    return Counter(math.prod(shape.dims) for i in found if not i.op.endswith("done") for shape in i.shapes[-1:])


def test_a_weight_is_gathered_once_forward_and_once_backward():
    found, half = gathered(), MODEL.n_shared_experts * MODEL.expert_ffn_dim // MESH["tensor"]
    assert found[MODEL.dim * half] == 2 * 3, found  # the shared expert's gate, up and down
    heads = MODEL.n_heads * MODEL.head_dim // MESH["tensor"]
    assert found[MODEL.dim * heads] == 2 * 2, found  # queries and output


def test_the_choice_of_experts_gathers_no_tokens():
    assert gathered()[B * T * MODEL.n_experts] == 0
