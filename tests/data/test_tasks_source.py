"""Tasks as a source: document n follows from n, only answers weigh, and what a table cannot mean is refused."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from llamax.config import ConfigError, Data, Source, Vision
from llamax.data.encode import Encoder
from llamax.data.pipeline import HeldOut, build, text_bytes
from llamax.data.show import show
from llamax.data.sources import SKIP_REASONS, open_source, read_manifest, verify
from llamax.data.tasks import Tokens
from llamax.data.tasks.words import few, split_of
from llamax.preflight import data_files

DATA = Path(__file__).resolve().parents[2] / "data"
TOKENIZER = str(DATA / "tokenizer.model")
VISION = Vision(tile_px=28, patch_px=7, max_tiles=2)
TABLE = """
weights = {needle = 1.0, key_value = 2.0, common_words = 1.0}
length_range = [200, 500]
questions = 3
answer_weight = 2.0
seed = 7
"""


MANY_SHORT = {"options.key_value_short": "{records = 400}"}  # there are 905 words, and many of them in the text


def manifest(folder: Path, table: str = TABLE, top: str = 'kind = "text"\ndocuments = 60\n', **changes: str) -> Path:
    """A manifest of tasks; `changes` replace lines of the table."""
    lines = dict(line.split(" = ", 1) for line in table.strip().splitlines())
    lines = {"filler": f'"{DATA / "fixtures" / "text.toml"}"'} | lines | changes
    path = folder / "tasks.toml"
    body = "\n".join(f"{key} = {value}" for key, value in lines.items() if value)
    path.write_text(f'format = "tasks"\nlang = "en"\n{top}[tasks]\n{body}\n')
    return path


def source(path: Path, vision: Vision | None = None):
    return open_source(read_manifest(path), Tokens(TOKENIZER, vision))


def test_a_document_follows_from_its_number(tmp_path):
    documents = source(manifest(tmp_path))
    forwards = [documents[n] for n in range(60)]
    again = pickle.loads(pickle.dumps(source(manifest(tmp_path))))
    assert [again[n] for n in reversed(range(60))] == forwards[::-1]
    assert len(documents) == 60 and len({document.pieces for document in forwards}) == 60
    more = source(manifest(tmp_path, top='kind = "text"\ndocuments = 90\n'))
    assert [more[n] for n in range(60)] == forwards  # nor on how many there are
    other = source(manifest(tmp_path, seed="8"))
    assert not {other[n].pieces for n in range(60)} & {document.pieces for document in forwards}
    assert {document.meta["task"] for document in forwards} == {"needle", "key_value", "common_words"}
    with pytest.raises(IndexError):
        documents[60]


def test_answers_weigh_and_the_rest_is_read(tmp_path):
    for context_weight in ("0.0", "0.25"):
        documents = source(manifest(tmp_path, context_weight=context_weight))
        for n in range(12):
            pieces, weights, meta = documents[n].pieces, documents[n].weights, documents[n].meta
            said = [piece for piece, weight in zip(pieces, weights, strict=True) if weight == 2]
            assert len(pieces) == len(weights) == 1 + 2 * len(said)
            assert set(weights) == {2.0, float(context_weight)}
            assert [set(text.strip().split(", ")) for text in said] == [set(answers) for answers in meta["answers"]]
    plain = source(manifest(tmp_path, answer_weight="1.0", context_weight="1.0"))
    assert plain[0].weights == ()


def test_the_loss_weighs_exactly_the_answers(tmp_path):
    """From the manifest through the packer to the batch, a target at a time."""
    path = manifest(tmp_path)
    data = Data(
        sources={"tasks": Source(str(path))}, seq_len=512, batch_tokens=4 * 512, tokenizer=TOKENIZER, window_docs=16
    )
    batches, tokenizer = list(HeldOut(path, data, None)), Tokens(TOKENIZER).tokenizer
    documents = [source(path)[n] for n in range(60)]
    answers = [piece for d in documents for piece, weight in zip(d.pieces, d.weights, strict=True) if weight]
    learnt, n_ends = [], 0
    for batch in batches:
        assert set(np.unique(batch.loss_weights)) == {0.0, 2.0}
        learnt += batch.targets[batch.loss_weights > 0].tolist()
        n_ends += (batch.targets == tokenizer.eos).sum()
    assert n_ends == 60  # a document is never cut
    assert sorted(learnt) == sorted([i for a in answers for i in tokenizer.encode(a)] + [tokenizer.eos] * 60)
    n_bytes = sum(text_bytes(batch, tokenizer.byte_lengths) for batch in batches)
    assert n_bytes.tolist() == [2.0 * sum(len(answer.encode()) for answer in answers)]
    held_out = HeldOut(path, data, None)
    list(held_out)
    assert sorted(held_out.texts()) == sorted(answers)
    batch = next(iter(build(data, None, 0)))
    assert set(np.unique(batch.loss_weights)) == {0.0, 2.0}


def test_bits_per_byte_do_not_depend_on_the_scale_of_the_weights(tmp_path):
    """Both of its sums are of what weighs, as much as it does: twice the weights are twice the bytes."""
    data = Data(sources={}, seq_len=512, batch_tokens=4 * 512, tokenizer=TOKENIZER)
    lengths = Tokens(TOKENIZER).tokenizer.byte_lengths
    once, twice = (
        [
            (batch.loss_weights, text_bytes(batch, lengths))
            for batch in HeldOut(manifest(tmp_path, context_weight=a, answer_weight=b), data, None)
        ]
        for a, b in (("0.25", "1.5"), ("0.5", "3.0"))
    )
    for (weights, size), (weights_2, size_2) in zip(once, twice, strict=True):
        np.testing.assert_array_equal(2 * weights, weights_2)
        np.testing.assert_array_equal(2 * size, size_2)
    assert {0.0, 0.25, 1.5} == set(np.unique(once[0][0]))


def test_stated_lengths_are_what_documents_have(tmp_path):
    encode = Encoder(TOKENIZER, None)
    for change in ({}, {"length_range": "", "lengths": "[256, 512]"}):
        path = manifest(tmp_path, top='kind = "text"\ndocuments = 200\n', seed="8", **change)
        lengths = [len(encode(document).tokens) - 1 for document in source(path)]
        about = read_manifest(path)
        assert about.tokens / 200 == pytest.approx(np.mean(lengths), rel=0.06)
        if not change:
            assert min(lengths) < 230 and max(lengths) > 450 and max(lengths) <= 500
        else:
            assert all(n <= 256 or 470 < n <= 512 for n in lengths) and 60 < sum(n <= 256 for n in lengths) < 140


def test_fewer_questions_where_they_do_not_fit(tmp_path):
    few = source(manifest(tmp_path, weights="{needle_multivalue = 1.0}", length_range="[150, 4000]", questions="16"))
    asked = {len(few[n].meta["answers"]): few[n].meta["length"] for n in range(40)}
    assert len(asked) > 2 and min(asked) >= 1 and max(asked) == 16 and asked[max(asked)] > asked[min(asked)]


def test_a_document_without_words_is_left_out_and_counted(tmp_path, monkeypatch):
    """It has no free word for a key, or asks for more than there are words for: fewer questions, then none."""
    options = {"options.needle": '{key_kind = "digits", value_kind = "digits", wording = "plain"}'}
    path = manifest(tmp_path, weights="{needle = 1}", length_range="", lengths="[6000]", questions="400", **options)
    assert 100 < len(source(path)[0].meta["answers"]) < 340  # of 675, each of which makes a key or a value
    documents = source(path)
    documents.filler = [" ".join(map(str, range(n, n + 50))) + "\n" for n in range(100, 1000, 50)]
    left_out = documents[1]
    assert (left_out.pieces, left_out.skip, left_out.meta) == ((), "task", {})
    assert "no other is left" in left_out.detail and "document 1" in left_out.where
    encoded = Encoder(TOKENIZER, None)(left_out)
    assert encoded.skip == "task" in SKIP_REASONS and not len(encoded.tokens)
    monkeypatch.setattr(documents.table.__class__, "length", lambda table, rng: 12)
    assert "Ask for more tokens" in documents[2].detail


def test_options_change_a_task(tmp_path):
    """Few records in much text, and records alone."""
    records = []
    for options in ('{wording = "colon", records = 5, key_kind = "short"}', '{wording = "colon"}'):
        path = manifest(tmp_path, weights="{key_value = 1}", **{"options.key_value": options})
        records.append(source(path)[0].pieces[0].count(": "))
    assert records[0] == 5 < 20 < records[1]


def test_a_question_may_be_learnt_behind_its_first_word(tmp_path):
    """What follows from a key's first word is the rest of the key; the document says the same in the same tokens."""
    options = {"options.key_value": '{wording = "plain", n_words = 40}'}
    plain = source(manifest(tmp_path, weights="{key_value = 1}", **options))
    weighed = source(manifest(tmp_path, weights="{key_value = 1}", question_weight="0.5", **options))
    encode = Encoder(TOKENIZER, VISION)
    for n in range(6):
        document, pieces, weights = weighed[n], weighed[n].pieces, weighed[n].weights
        assert "".join(pieces) == "".join(plain[n].pieces)
        assert encode(document).tokens.tolist() == encode(plain[n]).tokens.tolist()
        assert weights == (0.0, *(0.0, 0.5, 2.0) * len(document.meta["answers"]))
        for begun, rest, (answer,) in zip(pieces[1::3], pieces[2::3], document.meta["answers"], strict=True):
            assert f"\n{begun}{rest} {answer}\n" in f"\n{pieces[0]}"


