"""Each way in which data is bad, by name, in the real stream: what is left out, what is refused, and what it costs."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llamax.config import ConfigError, Source
from llamax.data import encode, images, sources, video
from llamax.data.encode import Encoder
from llamax.data.packing import pack_window
from llamax.data.pipeline import SAMPLE_DOCS, HeldOut, build, skipped
from llamax.data.show import show
from llamax.data.sources import Document, Picture, open_source, read_manifest, write_arrayrecord
from llamax.data.tokenizer import Tokenizer
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
    (tmp_path / "x").write_bytes(whole[:100_000] + bytes(5000) + whole[105_000:])  # a hole: met when it is read
    source = open_source(read_manifest(tmp_path / "x.toml"))
    with pytest.raises(ConfigError, match=rf"record \d+ of {tmp_path / 'x'}, but it cannot be decoded"):
        [source[i] for i in range(60)]


def test_a_truncated_jsonl_shard_is_refused_with_its_record(tmp_path):
    source = jsonl(tmp_path, "x", *words(20))
    file = tmp_path / "x.jsonl"
    file.write_bytes(file.read_bytes()[:-8])
    assert f"record 19 of {file}" in refused(settings(sources={"x": source}))
    jsonl(tmp_path, "x", *words(20), about="documents = 20\n")
    file.write_bytes(b"\n".join(file.read_bytes().splitlines()[:-1]))  # cut between two records
    assert "hold 19 documents, not 20" in refused(settings(sources={"x": source}))


def test_a_file_that_changes_under_the_stream_is_refused_with_its_record(tmp_path):
    source = jsonl(tmp_path, "x", *words(300), about="tokens = 2000\n")
    iterator = iter(build(settings(sources={"x": source}), None, 0))
    next(iterator)
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:500]), Path.unlink):
        damage(tmp_path / "x.jsonl")
        with pytest.raises(ConfigError, match=rf"record \d+ of {tmp_path / 'x.jsonl'}"):
            for _ in range(50):
                next(iterator)


def test_a_picture_in_a_text_source_is_refused_with_its_record(tmp_path):
    source = jsonl(tmp_path, "x", *words(5), {"pieces": [{"image": "a.png"}]}, about="tokens = 50\n")
    assert f"record 5 of {tmp_path / 'x.jsonl'} carries a picture" in refused(settings(sources={"x": source}))


def test_what_a_record_says_of_itself_may_be_anything_but_a_wrong_type(tmp_path):
    odd = [{"text": "a", "id": 3, "meta": None}, {"text": "a", "id": None, "more": [1]}, {"text": "a", "meta": [1]}]
    reader = open_source(read_manifest(jsonl(tmp_path, "x", *odd).path))
    assert [reader[0].meta, reader[1].id] == [{}, "None"]
    with pytest.raises(ConfigError, match="record 2"):
        reader[2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_refusal_comes_home_from_the_loader_processes_as_it_is(tmp_path, workers, ahead):
    source = jsonl(tmp_path, "x", *words(40), {"txt": "no text"}, about="tokens = 400\n")
    data = dataclasses.replace(settings(sources={"x": source}), workers=workers, prefetch_batches=ahead)
    assert refused(data) == (
        f"record 40 of {tmp_path / 'x.jsonl'}, but the record is not a map with pieces of text, image or video: "
        "{'txt': 'no text'}. Correct the record; the format is described in llamax/data/sources.py."
    )


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
    about = 'kind = "multimodal"\ndescription = "[/] \\u202e"\nlang = "[/]"\nlicence = "[/red]"\n'
    assert show(jsonl(tmp_path, "[b]x", *records, about=about).path, tokenizer=RUN.data.tokenizer) is None
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\x1b[31m" in shown and r"\ud800[/]" in shown
    assert shown.count("skipped: ") == 4


def test_held_out_data_that_is_bad_is_counted_or_refused(tmp_path):
    bad = [{"text": ""}] * 3
    held_out = HeldOut(jsonl(tmp_path, "x", *words(3), *bad).path, settings(), None)
    assert len(list(held_out)) == 1 and held_out.skipped == {"empty": 3}
    with pytest.raises(ConfigError, match=r"record 3 of .*x\.jsonl"):
        list(HeldOut(jsonl(tmp_path, "x", *words(3), {"txt": 1}).path, settings(), None))


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
    monkeypatch.setattr(encode, "MAX_TILE_BYTES", 4 * one)
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
        encoded = Encoder(RUN.data.tokenizer, None)(Document((text,)))
        assert encoded.tokens[1:-1].tolist() == ids


def test_a_long_document_is_packed_whole():
    """As many rows as it has, each pair once, in a time that does not go as their square."""
    tokens = np.arange(2_000_001, dtype=np.int32)
    long = encode.Encoded(0, tokens, np.zeros((0, 3), np.int32), np.zeros((0, 0, 0, 3), np.uint8))
    rows = pack_window([long], 128, 0, np.random.default_rng(0)).rows
    real = rows.segment_ids > 0
    assert len(real) == 15_625 and real.all()
    np.testing.assert_array_equal(np.sort(rows.tokens[real]), tokens[:-1])
    np.testing.assert_array_equal(rows.targets, rows.tokens + 1)


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
