"""Records and the ledger: what makes a key, what is left out, what survives a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from llamax.config import ConfigError
from llamax.post import ledger, records
from llamax.post.ledger import Ledger, key_of
from llamax.post.records import Records
from tests.post.small import QUESTIONS, asked, write


def test_the_fixture_is_read_whole():
    found = Records(QUESTIONS)
    assert len(found) == 22 and not found.skipped and len(set(found.keys)) == 22
    first, pictured = found[0], found[15]
    assert (
        first.id == "sums/0" and first.domain == "sums" and first.tags == {"arithmetic"} and first.meta["answer"] == "3"
    )
    assert [m["role"] for m in first.prompt] == ["user"] and records.text_of(first.answer).endswith("Answer: 3")
    assert pictured.prompt[0]["content"][0]["image"].is_file() and records.pictured(pictured.messages)
    assert found.line(0) == QUESTIONS.read_bytes().splitlines(keepends=True)[0]


def test_a_key_stands_for_what_a_model_and_a_rule_are_shown(tmp_path):
    picture = tmp_path / "a.png"

    def key(**changed) -> str:
        part = {"type": "image", "image": "a.png"}
        record = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}], "id": "1"} | changed
        return Records(write(tmp_path / "x.jsonl", record)).keys[0]

    picture.write_bytes(b"one")
    before = key()
    assert key(id="2", meta={"domain": "d", "tags": ["t"]}) == before  # names change nothing
    assert key(meta={"verify": "math", "answer": "4"}) != before
    assert key(tools=[{"name": "f"}]) != before
    assert key(messages=[{"role": "user", "content": "?"}]) != before
    picture.write_bytes(b"two")
    assert key() != before


def test_lines_that_are_no_conversations_are_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = ["{", '{"text": "a"}', '{"messages": []}', '{"messages": [{"role": "assistant", "content": "a"}]}']
    lines += ['{"messages": [{"role": "user", "content": [{"type": "image", "image": "none.png"}]}]}']
    lines += ['{"messages": [{"role": "user", "content": "a"}], "meta": {"verify": "maths"}}', "[" * 9999, "\udcff"]
    path.write_text("\n".join([*lines, json.dumps(asked("Hi"))]), encoding="utf-8", errors="surrogateescape")
    found = Records(path)
    assert len(found) == 1 and records.text_of(found[0].messages[0]) == "Hi"
    assert found.skipped.total() == len(lines) and "record 0" in next(iter(found.skipped))
    with pytest.raises(IndexError):
        found[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "it is empty"), ('{"text": "a"}', "none of its 1 lines is a conversation: record 0 .* it has no messages")],
)
def test_a_file_without_conversations_is_told(tmp_path, text, said):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=said):
        Records(tmp_path / "x.jsonl")


def test_other_files_are_told(tmp_path):
    with pytest.raises(ConfigError, match="it is a manifest, .*|it is a manifest. Name the JSONL file"):
        Records(QUESTIONS.with_suffix(".toml"))
    with pytest.raises(ConfigError, match="No such file"):
        Records(tmp_path / "none.jsonl")


def test_pictures_stay_where_they_are_when_a_record_moves(tmp_path):
    found = Records(QUESTIONS)
    raw = records.moved(found[15].raw, QUESTIONS.parent, tmp_path)
    there = write(tmp_path / "x.jsonl", raw)
    assert Records(there).keys == [found.keys[15]]
    assert found[15].raw["messages"][0]["content"][0]["image"] == "pictures/red_circle.png"  # and it is as it was


def test_what_is_written_is_whole_or_not_there(tmp_path):
    out = records.check_new(tmp_path / "new" / "x.jsonl")

    def lines():
        yield b"{}\n"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.write(out, lines(), pictures=False, description="d")
    assert list(out.parent.iterdir()) == []
    assert records.write(out, [records.as_line(asked("a"))] * 2, pictures=False, description='"d"') == 2
    from llamax.data.sources import read_manifest, verify

    manifest = read_manifest(out.with_suffix(".toml"))
    verify(manifest)
    assert manifest.documents == 2 and manifest.kind == "text" and manifest.description == '"d"'
    with pytest.raises(ConfigError, match="is there already"):
        records.check_new(out)
    with pytest.raises(ConfigError, match="ends in .jsonl"):
        records.check_new(tmp_path / "x.json")


# -------------------------------------------------------------------------------------------------------------- ledger


def test_rows_stay_and_the_newer_counts(tmp_path):
    path = tmp_path / "l.jsonl"
    with Ledger(path) as kept:
        kept.add({"key": "a", "value": 1})
        kept.add({"key": "b", "value": "ä\ud800"})
        assert "a" in kept and "c" not in kept
    with Ledger(path) as kept:
        kept.add({"key": "a", "value": 2})
        assert kept["a"]["value"] == 2 and kept["b"]["value"] == "ä?"
    assert [row["value"] for row in ledger.rows(path)] == [1, "ä?", 2]


def test_a_row_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "l.jsonl"
    with Ledger(path) as kept:
        kept.add({"key": "a"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "b", "va')
    assert [row["key"] for row in ledger.rows(path)] == ["a"]
    with Ledger(path) as kept:
        assert "b" not in kept
        kept.add({"key": "b"})
    assert [row["key"] for row in ledger.rows(path)] == ["a", "b"]
    path.write_bytes(b"damage\n" + whole)
    with pytest.raises(ConfigError, match="its line at byte 0 is no row"), Ledger(path):
        pass


def test_a_full_disk_leaves_whole_rows(tmp_path, monkeypatch):
    path = tmp_path / "l.jsonl"
    with Ledger(path) as kept:
        kept.add({"key": "a"})
        real = os.write
        monkeypatch.setattr(os, "write", lambda file, line: real(file, line[:5]))
        with pytest.raises(ConfigError, match="no space left"):
            kept.add({"key": "b"})
        monkeypatch.setattr(os, "write", real)
        kept.add({"key": "c"})
        assert kept["c"] == {"key": "c"} and "b" not in kept
    assert [row["key"] for row in ledger.rows(path)] == ["a", "c"]


def test_one_process_writes_at_a_time(tmp_path):
    path = tmp_path / "l.jsonl"
    code = "import sys; from llamax.post.ledger import Ledger\nwith Ledger(sys.argv[1]): pass"
    with Ledger(path):
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode and "another process is writing to it" in done.stderr
    with Ledger(path), pytest.raises(ConfigError, match="cannot be opened"), Ledger(tmp_path):
        pass


def test_keys_are_of_content():
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1}) != key_of("a", {"x": 1, "y": 3})
