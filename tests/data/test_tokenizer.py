"""The tokenizer: Llama 4's table of special tokens, the split, and merges beside a slow merge loop."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
from pathlib import Path

import pytest
import regex

from llamax.config import ConfigError
from llamax.data import tokenizer as tok
from llamax.data.train_tokenizer import byte_alphabet, train_ranks

DATA = Path(__file__).resolve().parents[2] / "data"
FUNCTIONAL_NAMES = """
    begin_of_text end_of_text fim_prefix fim_middle fim_suffix header_start header_end eom eot step python_start
    python_end finetune_right_pad image_start image_end tile_x_separator tile_y_separator image patch
    reasoning_thinking_start reasoning_thinking_end
"""
FUNCTIONAL = FUNCTIONAL_NAMES.split()
META_SPECIALS_SHA256 = "bce02f81e33701ba4fda951aaf363ccab7e1c586867be8e305b8f087f8b3da13"
RELEASED = os.environ.get("LLAMAX_LLAMA4_TOKENIZER", "")


@pytest.fixture(scope="module")
def tokenizer() -> tok.Tokenizer:
    return tok.Tokenizer(DATA / "tokenizer.model")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    lines = (DATA / "fixtures" / name for name in ("text.jsonl", "code.jsonl"))
    return [json.loads(line)["text"] for path in lines for line in path.read_text(encoding="utf-8").splitlines()]


def random_text(seed: int) -> str:
    """Characters of all planes, surrogates left out, with runs of ASCII and white space between."""
    rng = random.Random(seed)
    highest = rng.choice((0x7F, 0x2FFF, 0x10FFFF))
    points = (rng.randrange(highest + 1) for _ in range(400))
    chars = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    return "".join(char + rng.choice(("", "", " ", "\n", "abc", "'ll ", "\t  ")) for char in chars)


def test_llama4_special_ids():
    specials = tok.special_tokens(200_000)
    assert len(specials) == 2048 and sorted(specials.values()) == list(range(200_000, 202_048))
    released = {
        **{"begin_of_text": 200_000, "end_of_text": 200_001, "fim_prefix": 200_002, "fim_suffix": 200_004},
        **{"header_start": 200_005, "header_end": 200_006, "eom": 200_007, "eot": 200_008, "step": 200_009},
        **{"text_post_train_reserved_special_token_0": 200_010, "text_post_train_reserved_special_token_5": 200_015},
        **{"python_start": 200_016, "python_end": 200_017, "finetune_right_pad": 200_018},
        **{"text_post_train_reserved_special_token_8": 200_019, "text_post_train_reserved_special_token_68": 200_079},
        **{"image_start": 200_080, "image_end": 200_081, "tile_x_separator": 200_084, "tile_y_separator": 200_085},
        **{"image": 200_090, "patch": 200_092, "vision_reserved_special_token_1047": 201_133},
        **{"reasoning_reserved_special_token_7": 201_141, "reasoning_thinking_start": 201_142},
        **{"reasoning_thinking_end": 201_143, "reserved_special_token_0": 201_144},
        **{"reserved_special_token_903": 202_047},
    }
    assert {name: specials[f"<|{name}|>"] for name in released} == released
    table = "\n".join(f"{number} {name}" for name, number in specials.items())  # all of Meta's, as its code lists them
    assert hashlib.sha256(table.encode()).hexdigest() == META_SPECIALS_SHA256


def test_small_specials_are_the_functional_ones_in_llama4s_order(tokenizer):
    assert tokenizer.n_ranks == 3968 and tokenizer.vocab_size == 4096
    assert list(tokenizer.specials.values()) == list(range(3968, 4096))
    names = [name.strip("<|>") for name in tokenizer.specials]
    assert names[: len(FUNCTIONAL)] == FUNCTIONAL
    assert names[len(FUNCTIONAL) :] == [f"reserved_special_token_{i}" for i in range(128 - len(FUNCTIONAL))]
    large = tok.special_tokens(200_000)
    assert sorted(FUNCTIONAL, key=lambda name: large[f"<|{name}|>"]) == FUNCTIONAL
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eom, tokenizer.eot) == (3968, 3969, 3975, 3976)
    assert tokenizer.stop == {3969, 3975, 3976} and tokenizer.pad == 3980
    assert (tokenizer.image_start, tokenizer.image_end) == (3981, 3982)
    assert (tokenizer.tile_x_separator, tokenizer.tile_y_separator) == (3983, 3984)
    assert (tokenizer.image, tokenizer.patch) == (3985, 3986)


def test_round_trip(tokenizer, texts):
    for text in [*texts, *map(random_text, range(30)), "", " ", "\r\n\r\n"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(i < tokenizer.n_ranks for i in ids)
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert not tokenizer.byte_lengths[tokenizer.n_ranks :].any()


def test_merges_equal_a_slow_merge_loop(tokenizer, texts):
    ranks = tok.read_ranks(tokenizer.path)

    def slow(piece: bytes) -> list[int]:
        parts = [bytes([byte]) for byte in piece]
        while len(parts) > 1:
            merged = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
            i = merged.index(min(merged))
            if merged[i] == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [ranks[part] for part in parts]

    for text in [*texts, random_text(0), random_text(1)]:
        assert tokenizer.encode(text) == [i for piece in regex.findall(tok.SPLIT, text) for i in slow(piece.encode())]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("I'm 12345 years", ["I'm", " ", "123", "45", " years"]),
        ("  \n\n indented\ttext", ["  \n\n", " indented", "\ttext"]),
        ("HTTPServer don'T", ["HTTPServer", " don'T"]),
        ("camelCase", ["camel", "Case"]),
        ("x  = f(y)//\n", ["x", " ", " =", " f", "(y", ")//\n"]),
        ("été 東京 😀!", ["été", " 東京", " 😀!"]),
        ("end   ", ["end", "   "]),
        ("he'd WE'LL it's o'clock", ["he'd", " WE'LL", " it's", " o", "'clock"]),
    ],
)
def test_split(text, pieces):
    assert regex.findall(tok.SPLIT, text) == pieces


def test_plain_text_never_yields_special_ids(tokenizer):
    for name, special in tokenizer.specials.items():
        text = f"a{name}b"
        plain = tokenizer.encode(text)
        assert special not in plain and max(plain) < tokenizer.n_ranks
        assert tokenizer.decode(plain) == text
        allowed = tokenizer.encode(text, specials=True)
        assert allowed == [*tokenizer.encode("a"), special, *tokenizer.encode("b")]
        assert tokenizer.decode(allowed) == text


def test_long_runs_are_cut(tokenizer):
    text = "a" * 60_001 + " " * 70_000 + "b c\n" * 90_000
    pieces = list(tok._pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= tok.MAX_PIECE_CHARS
    runs = [run for piece in pieces for run in regex.findall(r"\s+|\S+", piece)]
    assert max(map(len, runs)) == tok.MAX_RUN_CHARS
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert list(tok._pieces("short")) == ["short"]


def slow_pieces(text: str) -> list[str]:
    """The reference's cuts, a character at a time: a run counts from its start, or from the last cut in it."""
    pieces = []
    for start in range(0, len(text), tok.MAX_PIECE_CHARS):
        piece, run, was_space = "", 0, None
        for char in text[start : start + tok.MAX_PIECE_CHARS]:
            run = run + 1 if char.isspace() == was_space else 1
            was_space = char.isspace()
            if run > tok.MAX_RUN_CHARS:
                pieces.append(piece)
                piece, run = "", 1
            piece += char
        pieces.append(piece)
    return pieces


