"""Conversations as token ids: THE definition of the Llama 4 chat template, for prompts and for training.

    <|begin_of_text|>, then for every message   <|header_start|>ROLE<|header_end|>\\n\\n CONTENT <|eot|>

A prompt ends with the assistant's header. Training learns what the assistant says (or other roles that are asked for),
its end of turn included, and nothing else. Messages have OpenAI's form: dicts with

    "role"          system | user | assistant | tool (also called ipython: what a tool answered)
    "content"       a text, or a list of {"type": "text", "text": ...}, {"type": "image", "image": path or bytes} and
                    {"type": "video", "video": path or bytes}; of a tool any JSON value
    "tool_calls"    of the assistant: [{"id": ..., "function": {"name": ..., "arguments": JSON text or a dict}}, ...]
    "tool_call_id"  of a tool: which call it answers; may be left out
    "token_ids"     of the assistant: the ids that were sampled. They are the turn, as they are: text that was sampled
                    is never tokenized again, for that may give other ids. "content" is then for people only.
    "train"         true or false: whether the message is learnt, whatever its role; OpenAI's "weight", 1 or 0, is that

Where Meta's code and Hugging Face's template differ, this is Hugging Face's, which transformers and vLLM feed to the
released models, so a conversation has the same text in training, here and there:

* a turn with tool calls is <|python_start|>TEXT<|python_end|>, then {"name": ..., "parameters": ...} for every call
  with nothing between, and ends with <|eot|> (Meta: the calls alone, and <|eom|>);
* a tool's answer has the role ipython and is JSON, a text in quotation marks too, and ends with <|eot|>;
* tools are described in the first message of the user, and the system message, if there is one, then starts with
  "Environment: ipython"; the system's text, and the user's behind a description of tools, lose white space at their
  ends. All else is taken verbatim. There is no system message that nobody gave.

Where that template does what nobody means, this does not follow: it writes arguments that are JSON text already as a
text in JSON, leaves out a message with an empty list of tool calls, and fails on pictures beside described tools.

Two things are stricter than a template of text can be. A text that spells a special token is plain text. And the
"\\n\\n" of a header is always a token of its own, whatever follows (Meta's way; Hugging Face merges it with line breaks
that open the content). So what has been said stays as it is: the tokens of the first k messages, and of the prompt that
they make, are a prefix of the tokens of all.

`chat_template.jinja` beside this file is the same template for Hugging Face; a test compares the two.
Source: section E of the Llama 4 specification; Hugging Face's Llama 4 processor and Meta's chat format.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llamax.config import ConfigError, Data, Vision
from llamax.data import tool_calls
from llamax.data.chat_check import check
from llamax.data.document import Message, Picture
from llamax.data.encoded import LEARNT, Encoded, check_size, picture_blocks
from llamax.data.images import PictureError
from llamax.data.tokenizer import Tokenizer

PLACEHOLDER = "<|image|>"  # in a text: the next of the pictures that come beside the messages
ENVIRONMENT = "Environment: ipython\n"
TOOLS_BEFORE = (  # the words that the released models were taught with
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument '
    "name and its value}.Do not use variables.\n\n"
)


class Special(NamedTuple):
    """A special token, by its name without the marks."""

    name: str


class Sampled(NamedTuple):
    """Ids that a model has said; they need not end with a stop token."""

    ids: tuple[int, ...]


class Span(NamedTuple):
    """A part of a conversation. A text is plain text, whatever it spells."""

    content: str | Special | Picture | Sampled
    role: str
    trained: bool  # whether its tokens are learnt


class BadPicture(ConfigError):
    """A picture that cannot be used; `reason` is a key of sources.SKIP_REASONS."""

    reason = ""


# ----------------------------------------------------------------------------------------------------------- rendering


def render(
    messages: Sequence[Message],
    *,
    tools: Sequence[Message] | None = None,
    images: Sequence[str | Path | bytes] | None = None,
    prompt: bool = False,
    learnt: Collection[str] = LEARNT,
    since: int = 0,
) -> list[Span]:
    """The conversation in parts, in order.

    Args:
        tools: functions that the assistant may call, in OpenAI's form (any JSON objects).
        images: pictures for the `<|image|>` in texts and for the {"type": "image"} that bring none, in order. Without
            `images` an `<|image|>` in a text is plain text.
        prompt: ends with the assistant's header, for the next turn to be sampled.
        learnt: the roles whose messages are, unless a message says otherwise.
        since: no message before this one is learnt.

    Raises:
        ConfigError: a message is not as above, a tool answers that was not called, or there is another number of images
            than of places for them.
    """
    first = check(messages, tools)
    supply = None if images is None else _Supply(images)
    spans = [Span(Special("begin_of_text"), "", False)]
    for i, message in enumerate(messages):
        trained = i >= since and is_learnt(message, learnt)
        spans += _turn(message, f"message {i}", supply, tools or (), i == 0, i == first, trained)
    if supply:
        supply.check_empty()
    return spans + (_header("assistant") if prompt else [])


def is_learnt(message: Message, roles: Collection[str] = LEARNT) -> bool:
    """Whether a message is: as it says itself, else by its role."""
    said = message.get("train", message.get("weight"))
    role = "tool" if message["role"] == "ipython" else message["role"]
    return role in roles if said is None else bool(said)


def _header(role: str) -> list[Span]:
    role = "ipython" if role == "tool" else role
    return [Span(c, role, False) for c in (Special("header_start"), role, Special("header_end"), "\n\n")]


def _turn(
    message: Message,
    where: str,
    supply: _Supply | None,
    tools: Sequence[Message],
    opens: bool,
    brings_tools: bool,
    trained: bool,
) -> list[Span]:
    """A message's header, content and end. `opens`: it is the first of all; `brings_tools`: it describes the tools."""
    role = message["role"]
    head, end = _header(role), Special("eot")
    if message.get("token_ids") is not None:
        return [*head, Span(Sampled(tuple(message["token_ids"])), role, trained)]
    if role in ("tool", "ipython"):
        return [*head, *(Span(c, "ipython", trained) for c in (_json(message.get("content"), where), end))]
    parts: list[str | Picture | Special] = list(_parts(message.get("content"), where, supply))
    if role == "system" and opens:
        parts = [ENVIRONMENT if tools else "", *_stripped(parts)]
    elif brings_tools:
        described = "".join(_json(tool, "tools", indent=4) + "\n\n" for tool in tools)
        parts = [TOOLS_BEFORE, described, *_stripped(parts)]
    elif calls := message.get("tool_calls"):
        said = "".join(_call(call, where) for call in calls)
        parts = [Special("python_start"), *parts, Special("python_end"), said]
    body = [Span(part, role, trained and not isinstance(part, Picture)) for part in (*_joined(parts), end)]
    return head + body


