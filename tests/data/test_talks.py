"""Conversations and comparisons: what a record may be, what of it is learnt, how it is cut, and its place in rows."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import msgpack
import numpy as np
import pytest

from llamax import preflight
from llamax.batch import MISMATCHED
from llamax.config import ConfigError, Data, Losses, Preference, PreferenceLosses, Source
from llamax.data import chat, pipeline
from llamax.data.encode import Encoder
from llamax.data.encoded import Row
from llamax.data.packing import pack_window
from llamax.data.pipeline import build, cut, lacking, skipped
from llamax.data.sources import CUTS, SKIP_REASONS, open_source, parse, read_manifest, write_arrayrecord
from llamax.data.tokenizer import Tokenizer
from llamax.stages import Part
from tests.runs import FIXTURES, tiny_run

RUN = tiny_run()
VISION = RUN.model.vision
TOKENIZER = Tokenizer(RUN.data.tokenizer)
ASK = [{"role": "user", "content": "Hi"}]


def records(name: str) -> list[dict]:
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def encode(record: dict, row: Row | None = None, vision=VISION, **how):
    folder = FIXTURES if "image" in json.dumps(record, default=str) else Path("here")
    document = parse(record, "en", "record 0 of x", folder)
    return Encoder(RUN.data.tokenizer, vision, row=row or Row(), **how)(document)


def settings(names: str, **others) -> Data:
    plain = dict(
        tokenizer=RUN.data.tokenizer,
        seq_len=256,
        batch_tokens=4 * 256,
        sources={name: Source(str(FIXTURES / f"{name}.toml")) for name in names.split()},
        multimodal_steps=0.0,
        tiles_per_row=8,
        window_docs=16,
        prefetch_batches=0,
    )
    return Data(**(plain | others))


# ------------------------------------------------------------------------------------------- a slow twin, by the letter


def turns(messages) -> list[int]:
    """The tokens of messages that are plain text, from the template's own words."""
    t, ids = TOKENIZER, []
    for message in messages:
        ids += [t.header_start, *t.encode(message["role"]), t.header_end, *t.encode("\n\n")]
        ids += [*t.encode(message["content"]), t.eot]
    return ids


def said(answer) -> list[int]:
    return [*TOKENIZER.encode(answer), TOKENIZER.eot]


def slow(record) -> list[tuple]:
    """(tokens, targets, side, loss weights, margin) of each of a record's segments, in lists."""
    prompt = record["prompt"] if isinstance(record["prompt"], list) else [{"role": "user", "content": record["prompt"]}]
    sides = {"chosen": 1, "rejected": -1} if "chosen" in record else {"completion": 1 if record["label"] else -1}
    segments = []
    for key, side in sides.items():
        answer = said(record[key])
        before = [TOKENIZER.bos, *turns(prompt), *turns([{"role": "assistant", "content": ""}])[:-1]]
        ids = [*before, *answer]
        zeros, margin = [0] * (len(before) - 1), record.get("margin", 0.0)
        judged = [*zeros, *[side] * len(answer)]
        weights = [*zeros, *[float(side > 0)] * len(answer)]
        margins = [*zeros, *[margin] * len(answer)]
        segments.append((tuple(ids[:-1]), tuple(ids[1:]), tuple(judged), tuple(weights), tuple(margins)))
    return segments


def comparisons(batch, b: int) -> dict[int, list[tuple]]:
    """The segments of a row by the comparison that they are of, in the twin's form; 0: of none."""
    found: dict[int, list[tuple]] = {}
    for segment in range(1, batch.segment_ids[b].max() + 1):
        at = batch.segment_ids[b] == segment
        np.testing.assert_array_equal(batch.positions[b, at], np.arange(at.sum()))
        (number,) = set(np.abs(batch.sides[b, at]).tolist()) - {0} or {0}
        of = [batch.tokens[b, at], batch.targets[b, at], np.sign(batch.sides[b, at])]
        of += [batch.loss_weights[b, at], batch.margins[b, at]]
        found.setdefault(number, []).append(tuple(tuple(x.tolist()) for x in of))
    return found


