"""Advantages: how much better a sample was than its prompt's others, from their rewards alone (there is no critic).

    A_i = (R_i - b) / (s + eps)

b: the mean of the prompt's samples (GRPO, arXiv 2402.03300), of its other samples (RLOO, 2402.14740), or of the batch
(REINFORCE++, 2501.03262). s: the standard deviation of the prompt's samples, of the batch (ScaleRL, 2510.13786), or
nothing (Dr. GRPO, 2503.20783). A reward of NaN was not given: it moves no mean, and its advantage is 0. Samples that
all have one reward have advantages of exactly 0.

Letters: N samples, R kinds of reward. Everything is float64 on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from llamax import config

SAME = 1e-12  # a spread of rewards, as a share of the largest, that is rounding


def advantages(
    rewards_N: Float[np.ndarray, " N"], prompt_N: Int[np.ndarray, " N"], cfg: config.Advantage
) -> Float[np.ndarray, " N"]:
    """Of samples of the prompts that `prompt_N` numbers, in any order."""
    R_N = np.asarray(rewards_N, np.float64)
    scored_N = np.isfinite(R_N)
    if cfg.baseline == "best":
        return _best(R_N, prompt_N, scored_N)
    A_N = np.zeros_like(R_N)
    for places in _groups(prompt_N, scored_N):
        A_N[places] = _centred(R_N[places], cfg.baseline)
    if cfg.baseline == "batch":
        A_N[scored_N] = _centred(R_N[scored_N], cfg.baseline)
    by = {"none": [], "prompt": _groups(prompt_N, scored_N), "batch": [np.flatnonzero(scored_N)]}[cfg.scale]
    for places in by:
        A_N[places] = _divided(A_N[places], _std(R_N[places]) + cfg.eps)
    return A_N


def of_kinds(
    rewards_NR: Float[np.ndarray, "N R"],
    weights: Sequence[float],
    prompt_N: Int[np.ndarray, " N"],
    cfg: config.Advantage,
) -> Float[np.ndarray, " N"]:
    """Of rewards of several kinds: of their weighted sum; or with `cfg.each` every kind's by itself, whose weighted sum
    is brought to the batch's mean and deviation (GDPO, arXiv 2601.05242)."""
    weights_R = np.asarray(weights, np.float64)
    if not cfg.each:
        return advantages(total(rewards_NR, weights_R), prompt_N, cfg)
    A_N = sum(w * advantages(R_N, prompt_N, cfg) for w, R_N in zip(weights_R, np.transpose(rewards_NR), strict=True))
    return _divided(_centred(A_N, "batch"), _std(A_N) + cfg.eps)


def total(rewards_NR: Float[np.ndarray, "N R"], weights_R: Float[np.ndarray, " R"]) -> Float[np.ndarray, " N"]:
    """The weighted sum of the rewards that were given; NaN where none was."""
    given_NR = np.isfinite(rewards_NR)
    sum_N = np.where(given_NR, rewards_NR * weights_R, 0).sum(axis=1)
    return np.where(given_NR.any(axis=1), sum_N, np.nan)


def informative(rewards_N: Float[np.ndarray, " N"], prompt_N: Int[np.ndarray, " N"]) -> set[int]:
    """The prompts whose samples differ in reward: the others teach nothing (DAPO's dynamic sampling)."""
    R_N = np.asarray(rewards_N, np.float64)
    return {int(prompt_N[places[0]]) for places in _groups(prompt_N, np.isfinite(R_N)) if not _same(R_N[places])}


def _groups(prompt_N: np.ndarray, scored_N: np.ndarray) -> list[np.ndarray]:
    """Places of the scored samples of each prompt."""
    return [np.flatnonzero((prompt_N == prompt) & scored_N) for prompt in np.unique(prompt_N[scored_N])]


def _centred(R: np.ndarray, baseline: str) -> np.ndarray:
    if len(R) == 0 or _same(R):
        return np.zeros_like(R)
    centred = R - R.mean()
    return centred * len(R) / (len(R) - 1) if baseline == "leave_one_out" else centred


def _best(R_N: np.ndarray, prompt_N: np.ndarray, scored_N: np.ndarray) -> np.ndarray:
    """The best sample of a prompt has what it is better than the second best; the others 0 (arXiv 2503.19595)."""
    A_N = np.zeros_like(R_N)
    for places in _groups(prompt_N, scored_N):
        if len(places) > 1:
            second, first = places[np.argsort(R_N[places], kind="stable")[-2:]]
            A_N[first] = R_N[first] - R_N[second]
    return A_N


def _divided(A: np.ndarray, by: float) -> np.ndarray:
    return A / by if by else np.zeros_like(A)


def _std(R: np.ndarray) -> float:
    """Of a sample (n - 1); 0 of less than two."""
    return float(R.std(ddof=1)) if len(R) > 1 else 0.0


def _same(R: np.ndarray) -> bool:
    return bool(np.ptp(R) <= SAME * max(1e-300, np.abs(R).max()))
