"""From what a step returns to what a run shows: averages, losses by source and language, expert loads, speed, MFU.

The step's results stay on the device until it is time to log (`Window`): fetching them at every step would make the
host wait for the device, and the device for the host.

    average         sum of num / sum of den over the steps, never a mean of means
    MFU             model FLOP/s / peak FLOP/s; the peak is the devices' dense bfloat16 rate, or, where the table below
                    has none (a CPU), the measured rate of a 2048^3 float32 matmul

Letters: L MoE layers, E experts, S sources.
Sources of the peaks: the vendors' data sheets; TPU v7x counts one of a chip's two devices.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llamax.observe.goodput import Ledger

PEAK_BF16 = {  # part of jax's device_kind -> dense bfloat16 FLOP/s of one jax device; the first match counts
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,
    "TPU7x": 1153.5e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}


# ------------------------------------------------------------------------------------------------------------ averages


class Total(NamedTuple):
    """Numerator and denominator summed over a window of steps; numpy, scalar or [S]."""

    num: np.ndarray
    den: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """num / den; NaN where nothing was counted."""
        return np.divide(self.num, self.den, out=np.full_like(self.num, np.nan), where=self.den != 0)


class Window:
    """What the steps since the last `fetch` returned, left on the device."""

    def __init__(self) -> None:
        self._steps: list[dict[str, Any]] = []

    def add(self, values: Mapping[str, Any]) -> None:
        """Notes one step's values, `Sum(num, den)` pairs or arrays; waits for nothing."""
        self._steps.append(dict(values))

    def fetch(self) -> dict[str, Total | np.ndarray]:
        """The window's values, one transfer for all; starts the next window.

        A pair becomes the `Total` over the steps, an array its mean over the steps (float64). Entries that are not
        finite, from a step that was skipped, are left out; an array of nothing else gives NaN.
        """
        steps, self._steps = jax.device_get(self._steps), []
        names = dict.fromkeys(name for step in steps for name in step)
        return {name: _merge([step[name] for step in steps if name in step]) for name in names}


def _merge(values: list) -> Total | np.ndarray:
    if hasattr(values[0], "num"):
        num = np.array([v.num for v in values], np.float64)
        den = np.array([v.den for v in values], np.float64)
        good = np.isfinite(num) & np.isfinite(den)
        return Total(np.where(good, num, 0).sum(0), np.where(good, den, 0).sum(0))
    array = np.array(values, np.float64)
    good = np.isfinite(array)
    return Total(np.where(good, array, 0).sum(0), good.sum(0).astype(np.float64)).mean


def scalars(values: Mapping[str, Total | np.ndarray]) -> dict[str, float]:
    """The scalar ones among a window's values, as numbers."""
    means = {name: value.mean if isinstance(value, Total) else value for name, value in values.items()}
    return {name: float(mean) for name, mean in means.items() if np.ndim(mean) == 0}


def by_source(name: str, total: Total, sources: Sequence[str], langs: Sequence[str]) -> dict[str, float]:
    """NAME/source/SOURCE and NAME/lang/LANG for every one that the window saw.

    Args:
      name: such as "loss".
      total: sums by source, [S].
      sources: the S names, in the order of the batch's source ids.
      langs: the S sources' languages.
    """
    groups = {f"{name}/source/{source}": [i] for i, source in enumerate(sources)}
    for i, lang in enumerate(langs):
        groups.setdefault(f"{name}/lang/{lang}", []).append(i)
    sums = {key: (total.num[ids].sum(), total.den[ids].sum()) for key, ids in groups.items()}
    return {key: float(num / den) for key, (num, den) in sums.items() if den > 0}


class Experts(NamedTuple):
    """How evenly the experts of each of L layers share the work, in one step or over several."""

    load: np.ndarray  # [L, E]: the share of the layer's choices, K a token, that fell on each expert; 1 / E is balance
    max_over_mean: np.ndarray  # [L]: the busiest expert relative to an even share; 1 is balance, E / K is collapse
    entropy: np.ndarray  # [L]: of the load, over log E; 1 is balance, log K / log E is collapse
    dead: np.ndarray  # [L]: experts that got nothing
    logit_norm: np.ndarray  # [L]: root of the mean squared length of a token's router logits
    dropped: np.ndarray | None = (
        None  # [L]: the share of the choices for which a full expert had no room; None: all fit
    )


