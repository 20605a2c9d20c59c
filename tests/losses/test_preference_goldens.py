"""The losses that compare answers beside TRL's, in value and gradient, and by closed forms."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax import config
from llamax.losses import preference, reward
from tests.losses import goldens

CLOSED = goldens.MANIFEST["closed_form"]


@pytest.fixture(scope="module", params=["float64", "float32"])
def found(request):
    return request.param, goldens.ours(goldens.CASES, request.param)


@pytest.mark.parametrize("case", goldens.CASES)
def test_trl_gives_the_same(case, found):
    dtype, (mine, theirs) = found[0], (found[1][case], goldens.wanted(case))
    assert mine.keys() == theirs.keys()
    for key, x in mine.items():
        assert x.dtype == dtype
        np.testing.assert_allclose(x, theirs[key], **goldens.tolerance(case, dtype), err_msg=key)


def test_no_case_of_these_families_is_left_out():
    for name in goldens.FAMILIES:
        recorded = {key.split("__")[1] for key in goldens.family(name) if key.startswith("out__")}
        assert recorded == {case.partition("/")[2] for case in goldens.CASES if case.startswith(f"{name}/")}
    assert len(goldens.CASES) == 25 + 7 + 3 + 3


# --------------------------------------------------------------------------------------------------- closed forms


def of_equal_policies(**settings) -> float:
    """The loss where the policy gives both answers what the reference gives them, whatever that is."""
    name = settings.pop("name")
    cfg = config.Preference(losses=config.PreferenceLosses(**{name: 1.0}), **settings)
    logp, n, yes = jnp.array([[-3.0, -70.0]]), jnp.array([[2.0, 5.0]]), jnp.ones((1, 2), bool)
    compared = preference.Compared(logp, 2 * logp, logp, 2 * logp, n, n, yes, yes)
    if name == "kto":
        compared = compared._replace(mismatched=logp, ref_mismatched=logp, has_mismatched=yes)
    return float(preference.preference(compared, cfg).mean())


@pytest.mark.parametrize("divergence", config.F_DIVERGENCES)
@pytest.mark.parametrize("beta", [0.1, 3.0])
@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        (dict(name="sigmoid"), CLOSED["dpo_equal_policies"]),
        (dict(name="sigmoid", label_smoothing=0.3), CLOSED["cdpo_equal_any_eps"]),
        (dict(name="robust", label_smoothing=0.3), CLOSED["robust_dpo_equal"]),
        (dict(name="hinge"), CLOSED["hinge_equal_policies"]),
        (dict(name="apo_zero"), CLOSED["apo_zero_equal"]),
        (dict(name="nca_pair"), CLOSED["nca_equal"]),
        (dict(name="bco_pair"), 2 * math.log(2)),
        (dict(name="apo_down"), 1.0),
    ],
)
def test_closed_forms_of_equal_policies(settings, loss, beta, divergence):
    """Whatever beta, and whatever the divergence: all are 0 there."""
    assert of_equal_policies(**settings, beta=beta, f_divergence=divergence) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        (dict(name="ipo"), CLOSED["ipo_equal_policies_beta0.1"]),
        (dict(name="kto"), CLOSED["kto_equal_kl0"]),
        (dict(name="apo_zero_unpaired"), 0.5),
        (dict(name="aot"), math.log(2)),
        (dict(name="sppo_hard"), 50.0),
    ],
)
def test_closed_forms_at_beta_a_tenth(settings, loss):
    assert of_equal_policies(**settings) == pytest.approx(loss, rel=1e-6)


def test_closed_forms_without_a_reference():
    one, yes = jnp.ones((1, 1)), jnp.ones((1, 1), bool)
    equal = preference.Compared(-one, -one, 0 * one, 0 * one, one, one, yes, yes)
    simpo = config.Preference(losses=config.PreferenceLosses(simpo=1.0), beta=2.0, simpo_gamma=1.0)
    assert preference.preference(equal, simpo).mean() == pytest.approx(CLOSED["simpo_equal_b2_g1"], rel=1e-6)
    tie = reward.bradley_terry(one[0], one[0], yes[0])
    assert tie.mean() == pytest.approx(CLOSED["bt_equal_scores"], rel=1e-6)


def test_the_slope_of_dpo_at_equal_policies_is_minus_half_of_beta():
    one, yes = jnp.ones((1, 1)), jnp.ones((1, 1), bool)

    def loss(chosen):
        compared = preference.Compared(chosen, -one, -one, -one, one, one, yes, yes)
        return preference.preference(compared, config.Preference(losses=config.PreferenceLosses(sigmoid=1.0))).mean()

    np.testing.assert_allclose(jax.grad(loss)(-one), [[CLOSED["dpo_grad_margin_beta0.1_equal"]]], rtol=1e-6)