def _call(call: Message, where: str) -> str:
    """A tool call as the model writes it. Arguments that are text already are taken as they are."""
    function = call["function"]
    given = function.get("arguments", {})
    arguments = given if isinstance(given, str) else _json(given, where)
    return f'{{"name": {_json(function["name"], where)}, "parameters": {arguments}}}'


def _json(value: Any, where: str, indent: int | None = None) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, indent=indent)
        text.encode()  # a lone surrogate is a ValueError
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(where, f"it holds what JSON cannot: {error}", "Give texts, numbers, lists, dicts.") from None


class _Supply:
    """The pictures that come beside the messages, handed out in order."""

    def __init__(self, images: Sequence[str | Path | bytes]):
        if not isinstance(images, list | tuple):
            raise ConfigError("images", f"they are a {type(images).__name__}", "Give a list, a path or bytes each.")
        self.images, self.asked = images, 0

    def take(self) -> Picture:
        self.asked += 1
        if self.asked <= len(self.images):
            return _picture(self.images[self.asked - 1], False, f"image {self.asked - 1}")
        return Picture(b"")  # check_empty comes before it is looked at, and knows how many there are

    def check_empty(self) -> None:
        if self.asked != len(self.images):
            true = f"the messages have {self.asked} place{'' if self.asked == 1 else 's'} for images ({PLACEHOLDER})"
            change = "Give an image for every place, in order, or correct the messages."
            raise ConfigError(f"{len(self.images)} image{'' if len(self.images) == 1 else 's'}", true, change)


