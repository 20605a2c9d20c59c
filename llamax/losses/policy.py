"""The loss of a policy on samples that it drew and that were rewarded: nothing but sums over their tokens.

    r_t = exp(logp_t - old_t)        of a token; or of a sample, exp mean_t log r_t (GSPO), exp sum_t log r_t (RLOO)
    L = sum over tokens of w_t l(r_t, A_t), divided by what `average` counts

A: the advantage (post/advantages.py). old: the policy's own log-probability before the first step on these samples.
`clip` is PPO's surrogate, of which GRPO, DAPO, Dr. GRPO, GSPO and LUSPO are settings: the table of them all is in
docs/how-to/policy-losses.md. A row holds up to S samples, told apart by numbers, in any order of its tokens.

Letters: B rows, T tokens a row, S samples a row. Dtypes are those of the log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from llamax import config
from llamax.losses.sum import Sum

MOST = 80.0  # exponents are cut here: exp is still finite in float32
MOST_KL = 20.0  # and here the log-ratio to the reference, by which verl and NeMo cut it too
sg = jax.lax.stop_gradient


class Samples(NamedTuple):
    """The samples' tokens. What `mask` leaves out is of no sample, or is not trained: prompts, a tool's words."""

    logp: Float[Array, "B T"]  # of the policy
    old: Float[Array, "B T"]  # of the policy before its first step on them
    advantage: Float[Array, "B T"]
    mask: Bool[Array, "B T"]
    sample: Int[Array, "B T"]  # its number in the row, from 1; 0 elsewhere
    ref: Float[Array, "B T"] | None = None  # of the reference; read for `kl`
    sampler: Float[Array, "B T"] | None = None  # of the program that drew them; read for `importance`, `stale_above`
    entropy: Float[Array, "B T"] | None = None  # of the policy; read for `entropy`, `top_entropy`
    of_prompt: Float[Array, "B T"] | None = None  # trained tokens of all samples of its prompt; average="prompt"


def policy(samples: Samples, S: int, cfg: config.Policy) -> Sum:
    """What `cfg` says, added up over these rows; over what its `average` counts in them."""
    s = without_holes(samples)
    loss_BT = LOSSES[cfg.loss](s, S, cfg)
    if cfg.stale_above:
        loss_BT = jnp.where(stale(s, S, cfg), 0, loss_BT)
    if cfg.top_entropy < 1:
        loss_BT = jnp.where(uncertain(s, cfg.top_entropy), loss_BT, 0)
    if cfg.importance != "none" and cfg.loss != "vespo":  # which has them in its own weights
        loss_BT = importance(s, S, cfg) * loss_BT
    if cfg.kl != "none":
        loss_BT = loss_BT + cfg.kl_weight * kl(s, cfg.kl)
    if cfg.entropy:
        assert s.entropy is not None, "the loss reads the policy's entropy, and there is none"
        loss_BT = loss_BT - cfg.entropy * s.entropy
    return Sum(jnp.where(s.mask, weights(s, S, cfg) * loss_BT, 0).sum(), den(s.mask, s.sample, S, cfg, s.of_prompt))


def without_holes(s: Samples) -> Samples:
    """0 where nothing is trained: no loss, and no gradient, then meets inf or 0 x inf."""
    floats = {name: x for name, x in s._asdict().items() if name not in ("mask", "sample") and x is not None}
    return s._replace(**{name: jnp.where(s.mask, x, 0) for name, x in floats.items()})


# ---------------------------------------------------------------------------------------------------- of a sample


def of_samples(x_BT: Array, sample_BT: Array, S: int) -> Float[Array, "B S"]:
    """x added up over every sample k = 1..S."""
    return jnp.where(sample_BT[..., None] == jnp.arange(1, S + 1), x_BT[..., None], 0).sum(axis=1)


def at_tokens(x_BS: Array, sample_BT: Array) -> Float[Array, "B T"]:
    """Every token has what its sample has; 0 outside of all."""
    found = jnp.take_along_axis(x_BS, jnp.maximum(sample_BT - 1, 0), axis=1)
    return jnp.where(sample_BT > 0, found, 0)


def sums(x_BT: Array, s: Samples, S: int) -> Float[Array, "B T"]:
    """At every token, x added up over its sample's trained tokens."""
    return at_tokens(of_samples(jnp.where(s.mask, x_BT, 0), s.sample, S), s.sample)


