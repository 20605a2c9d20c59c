"""Text and code that every machine has: the standard library of the interpreter that runs.

Source files are documents of "python"; documentation is "en": the language reference that `help()` prints
(`pydoc_data/topics.py`), the docstrings of each module, and the library's .txt and .rst files. Test folders, installed
packages and files written for this build of Python (`_sysconfigdata*`) are left out; so are files that are empty or not
UTF-8, which are counted.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llamax.config import ConfigError

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TOPICS = "pydoc_data/topics.py"  # data in the shape of code: read as documentation only
HELD_OUT_EVERY = 50  # 2% of the files


@dataclass
class Library:
    """Documents as (id, text), apart by language and by whether they are held out."""

    python: list[tuple[str, str]] = field(default_factory=list)
    docs: list[tuple[str, str]] = field(default_factory=list)
    python_heldout: list[tuple[str, str]] = field(default_factory=list)
    docs_heldout: list[tuple[str, str]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=lambda: {"empty": 0, "not UTF-8": 0})

    def add(self, lang: str, name: str, text: str, path: str) -> None:
        """Adds a document that was made from the file (or topic) `path`, whose hash says whether it is held out."""
        kind = f"{lang}_heldout" if held_out(path) else lang
        getattr(self, kind).append((name, text))


def held_out(path: str) -> bool:
    """Whether a file is kept from training: by the hash of its path, the same for its code and its documentation."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_EVERY == 0


def read(root: str | Path | None = None) -> Library:
    """Reads the library under `root` (default: the running interpreter's). ConfigError if no source is there."""
    root = Path(root or sysconfig.get_path("stdlib"))
    library = Library()
    for path in files(root):
        text = _text(path, library.skipped)
        if text is None:
            continue
        name = path.relative_to(root).as_posix()
        if path.suffix != ".py":
            library.add("docs", name, text, name)
        elif name == TOPICS:
            for topic, body in _topics(text):
                library.add("docs", f"{name}#{topic}", body, f"{name}#{topic}")
        else:
            library.add("python", name, text, name)
            if documentation := docstrings(name, text):
                library.add("docs", f"{name}#docstrings", documentation, name)
    if not library.python:
        raise ConfigError(
            "the standard library's source as training text",
            f"there is none in {root}",
            "Use a Python that was installed with its .py files (python.org, pyenv, uv, conda, apt).",
        )
    return library


def files(root: Path) -> Iterator[Path]:
    """The library's files of code and documentation, sorted by path."""
    found = (path for suffix in ("py", "txt", "rst") for path in root.rglob(f"*.{suffix}"))
    for path in sorted(found, key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if not LEFT_OUT.intersection(parts) and not parts[-1].startswith("_sysconfigdata"):
            yield path


def _text(path: Path, skipped: dict[str, int]) -> str | None:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
        return None
    if not text.strip():
        skipped["empty"] += 1
        return None
    return text


def docstrings(name: str, source: str) -> str:
    """The docstrings of a module, each under what it documents; "" if there are none or the file does not parse."""
    try:
        with warnings.catch_warnings():  # old files with escapes such as "\d"
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parts = list(_documented(tree, f"module {module}", ""))
    return "\n\n".join(f"{title}\n\n{text}" for title, text in parts) + "\n" if parts else ""


def _documented(node: ast.Module | Definition, title: str, prefix: str) -> Iterator[tuple[str, str]]:
    """(title, docstring) of a module, class or function and of those inside it, in the order of the source."""
    if text := (ast.get_docstring(node) or "").strip():
        yield title, text
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _documented(child, f"class {prefix}{child.name}", f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{prefix}{child.name}({ast.unparse(child.args)})", f"{prefix}{child.name}.")


def _topics(source: str) -> list[tuple[str, str]]:
    """The (name, text) pairs of `topics = {...}`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return sorted((name, text.strip() + "\n") for name, text in ast.literal_eval(node.value).items())
    return []
