"""Text to token ids and back: byte-level BPE over tiktoken, with the split of text and special tokens of its model.

A tokenizer file is one of two. tiktoken's format holds one "base64-bytes rank" line per BPE token and nothing else, so
the number of its ranks n says the rest. Its special tokens have the ids n, n + 1, ...:

    n = 200,000   Llama 4's own table of 2,048
    n = 128,000   Llama 3's of 256, and its split
    else          128: the functional ones of Llama 4's table in its order, then reserved ones

Hugging Face's `tokenizer.json` holds ranks, special tokens and split (see tokenizer_json.py); that of Llama 1 and 2 is
another algorithm (see sentence_bpe.py). Nothing is ever fetched.

Source: Llama 4's and Llama 3's tokenizers (split regex, special ids, guards against very long runs).
"""

from __future__ import annotations

import base64
import binascii
import codecs
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken

from llamax.config import ConfigError
from llamax.data import tokenizer_json
from llamax.data.sentence_bpe import SentenceBpe
from llamax.data.tokenizer_json import Vocabulary

LLAMA4_RANKS = 200_000
LLAMA3_RANKS = 128_000
N_LLAMA3_SPECIALS = 256
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

LLAMA3_SPLIT = (  # fewer cuts: letters of either case run on, and a contraction is a piece of its own
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
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

_LLAMA3_SPECIALS = [
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"),
    *("finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"),
]
_LLAMA3_SPECIALS += _numbered("reserved_special_token", 2, N_LLAMA3_SPECIALS - len(_LLAMA3_SPECIALS) + 1)

# Llama 4's name -> what the same token is called in Llama 3.
LLAMA3_NAMES = {
    **{"header_start": "start_header_id", "header_end": "end_header_id", "eom": "eom_id", "eot": "eot_id"},
    **{"step": "step_id", "finetune_right_pad": "finetune_right_pad_id"},
}

LLAMA2_NAMES = {"begin_of_text": "<s>", "end_of_text": "</s>"}  # and as they are written, in Llama 1 and 2


def special_tokens(n_ranks: int) -> dict[str, int]:
    """The special tokens of a file with `n_ranks` ranks, written `<|name|>`, and their ids (n_ranks and up)."""
    if n_ranks == LLAMA4_RANKS:
        names = _LLAMA4_SPECIALS
    elif n_ranks == LLAMA3_RANKS:
        names = _LLAMA3_SPECIALS
    else:
        functional = [name for name in _LLAMA4_SPECIALS if "reserved" not in name]
        names = functional + _numbered("reserved_special_token", 0, N_SMALL_SPECIALS - len(functional) - 1)
    return {f"<|{name}|>": n_ranks + i for i, name in enumerate(names)}


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Token bytes -> rank of a tiktoken file. ConfigError if the file is missing or is no such file."""
    path = Path(path)
    _check_exists(path)
    ranks: dict[bytes, int] = {}
    content = path.read_bytes()
    if b"<unk>" in content[:64]:
        true = "it is a SentencePiece model (Llama 1 and 2 have one), which is not read"
        raise ConfigError(f"tokenizer file {path}", true, "Give the tokenizer.json that lies beside it.")
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ConfigError(
                f"tokenizer file {path}",
                f"line {number} is not 'base64 rank' but {line[:40]!r}",
                "Give a file in tiktoken's format, or a tokenizer.json.",
            ) from None
    _check_ranks(path, ranks)
    return ranks


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(
            f"tokenizer file {path}",
            "there is no such file",
            "Set config.data.tokenizer to a file in tiktoken's format or a tokenizer.json, or make one with "
            "`llamax data tokenizer`.",
        )


def _check_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise ConfigError(
            f"tokenizer file {path}",
            f"its {len(ranks)} tokens do not have the ranks 0, 1, 2, ... or lack some of the 256 single bytes",
            "The file is cut short or damaged: copy it again, or make one with `llamax data tokenizer`.",
        )


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


def read_vocabulary(path: str | Path) -> Vocabulary:
    """A tokenizer file in either format. ConfigError if it is missing, damaged or another kind of tokenizer."""
    path = Path(path)
    if path.suffix != ".json":
        ranks = read_ranks(path)
        return Vocabulary(ranks, special_tokens(len(ranks)), LLAMA3_SPLIT if len(ranks) == LLAMA3_RANKS else SPLIT)
    _check_exists(path)
    ranks, specials, split = tokenizer_json.read_json(path)
    _check_ranks(path, ranks)
    taken = [name for name, number in specials.items() if number < len(ranks)]
    if taken or len(set(specials.values())) < len(specials):
        raise ConfigError(
            f"tokenizer file {path}",
            f"its special tokens share ids with {'its text tokens' if taken else 'each other'}",
            "The file is damaged: copy it again.",
        )
    if specials.items() & {("<|patch|>", 200_092)}:  # Hugging Face's names of Llama 4's end at id 201,133
        named = set(specials.values())
        table = special_tokens(LLAMA4_RANKS)
        specials |= {name: i for name, i in table.items() if i not in named and name not in specials}
    return Vocabulary(ranks, dict(sorted(specials.items(), key=_by_rank)), split)


def check_size(tokenizer: Tokenizer, rows: int, asked: str, change: str) -> None:
    """ConfigError(asked, ..., change) if an embedding of so many rows is not this tokenizer's."""
    if tokenizer.vocab_size != rows:
        raise ConfigError(
            asked, f"{tokenizer.path} has {tokenizer.vocab_size} ids and the model's embedding {rows}", change
        )


class Tokenizer:
    """A tokenizer file in memory. Ids below `n_ranks` are BPE tokens, the rest are special tokens.

    In a file of Llama 1's or 2's kind the special tokens are the first among the others, and `n_ranks` is all of them.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._encoding: tiktoken.Encoding | SentenceBpe
        try:
            ranks, self.specials, self.split = read_vocabulary(path)  # specials: "<|name|>" -> id
        except tokenizer_json.SentenceBpeFound:
            self._encoding = SentenceBpe(path)
            self.specials, self.split, lengths = self._encoding.specials, "", self._encoding.lengths
        else:
            self._encoding = tiktoken.Encoding(
                self.path.name, pat_str=self.split, mergeable_ranks=ranks, special_tokens=self.specials
            )
            lengths = [len(token) for token in sorted(ranks, key=ranks.__getitem__)]
        self.n_ranks = len(lengths)
        self.byte_lengths = np.zeros(self.vocab_size, np.int32)  # bytes of text that a token stands for; specials 0
        self.byte_lengths[: self.n_ranks] = lengths

    @property
    def vocab_size(self) -> int:
        return max(self.n_ranks - 1, *self.specials.values()) + 1 if self.specials else self.n_ranks

    def write_json(
        self, folder: str | Path, *, eos: str = "end_of_text", chat_template: str | None = None, max_tokens: int = 0
    ) -> None:
        """Writes the folder's tokenizer files as transformers reads them: tokenizer.json and its two companions.

        Args:
            eos: name of the token that ends a text: "eot" in a model that chats.
            chat_template: `chat.template()` in a model that chats.
            max_tokens: the longest context that the model was made for; 0 leaves it open.
        """
        if not self.split:
            true = "it is of Llama 1's and 2's kind, which is read but not written"
            raise ConfigError(f"writing {self.path} for Hugging Face", true, "Simply copy the file.")
        written = {number: name for name, number in self.specials.items()}
        tokenizer_json.write_json(
            read_vocabulary(self.path),  # not kept: it is a hundred megabytes
            folder,
            bos=written[self.bos],
            eos=written[self.special(eos)],
            pad=written[self.pad],
            chat_template=chat_template,
            max_tokens=max_tokens or None,
        )

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
            for piece in (_pieces(text) if self.split else (text,) if text else ())
        ]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes([int(i) for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids; special tokens as `<|name|>`, bytes that are no UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_each(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, for each what is complete by then: a character may take several tokens.

        Joined, the texts are `decode` of all ids.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.decode_bytes([i]))
        yield decoder.decode(b"", final=True)

    def has(self, name: str) -> bool:
        """Whether there is a special token of this name, which is Llama 4's."""
        return self._special(name) is not None

    def special(self, name: str) -> int:
        """Id of a special token by its name in Llama 4, without the marks: special("eot"). ConfigError if none is."""
        if (found := self._special(name)) is None:
            true = "it has none" + (f"; it has {', '.join(list(self.specials)[:8])}, ..." if self.specials else "")
            raise ConfigError(f"special token <|{name}|> of {self.path}", true, "Name a tokenizer that has it.")
        return found

    def _special(self, name: str) -> int | None:
        names = (f"<|{name}|>", f"<|{LLAMA3_NAMES.get(name)}|>", LLAMA2_NAMES.get(name, ""))
        return next((self.specials[written] for written in names if written in self.specials), None)

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
        """Fills what is no text; the end of text where a tokenizer has no token of its own for it (Llama 3.0)."""
        return self.special("finetune_right_pad") if self.has("finetune_right_pad") else self.eos

    @property
    def stop(self) -> frozenset[int]:
        """The ids that end a generation."""
        return frozenset(self.special(name) for name in ("end_of_text", "eom", "eot") if self.has(name))

    @property
    def python_start(self) -> int:
        """Opens what a turn says before it calls tools."""
        return self.special("python_start")

    @property
    def python_end(self) -> int:
        return self.special("python_end")

    @property
    def header_start(self) -> int:
        """Opens the name of the role that speaks."""
        return self.special("header_start")

    @property
    def header_end(self) -> int:
        return self.special("header_end")

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


@functools.cache
def shared(path: str) -> Tokenizer:
    """One tokenizer a file and process: loader processes make their own."""
    return Tokenizer(path)
