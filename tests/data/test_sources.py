"""Manifests, the two formats, and what is done about records that are wrong."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from llamax.config import ConfigError
from llamax.data.encode import Encoder
from llamax.data.sources import Picture, open_source, read_manifest, verify, write_arrayrecord

TOKENIZER = Path(__file__).resolve().parents[2] / "data" / "tokenizer.model"


def manifest(folder, **table):
    path = folder / "data.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()))
    return path


def jsonl(folder, *records, name="data.jsonl", **table):
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return manifest(folder, format="jsonl", files=[name], **table)


def documents(path):
    return list(open_source(read_manifest(path)))


def refused(path) -> str:
    with pytest.raises(ConfigError) as error:
        documents(path)
    return str(error.value)


def test_both_formats_give_the_same_documents(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    records = [
        {"text": "naïve <|end_of_text|> 語"},
        {"pieces": [{"text": "see "}, {"image": "a.png"}, {"text": "?"}], "id": "x1", "meta": {"truth": "red"}},
    ]
    lines = documents(jsonl(tmp_path, *records, lang="en"))
    assert lines[0].pieces == ("naïve <|end_of_text|> 語",) and lines[0].lang == "en" and not lines[0].skip
    assert lines[1].pieces == ("see ", Picture(tmp_path / "a.png"), "?")
    assert lines[1].id == "x1" and lines[1].meta == {"truth": "red"}

    records[1]["pieces"][1] = {"image": b"picture"}
    assert write_arrayrecord(tmp_path / "data.arrayrecord", records) == 2
    packed = documents(manifest(tmp_path, format="arrayrecord", files=["data.arrayrecord"], lang="en"))
    assert lines[1].where.endswith("data.jsonl") and packed[1].where == f"record 1 of {tmp_path / 'data.arrayrecord'}"
    assert packed[0] == lines[0]._replace(where=packed[0].where)
    assert packed[1] == lines[1]._replace(pieces=("see ", Picture(b"picture"), "?"), where=packed[1].where)


def test_pieces_may_weigh(tmp_path):
    """In both formats and both forms; the encoder gives a piece's weight to each of its tokens, and the end's to it."""
    records = [
        {"text": "all of it", "weight": 0.5},
        {"pieces": [{"text": "read "}, {"text": "this", "weight": 0}, {"text": " and that", "weight": 2.5}]},
        {"text": "plain", "weight": 1},
    ]
    lines = documents(jsonl(tmp_path, *records))
    write_arrayrecord(tmp_path / "data.arrayrecord", records)
    packed = documents(manifest(tmp_path, format="arrayrecord", files=["data.arrayrecord"]))
    for of in (lines, packed):
        assert [document.weights for document in of] == [(0.5,), (1.0, 0.0, 2.5), ()]
        assert not any(document.skip for document in of)
    encode = Encoder(TOKENIZER, None)
    for document in lines:
        encoded = encode(document)
        if not document.weights:
            assert encoded.weights is None
            continue
        lengths = [len(encode.tokenizer.encode(piece)) for piece in document.pieces]
        expected = [w for weight, n in zip(document.weights, lengths, strict=True) for w in [weight] * n]
        assert encoded.weights.dtype == np.float32
        assert encoded.weights[1:].tolist() == [*expected, expected[-1]]
        assert len(encoded.weights) == len(encoded.tokens)


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "1", True, None])
def test_what_is_no_weight_is_malformed(tmp_path, weight):
    (document,) = documents(jsonl(tmp_path, {"pieces": [{"text": "a", "weight": weight}]}))
    assert document.skip == "malformed"


def test_a_picture_has_no_weight(tmp_path):
    (document,) = documents(jsonl(tmp_path, {"pieces": [{"image": "a.png", "weight": 1.0}]}))
    assert document.skip == "malformed"


@pytest.mark.parametrize("format", ["jsonl", "arrayrecord"])
def test_shards_are_one_sequence_in_name_order(tmp_path, format):
    for shard in (2, 0, 1):
        records = [{"text": f"{shard}.{i}"} for i in range(shard + 1)]
        if format == "jsonl":
            (tmp_path / f"s-{shard}.jsonl").write_text("\n\n".join(map(json.dumps, records)))  # blank lines, no last \n
        else:
            write_arrayrecord(tmp_path / f"s-{shard}.arrayrecord", records)
    source = open_source(read_manifest(manifest(tmp_path, format=format, files=["s-*"], documents=6)))
    assert [d.pieces[0] for d in source] == ["0.0", "1.0", "1.1", "2.0", "2.1", "2.2"]
    assert pickle.loads(pickle.dumps(source))[3].pieces == ("2.0",)


def test_the_writer_is_deterministic(tmp_path):
    for name in ("a", "b"):
        write_arrayrecord(tmp_path / name, [{"text": "same"}, {"pieces": [{"image": b"x"}]}])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_damaged_content_is_skipped_with_its_reason(tmp_path):
    path = jsonl(
        tmp_path, {"text": ""}, {"pieces": [{"text": " \n"}]}, b'{"text": "\xff"}', {"text": "\ud800"}, {"text": "ok"}
    )
    assert [d.skip for d in documents(path)] == ["empty", "empty", "invalid_utf8", "invalid_utf8", ""]
    write_arrayrecord(tmp_path / "a.arrayrecord", [{"text": ""}, {"pieces": [{"image": b""}]}])
    bad = manifest(tmp_path, format="arrayrecord", files=["a.arrayrecord"])
    assert [d.skip for d in documents(bad)] == ["empty", ""]


def test_invalid_utf8_in_msgpack_is_skipped(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "a.arrayrecord"), "group_size:1")
    writer.write(b"\x81\xa4text\xa1\xff")
    writer.close()
    assert documents(manifest(tmp_path, format="arrayrecord", files=["a.arrayrecord"]))[0].skip == "invalid_utf8"


@pytest.mark.parametrize(
    "record",
    [{}, {"txt": "a"}, {"pieces": "a"}, {"pieces": [{"sound": "a"}]}, {"text": 3}, {"pieces": [{}]}, ["a"], b"{broken"],
)
def test_a_malformed_record_is_skipped_and_says_where_and_why(tmp_path, record):
    before, bad, after = documents(jsonl(tmp_path, {"text": "fine"}, record, {"text": "and well"}))
    assert (before.pieces, before.skip, after.pieces, after.skip) == (("fine",), "", ("and well",), "")
    assert bad.skip == "malformed" and not bad.pieces and bad.where == f"record 1 of {tmp_path / 'data.jsonl'}"
    assert (
        "cannot be decoded" in bad.detail if record == b"{broken" else f"text, image or video: {record}" in bad.detail
    )


def test_the_writer_refuses_what_readers_would(tmp_path):
    with pytest.raises(ConfigError, match="record 1"):
        write_arrayrecord(tmp_path / "a", [{"text": "fine"}, {"pieces": [{"image": "a path"}]}])


def test_a_wrong_manifest_is_refused_in_three_parts(tmp_path):
    good = jsonl(tmp_path, {"text": "a"})
    assert "data.toml" in refused(tmp_path / "date.toml")  # the nearest right one
    assert "no such file" in refused(tmp_path / "elsewhere" / "x.toml")
    assert "has no such file" in refused(manifest(tmp_path, format="jsonl", files=["none-*.jsonl"]))
    assert "names no files" in refused(manifest(tmp_path, format="jsonl"))
    assert "arrayrecord, jsonl" in refused(manifest(tmp_path, format="parquet", files=["data.jsonl"]))
    assert "text, multimodal" in refused(manifest(tmp_path, format="jsonl", files=["data.jsonl"], kind="film"))
    assert "'lang'" in refused(manifest(tmp_path, format="jsonl", files=["data.jsonl"], language="en"))
    assert "not a int" in refused(manifest(tmp_path, format="jsonl", files=["data.jsonl"], documents="1"))
    assert "1 documents, not 7" in refused(manifest(tmp_path, format="jsonl", files=["data.jsonl"], documents=7))
    good.write_text("format = ")
    assert "not TOML" in refused(good)
    assert "0 documents" in refused(jsonl(tmp_path, b""))
    (tmp_path / "folder").mkdir()
    assert "has no such file" in refused(manifest(tmp_path, format="jsonl", files=["folder"]))
    assert "not named before" in refused(manifest(tmp_path, format="jsonl", files=["data.jsonl", "*.jsonl"]))
    assert "is 3" in refused(manifest(tmp_path, format="jsonl", files=[3]))
    (tmp_path / "bad.arrayrecord").write_bytes(b"not an array record")
    assert "cannot be opened" in refused(manifest(tmp_path, format="arrayrecord", files=["bad.arrayrecord"]))


def test_a_damaged_file_loses_its_damaged_records_alone_or_is_an_error_that_names_it(tmp_path):
    texts = [f"text {i} " * 50 for i in range(40)]
    write_arrayrecord(tmp_path / "d.arrayrecord", [{"text": text} for text in texts])
    path = manifest(tmp_path, format="arrayrecord", files=["d.arrayrecord"])
    whole = (tmp_path / "d.arrayrecord").read_bytes()
    seen = set()
    for at in range(100, len(whole) // 2, 97):
        (tmp_path / "d.arrayrecord").write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        try:
            source = open_source(read_manifest(path))
        except ConfigError as error:
            assert "d.arrayrecord" in str(error)
            seen.add("refused")
            continue
        assert [source[i].skip or source[i].pieces[0] for i in range(40)] == [
            source[i].skip and "malformed" or text for i, text in enumerate(texts)
        ]
        bad = [i for i in range(39, -1, -1) if source[i].skip]  # backwards the same
        assert len(bad) <= 2 and bad == [i for i in range(40) if source[i].skip][::-1]
        assert all(source[i].where.startswith(f"record {i} of ") and source[i].detail for i in bad)
        seen |= {source[i].skip for i in bad}
    assert "malformed" in seen


def test_verify_compares_hashes(tmp_path):
    path = jsonl(tmp_path, {"text": "a"})
    hashed = '[sha256]\n"data.jsonl" = "{}"\n'
    digest = "de6ea33dd4c33f1c7e7f1f3ac5d3ac3d0a3f9ec3ad6c5ae65b7d1d7e5f6d5c3b"
    path.write_text(path.read_text() + hashed.format(digest))
    with pytest.raises(ConfigError) as error:
        verify(read_manifest(path))
    true = str(error.value).split("has sha256 ")[1].split()[0]
    path.write_text(path.read_text().replace(digest, true))
    verify(read_manifest(path))
