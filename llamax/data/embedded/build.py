"""Builds the embedded data: text of the standard library and generated drawings, as ArrayRecord shards with manifests.

A build depends on nothing but its parameters, the interpreter's library, Pillow and the tokenizer file; these make its
stamp, and a folder with the same stamp is left as it is. Shards are written beside the folder and moved at the end, so
that a build that was stopped leaves nothing.
"""

from __future__ import annotations

import json
import platform
import random
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import PIL
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llamax.config import ConfigError
from llamax.data import join
from llamax.data.document import Document
from llamax.data.embedded import drawings, instructions, sequences, shards, stdlib
from llamax.data.tokenizer import Tokenizer

VERSION = 7  # raise it when the same parameters make other data
STAMP = "stamp.json"
MAKERS: dict[str, Callable[[random.Random, int], dict]] = {
    "one_shape": drawings.one_shape,
    "several_shapes": drawings.several_shapes,
    "written": drawings.written,
    "chart": drawings.chart,
    "interleaved": sequences.interleaved,
    "clip": sequences.clip,
    "caption": drawings.caption,
    "instruction": instructions.instruction,
    "preference": instructions.preference,
    "caption_heldout": drawings.held_out_caption,
    "instruction_heldout": partial(instructions.instruction, held_out=True),
    "preference_heldout": partial(instructions.preference, held_out=True),
}
GENERATED = {  # manifest -> the makers of its documents
    "drawings": ("one_shape", "several_shapes", "written", "chart"),
    "interleaved": ("interleaved",),
    "clips": ("clip",),
    "captions": ("caption",),
    "captions_heldout": ("caption_heldout",),
    "instructions": ("instruction",),
    "instructions_heldout": ("instruction_heldout",),
    "preferences": ("preference",),
    "preferences_heldout": ("preference_heldout",),
}
OF_DRAWINGS = {"lang": "en", "kind": "multimodal", "licence": "CC0-1.0"}
DESCRIPTIONS = {
    "python": "Source files of the running interpreter's standard library, without tests.",
    "docs": "Python's language reference, docstrings and notes, from the interpreter's standard library.",
    "python_heldout": "2% of the standard library's source files, by path hash; in no training manifest.",
    "docs_heldout": "Documentation of the held-out 2% of the standard library; in no training manifest.",
    "packages": "Folders of the standard library: their source files joined, in documents of up to 8,192 tokens.",
    "callers": "Modules of the standard library, each with modules that import it, up to 8,192 tokens.",
    "packages_heldout": "The held-out source files of the folders of packages; in no training manifest.",
    "long_heldout": "Stretches of at least 2,048 tokens of held-out files, code and documentation.",
    "text_heldout": "All held-out text: the files of python_heldout and docs_heldout.",
    "drawings": "Generated drawings (shapes, writing, bar charts) with captions or questions and answers.",
    "interleaved": "Generated documents of text and one to four drawings.",
    "clips": "Generated clips: three to six frames of a moving shape, with questions on direction and order.",
    "captions": "Drawings of one shape, of which only the caption is learnt.",
    "captions_heldout": "The same of held-out tuples.",
    "instructions": "Conversations over drawings, clips, sums and short programs, with answers that a rule can check.",
    "instructions_heldout": "The same of held-out drawings, numbers and programs.",
    "preferences": "Such questions with a better and a worse answer: one that hedges, or is wrong.",
    "preferences_heldout": "The same of held-out drawings, numbers and programs.",
    "drawings_heldout": "One-shape drawings whose (colour, shape, size, position) is in no training drawing; "
    "meta holds the prompt and the truth.",
}


MAX_JOINED = 8192  # tokens of a document of packages and callers
LEAST_LONG = 2048  # tokens of a document of long_heldout


@dataclass(frozen=True)
class Recipe:
    """What to generate. Counts are documents."""

    seed: int = 0
    side: int = 56  # pixels along a drawing's side
    counts: dict[str, int] = field(
        default_factory=lambda: {
            "one_shape": 32_000,
            "several_shapes": 3_000,
            "written": 1_500,
            "chart": 1_500,
            "interleaved": 3_000,
            "clip": 2_000,
            "caption": 4_000,
            "caption_heldout": 400,
            "instruction": 12_000,
            "instruction_heldout": 600,
            "preference": 3_000,
            "preference_heldout": 480,
        }
    )
    held_out_copies: int = 5  # drawings of each of the 144 held-out tuples


def build(
    out_dir: str | Path = "data/built",
    *,
    recipe: Recipe | None = None,
    tokenizer: str | Path | None = "data/tokenizer.model",
    library: str | Path | None = None,
    force: bool = False,
    console: Console | None = None,
) -> dict[str, dict]:
    """Builds the embedded data into `out_dir` and returns name -> manifest.

    Args:
        recipe: what to generate (default: `Recipe()`).
        tokenizer: counts the manifests' tokens; None leaves them out.
        library: a folder of Python source to read instead of the running interpreter's standard library.
        force: build again, even if the folder holds this very build.
        console: where the progress goes (default: standard error).

    Raises ConfigError if `out_dir` holds something else than an earlier build, or if there is no source to read.
    """
    out_dir, recipe, library = Path(out_dir), recipe or Recipe(), Path(library or sysconfig.get_path("stdlib"))
    console = console or Console(stderr=True)
    stamp = _stamp(recipe, library, tokenizer)
    earlier = _earlier(out_dir)
    if earlier and earlier["stamp"] == stamp and not force:
        console.print(f"{out_dir} is already built.", highlight=False)
        return earlier["manifests"]
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}-") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        manifests = _write_all(new, recipe, library, Tokenizer(tokenizer) if tokenizer else None, console)
        (new / STAMP).write_text(json.dumps({"stamp": stamp, "manifests": manifests}, indent=1) + "\n")
        if out_dir.exists():
            out_dir.rename(Path(scratch) / "old")
        new.rename(out_dir)
    return manifests


