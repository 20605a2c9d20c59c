"""Generation beside full forward passes, alone and in company, and beside another implementation's greedy text."""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax import config
from llamax.config import ConfigError
from llamax.kernels.attention import blocked_attention
from llamax.kernels.grouped import sorted_experts
from llamax.model.seam import Seam, make_seam
from llamax.model.skeleton import skeleton
from llamax.parallel import rules
from llamax.parallel.mesh import make_mesh
from llamax.sample import engine, reading
from llamax.sample.conversation import Conversation
from llamax.sample.engine import Prompt, Sampling, generate, in_nucleus
from llamax.sample.reading import pack, rounded
from tests import goldens
from tests.model import twins
from tests.tolerances import ORACLE, TWIN

MODEL = replace(twins.TINY, plan=((("rope_chunk+dense", "nope_full+moe"), 1),))
NO_TILES = np.zeros((0, 8, 8, 3), np.uint8)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]


@pytest.fixture(scope="module")
def tiny():
    """(skeleton, params, router_bias) of a small model with weights large enough to have opinions."""
    seam = Seam(attention=blocked_attention, run_experts=sorted_experts)
    skel = skeleton(MODEL, seam, patch_id=twins.PATCH, train=config.Train())
    rng = np.random.default_rng(7)
    params, bias = skel.shapes()
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), params)
    return skel, params, jax.tree.map(lambda x: jnp.zeros(x.shape), bias)


def ask(tiny, *prompts, max_tokens=6, stop=(), **how):
    prompts = [Prompt(tokens, NO_TILES) for tokens in prompts]
    return generate(*tiny, prompts, max_tokens=max_tokens, stop=set(stop), **how)


def texts(completions):
    return [[completion.text for completion in of_prompt] for of_prompt in completions]


def slow_logits(tiny, tokens: list[int]) -> np.ndarray:
    """Of the token after each of these, by one full forward pass of the slow twin: [T, V]."""
    row = np.array([tokens], np.int32)
    at = np.arange(len(tokens))[None]
    batch = twins.batch()._replace(tokens=row, tiles=NO_TILES[None], positions=at, segment_ids=row * 0 + 1)
    tree = twins.float64(jax.tree.map(np.asarray, tiny[1]))
    tree["stack"]["segment0"]["slot1"]["moe"]["router_bias"] = np.zeros((1, MODEL.n_experts))
    return twins.decode(tree, MODEL, batch).logits[0]