def test_cuts_of_long_texts_are_the_references(monkeypatch):
    rng = random.Random(0)
    spaces = [chr(point) for point in range(0x110000) if chr(point).isspace()]
    assert len(spaces) > 20 and all(tok._RUN.match(char).group().isspace() for char in spaces)
    monkeypatch.setattr(tok, "MAX_PIECE_CHARS", 400)
    monkeypatch.setattr(tok, "MAX_RUN_CHARS", 25)
    for _ in range(200):
        text = ""
        while len(text) < rng.choice((10, 300, 2000)):
            chars = rng.choice((spaces, "ab", "\u200b\ufeff\u180e_", "😀é", " "))  # no white space: 200b, feff, 180e
            text += "".join(rng.choice(chars) for _ in range(rng.choice((1, 3, 24, 25, 26, 51, 80))))
        assert list(tok._pieces(text)) == slow_pieces(text)


def test_cuts_at_the_references_lengths():
    for n in (24_999, 25_000, 25_001, 50_000, 50_001, 399_999, 400_000, 400_001, 425_001):
        for text in ("a" * n, " " * n, " b" * (n // 2), "a" * n + " " * n):
            assert list(tok._pieces(text)) == slow_pieces(text)


@pytest.mark.skipif(not RELEASED, reason="set LLAMAX_LLAMA4_TOKENIZER to the released tokenizer.model")
def test_the_released_tokenizer(golden):
    released = tok.Tokenizer(RELEASED)
    assert (released.n_ranks, released.vocab_size) == (200_000, 202_048)
    for sample in json.loads(golden("llama4/tokenizer_samples.json").read_text(encoding="utf-8")):
        assert released.encode(sample["text"]) == sample["ids"]
        assert released.decode(sample["ids"]) == sample["text"]
    words = {"\n\n": [368], "system": [15651], "user": [1556], "assistant": [140680], "ipython": [607, 6934]}
    assert {word: released.encode(word) for word in words} == words
    assert released.stop == {200_001, 200_007, 200_008} and (released.bos, released.pad) == (200_000, 200_018)
    assert (released.image_start, released.image_end, released.patch) == (200_080, 200_081, 200_092)
    long = "a" * 60_001 + " " * 30_000 + "é" * 420_000
    assert released.decode(released.encode(long)) == long


@pytest.mark.parametrize("rows", [4095, 4097])
def test_a_tokenizer_of_another_size_than_the_embedding_is_refused(tokenizer, rows):
    tok.check_size(tokenizer, 4096, "the model", "Name its own.")
    with pytest.raises(
        ConfigError, match=f"the model, but .*tokenizer.model has 4096 ids .* embedding {rows}. Name its"
    ):
        tok.check_size(tokenizer, rows, "the model", "Name its own.")


def test_a_special_token_that_is_not_there(tokenizer):
    assert tokenizer.has("eot") and not tokenizer.has("eot_id")
    with pytest.raises(ConfigError, match="<|eot_id|>"):
        tokenizer.special("eot_id")


def test_bytes_that_are_no_utf8_decode_to_the_replacement_character(tokenizer):
    half = tokenizer.encode("\N{LLAMA}")[:1]
    assert "\ufffd" in tokenizer.decode(half)
    assert "\N{LLAMA}".encode().startswith(tokenizer.decode_bytes(half))


def test_text_comes_with_its_tokens(tokenizer, texts):
    for text in [*texts[:5], random_text(3), "\N{LLAMA}"]:
        ids = [*tokenizer.encode(text), tokenizer.eot]
        assert "".join(tokenizer.decode_each(iter(ids))) == tokenizer.decode(ids)
    llama = tokenizer.encode("\N{LLAMA}!")
    assert len(llama) > 2 and list(tokenizer.decode_each(llama))[-3:] == ["\N{LLAMA}", "!", ""]
    assert list(tokenizer.decode_each(llama[:1])) == ["", "\ufffd"]


def test_pickles_for_loader_processes(tokenizer):
    text = "a small red circle"
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"IQ== 0\nnot a line of this format\n", "line 2"),
        (b"IQ== zero\n", "line 1"),
        (b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0c\n\x03<s>", "SentencePiece"),
        (b"IQ== 0\nIg== 1\n", "256 single bytes"),
    ],
)
def test_wrong_files(tmp_path, content, said):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        tok.Tokenizer(path)


