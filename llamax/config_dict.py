"""Nested dicts to the dataclasses of a schema and back, with errors that name the nearest right key.

The schema itself is config.py's; nothing here knows its fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

T = TypeVar("T")
MOST_CHARS = 800  # of one part of an error
KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    tuple: "a tuple",
    dict: "a dict",
}


class ConfigError(ValueError):
    """A person's input is wrong: what was asked, what is true, what to change. Each is one line that can be printed."""

    def __init__(self, asked: str, true: str, change: str):
        asked, true, change = _printable(asked), _printable(true), _printable(change)
        super().__init__(f"{asked}, but {true}. {change}")
        self.asked, self.true, self.change = asked, true, change

    def __reduce__(self):
        return type(self), (self.asked, self.true, self.change)  # loader processes send it home pickled


def _printable(text: str) -> str:
    """The text with control characters and broken Unicode as escapes, and its middle left out if it is very long."""
    if len(text) > MOST_CHARS:
        text = f"{text[: MOST_CHARS // 2]} ... {text[-MOST_CHARS // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def to_dict(settings: Any) -> dict[str, Any]:
    """A dataclass of the schema as nested dicts: what goes into run.json, and into a recipe's `run.model = ...`."""
    return dataclasses.asdict(settings)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys; lists are values."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts with some of their entries changed, at any depth."""
    out = dict(values)
    for key, value in changes.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def from_dict(cls: type[T], values: Any, where: str = "", schema: type | None = None) -> T:
    """`values` (dicts, a ConfigDict, JSON read back) as the schema's dataclass `cls`; missing keys take its defaults.

    For messages, `where` is the dotted path of `values` in `schema`, the whole run's dataclass (`cls` by default).

    Raises:
        ConfigError: a key that the schema does not have, or a value of the wrong type.
    """
    schema = schema or cls
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    if not isinstance(values, Mapping):
        raise _wrong_type(where, values, "a section, that is a dict of its fields")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise unknown_key(_dotted(where, key), list(hints), schema)
    return cls(**{key: _convert(hints[key], value, _dotted(where, key), schema) for key, value in values.items()})


def _convert(kind: Any, value: Any, where: str, schema: type) -> Any:
    """`value` as `kind`, the type of a field of the schema."""
    if isinstance(kind, types.UnionType):  # X | None
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where, schema)
    if typing.get_origin(kind) is dict:  # named entries of one dataclass
        if not isinstance(value, Mapping):
            raise _wrong_type(where, value, "a section, that is a dict of its entries")
        for key in value:
            if not isinstance(key, str):
                true = f"an entry of {where} is named by a string"
                raise ConfigError(f"{key!r} in --config.{where}", true, f"Write it as {str(key)!r}.")
        entry = typing.get_args(kind)[1]
        return {key: from_dict(entry, v, _dotted(where, key), schema) for key, v in value.items()}
    if kind is dict and isinstance(value, Mapping):  # part of a section; whoever merges it into one looks into it
        return {
            key: _convert(dict, v, where, schema) if isinstance(v, Mapping) else _tuples(v) for key, v in value.items()
        }
    if kind is tuple and isinstance(value, list | tuple):
        return _tuples(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # not isinstance(): True is an int too
        raise _wrong_type(where, value, KIND_NAMES[kind])
    return value


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, all the way down."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _wrong_type(where: str, value: Any, wanted: str) -> ConfigError:
    whole = isinstance(value, float) and value.is_integer()
    change = f"Set --config.{where}={int(value)}." if whole else f"Set --config.{where} to {wanted}."
    return ConfigError(f"--config.{where}={value!r}", f"{where or 'a run'} is {wanted}", change)


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)


# ------------------------------------------------------------------------------------------------ the nearest right one


def nearest(asked: str, options: Iterable[str]) -> str | None:
    """The option most like `asked`, or None when nothing is close."""
    return next(iter(difflib.get_close_matches(asked, list(options), 1, 0.4)), None)


def nearest_multiple(of: int, near: int) -> int:
    """The multiple of `of`, at least `of` itself, that is nearest to `near`."""
    return max(1, round(near / of)) * of


def divisors(of: int) -> list[int]:
    return sorted({d for small in range(1, math.isqrt(of) + 1) if of % small == 0 for d in (small, of // small)})


def nearest_divisor(of: int, near: int) -> int:
    """The divisor of `of` that is nearest to `near`; the smaller of two."""
    return min(divisors(of), key=lambda d: abs(d - near))


def unknown_key(asked: str, siblings: Sequence[str], schema: type) -> ConfigError:
    """The error for a dotted path that does not exist; `siblings` are the keys that do exist in its place."""
    section, _, key = asked.rpartition(".")
    elsewhere = {path.rpartition(".")[2]: path for path in reversed(_paths(schema))}
    sibling, cousin = nearest(key, siblings), nearest(key, elsewhere)
    slip = difflib.get_close_matches(key, siblings, 1, 0.8)
    path = (_dotted(section, slip[0]) if slip else elsewhere.get(key)) or (
        _dotted(section, sibling) if sibling else elsewhere.get(cousin or "")
    )
    change = f"Did you mean --config.{path}?" if path else f"Known here: {', '.join(siblings) or 'nothing'}."
    return ConfigError(f"--config.{asked}", f"{section or 'a run'} has no {key}", change)


def _paths(cls: type, where: str = "") -> list[str]:
    """Every dotted path of the schema, outer ones first; the entries of `sources` and `evals` are left out."""
    outer, inner = [], []
    for key, kind in typing.get_type_hints(cls).items():
        outer.append(_dotted(where, key))
        kind = typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            inner += _paths(kind, _dotted(where, key))
    return outer + inner