def means(x_BT: Array, s: Samples, S: int) -> Float[Array, "B T"]:
    return sums(x_BT, s, S) / jnp.maximum(sums(jnp.ones_like(x_BT), s, S), 1)


def log_ratio(s: Samples, S: int, level: str) -> Float[Array, "B T"]:
    """log r at every token, by `config.Policy.ratio`."""
    token_BT = s.logp - s.old
    if level == "sequence":
        token_BT = means(token_BT, s, S)
    elif level == "sequence_token":  # the value of the sample's, the gradient of the token's (GSPO, section 4.3)
        token_BT = sg(means(token_BT, s, S)) + s.logp - sg(s.logp)
    elif level == "product":
        token_BT = sums(token_BT, s, S)
    return jnp.clip(token_BT, -MOST, MOST)


# ------------------------------------------------------------------------------------------------------ the losses


def clip(s: Samples, S: int, cfg: config.Policy) -> Array:
    """-min(min(r, ratio_max) A, clip(r, 1 - clip_low, 1 + clip_high) A); where A < 0, at most -dual_clip A.

    PPO (arXiv 1707.06347, eq. 7); GRPO (2402.03300); bounds of their own are DAPO's (2503.14476), ratio_max
    INTELLECT-2's (2505.07291), dual_clip from 1912.09729.
    """
    r, a = jnp.exp(log_ratio(s, S, cfg.ratio)), s.advantage
    first = jnp.where(r < cfg.ratio_max, r, cfg.ratio_max) if cfg.ratio_max else r
    loss = -jnp.minimum(first * a, jnp.clip(r, 1 - cfg.clip_low, 1 + cfg.clip_high) * a)
    return jnp.where(a < 0, jnp.minimum(loss, -cfg.dual_clip * a), loss) if cfg.dual_clip else loss


def cispo(s: Samples, S: int, cfg: config.Policy) -> Array:
    """-min(r, ratio_max) A logp, the weight a constant to the gradient: no token's gradient is dropped (CISPO, arXiv
    2506.13585)."""
    assert cfg.ratio_max > 0, "cispo cuts ratios at ratio_max: without one every weight would be 0"
    return -sg(jnp.minimum(jnp.exp(log_ratio(s, S, "token")), cfg.ratio_max)) * s.advantage * s.logp


def sapo(s: Samples, S: int, cfg: config.Policy) -> Array:
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau by the advantage's sign: a soft gate (SAPO, arXiv 2511.20347)."""
    tau = jnp.where(s.advantage > 0, cfg.sapo_tau_positive, cfg.sapo_tau_negative)
    return -4 / tau * jax.nn.sigmoid(tau * (jnp.exp(log_ratio(s, S, "token")) - 1)) * s.advantage


def vespo(s: Samples, S: int, cfg: config.Policy) -> Array:
    """-W^k exp(lambda (1 - W)) A logp, W the whole sample's ratio, the weight a constant to the gradient; k and lambda
    by the advantage's sign (VESPO, arXiv 2602.10693). W counts from the sampler where `importance` says so."""
    log_w = s.logp - s.old
    if cfg.importance != "none":
        log_w = log_w + jnp.log(jnp.maximum(importance(s, S, cfg), 1e-8))
    log_w = jnp.clip(sums(log_w, s, S), -MOST_KL, MOST_KL)
    good = s.advantage >= 0
    k = jnp.where(good, cfg.vespo_k_positive, cfg.vespo_k_negative)
    decay = jnp.where(good, cfg.vespo_lambda_positive, cfg.vespo_lambda_negative)
    return -sg(jnp.exp(k * log_w + decay * (1 - jnp.exp(log_w)))) * s.advantage * s.logp


LOSSES: dict[str, Callable[[Samples, int, config.Policy], Array]] = {
    "clip": clip,
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
}


def kl(s: Samples, kind: str) -> Float[Array, "B T"]:
    """An estimate of KL(policy || reference) from each token, u = ref - logp (schulman.ai, "Approximating KL").

    As a loss k2 = u^2 / 2 has the gradient of that divergence; k3 = e^u - u - 1 has that of the reverse one, unless it
    is weighed by the ratio (k3_ratio; DeepSeek-V3.2). -u, k1, has none, and belongs into the reward.
    """
    assert s.ref is not None, "the loss reads a reference's log-probabilities, and there are none"
    u = jnp.clip(sg(s.ref) - s.logp, -MOST_KL, MOST_KL)
    if kind == "k2":
        return u**2 / 2
    k3 = jnp.exp(u) - u - 1
    return k3 if kind == "k3" else jnp.exp(jnp.clip(s.logp - s.old, -MOST, MOST)) * k3


