"""Slow twins of the model in float64 numpy, written from the formulas of Llama 4 and not from the code under test.

One token, one head, one expert at a time. RoPE turns by true positions, masks are asked key by key, layers are taken
one after the other. Weights are the model's own trees, in float64. Letters as in llamax/model; one row has no B.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from llamax import config
from llamax.batch import Batch
from tests.xla_flags import QUICK

quick_jit = partial(jax.jit, compiler_options=QUICK)

VISION = config.Vision(tile_px=8, patch_px=2, dim=16, n_layers=2, n_heads=2, ffn_dim=24, adapter_dim=12)
# Every feature acts within 24 tokens: several chunks (of a length that does not divide the row), several steps of the
# temperature, and frequencies on both sides of the scaling's band and inside it.
TINY = config.Model(
    vocab_size=40,
    dim=16,
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
    plan=((("rope_chunk+moe", "nope_full+dense"), 1),),
    dense_ffn_dim=24,
    expert_ffn_dim=12,
    n_experts=4,
    chunk_len=5,
    attn_temperature=0.3,
    attn_temperature_floor=4,
    rope=config.Rope(100.0, "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_len=64),
)
PATCH = 39  # the id of `<|patch|>`
SEGMENTS = np.array([[1] * 9 + [2] * 7 + [3] * 5 + [0] * 3, [1] * 24], np.int32)
POSITIONS = np.array([[*range(9), *range(7), *range(5), 0, 0, 0], range(24)], np.int32)


def batch(tiles: tuple[int, ...] = ()) -> Batch:
    """Two rows of 24 random tokens: three documents and padding; one document. Row b holds `tiles[b]` picture tiles."""
    rng = np.random.default_rng(0)
    side = VISION.tile_px
    tokens = rng.integers(0, PATCH, SEGMENTS.shape, dtype=np.int32)
    pixels = np.zeros((2, max(tiles, default=0), side, side, 3), np.uint8)
    for row, count in enumerate(tiles):
        for tile, start in zip(range(count), (1, 10, 17), strict=False):  # one for each document of the first row
            pixels[row, tile] = rng.integers(0, 256, (side, side, 3))
            tokens[row, start : start + VISION.tokens_per_tile] = PATCH
    targets = rng.integers(0, PATCH, SEGMENTS.shape, dtype=np.int32)
    weights = ((SEGMENTS > 0) * rng.uniform(0.5, 1.5, SEGMENTS.shape)).astype(np.float32)
    return Batch(tokens, targets, weights, SEGMENTS, POSITIONS, SEGMENTS % 2, pixels)


def fresh(make: Callable[..., nnx.Module], seed: int = 0) -> tuple[nnx.GraphDef, dict]:
    """A module's graph, and random float32 values for all its variables: no norm of ones, no bias of zeros."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    tree: dict = {}
    for path, variable in nnx.to_flat_state(state):
        at = tree
        for key in path[:-1]:
            at = at.setdefault(key, {})
        middle = 1.0 if variable.get_metadata().get("kind") == "norm" else 0.0
        at[path[-1]] = rng.normal(middle, 0.3, variable.shape).astype(np.float32)
    return graph, tree


def bind(graph: nnx.GraphDef, tree: dict) -> nnx.Module:
    return nnx.merge(graph, nnx.State(tree))


def float64(tree):
    if isinstance(tree, dict):
        return {key: float64(value) for key, value in tree.items()}
    return np.asarray(tree, np.float64)


def layer_of(stacked: dict, repeat: int):
    """One layer of a tree whose leaves are stacked over repeats."""
    return {k: layer_of(v, repeat) if isinstance(v, dict) else v[repeat] for k, v in stacked.items()}


