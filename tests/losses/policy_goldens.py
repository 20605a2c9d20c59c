"""The goldens of policies' losses (tests/golden/README.md), and our side of each case; `losses` may be a mutant."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamax import config
from llamax.losses import policy
from tests.losses.goldens import MANIFEST, inputs, wanted
from tests.tolerances import TRL_32, TRL_64, TRL_ROUNDED

CASES = [f"{family}/{name}" for family in ("grpo", "rloo") for name in MANIFEST["families"][family]]
ROUNDED = ("grpo/sapo",)  # TRL has its temperatures in float32
AVERAGES = dict(grpo="sample", bnpo="batch", dr_grpo="constant", dapo="token", luspo="sum", cispo="token")
AVERAGES |= dict(sapo="sample", vespo="token")
OURS = ("cispo", "sapo", "vespo")  # the others are settings of one loss


def settings(case: str) -> config.Policy:
    family, _, name = case.partition("/")
    asked = MANIFEST["families"][family][name]
    if family == "rloo":
        return config.Policy(ratio="product", clip_low=asked["eps"], clip_high=asked["eps_high"], average="sample")
    kind, bound = asked["loss_type"], asked["eps_high"] or asked["eps"]
    return config.Policy(
        loss=kind if kind in OURS else "clip",
        ratio=asked["level"],
        clip_low=asked["eps"],
        clip_high=bound,
        ratio_max=bound if kind == "cispo" else asked["delta"] or 0.0,
        average=AVERAGES[kind],
        constant_tokens=asked["maxlen"] if kind == "dr_grpo" else 0,
        kl="none" if not asked["beta"] else "k3_ratio" if asked["bias_kl"] else "k3",
        kl_weight=asked["beta"],
        importance="truncate" if asked["is_ratio"] else "none",
        importance_high=1e9,
        stale_above=asked["opsm"] or 0.0,
        top_entropy=asked["top_ent"],
        entropy=asked["ent_coef"],
    )


def ours(case: str, dtype: Any, losses: ModuleType = policy) -> dict[str, np.ndarray]:
    """Six samples, one a row: the loss and its gradient."""
    family, _, name = case.partition("/")
    asked, cfg = MANIFEST["families"][family][name], settings(case)
    with jax.enable_x64(dtype == "float64"):
        given = inputs(family, dtype)
        mask = (given.mask > 0) & (name != "dapo_fullmask")
        advantage = given.advantages * (name != "dapo_zero_adv")
        parts = asked.get("accum", 1) if cfg.average != "token" else 1  # the other micro-batches of a step are empty

        def loss(logp):
            found = losses.policy(
                losses.Samples(
                    logp,
                    given.old_logps if asked.get("old", True) else jax.lax.stop_gradient(logp),
                    jnp.broadcast_to(advantage[:, None], mask.shape),
                    mask,
                    jnp.ones(mask.shape, jnp.int32),
                    ref=getattr(given, "ref_logps", None),
                    sampler=given.old_logps - np.log(given.is_ratio_token) if asked.get("is_ratio") else None,
                    entropy=getattr(given, "entropy", None),
                ),
                1,
                cfg,
            )
            return found._replace(den=found.den * parts).mean()

        value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(given.logps))
        return {"loss": np.asarray(value), "grad": np.asarray(grad)}


def tolerance(case: str, dtype: str) -> dict[str, float]:
    if dtype == "float32":
        return TRL_32
    return TRL_ROUNDED if case in ROUNDED else TRL_64


def agrees(case: str, losses: ModuleType) -> bool:
    return all(np.allclose(x, wanted(case)[key], **TRL_32) for key, x in ours(case, "float32", losses).items())
