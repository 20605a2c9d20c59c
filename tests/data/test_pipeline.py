"""The stream: deterministic, exact to resume anywhere, the same for any workers, true to its weights."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from llamax.config import ConfigError, Data, Source, Vision
from llamax.data import pipeline
from llamax.data.encode import Encoder
from llamax.data.pipeline import HeldOut, _means, build, merge, skipped, text_bytes
from llamax.data.sources import open_source, read_manifest, write_arrayrecord
from llamax.data.tokenizer import Tokenizer

VISION = Vision(tile_px=28, max_tiles=4)  # one token a tile
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "red", "circles", "move", "left"]


def text(rng, n):
    return " ".join(rng.choice(WORDS, n))


def picture(rng):
    file = io.BytesIO()
    side = 28 if rng.random() < 0.5 else 56
    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    long = [{"text": f"w{i} " + text(rng, rng.integers(5, 400))} for i in range(150)]
    short = [{"text": f"s{i} " + text(rng, rng.integers(5, 60))} for i in range(100)]
    drawn = [
        {"pieces": [{"image": picture(rng)}, {"text": f"d{i} " + text(rng, rng.integers(3, 30))}]} for i in range(120)
    ]
    for name, records, kind in (("web", long, "text"), ("notes", short, "text"), ("drawings", drawn, "multimodal")):
        write_arrayrecord(folder / f"{name}.arrayrecord", records)
        (folder / f"{name}.toml").write_text(
            f'format = "arrayrecord"\nfiles = ["{name}.arrayrecord"]\nkind = "{kind}"\ndocuments = {len(records)}\n'
        )
    return folder


@pytest.fixture(scope="module")
def tokenizer_path():
    return str(Path(__file__).resolve().parents[2] / "data" / "tokenizer.model")


@pytest.fixture(scope="module")
def config(folder, tokenizer_path):
    weights = dict(web=0.5, notes=0.2, drawings=0.3)
    return Data(
        tokenizer=tokenizer_path,
        seq_len=128,
        batch_tokens=512,
        sources={name: Source(str(folder / f"{name}.toml"), weight) for name, weight in weights.items()},
        multimodal_steps=0.5,
        tiles_per_row=16,
        window_docs=24,
        prefetch_batches=0,
    )


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def same(batches, others):
    for a, b in zip(batches, others, strict=True):
        for name, x, y in zip(a._fields, a, b, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)


def test_the_same_seed_gives_the_same_stream_and_another_seed_another(config):
    first, again, other = (take(iter(build(config, VISION, seed)), 8) for seed in (1, 1, 2))
    same(first, again)
    assert not np.array_equal(first[0].tokens, other[0].tokens)


def test_batches_have_fixed_shapes_and_steps_alternate(config):
    for step, batch in enumerate(take(iter(build(config, VISION, 0)), 6)):
        assert all(x.shape == (4, 128) for x in batch.of_tokens().values())
        assert batch.tiles.shape == (4, 16 if step % 2 else 0, 28, 28, 3) and batch.tiles.dtype == np.uint8
        assert [x.dtype for x in batch[:3]] == [np.int32, np.int32, np.float32]


def test_resume_is_exact_at_every_point(config):
    iterator = iter(build(config, VISION, 3))
    states, batches = [], []
    for _ in range(40):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    rows = {json.loads(state)["text"]["row"] for state in states}
    assert len(rows) > 5  # most of the points lie inside a window
    resumed = iter(build(config, VISION, 3))
    for point in (0, 1, 2, 7, 8, 15, 26, 33, 37):
        resumed.set_state(json.loads(states[point]))
        assert json.dumps(resumed.get_state()) == states[point]
        same(take(resumed, 3), batches[point : point + 3])
    assert max(map(len, states)) < 300  # bytes


@pytest.mark.parametrize(
    ("was", "now", "advice"), [(32, 0, "data.align_tokens=32"), (0, 64, "mesh.context=1"), (32, 64, "align_tokens=32")]
)
def test_a_stream_goes_on_with_the_alignment_that_it_had(config, was, now, advice):
    before, after = (iter(build(dataclasses.replace(config, align_tokens=n), VISION, 3)) for n in (was, now))
    take(before, 3)
    with pytest.raises(ConfigError, match=advice):
        after.set_state(before.get_state())
    again = iter(build(dataclasses.replace(config, align_tokens=was), VISION, 3))
    again.set_state(before.get_state())
    same(take(again, 2), take(before, 2))


def test_a_state_from_before_alignment_is_one_without(config):
    stream = iter(build(config, VISION, 3))
    state = {key: value for key, value in stream.get_state().items() if key != "align_tokens"}
    stream.set_state(state)


def test_prefetching_changes_nothing_but_when(config):
    plain = iter(build(config, VISION, 4))
    ahead = iter(build(dataclasses.replace(config, prefetch_batches=3), VISION, 4))
    for _ in range(5):
        same([next(plain)], [next(ahead)])
        assert plain.get_state() == ahead.get_state()  # of what was taken, not of what lies ready
    state = ahead.get_state()
    following = take(plain, 2)
    take(ahead, 3)
    ahead.set_state(state)
    same(take(ahead, 2), following)
    ahead.close()


def test_loader_processes_change_nothing(config):
    plain = iter(build(config, VISION, 5))
    loaded = iter(build(dataclasses.replace(config, workers=2, prefetch_batches=2), VISION, 5))
    try:
        same(take(plain, 12), take(loaded, 12))
        state = json.loads(json.dumps(plain.get_state()))  # saved without, resumed with them
        assert state == loaded.get_state()
        following = take(plain, 6)
        loaded.set_state(state)
        same(take(loaded, 6), following)
    finally:
        loaded.close()


def share(process, processes):
    return range(4 * process // processes, 4 * (process + 1) // processes)


def joined(iterators):
    """The batch of several processes."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *(next(it) for it in iterators))


