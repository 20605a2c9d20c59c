"""Records of conversations, and of answers that are compared, in OpenAI's form (chat.py says what a message is):

    {"messages": [...], "tools": [...]}                                  a conversation
    {"prompt": [...], "chosen": ..., "rejected": ..., "margin": 0.5}     two answers, the first of which is better
    {"prompt": [...], "completion": ..., "label": true}                  an answer that is good, or is not

"tools", "margin", "id" and "meta" may be left out. An answer is a text, a message or a list of messages that begins
with the assistant's; a prompt may be a text too, the user's. Where "chosen" and "rejected" are whole conversations and
there is no "prompt", it is the messages that both begin with. A message with `"train": false` is not learnt.

A picture is a path relative to the JSONL file, in ArrayRecord files its encoded bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamax.config import ConfigError
from llamax.data.chat_check import check
from llamax.data.document import Answer, Document, Message, Talk

FORMS = (("messages",), ("chosen", "rejected"), ("completion", "label"))


def is_talk(record: Any) -> bool:
    """Whether a record has a key of one of the forms."""
    return isinstance(record, Mapping) and any(key in record for form in FORMS for key in form)


def read(record: Mapping[str, Any], lang: str, where: str, folder: Path | None, most_bytes: int) -> Document:
    """A record's Document; with a folder, pictures are paths in it. ConfigError if it is none of the forms above.

    Text of more than `most_bytes`, or of no valid Unicode, gives a Document with `skip`.
    """
    meta = record.get("meta") or {}
    if not isinstance(meta, dict):
        raise ConfigError(where, "its meta is no map", 'Give {"meta": {...}}, or leave it out.')
    document = Document((), lang, str(record.get("id", "")), meta, where=where)
    try:
        if sum(len(text.encode()) for text in _texts(record)) > most_bytes:
            return document._replace(skip="too_large")
    except UnicodeEncodeError:  # a JSON escape can spell half a surrogate pair
        return document._replace(skip="invalid_utf8")
    try:
        return document._replace(talk=_talk(record, folder))
    except ConfigError as error:
        raise ConfigError(where, f"{error.asked}: {error.true}", error.change) from None


def _texts(value: Any) -> Iterator[str]:
    """All texts in a record, however deep."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            rest += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            rest += value


def _talk(record: Mapping[str, Any], folder: Path | None) -> Talk:
    forms = [form for form in FORMS if all(key in record for key in form)]
    stray = sorted({key for form in FORMS for key in form if key in record} - {key for form in forms for key in form})
    if len(forms) != 1 or stray:
        true = f"it has {', '.join(key for form in FORMS for key in form if key in record)}"
        raise ConfigError("the record", true, "Give messages; or chosen and rejected; or completion and label.")
    tools = record.get("tools") or ()
    if not isinstance(tools, list | tuple):
        raise ConfigError("tools", f"they are a {type(tools).__name__}", "Give a list of dicts, a function each.")
    if forms[0] == ("messages",):
        return _checked(Talk(_messages(record["messages"], "messages", folder), tuple(tools)))
    return _checked(_compared(record, folder)._replace(tools=tuple(tools)))


def _compared(record: Mapping[str, Any], folder: Path | None) -> Talk:
    margin = record.get("margin")
    if margin is not None and (type(margin) not in (int, float) or not math.isfinite(margin)):
        raise ConfigError("margin", f"it is {str(margin)[:40]}", "Give a number, or leave it out.")
    if "completion" in record:
        if type(record["label"]) is not bool:
            raise ConfigError("label", f"it is {str(record['label'])[:40]!r}", "Give true or false.")
        given = [(1 if record["label"] else -1, "completion")]
    else:
        given = [(1, "chosen"), (-1, "rejected")]
    answers = [Answer(side, _messages(record[key], key, folder, role="assistant")) for side, key in given]
    if "prompt" in record:
        prompt = _messages(record["prompt"], "prompt", folder, role="user")
    elif len(answers) == 2:
        n = _common([answer.messages for answer in answers])
        prompt = answers[0].messages[:n]
        answers = [answer._replace(messages=answer.messages[n:]) for answer in answers]
    else:
        raise ConfigError("the record", "it has a completion and no prompt", 'Add "prompt": [...].')
    return Talk(prompt, (), tuple(answers), float(margin or 0))


def _common(conversations: Sequence[Sequence[Message]]) -> int:
    """How many messages both begin with, so that each goes on with a turn of the assistant."""
    first, second = conversations
    n = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    while n and any(len(of) == n or of[n].get("role") != "assistant" for of in conversations):
        n -= 1
    return n


def _messages(given: Any, key: str, folder: Path | None, role: str = "") -> tuple[Message, ...]:
    """A list of messages, one message or, of a role, a text; pictures by their paths."""
    if isinstance(given, str) and role:
        given = [{"role": role, "content": given}]
    given = [given] if isinstance(given, dict) and role else given
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        true = f"it is a {type(given).__name__}" if not isinstance(given, list) else "one of its messages is no map"
        raise ConfigError(key, true, 'Give a list of messages: [{"role": "user", "content": "Hi"}].')
    return tuple(_located(message, f"{key}, message {i}", folder) for i, message in enumerate(given))


def _located(message: dict[str, Any], where: str, folder: Path | None) -> Message:
    """The message with pictures as paths in the folder or, without one, as bytes."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return message | {"content": [_part(part, where, folder) for part in content]}


def _part(part: Any, where: str, folder: Path | None) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("image", "video"):
        return part
    data = part.get(kind)
    if folder is not None and isinstance(data, str):
        return part | {kind: folder / data}
    if folder is None and isinstance(data, bytes):
        return part
    true = f"its {kind} is {'missing' if data is None else f'of type {type(data).__name__}'}"
    wanted = "the encoded file's bytes" if folder is None else "a path relative to the JSONL file"
    raise ConfigError(where, true, f'Give {wanted}: {{"type": "{kind}", "{kind}": ...}}.')


def _checked(talk: Talk) -> Talk:
    """The talk: every message is one that chat.py renders, and the assistant is asked before it speaks."""
    for answer in talk.answers or (Answer(0, ()),):
        check((*talk.messages, *answer.messages), talk.tools)
        if talk.answers and (not answer.messages or answer.messages[0]["role"] != "assistant"):
            whose = f"it begins with a message of {answer.messages[0]['role']}" if answer.messages else "there is none"
            raise ConfigError("an answer", whose, "Let an answer begin with a message of the assistant.")
    opening = next((i for i, message in enumerate(talk.messages) if message["role"] != "system"), None)
    if opening is None or talk.messages[opening]["role"] == "assistant":
        asked = "the prompt" if talk.answers else "the messages"
        true = "nobody speaks but the system" if opening is None else f"message {opening} is the assistant's, unasked"
        raise ConfigError(asked, true, "Let the user speak first.")
    return talk