def experts(loads_LE: np.ndarray, squares_L: np.ndarray, top_k: int, dropped_L: np.ndarray | None = None) -> Experts:
    """From the tokens that chose each expert, the sum over tokens of their router logits' squared length, and the
    choices that came to nothing."""
    loads_LE, squares_L = np.asarray(loads_LE, np.float64), np.asarray(squares_L, np.float64)
    n_experts, sums_L1 = loads_LE.shape[1], loads_LE.sum(1, keepdims=True)
    share_LE = loads_LE / np.maximum(sums_L1, 1e-30)
    log_LE = np.log(share_LE, out=np.zeros_like(share_LE), where=share_LE > 0)
    return Experts(
        load=share_LE,
        max_over_mean=share_LE.max(1) * n_experts,
        entropy=-(share_LE * log_LE).sum(1) / np.log(max(n_experts, 2)),
        dead=(loads_LE == 0).sum(1),
        logit_norm=np.sqrt(squares_L / np.maximum(sums_L1[:, 0] / top_k, 1e-30)),
        dropped=None if dropped_L is None else np.asarray(dropped_L, np.float64) / np.maximum(sums_L1[:, 0], 1e-30),
    )


def expert_scalars(got: Experts, layers: Sequence[int]) -> dict[str, float]:
    """experts/layer_07/max_over_mean, .../entropy, .../dead, .../logit_norm for the layers of these numbers in the
    model; and over all of them the worst max_over_mean and entropy, the sum of dead, the largest logit_norm. With a
    capacity .../dropped too, and its mean."""
    out: dict[str, float] = {}
    over_all: dict[str, Callable] = dict(max_over_mean=np.max, entropy=np.min, dead=np.sum, logit_norm=np.max)
    over_all |= {} if got.dropped is None else dict(dropped=np.mean)
    for name, worst in over_all.items():
        values_L = getattr(got, name)
        out |= {f"experts/layer_{n:02d}/{name}": float(x) for n, x in zip(layers, values_L, strict=True)}
        out[f"experts/{name}"] = float(worst(values_L))
    return out


# --------------------------------------------------------------------------------------------------------------- speed


class Peak(NamedTuple):
    """What MFU divides by, and where the figure is from; show both."""

    flops_per_s: float
    source: str


def peak(devices: Sequence[jax.Device]) -> Peak:
    """The peak of all `devices` together."""
    kind = devices[0].device_kind
    for part, flops_per_s in PEAK_BF16.items():
        if part in kind:
            return Peak(flops_per_s * len(devices), f"{len(devices)} x {kind}, dense bfloat16")
    # Simulated CPU devices share the cores of their process: the rate counts once for each process.
    cpu = devices[0].platform == "cpu"
    count = len({d.process_index for d in devices}) if cpu else len(devices)
    return Peak(measured_peak() * count, f"{count} x the measured rate of a 2048^3 float32 matmul on {kind}")


@functools.cache
def measured_peak() -> float:
    """FLOP/s of a 2048^3 float32 matmul on the first device of this process: the best of a quarter of a second."""
    n = 2048
    device = jax.local_devices()[0]
    x = jax.device_put(np.linspace(-1, 1, n * n, dtype=np.float32).reshape(n, n), device)
    matmul = jax.jit(jnp.dot)
    jax.block_until_ready(matmul(x, x))  # compiles
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < 0.25:
        start = time.perf_counter()
        jax.block_until_ready(matmul(x, x))
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


class Clock:
    """Speed between two logs, from the ledger: steps and what they waited for; not compiling, saving, evaluating."""

    def __init__(self, peak_flops_per_s: float, ledger: Ledger):
        self._peak, self._ledger, self._last = peak_flops_per_s, ledger, ledger.seconds()

    def lap(self, *, steps: int, tokens: float, flops: float) -> dict[str, float]:
        """Speed since the last lap, in which `steps` steps took `tokens` tokens and `flops` model FLOPs, all devices.

        Call it right after `Window.fetch`, when the device has caught up with the host.

        Returns:
          speed/step_s, speed/tokens_per_s, speed/mfu and speed/data_wait, the last two as shares of 1.
        """
        last, self._last = self._last, self._ledger.seconds()
        waited = self._last["data"] - last["data"]
        seconds = max(self._last["step"] - last["step"] + waited, 1e-9)
        return {
            "speed/step_s": seconds / max(steps, 1),
            "speed/tokens_per_s": tokens / seconds,
            "speed/mfu": flops / seconds / self._peak,
            "speed/data_wait": waited / seconds,
        }
