"""The build: deterministic, whole or not at all, and nothing that is held out in what is trained on."""

from __future__ import annotations

import io
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from rich.console import Console

from llamax.config import ConfigError
from llamax.data.embedded import build, drawings, shards, stdlib
from llamax.data.show import show
from llamax.data.sources import Picture, open_source, read_manifest, verify
from llamax.data.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parents[2] / "data"
TOKENIZER = DATA / "tokenizer.model"
COUNTS = {"one_shape": 30, "several_shapes": 10, "written": 6, "chart": 6, "interleaved": 8, "clip": 5}
COUNTS |= {name: 8 for name in build.MAKERS if name not in COUNTS}
RECIPE = build.Recipe(side=24, counts=COUNTS, held_out_copies=1)
MODULE = '"""Module {i}."""\n\nclass Box:\n    """A box."""\n\n    def open(self, key=None):\n        """Open it."""\n'
LONG_HELD_OUT = next(f"long{i}" for i in range(1000) if stdlib.held_out(f"long{i}.py"))


def long_module(i: int) -> bytes:
    """Without a docstring, so that it is code alone."""
    return "".join(f"value_{i}_{n} = {n * n}  # line {n} of a long file\n" for n in range(600)).encode()


QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A small standard library with all that has to be left out."""
    root = tmp_path_factory.mktemp("library")
    files = {f"pack{i % 3}/mod{i}.py": MODULE.format(i=i).encode() for i in range(120)}
    files |= {
        "pack0/test/test_mod.py": b"left out",
        "pack0/tests/more.py": b"left out",
        "site-packages/other.py": b"left out",
        "__pycache__/mod.py": b"left out",
        "_sysconfigdata__linux.py": b"build_time_vars = {}",
        "empty.py": b" \n",
        "latin.py": b"name = 'caf\xe9'\n",
        "broken.py": b"def broken(:\n",
        "notes.txt": "Notes on the library: naïve.\n".encode(),
        "pydoc_data/topics.py": b"topics = {'while': 'The while statement.\\n', 'for': 'The for statement.\\n'}\n",
        "data.bin": b"left out",
    }
    files |= {f"pack{i}/user.py": f"from pack{i} import mod{i}\nuse = mod{i}.Box\n".encode() for i in range(3)}
    files |= {f"{name}.py": long_module(i) for i, name in enumerate(("plain", LONG_HELD_OUT))}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def built(library, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "built"
    build.build(out, recipe=RECIPE, tokenizer=TOKENIZER, library=library, console=QUIET)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_parameters_give_the_same_bytes(built, library, tmp_path):
    build.build(tmp_path / "again", recipe=RECIPE, tokenizer=TOKENIZER, library=library, console=QUIET)
    assert contents(tmp_path / "again") == contents(built)


def test_another_seed_gives_other_drawings_of_the_same_number(built, library, tmp_path):
    other = build.Recipe(seed=1, side=24, counts=COUNTS, held_out_copies=1)
    build.build(tmp_path / "other", recipe=other, tokenizer=TOKENIZER, library=library, console=QUIET)
    mine, others = (open_source(read_manifest(folder / "drawings.toml")) for folder in (built, tmp_path / "other"))
    assert len(mine) == len(others) == 52
    assert not {mine[i].pieces for i in range(52)} & {others[i].pieces for i in range(52)}


def test_a_document_does_not_depend_on_how_many_there_are():
    few, many = (
        {d["id"]: d for d in build.generate(build.Recipe(side=8, counts={"one_shape": n}), ("one_shape",))}
        for n in (5, 9)
    )
    assert few == {name: many[name] for name in few} and len(few) == 5


def texts_of(document):
    """Of its pieces, or of its messages."""
    yield from (piece for piece in document.pieces if isinstance(piece, str))
    if document.talk is not None:
        said = [message for answer in document.talk.answers for message in answer.messages]
        for message in (*document.talk.messages, *said):
            content = message["content"]
            yield from [content] if isinstance(content, str) else (p["text"] for p in content if p["type"] == "text")


def test_manifests_are_true(built):
    names = {path.stem for path in built.glob("*.toml")}
    assert names == set(build.DESCRIPTIONS)
    reader = Tokenizer(TOKENIZER)
    for name in names:
        manifest = read_manifest(built / f"{name}.toml")
        verify(manifest)
        documents = [open_source(manifest)[i] for i in range(manifest.documents)]
        texts = [list(texts_of(document)) for document in documents]
        assert manifest.bytes == sum(len(piece.encode()) for pieces in texts for piece in pieces)
        assert all(document.id and not document.skip for document in documents)
        assert manifest.description == build.DESCRIPTIONS[name]
        if manifest.kind == "text":
            assert manifest.licence == "PSF-2.0"
            assert manifest.tokens == sum(len(reader.encode(piece)) for pieces in texts for piece in pieces)
        else:
            assert manifest.licence == "CC0-1.0"
            assert manifest.tokens == 0
            seen = [any(isinstance(piece, Picture) for piece in document.pieces) for document in documents]
            assert any(seen) if documents[0].talk is None else all(document.meta["answer"] for document in documents)


def test_held_out_text_is_both_kinds(built):
    both, python, docs = (
        open_source(read_manifest(built / f"{name}_heldout.toml")) for name in ("text", "python", "docs")
    )
    assert [d.id for d in both] == [d.id for d in python] + [d.id for d in docs]


def test_several_shards_hold_every_document_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "DOCUMENTS_PER_SHARD", 4)
    documents = [{"pieces": [{"text": f"text {i}"}]} for i in range(10)]
    shards.write(tmp_path, "many", iter(documents), 10, None, kind="text", lang="en")
    manifest = read_manifest(tmp_path / "many.toml")
    assert len(manifest.files) == 3
    source = open_source(manifest)
    assert [source[i].pieces[0] for i in range(10)] == [f"text {i}" for i in range(10)]


def test_what_is_held_out_is_in_no_training_manifest(built, library):
    ids = {}
    for name in ("python", "docs", "python_heldout", "docs_heldout"):
        source = open_source(read_manifest(built / f"{name}.toml"))
        ids[name] = {source[i].id for i in range(len(source))}
    assert ids["python_heldout"] and not ids["python"] & ids["python_heldout"]
    files = {name for name in ids["python"] | ids["python_heldout"]}
    others = {"broken.py", "plain.py", f"{LONG_HELD_OUT}.py", *(f"pack{i}/user.py" for i in range(3))}
    assert files == {f"pack{i % 3}/mod{i}.py" for i in range(120)} | others
    assert ids["python_heldout"] == {name for name in files if stdlib.held_out(name)}
    held_out_files = {name.removesuffix("#docstrings") for name in ids["docs_heldout"] if "topics" not in name}
    documented = ids["python_heldout"] - {f"{LONG_HELD_OUT}.py", *(f"pack{i}/user.py" for i in range(3))}
    assert held_out_files - {"notes.txt"} == documented  # code and documentation go together
    topics = {name for name in ids["docs"] | ids["docs_heldout"] if "topics" in name}
    assert topics == {"pydoc_data/topics.py#for", "pydoc_data/topics.py#while"}


def read(folder: Path, name: str) -> list:
    source = open_source(read_manifest(folder / f"{name}.toml"))
    return [source[i] for i in range(len(source))]


def test_joined_files_are_whole_and_what_is_held_out_stays_out(built):
    trained = {path for name in ("packages", "callers") for d in read(built, name) for path in d.meta["files"]}
    kept_out = {path for d in read(built, "packages_heldout") for path in d.meta["files"]}
    assert trained and kept_out and not trained & kept_out
    assert not any(stdlib.held_out(path) for path in trained)
    assert all(stdlib.held_out(path) for path in kept_out)
    texts = {d.id: d.pieces[0] for d in read(built, "python") + read(built, "python_heldout")}
    assert trained | kept_out == {path for path in texts if "/" in path}
    for name in ("packages", "packages_heldout"):
        assert {d.id.partition("#")[0] for d in read(built, name)} <= {"pack0", "pack1", "pack2"}
        for d in read(built, name):
            assert d.pieces[0] == "\n".join(f"# {path}\n{texts[path]}" for path in d.meta["files"])
    for d in read(built, "callers"):
        module, user = d.meta["files"]
        assert user == module.partition("/")[0] + "/user.py" and f"import {module[6:-3]}\n" in d.pieces[0]


def test_long_held_out_documents_are_long_and_held_out(built):
    documents, reader = read(built, "long_heldout"), Tokenizer(TOKENIZER)
    assert len(documents) > 2 and {d.id.partition("@")[0] for d in documents} == {f"{LONG_HELD_OUT}.py"}
    (whole,) = (d.pieces[0] for d in read(built, "python_heldout") if d.id == f"{LONG_HELD_OUT}.py")
    heads = [d.pieces[0].partition("\n") for d in documents]
    assert "".join(text for _, _, text in heads) == whole
    assert all(len(reader.encode(text)) >= build.LEAST_LONG for _, _, text in heads)


def test_two_per_cent_are_held_out():
    n = sum(stdlib.held_out(f"folder/file{i}.py") for i in range(20_000))
    assert 300 < n < 500


def test_library_is_read_as_documented(library, tmp_path):
    read = stdlib.read(library)
    assert read.skipped == {"empty": 1, "not UTF-8": 1}
    texts = dict(read.docs + read.docs_heldout)
    assert texts["notes.txt"] == "Notes on the library: naïve.\n"
    assert texts["pydoc_data/topics.py#for"] == "The for statement.\n"
    assert texts["pack1/mod1.py#docstrings"] == (
        "module pack1.mod1\n\nModule 1.\n\nclass Box\n\nA box.\n\nBox.open(self, key=None)\n\nOpen it.\n"
    )
    assert "broken.py#docstrings" not in texts
    with pytest.raises(ConfigError, match="there is none"):
        stdlib.read(tmp_path)


def test_the_running_interpreter_has_a_library_to_read():
    files = {path.name for path in stdlib.files(Path(sysconfig.get_path("stdlib")))}
    assert {"ast.py", "random.py", "topics.py"} <= files


def test_an_equal_build_is_left_alone(built, library):
    def again(**changes):
        said = Console(file=io.StringIO())
        arguments = {"recipe": RECIPE, "tokenizer": TOKENIZER, "library": library, "console": said} | changes
        before = (built / build.STAMP).stat().st_ino
        manifests = build.build(built, **arguments)
        assert manifests["drawings"]["documents"] == 52
        return before != (built / build.STAMP).stat().st_ino, said.file.getvalue()

    rebuilt, said = again()
    assert not rebuilt and "already built" in said
    assert again(force=True)[0]
    assert again(tokenizer=None)[0]  # the stamp covers the tokenizer
    assert again()[0]
    assert not list(built.parent.glob(".*"))


def test_a_build_that_is_stopped_leaves_what_was_there(built, library, tmp_path, monkeypatch):
    def stopped(rng, side):
        raise KeyboardInterrupt

    monkeypatch.setitem(build.MAKERS, "clip", stopped)
    before = contents(built)
    for out in (built, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            build.build(out, recipe=RECIPE, tokenizer=None, library=library, force=True, console=QUIET)
    assert contents(built) == before
    assert not list(tmp_path.iterdir()) and list(built.parent.iterdir()) == [built]


def test_a_folder_with_something_else_is_refused(tmp_path, library):
    (tmp_path / "thesis.txt").write_text("not ours")
    with pytest.raises(ConfigError, match="something else is there"):
        build.build(tmp_path, recipe=RECIPE, tokenizer=None, library=library, force=True, console=QUIET)
    assert (tmp_path / "thesis.txt").read_text() == "not ours"


def test_show_prints_documents_and_saves_pictures(built, tmp_path):
    said = Console(file=io.StringIO(), width=200)
    path = show(built / "drawings_heldout.toml", 3, tokenizer=TOKENIZER, out_dir=tmp_path, console=said)
    assert path == tmp_path / "drawings_heldout.png" and path.stat().st_size > 1000
    text = said.file.getvalue()
    source = open_source(read_manifest(built / "drawings_heldout.toml"))
    for number in (0, 48, 96):
        assert source[number].pieces[1] in text and source[number].id in text
    assert "1 pictures" in text and "144 in 1 arrayrecord files" in text
    assert show(DATA / "fixtures" / "text.toml", 2, tokenizer=TOKENIZER, out_dir=tmp_path, console=said) is None


def test_fixtures_are_what_their_manifests_say():
    for name in ("text", "code", "pictures"):
        manifest = read_manifest(DATA / "fixtures" / f"{name}.toml")
        verify(manifest)
        assert len(open_source(manifest)) == manifest.documents


def test_the_development_dependency_is_imported_late():
    code = "import sys, llamax.data.train_tokenizer; assert 'tokenizers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_default_recipe_is_mostly_one_shape():
    counts = build.Recipe().counts
    assert set(counts) == set(build.MAKERS) == {maker for makers in build.GENERATED.values() for maker in makers}
    drawn = sum(counts[maker] for maker in build.GENERATED["drawings"])
    assert counts["one_shape"] >= drawn / 2
    assert (
        len(drawings.held_out_shapes(build._rng(build.Recipe(), "held out", 0), 8, build.Recipe().held_out_copies))
        >= 600
    )