def test_the_end_of_an_answer_may_weigh_otherwise(tmp_path):
    plain, weighed = source(manifest(tmp_path)), source(manifest(tmp_path, end_weight="0.0"))
    for n in range(12):
        before, after = plain[n], weighed[n]
        assert "".join(after.pieces) == "".join(before.pieces)
        learnt = [piece for piece, weight in zip(after.pieces, after.weights, strict=True) if weight]
        whole = [piece for piece, weight in zip(before.pieces, before.weights, strict=True) if weight]
        assert [f"{text}\n" for text in learnt] == whole


def test_records_are_asked_for_where_there_are_questions_enough(tmp_path):
    """But for what fills the rest of the length."""
    options = {"options.key_value": '{wording = "plain", key_kind = "short", value_kind = "short"}'}
    few = manifest(tmp_path, weights="{key_value = 1}", questions="100", length_range="[20, 200]", **options)
    for document in (source(few)[n] for n in range(30)):
        lines = document.pieces[0].splitlines()
        asked = [answer for (answer,) in document.meta["answers"]]
        assert set(asked) <= {line.split()[1] for line in lines} and len(lines) - len(asked) <= 2


def test_records_are_drawn_between_text(tmp_path):
    """Few or many, from `fewest` to a third of the length; each is asked for where there are questions enough."""
    options = '{fewest = 2, wording = "plain", n_words = 64}'
    documents = source(
        manifest(
            tmp_path,
            weights="{key_value = 1}",
            questions="100",
            length_range="[64, 512]",
            **{"options.key_value": options},
        )
    )
    asked = {len(documents[n].meta["answers"]) / documents[n].meta["length"] for n in range(60)}
    assert min(asked) < 0.01 and 1 / 20 < max(asked) <= 1 / 15
    for document in (documents[n] for n in range(60)):
        lines = document.pieces[0].splitlines()  # each record is one, also behind a sentence
        for asked, said in zip(document.pieces[1::2], document.pieces[2::2], strict=True):
            assert f"{asked}{said}".rstrip("\n") in lines
    used = {word for n in range(60) for answers in documents[n].meta["answers"] for word in answers[0].split()}
    all_words = Tokens(TOKENIZER).words
    assert used <= set(few(all_words, 64)) < set(few(all_words, 65)) and {split_of(word) for word in used} == {"train"}
    short = '{fewest = 2, key_kind = "short", value_kind = "short", n_words = 16}'  # as many as there are words
    documents = source(manifest(tmp_path, weights="{key_value = 1}", questions="100", **{"options.key_value": short}))
    assert 2 <= max(len(documents[n].meta["answers"]) for n in range(40)) <= 8


