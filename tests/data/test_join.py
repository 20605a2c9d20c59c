"""Joining: every file whole and once, in order, never too long; a module before what imports it."""

from __future__ import annotations

import json
import random

import pytest

from llamax import cli
from llamax.config import ConfigError
from llamax.data import join
from llamax.data.document import Document, Picture
from llamax.data.sources import open_source, read_manifest


def count(text: str) -> int:
    return len(text.split())


def files_of(texts: dict[str, str], most: int = 10**6):
    files, left_out = join.read_files([Document((t,), id=p) for p, t in texts.items()], count, most, True)
    assert not left_out
    return files


def made(texts: dict[str, str], by: str, most: int = 10**6) -> dict[str, str]:
    listed = list(texts.values())
    joined = join.BY[by](files_of(texts, most), most)
    return {record["id"]: record["pieces"][0]["text"] for record in join.records(joined, listed.__getitem__)}


def test_a_folder_is_one_document_of_its_files_by_name():
    texts = {"b/two.py": "x = 2", "a.py": "y\n", "b/one.py": "x = 1\n", "b/c/d.txt": "d\n"}
    assert made(texts, "folder") == {
        ".": "# a.py\ny\n",
        "b": "# b/one.py\nx = 1\n\n# b/two.py\nx = 2\n",
        "b/c": "# b/c/d.txt\nd\n",
    }


def test_nothing_is_lost_or_doubled_or_too_long():
    """Random files, some longer than a document: what stands behind the heads is all of them, in order."""
    rng = random.Random(0)
    texts = {
        f"{rng.choice('abc')}/f{i}": "".join(
            " ".join(f"w{i}_{n}" for n in range(rng.randrange(1, 9))) + "\n" for _ in range(rng.randrange(1, 120))
        )
        for i in range(40)
    }
    joined = made(texts, "folder", 256)
    assert all(count(text) <= 256 for text in joined.values()) and len(joined) > 20
    found = {path: "" for path in texts}
    for text in joined.values():
        for part in text.removeprefix("# ").split("\n# "):
            path, _, body = part.partition("\n")
            found[path] += body.removesuffix("\n") + "\n"
    assert {path: text.split() for path, text in found.items()} == {path: text.split() for path, text in texts.items()}


def test_one_line_without_end_is_cut_all_the_same():
    texts = {"a/long": "x" * 5000, "a/words": " ".join(["y"] * 5000)}
    files, _ = join.read_files([Document((t,), id=p) for p, t in texts.items()], len, 300, False)
    assert all(part.tokens <= 300 for file in files for part in file.parts)
    for file, text in zip(files, texts.values(), strict=True):
        assert "".join(text[part.start : part.end] for part in file.parts) == text


IMPORTS = {
    "src/pkg/__init__.py": "from . import base\n",
    "src/pkg/base.py": "import os\n",
    "src/pkg/user.py": "from .base import thing\nimport pkg.other\n",
    "src/pkg/deep/more.py": "from ..base import thing\nfrom pkg import other\n",
    "src/pkg/other.py": "x = 1\n",
    "src/pkg/broken.py": "def broken(:\n",
    "src/pkg/alone.py": "import sys\n",
    "src/pkg/notes.txt": "import pkg.base\n",
}


def test_a_module_stands_before_what_imports_it():
    """base is imported by three and other by two; pkg itself, by who imports from it, by one."""
    joined = {name: text.count("\n# ") for name, text in made(IMPORTS, "imports").items()}
    heads = {
        name: [line[2:] for line in text.splitlines() if line.startswith("# ")]
        for name, text in made(IMPORTS, "imports").items()
    }
    assert heads == {
        "src/pkg/base.py": ["src/pkg/base.py", "src/pkg/__init__.py"],
        "src/pkg/__init__.py": ["src/pkg/__init__.py", "src/pkg/deep/more.py"],
        "src/pkg/other.py": ["src/pkg/other.py", "src/pkg/user.py"],
    }
    assert set(joined.values()) == {1}


