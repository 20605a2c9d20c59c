"""A document becomes token ids and picture tiles: `<|begin_of_text|>` pieces `<|end_of_text|>`, or a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llamax.config import Data, Vision
from llamax.data import referenced
from llamax.data.document import Document
from llamax.data.encoded import ENDLESS, LEARNT, Encoded, Row, check_size, picture_blocks
from llamax.data.images import PictureError
from llamax.data.talk_encode import How, Unfit, encode_talk
from llamax.data.tokenizer import Tokenizer, shared


class Encoder:
    """Encodes the documents of one source; `where` names it in errors. Of conversations, `row` says what they have to
    fit into and `learnt` whose messages are."""

    def __init__(
        self,
        tokenizer: str | Path,
        vision: Vision | None,
        source_id: int = 0,
        where: str = "",
        video_frames: int = Data.video_frames,
        row: Row = ENDLESS,
        learnt: Sequence[str] = LEARNT,
    ):
        self.tokenizer_path, self.vision, self.source_id, self.where = str(tokenizer), vision, source_id, where
        self.video_frames, self.row, self.learnt = video_frames, row, tuple(learnt)

    @property
    def tokenizer(self) -> Tokenizer:
        return shared(self.tokenizer_path)

    def __call__(self, document: Document) -> Encoded:
        """What cannot be trained on has `skip`: a picture where there is no vision encoder, too."""
        if document.skip:
            return self._skipped(document.skip, document)
        if document.talk:
            return self._of_talk(document)
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
                    check_size(tile_bytes)
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

    def _of_talk(self, document: Document) -> Encoded:
        how = How(self.tokenizer, self.vision, self.video_frames, self.row, self.learnt, self.source_id)
        try:
            encoded = encode_talk(document.talk, how)._replace(where=document.where)
        except Unfit as error:
            return self._skipped(error.reason, document._replace(detail=error.detail))
        return encoded if document.ref_logp is None else referenced.put(encoded, document.ref_logp)

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