@pytest.mark.parametrize("lanes", (1, 2, 4))
def test_any_number_of_processes_reads_the_same_stream_and_goes_on_with_it(config, lanes, monkeypatch):
    monkeypatch.setattr(pipeline, "MIN_WINDOW_ROWS", 2)
    config = dataclasses.replace(config, lanes=lanes, window_docs=4)
    whole = iter(build(config, VISION, 11))
    parts = {n: [iter(build(config, VISION, 11, share(i, n))) for i in range(n)] for n in (2, 4)}
    for _ in range(25):
        batch = next(whole)
        for iterators in parts.values():
            same([joined(iterators)], [batch])
    state = json.loads(json.dumps(whole.get_state()))
    places = [place for place in state.values() if isinstance(place, dict)]
    assert places and all(place["window"] >= lanes for place in places), "past each lane's first"
    for iterators in parts.values():
        assert merge([it.get_state() for it in iterators]) == state
    apart = iter(build(config, VISION, 11, (0, 3)))  # rows that do not stand together
    apart.set_state(state)
    following = take(whole, 6)
    same(take(apart, 6), [jax.tree.map(lambda x: x[[0, 3]], batch) for batch in following])
    for start, (before, now) in {0: (2, 4), 3: (4, 2)}.items():
        saved = merge([it.get_state() for it in parts[before]])
        for it in parts[now]:
            it.set_state(saved)  # of another number of processes
        same([joined(parts[now]) for _ in range(3)], following[start : start + 3])


def test_a_process_reads_the_windows_of_its_lanes_alone(config, monkeypatch):
    """Counted where the work is: documents that are tokenized, their pictures decoded."""
    call, encoded = Encoder.__call__, []

    def counting(self, document):
        encoded.append((self.source_id, document.where))
        return call(self, document)

    monkeypatch.setattr(Encoder, "__call__", counting)
    data = dataclasses.replace(config, lanes=4, window_docs=4)

    def documents(rows):
        iterator = iter(build(data, VISION, 12, rows))
        encoded.clear()  # the sample at the start
        take(iterator, 12)
        return list(encoded)

    whole, halves, quarters = ([documents(share(i, n)) for i in range(n)] for n in (1, 2, 4))
    assert sorted(sum(halves, [])) == sorted(sum(quarters, [])) == sorted(whole[0]), "none twice, none left out"
    assert all(len(part) < 0.4 * len(whole[0]) for part in quarters)
    data = dataclasses.replace(data, lanes=1)
    assert documents(share(3, 4)) == documents(share(0, 1)), "in one lane every process reads all"


@pytest.mark.slow
def test_loader_processes_are_shared_by_lanes(config):
    lanes = dataclasses.replace(config, lanes=2)
    plain, loaded = (iter(build(dataclasses.replace(lanes, workers=workers), VISION, 13)) for workers in (0, 2))
    try:
        same(take(plain, 4), take(loaded, 4))
        assert plain.get_state() == loaded.get_state()
        assert [rows._workers for rows in loaded._rows.values()] == [1, 0, 1, 0]
    finally:
        loaded.close()