# ----------------------------------------------------------------------------- what the sampler did, and the policy not


def importance(s: Samples, S: int, cfg: config.Policy) -> Float[Array, "B T"]:
    """Weights rho = exp(old - sampler), a constant to the gradient: the sampler is another program than the trainer's,
    or has older weights.

    truncate: min(rho, high) (TIS, off-policy-rl blog by Yao et al.); mask: rho inside low..high, else 0 (IcePop);
    sequence_truncate and sequence_mask: the same of the product over the sample; sequence_drop: rho of tokens cut at
    high, and 0 for all of a sample whose geometric mean is outside.
    """
    assert s.sampler is not None, "the loss reads the sampler's log-probabilities, and there are none"
    low, high = cfg.importance_low, cfg.importance_high
    log_rho = s.old - s.sampler
    if cfg.importance.startswith("sequence") and cfg.importance != "sequence_drop":
        log_rho = sums(log_rho, s, S)
    rho = jnp.exp(jnp.clip(log_rho, -MOST, MOST))
    if cfg.importance.endswith("truncate"):
        return sg(jnp.minimum(rho, high))
    judged = jnp.exp(jnp.clip(means(log_rho, s, S), -MOST, MOST)) if cfg.importance == "sequence_drop" else rho
    kept = jnp.minimum(rho, high) if cfg.importance == "sequence_drop" else rho
    return sg(jnp.where((judged >= low) & (judged <= high), kept, 0))


def stale(s: Samples, S: int, cfg: config.Policy) -> Bool[Array, "B T"]:
    """Of bad samples those that the policy has left: A < 0 and mean_t (sampler - logp) > stale_above (DeepSeek-V3.2,
    off-policy sequence masking)."""
    drew = s.old if s.sampler is None else s.sampler
    return (s.advantage < 0) & (sg(means(drew - s.logp, s, S)) > cfg.stale_above)


def uncertain(s: Samples, share: float) -> Bool[Array, "B T"]:
    """The share of tokens with the largest entropy (arXiv 2506.01939): a statistic of the micro-batch."""
    assert s.entropy is not None, "the loss reads the policy's entropy, and there is none"
    least = jnp.nanquantile(jnp.where(s.mask, s.entropy, jnp.nan), 1 - share)
    return s.entropy >= sg(least)


# -------------------------------------------------------------------------------------------------------- averages


def weights(s: Samples, S: int, cfg: config.Policy) -> Array:
    """w_t of every trained token, by `config.Policy.average`."""
    ones = jnp.ones_like(s.logp)
    if cfg.average == "sample":
        return 1 / jnp.maximum(sums(ones, s, S), 1)
    if cfg.average == "prompt":
        assert s.of_prompt is not None, "average=prompt reads how many tokens a prompt's samples have"
        return 1 / jnp.maximum(s.of_prompt, 1)
    if cfg.average == "batch":
        return ones / jnp.maximum(s.mask.sum(), 1)
    return ones


def den(
    mask_BT: Array, sample_BT: Array, S: int, cfg: config.Policy, of_prompt_BT: Array | None = None
) -> Float[Array, ""]:
    """What a batch's sums are divided by, known before a forward pass: its trained tokens, samples, or prompts.

    A sample without a trained token counts as one, unless `count_masked` is false.
    """
    if cfg.average == "token":
        return mask_BT.sum(dtype=jnp.float32)
    if cfg.average == "batch":
        return jnp.ones((), jnp.float32)
    if cfg.average == "prompt":
        assert of_prompt_BT is not None
        return jnp.where(mask_BT, 1 / jnp.maximum(of_prompt_BT, 1), 0).sum()
    assert cfg.average != "constant" or cfg.constant_tokens > 0, "average=constant divides by constant_tokens"
    counted_BT = (sample_BT > 0) & (mask_BT | cfg.count_masked)
    n = (of_samples(counted_BT.astype(jnp.float32), sample_BT, S) > 0).sum(dtype=jnp.float32)
    return n * cfg.constant_tokens if cfg.average == "constant" else n
