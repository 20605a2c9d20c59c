"""Policies' losses beside TRL's and verl's, in value and gradient; closed forms; what changes nothing; mistakes."""

from __future__ import annotations

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax import config
from llamax.losses import policy
from llamax.losses.policy import Samples
from tests.losses import goldens, policy_goldens
from tests.mutants import mutant
from tests.tolerances import TRL_64, TWIN

CLOSED = goldens.MANIFEST["closed_form"]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", policy_goldens.CASES)
def test_trl_gives_the_same(case, dtype):
    mine, theirs = policy_goldens.ours(case, dtype), goldens.wanted(case)
    assert mine.keys() == theirs.keys()
    for key, x in mine.items():
        assert x.dtype == dtype
        np.testing.assert_allclose(x, theirs[key], **policy_goldens.tolerance(case, dtype), err_msg=key)


def test_no_case_is_left_out():
    for family, n in (("grpo", 40), ("rloo", 1)):
        recorded = {key.split("__")[1] for key in goldens.family(family) if key.startswith("out__")}
        cases = [case.partition("/")[2] for case in policy_goldens.CASES if case.startswith(f"{family}/")]
        assert recorded == set(cases) and len(cases) == n


def test_verl_estimates_the_same_kl():
    given = goldens.family("kl_verl")
    with jax.enable_x64(True):
        logp, ref = jnp.asarray(given["in__logps"]), jnp.asarray(given["in__ref_logps"])
        samples = Samples(logp, logp, logp, logp > 1, logp, ref=ref)
        for kind in ("k2", "k3", "k3_ratio"):  # whose ratio is 1 here
            np.testing.assert_allclose(policy.kl(samples, kind), given[f"out__{kind[:2]}"], **TRL_64)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_trl_weighs_what_the_sampler_drew_the_same(mode):
    family = goldens.MANIFEST["families"]["advantages"]
    name = next(name for name, asked in family.items() if asked["is_mode"] == mode)
    low, high = family[name]["is_min"] or 0.0, family[name]["is_max"]
    cfg = config.Policy(importance=mode.removeprefix("token_"), importance_low=low, importance_high=high or 1e9)
    with jax.enable_x64(True):
        given = goldens.inputs("advantages", np.float64)
        mask, old = given.mask > 0, jnp.asarray(given.old_logps)
        samples = Samples(old, old, old, mask, jnp.ones(mask.shape, jnp.int32), sampler=given.sampling_logps)
        found = policy.importance(policy.without_holes(samples), 1, cfg)
    theirs = np.broadcast_to(goldens.wanted(f"advantages/{name}")["is_ratio"], mask.shape)
    np.testing.assert_allclose(found[mask], theirs[mask], **TRL_64)


# ---------------------------------------------------------------------------------------------------- closed forms