def test_pictures_come_with_their_tiles(tmp_path):
    path = manifest(
        tmp_path,
        weights="{picture_needle = 1, picture_change = 1}",
        length_range="[400, 500]",
        top='kind = "multimodal"\ndocuments = 8\n',
        **{"options.picture_needle": "{n = 3}", "options.picture_change": "{n = 2, side = 28}"},
    )
    sources = {"tasks": Source(str(path))}
    data = Data(sources=sources, seq_len=512, batch_tokens=4 * 512, tokenizer=TOKENIZER, tiles_per_row=16)
    batch = next(iter(build(data, VISION, 0)))
    assert batch.tiles.any() and set(np.unique(batch.loss_weights)) == {0.0, 2.0}
    small = Data(sources=sources, seq_len=512, batch_tokens=4 * 512, tokenizer=TOKENIZER, tiles_per_row=4)
    with pytest.raises(ConfigError, match="come apart"):
        build(small, VISION, 0)


def test_a_row_has_to_hold_a_task(tmp_path):
    path = manifest(tmp_path)
    data = Data(sources={"tasks": Source(str(path))}, seq_len=256, batch_tokens=1024, tokenizer=TOKENIZER)
    with pytest.raises(ConfigError, match="up to 500 tokens and a row 256.*data.seq_len=500"):
        build(data, None, 0)