@pytest.mark.parametrize(("align", "most"), [(0, 64), (0, 2), (64, 64), (32, 3)])
def test_comparisons_are_what_a_record_alone_says(align, most):
    wanted = [slow(record) for name in ("pairs", "labelled") for record in records(name)]
    encoders = [Encoder(RUN.data.tokenizer, None, i) for i in range(2)]
    documents = [encoders[i](d) for i, name in enumerate(("pairs", "labelled")) for d in source(name)]
    rng, lacks = np.random.default_rng(0), lacking(settings("pairs", comparisons_per_row=most))
    window = pack_window(documents, 256, 0, rng, align=align, comparisons=most, lacking=lacks)
    rows, found = window.rows, []
    assert not window.skipped and rows.ref_logp is None
    assert not any(x[rows.segment_ids == 0].any() for x in rows.of_tokens().values()), "padding is blank"
    for b in range(len(rows.tokens)):
        by_number = comparisons(rows, b)
        assert sorted(by_number) == list(range(1, len(by_number) + 1)) and len(by_number) <= most
        found += by_number.values()
    assert sorted(found) == sorted(wanted)
    assert max(Counter(map(len, found))) == 2, "two sides in one row"
    if (align, most) == (0, 64):
        assert (rows.segment_ids > 0).mean() > 0.88


def source(name: str):
    return open_source(read_manifest(FIXTURES / f"{name}.toml"))


