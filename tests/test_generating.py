"""`llamax generate` and `llamax chat`, by the functions behind them, with a small random model that sees pictures."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax import config, generating, loading
from llamax.config import ConfigError
from llamax.data import chat as template
from llamax.data.tokenizer import Tokenizer
from llamax.loading import Loaded
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from llamax.sample.engine import Sampling
from tests.runs import FIXTURES, tiny_run

CIRCLE, OTHER = (str(FIXTURES / "pictures" / name) for name in ("red_circle.png", "blue_star.png"))
GREEDY = Sampling()


@pytest.fixture(scope="module")
def model() -> Loaded:
    run = tiny_run()
    model = dataclasses.replace(run.model, plan=((("rope_chunk+dense", "nope_full+moe"), 1),))
    tokenizer = Tokenizer(run.data.tokenizer)
    skel = skeleton(model, Seam(), patch_id=tokenizer.patch, train=config.Train(remat="none"))
    rng = np.random.default_rng(0)
    params, bias = skel.shapes()
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), params)
    return Loaded(model, skel, params, jax.tree.map(lambda x: jnp.zeros(x.shape), bias), tokenizer)


@pytest.fixture
def loaded(monkeypatch, model):
    monkeypatch.setattr(loading, "load", lambda folder, dtype: model)
    return model


def generate(prompt="What?", **how):
    return generating.generate("there", prompt, **({"max_tokens": 3} | how))


def test_pictures_stand_before_the_prompt_or_in_their_places(loaded, monkeypatch):
    asked = []
    real = generating.complete
    monkeypatch.setattr(generating, "complete", lambda *a, **how: asked.append(a[3][0]) or real(*a, **how))
    generate("ab", images=[CIRCLE])
    generate("<|image|>ab", images=[CIRCLE])
    generate("a<|image|>b<|image|>", images=[OTHER, CIRCLE])
    generate("a<|image|>b")
    before, placed, two, none = asked
    assert before.tokens == placed.tokens and np.array_equal(before.tiles, placed.tiles)
    shown = loaded.tokenizer.decode(two.tokens).replace("<|patch|>", "")
    assert shown == "<|begin_of_text|>a<|image_start|><|image|><|image_end|>b<|image_start|><|image|><|image_end|>"
    assert len(two.tiles) == 2 and np.array_equal(two.tiles[1], before.tiles[0])
    assert loaded.tokenizer.image not in none.tokens and not len(none.tiles)


def test_several_continuations(loaded):
    first = generate(n=3, sampling=Sampling(2.0, seed=1))
    assert len(set(first)) > 1 and first == generate(n=3, sampling=Sampling(2.0, seed=1))
    assert len(generate()) == 1


@pytest.mark.parametrize(
    "how, said",
    [
        (dict(images=[FIXTURES / "nothing.png"]), "a picture's file does not exist"),
        (dict(max_tokens=0), "nothing to say"),
        (dict(n=0), "no continuation"),
        (dict(sampling=Sampling(-1.0)), "a number from 0 up"),
        (dict(sampling=Sampling(float("nan"))), "number from 0 up"),
        (dict(sampling=Sampling(1.0, 0.0)), "a probability above 0"),
        (dict(prompt="<|image|> and <|image|>", images=[CIRCLE]), "1 images, but the prompt has 2 places"),
    ],
)
def test_what_cannot_be_used_is_told(loaded, how, said):
    with pytest.raises(ConfigError, match=said):
        generate(**how)


def test_a_model_without_a_tokenizer_or_eyes_is_told(monkeypatch, model):
    monkeypatch.setattr(loading, "load", lambda folder, dtype: model._replace(tokenizer=None))
    with pytest.raises(ConfigError, match="no tokenizer that can be read"):
        generate()
    blind = model._replace(model=dataclasses.replace(model.model, vision=None))
    monkeypatch.setattr(loading, "load", lambda folder, dtype: blind)
    with pytest.raises(ConfigError, match="no vision encoder"):
        generating.chat("there", images=[CIRCLE], read=lambda prompt: "")


def test_an_answer_goes_on_from_the_whole_conversation(model):
    """Turn by turn on a cache: the ids are those of the template, the answers those of a fresh reading of them."""
    talk = generating.Chat(model, model.tokenizer, "Be brief.")
    for text, images in (("Hello?", ()), ("And this?", (CIRCLE, OTHER)), ("So?", ())):
        answer = "".join(talk.ask(text, images, 5, GREEDY))
        asked, said = talk.messages[:-1], talk.messages[-1]["token_ids"]
        assert talk.messages[-1]["content"] == answer
        whole = template.encode(template.render(asked, prompt=True), model.tokenizer, model.model.vision)
        assert talk._talk.tokens == whole.tokens.tolist() + said
        prompt = generating.Prompt(whole.tokens.tolist(), whole.tiles)
        how = dict(max_tokens=5, stop=model.tokenizer.stop)
        (((tokens, *_),),) = generating.complete(model.skeleton, model.params, model.router_bias, [prompt], **how)
        assert said == tokens
    assert len(whole.tiles) == 2


def test_talking(loaded, capsys):
    """Commands, several pictures, a wrong one that costs nothing, the end of the input."""
    lines = iter(
        ["Hello", "/image nothing.png", f"/image {CIRCLE}", "", "What is this?", "/reset", "Hello", "/help", "/x"]
    )

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    generating.chat("there", max_tokens=4, sampling=GREEDY, read=read)
    out = capsys.readouterr().out
    talk = generating.Chat(loaded, loaded.tokenizer)
    hello = "".join(talk.ask("Hello", (), 4, GREEDY))
    circle = "".join(talk.ask("What is this?", [CIRCLE], 4, GREEDY))
    wrong = "image nothing.png, but there is no such file. Name a picture's file."
    assert out == f"{hello}\n{wrong}\n{circle}\n{hello}\n{generating.HELP}\n/x is no command\n{generating.HELP}\n\n"


def test_an_interrupted_answer_is_kept_as_far_as_it_was_heard(loaded, monkeypatch):
    talks = []

    class Interrupted(generating.Chat):
        def ask(self, text, *rest):
            talks.append(self)
            for number, piece in enumerate(super().ask(text, *rest)):
                yield piece
                if text == "Hello" and number == 1:
                    raise KeyboardInterrupt

    monkeypatch.setattr(generating, "Chat", Interrupted)
    said = iter(["Hello", "Go on", "/exit"])
    generating.chat("there", max_tokens=4, sampling=GREEDY, read=lambda prompt: next(said))
    assert [len(m["token_ids"]) for m in talks[0].messages if m["role"] == "assistant"] == [2, 4]
