"""Auto or Explicit sharding? One toy, trained both ways, before the choice is fixed (docs/decisions/0004).

    JAX_PLATFORMS=cpu python bench/spike_sharding.py                           # 8 simulated devices
    JAX_PLATFORMS=cpu python bench/spike_sharding.py --topology v5p:2x2x2      # compile for absent TPUs (needs libtpu)
    JAX_PLATFORMS=cpu python bench/spike_sharding.py --probe                   # which plain operations Explicit refuses

The toy holds what the real model will: `lax.scan` over stacked layers, `jax.checkpoint`, ring attention (`ppermute`
over "context"), dropless experts (sort, gather, `all_to_all` over "expert"), FSDP and tensor sharded weights, and a
fusion of picture features by gather. One SGD-with-momentum step, jitted, on plain pytrees, in three modes:

    loose     Auto axes, inputs placed, nothing else said
    pinned    Auto axes, in/out shardings pinned, activations constrained at block boundaries
    explicit  Explicit axes: shardings are types, and an ambiguous operation must be told its own

Lines that exist for one mode's sake end in `#: pinned` or `#: explicit`, and are counted. The truth is the same toy on
one device with plain attention and dense experts. Letters: B rows, T tokens, D width, H heads, E experts, F hidden,
V vocabulary, L layers, M picture features a row.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
import time
from collections import Counter
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu: describe chips that are not here
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("fsdp", "expert", "context", "tensor")
MESHES = {"fsdp2.expert2.context2": (2, 2, 2, 1), "expert2.context2.tensor2": (1, 2, 2, 2)}
ROWS = ("fsdp", "expert")
ACT = P(ROWS, "context", None)
B, T, D, H, E, F, V, L, M = 8, 32, 32, 4, 4, 64, 128, 4, 6

LAYER = {  # name: (shape, sharding)
    "qkv": ((3, D, H, D // H), P(None, "fsdp", "tensor", None)),
    "o": ((H, D // H, D), P("tensor", None, "fsdp")),
    "router": ((D, E), P("fsdp", None)),
    "up": ((E, D, F), P("expert", "fsdp", "tensor")),
    "down": ((E, F, D), P("expert", "tensor", "fsdp")),
}
SHAPES = {"embed": (V, D), "head": (D, V), "layers": {n: (L, *s) for n, (s, _) in LAYER.items()}}
SPECS = {"embed": P(None, "fsdp"), "head": P("fsdp", None), "layers": {n: P(None, *p) for n, (_, p) in LAYER.items()}}
BATCH = {"tokens": P(ROWS, "context"), "targets": P(ROWS, "context"), "pictures": P(ROWS, None, None)}


def named(mesh, specs):
    return jax.tree.map(lambda p: NamedSharding(mesh, p), specs, is_leaf=lambda p: isinstance(p, P))


def values():
    """The same parameters and batch for every mode, on the host."""
    leaves, tree = jax.tree.flatten(SHAPES, is_leaf=lambda s: isinstance(s, tuple))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = tree.unflatten([jax.random.normal(k, s) * D**-0.5 for k, s in zip(keys, leaves, strict=True)])
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, V)  # a token below 8 stands for a picture patch
    pictures = jax.random.normal(jax.random.key(2), (B, M, D))
    return jax.device_get((params, {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1), "pictures": pictures}))


# ------------------------------------------------------------------------- per-shard algorithms, the same in every mode


def ring_attention(q, k, v):
    """Causal attention of one shard's queries; keys and values travel around "context" (online softmax)."""
    ranks, rank, t = jax.lax.axis_size("context"), jax.lax.axis_index("context"), q.shape[1]
    q_pos = rank * t + jnp.arange(t)

    def hop(carry, i):
        k, v, top, den, out = carry
        k_pos = (rank - i) % ranks * t + jnp.arange(t)
        score = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        score = jnp.where(k_pos <= q_pos[:, None], score, -1e30)
        new = jnp.maximum(top, score.max(-1))
        p, shrink = jnp.exp(score - new[..., None]), jnp.exp(top - new)
        out = out * shrink[..., None] + jnp.einsum("bhqk,bkhd->bhqd", p, v)
        k, v = (jax.lax.ppermute(x, "context", [(r, (r + 1) % ranks) for r in range(ranks)]) for x in (k, v))
        return (k, v, new, den * shrink + p.sum(-1), out), None

    zero = jnp.swapaxes(q * 0, 1, 2)  # made from q, so that it varies over the same mesh axes
    carry = (k, v, zero[..., 0] - 1e30, zero[..., 0], zero)
    (_, _, _, den, out), _ = jax.lax.scan(hop, carry, jnp.arange(ranks))
    return jnp.swapaxes(out / den[..., None], 1, 2)


