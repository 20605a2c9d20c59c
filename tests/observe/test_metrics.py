"""Averages over windows, losses by source, expert loads, and where the time goes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.observe import goodput, metrics
from tests.tolerances import TWIN


class Sum(NamedTuple):
    num: object
    den: object


def test_a_window_divides_once():
    """Steps of different sizes: the average is over tokens, not over steps."""
    rng = np.random.default_rng(0)
    tokens = [rng.normal(size=n).astype(np.float32) for n in (3, 50, 7)]
    window = metrics.Window()
    for t in tokens:
        window.add({"loss": Sum(jnp.sum(t), jnp.float32(len(t))), "lr": jnp.float32(len(t))})
    window.add({"only_here": jnp.int32(4)})
    values = metrics.scalars(window.fetch())
    assert values == pytest.approx({"loss": np.concatenate(tokens).mean(), "lr": 20.0, "only_here": 4.0}, rel=1e-5)
    assert abs(values["loss"] - np.mean([t.mean() for t in tokens])) > 1e-2, "a mean of means would pass too"
    assert window.fetch() == {}, "the next window begins empty"


def test_a_window_waits_for_nothing():
    class OnDevice:
        fetched = False

        def __array__(self, *args, **kwargs):
            OnDevice.fetched = True
            return np.ones(())

    window = metrics.Window()
    for _ in range(3):
        window.add({"norm": OnDevice(), "loss": Sum(OnDevice(), OnDevice())})
    assert not OnDevice.fetched
    assert metrics.scalars(window.fetch()) == {"norm": 1.0, "loss": 1.0} and OnDevice.fetched


def test_a_skipped_step_does_not_poison_the_window():
    window = metrics.Window()
    for x in (1.0, np.nan, 3.0, np.inf):
        window.add({"loss": Sum(jnp.float32(x), jnp.float32(2)), "norm": jnp.float32(x), "bad": jnp.float32(np.nan)})
    values = metrics.scalars(window.fetch())
    assert values["loss"] == 1.0 and values["norm"] == 2.0 and np.isnan(values["bad"])


def test_by_source_groups_languages_and_leaves_out_the_unseen():
    total = metrics.Total(np.array([6.0, 10.0, 0.0, 9.0]), np.array([2.0, 4.0, 0.0, 3.0]))
    got = metrics.by_source("loss", total, ["web", "books", "wiki", "code"], ["en", "en", "de", "python"])
    assert got == pytest.approx(
        {
            "loss/source/web": 3.0,
            "loss/source/books": 2.5,
            "loss/source/code": 3.0,
            "loss/lang/en": 16 / 6,
            "loss/lang/python": 3.0,
        }
    )


def test_expert_load_against_a_loop():
    load_LE = np.array([[10.0, 10, 10, 10], [0, 25, 5, 10], [40, 0, 0, 0]])
    found = metrics.experts(load_LE, squares_L=np.array([40.0, 0.0, 360.0]), top_k=2)
    got = metrics.expert_scalars(found, layers=[1, 3, 15])
    entropies = []
    for layer, row, load in zip([1, 3, 15], load_LE, found.load, strict=True):
        share = [x / sum(row) for x in row]
        np.testing.assert_allclose(load, share)
        entropies.append(-sum(s * np.log(s) for s in share if s > 0) / np.log(4))
        assert got[f"experts/layer_{layer:02d}/max_over_mean"] == pytest.approx(max(share) * 4)
        assert got[f"experts/layer_{layer:02d}/entropy"] == pytest.approx(entropies[-1])
        assert got[f"experts/layer_{layer:02d}/dead"] == row.tolist().count(0)
    norms = [got[f"experts/layer_{layer:02d}/logit_norm"] for layer in (1, 3, 15)]
    assert norms == pytest.approx([2**0.5, 0.0, 18**0.5]), "40 choices are of 20 tokens, two each"
    assert got["experts/logit_norm"] == max(norms)
    assert got["experts/dead"] == 4 and got["experts/max_over_mean"] == 4
    np.testing.assert_allclose(got["experts/entropy"], min(entropies), **TWIN)
    assert entropies[0] == pytest.approx(1) and got["experts/entropy"] == 0


def test_speed_counts_steps_and_waits_for_data_only(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now[0])
    ledger = goodput.Ledger()
    now[0] += 50  # the start
    clock = metrics.Clock(1000.0, ledger)
    ledger.enter("step")
    with ledger.during("data"):
        now[0] += 2
    now[0] += 6
    with ledger.during("evaluate"):
        now[0] += 100
    got = clock.lap(steps=4, tokens=800, flops=4000)
    assert got == {
        "speed/step_s": 2.0,
        "speed/tokens_per_s": 100.0,
        "speed/mfu": 0.5,
        "speed/data_wait": 0.25,
    }
    now[0] += 1
    assert clock.lap(steps=1, tokens=10, flops=0)["speed/tokens_per_s"] == 10, "a lap begins where the last one ended"


class Device(NamedTuple):
    device_kind: str
    platform: str = "tpu"
    process_index: int = 0


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_peak_from_the_table(kind, tera):
    got = metrics.peak([Device(kind)] * 4)
    assert got.flops_per_s == pytest.approx(4 * tera * 1e12) and kind in got.source


def test_peak_of_a_cpu_is_measured_once_for_all_simulated_devices():
    got = metrics.peak(jax.devices())
    assert len(jax.devices()) == 8 and got.flops_per_s == metrics.measured_peak() > 1e8
    assert "2048^3 float32 matmul" in got.source
