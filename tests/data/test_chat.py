"""The chat template beside Hugging Face's, its Jinja form, what is learnt, and that what has been said stays."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llamax.config import ConfigError, Vision
from llamax.data import chat
from llamax.data.packing import pack_window
from llamax.data.sources import Picture
from llamax.data.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parents[2] / "data"
RELEASED = os.environ.get("LLAMAX_LLAMA4_TOKENIZER", "")
VISION = Vision(tile_px=28, patch_px=7, max_tiles=4, dim=32, n_layers=1, n_heads=2, ffn_dim=32, adapter_dim=32)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DATA / "tokenizer.model")


@pytest.fixture(scope="module")
def cases(golden) -> list[dict]:
    return json.loads(golden("llama4/chat.json").read_text(encoding="utf-8"))["cases"]


def png(height: int = 20, width: int = 20) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 10, 10)).save(file, "PNG")
    return file.getvalue()


def rendered(case: dict) -> list[chat.Span]:
    """A golden case; the pictures that it does not bring are never opened."""
    n_images = str(case["messages"]).count("'image'")
    return chat.render(case["messages"], tools=case["tools"], images=[b""] * n_images, prompt=case["prompt"])


def tokens(tokenizer: Tokenizer, messages, **how) -> list[int]:
    return chat.encode(chat.render(messages, **how), tokenizer, VISION).tokens.tolist()


def learnt(tokenizer: Tokenizer, messages, **how) -> list[int]:
    encoded = chat.encode(chat.render(messages, **how), tokenizer, VISION)
    return encoded.tokens[encoded.weights > 0].tolist()


# -------------------------------------------------------------------------------------------------------- the template


def test_text_equals_hugging_faces(cases, tokenizer):
    assert len(cases) >= 9
    for case in cases:
        assert chat.to_text(rendered(case), tokenizer) == case["text"], case["name"]


@pytest.mark.skipif(not RELEASED, reason="set LLAMAX_LLAMA4_TOKENIZER to the released tokenizer.model")
def test_ids_equal_hugging_faces(cases):
    released = Tokenizer(RELEASED)
    for case in cases:
        ids = []
        for span in rendered(case):
            picture = isinstance(span.content, Picture)
            ids += [released.image] if picture else chat.encode([span], released).tokens.tolist()
        assert ids == case["ids"], case["name"]


@pytest.fixture(scope="module")
def jinja_text():
    """The Jinja template's text as transformers renders it: the same environment, filter and functions."""
    sandbox = pytest.importorskip("jinja2.sandbox", reason="jinja2 is not installed")

    def refuse(message):
        raise ValueError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    render = environment.from_string(chat.template()).render

    def text(messages, tools=None, prompt=False) -> str:
        return render(messages=messages, tools=tools, add_generation_prompt=prompt, bos_token="<|begin_of_text|>")

    return text


def test_the_jinja_template_is_the_same(cases, tokenizer, jinja_text):
    for case in cases:
        assert jinja_text(case["messages"], case["tools"], case["prompt"]) == case["text"], case["name"]
    for seed in range(60):
        messages, tools = conversation(random.Random(seed), tokenizer, sampled=False)
        for prompt in (False, True):
            here = chat.to_text(chat.render(messages, tools=tools, prompt=prompt), tokenizer)
            assert jinja_text(messages, tools, prompt) == here, seed
    for wrong, tools in (([{"role": "robot", "content": ""}], None), ([{"role": "system", "content": ""}], TOOLS)):
        with pytest.raises(ValueError):
            jinja_text(wrong, tools)


def test_headers_and_marks_by_hand(tokenizer):
    t = tokenizer
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a circle"}]

    def header(role):
        return [t.header_start, *t.encode(role), t.header_end, *t.encode("\n\n")]

    first = [t.bos, *header("user"), *t.encode("Hi"), t.eot, *header("assistant")]
    assert tokens(t, messages[:1], prompt=True) == first
    assert tokens(t, messages) == [*first, *t.encode("a circle"), t.eot]