def run_experts(x_BTD, choice_BT, gate_BT, up, down):
    """Top-1 dropless experts of one shard: sort by owner, all_to_all, compute, and back the same way."""
    ranks, n, own = jax.lax.axis_size("expert"), choice_BT.size, up.shape[0]
    x, choice = x_BTD.reshape(n, -1) * gate_BT.reshape(n, 1), choice_BT.reshape(n)
    order = jnp.argsort(choice, stable=True)
    owner = choice[order] // own
    slot = jnp.arange(n) - jnp.searchsorted(owner, owner)  # place within its owner's block
    sent = jnp.zeros_like(x, shape=(ranks, n, x.shape[1])).at[owner, slot].set(x[order])
    which = jnp.full_like(choice, -1, shape=(ranks, n)).at[owner, slot].set(choice[order] % own)
    sent, which = (jax.lax.all_to_all(a, "expert", 0, 0) for a in (sent, which))
    mine = jax.nn.one_hot(which, own)
    hidden = jax.nn.silu(jnp.einsum("rnd,edf->rnef", sent, up))
    back = jax.lax.psum(jnp.einsum("rnef,efd,rne->rnd", hidden, down, mine), "tensor")
    back = jax.lax.all_to_all(back, "expert", 0, 0)
    return jnp.zeros_like(x).at[order].set(back[owner, slot]).reshape(x_BTD.shape)


def sharded(mesh):
    """(attention, experts) under shard_map: the seam's two functions."""
    heads, tok = P(ROWS, "context", "tensor", None), P(ROWS, "context")
    weights = (P("expert", None, "tensor"), P("expert", "tensor", None))
    return (
        jax.shard_map(ring_attention, mesh=mesh, in_specs=(heads,) * 3, out_specs=heads),
        jax.shard_map(run_experts, mesh=mesh, in_specs=(ACT, tok, tok, *weights), out_specs=ACT),
    )


def plain_attention(q, k, v):
    score = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    score = jnp.where(jnp.tri(q.shape[1], dtype=bool), score, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(score), v)


def plain_experts(x, choice, gate, up, down):
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x * gate[..., None], up))
    return jnp.einsum("btef,efd,bte->btd", hidden, down, jax.nn.one_hot(choice, E))


# ------------------------------------------------------------------------------------------- the model, in two dialects


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)


def auto_loss(params, batch, constrain, attention, experts):
    patch = batch["tokens"] < 8
    row = jnp.arange(patch.shape[0])[:, None]
    x = params["embed"][batch["tokens"]]
    x = jnp.where(patch[..., None], batch["pictures"][row, jnp.cumsum(patch, 1) % M], x)
    x = constrain(x, ACT)  #: pinned

    @jax.checkpoint
    def block(x, w):
        q, k, v = jnp.einsum("btd,cdhk->cbthk", norm(x), w["qkv"])
        x = constrain(x + jnp.einsum("bthk,hkd->btd", attention(q, k, v), w["o"]), ACT)  #: pinned
        logits = norm(x) @ w["router"]
        gate = jax.nn.sigmoid(logits.max(-1))
        x = constrain(x + experts(norm(x), logits.argmax(-1), gate, w["up"], w["down"]), ACT)  #: pinned
        return x, None

    x, _ = jax.lax.scan(block, x, params["layers"])
    logits = norm(x) @ params["head"]
    target = jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - target)


