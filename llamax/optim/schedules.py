"""Learning-rate schedules by name; the parts come from optax."""

from __future__ import annotations

import optax

from llamax import config


def schedule(optim: config.Optim, steps: int) -> optax.Schedule:
    """The learning rate at every step, from `optim.begins` on until `steps`: linear warm-up from 0, then

    cosine: down to end_lr_ratio x peak at the last step;
    wsd: constant, then linear over the last `decay_steps` (warm-up, stable, decay: MiniCPM, arXiv 2404.06395, 4.2).
    """
    from_its_start = _from_its_start(optim, steps - optim.begins)
    return lambda count: from_its_start(count - optim.begins)


def _from_its_start(optim: config.Optim, steps: int) -> optax.Schedule:
    end = optim.peak_lr * optim.end_lr_ratio
    warmup = optax.linear_schedule(0.0, optim.peak_lr, optim.warmup_steps)
    if optim.schedule == "cosine":
        after = optax.cosine_decay_schedule(optim.peak_lr, max(1, steps - optim.warmup_steps), optim.end_lr_ratio)
        return optax.join_schedules([warmup, after], [optim.warmup_steps])
    stable = optax.constant_schedule(optim.peak_lr)
    decay = optax.linear_schedule(optim.peak_lr, end, max(1, optim.decay_steps))
    return optax.join_schedules([warmup, stable, decay], [optim.warmup_steps, steps - optim.decay_steps])