@pytest.mark.parametrize(("align", "chunk"), [(16, 16), (32, 16), (64, 32), (128, 32)])
def test_no_chunk_of_a_comparison_lies_in_two_stripes(align, chunk):
    documents = [Encoder(RUN.data.tokenizer, None)(d) for name in ("pairs", "labelled") for d in source(name)]
    rng = np.random.default_rng(0)
    window = pack_window(documents, 256, 0, rng, align=align, comparisons=9, lacking=("ref_logp",))
    rows, stripes_of = window.rows, {}
    assert not window.skipped
    for (b, t), segment in np.ndenumerate(rows.segment_ids):
        if segment:
            stripes_of.setdefault((b, segment, rows.positions[b, t] // chunk), set()).add(t // align)
    assert all(len(found) == 1 for found in stripes_of.values())
    assert rows.positions.max() > align or align > 32, "a segment that goes over several stripes"


@pytest.mark.parametrize("align", [0, 32])
def test_a_mismatched_answer_stands_beside_a_labelled_one(align):
    """A slow twin: prompt i with the answer of i + 1, numbered beyond all others, and all else as it is without."""
    of = [*records("labelled"), *records("pairs")[:6]]
    documents = [encode(record) for record in of]
    how = dict(align=align, comparisons=7, lacking=("ref_logp",), mismatched=True)
    rows = pack_window(documents, 256, 0, np.random.default_rng(0), **how).rows
    wanted, found, numbers = [], [], []
    for record, other in zip(of, [*of[1:24], of[0], *of[24:]], strict=True):
        segments = slow(record)
        if record.get("completion") != other.get("completion"):  # the same answer tells nothing
            tokens, targets, sides, *_ = slow(record | {"completion": other["completion"], "label": True})[0]
            segments.append((tokens, targets, sides, (0.0,) * len(sides), (0.0,) * len(sides)))
        wanted.append(sorted(segments))
    for b in range(len(rows.tokens)):
        above = rows.sides > MISMATCHED
        assert not rows.loss_weights[above].any()
        numbers += np.unique(rows.sides[b, above[b]]).tolist()
        found += map(sorted, comparisons(rows._replace(sides=rows.sides - MISMATCHED * above), b).values())
    assert sorted(found) == sorted(wanted)
    assert 20 <= len(numbers) < 24 and max(numbers) <= MISMATCHED + 7


# ---------------------------------------------------------------------------------------------------- what is learnt


def spoken(record) -> list[str]:
    """What is learnt of a conversation of the fixture, turn by turn, with the marks of tool calls."""
    texts = []
    for message in record["messages"]:
        if message["role"] == "assistant" and message.get("train", True):
            text = message["content"]
            for call in message.get("tool_calls", ()):
                arguments = json.dumps(call["function"]["arguments"])
                text += f'{{"name": "{call["function"]["name"]}", "parameters": {arguments}}}'
            texts.append(text)
    return texts


def test_the_targets_that_weigh_are_exactly_what_the_assistant_says():
    data = settings("chat", multimodal_steps=1.0, seq_len=512, batch_tokens=1024)
    iterator = iter(build(data, VISION, 0))
    wanted, found = Counter(text for record in records("chat") for text in spoken(record)), Counter()
    marks = (TOKENIZER.special("python_start"), TOKENIZER.special("python_end"))
    while not wanted <= found:
        batch = next(iterator)
        assert batch.sides is None and set(np.unique(batch.loss_weights)) == {0, 1}
        for b, t in zip(*np.nonzero(batch.loss_weights), strict=True):
            if not batch.loss_weights[b, t - 1]:
                text = []
            assert batch.segment_ids[b, t] > 0
            if (target := int(batch.targets[b, t])) == TOKENIZER.eot:
                found[TOKENIZER.decode(text)] += 1
                assert not batch.loss_weights[b, t + 1 : t + 5].any(), "headers are not learnt"
                text = []
            elif target not in marks:
                text.append(target)
        assert not text, "every turn ends"
    assert set(found) == set(wanted)
    assert not skipped(iterator, data) and not cut(iterator, data)


def learnt(record, **how) -> str:
    encoded = encode(record, **how)
    return TOKENIZER.decode([i for i in encoded.tokens[encoded.weights > 0] if i < TOKENIZER.n_ranks])


def test_a_message_or_a_manifest_says_who_is_learnt(tmp_path):
    record = {"messages": [*ASK, {"role": "assistant", "content": "one"}, {"role": "user", "content": "two"}]}
    assert learnt(record) == "one"
    assert learnt(record, learnt=("user",)) == "Hitwo"
    assert learnt(record, learnt=("user", "assistant")) == "Hionetwo"
    record["messages"][2] |= {"train": True}
    assert learnt(record) == "onetwo"
    record["messages"][1] |= {"weight": 0}  # OpenAI's word
    assert learnt(record) == "two" and learnt(record, learnt=("user",)) == "Hitwo"
    for wrong in (3, "yes", 0.5):
        for key in ("train", "weight"):
            assert parse_error({"messages": [{"role": "user", "content": "Hi", key: wrong}]})
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    (tmp_path / "x.toml").write_text('format = "jsonl"\nfiles = ["x.jsonl"]\nlearnt = ["user", "ipython"]\n')
    assert read_manifest(tmp_path / "x.toml").learnt == ("user", "tool")
    data = settings("", sources={"x": Source(str(tmp_path / "x.toml"))})
    batch = next(iter(build(data, None, 0)))
    weighs = [TOKENIZER.decode([i for i in batch.targets[0, batch.loss_weights[0] > 0] if i < TOKENIZER.n_ranks])]
    assert weighs[0].startswith("Hitwo")
    for wrong in ('["robot"]', "[]", '"user"', "[3]"):
        (tmp_path / "x.toml").write_text(f'format = "jsonl"\nfiles = ["x.jsonl"]\nlearnt = {wrong}\n')
        with pytest.raises(ConfigError, match="learnt"):
            read_manifest(tmp_path / "x.toml")


def test_marks_may_be_left_out_of_what_is_compared():
    record = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}
    with_marks, without = encode(record), encode(record, Row(compare_marks=False))
    assert (with_marks.sides != 0).sum() == (without.sides != 0).sum() + 2
    assert not without.sides[without.tokens == TOKENIZER.eot].any()
    np.testing.assert_array_equal(with_marks.weights, without.weights)  # the end of a turn is learnt all the same


# ------------------------------------------------------------------------------------------------------------- cutting


def talk_of(n: int, system: bool = True) -> dict:
    """n questions with answers, of about the same length."""
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    for i in range(n):
        messages += [{"role": "user", "content": f"question {i}?"}, {"role": "assistant", "content": f"answer {i}."}]
    return {"messages": messages}


def pair_of(n: int, chosen: str, rejected: str) -> dict:
    return {"prompt": talk_of(n)["messages"][:-1], "chosen": chosen, "rejected": rejected}


def text_of(encoded, *, start: int = 0, end: int | None = None) -> str:
    return TOKENIZER.decode([i for i in encoded.tokens[start:end] if i < TOKENIZER.n_ranks])


def test_the_oldest_turns_go_and_the_system_message_stays():
    record, whole = talk_of(6), len(encode(talk_of(6)).tokens)
    for seq_len in range(whole, 50, -7):
        encoded = encode(record, Row(seq_len, too_long="cut_begin"))
        kept = [i for i in range(6) if f"question {i}?" in text_of(encoded)]
        assert kept == list(range(6 - len(kept), 6)) and len(encoded.tokens) - 1 <= seq_len
        shorter = {"messages": [record["messages"][0], *record["messages"][-2 * len(kept) :]]}
        np.testing.assert_array_equal(encoded.tokens, encode(shorter).tokens)
        if len(kept) < 6:
            more = {"messages": [record["messages"][0], *record["messages"][-2 * len(kept) - 2 :]]}
            assert len(encode(more).tokens) - 1 > seq_len, "no more than needed goes"
        assert encoded.cut == ("cut_begin" if len(kept) < 6 else "")
    assert encode(record, Row(10, too_long="cut_begin")).skip == "too_long"
    assert encode(record, Row(whole - 2)).skip == "too_long"  # "skip" is what happens unasked


def test_tools_stay_where_the_message_that_brought_them_goes():
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    record = talk_of(6) | {"tools": tools}
    encoded = encode(record, Row(len(encode(record).tokens) - 20, too_long="cut_begin"))
    assert "weather" in text_of(encoded) and "question 0?" not in text_of(encoded) and not encoded.skip


def test_an_end_is_cut_at_the_token():
    whole = encode(talk_of(6))
    for seq_len in (len(whole.tokens) - 1, 60, 40):
        encoded = encode(talk_of(6), Row(seq_len, too_long="cut_end"))
        np.testing.assert_array_equal(encoded.tokens, whole.tokens[: seq_len + 1])
        np.testing.assert_array_equal(encoded.weights, whole.weights[: seq_len + 1])
    assert encode(talk_of(6), Row(8, too_long="cut_end")).skip == "no_answer"  # it ends before the first answer


def test_no_cut_falls_into_a_picture():
    image = {"type": "image", "image": str(FIXTURES / "pictures" / "wide.png")}
    shown = [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}]
    messages = [*ASK, {"role": "assistant", "content": "Hello."}, *shown, {"role": "assistant", "content": "Bars."}]
    whole = encode({"messages": messages})
    begin, end, n_tiles = whole.pictures[0].tolist()
    for seq_len in range(begin - 1, len(whole.tokens) - 1):
        encoded = encode({"messages": messages}, Row(seq_len, too_long="cut_end"))
        n = seq_len + 1 if not begin < seq_len + 1 < end else begin
        assert len(encoded.tokens) == n and len(encoded.tiles) == (n_tiles if n >= end else 0)
    assert encode({"messages": messages}, Row(999, n_tiles - 1)).skip == "too_long"
    encoded = encode({"messages": messages}, Row(999, n_tiles - 1, too_long="cut_end"))
    assert len(encoded.tokens) == begin and not len(encoded.tiles) and encoded.cut == "cut_end"
    twice = {"messages": [*shown, {"role": "assistant", "content": "Bars."}, *messages[2:]]}
    encoded = encode(twice, Row(999, 2 * n_tiles - 1, too_long="cut_begin"))
    np.testing.assert_array_equal(encoded.tokens, encode({"messages": messages[2:]}).tokens)
    assert len(encoded.tiles) == n_tiles