def _parts(content: Any, where: str, supply: _Supply | None) -> Iterator[str | Picture]:
    """Texts and pictures of a message, in order."""
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
        kind = part["type"]
        if kind == "text":
            texts = part["text"].split(PLACEHOLDER) if supply else [part["text"]]
            yield texts[0]
            for text in texts[1:]:
                yield supply.take()  # type: ignore[union-attr]  # there is one text without it
                yield text
        elif kind == "image_url":
            yield _picture(_data_url(part, where), False, where)
        elif part.get(kind) is not None:
            yield _picture(part[kind], kind == "video", where)
        elif supply and kind == "image":
            yield supply.take()
        else:
            change = f'Name its file, {{"type": "{kind}", "{kind}": "cat.png"}}, or give it in `images`.'
            raise ConfigError(f"{where}, a part of type {kind}", f"it brings no {kind}", change)


def _picture(data: Any, video: bool, where: str) -> Picture:
    if isinstance(data, str | Path):
        return Picture(Path(data), video)
    if isinstance(data, bytes):
        return Picture(data, video)
    true = f"it is a {type(data).__name__}"
    raise ConfigError(f"{where}, a picture", true, "Give the path of its file, or its encoded bytes (PNG, JPEG, ...).")


def _data_url(part: Message, where: str) -> bytes:
    """The bytes in OpenAI's {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}."""
    asked = f"{where}, a part of type image_url"
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(url, str) or not url.startswith("data:") or ";base64," not in url:
        true = f"its url is {str(url)[:40]!r}, and nothing is ever fetched"
        raise ConfigError(asked, true, 'Give {"type": "image", "image": PATH} or a url data:image/png;base64,...')
    try:
        return base64.b64decode(url.partition(";base64,")[2], validate=True)
    except (ValueError, binascii.Error) as error:
        raise ConfigError(asked, f"its base64 cannot be read: {error}", "Encode the file's bytes again.") from None


def _joined(parts: Sequence[Any]) -> list[Any]:
    """Neighbouring texts as one, for tokens may cross from one to the next; empty ones left out."""
    joined: list[Any] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return joined


def _stripped(parts: Sequence[Any]) -> list[Any]:
    """The parts without white space at the two ends of the whole."""
    parts = _joined(parts)
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return parts


# ------------------------------------------------------------------------------------------------------------ token ids


def encode(
    spans: Sequence[Span],
    tokenizer: Tokenizer,
    vision: Vision | None = None,
    *,
    video_frames: int = Data.video_frames,
    source_id: int = 0,
) -> Encoded:
    """The parts as token ids, with what is learnt (`weights`: 1 or 0) and the pictures' tiles, ready to be packed.

    A clip becomes at most `video_frames` pictures, spread evenly over its time. ConfigError: a picture that cannot be
    read or that a model without vision would get, sampled ids that the tokenizer does not have, a special token that it
    lacks.
    """
    ids: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    pictures, tiles, length = [], [], 0
    for span in spans:
        if isinstance(span.content, Picture):
            so_far = sum(of.nbytes for of in tiles)
            for picture_tiles, block in _blocks(span.content, tokenizer, vision, video_frames, so_far):
                pictures.append((length, length + len(block), len(picture_tiles)))
                tiles.append(picture_tiles)
                ids.append(np.array(block, np.int32))
                weights.append(np.zeros(len(block), np.float32))
                length += len(block)
            continue
        ids.append(_ids(span.content, tokenizer))
        weights.append(np.full(len(ids[-1]), span.trained, np.float32))
        if isinstance(span.content, Sampled) and len(ids[-1]) > len(span.content.ids):
            weights[-1][-1] = 0  # the end of turn that was added: no model has said it
        length += len(ids[-1])
    P = vision.tile_px if vision else 0
    return Encoded(
        source_id,
        np.concatenate(ids),
        np.array(pictures, np.int32).reshape(-1, 3),
        np.concatenate(tiles) if tiles else np.zeros((0, P, P, 3), np.uint8),
        weights=np.concatenate(weights),
    )