def _stamp(recipe: Recipe, library: Path, tokenizer: str | Path | None) -> dict:
    """All that a build depends on, as JSON values."""
    return {
        "version": VERSION,
        "recipe": asdict(recipe),
        "library": str(library),
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "tokenizer": shards.sha256(Tokenizer(tokenizer).path) if tokenizer else None,
    }


def _earlier(out_dir: Path) -> dict | None:
    """What the folder's stamp says; None if the folder is empty or missing."""
    if (out_dir / STAMP).is_file():
        return json.loads((out_dir / STAMP).read_text())
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(
            f"build the embedded data into {out_dir}",
            "something else is there, which the build would replace",
            "Name an empty or new folder.",
        )
    return None


def _write_all(
    folder: Path, recipe: Recipe, library: Path, tokenizer: Tokenizer | None, console: Console
) -> dict[str, dict]:
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    manifests = {}
    with Progress(*columns, console=console) as progress:

        def write(name: str, documents: Iterator[dict], n: int, **about: str) -> None:
            followed = progress.track(documents, total=n, description=name)
            about["description"] = DESCRIPTIONS[name]
            manifests[name] = shards.write(folder, name, followed, n, tokenizer, **about)

        for name, makers in GENERATED.items():
            n = sum(recipe.counts[maker] for maker in makers)
            write(name, generate(recipe, makers), n, **OF_DRAWINGS)
        held_out = drawings.held_out_shapes(_rng(recipe, "held out", 0), recipe.side, recipe.held_out_copies)
        named = ({**document, "id": f"held_out/{i}"} for i, document in enumerate(held_out))
        write("drawings_heldout", named, len(held_out), **OF_DRAWINGS)
        reading = progress.add_task("standard library", total=None)
        read = stdlib.read(library)
        progress.update(reading, total=1, completed=1)
        for name in ("python", "docs", "python_heldout", "docs_heldout"):
            texts = getattr(read, name)
            documents = ({"pieces": [{"text": text}], "id": id_} for id_, text in texts)
            lang = "python" if name.startswith("python") else "en"
            write(name, documents, len(texts), lang=lang, kind="text", licence="PSF-2.0")
        for name, lang, long in _long(read, tokenizer):
            if long:  # a library may have none
                write(name, iter(long), len(long), lang=lang, kind="text", licence="PSF-2.0")
    manifests["text_heldout"] = shards.write_union(
        folder,
        "text_heldout",
        [manifests["python_heldout"], manifests["docs_heldout"]],
        lang="mul",
        description=DESCRIPTIONS["text_heldout"],
    )
    skipped = ", ".join(f"{n} {why}" for why, n in read.skipped.items())
    console.print(f"Library files left out: {skipped}.", highlight=False)
    return manifests


def _long(read: stdlib.Library, tokenizer: Tokenizer | None) -> Iterator[tuple[str, str, list[dict]]]:
    """(manifest, language, records) of the related files that are joined, and of what is held out and long."""

    def count(text: str) -> int:
        return len(tokenizer.encode_array(text)) if tokenizer else len(text) // 4

    def joined(texts: list[tuple[str, str]], by: str) -> list[dict]:
        kept = [(path, text) for path, text in texts if by != "folder" or "/" in path]  # a package has a folder
        documents = [Document((text,), id=path) for path, text in kept]
        files, _ = join.read_files(documents, count, MAX_JOINED, by == "imports")
        return list(join.records(join.BY[by](files, MAX_JOINED), lambda number: kept[number][1]))

    yield "packages", "python", joined(read.python, "folder")
    yield "callers", "python", joined(read.python, "imports")
    yield "packages_heldout", "python", joined(read.python_heldout, "folder")
    yield (
        "long_heldout",
        "mul",
        [
            {"pieces": [{"text": part}], "id": f"{name}@{i}"}
            for name, text in read.python_heldout + read.docs_heldout
            for i, part in enumerate(join.stretches(name, text, count, LEAST_LONG))
        ],
    )


def _rng(recipe: Recipe, maker: str, index: int) -> random.Random:
    """A document's own generator: it does not depend on how many others there are."""
    return random.Random(f"{recipe.seed}/{maker}/{index}")


def generate(recipe: Recipe, makers: tuple[str, ...]) -> Iterator[dict]:
    """The documents of some makers, shuffled together."""
    order = [(maker, i) for maker in makers for i in range(recipe.counts[maker])]
    _rng(recipe, "order of " + ", ".join(makers), 0).shuffle(order)
    for maker, i in order:
        yield {**MAKERS[maker](_rng(recipe, maker, i), recipe.side), "id": f"{maker}/{i}"}
