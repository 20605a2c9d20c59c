"""`llamax data unpack`: there and back, token by token and byte by byte; what is refused, what a failure leaves."""

from __future__ import annotations

import hashlib
import json
import random

import numpy as np
import pytest

from llamax.config import ConfigError
from llamax.data.embedded import instructions
from llamax.data.encode import Encoder
from llamax.data.sources import open_source, read_manifest, verify, write_arrayrecord
from llamax.post import records
from llamax.post.records import Records
from llamax.post.unpack import pictures_of, unpack
from tests.post.small import RUN, TOKENIZER, rows
from tests.runs import FIXTURES


def embedded(n: int = 24) -> list[dict]:
    """Conversations and comparisons as `llamax data build` makes them, and a plain document."""
    rng = random.Random(0)
    talks = [instructions.instruction(rng, 56) | {"id": f"i/{i}"} for i in range(n)]
    pairs = [instructions.preference(rng, 56) | {"id": f"p/{i}"} for i in range(n // 3)]
    picture = next(part["image"] for talk in talks for part in talk["messages"][-2]["content"] if "image" in part)
    plain = {"pieces": [{"image": picture}, {"text": " a shape", "weight": 0.5}], "id": "d", "meta": {"image": "no"}}
    return [*talks, *pairs, plain, {"text": "words alone"}]


@pytest.fixture
def source(tmp_path):
    """A manifest of two shards."""
    made = embedded()
    for i, part in enumerate((made[:10], made[10:])):
        write_arrayrecord(tmp_path / f"s-{i}.arrayrecord", part)
    said = ['format = "arrayrecord"', 'files = ["s-*.arrayrecord"]', 'kind = "multimodal"', 'lang = "en"']
    (tmp_path / "s.toml").write_text("\n".join([*said, 'learnt = ["assistant", "system"]', f"documents = {len(made)}"]))
    return tmp_path / "s.toml"


def encoded(manifest):
    about = read_manifest(manifest)
    encode = Encoder(TOKENIZER.path, RUN.model.vision, learnt=about.learnt)
    return [encode(document) for document in open_source(about)]


def pictures_in(value):
    """The bytes of all pictures in records."""
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from pictures_in(part)
    elif isinstance(value, bytes):
        yield value


def test_every_record_comes_back_with_its_tokens_and_its_pictures(source, tmp_path):
    out = tmp_path / "new" / "x.jsonl"
    counts = unpack(source, out)
    before, after = encoded(source), encoded(out.with_suffix(".toml"))
    assert counts == {"written": len(before)} and len(after) == len(before) == 34
    for a, b in zip(before, after, strict=True):
        assert (a.skip, a.cut, a.second, a.margin) == (b.skip, b.cut, b.second, b.margin)
        for one, other in ((a.tokens, b.tokens), (a.weights, b.weights), (a.tiles, b.tiles), (a.sides, b.sides)):
            np.testing.assert_array_equal(one, other)
    assert any(len(one.tiles) for one in after) and any(one.second for one in after)
    written, made = rows(out), embedded()
    assert [row.get("meta") for row in written] == [record.get("meta") for record in made]
    there = {path.name: path.read_bytes() for path in pictures_of(out).iterdir()}
    assert set(there.values()) == set(pictures_in(made))
    assert all(name.split(".")[0] == hashlib.sha256(data).hexdigest() for name, data in there.items())
    assert {name.split(".")[1] for name in there} == {"png", "gif"}
    manifest = read_manifest(out.with_suffix(".toml"))
    verify(manifest)
    assert (manifest.kind, manifest.lang, manifest.learnt) == ("multimodal", "en", ("assistant", "system"))
    assert sorted(path.name for path in out.parent.iterdir()) == ["x.jsonl", "x.toml", "x_files"]
    assert len(Records(out)) == 24  # what the other commands take: the conversations


def test_lines_are_copied_with_their_pictures(tmp_path):
    """Of a folder of lines the same comes out, with the first records alone if they are asked for."""
    out = tmp_path / "x.jsonl"
    assert unpack(FIXTURES / "chat.toml", out) == {"written": len(encoded(FIXTURES / "chat.toml"))}
    for a, b in zip(encoded(FIXTURES / "chat.toml"), encoded(out.with_suffix(".toml")), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.tiles, b.tiles)
    assert unpack(FIXTURES / "chat.toml", tmp_path / "y.jsonl", 2) == {"written": 2}
    assert rows(tmp_path / "y.jsonl") == json.loads(json.dumps(rows(out)[:2]).replace("x_files/", "y_files/"))


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path, capsys):
    image = {"type": "image", "image": b"no picture"}
    ask = {"messages": [{"role": "user", "content": [image]}, {"role": "assistant", "content": "a"}]}
    made = [ask, ask | {"meta": {"x": b"1"}}]
    write_arrayrecord(tmp_path / "s.arrayrecord", made)
    manifest = tmp_path / "s.toml"
    manifest.write_text('format = "arrayrecord"\nfiles = ["s.arrayrecord"]\nkind = "multimodal"\n')
    counts = unpack(manifest, tmp_path / "x.jsonl")
    assert counts["written"] == 1 and counts.total() == 2
    assert "record 1 of" in capsys.readouterr().out
    assert [path.suffix for path in pictures_of(tmp_path / "x.jsonl").iterdir()] == [".bin"]
    lines = ['{"messages": 1}', '{"pieces": [{"image": "none.png"}]}']
    (tmp_path / "l.jsonl").write_text("\n".join(lines))
    (tmp_path / "l.toml").write_text('format = "jsonl"\nfiles = ["l.jsonl"]\nkind = "multimodal"\n')
    with pytest.raises(ConfigError, match="none of its records can be read: record 0 of .*malformed"):
        unpack(tmp_path / "l.toml", tmp_path / "y.jsonl")
    assert not list(tmp_path.glob("y*")) and not list(tmp_path.glob(".y*"))


def test_nothing_half_written_is_left(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "no space left")

    there = sorted(path.name for path in tmp_path.iterdir())
    for broken in ("fsync", "replace"):
        target = records.os if broken == "fsync" else records.Path
        with monkeypatch.context() as patched:
            patched.setattr(target, broken, full)
            with pytest.raises(ConfigError, match="no space left"):
                unpack(source, tmp_path / "x.jsonl")
        assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_what_is_refused(source, tmp_path):
    unpack(source, tmp_path / "x.jsonl", 1)
    with pytest.raises(ConfigError, match="is there already"):
        unpack(source, tmp_path / "x.jsonl", 1)
    pictures_of(tmp_path / "y.jsonl").mkdir()
    with pytest.raises(ConfigError, match="y_files is there already"):
        unpack(source, tmp_path / "y.jsonl")
    with pytest.raises(ConfigError, match="ends in .jsonl"):
        unpack(source, tmp_path / "z.toml")
    with pytest.raises(ConfigError, match="there is no such file"):
        unpack(tmp_path / "none.toml", tmp_path / "z.jsonl")
    tasks = f'[tasks]\nweights = {{needle = 1}}\nfiller = "{FIXTURES / "text.toml"}"\nlength_range = [64, 512]\n'
    (tmp_path / "t.toml").write_text(f'format = "tasks"\ndocuments = 3\n{tasks}')
    with pytest.raises(ConfigError, match="it is of tasks, which are made as they are read"):
        unpack(tmp_path / "t.toml", tmp_path / "z.jsonl")
