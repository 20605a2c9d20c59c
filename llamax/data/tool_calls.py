"""Tool calls in what a model has said, in every form that Llama 4 writes them.

    {"name": "f", "parameters": {"x": 1}}                     JSON, one object after the other; also as a list, with
                                                              "arguments", or with "type": "function" in it
    [f(x=1), g(y="a")]                                        a Python list of calls with literal keyword arguments

Nothing that a model has said is ever run: the second form is parsed, and its values are literals.
"""

from __future__ import annotations

import ast
import json
from typing import Any

MAX_CHARS = 2**18  # of a text that is looked through; a model that repeats itself says more


def read(text: str) -> list[dict[str, Any]]:
    """[{"name": ..., "arguments": {...}}, ...] if the whole text is tool calls; none if it is anything else."""
    text = text.strip()
    if not text or len(text) > MAX_CHARS or text[0] not in "{[" or text[-1] not in "}]":
        return []
    try:
        return _json_calls(text)
    except (ValueError, RecursionError):
        pass  # perhaps the other form
    try:
        return _python_calls(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # the last: the parser's own stack
        return []


def _json_calls(text: str) -> list[dict[str, Any]]:
    """ValueError if it is no JSON, or JSON of another shape."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while at < len(text):
        value, end = decoder.raw_decode(text, at)
        found += value if isinstance(value, list) else [value]
        at = end + len(text[end:]) - len(text[end:].lstrip(" \t\r\n,;"))
    calls = []
    for value in found:
        arguments = value.get("parameters", value.get("arguments")) if isinstance(value, dict) else None
        if not isinstance(arguments, dict) or not isinstance(value.get("name"), str):
            raise ValueError("no call")
        calls.append({"name": value["name"], "arguments": arguments})
    return calls


def _python_calls(text: str) -> list[dict[str, Any]]:
    """ValueError or SyntaxError if it is no list of calls."""
    tree = ast.parse(text, mode="eval").body
    if not isinstance(tree, ast.List):
        raise ValueError("no list")
    calls = []
    for call in tree.elts:
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute) or call.args:
            raise ValueError("no call with keyword arguments")
        arguments: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                raise ValueError("arguments without names")
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        json.dumps(arguments)  # TypeError: bytes, sets, complex numbers
        calls.append({"name": ast.unparse(call.func), "arguments": arguments})
    return calls
