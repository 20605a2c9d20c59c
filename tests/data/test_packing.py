"""Packing: every pair of token and target once, nothing of one document in another's segment, full rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llamax.data.encode import Encoded
from llamax.data.packing import collate, fit, pack_window, split

BOS, EOS, START, END, PATCH, FIRST_TEXT = 1, 2, 3, 4, 5, 10
P = 2  # pixels of a tile


def document(layout, source_id=0, seed=0, skip=""):
    """An Encoded from a list of text lengths (int) and pictures ([tiles]); text tokens are drawn, tiles too."""
    rng = np.random.default_rng([*np.ravel(seed), len(layout)])
    tokens, pictures, tiles = [BOS], [], []
    for part in layout:
        if isinstance(part, int):
            tokens += rng.integers(FIRST_TEXT, 10_000, part).tolist()
        else:
            block = [START, *[PATCH] * part[0], END]
            pictures.append((len(tokens), len(tokens) + len(block), part[0]))
            tiles.append(rng.integers(1, 256, (part[0], P, P, 3), np.uint8))
            tokens += block
    spans = np.array(pictures, np.int32).reshape(-1, 3)
    stacked = np.concatenate(tiles) if tiles else np.zeros((0, P, P, 3), np.uint8)
    return Encoded(source_id, np.array([*tokens, EOS], np.int32), spans, stacked, skip)


def random_documents(seed, n, multimodal):
    """Lengths as of web text (log-normal), and one to four pictures of one or five tiles."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        layout = [int(length) for length in np.exp(rng.normal(4, 1, 1 + rng.integers(1, 5))).astype(int) + 1]
        if multimodal:
            layout = list(
                itertools.chain(*zip(layout, ([int(k)] for k in rng.choice([1, 5], len(layout))), strict=True))
            )
        yield document(layout, source_id=i % 3, seed=(seed, i))


def pack(documents, seq_len=128, tiles=8, seed=0, align=0):
    return pack_window(list(documents), seq_len, tiles, np.random.default_rng(seed), align=align)


def segments(window):
    """Each segment of each row as (tokens, targets, weights, positions, source ids, tiles)."""
    rows = window.rows
    tiles_end = np.cumsum(window.tile_counts)
    for r in range(len(rows.tokens)):
        tile = tiles_end[r] - window.tile_counts[r]
        for segment in range(1, rows.segment_ids[r].max() + 1):
            here = rows.segment_ids[r] == segment
            n = int((rows.tokens[r][here] == PATCH).sum())
            yield [x[r][here] for x in rows[:3] + rows[4:6]] + [rows.tiles[tile : tile + n]]
            tile += n
        assert tile == tiles_end[r]


def slow_pairs(documents):
    """All (source, token, target, weight) by the definition, one document at a time."""
    for d in documents:
        inside = {i for begin, stop, _ in d.pictures.tolist() for i in range(begin, stop)}
        for i in range(len(d.tokens) - 1):
            yield d.source_id, int(d.tokens[i]), int(d.tokens[i + 1]), 0.0 if i + 1 in inside else 1.0


@pytest.mark.parametrize(("multimodal", "align"), [(False, 0), (True, 0), (False, 32), (True, 16)])
def test_every_pair_and_every_tile_lands_exactly_once(multimodal, align):
    documents = list(random_documents(1, 60, multimodal))
    window = pack(documents, align=align)
    found, tiles = [], []
    for tokens, targets, weights, positions, sources, own_tiles in segments(window):
        found += zip(sources.tolist(), tokens.tolist(), targets.tolist(), weights.tolist(), strict=True)
        tiles += [tile.tobytes() for tile in own_tiles]
        np.testing.assert_array_equal(positions, np.arange(len(positions)))
        np.testing.assert_array_equal(tokens[1:], targets[:-1])
    assert sorted(found) == sorted(slow_pairs(documents))
    assert sorted(tiles) == sorted(tile.tobytes() for d in documents for tile in d.tiles)
    assert not window.skipped


def test_rows_keep_their_capacity_and_padding_is_blank():
    window = pack(random_documents(2, 60, True))
    rows = window.rows
    assert rows.tokens.shape[1] == 128 and window.tile_counts.max() <= 8
    padding = rows.segment_ids == 0
    assert not any(x[padding].any() for x in rows.of_tokens().values())
    for ids in rows.segment_ids:  # segments are 1, 2, ... in order, then padding
        used = ids[ids > 0]
        assert np.all(np.diff(used) >= 0) and set(used.tolist()) == set(range(1, used.max() + 1))
        assert not ids[len(used) :].any()


