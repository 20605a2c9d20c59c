"""A document becomes token ids and picture tiles: `<|begin_of_text|>` pieces `<|end_of_text|>`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamax.config import Data, Vision
from llamax.data.images import PictureError, image_tokens, open_image, tile_image, to_rgb
from llamax.data.sources import Document, Picture
from llamax.data.tokenizer import Tokenizer, shared
from llamax.data.video import each_frame

MAX_TILE_BYTES = 2**29  # of one document's tiles, pixel for pixel


class Encoded(NamedTuple):
    """A document as the packer takes it. L tokens, n tiles, P pixels along a tile's side."""

    source_id: int
    tokens: np.ndarray  # int32 [L], framed
    pictures: np.ndarray  # int32 [pictures, 3]: first token, one past the last token, number of tiles
    tiles: np.ndarray  # uint8 [n, P, P, 3], in the order of the patch tokens
    skip: str = ""  # a key of sources.SKIP_REASONS; then L = 0
    where: str = ""  # the document's record and file, and what is wrong with it
    weights: np.ndarray | None = None  # float32 [L]: of the tokens as targets in the loss; None: 1 for all text


def picture_blocks(
    picture: Picture, vision: Vision, tokenizer: Tokenizer, video_frames: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """(tiles uint8 [n, P, P, 3], token ids) of a picture, or of every frame that is kept of a clip. PictureError."""
    frames = each_frame(picture.data, video_frames) if picture.video else [to_rgb(open_image(picture.data))]
    for frame in frames:
        tiles, (rows, cols) = tile_image(frame, vision)
        yield tiles, image_tokens(rows, cols, vision, tokenizer)


class Encoder:
    """Encodes the documents of one source; `where` names it in errors."""

    def __init__(
        self,
        tokenizer: str | Path,
        vision: Vision | None,
        source_id: int = 0,
        where: str = "",
        video_frames: int = Data.video_frames,
    ):
        self.tokenizer_path, self.vision, self.source_id, self.where = str(tokenizer), vision, source_id, where
        self.video_frames = video_frames

    @property
    def tokenizer(self) -> Tokenizer:
        return shared(self.tokenizer_path)

    def __call__(self, document: Document) -> Encoded:
        """What cannot be trained on has `skip`: a picture where there is no vision encoder, too."""
        if document.skip:
            return self._skipped(document.skip, document)
        ids, pictures, tiles = [self._ids([self.tokenizer.bos])], [], []
        begins: list[int] = []  # of each piece
        length, tile_bytes = 1, 0
        for piece in document.pieces:
            begins.append(length)
            if isinstance(piece, str):
                ids.append(self.tokenizer.encode_array(piece))
                length += len(ids[-1])
                continue
            if self.vision is None:
                return self._skipped("unexpected_picture", document)
            try:
                for picture_tiles, block in picture_blocks(piece, self.vision, self.tokenizer, self.video_frames):
                    pictures.append((length, length + len(block), len(picture_tiles)))
                    tiles.append(picture_tiles)
                    ids.append(self._ids(block))
                    length, tile_bytes = length + len(block), tile_bytes + picture_tiles.nbytes
                    if tile_bytes > MAX_TILE_BYTES:
                        return self._skipped("too_large", document)
            except PictureError as error:
                return self._skipped(error.reason, document)
        ids.append(self._ids([self.tokenizer.eos]))
        spans = np.array(pictures, np.int32).reshape(-1, 3)
        encoded = Encoded(self.source_id, np.concatenate(ids), spans, self._stack(tiles), where=document.where)
        if not document.weights:
            return encoded
        # The end of the text weighs as what it ends; its beginning is never a target.
        lengths = np.diff([0, *begins, length + 1])
        return encoded._replace(weights=np.repeat(np.array([1, *document.weights], np.float32), lengths))

    @staticmethod
    def _ids(ids: list[int]) -> np.ndarray:
        return np.array(ids, np.int32)

    def _skipped(self, reason: str, document: Document) -> Encoded:
        nothing = np.zeros(0, np.int32), np.zeros((0, 3), np.int32), self._stack([])
        where = f"{document.where} ({document.detail})" if document.detail else document.where
        return Encoded(self.source_id, *nothing, reason, where)

    def _stack(self, tiles: list[np.ndarray]) -> np.ndarray:
        P = self.vision.tile_px if self.vision else 0
        return np.concatenate(tiles) if tiles else np.zeros((0, P, P, 3), np.uint8)
