"""Rows of comparisons at random, settings that cover every loss and knob, and the slow twin: one answer at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llamax import config
from llamax.batch import MISMATCHED

S = 3  # comparisons a row, at most


def preference(reference=True, **settings) -> config.Preference:
    """`sigmoid=1.0` and the like are losses, all else knobs."""
    names = set(config.PreferenceLosses.__dataclass_fields__)
    losses = {name: settings.pop(name) for name in list(settings) if name in names}
    return config.Preference(losses=config.PreferenceLosses(**losses), reference=reference, **settings)


SETTINGS: dict[str, config.Preference] = {
    "sigmoid": preference(sigmoid=1.0),
    "conservative": preference(sigmoid=1.0, beta=0.3, label_smoothing=0.2),
    "cpo": preference(sigmoid=1.0, reference=False),
    "per_token": preference(sigmoid=1.0, per_token=True, beta=2.0),
    "ld": preference(sigmoid=1.0, ld_alpha=0.4),
    "ld_zero": preference(hinge=1.0, ld_alpha=0.0),
    "wpo": preference(sigmoid=1.0, wpo=True),
    "wpo_simpo": preference(simpo=1.0, wpo=True, simpo_gamma=0.3),
    "forward_kl": preference(sigmoid=1.0, f_divergence="forward_kl"),
    "js": preference(nca_pair=1.0, f_divergence="js"),
    "alpha": preference(apo_zero=1.0, f_divergence="alpha", f_alpha=0.7),
    "hinge": preference(hinge=1.0),
    "ipo": preference(ipo=1.0),
    "robust": preference(robust=1.0, label_smoothing=0.1),
    "exo_pair": preference(exo_pair=1.0, label_smoothing=0.1),
    "nca_pair": preference(nca_pair=1.0),
    "bco_pair": preference(bco_pair=1.0),
    "bco_shift": preference(bco_pair=1.0, bco_shift=True),
    "sppo_hard": preference(sppo_hard=1.0),
    "aot": preference(aot=1.0, label_smoothing=0.1),
    "aot_unpaired": preference(aot_unpaired=1.0, beta=0.4),
    "apo_zero": preference(apo_zero=1.0),
    "apo_down": preference(apo_down=1.0),
    "discopop": preference(discopop=1.0, discopop_temperature=0.2),
    "simpo": preference(simpo=1.0, beta=2.0, label_smoothing=0.1),
    "orpo": preference(orpo=1.0),
    "nll": preference(nll=0.5),
    "kto": preference(kto=1.0, desirable_weight=1.5, undesirable_weight=0.8),
    "apo_zero_unpaired": preference(apo_zero_unpaired=1.0, desirable_weight=0.7),
    "mpo": preference(sigmoid=0.8, bco_pair=0.2, nll=1.0),
}
OF_THE_MICRO_BATCH = {"bco_shift", "aot", "aot_unpaired", "kto"}  # statistics over it, as their docstrings say


@dataclass(frozen=True)
class Rows:
    """float64 or int32 [B, T] each."""

    logp: np.ndarray
    sides: np.ndarray
    ref: np.ndarray
    positions: np.ndarray
    collisions: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.logp, self.sides, self.ref, self.positions, self.collisions

    def map(self, change) -> Rows:
        return Rows(*(change(x) for x in self.arrays()))


def random_rows(seed: int = 0, n_rows: int = 4) -> Rows:
    """Segments of a prompt and an answer with untrained tokens inside: pairs, answers alone (the first row has a good
    one, the last a bad one), answers to other prompts, padding. The third row has no comparison."""
    rng = np.random.default_rng(seed)
    answers = [[1, -1, MISMATCHED + 1, 2], [1, -1, 2, -2, 3, -3], [0], [1, -1, -2, MISMATCHED + 1, MISMATCHED + 2]]
    sides = np.zeros((n_rows, 64), np.int32)
    positions = np.zeros_like(sides)
    for row in range(n_rows):
        at = 0
        for side in answers[row % len(answers)]:
            prompt, length = rng.integers(1, 4), rng.integers(2, 7)
            trained = rng.uniform(size=length) < 0.8
            trained[0] = True
            sides[row, at + prompt : at + prompt + length] = np.where(trained, side, 0)
            positions[row, at : at + prompt + length] = np.arange(prompt + length)
            at += prompt + length
    logp = -rng.exponential(0.8, sides.shape)
    ref = logp + rng.normal(0, 0.7, sides.shape) - 0.5 * (sides > MISMATCHED)  # the policy has moved away from it
    return Rows(logp, sides, ref, positions, -rng.exponential(1.0, sides.shape))


# ------------------------------------------------------------------------------------------------------ the slow twin


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@dataclass
class Answer:
    logp: float
    ref: float
    n: int
    log_ratios: list[float]  # of the trained tokens, in the order of their positions
    mean_above: float  # of log p - log sum p^2


def answer(rows: Rows, row: int, side: int, cfg: config.Preference) -> Answer | None:
    tokens = [t for t in range(rows.sides.shape[1]) if rows.sides[row, t] == side]
    if not tokens:
        return None
    tokens.sort(key=lambda t: rows.positions[row, t])
    logp = [rows.logp[row, t] for t in tokens]
    ref = [rows.ref[row, t] if cfg.reference else 0.0 for t in tokens]
    above = [rows.logp[row, t] - rows.collisions[row, t] for t in tokens]
    ratios = [a - b for a, b in zip(logp, ref, strict=True)]
    return Answer(sum(logp), sum(ref), len(tokens), ratios, sum(above) / len(tokens))


def slow(rows: Rows, cfg: config.Preference, constants: Rows | None = None) -> tuple[float, int]:
    """(the mixture's sum, comparisons). What is a constant to the gradient is taken from `constants`."""
    found = comparisons(rows, cfg)
    fixed = comparisons(constants or rows, cfg)
    total = sum(
        weight * sum(slow_loss(name, i, found, fixed, cfg) for i in range(len(found)))
        for name, weight in config.to_dict(cfg.losses).items()
        if weight
    )
    return total, sum(1 for _, _, chosen, rejected, _ in found if chosen or rejected)


def comparisons(rows: Rows, cfg: config.Preference) -> list[tuple]:
    """(row, number, chosen, rejected, answer to another prompt) of every row and number, None where there is none."""
    return [
        (row, k, *(answer(rows, row, side, cfg) for side in (k, -k, MISMATCHED + k)))
        for row in range(len(rows.sides))
        for k in range(1, S + 1)
    ]


def reward(mine: Answer, other: Answer, cfg: config.Preference) -> float:
    """The implicit reward divided by beta."""
    shorter = min(mine.n, other.n)
    x = sum(mine.log_ratios[:shorter]) + cfg.ld_alpha * sum(mine.log_ratios[shorter:])
    if cfg.per_token:
        x /= mine.n
    a = {"reverse_kl": 0.0, "forward_kl": 1.0, "alpha": cfg.f_alpha}.get(cfg.f_divergence)
    if a is None:  # js: log(2u / (1 + u))
        return math.log(2 * math.exp(x) / (1 + math.exp(x)))
    return (1 - math.exp(x) ** -a) / a if a else x


def slow_loss(name: str, i: int, found: list, fixed: list, cfg: config.Preference) -> float:
    _, _, good, bad, _ = found[i]
    if name == "nll":
        return -good.logp / good.n if good else 0.0
    if name in ("kto", "apo_zero_unpaired"):
        others = [other.logp - other.ref for *_, other in fixed if other]
        z = max(0.0, sum(others) / len(others)) if name == "kto" and others else 0.0
        losses = []
        if good:
            losses.append(cfg.desirable_weight * (1 - sigma(cfg.beta * (good.logp - good.ref - z))))
        if bad:
            losses.append(cfg.undesirable_weight * (1 - sigma(cfg.beta * (z - (bad.logp - bad.ref)))))
        return sum(losses) / len(losses) if losses else 0.0
    if not (good and bad):
        return 0.0
    weight = math.exp(fixed[i][2].mean_above + fixed[i][3].mean_above) if cfg.wpo else 1.0
    return weight * slow_pair(name, i, found, fixed, cfg)


def slow_pair(name: str, i: int, found: list, fixed: list, cfg: config.Preference) -> float:
    _, _, good, bad, _ = found[i]
    eps, beta = cfg.label_smoothing, cfg.beta
    w, v = beta * reward(good, bad, cfg), beta * reward(bad, good, cfg)
    d = w - v
    pairs = [c for c in found if c[2] and c[3]]
    if name == "aot":
        mine = good.logp - bad.logp
        rank = sum(c[2].logp - c[3].logp < mine for c in pairs)
        d = beta * (mine - sorted(c[2].ref - c[3].ref for c in pairs)[rank])
    if name == "aot_unpaired":
        rank = sum(beta * reward(c[2], c[3], cfg) < w for c in pairs)
        d = w - sorted(beta * reward(c[3], c[2], cfg) for c in pairs)[rank]
    if name in ("sigmoid", "aot", "aot_unpaired"):
        return -(1 - eps) * math.log(sigma(d)) - eps * math.log(sigma(-d))
    if name == "hinge":
        return max(0.0, 1 - d)
    if name == "ipo":
        return ((good.logp - good.ref) / good.n - (bad.logp - bad.ref) / bad.n - 0.5 / beta) ** 2
    if name == "robust":
        return (-(1 - eps) * math.log(sigma(d)) + eps * math.log(sigma(-d))) / (1 - 2 * eps)
    if name == "exo_pair":
        return sum(p * math.log(p / q) for p, q in ((sigma(d), 1 - eps), (sigma(-d), eps)))
    if name == "nca_pair":
        return -math.log(sigma(w)) - 0.5 * math.log(sigma(-w)) - 0.5 * math.log(sigma(-v))
    if name == "bco_pair":
        both = [r for c in fixed if c[2] and c[3] for r in (reward(c[2], c[3], cfg), reward(c[3], c[2], cfg))]
        m = beta * sum(both) / len(both) if cfg.bco_shift else 0.0
        return -math.log(sigma(w - m)) - math.log(sigma(m - v))
    if name == "sppo_hard":
        return (w / beta - 0.5 / beta) ** 2 + (v / beta + 0.5 / beta) ** 2
    if name == "apo_zero":
        return 1 - sigma(w) + sigma(v)
    if name == "apo_down":
        return sigma(w) + 1 - sigma(w - v)
    if name == "discopop":
        gate = sigma(d / cfg.discopop_temperature)
        return (1 - gate) * math.log(1 + math.exp(-d)) + gate * math.exp(-d)
    a, b = good.logp / good.n, bad.logp / bad.n
    if name == "simpo":
        d = beta * (a - b) - cfg.simpo_gamma
        return -(1 - eps) * math.log(sigma(d)) - eps * math.log(sigma(-d))
    assert name == "orpo"
    odds = (math.exp(a) / (1 - math.exp(a))) / (math.exp(b) / (1 - math.exp(b)))
    return -beta * math.log(odds / (1 + odds))