def slow_greedy(tiny, prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        logits = slow_logits(tiny, tokens)[-1]
        logits[twins.PATCH] = -np.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def test_greedy_text_is_that_of_full_forward_passes_of_the_slow_twin(tiny):
    """Prompts of several lengths, in one call and each alone, and two by two; chunks end on the way."""
    together = texts(ask(tiny, *PROMPTS))
    assert together == [[slow_greedy(tiny, prompt, 6)] for prompt in PROMPTS]
    assert together == [texts(ask(tiny, prompt))[0] for prompt in PROMPTS]
    assert together == texts(ask(tiny, *PROMPTS, rows=2))


def test_log_probabilities_are_the_models_own(tiny):
    """Whatever the temperature, and whatever may be drawn."""
    for how in ({}, dict(sampling=Sampling(3.0, 0.9, seed=1)), dict(allowed={7, 11})):
        for prompt, (completion,) in zip(PROMPTS, ask(tiny, *PROMPTS, **how), strict=True):
            logits = slow_logits(tiny, prompt + completion.tokens)[len(prompt) - 1 : -1]
            logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            np.testing.assert_allclose(completion.logp, logp[range(6), completion.tokens], **ORACLE)


def test_several_samples_of_a_prompt_are_its_own_in_any_company(tiny):
    how = dict(sampling=Sampling(1.5, seed=3))
    many = texts(ask(tiny, *PROMPTS, n=4, **how))
    assert all(len({tuple(ids) for ids in of_prompt}) > 1 for of_prompt in many)
    assert texts(ask(tiny, *PROMPTS, n=2, **how)) == [of_prompt[:2] for of_prompt in many]
    assert texts(ask(tiny, PROMPTS[0], n=4, **how)) == many[:1]
    assert texts(ask(tiny, *PROMPTS, n=4, rows=5, **how)) == many
    assert texts(ask(tiny, *PROMPTS, n=4, rows=3, **how)) == many


@pytest.mark.parametrize("n, rows", [(1, 3), (2, 5), (4, 3), (3, 1)])
def test_no_more_rows_than_asked_are_worked_on(tiny, monkeypatch, n, rows):
    seen, advance = [], engine.advance
    monkeypatch.setattr(engine, "advance", lambda *args: seen.append(len(args[3].done)) or advance(*args))
    found = ask(tiny, *PROMPTS, n=n, rows=rows, max_tokens=1)
    assert max(seen) <= rows and [len(of_prompt) for of_prompt in found] == [n] * 3


def test_what_cannot_be_continued_is_told(tiny):
    with pytest.raises(ConfigError, match="no tokens"):
        ask(tiny, PROMPTS[0], [])
    with pytest.raises(ConfigError, match="1 to"):
        ask(tiny, PROMPTS[0], max_tokens=0)
    for tokens in ([3, MODEL.vocab_size], [-1, 3]):
        with pytest.raises(ConfigError, match="vocabulary has 40 ids"):
            ask(tiny, tokens)
    with pytest.raises(ConfigError, match="0 tiles, but it has 2 <|patch|> tokens"):
        ask(tiny, [3, twins.PATCH, twins.PATCH])
    with pytest.raises(ConfigError, match="1 tiles"):
        generate(*tiny, [Prompt([3], np.zeros((1, 8, 8, 3), np.uint8))], max_tokens=1, stop=())


def test_generation_ends_with_a_stop_token(tiny):
    free = texts(ask(tiny, *PROMPTS))
    stop = free[0][0][2]
    cut = ask(tiny, *PROMPTS, stop={stop})
    for (ids,), (completion,) in zip(free, cut, strict=True):
        end = ids.index(stop) if stop in ids else None
        assert completion.text == ids[:end] and completion.stopped == (end is not None)
        assert completion.tokens == (ids if end is None else ids[: end + 1])
        assert len(completion.logp) == len(completion.tokens)
    assert len(cut[0][0].text) <= 2


def test_decoding_ends_when_every_prompt_has(tiny):
    """Rows that only fill the batch up do not keep it going."""
    first = tuple(sorted({ids[0] for (ids,) in texts(ask(tiny, *PROMPTS))}))
    how = engine.How(tiny[0], first, False, False)
    batch = pack([Prompt(p, NO_TILES) for p in PROMPTS])
    state = engine.begin(*reading.prefill(tiny[0], 64, *tiny[1:], batch), 64, 3)
    may, keys = np.ones(MODEL.vocab_size, bool), engine.keys(0, [(0, 0)], len(batch.tokens))
    state = engine.advance(how, *tiny[1:], state, np.int32(6), (np.float32(0), np.float32(1)), may, keys)
    assert state.count == 1


def test_only_what_is_allowed_is_drawn(tiny):
    """Greedy or not; and never the patch token, although it may be the likeliest."""
    few = {7, 11, 13}
    for temperature in (0.0, 3.0):
        drawn = texts(ask(tiny, *PROMPTS, allowed=few, sampling=Sampling(temperature)))
        assert {id for (ids,) in drawn for id in ids} <= few
    free = texts(ask(tiny, *PROMPTS, sampling=Sampling(100.0), max_tokens=40))
    assert twins.PATCH not in {id for (ids,) in free for id in ids}


def test_a_numbered_prompt_s_samples_do_not_depend_on_its_company(tiny):
    how = dict(n=2, sampling=Sampling(2.0, 1.0, 5))
    together = texts(ask(tiny, *PROMPTS, numbers=[7, 2**32 - 1, 7], **how))
    for number, prompt, found in zip([7, 2**32 - 1, 7], PROMPTS, together, strict=True):
        assert texts(ask(tiny, prompt, numbers=[number], **how)) == [found]
    assert texts(ask(tiny, PROMPTS[0], numbers=[8], **how)) != [together[0]]
    assert texts(ask(tiny, *PROMPTS, numbers=[0, 1, 2], **how)) == texts(ask(tiny, *PROMPTS, **how))


def test_sampling_is_reproducible_by_seed(tiny):
    draws = [ask(tiny, *PROMPTS, sampling=Sampling(2.0, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_samples_have_the_models_distribution(tiny):
    """Of the first token, at a temperature and in a nucleus: frequencies of 2,000 draws beside the slow twin's."""
    logits = slow_logits(tiny, PROMPTS[0])[-1] / 2.0
    logits[twins.PATCH] = -np.inf
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: np.searchsorted(np.cumsum(p[order]), 0.7) + 1]
    for top_p, support in ((1.0, order), (0.7, kept)):
        sampling = Sampling(2.0, top_p, seed=5)
        (drawn,) = ask(tiny, PROMPTS[0], max_tokens=1, n=2000, rows=2000, sampling=sampling)
        counts = np.bincount([c.tokens[0] for c in drawn], minlength=MODEL.vocab_size) / 2000
        expected = np.where(np.isin(np.arange(MODEL.vocab_size), support), p, 0)
        expected /= expected.sum()
        assert not counts[expected == 0].any()
        np.testing.assert_allclose(counts, expected, atol=5 * np.sqrt(0.25 / 2000))


def test_the_nucleus_is_the_least_set_that_reaches_top_p():
    p = np.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5], [0.25, 0.25, 0.25, 0.25]], np.float32)
    np.testing.assert_array_equal(in_nucleus(p, np.float32(0.6))[:2], [[1, 1, 0, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(in_nucleus(p, np.float32(1e-6))[:2], [[1, 0, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(in_nucleus(p, np.float32(0))[:2], [[1, 0, 0, 0], [0, 0, 0, 1]])
    assert in_nucleus(p, np.float32(0.6))[2].all()  # of equals none is left out


def test_shapes_are_few_and_prompts_get_their_own_pictures():
    assert sorted({rounded(n) for n in range(1, 1025)}) == [64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024]
    assert all(n <= rounded(n) <= max(n + 63, 1.25 * n) for n in range(1, 5000))
    assert sorted({reading.few(n, 1) for n in range(18)}) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20]
    for n, multiple, rows in ((1, 1, 1), (1, 8, 8), (3, 1, 4), (3, 8, 8), (70, 96, 192)):
        assert len(pack([Prompt([1, 2], NO_TILES)] * n, multiple).tokens) == rows
    rng = np.random.default_rng(0)
    counts = (2, 0, 1)
    prompts = [
        Prompt(p, rng.integers(1, 256, (n, 8, 8, 3), dtype=np.uint8)) for p, n in zip(PROMPTS, counts, strict=True)
    ]
    batch = pack(prompts)
    assert batch.tiles.shape == (4, 2, 8, 8, 3) and not batch.segment_ids[3].any()
    for row, prompt in enumerate(prompts):
        n = len(prompt.tokens)
        np.testing.assert_array_equal(batch.tokens[row, :n], prompt.tokens)
        assert batch.segment_ids[row].sum() == n and not batch.tokens[row, n:].any()
        np.testing.assert_array_equal(batch.tiles[row, : counts[row]], prompt.tiles)
        assert not batch.tiles[row, counts[row] :].any()


def test_a_conversation_never_reads_twice_and_says_the_same(tiny):
    """Told in two turns, with what it said in between: as if all had been one prompt. Its room grows on the way."""
    talk = Conversation(*tiny, stop=())
    talk.tell(Prompt(PROMPTS[0], NO_TILES))
    first = list(talk.say(61))
    talk.tell(Prompt(PROMPTS[2], NO_TILES))
    assert talk._now.room == 128
    second = list(talk.say(4))
    assert talk.tokens == PROMPTS[0] + first + PROMPTS[2] + second
    assert texts(ask(tiny, PROMPTS[0], max_tokens=61)) == [[first]]
    assert texts(ask(tiny, PROMPTS[0] + first + PROMPTS[2], max_tokens=4)) == [[second]]


def test_a_conversation_goes_on_from_what_was_heard(tiny):
    """Whoever stops listening after two tokens goes on from these two; a stop id ends it and is part of it."""
    talk, stop = Conversation(*tiny, stop=()), texts(ask(tiny, PROMPTS[0]))[0][0][3]
    talk.tell(Prompt(PROMPTS[0], NO_TILES))
    heard = list(itertools.islice(talk.say(6), 2))
    assert talk.tokens == PROMPTS[0] + heard
    talk.tell(Prompt(PROMPTS[1], NO_TILES))
    assert texts(ask(tiny, PROMPTS[0] + heard + PROMPTS[1])) == [[list(talk.say(6))]]
    talk = Conversation(*tiny, stop={stop})
    talk.tell(Prompt(PROMPTS[0], NO_TILES))
    said = list(talk.say(6))
    assert said[-1] == stop and stop not in said[:-1] and talk.tokens == PROMPTS[0] + said


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 4}, pytest.param({"fsdp": 2, "context": 4}, marks=pytest.mark.slow)], ids=str
)
def test_a_mesh_gives_the_tokens_of_one_device(sizes, tiny):
    """Weights and rows split over eight devices; prompts that do not fill the rows."""
    mesh = make_mesh(sizes)
    skel = skeleton(MODEL, make_seam(mesh), patch_id=twins.PATCH, train=config.Train())
    params = jax.device_put(tiny[1], rules.shardings(skel.axes, tiny[1], mesh))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
    on_mesh = ask((skel, params, tiny[2]), *PROMPTS, n=2, sampling=Sampling(1.0), row_multiple=8)
    for mine, theirs in zip(on_mesh, ask(tiny, *PROMPTS, n=2, sampling=Sampling(1.0)), strict=True):
        assert [c.tokens for c in mine] == [c.tokens for c in theirs]
        np.testing.assert_allclose([c.logp for c in mine], [c.logp for c in theirs], **TWIN)


@pytest.mark.parametrize("case", ["scout_like", "maverick_like", *goldens.DENSE])
def test_greedy_text_of_another_implementation_is_reproduced(case):
    golden = goldens.load(case)
    weights = goldens.build(golden)
    expected = golden.outputs["greedy.tokens"]
    prompts = [Prompt(row[:14].tolist(), NO_TILES) for row in expected]
    length = expected.shape[1] - 14
    for row, prompt in zip(expected, prompts, strict=True):
        ((completion,),) = generate(*weights, [prompt], max_tokens=length, stop=set())
        assert completion.text == row[14:].tolist()
