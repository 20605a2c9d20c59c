"""`llamax generate` and `llamax chat`, by the functions behind them, with a small random model that sees pictures."""

from __future__ import annotations

import dataclasses
import shutil
import signal

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
from llamax.sample import engine, reading
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
    before, placed, two = asked
    assert before.tokens == placed.tokens and np.array_equal(before.tiles, placed.tiles)
    shown = loaded.tokenizer.decode(two.tokens).replace("<|patch|>", "")
    assert shown == "<|begin_of_text|>a<|image_start|><|image|><|image_end|>b<|image_start|><|image|><|image_end|>"
    assert len(two.tiles) == 2 and np.array_equal(two.tiles[1], before.tiles[0])


def test_several_continuations(loaded):
    first = generate(n=3, sampling=Sampling(2.0, seed=1))
    assert len(set(first)) > 1 and first == generate(n=3, sampling=Sampling(2.0, seed=1))
    assert len(generate()) == 1


@pytest.mark.parametrize(
    "how, said",
    [
        (dict(images=[FIXTURES / "nothing.png"]), "there is no such file"),
        (dict(prompt="a\udcff"), "no valid Unicode"),
        (dict(max_tokens=0), "1 to 16777216 tokens"),
        (dict(max_tokens=2_000_000_000), "1 to 16777216 tokens"),
        (dict(n=0), "no continuation"),
        (dict(sampling=Sampling(-1.0)), "a number from 1e-06 up"),
        (dict(sampling=Sampling(1e-40)), "a number from 1e-06 up"),
        (dict(sampling=Sampling(float("nan"))), "number from 1e-06 up"),
        (dict(sampling=Sampling(1.0, 0.0)), "a probability from 1e-06 up"),
        (dict(sampling=Sampling(seed=2**32)), "0 to 2\\^32 - 1"),
        (dict(prompt="a<|image|>b"), "0 images, but the prompt has 1 places"),
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


def test_pictures_are_those_of_their_turn(model, tmp_path):
    """The file may change or go afterwards."""
    shown, talk = tmp_path / "shown.png", generating.Chat(model, model.tokenizer)
    shutil.copyfile(CIRCLE, shown)
    list(talk.ask("What?", [shown], 2, GREEDY))
    shown.unlink()
    assert "".join(talk.ask("And now?", (), 2, GREEDY)) == talk.messages[-1]["content"]


@pytest.fixture
def interruptible():
    """A test's process may have been told to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_answer_is_kept_as_far_as_it_was_said(loaded, monkeypatch, interruptible):
    """Interrupts at any moment, before, in and after a step of the device: tokens and cache stay together."""
    talks = []

    class Watched(generating.Chat):
        def ask(self, *asked):
            talks.append(self)
            yield from super().ask(*asked)

    step, extend, moments = engine.advance, reading.extend, iter([1, 2, 3, 4])

    def interrupting(*args):
        moment = next(moments, 0)
        if moment == 1:
            signal.raise_signal(signal.SIGINT)
        result = step(*args)
        if moment == 2:
            signal.raise_signal(signal.SIGINT)
        return result

    def interrupted_reading(*args):
        result = extend(*args)
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt  # the cache that was given is used up
        return result

    interrupted: list[bool] = []
    monkeypatch.setattr(engine, "advance", interrupting)
    monkeypatch.setattr(reading, "extend", interrupted_reading)
    monkeypatch.setattr(generating, "Chat", Watched)
    said = iter(["Hello", "lost", "Go on", "And on", "/exit"])
    generating.chat("there", max_tokens=4, sampling=GREEDY, read=lambda prompt: next(said))
    messages, talk = talks[0].messages, talks[0]._talk
    assert [m["content"][-1]["text"] for m in messages if m["role"] == "user"] == ["Hello", "Go on", "And on"]
    assert [len(m["token_ids"]) for m in messages if m["role"] == "assistant"] == [1, 1, 4]
    prompt = generating.Prompt(talk.tokens[:-4], np.zeros((0, 28, 28, 3), np.uint8))
    how = dict(max_tokens=4, stop=loaded.tokenizer.stop)
    (((tokens, *_),),) = generating.complete(loaded.skeleton, loaded.params, loaded.router_bias, [prompt], **how)
    assert tokens == messages[-1]["token_ids"]