def test_the_iterator_goes_through_an_orbax_checkpoint(config, tmp_path):
    iterator = iter(build(config, VISION, 6))
    take(iterator, 7)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        following = take(iterator, 3)
        restored = iter(build(config, VISION, 6))
        manager.restore(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
        same(take(restored, 3), following)


def starts(batches, tokenizer):
    """The first words of the documents that begin in the batches."""
    for batch in batches:
        for b, t in zip(*np.nonzero(batch.tokens == tokenizer.bos), strict=True):
            ids = batch.tokens[b, t + 1 : t + 30]
            yield tokenizer.decode([i for i in ids if i < tokenizer.n_ranks]).split()[0]


def test_an_epoch_holds_every_document_once(config, tokenizer_path):
    tokenizer = Tokenizer(tokenizer_path)
    one = dataclasses.replace(config, sources={"web": config.sources["web"]}, window_docs=25)  # 6 windows an epoch
    iterator, batches = iter(build(one, VISION, 7)), []
    while iterator.get_state()["text"]["window"] < 6:
        batches.append(next(iterator))
    epoch = list(starts(batches, tokenizer))
    ours = epoch[:150] if len(epoch) > 150 else epoch
    assert sorted(set(epoch)) == sorted(f"w{i}" for i in range(150))
    assert len(epoch) - len(set(epoch)) <= 25  # at most the last batch's reach into the next window
    assert ours != sorted(ours)  # shuffled


def test_both_streams_together_repeat_no_document_within_an_epoch(config, tokenizer_path):
    tokenizer = Tokenizer(tokenizer_path)
    batches = take(iter(build(dataclasses.replace(config, window_docs=8), VISION, 8)), 60)
    begun = [name for name in starts(batches, tokenizer) if name.startswith("w")]
    assert {True, False} == {bool(b.tiles.shape[1]) for b in batches if (b.source_ids[b.segment_ids > 0] == 2).any()}
    assert len(begun) > 20 and len(begun) == len(set(begun))


def test_weights_count_tokens_and_hold(config):
    tokens, slots, used = np.zeros(3), 0, 0
    for batch in take(iter(build(dataclasses.replace(config, window_docs=96), VISION, 9)), 600):
        real = batch.segment_ids > 0
        tokens += np.bincount(batch.source_ids[real], minlength=3)
        slots, used = slots + real.size, used + real.sum()
    share = dict(zip(sorted(config.sources), tokens / tokens.sum(), strict=True))
    assert share == pytest.approx(dict(drawings=0.3, notes=0.2, web=0.5), abs=0.02)
    assert used / slots >= 0.95


def test_only_text_has_loss_and_every_patch_has_its_tile(config, tokenizer_path):
    tokenizer = Tokenizer(tokenizer_path)
    special = [tokenizer.image_start, tokenizer.image_end, tokenizer.image, tokenizer.patch]
    special += [tokenizer.tile_x_separator, tokenizer.tile_y_separator]
    for batch in take(iter(build(config, VISION, 10)), 10):
        of_picture = np.isin(batch.targets, special)
        np.testing.assert_array_equal(batch.loss_weights, (batch.segment_ids > 0) & ~of_picture)
        filled = batch.tiles.reshape(*batch.tiles.shape[:2], -1).any(-1).sum(-1) if batch.tiles.shape[1] else 0
        np.testing.assert_array_equal((batch.tokens == tokenizer.patch).sum(-1), filled)


@pytest.fixture
def damaged(config, tmp_path):
    (tmp_path / "good.png").write_bytes(picture(np.random.default_rng(1)))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    records = [{"pieces": [{"image": name}, {"text": "a drawing"}]} for name in ("good.png", "bad.png", "none.png")]
    lines = [json.dumps(record).encode() for record in [*records, {"text": ""}]] + [b'{"text": "\xff"}']
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "data.toml").write_text('format = "jsonl"\nfiles = ["data.jsonl"]\nkind = "multimodal"\n')
    return dataclasses.replace(config, sources={"x": Source(str(tmp_path / "data.toml"))}, window_docs=5)