def test_text_that_spells_special_tokens_is_plain_text(tokenizer):
    spelt = "".join(tokenizer.specials)
    plain = tokens(tokenizer, [{"role": "user", "content": ""}])
    for content in (spelt, [{"type": "text", "text": spelt}]):
        found = tokens(tokenizer, [{"role": "user", "content": content}])
        assert len(found) > len(plain) + 100
        assert sum(i >= tokenizer.n_ranks for i in found) == sum(i >= tokenizer.n_ranks for i in plain)
    call = {"function": {"name": spelt, "arguments": {spelt: spelt}}}
    turns = [
        {"role": "system", "content": spelt},
        {"role": "user", "content": spelt},
        {"role": "assistant", "content": spelt, "tool_calls": [call]},
        {"role": "tool", "content": spelt},
    ]
    tools = [{"name": "f", "description": spelt}]
    marks = [i for i in tokens(tokenizer, turns, tools=tools) if i >= tokenizer.n_ranks]
    harmless = json.loads(json.dumps([turns, tools]).replace(json.dumps(spelt)[1:-1], "x"))
    assert marks == [i for i in tokens(tokenizer, harmless[0], tools=harmless[1]) if i >= tokenizer.n_ranks]


def test_llama_3s_marks(tmp_path):
    """The same turns with Llama 3's own special tokens; it has no marks for tool calls."""
    tokenizer = llama3(tmp_path)
    ids = tokens(tokenizer, [{"role": "user", "content": "Hi"}], prompt=True)
    assert tokenizer.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    with pytest.raises(ConfigError, match="python_start"):
        tokens(tokenizer, [{"role": "user", "content": "Hi"}, turn])


def llama3(folder: Path) -> Tokenizer:
    """The 256 bytes and Llama 3's names of special tokens, as a tokenizer.json."""
    from llamax.data import tokenizer as tok
    from llamax.data.tokenizer_json import Vocabulary, write_json

    names = [name for name in tok.special_tokens(tok.LLAMA3_RANKS) if "reserved" not in name]
    vocabulary = Vocabulary(
        {bytes([b]): b for b in range(256)}, dict(zip(names, range(256, 300), strict=False)), tok.LLAMA3_SPLIT
    )
    write_json(vocabulary, folder, bos=names[0], eos="<|eot_id|>", pad="<|finetune_right_pad_id|>")
    return Tokenizer(folder / "tokenizer.json")


# --------------------------------------------------------------------------------------- what is learnt, and what stays


def test_only_the_assistants_turns_are_learnt(tokenizer):
    t = tokenizer
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "system", "content": "system words"},
        {"role": "user", "content": "user words"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "tool words"},
        {"role": "assistant", "content": "the answer"},
    ]
    called = [t.python_start, *t.encode("I look."), t.python_end, *t.encode('{"name": "f", "parameters": {"x": 1}}')]
    expected = [*called, t.eot, *t.encode("the answer"), t.eot]
    assert learnt(t, messages) == learnt(t, messages, prompt=True) == expected
    assert learnt(t, messages[:2], prompt=True) == []


def conversation(rng: random.Random, tokenizer: Tokenizer, sampled: bool = True) -> tuple[list[dict], list | None]:
    """A random conversation that is allowed, and its tools."""
    words = ["", " ", "\n", "\n\nAnd", "Hi", " a red circle ", "été 東京", "<|eot|>", "{}", "'ll\t", "\r\n", "😀"]

    def text():
        return "".join(rng.choice(words) for _ in range(rng.randrange(5)))

    def content():
        if rng.random() < 0.5:
            return text()
        return [
            {"type": "image", "image": png()} if rng.random() < 0.3 else {"type": "text", "text": text()}
            for _ in range(rng.randrange(4))
        ]

    messages = [{"role": "system", "content": content()}] * (rng.random() < 0.5)
    messages.append({"role": "user", "content": content()})
    for _ in range(rng.randrange(6)):
        role = rng.choice(("user", "assistant", "assistant", "system", "calls"))
        if role != "calls":
            message = {"role": role, "content": content()}
            if role == "assistant" and sampled and rng.random() < 0.5:
                message["token_ids"] = [rng.randrange(tokenizer.n_ranks) for _ in range(rng.randrange(6))]
                message["token_ids"] += rng.choice(([], [tokenizer.eot], [tokenizer.eom], [tokenizer.eos]))
            messages.append(message)
            continue
        calls = [
            {"id": str(i), "function": {"name": "f", "arguments": rng.choice(({"x": text()}, '{"y":  2}', {}))}}
            for i in range(rng.randrange(1, 3))
        ]
        messages.append({"role": "assistant", "content": content(), "tool_calls": calls})
        answers = [text(), {"z": [1, None]}, 3]
        messages += [{"role": rng.choice(("tool", "ipython")), "content": rng.choice(answers)} for _ in calls]
    return messages, TOOLS if rng.random() < 0.5 else None


