"""Likelihoods and continuations of texts: beside one text at a time in float64, alone and in company, and the rules for
what is a continuation's token, which need no harness."""

from __future__ import annotations

import numpy as np
import pytest

from llamax.config import ConfigError
from llamax.data import chat
from llamax.evals import continuations
from llamax.evals.continuations import NO_TILES, How, Pair, continued, how_of, likelihoods, pair
from llamax.sample import reading
from llamax.sample.engine import Completion, Prompt, Sampling, generate
from tests.evals.harness_model import TOKENIZER, make, slow
from tests.tolerances import ORACLE

BOS = TOKENIZER.bos
TEXTS = [
    ("import os", "\nimport sys\n"),
    ("def main(", "):"),
    ("", "class A:"),
    ("return ", "None"),
    ("for i in range(10):\n    print(i)\n", "done"),
]


@pytest.fixture(scope="module")
def model():
    return make()


# --------------------------------------------------------------------------------------------------------------- texts


def test_texts_begin_as_documents_do():
    assert continuations.encode("import os", TOKENIZER) == [BOS, *TOKENIZER.encode("import os")]
    assert continuations.encode("", TOKENIZER) == [BOS]
    spelt = continuations.encode("a <|eot|>", TOKENIZER)
    assert TOKENIZER.eot not in spelt  # plain text, whatever it spells


def test_a_conversation_is_what_the_template_makes_of_it():
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    asked = continuations.chat_text(messages[:1], TOKENIZER, prompt=True)
    rendered = chat.encode(chat.render(messages[:1], prompt=True), TOKENIZER).tokens.tolist()
    assert continuations.encode(asked, TOKENIZER) == rendered
    left_open = continuations.chat_text(messages, TOKENIZER, prompt=False)
    assert continuations.encode(left_open, TOKENIZER) == [*rendered, *TOKENIZER.encode("2")]


@pytest.mark.parametrize(("context", "continuation"), [text for text in TEXTS if text[0][-1:] not in ("(", "\n")])
def test_pairs_are_the_whole_text(context, continuation):
    before, after = pair(context, continuation, TOKENIZER)
    assert TOKENIZER.decode(after).strip() == continuation.strip()
    assert before + after == [BOS, *TOKENIZER.encode(context + continuation)]


def test_white_space_at_the_end_goes_with_the_continuation():
    assert pair("return ", "None", TOKENIZER) == pair("return", " None", TOKENIZER)
    assert pair(" \n", "None", TOKENIZER) == Pair([BOS], TOKENIZER.encode(" \nNone"))
    assert pair("return", "", TOKENIZER).continuation == []


def test_a_continuation_that_melts_into_the_context_is_asked_for_all_the_same():
    assert len(TOKENIZER.encode("import")) == 1 == len(TOKENIZER.encode("impo" + "rt")) < len(TOKENIZER.encode("impo"))
    before, after = pair("impo", "rt", TOKENIZER)
    assert before == [BOS, *TOKENIZER.encode("impo")] and after == TOKENIZER.encode("rt")


def test_contexts_are_cut_from_the_left(caplog):
    pairs = [Pair([1, 2, 3, 4], [5, 6]), Pair([1, 2], [3])]
    assert continuations.fit(pairs, 5) == pairs and not caplog.records
    assert continuations.fit(pairs, 3) == [Pair([3, 4], [5, 6]), Pair([1, 2], [3])]
    assert "1 of 2 contexts cut from the left: the model is given 3 tokens" in caplog.text
    assert continuations.fit(pairs, 2)[0] == Pair([4], [5, 6])
    with pytest.raises(ConfigError, match="a continuation of 2 tokens, but the model is given 1 .* max_length=2"):
        continuations.fit(pairs, 1)


def test_windows():
    """The example of the harness's own documentation (`lm_eval.api.model.LM.loglikelihood_rolling`)."""
    assert continuations.windows(range(10), 99, 4) == [
        Pair([99], [0, 1, 2, 3]),
        Pair([3], [4, 5, 6, 7]),
        Pair([5, 6, 7], [8, 9]),
    ]
    assert continuations.windows([], 99, 4) == []
    assert continuations.windows(range(4), 99, 4) == [Pair([99], [0, 1, 2, 3])]


# --------------------------------------------------------------------------------------------------------- likelihoods


def test_likelihoods_are_the_slow_ones_in_any_company(model):
    pairs = [pair(*text, TOKENIZER) for text in TEXTS]
    prompt = pairs[0].context
    ((greedy,),) = generate(*weights(model), [Prompt(prompt, NO_TILES)], max_tokens=5, stop=(), rows=4, row_multiple=4)
    pairs += [Pair(prompt, greedy.tokens), Pair(prompt, [*greedy.tokens[:-1], greedy.tokens[-1] ^ 1])]
    pairs += [Pair(prompt * 2, []), pair("a", "b", TOKENIZER)]
    assert len(pairs) % 4 == 1  # and the last batch has as many rows all the same
    before = reading.score_piece._cache_size()
    together = dict(likelihoods(model, pairs, 4))
    assert reading.score_piece._cache_size() - before <= 1  # one length, one program
    alone = [dict(likelihoods(model, [one], 1))[0] for one in pairs]
    for i, one in enumerate(pairs):
        logp, best = slow(model, *one)
        np.testing.assert_allclose([together[i].logp, alone[i].logp], logp, **ORACLE)
        assert together[i].greedy == alone[i].greedy == best
    assert [together[i].greedy for i in range(len(pairs))] == [False] * len(TEXTS) + [True, False, True, False]


