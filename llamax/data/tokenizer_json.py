"""Hugging Face's `tokenizer.json` beside tiktoken's file: written for export, read in place of it.

Both are byte-level BPE. tiktoken keeps tokens by rank and merges two neighbours wherever their bytes together are a
token, lowest rank first. `tokenizer.json` keeps a vocabulary, written in a printable alphabet of bytes, and the list of
merges in the order in which they are tried. So a token of rank r becomes all of its cuts into two other tokens, which
stand in the list at r's place; reading needs the vocabulary only, and checks that the merges are in its order.

What differs: llamax cuts runs of more than 25,000 characters before it splits (as Llama 4 does), Hugging Face does not;
and Hugging Face reads special tokens in any text, llamax only where it is allowed to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llamax.config import ConfigError

CHANGE = "Give the model's own file: tiktoken's tokenizer.model, or a tokenizer.json of byte-level BPE."


class Vocabulary(NamedTuple):
    """What a byte-level BPE is made of."""

    ranks: dict[bytes, int]  # bytes of a token -> rank, which is its id
    specials: dict[str, int]  # special token as it is written -> id
    split: str  # the regex that cuts text into the pieces within which tokens are merged


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of the printable alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    alphabet = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(sorted(set(range(256)) - printable)):
        alphabet[chr(256 + i)] = byte
    return alphabet


# ------------------------------------------------------------------------------------------------------------- reading


def read_json(path: str | Path) -> Vocabulary:
    """The vocabulary of a `tokenizer.json`.

    ConfigError if it is damaged, or anything but plain byte-level BPE; SentenceBpeFound if it is Llama 1's or 2's kind.
    """
    asked = f"tokenizer file {path}"
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        if table["model"].get("type", "BPE") == "BPE" and table["model"].get("byte_fallback"):
            raise SentenceBpeFound(asked, "its model merges characters, not bytes", CHANGE)
        return _read(table)
    except SentenceBpeFound:
        raise
    except OSError as error:
        raise ConfigError(asked, f"it cannot be read: {error.strerror}", CHANGE) from None
    except _NotPlain as error:
        raise ConfigError(asked, str(error), CHANGE) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        true = f"it is no tokenizer.json: {type(error).__name__}: {error}"
        raise ConfigError(asked, true, f"The file is cut short or damaged: copy it again. {CHANGE}") from None


class SentenceBpeFound(ConfigError):
    """The file is of Llama 1's and 2's kind: see sentence_bpe.py."""


class _NotPlain(Exception):
    """The file asks for something that byte-level BPE by ranks does not do."""


def _read(table: dict[str, Any]) -> Vocabulary:
    model, byte_of = table["model"], byte_alphabet()
    if model.get("type", "BPE") != "BPE":
        raise _NotPlain(f"its model is {model['type']}, not byte-level BPE")
    wanted = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if wanted or table.get("normalizer"):
        raise _NotPlain(f"it sets {', '.join([*wanted, *(['a normalizer'] * bool(table.get('normalizer')))])}")
    added = {entry["content"]: entry["id"] for entry in table.get("added_tokens") or []}
    plain = [entry["content"] for entry in table.get("added_tokens") or [] if not entry.get("special")]
    if plain:
        raise _NotPlain(f"it adds ordinary tokens beside the merges, {plain[0]!r} the first of {len(plain)}")
    vocab = {token: rank for token, rank in model["vocab"].items() if token not in added}
    foreign = next((token for token in vocab if any(char not in byte_of for char in token)), None)
    if foreign is not None:
        raise _NotPlain(f"its token {foreign!r} is not written in the alphabet of bytes")
    ranks = {bytes(byte_of[char] for char in token): rank for token, rank in vocab.items()}
    _check_merges(model["merges"], vocab)
    return Vocabulary(ranks, added, _split_regex(table["pre_tokenizer"]))


def _check_merges(merges: list, vocab: dict[str, int]) -> None:
    """The merges are tried in the order of the ids of what they make, so the ids say all."""
    last = -1
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge  # files of before 2024 have strings
        made = vocab[left + right]
        if made < last:
            raise _NotPlain(f"its merges are not in the order of their tokens' ids, from {left + right!r} on")
        last = made


def _split_regex(pre_tokenizer: dict[str, Any]) -> str:
    """The regex of Split followed by ByteLevel."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [part["type"] for part in parts]
    if kinds == ["Split", "ByteLevel"]:
        split, byte_level = parts
        pattern = split["pattern"].get("Regex")
        isolated = split.get("behavior") == "Isolated" and not split.get("invert")
        if pattern and isolated and not byte_level.get("use_regex", True) and not byte_level.get("add_prefix_space"):
            return pattern
    raise _NotPlain(f"its pre-tokenizer ({', '.join(kinds)}) is not one regex split followed by bytes")


# ------------------------------------------------------------------------------------------------------------- writing


def write_json(
    vocabulary: Vocabulary,
    folder: str | Path,
    *,
    bos: str,
    eos: str,
    pad: str,
    chat_template: str | None = None,
    max_tokens: int | None = None,
) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` as transformers reads them.

    Args:
        bos, eos, pad: special tokens as they are written; `bos` is put before every text, as the released files do.
        chat_template: Jinja source for `tokenizer_config.json`; None for a base model.
        max_tokens: the longest context that the model was made for.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    settings: dict[str, Any] = {
        "added_tokens_decoder": {
            str(number): {"content": name, **flags, "special": True} for name, number in vocabulary.specials.items()
        },
        **named,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_tokens or int(1e30),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    named_tokens = {role: {"content": name, **flags} for role, name in named.items()}
    _dump(_tokenizer_table(vocabulary, bos), folder / "tokenizer.json", indent=None)  # long, and read by programs
    _dump(settings, folder / "tokenizer_config.json", indent=2)
    _dump(named_tokens, folder / "special_tokens_map.json", indent=2)


def _tokenizer_table(vocabulary: Vocabulary, bos: str) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    char_of = {byte: char for char, byte in byte_alphabet().items()}
    written = {token: "".join(char_of[byte] for byte in token) for token in vocabulary.ranks}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    before = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    after = dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True)  # it reads none of these
    split = dict(type="Split", pattern={"Regex": vocabulary.split}, behavior="Isolated", invert=False)
    first, second = (
        [{"SpecialToken": {"id": bos, "type_id": i}}, {"Sequence": {"id": "AB"[i], "type_id": i}}] for i in (0, 1)
    )
    template = {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {bos: {"id": bos, "ids": [vocabulary.specials[bos]], "tokens": [bos]}},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **flags} for name, number in vocabulary.specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, before]},
        "post_processor": {"type": "Sequence", "processors": [after | {"trim_offsets": False}, template]},
        "decoder": after,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is that token, as in tiktoken
            "vocab": {written[token]: rank for token, rank in vocabulary.ranks.items()},
            "merges": [[written[left], written[right]] for left, right in merges(vocabulary.ranks)],
        },
    }


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that together are a token, by the rank of that token, then by their own."""
    found = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = ranks.get(token[:cut]), ranks.get(token[cut:])
            if left is not None and right is not None:
                found.append((rank, left, right, token[:cut], token[cut:]))
    return [(left, right) for *_, left, right in sorted(found)]


def _dump(table: dict[str, Any], path: Path, indent: int | None) -> None:
    path.write_text(json.dumps(table, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
