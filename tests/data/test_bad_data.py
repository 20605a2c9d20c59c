"""Each way in which data is bad, by name, in the real stream: what is left out, what is refused, and what it costs."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llamax.config import ConfigError, Data, Source
from llamax.data import encoded, images, packing, sources, video
from llamax.data.encode import Encoder
from llamax.data.packing import pack_window
from llamax.data.pipeline import HeldOut, Means, _pack, _window_docs, build, skipped
from llamax.data.show import show
from llamax.data.sources import Document, Picture, open_source, read_manifest, write_arrayrecord
from llamax.data.tokenizer import Tokenizer
from llamax.data.usable import SAMPLE_DOCS
from tests.data import hostile
from tests.runs import tiny_run

ROOT = Path(__file__).resolve().parents[2]
RUN = tiny_run()
VISION = RUN.model.vision
TOKENIZER = Tokenizer(RUN.data.tokenizer)


def jsonl(folder: Path, name: str, *records, about: str = "") -> Source:
    """A source of JSON lines; bytes stand for themselves."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    (folder / f"{name}.jsonl").write_bytes(b"\n".join(lines))
    (folder / f"{name}.toml").write_text(f'format = "jsonl"\nfiles = ["{name}.jsonl"]\n{about}')
    return Source(str(folder / f"{name}.toml"))


def settings(**data):
    return dataclasses.replace(RUN.data, batch_tokens=256, window_docs=4, prefetch_batches=0, **data)


WINDOW_DOCS = 32  # what 4 grow to, where documents are as short as here


def refused(data, batches: int = 50) -> str:
    with pytest.raises(ConfigError) as error:
        iterator = iter(build(data, VISION, 0))
        try:
            for _ in range(batches):
                next(iterator)
        finally:
            iterator.close()
    assert error.value.asked and error.value.true and error.value.change
    return str(error.value)


def words(n: int, name: str = "good") -> list[dict]:
    return [{"text": f"{name} {i} of some words"} for i in range(n)]


# ---------------------------------------------------------------------------------------------------- sources run dry


def test_a_source_of_one_document_repeats_it(tmp_path):
    data = settings(sources={"x": jsonl(tmp_path, "x", {"text": "only this"})}, multimodal_steps=0.0)
    iterator = iter(build(data, None, 0))
    for _ in range(6):
        batch = next(iterator)
        for b, t in zip(*np.nonzero(batch.tokens == TOKENIZER.bos), strict=True):
            n = (batch.segment_ids[b] == batch.segment_ids[b, t]).sum()
            assert TOKENIZER.decode(batch.tokens[b, t + 1 : t + n]) == "only this"


def test_a_stream_goes_on_past_many_unusable_documents_but_not_without_end(tmp_path):
    source = jsonl(tmp_path, "x", {"text": "one is good"}, *[{"text": ""}] * 3000, about="tokens = 9000\n")
    stream = build(settings(sources={"x": source}), None, 1)
    iterator = iter(stream)
    batch = next(iterator)
    assert iterator.get_state()["text"]["window"] > 60  # it comes late in the order of this seed
    assert "one is good" in TOKENIZER.decode([i for i in batch.tokens[0] if i < TOKENIZER.n_ranks])
    file = tmp_path / "x.jsonl"
    file.write_bytes(file.read_bytes().replace(b"one is good", b" " * 11))
    with pytest.raises(ConfigError, match=r"data source x, but 50\d\d documents in a row hold nothing usable"):
        next(iter(stream))


