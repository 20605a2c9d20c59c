"""Learning-rate schedules at the steps that define them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llamax import config
from llamax.optim.schedules import schedule

PEAK, END = 2e-3, 2e-4


def slow(optim: config.Optim, steps: int, step: int) -> float:
    if step < optim.warmup_steps:
        return PEAK * step / optim.warmup_steps
    if optim.schedule == "cosine":
        done = min(1, (step - optim.warmup_steps) / (steps - optim.warmup_steps))
        return END + (PEAK - END) * 0.5 * (1 + math.cos(math.pi * done))
    left = max(0, steps - step)
    return PEAK if left >= optim.decay_steps else END + (PEAK - END) * left / optim.decay_steps


@pytest.mark.parametrize("optim", [config.Optim(), config.Optim(schedule="wsd", decay_steps=30)], ids=["cosine", "wsd"])
def test_schedule_matches_the_formula(optim):
    optim = config.Optim(PEAK, optim.schedule, warmup_steps=10, decay_steps=optim.decay_steps, end_lr_ratio=0.1)
    lr = schedule(optim, 110)
    steps = [0, 5, 9, 10, 11, 60, 79, 80, 81, 95, 109, 110, 500]
    np.testing.assert_allclose([lr(step) for step in steps], [slow(optim, 110, step) for step in steps], rtol=1e-5)
    np.testing.assert_allclose([lr(0), lr(10), lr(110)], [0, PEAK, END], rtol=1e-5)


def test_no_warmup_starts_at_the_peak():
    optim = config.Optim(PEAK, warmup_steps=0, end_lr_ratio=0.1)
    lr = schedule(optim, 100)
    np.testing.assert_allclose([lr(0), lr(50), lr(100)], [PEAK, (PEAK + END) / 2, END], rtol=1e-5)
