"""Related documents joined into long ones: the files of a folder, or a Python module with the modules that import it.

A document's `id` is its path. In a joined document every file stands behind a line with its path, "# email/header.py".
A joined document has at most `max_tokens` tokens.

    folder     the files of each folder, by name. What is left of a folder goes on in a next document, and a file that
               alone has more tokens is cut at the ends of lines
    imports    a module, and behind it the modules that import it, the smallest first; where they do not fit, the module
               comes again with the next ones. A module stands behind one other only, the least imported of those that
               it imports, so that what everybody imports is not everywhere. What does not fit into one document with
               what it imports is left out
"""

from __future__ import annotations

import ast
import itertools
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from llamax.config import ConfigError
from llamax.data.document import Document
from llamax.data.embedded import shards
from llamax.data.sources import MAX_TEXT_BYTES, open_source, read_manifest
from llamax.data.tokenizer import Tokenizer

LEAST_TOKENS = 256  # that a joined document may be asked to have at most
Count = Callable[[str], int]  # tokens of a text


class Part(NamedTuple):
    """Characters [start, end) of a file."""

    number: int  # of the document that is the file
    path: str
    start: int
    end: int
    tokens: int  # with the line that names the path


class File(NamedTuple):
    path: str
    parts: tuple[Part, ...]  # one, unless the file alone has more than max_tokens
    imports: tuple[str, ...]  # dotted names, of a Python module; relative ones resolved


Joined = list[tuple[str, list[Part]]]  # id -> what a joined document is made of


def read_files(
    documents: Iterable[Document], count: Count, max_tokens: int, with_imports: bool
) -> tuple[list[File], Counter[str]]:
    """The documents as files, and how many are left out for what reason."""
    files, left_out = [], Counter[str]()
    for number, document in enumerate(documents):
        texts = [piece for piece in document.pieces if isinstance(piece, str)]
        text = "".join(texts)
        reason = document.skip or ("no id" if not document.id else "pictures" if texts != [*document.pieces] else "")
        if reason:
            left_out[reason] += 1
            continue
        parts = tuple(_parts(number, document.id, text, count, max_tokens))
        imports = tuple(_imports(document.id, text)) if with_imports else ()
        files.append(File(document.id, parts, imports))
    return files, left_out


def _parts(number: int, path: str, text: str, count: Count, max_tokens: int) -> Iterator[Part]:
    head = count(_head(path)) + 2  # and the line ends behind
    total = count(text)
    if head + total <= max_tokens:
        yield Part(number, path, 0, len(text), head + total)
        return
    start, chars = 0, max(1, int((max_tokens - head) * 0.97 * len(text) / total))  # of a part, if they were even
    while start < len(text):
        end = _line_end(text, start, start + chars)
        while (tokens := head + count(text[start:end])) > max_tokens and end - start > 1:
            end = _line_end(text, start, start + (end - start) * 9 // 10)
        yield Part(number, path, start, end, tokens)
        start = end


def _line_end(text: str, start: int, end: int) -> int:
    """The last end of a line in (start, end], or of a word, or `end`; the text's end if that is as near."""
    if end >= len(text):
        return len(text)
    return text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end) + 1 or end


def _head(path: str) -> str:
    return f"# {path}\n"


def _imports(path: str, text: str) -> Iterator[str]:
    """What a Python file imports, as dotted names; `from a import b` gives a.b and a."""
    if not path.endswith(".py"):
        return
    try:
        with warnings.catch_warnings():  # old files with escapes such as "\d"
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    package = module_name(path).split(".")
    if PurePosixPath(path).name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)
            yield base