@pytest.mark.parametrize(("align", "chunk"), [(16, 16), (32, 32), (64, 16), (128, 32)])
def test_no_chunk_of_a_document_lies_in_two_stripes(align, chunk):
    rows = pack(random_documents(2, 120, True), align=align).rows
    stripe = np.arange(128) // align
    stripes_of: dict[tuple, set] = {}
    for (r, t), segment in np.ndenumerate(rows.segment_ids):
        if segment:
            stripes_of.setdefault((r, segment, rows.positions[r, t] // chunk), set()).add(stripe[t])
    assert all(len(found) == 1 for found in stripes_of.values())
    longest = max(rows.positions.ravel())
    assert longest > align or align == 128, "a document that goes over several stripes"
    for r, ids in enumerate(rows.segment_ids):  # in row order, each without a gap
        starts = [int(np.argmax(ids == segment)) for segment in range(1, ids.max() + 1)]
        assert starts == sorted(starts)
        for segment, start in enumerate(starts, start=1):
            n = int((ids == segment).sum())
            np.testing.assert_array_equal(rows.positions[r, start : start + n], np.arange(n))


def slow_fit(pieces, seq_len, tiles_per_row):
    """Best fit by the definition, where rows are whole: the largest piece first, into the row that it fills most."""
    rows = []
    for piece in sorted(pieces, key=lambda p: -max(p.n_tokens / seq_len, p.n_tiles / max(tiles_per_row, 1))):
        left = {
            i: seq_len - sum(p.n_tokens for p in row) - piece.n_tokens
            for i, row in enumerate(rows)
            if sum(p.n_tiles for p in row) + piece.n_tiles <= tiles_per_row
        }
        left = {i: n for i, n in left.items() if n >= 0}
        if not left:
            rows.append([])
            left = {len(rows) - 1: 0}
        rows[min(left, key=left.get)].append(piece)
    return rows


@pytest.mark.parametrize("multimodal", [False, True])
def test_whole_rows_are_packed_best_fit_and_without_gaps(multimodal):
    pieces = [piece for d in random_documents(6, 200, multimodal) for piece in split(d, 128, 8)]
    rows, expected = fit(pieces, 128, 8, 128), slow_fit(pieces, 128, 8)
    assert [[piece for _, piece in row] for row in rows] == expected
    assert [[t for t, _ in row] for row in rows] == [
        list(itertools.accumulate([p.n_tokens for p in row[:-1]], initial=0)) for row in expected
    ]


def test_a_long_text_goes_on_in_other_rows_with_its_true_targets():
    long = document([300])
    pieces = split(long, 128, 0)
    assert [(p.start, p.end) for p in pieces] == [(0, 128), (128, 256), (256, 301)]
    (row,) = [tokens_targets for tokens_targets in segments(pack([long], tiles=0)) if tokens_targets[0][0] == BOS]
    assert row[1][-1] == long.tokens[128]  # the last target of a cut is the next piece's first token


def test_no_cut_inside_a_picture():
    for text in range(1, 140):
        whole = document([text, [5], 3, [5], 100, [8]])
        pieces = split(whole, 128, 8)
        assert [p.start for p in pieces] == [0, *(p.end for p in pieces[:-1])]  # no gap, no overlap
        assert pieces[-1].end == len(whole.tokens) - 1 and pieces[-1].last_tile == 18
        for piece in pieces:
            patches = (whole.tokens[piece.start : piece.end] == PATCH).sum()
            assert piece.n_tiles == patches <= 8 and piece.n_tokens <= 128
            for begin, stop, _ in whole.pictures.tolist():
                assert stop <= piece.start or begin >= piece.end or (piece.start <= begin and stop <= piece.end)


def test_what_cannot_be_packed_is_counted():
    documents = [
        document([5]),
        document([3, [9], 3], source_id=1),
        document([1], 2, skip="empty"),
        document([[200]], 1),
    ]
    window = pack(documents)
    assert window.skipped == {"1/image_too_large": 2, "2/empty": 1}
    assert window.rows.tokens.shape == (1, 128) and (window.rows.segment_ids == 1).sum() == 6
    nothing = pack(documents[1:])
    assert nothing.rows.tokens.shape == (0, 128) and nothing.tile_counts.shape == (0,)


def test_changing_one_document_changes_no_bit_of_the_others():
    documents = list(random_documents(3, 40, True))
    before = pack(documents)
    changed = documents[7]
    other = changed._replace(
        tokens=np.where(changed.tokens >= FIRST_TEXT, changed.tokens + 1, changed.tokens), tiles=255 - changed.tiles
    )
    after = pack([*documents[:7], other, *documents[8:]])
    differ = 0
    for a, b in zip(segments(before), segments(after), strict=True):
        same = all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        differ += not same
        if not same:
            ours = other.tokens.tobytes()
            assert b[0].tobytes() in ours and b[1].tobytes() in ours
    assert 1 <= differ <= len(split(changed, 128, 8))


def test_rows_are_shuffled_by_the_windows_number_alone():
    documents = list(random_documents(4, 40, False))
    first, again, other = pack(documents, seed=1), pack(documents, seed=1), pack(documents, seed=2)
    np.testing.assert_array_equal(first.rows.tokens, again.rows.tokens)
    assert not np.array_equal(first.rows.tokens, other.rows.tokens)
    assert sorted(map(bytes, first.rows.tokens)) == sorted(map(bytes, other.rows.tokens))


@pytest.mark.parametrize(
    ("multimodal", "seq_len", "align", "least"),
    [
        (False, 512, 0, 0.98),
        (True, 512, 0, 0.96),
        (False, 512, 64, 0.9),
        (False, 2048, 512, 0.95),
        (True, 2048, 512, 0.93),
    ],
)
def test_rows_are_full(multimodal, seq_len, align, least):
    """Where tokens are what runs out first; the slots of tiles are another matter (next test)."""
    window = pack(random_documents(5, 256, multimodal), seq_len=seq_len, tiles=seq_len // 8, align=align)
    assert (window.rows.segment_ids > 0).mean() >= least


def test_tile_slots_are_full_where_they_run_out_first():
    captions = [document([[5 if i % 3 else 1], 10 + i % 20], seed=i) for i in range(256)]
    window = pack(captions, seq_len=512, tiles=16)
    assert window.tile_counts.mean() / 16 >= 0.95


def test_a_target_weighs_what_its_document_says():
    """A slow twin, pair by pair, over cuts, pictures and documents that say nothing."""
    for align in (0, 32):
        documents = list(random_documents(5, 30, multimodal=True))
        rng = np.random.default_rng(0)
        weighed = [
            d._replace(weights=rng.choice([0, 0.5, 1, 3], len(d.tokens)).astype(np.float32)) if i % 3 else d
            for i, d in enumerate(documents)
        ]
        expected, found = [], []
        for d in weighed:
            for i in range(len(d.tokens) - 1):
                of_picture = any(begin <= i + 1 < end for begin, end, _ in d.pictures)
                weight = 1.0 if d.weights is None else float(d.weights[i + 1])
                expected.append((int(d.tokens[i]), int(d.tokens[i + 1]), 0.0 if of_picture else weight))
        for tokens, targets, weights, *_ in segments(pack(weighed, align=align)):
            found += zip(tokens.tolist(), targets.tolist(), weights.tolist(), strict=True)
        assert sorted(found) == sorted(expected)


def test_collate_takes_rows_of_several_windows_and_pads():
    first, second = pack(random_documents(7, 5, True)), pack(random_documents(8, 5, False))
    last = len(first.tile_counts) - 1
    batch = collate([(first, last), (second, 0)], 3, 128, (8, P))
    assert batch.tiles.shape == (3, 8, P, P, 3)
    for mine, a, b in zip(*(x.of_tokens().values() for x in (batch, first.rows, second.rows)), strict=True):
        np.testing.assert_array_equal(mine[0], a[last])
        np.testing.assert_array_equal(mine[1], b[0])
        assert not mine[2].any()
    n = first.tile_counts[last]
    assert n > 0
    np.testing.assert_array_equal(batch.tiles[0, :n], first.rows.tiles[-n:])
    assert not batch.tiles[0, n:].any() and not batch.tiles[1:].any()