def explicit_loss(params, batch, _, attention, experts):
    patch = batch["tokens"] < 8
    used = jax.tree.map(without_fsdp, SPECS, is_leaf=lambda p: isinstance(p, P))  #: explicit
    embed, head = (jax.sharding.reshard(params[k], used[k]) for k in ("embed", "head"))  #: explicit
    x = embed.at[batch["tokens"]].get(out_sharding=ACT)  #: explicit
    pick = jnp.cumsum(jax.sharding.reshard(patch, P(ROWS, None)), 1) % M  #: explicit
    at = jax.vmap(lambda f, i: f.at[i].get(out_sharding=P(None, None)))  #: explicit
    fused = jax.sharding.reshard(at(batch["pictures"], pick), ACT)  #: explicit
    x = jnp.where(patch[..., None], fused, x)

    @jax.checkpoint
    def block(x, w):
        w = {k: jax.sharding.reshard(w[k], P(*used["layers"][k][1:])) for k in w}  #: explicit
        q, k, v = jnp.einsum("btd,cdhk->cbthk", norm(x), w["qkv"])
        x = x + jnp.einsum("bthk,hkd->btd", attention(q, k, v), w["o"], out_sharding=ACT)  #: explicit
        logits = norm(x) @ w["router"]
        gate = jax.nn.sigmoid(logits.max(-1))
        x = x + experts(norm(x), logits.argmax(-1), gate, w["up"], w["down"])
        return x, None

    x, _ = jax.lax.scan(block, x, params["layers"])
    logits = norm(x) @ head
    target = jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - target)


def without_fsdp(spec):
    return P(*(None if a == "fsdp" else a for a in spec))


# ------------------------------------------------------------------------------------------------------------ measuring

COMPILES: list[float] = []  # seconds of every program that XLA compiled since the last clear()


def count_compile(event: str, seconds: float, **_):
    if event.endswith("backend_compile_duration"):
        COMPILES.append(seconds)


def make_step(mode, mesh):
    """The jitted step; specs in it mean the mesh of the enclosing `jax.set_mesh`."""
    constrain = jax.lax.with_sharding_constraint if mode == "pinned" else lambda x, spec: x
    loss = explicit_loss if mode == "explicit" else auto_loss
    seam = (plain_attention, plain_experts) if mode == "one device" else sharded(mesh)

    def step(state, batch):
        params, mu = state
        value, grads = jax.value_and_grad(loss)(params, batch, constrain, *seam)
        mu = jax.tree.map(lambda m, g: 0.9 * m + g, mu, grads)
        return (jax.tree.map(lambda p, m: p - 0.1 * m, params, mu), mu), value, grads

    if mode == "pinned":
        param, batch = named(mesh, SPECS), named(mesh, BATCH)  #: pinned
        io = {"in_shardings": ((param, param), batch), "out_shardings": ((param, param), None, param)}  #: pinned
        return jax.jit(step, donate_argnums=0, **io)  #: pinned
    return jax.jit(step, donate_argnums=0)


def train(mode, mesh, steps=3):
    """Returns what happened in `steps` steps; `grads` are those of the first."""
    params, batch = values()
    step = make_step(mode, mesh)
    places = None if mode == "one device" else (named(mesh, SPECS), named(mesh, BATCH))
    params, batch = jax.device_put((params, batch), places)
    state = (params, jax.tree.map(jnp.zeros_like, params))
    before = jax.tree.map(lambda x: x.sharding, state)
    COMPILES.clear()
    losses, grads = [], None
    for _ in range(steps):
        state, loss, new = step(state, batch)
        grads = grads or jax.device_get(new)
        losses.append(float(loss))
    moved = jax.tree.map(lambda x, s: not x.sharding.is_equivalent_to(s, x.ndim), state, before)
    compiles = [round(s, 1) for s in COMPILES]
    return {"losses": losses, "grads": grads, "compiles": compiles, "moved": sum(jax.tree.leaves(moved))}


def compile_for(mode, mesh):
    """Compile for devices that need not exist; returns (seconds, peak MiB a device, collectives)."""

    def place(shapes, specs, dtype=jnp.float32):
        struct = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
        return jax.tree.map(lambda p, s: struct(s, sharding=p), named(mesh, specs), shapes)

    params = place(SHAPES, SPECS)
    batch = {k: place((B, T), BATCH[k], jnp.int32) for k in ("tokens", "targets")}
    batch["pictures"] = place((B, M, D), BATCH["pictures"])
    start = time.perf_counter()
    compiled = make_step(mode, mesh).lower((params, params), batch).compile()
    seconds = time.perf_counter() - start
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = Counter(re.findall(rf"({kinds})(?:-start)?\(", compiled.as_text()))
    return seconds, compiled.memory_analysis().peak_memory_in_bytes / 2**20, dict(found)


