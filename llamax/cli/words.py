"""What all commands share: how one is declared, what its words may be, and help that ends with examples."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from typing import Any

Handler = Callable[[argparse.Namespace], int | None]
FOLDERS = "a run's workdir (its newest checkpoint), a converted model, or a folder in Hugging Face's format"
PRECISION = "float32 or bfloat16, of weights and computation (%(default)s)"


def command(commands: Any, name: str, handler: Handler, about: str, shown: str) -> argparse.ArgumentParser:
    """A command that calls `handler`; `shown` are its examples."""
    made = commands.add_parser(name, help=about, description=sentence(about), **examples(shown))
    made.set_defaults(handler=handler)
    return made


def sentence(about: str) -> str:
    return f"{about[0].upper()}{about[1:]}."


def examples(text: str) -> dict[str, Any]:
    """What every parser gets: examples below the help, as they are written, and no abbreviations."""
    epilog = "examples:\n" + textwrap.indent(textwrap.dedent(text).strip("\n"), "  ")
    return dict(epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def count(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 up")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 up, with commas between."""
    return tuple(count(word.strip()) for word in text.split(","))


def words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def named(path: str) -> str:
    """A path that is not empty, as that of a shell variable without a value would be."""
    if not path.strip():
        raise argparse.ArgumentTypeError("it is empty; name a folder, or . for this one")
    return path
