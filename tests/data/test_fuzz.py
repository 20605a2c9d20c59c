"""Bad data never hurts: every hostile record is left out and counted, or refused with its file and number.

Nothing else may come of it: no other exception, no wrong token, target, loss weight or tile, no memory without bound.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax.config import ConfigError, Data, Source
from llamax.data import sources
from llamax.data.encode import Encoded, Encoder
from llamax.data.images import PictureError, open_image, tile_image, to_rgb
from llamax.data.pipeline import build, skipped, tile_slots
from llamax.data.sources import SKIP_REASONS, open_source, read_manifest
from llamax.data.tokenizer import Tokenizer
from llamax.data.video import read_frames
from tests.data import hostile
from tests.data.hostile import DECODED, MISSING, PICTURES, SPECIAL_TEXT
from tests.fuzz import quick, thorough
from tests.runs import tiny_run

RUN = tiny_run()
VISION, SEQ_LEN, ROWS = RUN.model.vision, 128, 2
TOKENIZER = Tokenizer(RUN.data.tokenizer)
OF_PICTURES = [TOKENIZER.special(name) for name in ("image_start", "image_end", "image", "patch")]
OF_PICTURES += [TOKENIZER.tile_x_separator, TOKENIZER.tile_y_separator]

TEXTS = {
    "special": SPECIAL_TEXT,
    "special broken up": "<|patch|" + ">" * 3 + SPECIAL_TEXT[::-1],
    "NUL": "a\0b\0\0c",
    "controls": "".join(map(chr, range(1, 32))) + "\x7f\x85\u2028\u202e\ufeff",
    "private": "\ue000\U000f0000\uffff\U0010ffff",
    "combining": "e" + "\u0301" * 900,
    "one word": "x" * 3000,
    "a blank run": "a" + " \t\u3000" * 500 + "b",
    "emoji": "👩‍👩‍👧‍👦🇩🇪" * 40,
    "new lines": "\r\n\n\r" * 200 + ".",
}


def refused(error: ConfigError) -> str:
    """The message of a refusal that has its three parts, each on one line."""
    for part in (error.asked, error.true, error.change):
        assert part.strip() and "\n" not in part
    return str(error)


# ------------------------------------------------------------------------------------------------------- one picture


def outcome(data: bytes | Path, video: bool = False) -> tuple[str, list]:
    """(reason to skip, ()) or ("", frames) of a picture, whose tiles are what the model's sizes ask for."""
    try:
        frames = read_frames(data) if video else [to_rgb(open_image(data))]
    except PictureError as error:
        assert error.reason in SKIP_REASONS
        return error.reason, []
    for frame in frames:
        tiles, (rows, cols) = tile_image(frame, VISION)
        assert frame.mode == "RGB" and tiles.dtype == np.uint8
        assert tiles.shape == (rows * cols + (rows * cols > 1), VISION.tile_px, VISION.tile_px, 3)
        assert 1 <= rows * cols <= VISION.max_tiles
    return DECODED, frames


