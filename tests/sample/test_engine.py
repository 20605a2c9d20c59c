"""Generation beside full forward passes, alone and in company, and beside another implementation's greedy text."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from llamax import config
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from llamax.sample.engine import DecodeSettings, Prompt, decode, generate, pack
from tests import goldens
from tests.model import twins

MODEL = replace(twins.TINY, plan=((("rope_chunk+dense",), 1),))
NO_TILES = np.zeros((0, 8, 8, 3), np.uint8)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]


@pytest.fixture(scope="module")
def tiny():
    """(skeleton, params) of a small model with weights large enough to have opinions."""
    skel = skeleton(MODEL, Seam(), patch_id=twins.PATCH, train=config.Train())
    rng = np.random.default_rng(7)
    return skel, jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), skel.shapes()[0])


def ask(tiny, *prompts, max_tokens=6, stop=(), **how):
    prompts = [Prompt(tokens, NO_TILES) for tokens in prompts]
    return generate(*tiny, {}, prompts, max_tokens=max_tokens, stop=set(stop), **how)


def slow_greedy(params, prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        row = np.array([tokens], np.int32)
        at = np.arange(len(tokens))[None]
        batch = twins.batch()._replace(tokens=row, tiles=NO_TILES[None], positions=at, segment_ids=row * 0 + 1)
        tokens.append(int(twins.decode(params, MODEL, batch).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_text_is_that_of_full_forward_passes_of_the_slow_twin(tiny):
    """Prompts of several lengths, in one call and each alone; chunks end on the way."""
    together = ask(tiny, *PROMPTS)
    assert together == [slow_greedy(tiny[1], prompt, 6) for prompt in PROMPTS]
    assert together == [ask(tiny, prompt)[0] for prompt in PROMPTS]


def test_rows_divide_as_asked():
    for n, multiple in ((1, 1), (1, 8), (3, 8), (70, 96)):
        rows, lengths = pack([Prompt([1, 2], NO_TILES)] * n, 4, multiple)
        assert len(rows.tokens) % multiple == 0 and (lengths > 0).sum() == n


def test_generation_ends_before_a_stop_token(tiny):
    free = ask(tiny, *PROMPTS)
    stop = free[0][2]
    cut = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert len(cut[0]) < 6
    assert ask(tiny, *PROMPTS, stop={stop}) == cut


def test_decoding_ends_when_every_prompt_has(tiny):
    """Rows that only fill the batch up do not keep it going."""
    skel, params = tiny
    first = tuple(sorted({ids[0] for ids in ask(tiny, *PROMPTS)}))
    batch, lengths = pack([Prompt(p, NO_TILES) for p in PROMPTS], 6)
    may = np.ones(MODEL.vocab_size, bool)
    new = decode(DecodeSettings(skel, 6, first, 0.0), params, {}, batch, lengths, may, jax.random.key(0))
    assert not np.asarray(new)[:, 1:].any()


def test_only_what_is_allowed_is_drawn(tiny):
    """Greedy or not; and never the patch token, although it may be the likeliest."""
    few = {7, 11, 13}
    for temperature in (0.0, 3.0):
        drawn = ask(tiny, *PROMPTS, allowed=few, temperature=temperature)
        assert {id for ids in drawn for id in ids} <= few
    free = ask(tiny, *PROMPTS, temperature=100.0, max_tokens=40)
    assert twins.PATCH not in {id for ids in free for id in ids}


def test_sampling_is_reproducible_by_seed(tiny):
    draws = [ask(tiny, *PROMPTS, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_packing_gives_every_prompt_its_own_pictures_and_room():
    rng = np.random.default_rng(0)
    counts = (2, 0, 1)
    prompts = [
        Prompt(p, rng.integers(1, 256, (n, 8, 8, 3), dtype=np.uint8)) for p, n in zip(PROMPTS, counts, strict=True)
    ]
    batch, lengths = pack(prompts, max_tokens=60)
    assert batch.tokens.shape[1] >= 60 + 8 and batch.tiles.shape[1:] == (2, 8, 8, 3)
    for row, prompt in enumerate(prompts):
        assert lengths[row] == len(prompt.tokens)
        np.testing.assert_array_equal(batch.tokens[row, : lengths[row]], prompt.tokens)
        assert not batch.tokens[row, lengths[row] :].any()
        np.testing.assert_array_equal(batch.tiles[row, : counts[row]], prompt.tiles)
        assert not batch.tiles[row, counts[row] :].any()


@pytest.mark.parametrize("case", ["scout_like", "maverick_like"])
def test_greedy_text_of_another_implementation_is_reproduced(case):
    golden = goldens.load(case)
    skel, params, bias = goldens.build(golden)
    expected = golden.outputs["greedy.tokens"]
    prompts = [Prompt(row[:14].tolist(), NO_TILES) for row in expected]
    for row, prompt in zip(expected, prompts, strict=True):
        assert generate(skel, params, bias, [prompt], max_tokens=12, stop=set()) == [row[14:].tolist()]