def error(got, want):
    """Largest difference of any leaf, relative to that leaf's largest value."""
    worst = jax.tree.map(lambda a, b: float(abs(a - b).max() / abs(b).max()), got, want)
    return max(jax.tree.leaves(worst))


PLAIN = {  # operations of the real model, on x [B, T, D] and indices i [B, T]
    "embed[tokens]": lambda x, i: jnp.ones((64, D))[i],
    "x[row, index], gather over T": lambda x, i: x[jnp.arange(B)[:, None], i],
    "take_along_axis over D": lambda x, i: jnp.take_along_axis(x, i[..., None] % D, -1),
    "cumsum over T": lambda x, i: jnp.cumsum(i, 1),
    "top_k over D": lambda x, i: jax.lax.top_k(x, 2)[0],
    "argsort over D": lambda x, i: jnp.argsort(x, -1),
    "bincount (load of experts)": lambda x, i: jnp.bincount(i.reshape(-1), length=E),
    "zeros.at[i].add": lambda x, i: jnp.zeros(64).at[i].add(1.0),
    "[B, T, D] -> [N, D]": lambda x, i: x.reshape(-1, D),
    "[B, ...] -> [2, B/2, ...] (accumulation)": lambda x, i: x.reshape(2, B // 2, T, D),
    "[B, M, ...] -> [B M, ...] (tiles)": lambda x, i: x.reshape(B * T, D // 4, 4),
    "x[:, :-1]": lambda x, i: x[:, :-1],
    "roll over T": lambda x, i: jnp.roll(x, 1, 1),
    "contraction over T": lambda x, i: jnp.einsum("btd,bte->bde", x, x),
}


def probe():
    """Trace each operation and its gradient with Explicit axes and no annotation."""
    mesh = jax.make_mesh((4, 2), ("rows", "context"), axis_types=(AxisType.Explicit,) * 2)
    for label, where in (("rows split", P("rows", None)), ("rows and tokens split", P("rows", "context"))):
        refused = []
        with jax.set_mesh(mesh):
            x = jax.device_put(jnp.ones((B, T, D)), P(*where, None))
            i = jax.device_put(jnp.ones((B, T), jnp.int32), where)
            for name, op in PLAIN.items():
                try:
                    jax.jit(jax.grad(lambda x, i, op=op: (op(x, i) * 1.0).sum())).trace(x, i)
                except Exception as refusal:  # ShardingTypeError, whose name is not public
                    assert "Sharding" in type(refusal).__name__, refusal
                    refused.append(name)
        print(f"Explicit, {label}: refuses {len(refused)} of {len(PLAIN)}: {'; '.join(refused)}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--topology", default="", help="e.g. v5p:2x2x2: compile only, for 8 TPUs that are not here")
    parser.add_argument("--modes", nargs="+", default=["loose", "pinned", "explicit"])
    parser.add_argument("--probe", action="store_true")
    args = parser.parse_args()
    jax.monitoring.register_event_duration_secs_listener(count_compile)
    if args.probe:
        return probe()
    lines = Path(__file__).read_text().splitlines()
    print("annotation lines:", {m: sum(x.endswith(f"#: {m}") for x in lines) for m in ("pinned", "explicit")})
    absent = args.topology and topologies.get_topology_desc(platform="tpu", topology_name=args.topology)
    devices = list(absent.devices if absent else jax.devices())
    truth = None if absent else train("one device", None)
    for (name, sizes), mode in itertools.product(MESHES.items(), args.modes):
        kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        mesh = Mesh(grid, AXES, axis_types=(kind,) * len(AXES))
        with jax.set_mesh(mesh):
            if absent:
                seconds, mib, found = compile_for(mode, mesh)
                print(
                    f"{args.topology} {name} {mode}: compiled in {seconds:.1f} s, peak {mib:.2f} MiB a device, {found}"
                )
                continue
            r = train(mode, mesh)
        loss_error = max(abs(a - b) for a, b in zip(r["losses"], truth["losses"], strict=True))
        print(
            f"{name} {mode}: compiled in {r['compiles']} s, leaves that moved {r['moved']}, "
            f"loss error {loss_error:.1e}, gradient error {error(r['grads'], truth['grads']):.1e}"
        )


if __name__ == "__main__":
    main()