ORIGINALS = {
    **dict.fromkeys(("good", "jpeg", "webp", "cmyk", "still as clip"), hostile.drawing),
    **dict.fromkeys(("alpha", "alpha webp"), lambda: hostile.drawing(mode="RGBA")),
    "grey and alpha": lambda: hostile.drawing(mode="LA"),
    "palette": lambda: hostile.drawing().quantize(16),
    "palette and alpha": lambda: hostile.drawing(mode="RGBA").quantize(16),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_each_hostile_picture_is_decoded_rightly_or_left_out_with_its_reason(kind):
    about = PICTURES[kind]
    reason, frames = outcome(hostile.picture(kind), about.video)
    assert reason in about.outcomes
    if reason:
        return
    assert len(frames) <= Data.video_frames
    if about.size:
        assert {frame.size for frame in frames} == {about.size}
    if kind in ORIGINALS:  # over white where it is transparent
        rgba = np.asarray(ORIGINALS[kind]().convert("RGBA"), float)
        true = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
        off = np.abs(np.asarray(frames[0], float) - true)
        assert off.mean() < 25 if kind in ("jpeg", "webp", "alpha webp", "cmyk") else off.max() <= 1
    if kind == "16-bit":
        assert np.asarray(frames[0])[..., 0].ravel()[[0, 1199]].tolist() == [0, 1199 * 54 // 257]


def test_pictures_that_are_no_files(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "good.png").write_bytes(hostile.picture("good"))
    names = {"none.png": MISSING, "folder": "image_unreadable", "loop": "image_unreadable", "good.png": DECODED}
    names |= {"x" * 5000: "image_unreadable", "a\0b": "image_unreadable", "a\ud800b": "image_unreadable"}
    for name, reason in names.items():
        assert outcome(tmp_path / name)[0] == reason, name[:20]
    os.mkfifo(tmp_path / "pipe")
    assert outcome(tmp_path / "pipe")[0] == "image_unreadable"  # and is not waited for


def damage_a_picture(kind: str, seed: int, video: bool) -> None:
    reason, _ = outcome(hostile.damaged(hostile.picture(kind), seed), video)
    assert reason in (*hostile.ANY,)


SEEDS = st.integers(0, 2**32 - 1)
DAMAGED = given(st.sampled_from(sorted(PICTURES)), SEEDS, st.booleans())
test_damaged_pictures = quick(200)(DAMAGED(damage_a_picture))
test_many_damaged_pictures = pytest.mark.slow(thorough(1500)(DAMAGED(damage_a_picture)))


# ------------------------------------------------------------------------------------------------------ whole streams


class Record(NamedTuple):
    """A record as it is written, and what may come of it."""

    line: bytes  # JSON or msgpack
    texts: str = ""  # all of its text, which comes out unchanged
    outcomes: tuple[str, ...] = (DECODED,)
    picture: bytes = b""
    video: bool = False


def write_record(form: str, folder: Path, number: int, kind: str, seed: int) -> Record:
    """The record of a kind; its texts say whose they are."""

    def packed(record) -> bytes:
        return json.dumps(record).encode() if form == "jsonl" else msgpack.packb(record)

    name = f"record {number} of kind {kind}: "
    if kind in TEXTS:
        return Record(packed({"text": name + TEXTS[kind]}), name + TEXTS[kind])
    if kind == "good text":
        text = name + " ".join(map(str, np.random.default_rng(seed).integers(0, 9999, 5 + seed % 150)))
        return Record(packed({"text": text, "id": number, "meta": {"n": number}}), text)
    if kind == "empty":
        return Record(packed({"pieces": [{"text": " \u2003\n"}, {"text": ""}]}), outcomes=("empty",))
    if kind == "no UTF-8":
        line = b'{"text": "\xc3("}' if form == "jsonl" else b"\x81\xa4text\xa2\xc3("
        return Record(line, outcomes=("invalid_utf8",))
    if kind == "surrogate":
        line = b'{"text": "a \\ud83d b"}' if form == "jsonl" else b"\x81\xa4text\xa3\xed\xa0\xbd"
        return Record(line, outcomes=("invalid_utf8",))
    if kind == "malformed":
        wrong = [
            {"txt": name},
            [name],
            {"text": 3},
            {"pieces": [{"text": name, "image": "x"}]},
            {"meta": 1, "text": "a"},
        ]
        return Record(packed(wrong[seed % len(wrong)]), outcomes=("malformed",))
    if kind == "garbage":
        wrong = [b"{", b'{"text": 1e', b"[" * 100_000, b"9" * 5000]
        if form == "arrayrecord":
            wrong = [
                b"",
                b"\xc1",
                b"\x91" * 100_000,
                b"\xdd\xff\xff\xff\xff",
                b"\xc7\x08\xff" + b"\xff" * 8,
                b"\x90\x90",
            ]
        return Record(wrong[seed % len(wrong)], outcomes=("malformed",))
    if kind == "missing picture":
        piece = {"image": "none.png"} if form == "jsonl" else {"image": b""}
        return Record(packed({"pieces": [piece, {"text": name}]}), outcomes=(MISSING, "image_unreadable"))
    broken = kind.startswith("damaged ")
    kind = kind.removeprefix("damaged ")
    data, about = hostile.picture(kind), PICTURES[kind]
    if kind == "good" and not broken:  # unlike any other, so that an exchanged one shows
        data = hostile.noise(number, seed)
    if broken:
        data = hostile.damaged(data, seed)
    if form == "jsonl":
        (folder / f"{number}.bin").write_bytes(data)
    piece = {"video" if about.video else "image": f"{number}.bin" if form == "jsonl" else data}
    # "image_too_large" cannot come: the largest picture fits a row of this model.
    outcomes = hostile.ANY if broken else about.outcomes
    after = "" if kind == "good" and seed % 2 else SPECIAL_TEXT  # short, for several to come into a row
    line = packed({"pieces": [{"text": name}, piece, {"text": after}]})
    return Record(line, name + after, outcomes, data, about.video)


BAD_TEXT = ["empty", "no UTF-8", "surrogate"]
CHEAP = sorted(set(PICTURES) - {"20,000 tall", "20,000 wide", "clip of 300 frames", "clip bomb of few frames"})
PICTURE_KINDS = [*CHEAP, *(f"damaged {kind}" for kind in ("good", "jpeg", "webp", "palette", "gif clip"))]
KIND = st.one_of(
    st.just("good text"),
    st.just("good"),
    st.sampled_from(sorted(TEXTS)),
    st.sampled_from(BAD_TEXT),
    st.sampled_from(["malformed", "garbage"]),
    st.sampled_from(PICTURE_KINDS),
    st.sampled_from(["missing picture", "damaged good", "damaged jpeg", "damaged webp", "20,000 tall"]),
)
RECORDS = st.lists(st.tuples(KIND, SEEDS), min_size=1, max_size=7)
SAYS_TEXT = st.integers(0, 7).map(lambda n: n == 0)  # the manifest, whatever the records are
FORM = st.sampled_from(["jsonl", "arrayrecord"])


def write_raw(form: str, path: Path, lines: list[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    if form == "jsonl":
        path.write_bytes(b"\n".join(lines) + b"\n")
        return
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for line in lines:
        writer.write(line)
    writer.close()


def write_source(form: str, folder: Path, name: str, kinds, says_text: bool = False) -> list[Record]:
    """Files and manifest of a source; only those with pictures are multimodal, and not even those if it `says_text`."""
    (folder / name).mkdir()
    records = [write_record(form, folder / name, i, kind, seed) for i, (kind, seed) in enumerate(kinds)]
    write_raw(form, folder / name / "shard", [record.line for record in records])
    pictures = any(kind.removeprefix("damaged ") in PICTURES or "picture" in kind for kind, _ in kinds)
    about = f'format = "{form}"\nfiles = ["shard"]\ndocuments = {len(records)}\n'
    (folder / name / "x.toml").write_text(about + 'kind = "multimodal"\n' * (pictures and not says_text))
    if not says_text:
        return records
    has_picture = [kind.removeprefix("damaged ") in PICTURES or "picture" in kind for kind, _ in kinds]
    unread = Record(b"", outcomes=("unexpected_picture",))
    return [unread if has else record for has, record in zip(has_picture, records, strict=True)]


def settings_of(folder: Path, weights: dict[str, float], **others) -> Data:
    plain = dict(
        tokenizer=RUN.data.tokenizer,
        seq_len=SEQ_LEN,
        batch_tokens=ROWS * SEQ_LEN,
        sources={name: Source(str(folder / name / "x.toml"), weight) for name, weight in weights.items()},
        multimodal_steps=0.9,
        tiles_per_row=6,
        window_docs=4,
        prefetch_batches=0,
    )
    return Data(**(plain | others))


def check_batch(batch, n_sources: int) -> None:
    """Everything that is promised of a batch, whatever the documents are."""
    assert batch.tokens.shape == (ROWS, SEQ_LEN) and batch.tiles.shape[1] in (0, 6)
    for ids in (batch.tokens, batch.targets):
        assert ids.min() >= 0 and ids.max() < TOKENIZER.vocab_size
    assert batch.source_ids.min() >= 0 and batch.source_ids.max() < n_sources
    real, of_picture = batch.segment_ids > 0, np.isin(batch.targets, OF_PICTURES)
    np.testing.assert_array_equal(batch.loss_weights, (real & ~of_picture).astype(np.float32))
    for name in ("tokens", "targets", "positions", "source_ids"):
        assert not getattr(batch, name)[~real].any()
    for b in range(ROWS):
        n = real[b].sum()
        assert real[b, :n].all()  # padding comes last
        if n == 0:
            continue
        segments, starts = np.unique(batch.segment_ids[b, :n], return_index=True)
        assert segments.tolist() == list(range(1, len(segments) + 1))
        for start, end in zip(starts, [*starts[1:], n], strict=True):
            np.testing.assert_array_equal(batch.positions[b, start:end], np.arange(end - start))
            np.testing.assert_array_equal(batch.targets[b, start : end - 1], batch.tokens[b, start + 1 : end])
            assert len(np.unique(batch.source_ids[b, start:end])) == 1
        patches = int((batch.tokens[b] == TOKENIZER.patch).sum())
        n_tiles, rest = divmod(patches, VISION.tokens_per_tile)
        assert rest == 0 and n_tiles <= batch.tiles.shape[1] and not batch.tiles[b, n_tiles:].any()
        pictures = (batch.tokens[b] == TOKENIZER.image).sum()
        assert pictures == (batch.tokens[b] == TOKENIZER.image_start).sum() <= max(n_tiles, 0)


def pieces_of(batch):
    """(source, the segment's tokens and its last target, its tiles) of every segment."""
    for b in range(ROWS):
        n_tiles = 0
        for segment in range(1, batch.segment_ids[b].max() + 1):
            at = np.flatnonzero(batch.segment_ids[b] == segment)
            ids = [*batch.tokens[b, at].tolist(), int(batch.targets[b, at[-1]])]
            first, n_tiles = n_tiles, n_tiles + ids[:-1].count(TOKENIZER.patch) // VISION.tokens_per_tile
            yield int(batch.source_ids[b, at[0]]), ids, batch.tiles[b, first:n_tiles]


def check_text(batch, texts: list[set[bytes]]) -> int:
    """Number of whole documents in a batch; each has the text of a record, and a piece of one a part of such a text."""
    whole = 0
    for source, ids, _ in pieces_of(batch):
        text = TOKENIZER.decode_bytes([i for i in ids if i < TOKENIZER.n_ranks])
        specials = {i for i in ids if i >= TOKENIZER.n_ranks}
        assert specials <= {TOKENIZER.bos, TOKENIZER.eos, *OF_PICTURES}
        assert TOKENIZER.bos not in ids[1:] and TOKENIZER.eos not in ids[:-1]
        if ids[0] == TOKENIZER.bos and ids[-1] == TOKENIZER.eos:
            assert text in texts[source]
            whole += 1
        else:
            assert any(text in candidate for candidate in texts[source])
    return whole


def tiles_of(record: Record) -> np.ndarray:
    """The tiles of a record's picture, decoded by itself."""
    frames = read_frames(record.picture) if record.video else [to_rgb(open_image(record.picture))]
    return np.concatenate([tile_image(frame, VISION)[0] for frame in frames])


def check_tiles(batch, alone: list[list[Encoded]]) -> int:
    """Number of pieces with tiles in a batch. Each piece, tokens and pixels, is a part of one document encoded alone.

    `alone`: the good documents, by source.
    """
    seen = 0
    for source, ids, tiles in pieces_of(batch):
        if len(tiles):
            ours = np.array(ids, np.int32).tobytes()
            assert any(has_piece(document, ours, tiles) for document in alone[source])
            seen += 1
    return seen


def has_piece(document: Encoded, ids: bytes, tiles: np.ndarray) -> bool:
    """Whether a document has these tokens, int32, with these tiles to them."""
    tokens, at = document.tokens.tobytes(), -1
    while (at := tokens.find(ids, at + 1)) >= 0:
        before = (document.tokens[: at // 4] == TOKENIZER.patch).sum() // VISION.tokens_per_tile
        if at % 4 == 0 and np.array_equal(document.tiles[before : before + len(tiles)], tiles):
            return True
    return False


OUTCOMES: Counter[str] = Counter()  # what came of the cases, for the curious: run with `-s`


@pytest.fixture(scope="module", autouse=True)
def tally():
    yield
    print("\noutcomes:", dict(OUTCOMES))


def run_a_stream(form: str, sources: list[list], says_text: bool, weights: list[float], batches: int = 3) -> None:
    """Writes the sources, reads the stream and judges all that comes out."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = [f"s{i}" for i in range(len(sources))]
        says = [says_text, *(False for _ in sources[1:])]
        records = [write_source(form, folder, *of) for of in zip(names, sources, says, strict=True)]
        data = settings_of(folder, dict(zip(names, weights, strict=False)))
        try:
            iterator = iter(build(data, VISION, 0))
            taken = [next(iterator) for _ in range(batches)]
            counts = skipped(iterator, data)
            iterator.close()
        except ConfigError as error:
            judge_refusal(refused(error), folder, names, records, weights)
            return
        OUTCOMES["stream"] += 1
        texts = [{r.texts.encode() for r in of} for of in records]
        alone = judge_each_document(data, records)
        for batch in taken:
            check_batch(batch, len(names))
            check_text(batch, texts)
            OUTCOMES["pieces with pictures"] += check_tiles(batch, alone)
        for source, of in counts.items():
            allowed = {reason for r in records[names.index(source)] for reason in r.outcomes} - {DECODED}
            assert set(of) <= allowed
            OUTCOMES.update(f"left out: {reason}" for reason in of)


def judge_refusal(message: str, folder: Path, names, records, weights) -> None:
    """A refusal names a source that has nothing, or says what is wrong about the weights; never a single record."""
    named = re.search(rf"record (\d+) of {re.escape(str(folder))}/(s\d)/shard", message)
    if "can be used" in message:
        name = re.match(r"data source (s\d)", message)[1]
        assert all(set(r.outcomes) != {DECODED} for r in records[names.index(name)])
        assert named and named[2] == name
        OUTCOMES["refused: nothing usable"] += 1
    else:
        assert "weigh" in message or "weights" in message, message
        OUTCOMES["refused: weights"] += 1


def judge_each_document(data: Data, records: list[list[Record]]) -> list[list[Encoded]]:
    """Every record by itself: its outcome is one that its kind allows, its text is whole and its picture its own.

    Returns the good documents, by source.
    """
    good: list[list[Encoded]] = []
    for (_, source), of in zip(sorted(data.sources.items()), records, strict=True):
        good.append([])
        if not source.weight:
            continue
        manifest = read_manifest(source.path)
        encode = Encoder(data.tokenizer, VISION if manifest.kind == "multimodal" else None)
        for number, (document, record) in enumerate(zip(open_source(manifest), of, strict=True)):
            got = encode(document)
            assert got.skip in record.outcomes
            where = f"record {number} of {manifest.files[0]}"
            assert got.where == (where + f" ({document.detail})" if got.skip == "malformed" else where)
            if not got.skip:
                ids = got.tokens[got.tokens < TOKENIZER.n_ranks]
                assert TOKENIZER.decode(ids) == record.texts
                assert (got.tokens == TOKENIZER.patch).sum() == len(got.tiles) * VISION.tokens_per_tile
                if record.picture or len(got.tiles):
                    np.testing.assert_array_equal(got.tiles, tiles_of(record))
                good[-1].append(got)
    return good


WEIGHTS = st.lists(st.sampled_from([1.0, 1.0, 3.0, 0.0]), min_size=2, max_size=2)


def one_source(form, kinds, says_text) -> None:
    run_a_stream(form, [kinds], says_text, [1.0])


def two_sources(form, kinds, others, says_text, weights) -> None:
    run_a_stream(form, [kinds, others], says_text, weights)


test_a_stream_of_one_source = quick(150)(given(FORM, RECORDS, SAYS_TEXT)(one_source))
test_a_stream_of_two_sources = quick(100)(given(FORM, RECORDS, RECORDS, SAYS_TEXT, WEIGHTS)(two_sources))
test_many_streams = pytest.mark.slow(thorough(400)(given(FORM, RECORDS, RECORDS, SAYS_TEXT, WEIGHTS)(two_sources)))


@pytest.mark.parametrize("form", ["jsonl", "arrayrecord"])
def test_pictures_stay_with_their_documents_where_rows_hold_several(tmp_path, form):
    bad = ["malformed", "missing picture", "truncated png", "garbage"]
    kinds = [(bad[i // 5 % len(bad)] if i % 5 == 2 else "good", 2 * i + 1) for i in range(50)]
    data = settings_of(tmp_path, {"s0": 1.0})
    records = write_source(form, tmp_path, "s0", kinds)
    (alone,) = judge_each_document(data, [records])
    assert len(alone) == 40 and len({document.tiles.tobytes() for document in alone}) == 40
    iterator, several, seen = iter(build(data, VISION, 0)), 0, set()
    while len(seen) < 40:
        batch = next(iterator)
        check_batch(batch, 1)
        several += sum((row == TOKENIZER.image).sum() > 1 for row in batch.tokens)
        assert check_tiles(batch, [alone])
        seen |= {tiles.tobytes() for _, _, tiles in pieces_of(batch) if len(tiles)} & {d.tiles.tobytes() for d in alone}
    assert several > 5


# --------------------------------------------------------------------------------------------- damaged files, manifests


def damage_a_shard(form: str, kinds: list, cut: float, flips: list[float], stated: bool) -> None:
    """A shard that is cut short or has bits turned: its documents come out whole, or it is refused by its name."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (records,) = [write_source(form, folder, "s0", kinds)]
        shard, manifest = folder / "s0" / "shard", folder / "s0" / "x.toml"
        if not stated:
            manifest.write_text(re.sub("documents.*\n", "", manifest.read_text()))
        data = bytearray(shard.read_bytes())
        for at in flips:
            data[int(at * (len(data) - 1))] ^= 16
        settings = settings_of(folder, {"s0": 1.0})
        (alone,) = judge_each_document(settings, [records])
        shard.write_bytes(data[: int(cut * len(data))])
        try:
            iterator = iter(build(settings, VISION, 0))
            batches = [next(iterator) for _ in range(2)]
            iterator.close()
        except ConfigError as error:
            message = refused(error)
            assert str(folder / "s0") in message  # the shard, a record of it, or the manifest that counts its documents
            OUTCOMES["refused: shard"] += 1
            return
        OUTCOMES["shard read"] += 1
        for batch in batches:
            check_batch(batch, 1)
            if form == "arrayrecord":  # has checksums; in JSONL, another text is a text
                check_text(batch, [{record.texts.encode() for record in records}])
                check_tiles(batch, [alone])


FRACTION = st.floats(0, 1)
CUT = st.one_of(st.just(1.0), FRACTION)
SHARDS = given(FORM, RECORDS, CUT, st.lists(FRACTION, max_size=2), st.booleans())
test_damaged_shards = quick(60)(SHARDS(damage_a_shard))
test_many_damaged_shards = pytest.mark.slow(thorough(500)(SHARDS(damage_a_shard)))

TOML_VALUES = [
    *('"jsonl"', '"arrayrecord"', '"text"', '"multimodal"', '["shard"]', '["*"]', '["**/*"]', '["folder"]', '["loop"]'),
    *(
        '["[", "]["]',
        '["a\\u0000b*"]',
        '["\\u0000"]',
        '["../../../*"]',
        '[""]',
        "[3]",
        "[[]]",
        "[]",
        '["/"]',
        "{}",
        "0",
    ),
    *(
        "-1",
        "1e400",
        "nan",
        "true",
        "9" * 30,
        "9" * 5000,
        "0x" + "f" * 900,
        "1979-05-27",
        '"\\ud800"',
        '"' + "x" * 9000,
    ),
    *('["' + "x" * 9000 + '"]', "[" * 3000, "'''a\nb'''", "{a = 1}", "{shard = 3}", "4", '"\u202e"', "", "=", "\0"),
]
KEYS = ["format", "files", "kind", "lang", "documents", "bytes", "tokens", "sha256", "token", "", "path", "a.b.c"]


def damage_a_manifest(changes: list[tuple[str, str]], at: float, byte: int | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_source("jsonl", folder, "s0", [("good text", 1), ("special", 1)])
        (folder / "s0" / "folder").mkdir()
        (folder / "s0" / "loop").symlink_to("loop")
        lines = {"format": '"jsonl"', "files": '["shard"]'} | dict(changes)
        text = "".join(f"{key} = {value}\n" for key, value in lines.items()).encode()
        if byte is not None:
            text = text[: int(at * len(text))] + bytes([byte]) + text[int(at * len(text)) :]
        (folder / "s0" / "x.toml").write_bytes(text)
        data = settings_of(folder, {"s0": 1.0})
        try:
            iterator = iter(build(data, VISION, 0))
            tile_slots(data)
            batch = next(iterator)
        except ConfigError as error:
            assert "x.toml" in refused(error) or str(folder) in str(error) or "weights" in str(error)
            assert len(str(error)) < 2000
            OUTCOMES["refused: manifest"] += 1
            return
        check_batch(batch, 1)
        OUTCOMES["manifest read"] += 1


CHANGES = st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(TOML_VALUES)), max_size=3)
MANIFESTS = given(CHANGES, FRACTION, st.one_of(st.none(), st.none(), st.integers(0, 255)))
test_damaged_manifests = quick(90)(MANIFESTS(damage_a_manifest))
test_many_damaged_manifests = pytest.mark.slow(thorough(1000)(MANIFESTS(damage_a_manifest)))


def test_manifests_that_are_no_files(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    (tmp_path / "latin.toml").write_bytes('description = "é"'.encode("latin-1"))
    (tmp_path / "huge.toml").write_bytes(b"#" * (sources.MAX_MANIFEST_BYTES + 1))
    for name in (
        "folder.toml",
        "loop.toml",
        "latin.toml",
        "huge.toml",
        "x" * 5000 + ".toml",
        "a\0b.toml",
        "\ud800.toml",
    ):
        with pytest.raises(ConfigError) as error:
            read_manifest(tmp_path / name)
        refused(error.value)