def test_the_fillers_files_are_its_own(tmp_path):
    about = read_manifest(manifest(tmp_path))
    verify(about)
    assert [path.name for path in about.files] == ["text.jsonl"]


def test_another_table_is_other_data(tmp_path):
    data = Data(sources={"tasks": Source(str(manifest(tmp_path)))}, tokenizer=TOKENIZER)
    parts = [SimpleNamespace(name="main", run=SimpleNamespace(data=data))]
    before = data_files(parts)
    assert data_files(parts) == before
    manifest(tmp_path, seed="8")
    assert data_files(parts) != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(filler=""), "has no filler"),
        (dict(weights="{needel = 1.0}"), "'needel', which does not exist.*Did you mean 'needle'"),
        (dict(weights="{needle = -1}"), "tasks.weights is"),
        (dict(weights="{needle = 0}"), "not all of them 0"),
        (dict(weights="{picture_needle = 1}"), "picture_needle has pictures"),
        (dict(lengths="[256]"), "either lengths or length_range"),
        (dict(length_range="[500, 200]"), "the larger one last"),
        (dict(length_range="", lengths="[0]"), "tasks.lengths is"),
        (dict(questions="0"), "tasks.questions is 0"),
        (dict(split='"test"'), "tasks.split is 'test'.*train, eval"),
        (dict(templates='"new"'), "tasks.templates is 'new'"),
        (dict(answer_weight="0", context_weight="0"), "nothing of its tasks weighs"),
        (dict(answer_weight="nan"), "tasks.answer_weight is nan"),
        (dict(sed="3"), "unknown key 'sed'.*Did you mean 'seed'"),
        ({"options": "{needle = 3}"}, "a table of options for each task"),
        ({"options.key_value": "{wording = 'secret'}"}, "wording is 'secret'.*plain"),
        ({"options.needle": "{keis = 3}"}, "unknown key 'keis'.*Did you mean 'keys'"),
        ({"options.needle": '{keys = "3"}'}, "options.needle.keys is '3'"),
        ({"options.needle": "{key_kind = 'nouns'}"}, "key_kind is 'nouns'.*words"),
        ({"options.needle": "{haystack = 'hay'}"}, "haystack is 'hay'"),
        ({"options.common_words": "{often = 1}"}, "its tasks.options.common_words has common words 1 times"),
        (dict(split='"eval"') | {"options.needle": "{key_kind = 'short', n_words = 64}"}, "about 0 for 'eval'"),
        ({"options.needle": "{keys = 0, queries = 0}"}, "keys is 0.*Give 1 or more"),
        (dict(length_range="[20, 500]"), "at 20 tokens.*Ask for more tokens"),
        (dict(weights="{key_value_short = 1}", length_range="[3000, 9000]") | MANY_SHORT, "no other is left"),
    ],
)
def test_a_wrong_table_is_refused_in_three_parts(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        source(manifest(tmp_path, **changes))
    assert error.value.asked and error.value.true and error.value.change


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ("", "how many documents"),
        ('documents = 3\nfiles = ["a"]\n', "has files"),
        ("documents = 3\ntokens = 4\n", "has tokens"),
    ],
)
def test_a_wrong_manifest_of_tasks_is_refused(tmp_path, top, message):
    with pytest.raises(ConfigError, match=message):
        read_manifest(manifest(tmp_path, top=top))


def test_tasks_need_a_tokenizer_and_text(tmp_path):
    path = manifest(tmp_path)
    with pytest.raises(ConfigError, match="nothing here names one"):
        open_source(read_manifest(path))
    (tmp_path / "more").mkdir()
    with pytest.raises(ConfigError, match="is of tasks too"):
        read_manifest(manifest(tmp_path / "more", filler=f'"{path}"'))
    written = (tmp_path / "tasks.toml").read_text().replace('"tasks"', '"jsonl"', 1)
    (tmp_path / "tasks.toml").write_text(written)
    with pytest.raises(ConfigError, match=r"a \[tasks\] table and is of another format"):
        read_manifest(path)


def test_show_tells_what_weighs(tmp_path):
    said = Console(file=io.StringIO(), width=120, force_terminal=True)
    show(manifest(tmp_path), 3, tokenizer=TOKENIZER, console=said)
    text = said.file.getvalue()
    document = source(manifest(tmp_path))[0]
    assert "made as they are read from 1 files of text" in text and "weigh 2" in text and "weigh 0" in text
    assert f"\x1b[1;32m[x2]{document.pieces[2].rstrip()}" in text  # bold and green
    assert "\x1b[2m" in text  # the context is dim
