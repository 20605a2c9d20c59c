"""The tokenizers of Llama 1 and 2: SentencePiece's BPE over characters, as Hugging Face's `tokenizer.json` has it.

A text gets a space before it, spaces are written as U+2581, characters are merged over the whole text, and what is no
token falls back to its bytes, `<0x0A>`. That is another algorithm than ranks of bytes, so the `tokenizers` library does
it. Decoding gives the text with the space before it: where a text continues another, the space belongs to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llamax.config import ConfigError

SPACE = "\u2581"


class SentenceBpe:
    """What Tokenizer takes of a `tiktoken.Encoding`, for such a file."""

    def __init__(self, path: str | Path):
        asked = f"tokenizer file {path}"
        try:
            import tokenizers
        except ImportError:
            true = "it is of Llama 1's and 2's kind, which the `tokenizers` library reads, and that is not installed"
            raise ConfigError(asked, true, "Install it: pip install tokenizers.") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library's own errors are bare Exceptions
            raise ConfigError(asked, f"it is no tokenizer.json: {error}", "Copy the file again.") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.specials = {token.content: number for number, token in sorted(added.items()) if token.special}
        ids = {number: token for token, number in self._tokenizer.get_vocab().items()}
        special_ids = set(self.specials.values())
        self._written = [  # special tokens as they are written, ids that are none as nothing
            self._bytes(ids.get(i, ""), i in special_ids) for i in range(max(ids) + 1)
        ]
        self.lengths = [0 if i in special_ids else len(written) for i, written in enumerate(self._written)]

    @staticmethod
    def _bytes(token: str, special: bool) -> bytes:
        if not special and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.encode() if special else token.replace(SPACE, " ").encode()

    def encode_to_numpy(self, text: str, *, allowed_special, disallowed_special=()) -> np.ndarray:
        self._tokenizer.encode_special_tokens = not allowed_special  # true: their texts are plain text
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._written[i] for i in ids)