def test_a_file_that_is_cut_short(tmp_path, tokenizer):
    lines = tokenizer.path.read_bytes().splitlines(keepends=True)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(lines[:1000] + lines[1001:]))
    with pytest.raises(ConfigError, match="ranks 0, 1, 2"):
        tok.Tokenizer(path)


def test_shipped_tokenizer_has_the_words_of_drawings(tokenizer):
    text = "Question: what is this? Answer: red circle. purple triangle"
    words = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
    assert words[-6:] == [":", " red", " circle", ".", " purple", " triangle"]


def test_training(tmp_path, texts):
    pytest.importorskip("tokenizers")
    ranks = train_ranks(iter(texts), 600)
    assert ranks == train_ranks(iter(texts), 600)
    tok.write_ranks(ranks, tmp_path / "small.model")
    small = tok.Tokenizer(tmp_path / "small.model")
    assert small.vocab_size == 728 and tok.read_ranks(small.path) == ranks
    assert sum(len(small.encode(text)) for text in texts) < 0.6 * sum(len(text.encode()) for text in texts)
    with pytest.raises(ConfigError, match="only"):
        train_ranks(iter(["too little text"]), 600)


def test_byte_alphabet():
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert set(alphabet) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert alphabet["Ġ"] == ord(" ") and alphabet["a"] == ord("a") and alphabet["Ċ"] == ord("\n")
