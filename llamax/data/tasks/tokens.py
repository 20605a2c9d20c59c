"""How many tokens a piece takes, and which words are one token: what a task needs of the run's tokenizer."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from llamax.config import Vision
from llamax.data.document import Picture
from llamax.data.images import choose_canvas, image_tokens, open_image
from llamax.data.tokenizer import Tokenizer, shared

WORD = re.compile(rb" [a-z]{3,10}")


@dataclass(frozen=True)
class Tokens:
    """A tokenizer file, and how pictures are tiled (None: as the schema's default does). Made anew by each process."""

    path: str
    vision: Vision | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return shared(self.path)

    def count(self, *pieces: str | Picture) -> int:
        """Tokens of pieces, each encoded on its own, as the encoder does it."""
        return sum(len(self.tokenizer.encode_array(p)) if isinstance(p, str) else self._picture(p) for p in pieces)

    def _picture(self, picture: Picture) -> int:
        width, height = open_image(picture.data).size
        vision = self.vision or Vision()
        rows, cols = choose_canvas(height, width, vision.tile_px, vision.max_tiles)
        return len(image_tokens(rows, cols, vision, self.tokenizer))

    @property
    def words(self) -> tuple[str, ...]:
        """The words of 3 to 10 small letters that are one token where a space stands before them."""
        return _words(self.path)


@functools.cache
def _words(path: str) -> tuple[str, ...]:
    tokenizer = shared(path)
    spelt = (tokenizer.decode_bytes([i]) for i in range(tokenizer.n_ranks))
    return tuple(sorted(token[1:].decode() for token in spelt if WORD.fullmatch(token)))