def module_name(path: str) -> str:
    """ "email/header.py" -> "email.header", "email/__init__.py" -> "email"."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def by_folder(files: Sequence[File], max_tokens: int) -> Joined:
    groups = defaultdict(list)
    for file in sorted(files, key=_path_of):
        groups[str(PurePosixPath(file.path).parent)].append(file)
    joined = []
    for name, group in sorted(groups.items()):
        documents: list[list[Part]] = [[]]
        for part in (part for file in group for part in file.parts):
            if documents[-1] and _tokens(documents[-1]) + part.tokens > max_tokens:
                documents.append([])
            documents[-1].append(part)
        joined += _named(name, documents)
    return joined


def by_imports(files: Sequence[File], max_tokens: int) -> Joined:
    top = _common_folder([file.path for file in files])
    above = files[0].path[:top].replace("/", ".") if files else ""  # in relative imports, as they were resolved
    modules = {module_name(file.path[top:]): file for file in sorted(files, key=_path_of) if file.path.endswith(".py")}
    imported = {
        name: sorted({other.removeprefix(above) for other in file.imports} & modules.keys() - {name})
        for name, file in modules.items()
    }
    callers = Counter(other for others in imported.values() for other in others)
    groups = defaultdict(list)
    for name, others in imported.items():
        if others:
            groups[min(others, key=lambda other: (callers[other], other))].append(modules[name])
    joined = []
    for name, group in sorted(groups.items()):
        head, documents = list(modules[name].parts), [list(modules[name].parts)]
        for parts in sorted((list(file.parts) for file in group), key=_tokens):
            if _tokens(head) + _tokens(parts) > max_tokens:
                break  # nor do the larger ones fit
            if _tokens(documents[-1]) + _tokens(parts) > max_tokens:
                documents.append(list(head))
            documents[-1] += parts
        joined += _named(modules[name].path, [parts for parts in documents if len(parts) > len(head)])
    return joined


def _named(name: str, documents: list[list[Part]]) -> Joined:
    return [(f"{name}#{i}" if i else name, parts) for i, parts in enumerate(documents)]


def _tokens(parts: Sequence[Part]) -> int:
    return sum(part.tokens for part in parts)


def _path_of(file: File) -> str:
    return file.path


def _common_folder(paths: Sequence[str]) -> int:
    """Characters of the folders that all paths begin with."""
    folders = [PurePosixPath(path).parts[:-1] for path in paths]
    shared: list[str] = []
    for names in zip(*folders, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    # A folder with an __init__.py is a package, whose name is part of its modules'.
    while shared and f"{'/'.join(shared)}/__init__.py" in paths:
        shared.pop()
    return len("/".join(shared)) + 1 if shared else 0


BY: dict[str, Callable[[Sequence[File], int], Joined]] = {"folder": by_folder, "imports": by_imports}


def records(joined: Joined, text_of: Callable[[int], str]) -> Iterator[dict]:
    """The joined documents' records."""
    for name, parts in joined:
        texts = [(part.path, text_of(part.number)[part.start : part.end]) for part in parts]
        text = "\n".join(_head(path) + text + "\n" * (not text.endswith("\n")) for path, text in texts)
        yield {"pieces": [{"text": text}], "id": name, "meta": {"files": [path for path, _ in texts]}}


def stretches(name: str, text: str, count: Count, least: int) -> Iterator[str]:
    """A text in as many parts of at least `least` tokens as it has, cut at the ends of lines; none if it is shorter."""
    for n in range(count(text) // least, 0, -1):
        cuts = [0, *(_line_end(text, 0, len(text) * i // n) for i in range(1, n)), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(cuts)]
        if all(count(part) >= least for part in parts):
            yield from (_head(name) + part for part in parts)
            return


def join(manifest: str | Path, by: str, out: str | Path, max_tokens: int, tokenizer: str | Path) -> dict:
    """Writes the documents of a manifest, joined, as ArrayRecord shards beside the manifest `out`, which it returns.

    ConfigError if nothing can be joined, or `out` is no new manifest's name.
    """
    out, about = Path(out), read_manifest(manifest)
    asked = f"join {manifest} by {by} into {out}"
    if out.suffix != ".toml" or out.resolve() == about.path.resolve():
        raise ConfigError(asked, f"{out} is {'the same manifest' if out.suffix else 'no .toml'}", "Name a new one.")
    if not LEAST_TOKENS <= max_tokens <= MAX_TEXT_BYTES // 4:
        true = f"it asks for documents of up to {max_tokens} tokens"
        raise ConfigError(asked, true, f"Give --max-tokens of {LEAST_TOKENS} to {MAX_TEXT_BYTES // 4}.")
    source, reader = open_source(about), Tokenizer(tokenizer)
    files, left_out = read_files(source, lambda text: len(reader.encode_array(text)), max_tokens, by == "imports")
    joined = BY[by](files, max_tokens)
    if not joined:
        said = ", ".join(f"{n} for: {reason}" for reason, n in left_out.items()) or "none"
        true = f"none of its {len(source)} documents stands with another; left out were {said}"
        raise ConfigError(asked, true, "Give documents whose ids are their paths.")
    out.parent.mkdir(parents=True, exist_ok=True)

    def text_of(number: int) -> str:
        return "".join(piece for piece in source[number].pieces if isinstance(piece, str))

    told = dict(lang=about.lang, licence=about.licence, kind="text")
    told["description"] = f"{about.path.stem}, joined by {by}, in documents of up to {max_tokens:,} tokens."
    made = records(joined, text_of)
    return shards.write(out.parent, out.stem, made, len(joined), reader, **told)
