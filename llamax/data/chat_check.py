"""Whether messages are a conversation that chat.py can render: everything that a person may get wrong, said plainly."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from llamax.config import ConfigError
from llamax.data.document import Message

ROLES = ("system", "user", "assistant", "tool", "ipython")  # the last two are one
PARTS = ("text", "image", "image_url", "video")


def check(messages: Sequence[Message], tools: Sequence[Message] | None) -> int | None:
    """The number of the message that describes the tools, None if there are none. ConfigError as chat.render says."""
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
    if not is_list or not messages:
        true = "there are no messages" if is_list else f"it is a {type(messages).__name__}"
        raise ConfigError("a conversation", true, 'Give a list: [{"role": "user", "content": "Hello"}].')
    for i, message in enumerate(messages):
        _check(message, f"message {i}")
    _check_answers(messages)
    return _first_user(messages, tools)


def _check(message: Message, where: str) -> None:
    """ConfigError if one message alone is not as the module says."""
    if not isinstance(message, Mapping):
        raise ConfigError(where, f"it is a {type(message).__name__}", 'Give a dict: {"role": "user", "content": "Hi"}.')
    role, where = message.get("role"), f"{where} (role {message.get('role')})"
    if role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, 1, 0.4)
        change = f"Did you mean {near[0]!r}?" if near else f"Make it one of {', '.join(ROLES)}."
        raise ConfigError(where, f"a role is one of {', '.join(ROLES)}", change)
    for key in ("tool_calls", "token_ids"):
        empty = isinstance(message.get(key), list | tuple) and not message[key]
        if role != "assistant" and message.get(key) is not None and not empty:
            raise ConfigError(where, f"it has {key}, and only the assistant's messages may", f"Leave {key} out.")
    for key, allowed in (("train", "true or false"), ("weight", "0 or 1")):
        said = message.get(key)
        if said is not None and not (isinstance(said, bool) if key == "train" else said in (0, 1)):
            raise ConfigError(where, f"its {key} is {str(said)[:40]!r}", f"Make it {allowed}, or leave it out.")
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, list | tuple):
        raise ConfigError(where, f"its tool_calls are a {type(calls).__name__}", "Give a list of calls.")
    for call in calls:
        _check_call(call, where)
    if message.get("token_ids") is not None:
        ids = message["token_ids"]
        if not isinstance(ids, Sequence | np.ndarray) or not all(isinstance(i, int | np.integer) for i in ids):
            raise ConfigError(where, "its token_ids are no list of whole numbers", "Give the ids that were sampled.")
        return
    if role in ("tool", "ipython"):
        if "content" not in message:
            raise ConfigError(where, "it has no content", "Give what the tool answered: a text or any JSON value.")
        content = message["content"]
        kinds = [part.get("type") for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
        if any(kind in PARTS[1:] for kind in kinds):
            change = "Show it in a message of the user that follows."
            raise ConfigError(where, "a tool's answer is text, and this one holds a picture", change)
        return
    _check_content(message, where)


def _check_content(message: Message, where: str) -> None:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    if isinstance(content, str):
        return _check_text(content, where)
    if not isinstance(content, list | tuple):
        true = "it has no content" if content is None else f"its content is a {type(content).__name__}"
        raise ConfigError(where, true, "Give a text, or a list of parts.")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in PARTS:
            shown = f"type {kind!r}" if isinstance(part, Mapping) else f"a {type(part).__name__}"
            change = 'Give {"type": "text", "text": ...}, {"type": "image", ...} or {"type": "video", ...}.'
            raise ConfigError(where, f"one of its parts is {shown}", change)
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise ConfigError(where, "one of its parts of type text has no text", 'Give {"text": "..."} in it.')
            _check_text(part["text"], where)


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(where, f"its text is not valid Unicode: {error}", "Remove the lone surrogate.") from None


def _check_call(call: Message, where: str) -> None:
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments", {}) if isinstance(function, Mapping) else None
    right = isinstance(function, Mapping) and isinstance(function.get("name"), str)
    if right and isinstance(arguments, str):
        _check_text(arguments, where)
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not right or not isinstance(arguments, Mapping):
        change = 'Give {"function": {"name": "f", "arguments": {"x": 1}}}; arguments may be that dict as JSON text.'
        raise ConfigError(where, f"one of its tool_calls is {str(call)[:80]}", change)


def _check_answers(messages: Sequence[Message]) -> None:
    """Every tool's answer follows the turn that called it, or another answer to that turn."""
    open_turn: Message | None = None
    for i, message in enumerate(messages):
        if message["role"] not in ("tool", "ipython"):
            calls = message.get("tool_calls") or message.get("token_ids") is not None
            open_turn = message if message["role"] == "assistant" and calls else None
            continue
        asked = f"message {i} (role {message['role']})"
        if open_turn is None:
            true = "it answers a tool call, and the message before it calls none"
            raise ConfigError(asked, true, "Give the assistant's message with its tool_calls before it.")
        known = [call.get("id") for call in open_turn.get("tool_calls") or ()]
        told = message.get("tool_call_id")
        if told is not None and any(known) and told not in known:
            true = f"its tool_call_id is {told!r}, and the calls before it are {known}"
            raise ConfigError(asked, true, "Give the id of one of them.")


def _first_user(messages: Sequence[Message], tools: Sequence[Message] | None) -> int | None:
    """The number of the message that describes the tools; None if there are none."""
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ConfigError("tools", f"they are {str(tools)[:80]}", "Give a list of dicts, a function each.")
    first = 1 if messages[0]["role"] == "system" else 0
    if len(messages) <= first or messages[first]["role"] != "user":
        true = "they are described in the first message of the user, and none follows the system message or opens"
        raise ConfigError(f"{len(tools)} tools", true, "Give a message of the user.")
    return first
