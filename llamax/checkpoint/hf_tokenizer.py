"""The tokenizer of a model in Hugging Face's format: found, compared with the embedding, opened, and written."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from llamax.checkpoint.hf_read import read_json
from llamax.config import ConfigError, Model
from llamax.data import chat
from llamax.data.tokenizer import Tokenizer, check_size

logger = logging.getLogger("llamax")
JSON, TIKTOKEN = "tokenizer.json", "tokenizer.model"
LLAMA4_ROWS, LLAMA4_NAMED = 202_048, (201_134, 201_135)
CHANGE = "Bring the model's own tokenizer, or take the file away."


def find(folder: Path) -> Path | None:
    """The folder's tokenizer: its tokenizer.json, or else a file in tiktoken's format."""
    return folder / JSON if (folder / JSON).is_file() else _tiktoken(folder)


def _tiktoken(folder: Path) -> Path | None:
    path = folder / TIKTOKEN
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return None if file.read(1) == b"\n" else path  # a SentencePiece model begins so, that of Llama 1 and 2


def check(folder: Path, model: Model) -> None:
    """ConfigError if a tokenizer of the folder has other ids than the embedding has rows.

    Llama 4's own tokenizer.json leaves its last 913 or 914 special tokens unnamed, and is taken all the same.
    """
    rows = model.vocab_size
    if (path := _tiktoken(folder)) is not None:
        check_size(Tokenizer(path), rows, f"The tokenizer {path}", CHANGE)
    path = folder / JSON
    if path.is_file():
        said = read_json(path)
        try:
            vocab = said["model"]["vocab"]
            ids = [*vocab.values()] if isinstance(vocab, dict) else [*range(len(vocab))]
            n = 1 + max(ids + [token["id"] for token in said.get("added_tokens") or ()])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ConfigError(f"The tokenizer {path}", "it has no vocabulary", "Download it again.") from None
        if n != rows and not (rows == LLAMA4_ROWS and n in LLAMA4_NAMED):
            raise ConfigError(f"The tokenizer {path}", f"it has {n} ids and the model's embedding {rows}", CHANGE)


def opened(path: Path | None) -> Tokenizer | None:
    """The tokenizer of a file that `check` has seen. None, and a warning, if it is of a kind that we do not read: the
    model can be trained and exported all the same."""
    if path is None:
        return None
    try:
        return Tokenizer(path)
    except ConfigError as error:
        logger.warning("no tokenizer: %s", error)
        return None


def write(tokenizer: Tokenizer, to: Path) -> None:
    """The files of a tokenizer that did not come from Hugging Face: its own, and what transformers reads."""
    if tokenizer.path.suffix != ".json":
        shutil.copyfile(tokenizer.path, to / TIKTOKEN)
    tokenizer.write_json(to, chat_template=chat.template())