def test_names_of_imports_are_resolved():
    files = {file.path: set(file.imports) for file in files_of(IMPORTS)}
    assert {"src.pkg.base", "src.pkg.base.thing", "pkg.other"} <= files["src/pkg/user.py"]
    assert {"src.pkg.base", "pkg.other", "pkg"} <= files["src/pkg/deep/more.py"]
    assert files["src/pkg/__init__.py"] == {"src.pkg.base", "src.pkg"}
    assert not files["src/pkg/broken.py"] and not files["src/pkg/notes.txt"]
    assert join.module_name("a/b/__init__.py") == "a.b" and join.module_name("a/b.py") == "a.b"


def test_a_module_comes_again_with_callers_that_do_not_fit():
    texts = {"m.py": "a = 1 # " + "m " * 50 + "\n"} | {f"c{i}.py": f"import m # {'c ' * 80}\n" for i in range(5)}
    texts["huge.py"] = "import m # " + "h " * 300 + "\n"
    joined = made(texts, "imports", 256)
    assert list(joined) == ["m.py", "m.py#1", "m.py#2"]
    assert sorted(line for text in joined.values() for line in text.splitlines() if line.startswith("# c")) == [
        f"# c{i}.py" for i in range(5)
    ]
    assert all(text.startswith("# m.py\n") and "import m" in text and count(text) <= 256 for text in joined.values())
    assert not any("huge" in text for text in joined.values())


def test_stretches_are_the_text_in_parts_that_are_long_enough():
    text = "".join(f"line {i} of the file\n" for i in range(200))
    parts = list(join.stretches("a.py", text, count, 190))
    assert len(parts) == 5 and all(part.startswith("# a.py\n") for part in parts)
    bodies = [part.removeprefix("# a.py\n") for part in parts]
    assert "".join(bodies) == text and all(count(body) >= 190 and body.endswith("\n") for body in bodies)
    assert list(join.stretches("a.py", "short\n", count, 190)) == []


@pytest.fixture
def manifest(tmp_path):
    records = [{"text": f"import m{i - 1}\n", "id": f"lib/m{i}.py"} for i in range(6)]
    records += [{"text": "no name"}, {"text": "", "id": "lib/empty.py"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "code.toml").write_text('format = "jsonl"\nfiles = ["data.jsonl"]\nlang = "python"\nlicence = "X"\n')
    return tmp_path / "code.toml"


def test_the_command_writes_a_manifest_that_is_read(manifest, tmp_path, capsys):
    for by, n in (("folder", 1), ("imports", 5)):
        out = tmp_path / "made" / f"{by}.toml"
        assert not cli.main(["data", "join", str(manifest), "--by", by, "--out", str(out), "--max-tokens", "256"])
        assert f"has {n} documents" in capsys.readouterr().out
        about = read_manifest(out)
        assert (about.lang, about.licence, about.documents) == ("python", "X", n) and about.tokens and about.sha256
        first = open_source(about)[0]
        assert first.meta["files"][:2] == ["lib/m0.py", "lib/m1.py"] and "# lib/m1.py\nimport m0\n" in first.pieces[0]


def test_what_cannot_be_joined_is_refused(manifest, tmp_path):
    tokenizer = "data/tokenizer.model"
    with pytest.raises(ConfigError, match="the same manifest"):
        join.join(manifest, "folder", manifest, 256, tokenizer)
    with pytest.raises(ConfigError, match=r"no \.toml"):
        join.join(manifest, "folder", tmp_path / "out", 256, tokenizer)
    with pytest.raises(ConfigError, match="up to 7 tokens"):
        join.join(manifest, "folder", tmp_path / "out.toml", 7, tokenizer)
    (tmp_path / "data.jsonl").write_text('{"text": "no name"}\n')
    with pytest.raises(ConfigError, match="1 for: no id"):
        join.join(manifest, "folder", tmp_path / "out.toml", 256, tokenizer)


def test_pictures_are_left_out():
    picture = Document((Picture(b""), "text"), id="a/b")
    assert join.read_files([picture], count, 256, False) == ([], {"pictures": 1})
