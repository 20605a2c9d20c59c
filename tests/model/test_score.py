"""Log-probabilities beside TRL's (tests/golden/README.md), through the one function that gives them all.

The hidden states are the golden's logits and the head is the identity, so that the logits are what is given.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax import config
from llamax.kernels.cross_entropy import cross_entropy, slow_cross_entropy
from llamax.model.score import of_targets, score
from llamax.model.seam import Seam
from tests.losses.goldens import FOLDER, MANIFEST
from tests.tolerances import TRL_32

GOLDEN = dict(np.load(FOLDER / "logprobs.npz"))
LOGITS, IDS = GOLDEN["in__logits"].astype(np.float32), GOLDEN["in__ids"].astype(np.int32)
COMPARED = ("logp", "logp_t07", "entropy")
CROSS_ENTROPIES = {"slow": slow_cross_entropy, "chunks": partial(cross_entropy, chunk=8)}


class Told:
    """What `score` needs of a model: hidden states that are the logits."""

    def __init__(self, name: str):
        self.seam = Seam(cross_entropy=CROSS_ENTROPIES[name])
        self.model = config.Model(reward_head=False)

    def head_DV(self):
        return jnp.eye(LOGITS.shape[-1])

    def __call__(self, batch):
        return batch.tokens, (np.zeros((0, len(LOGITS))), None, None)


@pytest.fixture(params=CROSS_ENTROPIES)
def model(request):
    return Told(request.param)


def test_every_case_is_compared():
    assert set(COMPARED) == set(MANIFEST["families"]["logprobs"])
    assert {f"out__{name}" for name in COMPARED} == {key for key in GOLDEN if key.startswith("out__")}


@pytest.mark.parametrize(("case", "temperature"), [("logp", 1.0), ("logp_t07", 0.7)])
def test_trl_gives_the_same_log_probabilities(model, case, temperature):
    logp, logz = of_targets(model, LOGITS / np.float32(temperature), IDS)
    assert logp.dtype == logz.dtype == np.float32
    np.testing.assert_allclose(logp, GOLDEN[f"out__{case}"], **TRL_32)


def test_the_normaliser_has_trls_entropy_as_its_slope(model):
    """Nothing here computes an entropy; H = log z - sum_v z_v p_v follows from log z and its gradient."""

    def logz(logits):
        return of_targets(model, logits, IDS)[1]

    value, backward = jax.vjp(logz, LOGITS)
    (slope,) = backward(jnp.ones_like(value))
    np.testing.assert_allclose(value - (LOGITS * slope).sum(-1), GOLDEN["out__entropy"], **TRL_32)


def test_collisions_are_the_sum_of_squares_and_have_no_gradient(model):
    def scored(logits):
        return score(model, SimpleNamespace(tokens=logits, targets=IDS), collisions=True)

    p = np.exp(GOLDEN["in__logits"])
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(scored(LOGITS).collisions, np.log((p**2).sum(-1)), **TRL_32)
    assert not np.any(jax.grad(lambda x: scored(x).collisions.sum())(LOGITS))
    assert score(model, SimpleNamespace(tokens=LOGITS, targets=IDS)).collisions is None
