"""Text to token ids and back: byte-level BPE over tiktoken, with Llama 4's split of text and special tokens.

A tokenizer file holds one "base64-bytes rank" line per BPE token (tiktoken's format). A file of n ranks gets its
special tokens at ids n, n + 1, ...: Llama 4's own table of 2,048 when n is Llama 4's 200,000, otherwise 128, which are
the functional ones of that table in its order and then reserved ones. Nothing is ever fetched.

Source: Llama 4's tokenizer (split regex, special ids, guards against very long runs).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken

from llamax.config import ConfigError

LLAMA4_RANKS = 200_000
N_SMALL_SPECIALS = 128

_LETTER_RUN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
)
_CAPITAL_RUN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
)
SPLIT = "|".join(
    (
        _LETTER_RUN,
        _CAPITAL_RUN,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# The regex engine's stack grows with a run's length, so long texts are cut first (the same cuts as Llama 4's).
MAX_PIECE_CHARS = 400_000
MAX_RUN_CHARS = 25_000  # of whitespace, or of anything else
_RUN = re.compile(r"\s+|\S+")


def _numbered(stem: str, first: int, last: int) -> list[str]:
    return [f"{stem}_{i}" for i in range(first, last + 1)]


_LLAMA4_SPECIALS = [
    *("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"),
    *("header_start", "header_end", "eom", "eot", "step"),
    *_numbered("text_post_train_reserved_special_token", 0, 5),
    *("python_start", "python_end", "finetune_right_pad"),
    *_numbered("text_post_train_reserved_special_token", 8, 68),  # numbers 6 and 7 do not exist
    *("image_start", "image_end"),
    *_numbered("vision_reserved_special_token", 0, 1),
    *("tile_x_separator", "tile_y_separator"),
    *_numbered("vision_reserved_special_token", 2, 5),
    *("image", "vision_reserved_special_token_6", "patch"),
    *_numbered("vision_reserved_special_token", 7, 1047),
    *_numbered("reasoning_reserved_special_token", 0, 7),
    *("reasoning_thinking_start", "reasoning_thinking_end"),
    *_numbered("reserved_special_token", 0, 903),
]


def special_tokens(n_ranks: int) -> dict[str, int]:
    """The special tokens of a file with `n_ranks` ranks, written `<|name|>`, and their ids (n_ranks and up)."""
    names = _LLAMA4_SPECIALS
    if n_ranks != LLAMA4_RANKS:
        functional = [name for name in _LLAMA4_SPECIALS if "reserved" not in name]
        names = functional + _numbered("reserved_special_token", 0, N_SMALL_SPECIALS - len(functional) - 1)
    return {f"<|{name}|>": n_ranks + i for i, name in enumerate(names)}


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Token bytes -> rank of a tiktoken file. ConfigError if the file is missing or is no such file."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"tokenizer file {path}",
            "there is no such file",
            "Set config.data.tokenizer to a file in tiktoken's format, or make one with `llamax data tokenizer`.",
        )
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ConfigError(
                f"tokenizer file {path}",
                f"line {number} is not 'base64 rank' but {line[:40]!r}",
                "Give a file in tiktoken's format.",
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise ConfigError(
            f"tokenizer file {path}",
            f"its {len(ranks)} tokens do not have the ranks 0, 1, 2, ... or lack some of the 256 single bytes",
            "The file is cut short or damaged: copy it again, or make one with `llamax data tokenizer`.",
        )
    return ranks


def write_ranks(ranks: dict[bytes, int], path: str | Path) -> None:
    """Writes token bytes -> rank in tiktoken's file format, by rising rank."""
    lines = (base64.b64encode(token) + f" {rank}\n".encode() for token, rank in sorted(ranks.items(), key=_by_rank))
    Path(path).write_bytes(b"".join(lines))


def _by_rank(item: tuple[bytes, int]) -> int:
    return item[1]


def _pieces(text: str) -> Iterator[str]:
    """The text cut where a piece reaches MAX_PIECE_CHARS, or a run of (non-)whitespace MAX_RUN_CHARS."""
    for start in range(0, len(text), MAX_PIECE_CHARS):
        piece = text[start : start + MAX_PIECE_CHARS]
        begin = 0
        for run in _RUN.finditer(piece) if len(piece) > MAX_RUN_CHARS else ():
            for cut in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
                yield piece[begin:cut]
                begin = cut
        yield piece[begin:]


class Tokenizer:
    """A tokenizer file in memory. Ids below `n_ranks` are BPE tokens, the rest are special tokens."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        ranks = read_ranks(path)
        self.n_ranks = len(ranks)
        self.specials = special_tokens(self.n_ranks)  # "<|name|>" -> id
        self._encoding = tiktoken.Encoding(
            self.path.name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=self.specials
        )
        self.byte_lengths = np.zeros(self.vocab_size, np.int32)  # bytes of text that a token stands for; specials 0
        self.byte_lengths[list(ranks.values())] = [len(token) for token in ranks]

    @property
    def vocab_size(self) -> int:
        return self.n_ranks + len(self.specials)

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Ids of a text, without begin or end tokens.

        A text that spells a special token gets ordinary ids, unless `specials` allows it to stand for the token.
        """
        return self.encode_array(text, specials=specials).tolist()

    def encode_array(self, text: str, *, specials: bool = False) -> np.ndarray:
        """`encode` as int32 [L]: a list of Python's numbers takes ten times the memory, which counts in long texts."""
        allowed = "all" if specials else set()
        pieces = [
            self._encoding.encode_to_numpy(piece, allowed_special=allowed, disallowed_special=()).astype(np.int32)
            for piece in _pieces(text)
        ]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes([int(i) for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids; special tokens as `<|name|>`, bytes that are no UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def special(self, name: str) -> int:
        """Id of a special token by its name without the marks: special("eot")."""
        return self.specials[f"<|{name}|>"]

    @property
    def bos(self) -> int:
        return self.special("begin_of_text")

    @property
    def eos(self) -> int:
        return self.special("end_of_text")

    @property
    def eom(self) -> int:
        return self.special("eom")

    @property
    def eot(self) -> int:
        return self.special("eot")

    @property
    def pad(self) -> int:
        return self.special("finetune_right_pad")

    @property
    def stop(self) -> frozenset[int]:
        """The ids that end a generation."""
        return frozenset((self.eos, self.eom, self.eot))

    @property
    def image_start(self) -> int:
        return self.special("image_start")

    @property
    def image_end(self) -> int:
        return self.special("image_end")

    @property
    def image(self) -> int:
        """Precedes the patches of a picture's only or global tile."""
        return self.special("image")

    @property
    def patch(self) -> int:
        """Every one is replaced by a feature of the vision encoder."""
        return self.special("patch")

    @property
    def tile_x_separator(self) -> int:
        return self.special("tile_x_separator")

    @property
    def tile_y_separator(self) -> int:
        return self.special("tile_y_separator")