def test_damaged_documents_are_skipped_and_counted(damaged):
    reasons = ("image_unreadable", "image_missing", "empty", "invalid_utf8")  # one in each epoch of 5 documents

    def counted(iterator):
        state = iterator.get_state()["multimodal"]
        opened = state["window"] + (state["row"] > 0)  # windows of 40 documents: 8 epochs
        assert skipped(iterator, damaged) == {"x": dict.fromkeys(reasons, 8 * opened)}
        return opened

    iterator, resumed = (iter(build(damaged, VISION, 0)) for _ in range(2))
    take(iterator, 2)
    opened = counted(iterator)
    resumed.set_state(iterator.get_state())
    take(resumed, 3)
    assert counted(resumed) > opened > 1


def test_what_several_processes_left_out_is_counted_once(damaged):
    data = dataclasses.replace(damaged, lanes=4)
    whole, *parts = (iter(build(data, VISION, 0, rows)) for rows in (None, share(0, 4), share(1, 2), share(1, 4)))
    for iterator in (whole, *parts):
        take(iterator, 3)
    counts = []
    for iterator in parts:
        skipped(iterator, data, lambda mine: counts.append(mine) or mine)
    assert skipped(parts[0], data, lambda _: np.max(counts, axis=0)) == skipped(whole, data)
    assert skipped(parts[0], data) != skipped(whole, data)


def test_a_stream_of_nothing_stops_with_the_reason(damaged, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": ""}\n{"pieces": [{"image": "none.png"}]}\n')
    with pytest.raises(ConfigError, match="source x .*none of its 2 documents.*a picture's file does not exist"):
        next(iter(build(damaged, VISION, 0)))


def test_pictures_need_a_vision_encoder_and_a_multimodal_manifest(config, tmp_path):
    with pytest.raises(ConfigError, match="vision is None"):
        build(config, None, 0)
    (tmp_path / "data.jsonl").write_text('{"pieces": [{"image": "a.png"}]}\n')
    (tmp_path / "data.toml").write_text('format = "jsonl"\nfiles = ["data.jsonl"]\ntokens = 3\n')
    with pytest.raises(ConfigError, match='a picture in a source whose manifest says kind = "text"'):
        next(iter(build(dataclasses.replace(config, sources={"x": Source(str(tmp_path / "data.toml"))}), VISION, 0)))


def test_held_out_documents_come_once_and_bytes_are_exact(config, folder, tokenizer_path):
    tokenizer = Tokenizer(tokenizer_path)
    held_out = HeldOut(folder / "web.toml", config, VISION)
    batches = list(held_out)
    same(batches, list(held_out))
    assert {batch.tokens.shape for batch in batches} == {(4, 128)} and batches[0].tiles.shape[1] == 0
    assert sorted(starts(batches, tokenizer)) == sorted(f"w{i}" for i in range(150))
    assert sum((batch.targets == tokenizer.eos).sum() for batch in batches) == 150
    rng = np.random.default_rng(0)  # the fixture's own texts again
    n_bytes = sum(len(f"w{i} " + text(rng, rng.integers(5, 400))) for i in range(150))
    assert sum(text_bytes(batch, tokenizer.byte_lengths) for batch in batches).tolist() == [n_bytes]
    few = list(HeldOut(folder / "drawings.toml", config, VISION, max_docs=10, source_id=2))
    assert len(list(starts(few, tokenizer))) == 10 and few[0].tiles.shape[1] == 16
    by_source = sum(text_bytes(batch, tokenizer.byte_lengths, 3) for batch in few)
    assert by_source[2] > 0 and not by_source[:2].any()


def test_held_out_counts_what_it_left_out(damaged):
    held_out = HeldOut(damaged.sources["x"].path, damaged, VISION)
    assert len(list(held_out)) == 1
    assert held_out.skipped == dict(image_unreadable=1, image_missing=1, empty=1, invalid_utf8=1)


def test_stated_tokens_weigh_like_counted_ones(config, folder, tokenizer_path):
    """The manifest's `tokens` are those of the text; framing and pictures are added."""
    tokenizer = Tokenizer(tokenizer_path)
    for name in ("web", "drawings"):
        manifest = read_manifest(folder / f"{name}.toml")
        reader, encoder = open_source(manifest), Encoder(tokenizer_path, VISION)
        texts = [piece for document in reader for piece in document.pieces if isinstance(piece, str)]
        stated = dataclasses.replace(manifest, tokens=sum(len(tokenizer.encode(piece)) for piece in texts))
        true = np.mean([len(encoder(document).tokens) - 1 for document in reader])
        assert _means(stated, reader, encoder).tokens == pytest.approx(true, rel=0.02)
        assert _means(manifest, reader, encoder).tokens == pytest.approx(true, rel=0.1)
