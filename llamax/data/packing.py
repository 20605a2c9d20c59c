"""Documents become rows of exactly seq_len tokens, a window of documents at a time.

A document of L framed tokens t_0 .. t_{L-1} gives the L - 1 pairs (token t_i, target t_{i+1}); every pair lands in one
row exactly once. A document with more pairs than a row is cut into pieces: each piece is a segment of its own, whose
positions restart at 0, but whose last target is still the true next token. No cut falls inside a picture's tokens. The
pieces go into rows best fit first: largest piece first, into the row that it fills most. A row holds at most seq_len
tokens and `tiles_per_row` picture tiles; what is left over is padding. At last the window's rows are shuffled.

A conversation is one piece, and so is a comparison, whose two conversations are two segments of it, one behind the
other. The comparisons of a row are numbered 1, 2, ... (`sides`), and there are at most so many in it.

Loss weights are 1, but 0 on padding and where the target is one of a picture's tokens: only text is learnt. A document
may say what else each of its tokens weighs (`Encoded.weights`): of a conversation, only what the assistant says is
learnt, of a task mostly the answers.

A window is held in memory, so there is a most that it may hold. A document that would go beyond it is left out and
counted, and smaller ones behind it are still taken.

Where rows are split over devices (stripes.py), a piece that fits into a stripe lies inside one, and any other begins at
one: then no chunk of a document, one of which begins every C tokens of it, lies in two stripes, which are whole chunks.
What that leaves free stands between the documents, as padding. Each segment of a comparison obeys that by itself.

What comes out depends on the window's documents and its number alone. Letters: R rows, T = seq_len, P tile pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from llamax.batch import COMPARING, MISMATCHED, Batch
from llamax.data.encoded import Encoded
from llamax.data.mismatch import is_labelled, with_mismatches


class Room(NamedTuple):
    """The most that a window may hold: what goes beyond is left out."""

    places: int  # of rows
    tile_bytes: int


# A window is whole in memory while it is packed and while its rows are used. A place of a row is 24 bytes and the token
# in it 4 more: 1.8 GiB, and less than twice that where much is padding. The largest text of a single document is a
# quarter of it, and a row of 10 million tokens a seventh. Tiles are there twice while they are sorted into rows: 4 GiB.
# 256 pictures of 16 tiles of 336 pixels and a global one are 1.4 GiB.
ROOM = Room(places=2**26, tile_bytes=2**31)


class Piece(NamedTuple):
    """The pairs [start, end) of a document and its tiles [first_tile, last_tile)."""

    document: Encoded
    start: int
    end: int
    first_tile: int
    last_tile: int
    second_at: int = 0  # of a comparison: where its second segment begins, counted from the piece's first place

    @property
    def segments(self) -> list[tuple[int, int, int]]:
        """(first place in the piece, first pair, one past the last pair) of each."""
        if not self.second_at:
            return [(0, self.start, self.end)]
        second = self.document.second
        return [(0, self.start, second - 1), (self.second_at, second, self.end)]

    @property
    def n_tokens(self) -> int:
        """The places that it takes."""
        at, start, end = self.segments[-1]
        return at + end - start

    @property
    def n_tiles(self) -> int:
        return self.last_tile - self.first_tile


class Window(NamedTuple):
    """Rows of one window; `rows.tiles` is flat, [all tiles, P, P, 3], row after row."""

    rows: Batch  # arrays [R, T]
    tile_counts: np.ndarray  # int32 [R]: tiles of each row
    skipped: dict[str, int]  # "source id/reason" -> documents left out
    first_skipped: dict[str, str]  # the same keys -> record and file of the first of them
    taken: np.ndarray  # int32: the documents in the rows, by their number in the window
    cut: dict[str, int]  # "source id/key of sources.CUTS" -> documents in the rows that were cut to fit


def split(document: Encoded, seq_len: int, tiles_per_row: int, stripe: int = 0) -> list[Piece] | None:
    """Cuts a document into pieces that fit a row; None if one of its pictures alone does not, or it is never cut."""
    if document.whole:
        piece = _whole(document, stripe or seq_len)
        return [piece] if piece.n_tokens <= seq_len and piece.n_tiles <= tiles_per_row else None
    pieces: list[Piece] = []
    start = end = first = last = 0  # the open piece
    for begin, stop, n_tiles in [*document.pictures.tolist(), (len(document.tokens) - 1,) * 2 + (0,)]:
        if stop - begin > seq_len or n_tiles > tiles_per_row:
            return None
        while begin - start > seq_len:  # the text before the picture runs past the row
            pieces.append(Piece(document, start, start + seq_len, first, last))
            start, first = start + seq_len, last
        end = begin
        if stop - start > seq_len or last + n_tiles - first > tiles_per_row:  # the picture opens a new piece
            if end > start:
                pieces.append(Piece(document, start, end, first, last))
            start, first = end, last
        end, last = stop, last + n_tiles
    if end > start:
        pieces.append(Piece(document, start, end, first, last))
    return pieces


def _whole(document: Encoded, stripe: int) -> Piece:
    """A document in one piece. A segment that fits into a stripe lies inside one, and any other begins at one, as the
    first does where the piece itself is longer than a stripe."""
    piece = Piece(document, 0, len(document.tokens) - 1, 0, len(document.tiles))
    if not document.second:
        return piece
    first, second = document.second - 1, piece.end - document.second
    free = -first % stripe  # behind the first segment, in its last stripe
    return piece._replace(second_at=first if second <= free or first + second <= stripe else first + free)


def fit(
    pieces: Sequence[Piece], seq_len: int, tiles_per_row: int, stripe: int, comparisons: int = 0
) -> list[list[tuple[int, Piece]]]:
    """Best-fit decreasing: rows as lists of (first place, piece), each row within its capacities.

    A piece that does not fit into a stripe of `stripe` tokens begins at one; any other lies inside one.
    """
    n = seq_len // stripe
    free = np.full((len(pieces), n), stripe)  # at the end of each stripe, of every row that could be opened
    free_tiles = np.full(len(pieces), tiles_per_row)
    free_comparisons = np.full(len(pieces), comparisons)
    rows: list[list[tuple[int, Piece]]] = []
    shares = [-max(piece.n_tokens / seq_len, piece.n_tiles / max(tiles_per_row, 1)) for piece in pieces]
    first = 0  # rows before it are full; without this a document of many rows takes time as their square
    for i in np.lexsort((shares, [piece.n_tokens <= stripe for piece in pieces])):  # long ones first
        piece, opened = pieces[i], len(rows)
        while first < opened and not free[first].any():
            first += 1
        open_rows = free[first:opened]
        if piece.n_tokens > stripe:  # behind the other long ones
            left = (np.sum(open_rows == stripe, 1, keepdims=True) * stripe) - piece.n_tokens
        else:
            left = open_rows - piece.n_tokens
        compares = piece.document.sides is not None
        full = (free_tiles[first:opened] < piece.n_tiles) | (free_comparisons[first:opened] < compares)
        left[(left < 0) | full[:, None]] = seq_len + 1
        row, at = opened, 0
        if left.size and left.min() <= seq_len:
            row, at = np.unravel_index(left.argmin(), left.shape)
            row = first + int(row)
            if piece.n_tokens > stripe:
                at = n - int(np.sum(free[row] == stripe))
        if row == opened:
            rows.append([])
        start = (int(at) + 1) * stripe - int(free[row, at])
        end = start + piece.n_tokens
        last = (end - 1) // stripe
        free[row, int(at) : last] = 0
        free[row, last] = (last + 1) * stripe - end
        free_tiles[row] -= piece.n_tiles
        free_comparisons[row] -= compares
        rows[row].append((start, piece))
    return [sorted(row, key=lambda placed: placed[0]) for row in rows]


def places(
    n_tokens: float, n_tiles: float, compared: float, seq_len: int, tiles_per_row: int, comparisons: int
) -> float:
    """Places of rows that so much takes: its tokens, or more where what a row may hold of tiles or of comparisons runs
    out before them."""
    return max(n_tokens, n_tiles * seq_len / max(tiles_per_row, 1), compared * seq_len / max(comparisons, 1))


def pack_window(
    documents: Iterable[Encoded],
    seq_len: int,
    tiles_per_row: int,
    rng: np.random.Generator,
    room: Room = ROOM,
    align: int = 0,
    comparisons: int = 0,
    lacking: Collection[str] = COMPARING,
    mismatched: bool = False,
) -> Window:
    """Packs the documents of a window; `rng` shuffles the rows. `align`: the tokens of a stripe, 0 for the whole row.
    `comparisons`: at most so many in a row. `lacking`: what the batches have not got. `mismatched`: labelled answers
    have a mismatched one beside them (mismatch.py), where a row holds both.

    Documents with `skip` and those for which there is no room are counted and left out. The documents may be an
    iterator that encodes them as they are asked for: no more than the window may hold are held at once.
    """
    skipped: Counter[str] = Counter()
    first_skipped: dict[str, str] = {}
    cuts: Counter[str] = Counter()
    pieces: list[Piece] = []
    taken: list[int] = []
    n_places = n_tile_bytes = 0.0
    for number, document in enumerate(documents):
        cut = None if document.skip else split(document, seq_len, tiles_per_row, align)
        reason = document.skip or (("too_long" if document.whole else "image_too_large") if cut is None else "")
        of_a_row = seq_len, tiles_per_row, comparisons
        twice = 1 + (mismatched and is_labelled(document))
        size = twice * len(document.tokens), twice * len(document.tiles), document.sides is not None
        its_places = places(*size, *of_a_row)
        full = n_places + its_places > room.places or n_tile_bytes + document.tiles.nbytes > room.tile_bytes
        if reason := reason or ("window_full" if full else ""):
            key = f"{document.source_id}/{reason}"
            skipped[key] += 1
            first_skipped.setdefault(key, document.where)
            continue
        pieces += cut or []
        cuts.update([f"{document.source_id}/{document.cut}"] if document.cut else [])
        taken.append(number)
        n_places, n_tile_bytes = n_places + its_places, n_tile_bytes + document.tiles.nbytes
    if mismatched:
        pieces = _mismatched(pieces, seq_len, tiles_per_row, align)
    rows = fit(pieces, seq_len, tiles_per_row, align or seq_len, comparisons)
    rows = [rows[i] for i in rng.permutation(len(rows))]
    batch = _blank(len(rows), seq_len, lacking=lacking)
    for r, row in enumerate(rows):
        segment = compared = 0
        for t, piece in row:
            compared += piece.document.sides is not None
            for at, start, end in piece.segments:
                segment += 1
                _place(piece, start, end, batch, r, t + at, segment, compared)
    placed = [piece for row in rows for _, piece in row if piece.n_tiles]
    tiles = [piece.document.tiles[piece.first_tile : piece.last_tile] for piece in placed]
    counts = np.array([sum(piece.n_tiles for _, piece in row) for row in rows], np.int32)
    flat = np.concatenate(tiles) if tiles else batch.tiles
    numbers = np.array(taken, np.int32)
    return Window(batch._replace(tiles=flat), counts, dict(skipped), first_skipped, numbers, dict(cuts))


def _mismatched(pieces: Sequence[Piece], seq_len: int, tiles_per_row: int, stripe: int) -> list[Piece]:
    """The pieces; of a labelled answer with its mismatched one, where both fit into a row."""
    documents = with_mismatches([piece.document for piece in pieces])
    return [
        piece if document is piece.document else (split(document, seq_len, tiles_per_row, stripe) or [piece])[0]
        for piece, document in zip(pieces, documents, strict=True)
    ]


def _blank(
    rows: int, seq_len: int, tiles: tuple[int, ...] = (0, 0, 0, 3), lacking: Collection[str] = COMPARING
) -> Batch:
    """A Batch of nothing but padding."""
    floats, there = ("loss_weights", "ref_logp", "margins"), set(Batch._fields) - {"tiles", *lacking}
    arrays = {name: np.zeros((rows, seq_len), np.float32 if name in floats else np.int32) for name in there}
    return Batch(**arrays, tiles=np.zeros(tiles, np.uint8))


def _place(piece: Piece, start: int, end: int, batch: Batch, r: int, t: int, segment: int, compared: int) -> None:
    """Writes the pairs [start, end) of a piece's document, a segment, into row r from place t on. `compared`: the
    number of the comparison in the row, if it is one."""
    document, n = piece.document, end - start
    where, targets = slice(t, t + n), slice(start + 1, end + 1)
    weights = np.ones(n, np.float32)  # of the targets, which stand one further on
    if document.weights is not None:
        weights[:] = document.weights[targets]
    for begin, stop, _ in document.pictures:
        weights[max(0, begin - 1 - start) : max(0, stop - 1 - start)] = 0
    batch.tokens[r, where] = document.tokens[start:end]
    batch.targets[r, where] = document.tokens[targets]
    batch.loss_weights[r, where] = weights
    batch.segment_ids[r, where] = segment
    batch.positions[r, where] = np.arange(n)
    batch.source_ids[r, where] = document.source_id
    if document.sides is None:
        return
    assert batch.sides is not None and batch.margins is not None, "batches of a run without comparisons"
    sides = document.sides[targets]
    batch.sides[r, where] = np.where(sides > MISMATCHED, MISMATCHED + compared, sides * compared)
    batch.margins[r, where] = np.where(sides != 0, document.margin, 0)
    if batch.ref_logp is not None:
        assert document.ref_logp is not None, f"no reference for {document.where}"
        batch.ref_logp[r, where] = np.where(sides != 0, document.ref_logp[targets], 0)


def collate(rows: Sequence[tuple[Window, int]], n_rows: int, seq_len: int, tiles: tuple[int, int]) -> Batch:
    """Rows (window, number in it) to a Batch of `n_rows`, padded with empty rows. `tiles` is (slots a row, pixels)."""
    batch = _blank(n_rows, seq_len, (n_rows, tiles[0], tiles[1], tiles[1], 3), rows[0][0].rows.lacking())
    for b, (window, r) in enumerate(rows):
        theirs = window.rows.of_tokens()
        for name, mine in batch.of_tokens().items():
            mine[b] = theirs[name][r]
        first = int(window.tile_counts[:r].sum())
        n = int(window.tile_counts[r])
        if n:
            batch.tiles[b, :n] = window.rows.tiles[first : first + n]
    return batch