# ------------------------------------------------------------------------------------------------------ small parts


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    """x Phi(x), with the exact error function."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(scores):
    e = np.exp(scores - np.max(scores))
    return e / e.sum()


def rms(x, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def layer_norm(x, w, eps):
    return rms(x - x.mean(axis=-1, keepdims=True), eps) * w["weight"] + w["bias"]


def swiglu(x, w):
    gate = x @ w["gate"]
    return (gate * sigmoid(gate) * (x @ w["up"])) @ w["down"]


# ------------------------------------------------------------------------------------------------------------- RoPE


def frequencies(rope: config.Rope, head_dim: int) -> list[float]:
    return [frequency(rope, head_dim, j) for j in range(head_dim // 2)]


def frequency(rope: config.Rope, head_dim: int, j: int) -> float:
    """w_j = theta^(-2j/Dh), rescaled for rows s times longer by one of the papers' formulas."""
    w, s, L = rope.theta ** (-2 * j / head_dim), rope.factor, rope.original_len
    if rope.scaling == "none":
        return w
    if rope.scaling == "linear":  # arXiv 2306.15595, equation 4: position m is read as m / s
        return w / s
    if rope.scaling == "ntk":  # arXiv 2309.00071, section 3.1: b' = b s^(D / (D - 2))
        return (rope.theta * s ** (head_dim / (head_dim - 2))) ** (-2 * j / head_dim)
    if rope.scaling == "llama3":  # by wavelength: keep the short, divide the long by the factor, mix between
        length = 2 * math.pi / w
        if length < L / rope.high_freq_factor:
            return w
        if length > L / rope.low_freq_factor:
            return w / s
        share = (L / length - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return w * ((1 - share) / s + share)
    if rope.ramp == "pairs":  # arXiv 2309.00071's code, and modeling_rope_utils.py of transformers
        low, high = (
            head_dim * math.log(L / (beta * 2 * math.pi)) / (2 * math.log(rope.theta))
            for beta in (rope.beta_fast, rope.beta_slow)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
        divided = min(max((j - low) / (high - low), 0), 1)
        return w / s * divided + w * (1 - divided)
    r = L / (2 * math.pi / w)  # arXiv 2309.00071, section 3.2: turns within L
    if r < rope.beta_slow:
        gamma = 0.0
    elif r > rope.beta_fast:
        gamma = 1.0
    else:
        gamma = (r - rope.beta_slow) / (rope.beta_fast - rope.beta_slow)
    return (1 - gamma) * w / s + gamma * w


def attention_factor(rope: config.Rope) -> float:
    """sqrt(1/t) of arXiv 2309.00071, section 3.4, by which queries and keys are scaled."""
    if rope.scaling != "yarn":
        return 1.0
    return rope.attention_factor if rope.attention_factor else 0.1 * math.log(rope.factor) + 1


def turn(vector, angles):
    """Lanes (2j, 2j+1) are one complex number, multiplied by exp(i angle_j)."""
    z = (vector[0::2] + 1j * vector[1::2]) * np.exp(1j * np.asarray(angles))
    return np.stack([z.real, z.imag], axis=-1).reshape(-1)


def grid_angles(patch: int, grid: int, head_dim: int, theta: float) -> list[float]:
    """2D RoPE of the encoder: the first half of the pairs by column + 1, the second by row + 1; class token: 0."""
    w = [theta ** (-2 * j / (head_dim / 2)) for j in range(head_dim // 4)]
    row, column = (-1, -1) if patch == grid * grid else divmod(patch, grid)
    return [(column + 1) * w_j for w_j in w] + [(row + 1) * w_j for w_j in w]


# -------------------------------------------------------------------------------------------------------- attention


def attention(w, x_TD, positions, segments, model: config.Model, kind: str):
    """The whole attention layer on one row; zeros on padding."""
    T, group = len(x_TD), model.n_heads // model.n_kv_heads
    w_j = np.array(frequencies(model.rope, model.head_dim))
    y_TD = np.zeros_like(x_TD)

    def prepare(vector, position):
        if kind == "nope_full":
            return vector
        turned = turn(vector, float(position) * w_j)
        turned = rms(turned, model.norm_eps) if model.qk_norm else turned
        return turned * attention_factor(model.rope)

    for t in range(T):
        if segments[t] == 0:
            continue
        keys = [s for s in range(T) if segments[s] == segments[t] and positions[s] <= positions[t]]
        if kind == "rope_chunk":
            keys = [s for s in keys if positions[s] // model.chunk_len == positions[t] // model.chunk_len]
        warmth = np.ones(model.n_heads)
        if model.attn_scale == "ssmax" and kind != "rope_chunk":
            warmth = w["ssmax"] * math.log(len(keys))  # n^(s z) = exp(s ln(n) z)
        elif kind == "nope_full":
            steps = math.floor((positions[t] + 1) / model.attn_temperature_floor)
            warmth = warmth * (1 + model.attn_temperature * math.log(1 + steps))
        for h in range(model.n_heads):
            q = prepare(x_TD[t] @ w["query"][:, h], positions[t]) * warmth[h]
            k = [prepare(x_TD[s] @ w["key"][:, h // group], positions[s]) for s in keys]
            p = softmax(np.array([q @ k_s for k_s in k]) / math.sqrt(model.head_dim))
            o = sum(p_s * (x_TD[s] @ w["value"][:, h // group]) for p_s, s in zip(p, keys, strict=True))
            y_TD[t] += o @ w["out"][h]
    return y_TD


# --------------------------------------------------------------------------------------------------- feed-forwards


def route(z_E, bias_E, model: config.Model):
    """(experts chosen, best first; their gates) of one token with router logits z."""
    score_E = sigmoid(z_E) if model.router_score == "sigmoid" else softmax(z_E)
    worth_E = bias_E + (z_E if model.choose_by == "logits" else score_E)
    size = model.n_experts // model.n_groups
    groups = [range(g * size, (g + 1) * size) for g in range(model.n_groups)]

    def rank(group):
        return sum(sorted((worth_E[e] for e in group), reverse=True)[: model.group_best])

    open_groups = sorted(groups, key=rank, reverse=True)[: model.top_groups]
    candidates = sorted(e for group in open_groups for e in group)
    chosen = sorted(candidates, key=lambda e: -worth_E[e])[: model.top_k]
    gates = score_E[chosen]
    if model.router_renormalise:
        gates = gates / gates.sum()
    return np.array(chosen), gates * model.router_scale


def moe(w, x_ND, model: config.Model):
    """(y, router logits, experts chosen), one token at a time."""
    y_ND, logits, chosen = np.zeros_like(x_ND), [], []
    for n, x_D in enumerate(x_ND):
        z_E = x_D @ w["router"]
        if model.n_shared_experts:
            y_ND[n] += swiglu(x_D, w["shared"])
        index_K, gate_K = route(z_E, w["router_bias"], model)
        for e, gate in zip(index_K, gate_K, strict=True):
            expert = {name: w[name][e] for name in ("gate", "up", "down")}
            y_ND[n] += swiglu(gate * x_D, expert) if model.gate_on == "input" else gate * swiglu(x_D, expert)
        logits.append(z_E)
        chosen.append(index_K)
    return y_ND, np.array(logits), np.array(chosen)


# ----------------------------------------------------------------------------------------------------------- vision


def patch_vectors(tile_HWC, patch_px: int):
    """Patches row by row; inside one colour by colour, then row, then column."""
    grid, vectors = tile_HWC.shape[0] // patch_px, []
    for row, column in np.ndindex(grid, grid):
        patch = tile_HWC[row * patch_px :, column * patch_px :]
        vectors.append([patch[i, j, c] for c, i, j in np.ndindex(3, patch_px, patch_px)])
    return np.array(vectors)


def shuffled(x_PW, shuffle: int):
    """Output (r, c) is the concatenation of the patches (s r + i, s c + j), i then j."""
    grid = math.isqrt(len(x_PW))
    joined = []
    for r, c in np.ndindex(grid // shuffle, grid // shuffle):
        inside = np.ndindex(shuffle, shuffle)
        joined.append(np.concatenate([x_PW[(shuffle * r + i) * grid + shuffle * c + j] for i, j in inside]))
    return np.array(joined)


def vision(w, pixels_HWC, cfg: config.Vision):
    """One tile, normalised to [-1, 1], through encoder and adapter: [tokens_per_tile, adapter_dim]."""
    x = patch_vectors(pixels_HWC, cfg.patch_px) @ w["patch_embedding"]["weight"]
    x = np.concatenate([x, w["class_embedding"][None]]) + w["position_embedding"]
    x = layer_norm(x, w["norm_pre"], cfg.norm_eps)
    head_dim = cfg.dim // cfg.n_heads
    for layer in range(cfg.n_layers):
        b = layer_of(w["blocks"], layer)
        h = layer_norm(x, b["attention_norm"], cfg.norm_eps)
        q, k, v = (h @ b[name]["weight"] + b[name]["bias"] for name in ("query", "key", "value"))
        o = np.zeros_like(x)
        for head in range(cfg.n_heads):
            lanes = slice(head * head_dim, (head + 1) * head_dim)
            angles = [grid_angles(p, cfg.grid, head_dim, cfg.rope_theta) for p in range(len(x))]
            qs = [turn(q[p, lanes], angles[p]) for p in range(len(x))]
            ks = [turn(k[p, lanes], angles[p]) for p in range(len(x))]
            for p in range(len(x)):
                o[p, lanes] = softmax(np.array([qs[p] @ k_s for k_s in ks]) / math.sqrt(head_dim)) @ v[:, lanes]
        x = x + o @ b["out"]["weight"] + b["out"]["bias"]
        h = layer_norm(x, b["ffn_norm"], cfg.norm_eps)
        x = x + gelu(h @ b["up"]["weight"] + b["up"]["bias"]) @ b["down"]["weight"] + b["down"]["bias"]
    x = shuffled(layer_norm(x, w["norm_post"], cfg.norm_eps)[:-1], cfg.shuffle)
    return gelu(gelu(x @ w["adapter_in"]["weight"]) @ w["adapter_out"]["weight"])


def picture_tokens(w, pixels_HWC, model: config.Model):
    """One tile, normalised, as embeddings of the decoder's width: by the encoder, or by one linear layer."""
    if model.vision.encoder == "linear":
        blocks = patch_vectors(pixels_HWC, model.vision.shuffle * model.vision.patch_px)
        return blocks @ w["vision"]["projection"]["weight"] + w["vision"]["projection"]["bias"]
    return vision(w["vision"], pixels_HWC, model.vision) @ w["projector"]


# ---------------------------------------------------------------------------------------------------------- decoder


class Decoded(NamedTuple):
    hidden: np.ndarray  # [B, T, D] after the final norm
    logits: np.ndarray  # [B, T, V]
    router_logits: np.ndarray  # [L_moe, B, T, E]
    chosen: np.ndarray  # [L_moe, B, T, K]


def embed(w, tokens, tiles, model: config.Model):
    """Embeddings of one row; every `<|patch|>` takes the next feature of the row's tiles."""
    features = []
    for tile in tiles:
        features += list(picture_tokens(w, tile / 127.5 - 1, model))
    return np.array([features.pop(0) if features and token == PATCH else w["embed"][token] for token in tokens])


def decode(tree: dict, model: config.Model, batch: Batch) -> Decoded:
    """The whole model, row by row, layer by layer."""
    w = float64(tree)
    layers = [
        (kind, layer_of(w["stack"][f"segment{i}"][f"slot{slot}"], repeat))
        for i, (period, repeats) in enumerate(model.plan)
        for repeat in range(repeats)
        for slot, kind in enumerate(period)
    ]
    rows = []
    for b, (positions, segments) in enumerate(zip(batch.positions, batch.segment_ids, strict=True)):
        x, routings = embed(w, batch.tokens[b], batch.tiles[b], model), []
        for kind, layer in layers:
            attention_kind, ffn = kind.split("+")
            h = rms(x, model.norm_eps) * layer["attention_norm"]["weight"]
            x = x + attention(layer["attention"], h, positions, segments, model, attention_kind)
            h = rms(x, model.norm_eps) * layer["ffn_norm"]["weight"]
            if ffn == "moe":
                y, *routing = moe(layer["moe"], h, model)
                routings.append(routing)
            else:
                y = swiglu(h, layer["dense"])
            x = x + y
        hidden = rms(x, model.norm_eps) * w["norm"]["weight"]
        head = w["embed"].T if model.tied_embeddings else w["head"]
        rows.append((hidden, hidden @ head, [r[0] for r in routings], [r[1] for r in routings]))
    hidden, logits, router, chosen = (np.array(part) for part in zip(*rows, strict=True))
    return Decoded(hidden, logits, np.swapaxes(router, 0, 1), np.swapaxes(chosen, 0, 1))
