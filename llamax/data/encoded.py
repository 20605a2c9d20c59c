"""A document as token ids and tiles, and the row that it has to fit into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llamax import config
from llamax.config import Vision
from llamax.data.document import Picture
from llamax.data.images import PictureError, image_tokens, open_image, tile_image, to_rgb
from llamax.data.tokenizer import Tokenizer
from llamax.data.video import each_frame

MAX_TILE_BYTES = 2**29  # of one document's tiles, pixel for pixel
LEARNT = ("assistant",)  # roles whose messages are learnt


class Encoded(NamedTuple):
    """A document as the packer takes it. L tokens, n tiles, P pixels along a tile's side.

    Text is cut into as many pieces as it needs. A conversation is `whole`, and of a comparison two of them stand one
    behind the other: prompt and chosen answer, then, from token `second` on, prompt and rejected answer.
    """

    source_id: int
    tokens: np.ndarray  # int32 [L], framed
    pictures: np.ndarray  # int32 [pictures, 3]: first token, one past the last token, number of tiles
    tiles: np.ndarray  # uint8 [n, P, P, 3], in the order of the patch tokens
    skip: str = ""  # a key of sources.SKIP_REASONS; then L = 0
    where: str = ""  # the document's record and file, and what is wrong with it
    weights: np.ndarray | None = None  # float32 [L]: of the tokens as targets in the loss; None: 1 for all text
    whole: bool = False  # never cut by the packer
    cut: str = ""  # a key of sources.CUTS: how it was made to fit into a row
    second: int = 0  # the first token of the second segment; 0: there is one segment
    sides: np.ndarray | None = None  # int32 [L]: 1 for tokens of the chosen answer, -1 of the rejected one,
    #                                  MISMATCHED + 1 of another prompt's, 0 for all else
    margin: float = 0.0
    answer: int = 0  # the first token of what a comparison's first segment answers to its prompt
    ref_logp: np.ndarray | None = None  # float32 [L]: what a reference gives the tokens, where sides != 0


class Row(NamedTuple):
    """What a row holds, for documents that have to fit into one, and what is done with those that do not."""

    seq_len: int = 2**62
    tiles: int = 2**62
    stripe: int = 0  # tokens; 0: the whole row
    too_long: str = "skip"  # skip, or a key of sources.CUTS
    comparisons: int = 1
    compare_marks: bool = True


ENDLESS = Row()


def row_of(data: config.Data, vision: Vision | None) -> Row:
    """The row of a run, for a source with pictures (`vision`) or without."""
    tiles = data.tiles_per_row if vision else 0
    return Row(data.seq_len, tiles, data.align_tokens, data.too_long, data.comparisons_per_row, data.compare_marks)


def joined(parts: Sequence[Encoded]) -> Encoded:
    """Parts one behind the other."""
    starts = np.cumsum([0, *(len(part.tokens) for part in parts[:-1])])
    moved = [part.pictures + np.array([n, n, 0]) for part, n in zip(parts, starts, strict=True)]
    return parts[0]._replace(
        tokens=np.concatenate([part.tokens for part in parts]),
        pictures=np.concatenate(moved).astype(np.int32),
        tiles=np.concatenate([part.tiles for part in parts]),
        weights=np.concatenate([weights_of(part) for part in parts]),
    )


def shortened(encoded: Encoded, most: int) -> Encoded:
    """Its first `most` tokens, fewer if a picture would be cut."""
    for begin, end, _ in encoded.pictures.tolist():
        if begin < most < end:
            most = begin
    kept = encoded.pictures[encoded.pictures[:, 1] <= most]
    return encoded._replace(
        tokens=encoded.tokens[:most],
        pictures=kept,
        tiles=encoded.tiles[: int(kept[:, 2].sum())],
        weights=weights_of(encoded)[:most],
    )


def weights_of(encoded: Encoded) -> np.ndarray:
    assert encoded.weights is not None, "a conversation's tokens all have weights"
    return encoded.weights


def picture_blocks(
    picture: Picture, vision: Vision, tokenizer: Tokenizer, video_frames: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """(tiles uint8 [n, P, P, 3], token ids) of a picture, or of every frame that is kept of a clip. PictureError."""
    frames = each_frame(picture.data, video_frames) if picture.video else [to_rgb(open_image(picture.data))]
    for frame in frames:
        tiles, (rows, cols) = tile_image(frame, vision)
        yield tiles, image_tokens(rows, cols, vision, tokenizer)


def check_size(tile_bytes: int) -> None:
    """PictureError for more bytes of tiles than one document may have."""
    if tile_bytes > MAX_TILE_BYTES:
        raise PictureError("too_large", f"the tiles of its pictures take more than {MAX_TILE_BYTES} bytes")