def test_what_has_been_said_stays_as_it_is(tokenizer):
    """The tokens of the first k messages, and of the prompt that they make, open those of all."""
    for seed in range(40):
        messages, tools = conversation(random.Random(seed), tokenizer)
        first = 1 + (messages[0]["role"] == "system") if tools else 1
        whole = chat.encode(chat.render(messages, tools=tools), tokenizer, VISION)
        for k in range(first, len(messages) + 1):
            part = chat.encode(chat.render(messages[:k], tools=tools), tokenizer, VISION)
            n = len(part.tokens)
            spans = chat.render(messages[:k], tools=tools)
            assert spans == chat.render(messages, tools=tools)[: len(spans)]  # so what is new can be encoded alone
            np.testing.assert_array_equal(part.tokens, whole.tokens[:n])
            np.testing.assert_array_equal(part.weights, whole.weights[:n])
            np.testing.assert_array_equal(part.tiles, whole.tiles[: len(part.tiles)])
            prompt = chat.encode(chat.render(messages[:k], tools=tools, prompt=True), tokenizer, VISION)
            if k < len(messages) and messages[k]["role"] == "assistant":
                np.testing.assert_array_equal(prompt.tokens, whole.tokens[: len(prompt.tokens)])
                opens_with_text = isinstance(messages[k].get("content"), str) and "token_ids" not in messages[k]
                assert whole.weights[len(prompt.tokens)] or not opens_with_text


def test_sampled_ids_are_the_turn_as_they_are(tokenizer):
    t = tokenizer
    odd = [*b"red"]  # single bytes: the text would be tokenized otherwise
    assert t.encode(t.decode(odd)) != odd
    user = {"role": "user", "content": "Hi"}
    prompt = tokens(t, [user], prompt=True)
    for end in (t.eot, t.eom, t.eos):
        turn = {"role": "assistant", "content": "for people", "token_ids": [*odd, end]}
        assert tokens(t, [user, turn]) == [*prompt, *odd, end]
        assert learnt(t, [user, turn]) == [*odd, end]
    cut = {"role": "assistant", "token_ids": np.array(odd)}  # the sampler stopped before the end
    assert tokens(t, [user, cut]) == [*prompt, *odd, t.eot]
    assert learnt(t, [user, cut]) == odd
    for wrong in ([t.vocab_size], [-1], [t.patch]):
        with pytest.raises(ConfigError, match="token_ids"):
            tokens(t, [user, {"role": "assistant", "token_ids": wrong}])


def test_the_example_of_the_docs_runs(monkeypatch, capsys):
    page = (DATA.parent / "docs" / "how-to" / "chat.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(DATA.parent)
    exec(compile(code, "chat.md", "exec"), {})
    assert "What is in <|image|>?<|eot|>" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- back to a message


def said(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, specials=True)


def calls_of(message: dict) -> list[tuple[str, dict]]:
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", [])]


def test_a_turn_comes_back_as_the_message_that_it_was(tokenizer):
    call = {"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    for message in (
        {"role": "assistant", "content": "A red circle.\n"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "assistant", "content": "", "tool_calls": [call, call | {"id": "call_1"}]},
    ):
        ids = learnt(tokenizer, [message])
        back = chat.parse(ids, tokenizer)
        assert back == message | {"token_ids": ids}
        assert learnt(tokenizer, [back]) == ids


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "weather", "parameters": {"x": 1}}', "", [("weather", {"x": 1})]),
        ('{"type": "function", "name": "weather", "parameters": {}}; \n{"name": "weather", "arguments": {"x": "é"}}',
         "", [("weather", {}), ("weather", {"x": "é"})]),
        ('[weather(city="Oslo", days=[1, 2]), weather()]',
         "", [("weather", {"city": "Oslo", "days": [1, 2]}), ("weather", {})]),
        ('<|python_start|>[weather(city="Oslo")]<|python_end|>', "", [("weather", {"city": "Oslo"})]),
        ('<|python_start|>so<|python_end|>{"name": "anything", "parameters": {}}', "so", [("anything", {})]),
        ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
        ('{"name": "weather", "parameters": 3}', '{"name": "weather", "parameters": 3}', []),
        ('It is {"name": "weather", "parameters": {}}', 'It is {"name": "weather", "parameters": {}}', []),
        ("[weather(1)]", "[weather(1)]", []),
        ("[weather(x=open('f'))]", "[weather(x=open('f'))]", []),
        ("[weather(**{'x': 1})]", "[weather(**{'x': 1})]", []),
        ("[weather(x=b'1')]", "[weather(x=b'1')]", []),
        ("[[[", "[[[", []),
        ("[" * 9000 + "]" * 9000, "[" * 9000 + "]" * 9000, []),
        ("<|python_start|>print(1)<|python_end|>", "<|python_start|>print(1)<|python_end|>", []),
        ("<|python_start|>cut", "<|python_start|>cut", []),
        ("", "", []),
    ],
)  # fmt: skip
def test_tool_calls_in_every_form_and_what_is_none(tokenizer, text, content, calls):
    ids = [*said(tokenizer, text), tokenizer.eot]
    message = chat.parse(ids, tokenizer, TOOLS)
    assert (message["content"], calls_of(message), message["token_ids"]) == (content, calls, ids)
    assert tokens(tokenizer, [message])[-len(ids) :] == ids


