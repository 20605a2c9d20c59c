"""tokenizer.json: what Hugging Face's library makes of the files written here, and what is read of its own."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest

from llamax.config import ConfigError
from llamax.data import chat
from llamax.data import tokenizer as tok
from llamax.data.tokenizer import Tokenizer
from llamax.data.tokenizer_json import Vocabulary, merges, read_json, write_json

tokenizers = pytest.importorskip("tokenizers", reason="the `tokenizers` library is not installed")

DATA = Path(__file__).resolve().parents[2] / "data"
RELEASED = os.environ.get("LLAMAX_LLAMA4_TOKENIZER", "")


def texts() -> list[str]:
    """Text, code, emoji, every plane of Unicode, runs of few characters."""
    lines = (DATA / "fixtures" / name for name in ("text.jsonl", "code.jsonl"))
    found = [json.loads(line)["text"] for path in lines for line in path.read_text(encoding="utf-8").splitlines()]
    rng = random.Random(0)
    for highest in (0x7F, 0x2FFF, 0x10FFFF):
        points = (rng.randrange(highest + 1) for _ in range(4000))
        found.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
    for few in ("a", "ab", "a ", " \n", "=-", "aA1", "the ", "0123456789", "👩‍👧🏽é", "\t\r\n"):
        found += ["".join(rng.choice(few) for _ in range(rng.randrange(1, 60))) for _ in range(20)]
    return found


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer(DATA / "tokenizer.model")


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported")
    ours.write_json(path, eos="eot", chat_template=chat.template(), max_tokens=512)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_ids_equal_hugging_faces(ours, theirs):
    assert theirs.get_vocab_size() == ours.vocab_size
    for text in texts():
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text == ours.decode(ids)


def test_special_tokens_equal_hugging_faces_where_text_may_spell_them(ours, theirs):
    for name, number in ours.specials.items():
        text = f"a red {name} circle"
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text, specials=True) and number in ids
        assert number not in ours.encode(text)
    assert theirs.encode("red").ids == [ours.bos, *ours.encode("red")]
    assert theirs.encode("red", "circle").ids == [ours.bos, *ours.encode("red"), ours.bos, *ours.encode("circle")]


def test_the_companions_name_the_special_tokens(folder, ours):
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = json.loads((folder / "special_tokens_map.json").read_text(encoding="utf-8"))
    expected = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>", "pad_token": "<|finetune_right_pad|>"}
    assert {role: entry["content"] for role, entry in named.items()} == expected
    assert expected.items() <= settings.items() and settings["model_max_length"] == 512
    assert settings["chat_template"] == chat.template()
    table = {entry["content"]: int(number) for number, entry in settings["added_tokens_decoder"].items()}
    assert table == ours.specials


def test_what_is_written_is_read_back(folder, ours):
    back = Tokenizer(folder / "tokenizer.json")
    assert read_json(back.path) == tok.read_vocabulary(ours.path)
    assert (back.n_ranks, back.vocab_size, back.split) == (ours.n_ranks, ours.vocab_size, ours.split)
    assert (back.stop, back.pad, back.patch) == (ours.stop, ours.pad, ours.patch)
    assert (back.byte_lengths == ours.byte_lengths).all()
    for text in texts()[:8]:
        assert back.encode(text) == ours.encode(text)


def test_merges_are_every_cut_into_two_tokens():
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258}
    assert merges(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc"), (b"ab", b"c")]


def trained(vocab: int = 700):
    """A tokenizer by Hugging Face's trainer: one merge a token."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(tok.LLAMA3_SPLIT), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts()[:200], trainer)
    return model


def test_a_file_of_their_trainer_with_llama_3s_split_and_marks(tmp_path):
    theirs = trained()
    names = [name for name in tok.special_tokens(tok.LLAMA3_RANKS) if "reserved" not in name]
    theirs.add_special_tokens(names)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(tmp_path / "tokenizer.json")
    assert ours.split == tok.LLAMA3_SPLIT and ours.vocab_size == theirs.get_vocab_size() == 700 + len(names)
    for text in texts():
        assert ours.encode(text) == theirs.encode(text).ids
    marks = [theirs.token_to_id(f"<|{name}|>") for name in ("eot_id", "eom_id", "end_of_text", "start_header_id")]
    assert ours.stop == set(marks[:3]) and ours.header_start == marks[3]
    assert ours.pad == theirs.token_to_id("<|finetune_right_pad_id|>")
    assert not ours.has("patch")
    with pytest.raises(ConfigError, match="patch"):
        ours.patch  # noqa: B018