def test_both_sides_of_a_comparison_lose_the_same_turns():
    record = pair_of(5, "right " * 9, "wrong " * 12)
    whole = encode(record)
    for stripe in (0, 16):
        for seq_len in range(len(whole.tokens) // 16 * 16, 60, -16):
            encoded = encode(record, Row(seq_len, 0, stripe, "cut_begin"))
            if encoded.skip:
                assert encoded.skip == "too_long" and seq_len < 130
                continue
            halves = text_of(encoded, end=encoded.second), text_of(encoded, start=encoded.second)
            for half in halves:
                kept = [i for i in range(5) if f"question {i}?" in half]
                assert kept == list(range(5 - len(kept), 5)) and "Be brief." in half
            assert halves[0].replace("right", "wrong").startswith(halves[1].replace("wrong", "")[:20])
            assert halves[0].split("right")[0] == halves[1].split("wrong")[0]
            np.testing.assert_array_equal(encoded.tokens, encode(shorter(record, kept)).tokens)


def shorter(record: dict, kept: list[int]) -> dict:
    return record | {"prompt": [record["prompt"][0], *record["prompt"][-2 * len(kept) + 1 :]]}


def test_both_answers_lose_what_is_over_the_same_length():
    record = pair_of(1, "right " * 20, "wrong " * 9)
    whole, prompt = encode(record), len(encode(record).tokens)
    both = [int((whole.sides == side).sum()) for side in (1, -1)]
    prompt = whole.second - both[0]
    for seq_len in range(2 * prompt, len(whole.tokens) - 2):
        encoded = encode(record, Row(seq_len, 0, too_long="cut_end"))
        if encoded.skip:
            assert seq_len < 2 * prompt + 1 and encoded.skip in ("identical", "too_long")
            continue
        kept = [int((encoded.sides == side).sum()) for side in (1, -1)]
        assert kept == [min(max(kept), n) for n in both] and encoded.cut == "cut_end"
        assert seq_len - 1 <= len(encoded.tokens) - 2 <= seq_len, "as much as fits"
    same = pair_of(1, "the same at first, then yes", "the same at first, then no")
    assert encode(same, Row(2 * prompt + 4, 0, too_long="cut_end")).skip == "identical"


# ------------------------------------------------------------------------------------------------------------- records


def parse_error(record, folder: Path | None = Path("here")) -> str:
    with pytest.raises(ConfigError) as error:
        parse(record, "en", "record 3 of x.jsonl", folder)
    assert error.value.asked == "record 3 of x.jsonl" and error.value.change
    return error.value.true


SAYS = {"role": "assistant", "content": "Hello."}
WRONG = {
    "unknown role": ({"messages": [{"role": "robot", "content": "Hi"}]}, "message 0 (role robot)"),
    "assistant first": ({"messages": [SAYS]}, "message 0 is the assistant's"),
    "assistant behind the system": ({"messages": [{"role": "system", "content": "x"}, SAYS]}, "message 1 is the"),
    "system alone": ({"messages": [{"role": "system", "content": "x"}]}, "nobody speaks"),
    "no messages": ({"messages": []}, "no messages"),
    "messages as text": ({"messages": "Hi"}, "it is a str"),
    "messages of texts": ({"messages": ["Hi"]}, "no map"),
    "image without a file": ({"messages": [{"role": "user", "content": [{"type": "image"}]}, SAYS]}, "missing"),
    "image as a number": ({"messages": [{"role": "user", "content": [{"type": "image", "image": 3}]}]}, "of type int"),
    "image by its address": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a:b"}}]}, SAYS]},
        "nothing is ever fetched",
    ),
    "tool unasked": ({"messages": [{"role": "tool", "content": "3"}, SAYS]}, "answers a tool call"),
    "two forms": ({"messages": ASK, "chosen": "a", "rejected": "b"}, "it has messages, chosen"),
    "half a pair": ({"prompt": ASK, "chosen": "a"}, "it has chosen"),
    "no label": ({"prompt": ASK, "completion": "a"}, "it has completion"),
    "label as text": ({"prompt": ASK, "completion": "a", "label": "true"}, "label"),
    "no prompt": ({"completion": "a", "label": True}, "no prompt"),
    "prompt of the assistant": ({"prompt": [SAYS], "chosen": "a", "rejected": "b"}, "unasked"),
    "answer of the user": ({"prompt": ASK, "chosen": ASK, "rejected": "b"}, "begins with a message of user"),
    "answer of none": ({"prompt": ASK, "chosen": [], "rejected": "b"}, "there is none"),
    "answer as a number": ({"prompt": ASK, "chosen": 3, "rejected": "b"}, "chosen: it is a int"),
    "margin as text": ({"prompt": ASK, "chosen": "a", "rejected": "b", "margin": "big"}, "margin"),
    "margin without end": ({"prompt": ASK, "chosen": "a", "rejected": "b", "margin": float("inf")}, "margin"),
    "tools as a dict": ({"messages": [*ASK, SAYS], "tools": {"a": 1}}, "tools"),
    "tools of texts": ({"messages": [*ASK, SAYS], "tools": ["weather"]}, "tools"),
    "meta as text": ({"messages": [*ASK, SAYS], "meta": "x"}, "meta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_record_says_what_is_wrong(name):
    record, about = WRONG[name]
    if name == "image by its address":  # a data: URL is as good as a file, so only the encoder knows
        encoded = encode(record)
        assert encoded.skip == "malformed" and about in encoded.where
        return
    assert about in parse_error(record)


UNFIT = {
    "empty_answer": ({"prompt": ASK, "chosen": " \n", "rejected": "b"}, "no_answer"),
    "empty completion": ({"prompt": ASK, "completion": "", "label": False}, "no_answer"),
    "empty turn": ({"messages": [*ASK, {"role": "assistant", "content": ""}]}, "no_answer"),
    "empty parts": (
        {"messages": [*ASK, {"role": "assistant", "content": [{"type": "text", "text": " "}]}]},
        "no_answer",
    ),
    "sampled end of turn alone": (
        {"prompt": ASK, "completion": {"role": "assistant", "token_ids": [TOKENIZER.eot]}, "label": True},
        "no_answer",
    ),
    "no turn": ({"messages": ASK}, "no_answer"),
    "nothing learnt": ({"messages": [*ASK, SAYS | {"train": False}]}, "no_answer"),
    "answer that is not learnt": ({"prompt": ASK, "chosen": [SAYS | {"train": False}], "rejected": "b"}, "no_answer"),
    "identical": ({"prompt": ASK, "chosen": "a", "rejected": [{"role": "assistant", "content": "a"}]}, "identical"),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud800"}, SAYS]}, "invalid_utf8"),
    "surrogate of a key": ({"messages": [*ASK, SAYS], "meta": {"\ud800": 1}}, "invalid_utf8"),
    "too large": ({"messages": [*ASK, SAYS], "meta": {"x": "x" * 2**24}}, "too_large"),
    "missing picture": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "none.png"}]}, SAYS]},
        "image_missing",
    ),
    "no vision": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "pictures/bars.png"}]}, SAYS]},
        "unexpected_picture",
    ),
    "sampled marks": (
        {"messages": [*ASK, {"role": "assistant", "token_ids": [TOKENIZER.eot, 70, TOKENIZER.eot]}, *ASK]},
        "malformed",
    ),
    "sampled elsewhere": ({"messages": [*ASK, {"role": "assistant", "token_ids": [10**6]}]}, "malformed"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_learnt_is_skipped_with_its_reason(name):
    record, reason = UNFIT[name]
    encoded = encode(record, vision=None if name == "no vision" else VISION)
    assert encoded.skip == reason and reason in SKIP_REASONS and not len(encoded.tokens)
    assert encoded.where.startswith("record 0 of x")


def test_answers_and_prompts_have_short_forms():
    plain = {"prompt": ASK, "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}
    both = {"chosen": [*ASK, {"role": "assistant", "content": "a"}], "rejected": [*ASK, SAYS | {"content": "b"}]}
    forms = [plain, plain | {"prompt": "Hi"}, plain | {"chosen": "a"}, plain | {"chosen": plain["chosen"][0]}, both]
    for form in forms:
        np.testing.assert_array_equal(encode(form).tokens, encode(plain).tokens)
        np.testing.assert_array_equal(encode(form).sides, encode(plain).sides)
    same = [*ASK, SAYS]
    assert encode({"chosen": same, "rejected": same}).skip == "identical"


def test_sampled_turns_stay_the_ids_that_they_are():
    ids = [*TOKENIZER.encode("Hel"), *TOKENIZER.encode("lo"), TOKENIZER.eot]
    record = {"prompt": ASK, "chosen": {"role": "assistant", "token_ids": ids}, "rejected": "b"}
    encoded = encode(record)
    assert encoded.tokens[encoded.sides > 0].tolist() == ids


def test_arrayrecord_holds_the_pictures_themselves(tmp_path):
    data = (FIXTURES / "pictures" / "red_circle.png").read_bytes()
    told = []
    for record in records("chat") + records("pairs_pictures"):
        text = json.dumps(record)
        if "red_circle" in text and "blue_star" not in text:
            told.append(record)
    assert len(told) >= 3

    def inside(value):
        if isinstance(value, dict):
            return {key: data if key == "image" else inside(x) for key, x in value.items()}
        return [inside(x) for x in value] if isinstance(value, list) else value

    write_arrayrecord(tmp_path / "x", map(inside, told))
    (tmp_path / "x.toml").write_text('format = "arrayrecord"\nfiles = ["x"]\nkind = "multimodal"\n')
    encoder = Encoder(RUN.data.tokenizer, VISION)
    for document, record in zip(open_source(read_manifest(tmp_path / "x.toml")), told, strict=True):
        there, here = encoder(document), encode(record)
        assert not there.skip
        np.testing.assert_array_equal(there.tokens, here.tokens)
        np.testing.assert_array_equal(there.tiles, here.tiles)
    with pytest.raises(ConfigError, match="encoded file's bytes"):
        write_arrayrecord(tmp_path / "y", told)
    assert "its image is of type bytes" in parse_error(msgpack.unpackb(msgpack.packb(inside(told[0]))))


# ----------------------------------------------------------------------------------------------------------- in a run


def test_a_run_without_comparisons_refuses_a_source_of_them():
    with pytest.raises(ConfigError, match=r"record 0 of .*pairs.jsonl compares answers.*comparisons_per_row=64"):
        build(settings("pairs"), None, 0)
    assert lacking(settings("pairs")) == ("sides", "ref_logp", "margins")
    assert lacking(settings("pairs", comparisons_per_row=1)) == ("ref_logp",)
    batch = next(iter(build(settings("text", comparisons_per_row=1), None, 0)))  # fields depend on settings alone
    assert batch.lacking() == ("ref_logp",) and not batch.sides.any()


@pytest.mark.parametrize("name", ["labelled", "text"])
def test_losses_of_two_answers_need_a_source_that_has_two(name):
    """They would be 0 for every record, and teach nothing. In another stage, or beside such a source, it is one."""
    losses = PreferenceLosses(sigmoid=1.0)
    dpo = dataclasses.replace(RUN, preference=Preference(losses), data=settings(name, comparisons_per_row=1))
    with pytest.raises(ConfigError, match=r"preference.losses.sigmoid, but .* no source has chosen and rejected"):
        preflight.check_pairs([Part("", 0, dpo)])
    with pytest.raises(ConfigError, match="losses.reward"):
        preflight.check_pairs([Part("", 0, dataclasses.replace(dpo, losses=Losses(reward=1.0)))])
    preflight.check_pairs([Part("", 0, dataclasses.replace(dpo, losses=Losses(preference=0.0)))])
    preflight.check_pairs([Part("", 0, dataclasses.replace(dpo, preference=Preference(PreferenceLosses(kto=1.0))))])
    both = dataclasses.replace(dpo, data=settings(f"{name} pairs", comparisons_per_row=1))
    preflight.check_pairs([Part("", 0, dpo), Part("", 1, both)])


@pytest.mark.parametrize("label", [True, False])
def test_labels_all_of_one_kind_are_refused(tmp_path, label):
    def write(name: str, of: list[bool]) -> Source:
        lines = [json.dumps({"prompt": "Hi", "completion": f"{i}", "label": good}) for i, good in enumerate(of)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        (tmp_path / f"{name}.toml").write_text(f'format = "jsonl"\nfiles = ["{name}.jsonl"]\n')
        return Source(str(tmp_path / f"{name}.toml"))

    one, other = write("one", [label] * 300), write("other", [not label])
    rare = write("rare", [label] * 200 + [not label] + [label] * 99)  # which no sample would find
    of = dict(comparisons_per_row=9)
    kind = "good" if label else "bad"
    with pytest.raises(ConfigError, match=rf"data source one, but all of their answers that have a label are {kind}"):
        build(settings("", sources={"one": one}, **of), None, 0)
    build(settings("", sources={"rare": rare}, **of), None, 0)
    build(settings("", sources={"one": one, "other": other}, **of), None, 0)


def long_ones(folder: Path) -> Source:
    """Conversations of 36 to 380 tokens."""
    (folder / "long.jsonl").write_text("\n".join(json.dumps(talk_of(1 + i % 12)) for i in range(36)))
    (folder / "long.toml").write_text('format = "jsonl"\nfiles = ["long.jsonl"]\n')
    return Source(str(folder / "long.toml"))


def test_a_stream_with_comparisons_goes_on_where_it_was(tmp_path):
    names = "chat pairs pairs_pictures labelled text"
    data = settings(names, comparisons_per_row=5, multimodal_steps=0.5, seq_len=128, batch_tokens=512, lanes=2)
    data = dataclasses.replace(data, too_long="cut_end", sources=data.sources | {"long": long_ones(tmp_path)})
    stream = iter(build(data, VISION, 1))
    states, batches = [], []
    for _ in range(14):
        states.append(json.dumps(stream.get_state()))
        batches.append(next(stream))
    assert cut(stream, data)["long"]["cut_end"] > 5
    assert max(b.sides.max() for b in batches) == 5 and min(b.sides.min() for b in batches) <= -3
    resumed = iter(build(data, VISION, 1))
    for point in (0, 5, 11):
        resumed.set_state(json.loads(states[point]))
        assert json.dumps(resumed.get_state()) == states[point]
        for batch in batches[point : point + 3]:
            for name, x in next(resumed)._asdict().items():
                np.testing.assert_array_equal(x, getattr(batch, name), err_msg=name)


@pytest.mark.parametrize("policy", ["skip", *CUTS])
def test_what_is_cut_or_left_out_is_counted(tmp_path, monkeypatch, policy):
    """A window is an epoch of the source here: as many as its records alone say."""
    monkeypatch.setattr(pipeline, "MIN_WINDOW_ROWS", 1)
    source = long_ones(tmp_path)
    data = settings("", sources={"long": source}, seq_len=128, batch_tokens=256, too_long=policy, window_docs=36)
    iterator = iter(build(data, None, 0))
    next(iterator)
    assert iterator.get_state()["text"]["window"] == 0
    encoder = Encoder(RUN.data.tokenizer, None, row=Row(128, 0, 0, policy))
    alone = Counter()
    for document in open_source(read_manifest(source.path)):
        encoded = encoder(document)
        alone[encoded.skip or encoded.cut] += 1
    found = skipped(iterator, data).get("long", {}) | cut(iterator, data).get("long", {})
    assert set(found) == {"too_long" if policy == "skip" else policy} == set(alone) - {""}
    assert sum(found.values()) == alone["too_long"] + alone[policy] > 5


def test_the_template_is_the_chat_modules():
    """A record's tokens are those of a conversation in chat.py, pictures and tools included."""
    for record in records("chat"):
        messages = json.loads(json.dumps(record["messages"]).replace("pictures/", f"{FIXTURES}/pictures/"))
        there = chat.encode(chat.render(messages, tools=record.get("tools")), TOKENIZER, VISION)
        here = encode(record)
        np.testing.assert_array_equal(here.tokens, there.tokens)
        np.testing.assert_array_equal(here.weights, there.weights)