@pytest.mark.parametrize("n", [3, 3 * SAMPLE_DOCS])
def test_a_source_of_nothing_usable_is_refused_at_the_start_by_its_name(tmp_path, n):
    bad = [{"text": ""}, {"text": "\ud800"}, {"text": "  "}] * (n // 3)
    data = settings(sources={"good": jsonl(tmp_path, "good", *words(4)), "dry": jsonl(tmp_path, "dry", *bad)})
    with pytest.raises(ConfigError) as error:
        build(data, None, 0)
    assert error.value.asked.startswith("data source dry (") and "dry.toml" in error.value.asked
    assert f"its {n} documents" in error.value.true and f"record 0 of {tmp_path / 'dry.jsonl'}" in error.value.true
    assert "not valid UTF-8" in error.value.true and "white space" in error.value.true


def test_a_source_of_pictures_too_large_for_a_row_is_refused_at_the_start(tmp_path):
    (tmp_path / "a.png").write_bytes(hostile.encoded(hostile.drawing(80, 20)))
    source = jsonl(tmp_path, "x", {"pieces": [{"image": "a.png"}]}, about='kind = "multimodal"')
    message = refused(settings(sources={"x": source}, multimodal_steps=1.0, tiles_per_row=2))
    assert "one picture alone needs more" in message and "record 0" in message


def test_a_source_of_weight_0_is_never_read(tmp_path):
    unread = jsonl(tmp_path, "unread", b"{broken", about='kind = "multimodal"')
    data = settings(
        sources={"good": jsonl(tmp_path, "good", *words(9)), "unread": dataclasses.replace(unread, weight=0.0)}
    )
    (tmp_path / "unread.jsonl").write_bytes(b"")  # opening it would be refused too
    iterator = iter(build(data, None, 0))  # nor does it ask for a vision encoder
    assert {int(i) for _ in range(20) for i in np.unique(next(iterator).source_ids)} == {0}
    nothing = {name: dataclasses.replace(source, weight=0.0) for name, source in data.sources.items()}
    assert "no tokens can be drawn" in refused(dataclasses.replace(data, sources=nothing))


@pytest.mark.parametrize("form", ["jsonl", "arrayrecord"])
def test_an_empty_file_is_refused_at_the_start(tmp_path, form):
    (tmp_path / "x").write_bytes(b"")
    (tmp_path / "x.toml").write_text(f'format = "{form}"\nfiles = ["x"]\n')
    assert str(tmp_path / "x") in refused(settings(sources={"x": Source(str(tmp_path / "x.toml"))}))


# ------------------------------------------------------------------------------------------------- records and shards


def test_a_truncated_arrayrecord_shard_is_refused_at_the_start(tmp_path):
    rng = np.random.default_rng(0)
    records = [{"pieces": [{"image": rng.bytes(4000)}, {"text": f"t {i}"}]} for i in range(60)]
    write_arrayrecord(tmp_path / "x", records)
    (tmp_path / "x.toml").write_text('format = "arrayrecord"\nfiles = ["x"]\nkind = "multimodal"\n')
    whole = (tmp_path / "x").read_bytes()
    for keep in (1, 70_000, len(whole) // 2, 2**16, 2**17, len(whole) - 2**16, len(whole) - 1):
        (tmp_path / "x").write_bytes(whole[:keep])
        with pytest.raises(ConfigError) as error:
            open_source(read_manifest(tmp_path / "x.toml"))
        assert f"ArrayRecord file {tmp_path / 'x'}" in error.value.asked and len(error.value.true) > 25


def test_a_damaged_block_of_an_arrayrecord_shard_costs_its_records_alone(tmp_path):
    rng = np.random.default_rng(0)
    records = [{"pieces": [{"image": rng.bytes(4000)}, {"text": f"t {i}"}]} for i in range(60)]
    write_arrayrecord(tmp_path / "x", records)
    (tmp_path / "x.toml").write_text('format = "arrayrecord"\nfiles = ["x"]\nkind = "multimodal"\n')
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole[:100_000] + bytes(5000) + whole[105_000:])  # a hole: met when it is read
    source = open_source(read_manifest(tmp_path / "x.toml"))
    read = [source[i] for i in range(60)]
    bad = [i for i, document in enumerate(read) if document.skip]
    assert 1 <= len(bad) <= 3
    for i, document in enumerate(read):
        if i in bad:
            assert document.skip == "malformed" and "cannot be decoded: Corrupted" in document.detail
            assert document.where == f"record {i} of {tmp_path / 'x'}"
        else:
            assert document.pieces == (Picture(records[i]["pieces"][0]["image"]), f"t {i}") and not document.skip
    assert [source[i] for i in bad] == [read[i] for i in bad]  # asked again


def test_a_truncated_jsonl_shard_loses_its_last_record(tmp_path, caplog):
    source = jsonl(tmp_path, "x", *words(20))
    file = tmp_path / "x.jsonl"
    file.write_bytes(file.read_bytes()[:-8])
    counts, told = run_and_count(settings(sources={"x": source}), caplog, windows=5)
    assert counts == {"x": {"malformed": 5 * WINDOW_DOCS // 20}} and len(told) == 1
    assert told[0].startswith(f"source x leaves out record 19 of {file} (it cannot be decoded: Unterminated")
    jsonl(tmp_path, "x", *words(20), about="documents = 20\n")
    file.write_bytes(b"\n".join(file.read_bytes().splitlines()[:-1]))  # cut between two records
    assert "hold 19 documents, not 20" in refused(settings(sources={"x": source}))


def test_a_file_that_is_cut_under_the_stream_loses_records_and_one_that_goes_away_is_refused(tmp_path, caplog):
    source, file = jsonl(tmp_path, "x", *words(300), about="tokens = 2000\n"), tmp_path / "x.jsonl"
    data = settings(sources={"x": source})
    iterator = iter(build(data, None, 0))
    next(iterator)
    file.write_bytes(file.read_bytes()[:6000])  # 140 records and a part of one
    with caplog.at_level(logging.INFO, "llamax"):
        while not skipped(iterator, data):
            next(iterator)
    assert set(skipped(iterator, data)["x"]) == {"malformed"}
    assert re.search(rf"leaves out record \d+ of {file} \(it cannot be decoded", caplog.text)
    file.unlink()
    with pytest.raises(ConfigError, match=rf"record \d+ of {file}, but it cannot be read: .*No such file"):
        for _ in range(50):
            next(iterator)


def test_an_arrayrecord_file_that_goes_away_before_it_is_read_is_refused(tmp_path):
    for name in ("x-0", "x-1"):
        write_arrayrecord(tmp_path / name, words(3))
    (tmp_path / "x.toml").write_text('format = "arrayrecord"\nfiles = ["x-*"]\n')
    source = open_source(read_manifest(tmp_path / "x.toml"))
    (tmp_path / "x-1").unlink()
    assert source[2].pieces == ("good 2 of some words",)
    with pytest.raises(ConfigError, match=rf"record 0 of {tmp_path / 'x-1'}, but it cannot be read"):
        source[3]


def test_a_picture_in_a_text_source_is_left_out_and_a_source_of_nothing_else_refused(tmp_path, caplog):
    (tmp_path / "a.png").write_bytes(hostile.picture("good"))
    drawn = {"pieces": [{"text": "see "}, {"image": "a.png"}]}
    data = settings(sources={"x": jsonl(tmp_path, "x", *words(7), drawn, about="tokens = 50\n")})
    for vision in (VISION, None):
        counts, told = run_and_count(data, caplog, windows=2, vision=vision)
        assert counts == {"x": {"unexpected_picture": 2 * WINDOW_DOCS // 8}}
        assert told == [
            f"source x leaves out record 7 of {tmp_path / 'x.jsonl'}: "
            'a picture in a source whose manifest says kind = "text"'
        ]
    jsonl(tmp_path, "x", drawn)
    assert "a picture in a source whose manifest says" in refused(data)


def test_what_a_record_says_of_itself_may_be_anything_but_a_wrong_type(tmp_path):
    odd = [{"text": "a", "id": 3, "meta": None}, {"text": "a", "id": None, "more": [1]}, {"text": "a", "meta": [1]}]
    reader = open_source(read_manifest(jsonl(tmp_path, "x", *odd).path))
    assert [reader[0].meta, reader[1].id] == [{}, "None"]
    assert reader[2].skip == "malformed" and "'meta': [1]" in reader[2].detail
    assert documents_of(tmp_path, b'{"text": "a", "id": ' + b"[" * 5000 + b"]" * 5000 + b"}")[0].skip == "malformed"


def documents_of(folder: Path, *records) -> list[Document]:
    return list(open_source(read_manifest(jsonl(folder, "y", *records).path)))


def run_and_count(data, caplog, windows: int, vision=None):
    """(what was left out in so many windows of the text stream, what the log says of it)."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "llamax"):
        iterator = iter(build(data, vision, 0))
        while (at := iterator.get_state()["text"])["window"] + (at["row"] > 0) < windows:
            check_words(next(iterator))
        counts = skipped(iterator, data)
        iterator.close()
    assert at["window"] + (at["row"] > 0) == windows  # and not more
    return counts, [message for record in caplog.records if "leaves out" in (message := record.getMessage())]


def check_words(batch) -> None:
    """Each document of `words` that begins and ends in a row is whole."""
    for b, t in zip(*np.nonzero(batch.tokens == TOKENIZER.bos), strict=True):
        here = batch.segment_ids[b] == batch.segment_ids[b, t]
        ids = [*batch.tokens[b, here][1:], batch.targets[b, here][-1]]
        if ids[-1] == TOKENIZER.eos:
            assert re.fullmatch(r"\w+ \d+ of some words", TOKENIZER.decode(ids[:-1]))


MALFORMED = [{"txt": "no text"}, b"{broken", ["a"]]


@pytest.mark.parametrize("workers, ahead", [(0, 0), (0, 2), (2, 2)])
def test_malformed_records_are_left_out_counted_and_named_and_the_others_unchanged(tmp_path, caplog, workers, ahead):
    lines = [*words(20), *MALFORMED, *words(17, "more")]  # 40 documents, an epoch
    source = jsonl(tmp_path, "x", *lines, about="tokens = 400\n")
    data = dataclasses.replace(settings(sources={"x": source}), workers=workers, prefetch_batches=ahead)
    with caplog.at_level(logging.INFO, "llamax"):
        iterator = iter(build(data, None, 0))
        taken = [next(iterator) for _ in range(12)]
        counts, windows = skipped(iterator, data), iterator.get_state()["text"]["window"]
        iterator.close()
    plain = iter(build(dataclasses.replace(data, workers=0, prefetch_batches=0), None, 0))
    for batch, other in zip(taken, plain, strict=False):
        check_words(batch)
        for mine, theirs in zip(batch, other, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    begun = "".join(
        TOKENIZER.decode([i for i in row if i < TOKENIZER.n_ranks]) for batch in taken for row in batch.tokens
    )
    good = {f"{name} {i} of" for name, n in (("good", 20), ("more", 17)) for i in range(n)}
    assert set(re.findall(r"(?:good|more) \d+ of", begun)) == good and "no text" not in begun
    epochs = (windows + 1) * WINDOW_DOCS / 40
    assert epochs >= 1 and 3 * int(epochs) <= counts["x"]["malformed"] <= 3 * (int(epochs) + 1)
    assert counts == {"x": {"malformed": counts["x"]["malformed"]}}
    told = [record.getMessage() for record in caplog.records if "leaves out" in record.getMessage()]
    assert len(told) == 1
    at, detail = re.fullmatch(
        rf"source x leaves out record (\d+) of {tmp_path / 'x.jsonl'} \((.*)\): the record is damaged, or no map "
        "with pieces of text, image or video, or no conversation",
        told[0],
    ).groups()
    expected = {"20": "{'txt': 'no text'}", "21": "it cannot be decoded: Expecting property name", "22": "['a']"}
    assert expected[at] in detail


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_refusal_comes_home_from_the_loader_processes_as_it_is(tmp_path, workers, ahead):
    source = jsonl(tmp_path, "x", *words(40), about="tokens = 400\n")
    data = dataclasses.replace(settings(sources={"x": source}), workers=workers, prefetch_batches=ahead)
    stream = build(data, VISION, 0)
    (tmp_path / "x.jsonl").unlink()
    iterator = iter(stream)
    with pytest.raises(ConfigError) as error:
        next(iterator)
    iterator.close()
    assert re.fullmatch(rf"record \d+ of {tmp_path / 'x.jsonl'}", error.value.asked)
    assert "it cannot be read: [Errno 2]" in error.value.true and "a run goes on" in error.value.change


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_document_left_out_is_named_once(tmp_path, caplog, workers):
    bad = [{"text": ""}, {"text": "\ud800"}, {"text": ""}]
    data = dataclasses.replace(settings(sources={"x": jsonl(tmp_path, "x", *words(3), *bad)}), workers=workers)
    with caplog.at_level(logging.INFO, "llamax"):
        iterator = iter(build(data, None, 0))
        for _ in range(8):
            next(iterator)
        iterator.close()
    told = [record.getMessage() for record in caplog.records if "leaves out" in record.getMessage()]
    assert len(told) == 2 and set(skipped(iterator, data)["x"]) == {"empty", "invalid_utf8"}
    assert f"source x leaves out record 4 of {tmp_path / 'x.jsonl'}: a text is not valid UTF-8" in told


def test_a_person_can_look_at_all_of_it(tmp_path, capsys):
    odd = "x [/] [/red] [bold]\x1b[31m \0 \u202e"
    records = [{"text": odd, "id": "\ud800[/]", "meta": {"\ud801": f"\udfff {odd}", "n": 3}}, {"text": "a\ud800"}]
    records += [{"pieces": [{"image": "none.png"}]}, {"text": " "}, {"pieces": [{"video": "\0"}, {"text": "a"}]}]
    records += [{"txt": "[/red]"}]
    about = 'kind = "multimodal"\ndescription = "[/] \\u202e"\nlang = "[/]"\nlicence = "[/red]"\n'
    path = jsonl(tmp_path, "[b]x", *records, b"{broken", about=about).path
    assert show(path, tokenizer=RUN.data.tokenizer) is None
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\x1b[31m" in shown and r"\ud800[/]" in shown
    assert shown.count("skipped: ") == 6
    shown = " ".join(shown.split())
    assert (
        "skipped: the record is damaged, or no map with pieces of text, image or video, or no conversation: "
        "it cannot be decoded" in shown
    )
    assert "{'txt': '[/red]'}" in shown
    Path(path).write_text(Path(path).read_text().replace("multimodal", "text"))
    show(path, tokenizer=RUN.data.tokenizer)
    shown = capsys.readouterr().out
    assert shown.count('skipped: a picture in a source whose manifest says kind = "text"') == 2


def test_held_out_data_that_is_bad_is_counted_and_its_first_records_named(tmp_path, caplog):
    bad = [{"text": ""}, {"pieces": [{"image": "a.png"}]}, {"txt": 1}, {"text": ""}]
    held_out = HeldOut(jsonl(tmp_path, "x", *words(3), *bad, *words(2, "last")).path, settings(), VISION)
    with caplog.at_level(logging.INFO, "llamax"):
        batches = list(held_out)
    assert held_out.skipped == {"empty": 2, "unexpected_picture": 1, "malformed": 1} and held_out.taken == [
        0,
        1,
        2,
        7,
        8,
    ]
    assert list(held_out.texts()) == [record["text"] for record in [*words(3), *words(2, "last")]]
    assert sum((batch.targets == TOKENIZER.eos).sum() for batch in batches) == 5
    for number in (3, 4, 5):
        assert f"leaves out record {number} of {tmp_path / 'x.jsonl'}" in caplog.text
    assert "record 6" not in caplog.text
    list(held_out)
    assert sum(held_out.skipped.values()) == 4 and len(held_out.taken) == 5  # of one pass, not of both


# ------------------------------------------------------------------------------------------------------- large things


def test_a_document_too_large_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 1000)
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 3000)
    monkeypatch.setattr(sources, "BLOCK", 16)  # lines are found in parts
    records = [{"text": "é" * n} for n in (500, 501, 400, 2000)] + [{"text": "last"}]
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in records]
    reader = open_source(read_manifest(jsonl(tmp_path, "x", *lines[:2], b" " * 99, b"", *lines[2:]).path))
    assert [document.skip for document in reader] == ["", "too_large", "", "too_large", ""]
    assert reader[4].pieces == ("last",) and reader[3].pieces == ()


def test_a_document_of_too_many_tiles_is_left_out(monkeypatch):
    data = hostile.picture("good")
    one = 3 * VISION.tile_px**2 * 3  # two tiles and the global one
    monkeypatch.setattr(encoded, "MAX_TILE_BYTES", 4 * one)
    encoder = Encoder(RUN.data.tokenizer, VISION)
    assert len(encoder(Document((Picture(data),) * 4)).tiles) == 12
    assert encoder(Document((Picture(data),) * 5)).skip == "too_large"
    monkeypatch.setattr(video, "MAX_CLIP_PIXELS", 16 * 16 * 4)
    assert len(encoder(Document((Picture(hostile.clip("GIF", 4), True),))).tiles) == 4
    assert encoder(Document((Picture(hostile.clip("GIF", 5), True),))).skip == "image_too_many_pixels"


def test_an_encoded_picture_of_too_many_bytes_is_not_read(tmp_path, monkeypatch):
    data = hostile.picture("good")
    (tmp_path / "a.png").write_bytes(data)
    for most, reason in ((len(data), ""), (len(data) - 1, "image_too_many_pixels")):
        monkeypatch.setattr(images, "MAX_FILE_BYTES", most)
        for picture in (Picture(data), Picture(tmp_path / "a.png")):
            assert Encoder(RUN.data.tokenizer, VISION)(Document((picture,))).skip == reason


def test_runs_without_end_are_tokenized_the_same_everywhere_and_come_back():
    for char in ("a", " ", "\n", "\0", "語", "\u0301", "A", "1", "'", "ʰ", "\u2028"):
        text = char * 60_000 + "end"
        ids = TOKENIZER.encode(text)
        assert ids == TOKENIZER.encode_array(text).tolist() and TOKENIZER.decode(ids) == text
        assert Encoder(RUN.data.tokenizer, None)(Document((text,))).tokens[1:-1].tolist() == ids


def test_a_long_document_is_packed_whole():
    """As many rows as it has, each pair once, in a time that does not go as their square."""
    tokens = np.arange(2_000_001, dtype=np.int32)
    long = encoded.Encoded(0, tokens, np.zeros((0, 3), np.int32), np.zeros((0, 0, 0, 3), np.uint8))
    rows = pack_window([long], 128, 0, np.random.default_rng(0)).rows
    real = rows.segment_ids > 0
    assert len(real) == 15_625 and real.all()
    np.testing.assert_array_equal(np.sort(rows.tokens[real]), tokens[:-1])
    np.testing.assert_array_equal(rows.targets, rows.tokens + 1)


class Made(Sequence):
    """Encoded documents of 1 MiB of tiles, 64 of them, and 99 tokens, made when they are asked for."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> encoded.Encoded:
        tokens = np.full(100, i, np.int32)
        return encoded.Encoded(0, tokens, np.array([[1, 91, 64]]), np.full((64, 64, 85, 3), i, np.uint8), where=f"{i}")


def test_a_window_holds_no_more_than_it_may_while_it_is_made_and_after(monkeypatch):
    def peak_mib(tile_bytes: int, places: int) -> tuple[int, packing.Window]:
        monkeypatch.setattr(packing, "ROOM", packing.Room(places, tile_bytes))
        tracemalloc.start()
        window = _pack(Made(100), 100, Data(seq_len=128), 64, (0, 0))[0]
        peak = tracemalloc.get_traced_memory()[1] // 2**20
        tracemalloc.stop()
        return peak, window

    peak, all_of_it = peak_mib(2**31, 2**26)
    assert peak > 190 and len(all_of_it.taken) == 100 and not all_of_it.skipped  # once as documents, once as rows
    for room in ((5 * 2**20, 2**26), (2**31, 5 * 128)):
        peak, window = peak_mib(*room)
        assert peak < 14 and window.taken.tolist() == [0, 1, 2, 3, 4] and window.skipped == {"0/window_full": 95}
        assert window.first_skipped == {"0/window_full": "5"} and window.tile_counts.tolist() == [64] * 5


@pytest.mark.parametrize("workers", [0, 2])
def test_documents_for_which_a_window_has_no_room_are_left_out_the_same_each_time(tmp_path, monkeypatch, workers):
    """Also by loader processes, and after a resume; smaller documents behind a large one are still taken."""
    long = [{"text": f"long {i} " + "of many words " * 300} for i in range(8)]
    data = dataclasses.replace(
        settings(sources={"x": jsonl(tmp_path, "x", *words(16), *long, about="tokens = 200\n")}), workers=workers
    )
    monkeypatch.setattr(packing, "ROOM", packing.Room(3000, 0))  # two long documents
    plain, iterator, resumed = (
        iter(build(dataclasses.replace(data, workers=n), None, 0)) for n in (0, workers, workers)
    )
    for _ in range(3):
        next(plain), next(iterator)
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    for _ in range(60):
        batch = next(plain)
        for others in (next(iterator), next(resumed)):
            for mine, theirs in zip(batch, others, strict=True):
                np.testing.assert_array_equal(mine, theirs)
    state, counts = plain.get_state(), skipped(plain, data)
    assert state == iterator.get_state() == resumed.get_state() and state["text"]["window"] > 4
    opened = (state["text"]["window"] + (state["text"]["row"] > 0)) * WINDOW_DOCS
    assert counts == {"x": {"window_full": counts["x"]["window_full"]}} and counts["x"]["window_full"] > opened / 8
    for others in (iterator, resumed):
        others.close()


def test_windows_of_large_documents_have_fewer_of_them():
    """So that ordinary documents are not left out: the mean window takes half of what it may."""
    data = dataclasses.replace(RUN.data, seq_len=8192, window_docs=256, tiles_per_row=64)
    vision = dataclasses.replace(VISION, tile_px=336)

    def docs(tokens: float, tiles: float = 0.0, **others) -> int:
        about = dataclasses.replace(data, **others)
        return _window_docs({"x": 1.0}, {"x": Means(tokens, tiles)}, about, about.tiles_per_row, vision)

    places, tile_bytes = packing.ROOM
    assert docs(1000) == 262 and docs(2000) == 256 and docs(10) == 2048  # as many as fill 32 rows
    assert docs(places / 512) == 256 and docs(places / 128) == 64 and docs(places) == 1
    tile = 336 * 336 * 3
    assert docs(3000, 4) == 256 and docs(5000, 17) == int(tile_bytes / 2 / (17 * tile)) == 186
    assert docs(3000, 4, seq_len=2**17) == int(tile_bytes / 2 / (4 * tile)) == 792  # not as many as fill 32 rows
    assert docs(3000, 4, seq_len=2**24) == 32  # a row of 64 slots holds 16 of them, however long it is
    mixed = {"a": Means(100, 0), "b": Means(2.0**24, 0)}
    assert _window_docs({"a": 0.5, "b": 0.5}, mixed, data, 0, None) == 1310  # as if there were the short ones alone
    assert _window_docs({"a": 1e-5, "b": 1.0}, mixed, data, 0, None) == 5


MEMORY = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from llamax.config import Data, Source, Vision
from llamax.data.encode import Encoder
from llamax.data.pipeline import build, skipped
from llamax.data.sources import Document, Picture
from tests.data import hostile

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024

folder, tokenizer = Path(sys.argv[1]), sys.argv[2] + "/data/tokenizer.model"
encoder = Encoder(tokenizer, Vision(tile_px=28, patch_px=7, max_tiles=2))
encoder(Document(("a", Picture(hostile.picture("good")), Picture(hostile.picture("gif clip"), True))))
made = {kind: hostile.picture(kind) for kind in [*hostile.bombs, "zTXt bomb", "iCCP bomb", "clip bomb"]}
before, found = peak(), {}
for kind, data in made.items():
    skip = encoder(Document((Picture(data, kind.startswith("clip")),))).skip
    found[kind] = (skip, peak() - before)
with (folder / "x.jsonl").open("w") as file:
    for i in range(3):
        file.write(json.dumps({"text": f"good {i}"}) + "\\n")
    file.write('{"text": "')
    for _ in range(50):
        file.write("a " * 500_000)
    file.write('"}\\n')
(folder / "x.toml").write_text('format = "jsonl"\\nfiles = ["x.jsonl"]\\n')
source = {"x": Source(str(folder / "x.toml"))}
data = Data(tokenizer, 128, 256, source, multimodal_steps=0.0, window_docs=4, prefetch_batches=0)
before, start = peak(), time.process_time()
iterator = iter(build(data, None, 0))
next(iterator)
print(json.dumps([found, skipped(iterator, data), peak() - before, time.process_time() - start]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory where Linux tells it")
def test_bombs_and_a_document_of_50_mb_take_little_memory_and_time(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), str(ROOT)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    bombs, left_out, mib, seconds = json.loads(done.stdout.splitlines()[-1])
    for kind, (reason, grown) in bombs.items():
        assert reason in hostile.PICTURES[kind].outcomes and reason
        assert grown < 64, kind  # MiB; one of 60,000 x 60,000 would be 10,000
    assert set(left_out["x"]) == {"too_large"}
    assert mib < 350 and seconds < 30, (mib, seconds)