def test_merges_as_texts_are_read(folder, tmp_path):
    """As files of before 2024 have them."""
    table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    table["model"]["merges"] = [" ".join(pair) for pair in table["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
    assert read_json(tmp_path / "tokenizer.json") == read_json(folder / "tokenizer.json")


def test_llama_3s_tokens_by_number_of_ranks(tmp_path):
    names = list(tok.special_tokens(tok.LLAMA3_RANKS).items())
    assert len(names) == 256 and names[0] == ("<|begin_of_text|>", 128_000) and names[-1][1] == 128_255
    assert dict(names)["<|start_header_id|>"] == 128_006 and dict(names)["<|eot_id|>"] == 128_009
    assert dict(names)["<|python_tag|>"] == 128_010 and dict(names)["<|finetune_right_pad_id|>"] == 128_004


def test_ids_that_hugging_face_does_not_name_are_llama_4s(tmp_path):
    """Released files name Llama 4's special tokens up to id 201,133; the embedding has 202,048 rows."""
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {b"\xff\xfe" + n.to_bytes(3, "big"): 256 + n for n in range(tok.LLAMA4_RANKS - 256)}
    table = tok.special_tokens(tok.LLAMA4_RANKS)
    named = {name: number for name, number in table.items() if number <= 201_133} | {"<|my_own|>": 201_134}
    write_json(Vocabulary(ranks, named, tok.SPLIT), tmp_path, bos="<|begin_of_text|>", eos="<|eot|>", pad="<|eot|>")
    specials = tok.read_vocabulary(tmp_path / "tokenizer.json").specials
    assert list(specials.values()) == list(range(200_000, 202_048))
    assert specials["<|my_own|>"] == 201_134 and "<|reasoning_reserved_special_token_0|>" not in specials
    assert specials["<|reasoning_thinking_start|>"] == table["<|reasoning_thinking_start|>"]


def llama_2(path: Path):
    """A tokenizer of Llama 2's kind: BPE over characters, a space before, fallback to bytes, the marks first."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    space = chr(0x2581)
    normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend(space), tokenizers.normalizers.Replace(" ", space)]
    )
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.normalizer = normalizer
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Split(space, "merged_with_next")  # its own has none: too slow
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, limit_alphabet=90, show_progress=False)
    learner.train_from_iterator([text for text in texts()[:40] if text.isascii()], trainer)
    model = json.loads(learner.to_str())["model"]
    listed = ["<unk>", "<s>", "</s>", *bytes_, *model["vocab"]]
    merges_ = [tuple(pair) for pair in model["merges"]]
    vocab = {token: i for i, token in enumerate(listed)}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, merges_, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizer
    decoders = tokenizers.decoders
    parts = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(path))
    return made


def test_llama_2s_kind(tmp_path, monkeypatch):
    theirs = llama_2(tmp_path / "tokenizer.json")
    ours = Tokenizer(tmp_path / "tokenizer.json")
    assert ours.vocab_size == ours.n_ranks == theirs.get_vocab_size()
    assert (ours.bos, ours.eos, ours.pad, ours.stop) == (1, 2, 2, {2}) and not ours.has("eot")
    long = "red" * 10_000  # it is not cut: a space would come before every piece
    for text in [long, *(text.replace(chr(0x2581), "") for text in texts() if text)]:  # that comes back as a space
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == " " + text and theirs.decode(ids) == text
        assert "".join(ours.decode_each(ids)) == ours.decode(ids)
        assert ours.byte_lengths[ids].sum() == len(text.encode()) + 1
    assert ours.encode("") == []
    spelt = "red</s><s>"
    assert not {1, 2} & set(ours.encode(spelt)) and ours.decode(ours.encode(spelt)) == " " + spelt
    assert ours.encode(spelt, specials=True)[-2:] == [2, 1]
    assert not {1, 2} & set(ours.encode(spelt)), "it is not left on"
    with pytest.raises(ConfigError, match="header_start"):
        chat.encode(chat.render([{"role": "user", "content": "Hi"}]), ours)
    with pytest.raises(ConfigError, match="copy the file"):
        ours.write_json(tmp_path / "out")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match="pip install tokenizers"):
        Tokenizer(tmp_path / "tokenizer.json")


def change(**model):
    return lambda table: table["model"].update(model)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (change(type="Unigram"), "Unigram"),
        (change(byte_fallback=True, merges=[["a", "中"]]), "no tokenizer.json"),  # Llama 2's kind, and damaged
        (change(dropout=0.1), "dropout"),
        (lambda table: table.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda table: table["added_tokens"][0].update(special=False), "ordinary tokens"),
        (lambda table: table["model"]["vocab"].update({"中": 3968}), "alphabet of bytes"),
        (lambda table: table["model"]["merges"].reverse(), "order"),
        (lambda table: table["model"]["merges"].append(["a", "中"]), "no tokenizer.json"),
        (lambda table: table["model"]["vocab"].popitem(), "no tokenizer.json"),
        (lambda table: table["model"]["vocab"].pop("!"), "256 single bytes"),
        (lambda table: table["model"].pop("vocab"), "no tokenizer.json"),
        (lambda table: table.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (lambda table: table.update(pre_tokenizer=None), "no tokenizer.json"),
        (lambda table: table["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "one regex split"),
        (lambda table: table["added_tokens"][0].update(id=5), "share ids"),
        (lambda table: table["added_tokens"][0].update(id=3969), "share ids"),
    ],
)
def test_another_kind_of_tokenizer_is_refused(folder, tmp_path, spoil, word):
    table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spoil(table)
    (tmp_path / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(ConfigError, match=word):
        Tokenizer(tmp_path / "tokenizer.json")


def test_a_damaged_file_is_refused(folder, tmp_path):
    whole, path = (folder / "tokenizer.json").read_bytes(), tmp_path / "tokenizer.json"
    for content in (whole[: len(whole) // 2], b"", b"[]", b"null", b"\xff\xfe", b"{}"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="no tokenizer.json"):
            Tokenizer(path)
    with pytest.raises(ConfigError, match="no such file"):
        Tokenizer(tmp_path / "none" / "tokenizer.json")


@pytest.mark.slow
@pytest.mark.skipif(not RELEASED, reason="set LLAMAX_LLAMA4_TOKENIZER to the released tokenizer.model")
def test_the_released_file_as_tokenizer_json(tmp_path):
    released = Tokenizer(RELEASED)
    released.write_json(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in texts():
        assert theirs.encode(text, add_special_tokens=False).ids == released.encode(text)
    assert tok.read_vocabulary(tmp_path / "tokenizer.json") == tok.read_vocabulary(RELEASED)
