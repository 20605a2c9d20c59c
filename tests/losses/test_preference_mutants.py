"""Mistakes put into the source of the losses that compare answers, one at a time: the goldens notice each.

A mutant is a copy of the losses' modules, executed from text in which one place is changed; nothing on disk changes.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tests.losses import goldens

MODULES = ("compared", "paired", "reference_free", "unpaired", "preference", "reward")  # each after what it imports
SOURCES = {name: Path(find_spec(f"llamax.losses.{name}").origin).read_text(encoding="utf-8") for name in MODULES}

# (module, what stands there once, what is put there, the case that has to notice)
MUTATIONS = [
    # signs
    ("paired", "smoothed(chosen - rejected, cfg.label_smoothing)\n\n\ndef smoothed",
     "smoothed(rejected - chosen, cfg.label_smoothing)\n\n\ndef smoothed", "dpo/sigmoid"),
    ("paired", "relu(1 - (chosen - rejected))", "relu(1 + (chosen - rejected))", "dpo/hinge"),
    ("paired", "- eps * log_s(-d)\n", "+ eps * log_s(-d)\n", "reffree/cdpo_e01"),
    ("paired", "+ eps * log_s(-d)) / ", "- eps * log_s(-d)) / ", "dpo/robust_e01"),
    ("paired", "1 - s(chosen) + s(rejected)", "1 - s(chosen) - s(rejected)", "dpo/apo_zero"),
    ("paired", "s(chosen) + 1 - s(chosen - rejected)", "s(chosen) + 1 - s(rejected - chosen)", "dpo/apo_down"),
    ("paired", "(rejected + 0.5 / cfg.beta)", "(rejected - 0.5 / cfg.beta)", "dpo/sppo_hard"),
    ("unpaired", "s(cfg.beta * (z - (c.rejected", "s(cfg.beta * ((c.rejected", "kto/kto"),
    ("reward", "rejected_P - margin_P", "rejected_P + margin_P", "reward/bt_margin"),
    # constants
    ("paired", "1 / (2 * cfg.beta)", "1 / cfg.beta", "dpo/ipo"),
    ("paired", "0.5 * (log_s(-chosen)", "1.0 * (log_s(-chosen)", "dpo/nca_pair"),
    ("paired", "(1 - 2 * eps)", "(1 - eps)", "dpo/robust_e01"),
    ("paired", "math.log1p(-eps)", "math.log(eps)", "dpo/exo_pair_e01"),
    ("paired", "(chosen - 0.5 / cfg.beta) ** 2",
     "(chosen - 1.0 / cfg.beta) ** 2", "dpo/sppo_hard"),
    ("reward", "(chosen_P + rejected_P) ** 2", "(chosen_P - rejected_P) ** 2", "reward/bt_center"),
    # where beta, alpha and gamma stand
    ("paired", "cfg.beta * chosen, cfg.beta * rejected", "cfg.beta * chosen, rejected", "dpo/sigmoid_b05"),
    ("paired", "d / cfg.discopop_temperature", "d * cfg.discopop_temperature", "dpo/discopop"),
    ("paired", "cfg.beta * (ours - of_equal_rank", "(ours - cfg.beta * of_equal_rank", "dpo/aot_e01"),
    ("paired", "MOST))) / alpha", "MOST)))", "dpo/alpha05"),
    ("paired", "1 - jnp.exp(jnp.minimum(-log_u, MOST))", "jnp.exp(jnp.minimum(-log_u, MOST)) - 1", "dpo/fkl"),
    ("paired", "(1 - cfg.ld_alpha) * tail", "cfg.ld_alpha**2 * tail", "dpo/ld05"),
    ("paired", "log_s(log_u)", "log_s(-log_u)", "dpo/js"),
    ("reference_free", "rejected) - cfg.simpo_gamma", "rejected - cfg.simpo_gamma)", "reffree/simpo"),
    ("reference_free", "-cfg.beta * log_s(log_odds", "-log_s(cfg.beta * log_odds", "reffree/orpo"),
    # normalisers
    ("paired", "chosen / c.n_chosen, rejected / c.n_rejected\n    of",
     "chosen / c.n_rejected, rejected / c.n_chosen\n    of", "dpo/sigmoid_norm_b2"),
    ("paired", "(c.chosen - c.ref_chosen) / c.n_chosen, (", "(c.chosen - c.ref_chosen), (", "dpo/ipo"),
    ("preference", "(c.has_chosen | c.has_rejected).sum(", "(c.has_chosen & c.has_rejected).sum(", "kto/kto"),
    ("unpaired", "return total / jnp.maximum(", "return total / jnp.maximum(1 + ", "kto/apo_zero_unpaired"),
    ("unpaired", "jnp.maximum(c.has_mismatched.sum(), 1)", "c.has_mismatched.size**2", "kto/kto"),
    ("reward", "mask_P.sum(dtype=loss_P.dtype)", "mask_P.sum(dtype=loss_P.dtype) - 1", "reward/bt"),
    # bounds
    ("compared", "[..., None] >= shorter_BS", "[..., None] > shorter_BS", "dpo/ld05"),
    ("compared", "jnp.minimum(n_chosen, n_rejected)", "jnp.maximum(n_chosen, n_rejected)", "dpo/ld05"),
    ("compared", "(1, n_chosen), (-1, n_rejected)", "(1, n_rejected), (-1, n_chosen)", "dpo/wpo"),
    ("unpaired", "jnp.maximum(kl, 0)", "jnp.minimum(kl, 0)", "kto/kto"),
    # masks
    ("compared", "jnp.where(of_BTS & only_BTS, x_BT[..., None], 0)", "jnp.where(only_BTS, x_BT[..., None], 0)",
     "dpo/sigmoid"),
    ("compared", "sides_BT > MISMATCHED, sides_BT - MISMATCHED", "sides_BT > 0, sides_BT", "kto/kto"),
    # what is a constant to the gradient, weights
    ("compared", "return jax.lax.stop_gradient(jnp.exp(sum(means)))", "return jnp.exp(sum(means))", "dpo/wpo"),
    ("compared", "logp_BT - collisions_BT", "logp_BT + collisions_BT", "dpo/wpo"),
    ("compared", "jnp.exp(sum(means))", "jnp.exp(jnp.minimum(sum(means), 0))", "dpo/wpo"),
    ("preference", "total += weight * ", "total += ", "dpo/mpo"),
    ("unpaired", "cfg.desirable_weight * good, cfg.undesirable_weight * bad",
     "cfg.undesirable_weight * good, cfg.desirable_weight * bad", "kto/kto_w"),
    ("paired", "[ranks]", "", "dpo/aot_unpaired"),
]  # fmt: skip


def mutant(monkeypatch, module: str | None = None, old: str = "", new: str = "") -> SimpleNamespace:
    """The losses anew, with `old` replaced by `new` in one of the modules."""
    package = ModuleType("mutants")
    monkeypatch.setitem(sys.modules, "mutants", package)
    for name in MODULES:
        text = SOURCES[name].replace(old, new) if name == module else SOURCES[name]
        for other in MODULES:
            text = text.replace(f"llamax.losses.{other} ", f"mutants.{other} ")
        text = text.replace("from llamax.losses import", "from mutants import")
        made = ModuleType(f"mutants.{name}")
        monkeypatch.setitem(sys.modules, made.__name__, made)
        setattr(package, name, made)
        exec(compile(text, f"mutant of {name}", "exec", dont_inherit=True), made.__dict__)
    return SimpleNamespace(preference=package.preference, reward=package.reward)


def agrees(case: str, losses: SimpleNamespace) -> bool:
    found, theirs = goldens.ours([case], "float32", losses)[case], goldens.wanted(case)
    return all(np.allclose(x, theirs[key], **goldens.tolerance(case, "float32")) for key, x in found.items())


def test_what_is_not_changed_agrees(monkeypatch):
    losses = mutant(monkeypatch)
    assert losses.preference.paired.sigmoid is not goldens.OURS.preference.paired.sigmoid
    assert losses.preference.compare is not goldens.OURS.preference.compare
    cases = sorted({case for *_, case in MUTATIONS})
    found = goldens.ours(cases, "float32", losses)
    for case in cases:
        for key, x in found[case].items():
            np.testing.assert_allclose(x, goldens.wanted(case)[key], **goldens.tolerance(case, "float32"))


@pytest.mark.parametrize(("module", "old", "new", "case"), MUTATIONS, ids=[f"{m}-{o[:30]}" for m, o, _, _ in MUTATIONS])
def test_the_goldens_notice(module, old, new, case, monkeypatch):
    """That it stands there once says that the list has kept up with the source."""
    assert SOURCES[module].count(old) == 1
    assert not agrees(case, mutant(monkeypatch, module, old, new))