def test_json_is_an_answer_where_no_tools_are_offered(tokenizer):
    text = '{"name": "weather", "parameters": {}}'
    assert chat.parse(said(tokenizer, text), tokenizer)["content"] == text


# ------------------------------------------------------------------------------------------------------------- pictures


def test_pictures_stand_in_their_place(tokenizer):
    t = tokenizer
    block = [t.image_start, t.image, *[t.patch] * VISION.tokens_per_tile, t.image_end]
    tiled = [t.image_start]
    tiled += [*[t.patch] * VISION.tokens_per_tile, t.tile_x_separator, *[t.patch] * VISION.tokens_per_tile]
    tiled += [t.tile_y_separator, t.image, *[t.patch] * VISION.tokens_per_tile, t.image_end]
    parts = ["Compare ", png(), " with ", png(28, 56), "?"]
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    spans = chat.render([{"role": "user", "content": content}])
    encoded = chat.encode(spans, t, VISION)
    middle = [*t.encode("Compare "), *block, *t.encode(" with "), *tiled, *t.encode("?")]
    at = encoded.tokens.tolist().index(t.image_start) - len(t.encode("Compare "))
    assert encoded.tokens[at : at + len(middle)].tolist() == middle
    assert [encoded.tokens[a:b].tolist() for a, b, _ in encoded.pictures] == [block, tiled]
    assert encoded.pictures[:, 2].tolist() == [1, 3] and encoded.tiles.shape == (4, 28, 28, 3)
    assert not encoded.weights.any()
    url = "data:image/png;base64," + base64.b64encode(parts[1]).decode()
    for same in (
        dict(messages=[{"role": "user", "content": "Compare <|image|> with <|image|>?"}], images=[parts[1], parts[3]]),
        dict(
            messages=[
                {"role": "user", "content": [content[0], {"type": "image"}, *content[2:]]},
            ],
            images=[parts[1]],
        ),
        dict(
            messages=[
                {
                    "role": "user",
                    "content": [content[0], {"type": "image_url", "image_url": {"url": url}}, *content[2:]],
                }
            ]
        ),
    ):
        other = chat.encode(chat.render(**same), t, VISION)
        np.testing.assert_array_equal(other.tokens, encoded.tokens)
        np.testing.assert_array_equal(other.tiles, encoded.tiles)


def test_forty_eight_pictures_in_a_conversation_pack(tokenizer):
    messages = [{"role": "user", "content": [{"type": "image", "image": png()} for _ in range(48)]}]
    messages.append({"role": "assistant", "content": "red circle"})
    encoded = chat.encode(chat.render(messages), tokenizer, VISION)
    assert len(encoded.pictures) == 48 == len(encoded.tiles)
    window = pack_window([encoded], 128, 8, np.random.default_rng(0))
    assert window.tile_counts.sum() == 48 and window.tile_counts.max() <= 8
    learnt = window.rows.targets[window.rows.loss_weights > 0].tolist()
    assert learnt == [*tokenizer.encode("red circle"), tokenizer.eot]
    n_pairs = int((window.rows.segment_ids > 0).sum())
    assert n_pairs == len(encoded.tokens) - 1


def test_a_clip_is_its_frames(tokenizer):
    file = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(6)]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    spans = chat.render([{"role": "user", "content": [{"type": "video", "video": file.getvalue()}]}])
    for n in (1, 3, 6):
        encoded = chat.encode(spans, tokenizer, VISION, video_frames=n)
        assert len(encoded.pictures) == n


# ------------------------------------------------------------------------------------------------------ what is refused

