"""The goldens of losses that compare answers (tests/golden/README.md), and our side of each case.

A case is "FAMILY/NAME". `ours` takes the losses as an argument, so that a mutant of them can be asked too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamax import config
from llamax.batch import MISMATCHED
from llamax.losses import next_token, preference, reward
from tests.tolerances import TRL_32, TRL_64, TRL_ROUNDED

FOLDER = Path(__file__).resolve().parent.parent / "golden" / "post-training"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
FAMILIES = ("dpo", "reffree", "kto", "reward")
CASES = [f"{family}/{name}" for family in FAMILIES for name in MANIFEST["families"][family]]
ROUNDED = ("dpo/alpha05", "dpo/exo_pair_e01", "reffree/orpo")  # TRL computes these, or their constants, in float32
OURS = SimpleNamespace(preference=preference, reward=reward)


@cache
def family(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / f"{name}.npz"))


def inputs(name: str, dtype: Any) -> SimpleNamespace:
    """What the cases of a family share; floats in `dtype`."""
    given = {key.removeprefix("in__"): x for key, x in family(name).items() if key.startswith("in__")}
    return SimpleNamespace(**{key: x.astype(dtype) if x.dtype.kind == "f" else x for key, x in given.items()})


def wanted(case: str) -> dict[str, np.ndarray]:
    name, _, key = case.partition("/")
    head = f"out__{key}__"
    return {key.removeprefix(head): x for key, x in family(name).items() if key.startswith(head)}


def ours(cases: Iterable[str], dtype: str, losses: SimpleNamespace = OURS) -> dict[str, dict[str, jax.Array]]:
    """The same of ours, computed in `dtype`: one program for all of the cases, which compiles faster than it runs op by
    op."""

    def all_of_them():
        found = {}
        for case in cases:
            name, _, key = case.partition("/")
            found[case] = BY_FAMILY[name](MANIFEST["families"][name][key], inputs(name, dtype), losses, key)
        return found

    with jax.enable_x64(dtype == "float64"):
        return jax.tree.map(np.asarray, jax.jit(all_of_them)())


def tolerance(case: str, dtype: str) -> dict[str, float]:
    if dtype == "float32":
        return TRL_32
    return TRL_ROUNDED if case in ROUNDED else TRL_64


# Their names of ours: (loss, per_token).
LOSSES = {"sigmoid_norm": ("sigmoid", True)}
DIVERGENCES = {"js_divergence": "js", "alpha_divergence": "alpha"}


def dpo(asked: dict, given: SimpleNamespace, losses: SimpleNamespace, _: str) -> dict[str, jax.Array]:
    """Four pairs: the first four rows are chosen, the others rejected. A row of ours is a pair."""

    def rows(x):
        return jnp.concatenate([x[:4], x[4:]], axis=1)

    names = dict(zip(asked["loss_types"], asked["weights"] or [1.0] * 9, strict=False))
    of_tokens = names.pop("sft", 0.0)  # the term next_token
    members = {LOSSES.get(name, (name, False)): weight for name, weight in names.items()}
    cfg = config.Preference(
        losses=config.PreferenceLosses(**{name: weight for (name, _), weight in members.items()}),
        beta=asked["beta"],
        label_smoothing=asked["label_smoothing"],
        reference=asked["reference"],
        per_token=any(per_token for _, per_token in members),
        f_divergence=DIVERGENCES.get(asked["f_divergence"], asked["f_divergence"]),
        f_alpha=asked["f_alpha"],
        ld_alpha=asked["ld_alpha"] or 1.0,
        wpo=asked["wpo"],
    )
    mask = given.mask > 0
    sides = rows(np.where(mask, np.array([1] * 4 + [-1] * 4)[:, None], 0).astype(np.int32))
    # Their reference is a sum already; it stands at the first token here.
    ref = np.zeros_like(given.mask)
    ref[np.arange(8), mask.argmax(1)] = np.concatenate([given.ref_chosen_logps, given.ref_rejected_logps])
    positions = np.tile(np.arange(9, dtype=np.int32), (4, 2))

    def loss(logp):
        collisions = rows(given.log_sum_sq_probs) if cfg.wpo else None
        compared = losses.preference.compare(rows(logp), sides, rows(ref), positions, 1, cfg, collisions)
        total = losses.preference.preference(compared, cfg).mean() if cfg.weights else 0.0
        return total + of_tokens * next_token.next_token(logp[:4], given.mask[:4]).mean()

    value, grad = jax.value_and_grad(loss)(jnp.asarray(given.per_token_logps))
    return {"loss": value, "grad": grad}


def reffree(asked: dict, given: SimpleNamespace, losses: SimpleNamespace, key: str) -> dict[str, jax.Array]:
    """Six pairs of whole answers, as if of one token; their gradients are of the mean."""
    name = asked.get("loss_type", key)
    cfg = config.Preference(
        losses=config.PreferenceLosses(**{name: 1.0}),
        beta=asked["beta"],
        label_smoothing=asked.get("label_smoothing", 0.0),
        simpo_gamma=asked.get("simpo_gamma", config.Preference.simpo_gamma),
        reference=False,
    )

    def each(chosen, rejected):
        one = jnp.ones_like(chosen)
        compared = losses.preference.Compared(chosen, rejected, 0 * one, 0 * one, one, one, one > 0, one > 0)
        return losses.preference.PREFERENCE[name](compared, cfg)

    pair = jnp.asarray(given.chosen_logps), jnp.asarray(given.rejected_logps)
    if key == "orpo":
        return {"ratio_losses": -each(*pair)}  # which they subtract
    chosen, rejected = jax.grad(lambda *pair: each(*pair).mean(), (0, 1))(*pair)
    return {"losses": each(*pair), "grad_chosen": chosen, "grad_rejected": rejected}


def kto(asked: dict, given: SimpleNamespace, losses: SimpleNamespace, _: str) -> dict[str, jax.Array]:
    """Six answers, each labelled; beside each what an answer to another prompt gets, as if of one token."""
    cfg = config.Preference(
        losses=config.PreferenceLosses(**{asked["loss_type"]: 1.0}),
        beta=asked["beta"],
        desirable_weight=asked["desirable_weight"],
        undesirable_weight=asked["undesirable_weight"],
    )
    sides = np.repeat(np.where(given.label, 1, -1)[:, None], 6, axis=1).astype(np.int32)
    sides[:, 5] = MISMATCHED + 1
    ref = np.zeros((6, 6), given.ref_logps.dtype)
    ref[:, 0], ref[:, 5] = given.ref_logps, given.kl_ref

    def loss(logp):
        with_other = jnp.concatenate([logp, given.kl_policy[:, None]], axis=1)
        compared = losses.preference.compare(with_other, sides, ref, jnp.zeros_like(sides), 1, cfg)
        return losses.preference.preference(compared, cfg).mean()

    value, grad = jax.value_and_grad(loss)(jnp.asarray(given.per_token_logps))
    return {"loss": value, "grad": grad}


def reward_model(asked: dict, given: SimpleNamespace, losses: SimpleNamespace, _: str) -> dict[str, jax.Array]:
    """Five pairs: the first five scores are of the chosen answers."""
    margin = given.margin if asked["margin"] else None
    centring = asked["center_rewards_coefficient"] or 0.0

    def loss(scores):
        return losses.reward.bradley_terry(scores[:5], scores[5:], np.ones(5, bool), margin, centring).mean()

    value, grad = jax.value_and_grad(loss)(jnp.asarray(given.scores))
    return {"loss": value, "grad": grad}


BY_FAMILY = {"dpo": dpo, "reffree": reffree, "kto": kto, "reward": reward_model}