def drawn(seed: int = 0, rows: int = 4, T: int = 24, S: int = 3, **more) -> Samples:
    """Rows of up to S samples of several tokens, with prompts between and a tool's words within, in float32."""
    rng = np.random.default_rng(seed)
    sample = np.repeat(np.arange(S), T // S)[None].repeat(rows, 0) + 1
    sample[:, :: T // S] = 0
    mask = (sample > 0) & (rng.random(sample.shape) < 0.8)
    mask[0, T // S : 2 * T // S] = False  # a sample without a trained token
    some = lambda: jnp.asarray(rng.normal(-1, 0.5, sample.shape), jnp.float32)  # noqa: E731
    advantage = np.take_along_axis(rng.normal(size=(rows, S + 1)), sample, axis=1)
    of_prompt = np.take_along_axis(10 + np.arange(rows * (S + 1)).reshape(rows, S + 1), sample, axis=1)
    floats = dict(logp=some(), old=some(), ref=some(), sampler=some(), entropy=jnp.abs(some()))
    floats |= dict(advantage=jnp.asarray(advantage, jnp.float32), of_prompt=jnp.asarray(of_prompt, jnp.float32))
    return Samples(**(floats | more), mask=jnp.asarray(mask), sample=jnp.asarray(sample, jnp.int32))


def loss_and_gradient(s: Samples, cfg: config.Policy, S: int = 3) -> tuple[float, np.ndarray]:
    value, grad = jax.value_and_grad(lambda logp: policy.policy(s._replace(logp=logp), S, cfg).mean())(s.logp)
    return float(value), np.asarray(grad)


EVERY = [
    config.Policy(),
    config.Policy(average="sample", ratio_max=1.5, dual_clip=3.0),
    config.Policy(ratio="sequence", clip_low=3e-4, clip_high=4e-4, average="sample"),
    config.Policy(ratio="sequence_token", average="sum", importance="sequence_drop"),
    config.Policy(ratio="product", average="constant", constant_tokens=16, importance="sequence_mask"),
    config.Policy(loss="cispo", ratio_max=2.0, average="prompt", kl="k2", importance="truncate"),
    config.Policy(loss="sapo", average="sample", count_masked=False, kl="k3", importance="mask"),
    config.Policy(loss="vespo", kl="k3_ratio", importance="truncate", stale_above=0.1, entropy=0.01),
]
IDS = [f"{cfg.loss}-{cfg.ratio}-{cfg.average}" for cfg in EVERY]
every = pytest.mark.parametrize("cfg", EVERY, ids=IDS)


@every
def test_equal_rewards_teach_nothing(cfg):
    """Advantages of 0, and nothing to hold it up: a loss and a gradient of exactly 0."""
    s = drawn()
    alone = config.Policy(**{**vars(cfg), "kl": "none", "entropy": 0.0})
    value, grad = loss_and_gradient(s._replace(advantage=jnp.zeros_like(s.advantage)), alone)
    assert value == 0 and not grad.any()


@every
def test_what_is_masked_is_nothing_whatever_it_is(cfg):
    s = drawn()
    poison = s._replace(
        **{name: jnp.where(s.mask, getattr(s, name), jnp.inf) for name in ("old", "advantage", "ref", "entropy")},
        logp=jnp.where(s.mask, s.logp, jnp.nan),
    )
    for given in (s, poison):
        value, grad = loss_and_gradient(given, cfg)
        assert np.isfinite(value) and np.isfinite(grad).all() and not grad[~np.asarray(s.mask)].any()
    assert loss_and_gradient(poison, cfg)[0] == loss_and_gradient(s, cfg)[0] != 0
    value, grad = loss_and_gradient(s._replace(mask=s.mask & False), cfg)
    assert value == 0 and not grad.any()


@every
def test_packing_padding_order_and_splits_change_nothing(cfg):
    """A sample a row, the same with padding and with its tokens in another order, and two halves added up."""
    s = drawn()
    value, grad = loss_and_gradient(s, cfg)
    one_a_row = jax.tree.map(lambda x: jnp.concatenate([jnp.where(s.sample == k, x, 0) for k in (1, 2, 3)]), s)
    one_a_row = one_a_row._replace(sample=(one_a_row.sample > 0).astype(jnp.int32))
    alone, grad_alone = loss_and_gradient(one_a_row, cfg, S=1)
    np.testing.assert_allclose(alone, value, **TWIN)
    np.testing.assert_allclose(grad_alone.reshape(3, *grad.shape).sum(0), grad, **TWIN)
    order = np.random.default_rng(1).permutation(s.logp.shape[1])
    np.testing.assert_allclose(loss_and_gradient(jax.tree.map(lambda x: x[:, order], s), cfg)[0], value, **TWIN)
    halves = [policy.policy(jax.tree.map(lambda x, h=h: x[h::2], s), 3, cfg) for h in (0, 1)]
    both = policy.Sum(sum(h.num for h in halves), sum(h.den for h in halves)).mean()
    np.testing.assert_allclose(both, value, **TWIN)


@every
def test_a_slow_twin_of_one_token_after_another(cfg):
    s = drawn()
    np.testing.assert_allclose(loss_and_gradient(s, cfg)[0], slow(s, cfg), **TWIN)


def slow(s: Samples, cfg: config.Policy) -> float:
    """From the formulas, in Python's floats."""
    x = {name: np.asarray(value, float) for name, value in s._asdict().items() if name not in ("mask", "sample")}
    mask, sample = np.asarray(s.mask), np.asarray(s.sample)
    num = den = 0.0
    for row, k in product(range(len(mask)), (1, 2, 3)):
        places = [t for t in range(mask.shape[1]) if sample[row, t] == k and mask[row, t]]
        at = lambda name, t, row=row: x[name][row, t]  # noqa: E731
        n, steps = len(places), [at("logp", t) - at("old", t) for t in places]
        gaps = [at("old", t) - at("sampler", t) for t in places]
        counts = dict(token=n, sum=1, sample=1, constant=cfg.constant_tokens)
        den += (
            sum(1 / at("of_prompt", t) for t in places)
            if cfg.average == "prompt"
            else counts[cfg.average] * (n > 0 or (cfg.count_masked and cfg.average != "token"))
        )
        for t, step, gap in zip(places, steps, gaps, strict=True):
            a = at("advantage", t)
            log_r = dict(token=step, sequence=sum(steps) / n, sequence_token=sum(steps) / n, product=sum(steps))
            r, weight = np.exp(log_r[cfg.ratio]), 1.0
            if cfg.importance == "truncate":
                weight = min(np.exp(gap), cfg.importance_high)
            elif cfg.importance == "mask":
                weight = np.exp(gap) * (cfg.importance_low <= np.exp(gap) <= cfg.importance_high)
            elif cfg.importance == "sequence_mask":
                weight = np.exp(sum(gaps)) * (cfg.importance_low <= np.exp(sum(gaps)) <= cfg.importance_high)
            elif cfg.importance == "sequence_drop":
                inside = cfg.importance_low <= np.exp(sum(gaps) / n) <= cfg.importance_high
                weight = min(np.exp(gap), cfg.importance_high) * inside
            if cfg.loss == "clip":
                first = min(r, cfg.ratio_max) if cfg.ratio_max else r
                loss = -min(first * a, min(max(r, 1 - cfg.clip_low), 1 + cfg.clip_high) * a)
                if cfg.dual_clip and a < 0:
                    loss = min(loss, -cfg.dual_clip * a)
            elif cfg.loss == "cispo":
                loss = -min(r, cfg.ratio_max) * a * at("logp", t)
            elif cfg.loss == "sapo":
                tau = cfg.sapo_tau_positive if a > 0 else cfg.sapo_tau_negative
                loss = -4 / tau / (1 + np.exp(-tau * (r - 1))) * a
            else:
                w = np.exp(sum(steps) + sum(min(g, np.log(cfg.importance_high)) for g in gaps))
                k_, decay = (cfg.vespo_k_positive, cfg.vespo_lambda_positive)
                if a < 0:
                    k_, decay = (cfg.vespo_k_negative, cfg.vespo_lambda_negative)
                loss, weight = -(w**k_) * np.exp(decay * (1 - w)) * a * at("logp", t), 1.0
            left = sum(at("sampler", t) - at("logp", t) for t in places) / n
            if cfg.stale_above and a < 0 and left > cfg.stale_above:
                loss = 0.0
            loss *= weight
            u = at("ref", t) - at("logp", t)
            k3 = np.exp(u) - u - 1
            loss += cfg.kl_weight * dict(none=0.0, k2=u * u / 2, k3=k3, k3_ratio=np.exp(step) * k3)[cfg.kl]
            loss -= cfg.entropy * at("entropy", t)
            num += loss * dict(sample=1 / n, prompt=1 / at("of_prompt", t)).get(cfg.average, 1.0)
    return num / den


def test_before_the_first_step_the_gradient_is_reinforces():
    """Ratios are 1: the loss is -sum(A m) / N, and its gradient -A / N, clipped by nothing."""
    s = drawn()
    s = s._replace(old=s.logp)
    value, grad = loss_and_gradient(s, config.Policy())
    n = s.mask.sum()
    np.testing.assert_allclose(value, -jnp.where(s.mask, s.advantage, 0).sum() / n, rtol=1e-6)
    np.testing.assert_allclose(grad, -jnp.where(s.mask, s.advantage, 0) / n, rtol=1e-6, atol=1e-9)


def test_gspo_of_tokens_that_all_have_one_ratio_has_that_ratio_and_gspo_token_its_gradient():
    s = drawn()
    s = s._replace(logp=s.old + jnp.log(1.1))
    np.testing.assert_allclose(jnp.exp(policy.log_ratio(s, 3, "sequence"))[s.mask], 1.1, rtol=1e-5)
    one, other = (loss_and_gradient(drawn(), config.Policy(ratio=r)) for r in ("sequence", "sequence_token"))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
    np.testing.assert_allclose(one[1], other[1], rtol=1e-5, atol=1e-8)


def test_k3_by_hand():
    for ratio, wanted in ((np.log(2), CLOSED["k3_at_logratio_ln2"]), (-np.log(2), CLOSED["k3_at_logratio_-ln2"])):
        zero = jnp.zeros((1, 1))
        s = Samples(zero, zero, zero, zero == 0, zero, ref=zero + ratio)
        assert float(policy.kl(s, "k3")[0, 0]) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "of", "right"), [("k2", "policy", True), ("k3", "reference", True), ("k3_ratio", "policy", True)]
)
def test_the_gradient_of_each_estimate_by_enumeration(kind, of, right):
    """Expected over all three words, on-policy: k2 and the weighed k3 have the gradient of KL(policy || reference), k3
    alone that of KL(reference || policy)."""
    logits, ref = jnp.array([0.3, -0.5, 1.0]), jax.nn.log_softmax(jnp.array([-0.2, 0.7, 0.1]))

    def expected(logits):
        logp = jax.nn.log_softmax(logits)
        s = Samples(logp[None], jax.lax.stop_gradient(logp)[None], 0, 0, 0, ref=ref[None])
        return (jax.lax.stop_gradient(jnp.exp(logp)) * policy.kl(s, kind)[0]).sum()

    def divergence(logits):
        logp = jax.nn.log_softmax(logits)
        forward = (jnp.exp(logp) * (logp - ref)).sum()
        return forward if of == "policy" else (jnp.exp(ref) * (ref - logp)).sum()

    assert np.allclose(jax.grad(expected)(logits), jax.grad(divergence)(logits), rtol=1e-5) == right


def test_the_most_uncertain_tokens_alone():
    s = drawn()
    kept = policy.uncertain(policy.without_holes(s), 0.25)
    n = int((kept & s.mask).sum())
    assert abs(n - 0.25 * int(s.mask.sum())) <= 1
    assert s.entropy[kept & s.mask].min() >= s.entropy[~kept & s.mask].max()


# -------------------------------------------------------------------------------------------------------- mistakes

MUTATIONS = [  # (what stands there once, what is put there, the case that has to notice)
    ("loss = -jnp.minimum(first * a", "loss = jnp.minimum(first * a", "grpo/grpo"),
    ("1 - cfg.clip_low, 1 + cfg.clip_high", "1 - cfg.clip_high, 1 + cfg.clip_low", "grpo/grpo_cliphigh"),
    ("1 + cfg.clip_high)", "1 + cfg.clip_low)", "grpo/dapo_cliphigh"),
    ("jnp.where(r < cfg.ratio_max", "jnp.where(r > cfg.ratio_max", "grpo/dapo_twosided"),
    ("-sg(jnp.minimum(jnp.exp(log_ratio", "-(jnp.minimum(jnp.exp(log_ratio", "grpo/cispo_max5"),
    ("-4 / tau", "-1 / tau", "grpo/sapo"),
    ("s.advantage > 0, cfg.sapo_tau_positive", "s.advantage < 0, cfg.sapo_tau_positive", "grpo/sapo"),
    ("decay * (1 - jnp", "decay * (0 - jnp", "grpo/vespo"),
    ("token_BT = means(token_BT, s, S)\n", "token_BT = sums(token_BT, s, S)\n", "grpo/gspo_wide"),
    ("token_BT = sums(token_BT, s, S)\n", "token_BT = means(token_BT, s, S)\n", "rloo/rloo"),
    ("return u**2 / 2\n    k3 = jnp.exp(u) - u - 1", "return u**2 / 2\n    k3 = jnp.exp(u) - u", "grpo/grpo_kl"),
    ("sg(s.ref) - s.logp", "s.logp - sg(s.ref)", "grpo/grpo_kl"),
    ("if kind == \"k3\" else", "if kind else", "grpo/dapo_kl_unbiased"),
    ("log_rho = s.old - s.sampler", "log_rho = s.sampler - s.old", "grpo/dapo_tis"),
    ("(s.advantage < 0) & (sg", "(s.advantage > 0) & (sg", "grpo/dapo_opsm"),
    ("means(drew - s.logp, s, S)) >", "sums(drew - s.logp, s, S)) >", "grpo/dapo_opsm"),
    ("jnp.nan), 1 - share)", "jnp.nan), share)", "grpo/dapo_top20ent"),
    ("loss_BT - cfg.entropy * s", "loss_BT + cfg.entropy * s", "grpo/dapo_entbonus"),
    ("return 1 / jnp.maximum(sums(ones, s, S), 1)", "return ones", "grpo/grpo"),
    ("return ones / jnp.maximum(s.mask.sum(), 1)", "return ones / s.mask.size", "grpo/bnpo"),
    ("n * cfg.constant_tokens if", "n if", "grpo/dr_grpo"),
    ("return mask_BT.sum(dtype=jnp.float32)", "return mask_BT.size + 0.0", "grpo/dapo"),
    ("x_BT[..., None], 0).sum(axis=1)", "x_BT[..., None], 0).max(axis=1)", "grpo/luspo"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "case"), MUTATIONS, ids=[old[:30] for old, *_ in MUTATIONS])
def test_the_goldens_notice(old, new, case):
    name = "llamax.losses.policy"
    assert policy_goldens.agrees(case, mutant(name)) and not policy_goldens.agrees(case, mutant(name, old, new))


def test_a_bound_or_a_length_that_is_not_there_is_no_loss_of_nothing():
    for cfg in (config.Policy(loss="cispo"), config.Policy(average="constant")):
        with pytest.raises(AssertionError, match="ratio_max|constant_tokens"):
            policy.policy(drawn(), 3, cfg)