USER = {"role": "user", "content": "Hi"}
CALL = {"id": "a", "function": {"name": "f", "arguments": {}}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("messages", "how", "word"),
    [
        ([], {}, "no messages"),
        ("Hi", {}, "str"),
        (["Hi"], {}, "message 0"),
        ([{"role": "usr", "content": ""}], {}, "Did you mean 'user'"),
        ([{"content": ""}], {}, "a role is one of"),
        ([{"role": "user"}], {}, "no content"),
        ([{"role": "user", "content": 5}], {}, "content is a int"),
        ([{"role": "user", "content": "\ud83d"}], {}, "not valid Unicode"),
        ([{"role": "user", "content": [{"type": "sound"}]}], {}, "type 'sound'"),
        ([{"role": "user", "content": ["Hi"]}], {}, "a str"),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, "has no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, "brings no image"),
        ([{"role": "user", "content": [{"type": "image", "image": 3}]}], {}, "path of its file"),
        ([USER | {"content": [{"type": "image_url", "image_url": {"url": "https://x"}}]}], {}, "ever fetched"),
        ([USER | {"token_ids": [1]}], {}, "only the assistant's"),
        ([USER | {"tool_calls": [CALL]}], {}, "only the assistant's"),
        ([USER, {"role": "assistant", "token_ids": "abc"}], {}, "whole numbers"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}], {}, "tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], {}, "tool_calls"),
        ([{"role": "tool", "content": "1"}], {}, "calls none"),
        ([USER, {"role": "assistant", "content": "x"}, {"role": "ipython", "content": "1"}], {}, "calls none"),
        ([CALLS, {"role": "tool"}], {}, "no content"),
        ([CALLS, {"role": "tool", "content": "1", "tool_call_id": "b"}], {}, "tool_call_id is 'b'"),
        ([CALLS, {"role": "tool", "content": [{"type": "image"}]}], {}, "holds a picture"),
        ([CALLS, {"role": "tool", "content": {1, 2}}], {}, "JSON"),
        ([CALLS, {"role": "tool", "content": "\ud83d"}], {}, "surrogates"),
        ([CALLS | {"tool_calls": [{"function": {"name": "f", "arguments": '{"\ud83d": 1}'}}]}], {}, "Unicode"),
        ([USER], {"images": "cat.png"}, "images, but they are a str"),
        ([USER, {"role": "assistant", "tool_calls": 3}], {}, "tool_calls are a int"),
        ([USER], {"images": [b""]}, "1 image, but the messages have 0 places"),
        ([{"role": "user", "content": "<|image|><|image|>"}], {"images": [b""]}, "1 image, but the messages have 2"),
        ([{"role": "system", "content": ""}], {"tools": TOOLS}, "first message of the user"),
        ([{"role": "assistant", "content": ""}], {"tools": TOOLS}, "first message of the user"),
        ([USER], {"tools": ["f"]}, "list of dicts"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(messages, how, word):
    with pytest.raises(ConfigError) as caught:
        chat.render(messages, **how)
    assert word in str(caught.value)
    assert all(len(part) > 3 for part in (caught.value.asked, caught.value.true, caught.value.change))


KEYS = ("role", "content", "tool_calls", "token_ids", "tool_call_id", "type", "text", "image", "function", "name")
WORDS = ("user", "assistant", "tool", "system", "text", "image", "image_url", "<|image|>", "\ud800", "{", "")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=4) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "assistant", "tool", "system")), "content": JSON},
    optional={"tool_calls": JSON, "token_ids": JSON, "tool_call_id": JSON},
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(messages=st.lists(MESSAGE, max_size=3) | JSON, tools=st.none() | JSON, images=st.none() | JSON)
def test_anything_is_rendered_or_refused(tokenizer, messages, tools, images):
    try:
        spans = chat.render(messages, tools=tools, images=images)
    except ConfigError:
        return
    try:
        chat.encode(spans, tokenizer, VISION)
    except ConfigError as error:
        assert "picture" in error.asked or "token_ids" in error.asked


def test_pictures_that_cannot_be_shown_are_refused(tokenizer, tmp_path):
    def encode(image, vision):
        return chat.encode(chat.render([{"role": "user", "content": "<|image|>"}], images=[image]), tokenizer, vision)

    with pytest.raises(ConfigError, match="no vision encoder"):
        encode(png(), None)
    with pytest.raises(ConfigError, match="image_unreadable"):
        encode(b"nothing", VISION)
    with pytest.raises(ConfigError, match="image_missing"):
        encode(tmp_path / "cat.png", VISION)
