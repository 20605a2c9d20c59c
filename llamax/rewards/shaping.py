"""Rewards for how long an answer is and how often it says the same, counted in tokens: added to that of being right."""

from __future__ import annotations

from collections.abc import Sequence


def overlong(tokens: int, most: int, margin: int) -> float:
    """0 up to most - margin tokens, falling to -1 at `most`, -1 beyond (DAPO, arXiv 2503.14476, eq. 13)."""
    if tokens > most:
        return -1.0
    return min(0.0, ((most - margin) - tokens) / margin)


def repetition(tokens: Sequence[int], n: int, most: float = -1.0) -> float:
    """The share of n-grams that stood before, times `most` (arXiv 2502.03373); 0 of an answer shorter than one."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return most * (1 - len(set(grams)) / len(grams)) if grams else 0.0