def _ids(content: str | Special | Sampled, tokenizer: Tokenizer) -> np.ndarray:
    if isinstance(content, str):
        return tokenizer.encode_array(content)
    if isinstance(content, Special):
        return np.array([tokenizer.special(content.name)], np.int32)
    sampled = [int(i) for i in content.ids]
    patches = [tokenizer.patch] if tokenizer.has("patch") else []
    wrong = next((i for i in sampled if not 0 <= i < tokenizer.vocab_size or i in patches), None)
    if wrong is not None:
        true = f"{tokenizer.path} has ids 0 to {tokenizer.vocab_size - 1}, and {patches} stands for a picture"
        raise ConfigError(f"token_ids with {wrong}", true, "Give the ids that this tokenizer's model has sampled.")
    ended = bool(sampled) and sampled[-1] in tokenizer.stop
    return np.array(sampled if ended else [*sampled, tokenizer.eot], np.int32)


def _blocks(
    picture: Picture, tokenizer: Tokenizer, vision: Vision | None, video_frames: int, tile_bytes: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """`picture_blocks` behind pictures whose tiles take so many bytes."""
    shown = f"{len(picture.data)} bytes" if isinstance(picture.data, bytes) else str(picture.data)
    if vision is None:
        raise _bad(
            "unexpected_picture", shown, "the model has no vision encoder", "Leave it out, or take another model."
        )
    try:
        for tiles, block in picture_blocks(picture, vision, tokenizer, video_frames):
            tile_bytes += tiles.nbytes
            check_size(tile_bytes)
            yield tiles, block
    except PictureError as error:
        raise _bad(error.reason, shown, f"{error.reason}: {error.args[1]}", "Give another file.") from None


def _bad(reason: str, shown: str, true: str, change: str) -> BadPicture:
    error = BadPicture(f"picture {shown}", true, change)
    error.reason = reason
    return error


def parse(ids: Sequence[int], tokenizer: Tokenizer, tools: Sequence[Message] | None = None) -> dict[str, Any]:
    """A sampled turn of the assistant as a message, to be appended to the conversation.

    The message keeps the ids, so that the turn is never tokenized again. Tool calls are what stands behind
    `<|python_end|>`; without those marks an answer is tool calls only if all of it is, of `tools` that were offered.
    What makes no sense as calls is content.
    """
    ids = [int(i) for i in ids]
    message: dict[str, Any] = {"role": "assistant", "content": "", "token_ids": ids}
    said = ids[:-1] if ids and ids[-1] in tokenizer.stop else ids
    marks = [tokenizer.special(name) if tokenizer.has(name) else -1 for name in ("python_start", "python_end")]
    if said and said[0] == marks[0]:
        end = said.index(marks[1]) if marks[1] in said else len(said)
        inside, behind = tokenizer.decode(said[1:end]), tokenizer.decode(said[end + 1 :])
        calls = tool_calls.read(behind)
        message["content"] = inside if calls else tokenizer.decode(said)
        if not calls and not behind.strip() and (calls := tool_calls.read(inside)):
            message["content"] = ""
    else:
        message["content"] = tokenizer.decode(said)
        offered = {_tool_name(tool) for tool in tools or ()}
        calls = tool_calls.read(message["content"])
        calls = calls if all(call["name"] in offered for call in calls) else []
        message["content"] = "" if calls else message["content"]
    if calls:
        message["tool_calls"] = [
            {"id": f"call_{i}", "type": "function", "function": call | {"arguments": _json(call["arguments"], "")}}
            for i, call in enumerate(calls)
        ]
    return message


def _tool_name(tool: Message) -> Any:
    """A tool's name in OpenAI's form, {"function": {"name": ...}}, or without the outer dict."""
    inner = tool.get("function")
    return inner.get("name") if isinstance(inner, Mapping) else tool.get("name")


def to_text(spans: Sequence[Span], tokenizer: Tokenizer) -> str:
    """The parts as text, special tokens as `<|name|>` and a picture as `<|image|>`: what the Jinja template gives."""
    texts = []
    for span in spans:
        if isinstance(span.content, Special):
            texts.append(f"<|{span.content.name}|>")
        elif isinstance(span.content, Sampled):
            texts.append(tokenizer.decode(_ids(span.content, tokenizer)))
        else:
            texts.append(span.content if isinstance(span.content, str) else PLACEHOLDER)
    return "".join(texts)


def template() -> str:
    """The Jinja source of the same template, for `tokenizer_config.json`."""
    return (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
