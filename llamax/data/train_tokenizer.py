"""Trains the small tokenizer on the embedded data: byte-level BPE, written in tiktoken's file format.

Needs the `tokenizers` library (in the `dev` extra). Its byte alphabet writes every byte as a printable character, and
its ids are in the order of the merges, so that they are tiktoken's ranks as they stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llamax.config import ConfigError
from llamax.data.embedded import build, stdlib
from llamax.data.tokenizer import SPLIT, Tokenizer, write_ranks
from llamax.data.tokenizer_json import byte_alphabet

MAX_TOKEN_CHARS = 16  # of the byte alphabet: keeps rulers such as ======== from taking many ids


def train_tokenizer(
    out: str | Path, vocab: int = 3968, seed: int = 0, *, library: str | Path | None = None
) -> Tokenizer:
    """Trains `vocab` BPE ids, 256 of them bytes, on training text of the embedded data; writes `out` and returns it.

    Args:
        seed: of the drawings' words.
        library: a folder of Python source to read instead of the running interpreter's standard library.
    """
    ranks = train_ranks(_texts(seed, library), vocab)
    write_ranks(ranks, out)
    return Tokenizer(out)


def train_ranks(texts: Iterator[str], vocab: int) -> dict[bytes, int]:
    """Token bytes -> rank, from byte pair encoding of some texts. ConfigError if they are too few, or no library."""
    try:
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Trained
    except ImportError:
        raise ConfigError(
            "train a tokenizer", "the `tokenizers` library is not installed", "Install it: pip install 'llamax[dev]'."
        ) from None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model = Trained(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_CHARS,
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    byte_of = byte_alphabet()
    ranks = {bytes(byte_of[char] for char in token): rank for token, rank in model.get_vocab().items()}
    if len(ranks) != vocab:
        raise ConfigError(
            f"a tokenizer of {vocab} ids", f"this text yields only {len(ranks)}", "Ask for fewer, or give more text."
        )
    return ranks


def _texts(seed: int, library: str | Path | None) -> Iterator[str]:
    """The library's text and the words of drawings; of neither, what is held out."""
    read = stdlib.read(library)
    for _, text in (*read.python, *read.docs):
        yield text
    recipe = build.Recipe(seed=seed, side=8)  # the pictures are thrown away: small ones are quick to draw
    for makers in build.GENERATED.values():
        for document in build.generate(recipe, makers):
            yield "\n".join(piece["text"] for piece in document["pieces"] if "text" in piece)
