"""A module executed from its source with one place changed: tests have to notice. Nothing on disk changes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


def source(name: str) -> str:
    return Path(find_spec(name).origin).read_text(encoding="utf-8")


def mutant(name: str, old: str = "", new: str = "") -> ModuleType:
    """`old`, which stands there once: that says that a list of mistakes has kept up with the source."""
    text = source(name)
    assert not old or text.count(old) == 1, old
    made = ModuleType(f"mutant of {name}")
    exec(compile(text.replace(old, new) if old else text, made.__name__, "exec", dont_inherit=True), made.__dict__)
    return made