def weights(model):
    return model.skeleton, model.params, model.router_bias


# ---------------------------------------------------------------------------------------------------------- generation


def test_generations_are_the_engines(model, monkeypatch):
    prompts = continuations.prompts_of([context for context, _ in TEXTS], TOKENIZER, 12, 100)
    assert prompts == [continuations.encode(context, TOKENIZER) for context, _ in TEXTS]
    how = dict(max_tokens=12, stop=TOKENIZER.stop, rows=4, row_multiple=4)
    engine = generate(*weights(model), [Prompt(ids, NO_TILES) for ids in prompts], **how)
    free = continued(model, prompts, How(12, (), Sampling()), 4)
    ranks = range(TOKENIZER.n_ranks)
    assert free == [TOKENIZER.decode(i for i in one.text if i in ranks) for (one,) in engine] and all(free)
    token = next(i for (one,) in engine for i in one.tokens[2:] if len(TOKENIZER.decode([i])) > 2)
    until = (TOKENIZER.decode([token])[1:], "\n\n\n")
    cut = continued(model, prompts, How(12, until, Sampling()), 4)
    assert cut == [text.split(until[0])[0].split(until[1])[0] for text in free] != free
    monkeypatch.setattr(continuations, "ending", lambda tokenizer, until: frozenset())
    assert continued(model, prompts, How(12, until, Sampling()), 4) == cut


def test_texts_end_where_the_model_ends_them(model, monkeypatch):
    """As if a token that it says were one that ends a turn."""
    prompts = continuations.prompts_of(["import os"], TOKENIZER, 12, 100)
    how = dict(max_tokens=12, stop=(), rows=4, row_multiple=4)
    (((tokens, _, _),),) = generate(*weights(model), [Prompt(prompts[0], NO_TILES)], **how)
    monkeypatch.setattr(type(TOKENIZER), "stop", frozenset({tokens[2]}))
    (text,) = continued(model, prompts, How(12, (), Sampling()), 4)
    upto = tokens[: tokens.index(tokens[2]) + 1]
    assert text == TOKENIZER.decode(i for i in upto if i < TOKENIZER.n_ranks) and len(upto) < len(tokens)


def test_greedy_texts_are_done_batch_after_batch():
    prompts = [[1] * n for n in (3, 5, 1, 4, 2)]
    assert continuations.batches(prompts, How(4, (), Sampling()), 2) == [[1, 3], [0, 4], [2]]
    assert [list(some) for some in continuations.batches(prompts, How(4, (), Sampling(0.5)), 2)] == [[0, 1, 2, 3, 4]]


def test_samples_follow_from_the_seed(model):
    prompts, sampled = [[BOS], [BOS]], How(12, (), Sampling(1.0, 1.0, 3))
    first, again = (continued(model, prompts, sampled, 4) for _ in range(2))
    assert first == again and first[0] != first[1]
    assert continued(model, prompts, How(12, (), Sampling(1.0, 1.0, 4)), 4) != first


def test_the_first_end_counts():
    ids = TOKENIZER.encode("import os, sys")
    completion = Completion([TOKENIZER.header_start, *ids, TOKENIZER.eot], [0.0] * (len(ids) + 2), True)
    for until in (("sys", "os"), ("os", "sys")):
        assert continuations.said(completion, until, TOKENIZER) == "import "
    assert continuations.said(completion, (), TOKENIZER) == "import os, sys"


def test_what_ends_a_text():
    ends = continuations.ending(TOKENIZER, ["\n", "<|eot|>"])
    assert TOKENIZER.eot in ends and set(TOKENIZER.encode("\n")) <= ends and not set(TOKENIZER.encode("import")) & ends
    assert continuations.ending(TOKENIZER, []) == frozenset()


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({}, How(256, (), Sampling(0.0, 1.0, 5))),
        ({"until": "\n", "max_gen_toks": 8}, How(8, ("\n",), Sampling(0.0, 1.0, 5))),
        ({"until": ["a", ""], "max_new_tokens": "9", "top_k": 0}, How(9, ("a",), Sampling(0.0, 1.0, 5))),
        ({"do_sample": False, "temperature": 1, "num_beams": 1}, How(256, (), Sampling(0.0, 1.0, 5))),
        ({"do_sample": True}, How(256, (), Sampling(1.0, 1.0, 5))),
        ({"temperature": 0.7, "top_p": 0.9}, How(256, (), Sampling(0.7, 0.9, 5))),
    ],
)
def test_settings_of_a_generation(settings, how):
    assert how_of(settings, 256, 5) == how


def test_what_would_change_a_text_is_refused():
    with pytest.raises(ConfigError, match="generation with num_beams=4, but texts are drawn by .* Leave it out"):
        how_of({"num_beams": 4}, 256, 0)
    with pytest.raises(ConfigError, match="a generation of 64 tokens, but the model is given 64 .* max_length=65"):
        continuations.prompts_of(["a"], TOKENIZER, 64, 64)


def test_prompts_leave_room(caplog):
    (ids,) = continuations.prompts_of(["import os\n" * 20], TOKENIZER, 4, 12)
    assert ids == continuations.encode("import os\n" * 20, TOKENIZER)[-8:]
    assert "1 of 1 contexts cut from the left" in caplog.text
