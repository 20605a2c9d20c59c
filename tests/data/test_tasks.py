"""Tasks: the answer is in the context as often as it should be, where it should be, and cannot be told otherwise."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from llamax.config import ConfigError, Vision
from llamax.data.document import Document, Picture
from llamax.data.embedded import draw, scene
from llamax.data.encode import Encoder
from llamax.data.sources import open_source, read_manifest
from llamax.data.tasks import RULER, TASKS, Sample, Texts, Tokens, haystack, pictures, score, words
from llamax.data.tasks.sample import Ask

DATA = Path(__file__).resolve().parents[2] / "data"
VISION = Vision(tile_px=28, patch_px=7, max_tiles=1)
TOKENS = Tokens(str(DATA / "tokenizer.model"), VISION)
FILLER = Texts(open_source(read_manifest(DATA / "fixtures" / "text.toml")))
LENGTH = 1536
COUNTING = {"common_words", "frequent_words", "cwe", "fwe"}  # no needle, so no depth
PICTURES = {"picture_needle", "picture_lookup", "picture_change"}
OWN = sorted(set(TASKS) - set(RULER))


def sample(name, seed=0, length=LENGTH, depth=0.5, **how) -> Sample:
    return TASKS[name](random.Random(f"{name}/{seed}"), FILLER, length, depth, TOKENS, **how)


def exam(name, seed, questions, length=LENGTH, **how):
    return TASKS[name].exam(random.Random(f"{name}/{seed}"), FILLER, length, None, TOKENS, questions=questions, **how)


def text_of(pieces) -> str:
    return "".join(piece for piece in pieces if isinstance(piece, str))


def times(answer: str, text: str) -> int:
    """How often it stands there, not as a part of another word or number."""
    return len(re.findall(rf"(?<![\w-]){re.escape(answer)}(?![\w-])", text))


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_has_its_length_as_the_encoder_counts_it(name):
    encode = Encoder(TOKENS.path, VISION)
    for seed, length in enumerate((1024, LENGTH, 4096)):
        made = sample(name, seed, length)
        encoded = encode(Document((*made.pieces, made.meta["said"])))
        assert not encoded.skip
        taken = len(encoded.tokens) - 1  # the end of the text is only a target
        assert 0.95 * length <= taken <= length
        assert made.meta["tokens"] == taken - 1 - TOKENS.count(made.meta["said"])


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_follows_from_its_generator(name):
    assert sample(name, 1) == sample(name, 1)
    assert sample(name, 1).pieces != sample(name, 2).pieces


@pytest.mark.parametrize("name", sorted(set(TASKS) - COUNTING))
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_needle_stands_at_its_depth(name, depth):
    """Counted from the text: tokens before the needle, of all tokens but the needles', which are few."""
    made = sample(name, 3, 4096, depth)
    assert made.meta["depth"] == pytest.approx(depth, abs=0.03)
    *context, question = made.pieces
    if name in PICTURES:
        key = made.answers[0] if name == "picture_needle" else re.findall(r"[a-z]+-[a-z]+", question)[0]
        where = next(i for i, piece in enumerate(context) if isinstance(piece, str) and key in piece)
        before = TOKENS.count(*context[:where], context[where].partition(key)[0])
    else:
        sought = made.answers[0]
        if name == "ordering":  # which of the three is the first to be asked for is not told: any of them
            at = [text_of(context).index(part) / len(text_of(context)) for part in sought.split(", ")]
            assert min(abs(x - depth) for x in at) < 0.06
            return
        if name == "needle_multivalue" or name == "niah_multivalue":
            at = [text_of(context).index(value) / len(text_of(context)) for value in made.answers]
            assert min(abs(x - depth) for x in at) < 0.06
            return
        before = TOKENS.count(text_of(context).partition(sought)[0])
    assert before / TOKENS.count(*context) == pytest.approx(depth, abs=0.06)


def expected(name: str, hops: int) -> set[int]:
    """How often an answer stands in the context."""
    if name in ("tracking", "vt"):
        return {1, 2}  # the last of a chain once, the others where they get and where they give their value
    return {1}


@pytest.mark.parametrize("name", sorted(set(TASKS) - COUNTING - PICTURES - {"ordering"}))
def test_an_answer_stands_in_the_context_as_often_as_it_should_and_not_in_the_question(name):
    for seed in range(5):
        made = sample(name, seed, depth=None)
        *context, question = made.pieces
        for answer in made.answers:
            assert times(answer, text_of(context)) in expected(name, 2)
            assert not times(answer, question)
        assert score(made, made.meta["said"]) == 1


@pytest.mark.parametrize("name", sorted(PICTURES | {"ordering"}))
def test_an_answer_is_not_spelt_out_anywhere(name):
    for seed in range(5):
        made = sample(name, seed, depth=None)
        (answer,) = made.answers
        assert text_of(made.pieces).count(answer) == (name == "picture_needle")
        assert score(made, made.meta["said"]) == 1


def test_only_the_needle_picture_shows_what_is_asked_for(monkeypatch):
    drawn = []

    def remember(rng, shapes, side):
        drawn.append(shapes[0].name)
        return original(rng, shapes, side)

    original = draw.png_of
    monkeypatch.setattr(draw, "png_of", remember)
    for seed in range(5):
        drawn.clear()
        made = sample("picture_needle", seed)
        asked = re.search(r"the ?(\w+ \w+)\?|a (\w+ \w+)\?", made.pieces[-1])
        assert drawn.count(asked[1] or asked[2]) == 1 and len(drawn) == 8
        assert sum(isinstance(piece, Picture) for piece in made.pieces) == 8


def test_the_change_is_what_the_two_pictures_differ_in(monkeypatch):
    drawn = []

    def remember(rng, shapes, side):
        drawn.append(shapes[0])
        return original(rng, shapes, side)

    original = draw.png_of
    monkeypatch.setattr(draw, "png_of", remember)
    for seed in range(8):
        drawn.clear()
        made = sample("picture_change", seed)
        before, after = drawn[:2]
        attribute, old, new = re.fullmatch(r"(\w+), from (\w+) to (\w+)", made.answers[0]).groups()
        assert (getattr(before, attribute), getattr(after, attribute)) == (old, new) and old != new
        same = [name for name in ("colour", "shape", "size", "position") if name != attribute]
        assert [getattr(before, name) for name in same] == [getattr(after, name) for name in same]


def test_no_more_pictures_are_asked_for_by_content_than_there_are_names(monkeypatch):
    """48; 47 where others, which show something else, are among them."""
    monkeypatch.setattr(draw, "png_of", lambda rng, shapes, side: PNG)
    for n, most in ((8, 48), (48, 48), (60, 47)):
        task = TASKS["picture_needle"].with_options(dict(n=n))
        made = task.exam(random.Random(n), FILLER, 8192, None, TOKENS, questions=100)
        assert len(made.questions) == most == len({question.asked for question in made.questions})
        assert sum(isinstance(piece, Picture) for piece in made.context) == max(n, most)
    assert len(exam("picture_lookup", 1, 60, 8192).questions) == 60


PNG = draw.png_of(random.Random(0), [scene.draw_one(random.Random(0))], 28)


def test_what_changes_in_evaluation_is_colour_or_shape():
    """About as often, and the two drawings are new ones."""
    rng, changed = random.Random(0), Counter()
    for _ in range(400):
        before, after = pictures._pair(rng, "eval")
        assert {before.key, after.key} <= scene.HELD_OUT
        changed[before.colour != after.colour] += 1
    assert 0.3 < changed[True] / 400 < 0.6


# ------------------------------------------------------------------------------------------- training and evaluation


@pytest.mark.parametrize("name", TASKS)
def test_training_and_evaluation_share_no_key_and_no_value(name, monkeypatch):
    drawn = {"train": set(), "eval": set()}
    original, png_of = words.Supply.draw, draw.png_of

    def remember(supply, kind, n):
        found = original(supply, kind, n)
        drawn[supply.split] |= set(found)
        return found

    shown = {"train": [], "eval": []}
    monkeypatch.setattr(words.Supply, "draw", remember)
    for split in drawn:

        def look(rng, shapes, side, split=split):
            shown[split].append(shapes[0].key)
            return png_of(rng, shapes, side)

        monkeypatch.setattr(draw, "png_of", look)
        for seed in range(6):
            made = sample(name, seed, split=split)
            spoken = {a for a in made.answers if name not in PICTURES - {"picture_needle"} and name != "ordering"}
            assert spoken <= drawn[split]
    assert drawn["train"] and drawn["eval"] and not drawn["train"] & drawn["eval"]
    assert {words.split_of(found) for found in drawn["eval"]} == {"eval"}
    if name in PICTURES:
        assert not scene.HELD_OUT.intersection(shown["train"])
        assert scene.HELD_OUT.issuperset(shown["eval"]) and len(shown["eval"]) == 6 * 8


def test_a_quarter_of_all_keys_is_for_evaluation():
    n = sum(words.split_of(f"{i}-key") == "eval" for i in range(4000))
    assert 900 < n < 1100


def pattern(template: str) -> re.Pattern:
    return re.compile(re.sub(r"\\\{\w+\\\}", r"([\\w /,-]+?)", re.escape(template)) + r"\Z")


def asked_by(wording) -> list[str]:
    """The forms of its questions."""
    fields = ("asked", "asked_all", "content", "named", "change")
    return [getattr(wording, field) for field in fields if hasattr(wording, field)]


@pytest.mark.parametrize("name", OWN)
def test_held_out_templates_are_others(name):
    make = TASKS[name].make
    forms = {"seen": set(), "held_out": set()}
    for which in forms:
        forms[which] = {form for wording in getattr(make, which) for form in asked_by(wording)}
    assert forms["seen"] and forms["held_out"] and not forms["seen"] & forms["held_out"]
    said = {which: {part for w in getattr(make, which) for part in w if part} for which in forms}
    assert not said["seen"] & said["held_out"]
    for which, other in (("seen", "held_out"), ("held_out", "seen")):
        for seed in range(6):
            question = sample(name, seed, templates=which).pieces[-1].strip("\n")
            assert any(pattern(form).match(question) for form in forms[which])
            assert not any(pattern(form).match(question) for form in forms[other])


# ------------------------------------------------------------------------------------------------------------- no leak


def chi_square(counts, cells: int) -> float:
    n = sum(counts.values())
    return sum((counts.get(cell, 0) - n / cells) ** 2 / (n / cells) for cell in range(cells))


# Of uniform counts in k cells, chi square is beyond these in one of ten thousand tests.
BEYOND = {2: 15.2, 4: 21.1, 5: 23.6, 6: 25.8, 10: 33.8}


def test_what_is_asked_for_is_told_neither_by_place_nor_by_rank():
    """Of four needles: their order in the text, the alphabet of keys, the size of values. The place is told neither by
    the template nor by the length of the context, and a value not by its key, which is all that a question has."""
    place, key_rank, value_rank = Counter(), Counter(), Counter()
    by_template, by_length, pairs = {}, {}, []
    for seed in range(300):
        made = sample("needle_multikey", seed, 384, None)
        found = re.findall(r"([a-z]+-[a-z]+)(?: is| has the number| stands for)? (\d{7})\.", made.pieces[0])
        assert len(found) == 4  # asked for or not, they look the same
        (index,) = [i for i, (_, value) in enumerate(found) if value == made.answers[0]]
        key, value = found[index]
        assert key in made.pieces[-1]
        place[index] += 1
        by_template.setdefault(made.pieces[-1].split()[0], Counter())[index] += 1
        by_length.setdefault(made.meta["tokens"] > 370, Counter())[index] += 1
        pairs += found
        key_rank[sorted(k for k, _ in found).index(key)] += 1
        value_rank[sorted(v for _, v in found).index(value)] += 1
    assert len(by_template) > 2 and len(by_length) == 2
    for counts in (place, key_rank, value_rank, *by_template.values(), *by_length.values()):
        assert chi_square(counts, 4) < BEYOND[4]
    keys, values = sorted(key for key, _ in pairs), sorted(value for _, value in pairs)
    both = Counter(2 * (key > keys[len(keys) // 2]) + (value > values[len(values) // 2]) for key, value in pairs)
    assert chi_square(both, 4) < BEYOND[4]


def test_records_are_asked_for_all_over_the_context_in_any_order():
    deciles, order, forms = Counter(), Counter(), {}
    for seed in range(60):
        made = exam("key_value", seed, 6, 512)
        lines = made.context[0].splitlines()
        for question in made.questions:
            (line,) = [i for i, text in enumerate(lines) if times(question.answers[0], text)]
            deciles[line * 10 // len(lines)] += 1
            forms.setdefault(question.asked.split()[0] == "What", Counter())[line * 2 // len(lines)] += 1
        depths = [question.depth for question in made.questions]
        for i in range(0, len(depths), 2):
            order[int(depths[i] < depths[i + 1])] += 1
    assert chi_square(deciles, 10) < BEYOND[10]
    assert chi_square(order, 2) < BEYOND[2]
    assert all(chi_square(counts, 2) < BEYOND[2] for counts in forms.values())  # nor by the template


def test_the_order_is_not_that_of_the_question():
    orders = Counter()
    for seed in range(200):
        made = sample("ordering", seed, 384, None)
        said = made.answers[0].split(", ")
        named = [name for name in re.findall(r"[a-z]+-[a-z]+", made.pieces[-1]) if name in said]
        orders[sorted(itertools.permutations(range(3))).index(tuple(named.index(x) for x in said))] += 1
        at = [made.pieces[0].index(name) for name in said]
        assert at == sorted(at)
    assert chi_square(orders, 6) < BEYOND[6]


def test_the_chain_that_is_asked_for_is_any():
    first = Counter()
    for seed in range(200):
        made = sample("tracking", seed, 512, None)
        values = re.findall(r"(?:be|=) (\d{7})", made.pieces[0])
        assert len(values) == 2
        first[int(values[0] in made.pieces[-1])] += 1
    assert chi_square(first, 2) < BEYOND[2]


@pytest.mark.parametrize("name", ["common_words", "cwe"])
def test_common_words_are_not_told_by_their_place(name):
    """Where a common word stands first, and whether the first word of all is one, is as chance has it."""
    first, n, share = 0, 0, 0.0
    for seed in range(60):
        made = sample(name, seed, 1024)
        listed = re.findall(r"[a-z]+-[a-z]+", made.pieces[0])
        first += listed[0] in made.answers
        share += sum(word in made.answers for word in listed) / len(listed)
        n += 1
    sd = (share * (1 - share / n)) ** 0.5
    assert abs(first - share) < 4 * sd + 1


# --------------------------------------------------------------------------------------------------- truth of the tasks


@pytest.mark.parametrize("name", ["tracking", "vt"])
def test_following_every_assignment_gives_the_answer(name):
    """A slow twin: reads the text from its beginning and keeps what every variable holds."""
    hold = {}
    made = sample(name, 5, depth=None)
    form = r"(?:VAR|Let) ([A-Z]{5}) (?:be|=) (?:VAR )?([A-Z]{5}|\d+)"
    for variable, given in re.findall(form, made.pieces[0]):
        hold[variable] = hold.get(given, given)
    value = re.search(r"\d{5,7}", made.pieces[-1])[0]
    assert [variable for variable, held in hold.items() if held == value] == list(made.answers)
    assert len(hold) == (5 if name == "vt" else 6)
    for before, after in itertools.pairwise(made.answers):  # hop after hop, not all of them from the first
        assert re.search(rf"{after} (?:be|=) (?:VAR )?{before}", made.pieces[0])


@pytest.mark.parametrize("name", ["needle_multivalue", "niah_multivalue"])
def test_values_are_said_in_the_order_of_the_text(name):
    made = sample(name, 2, depth=0.4)
    at = [made.pieces[0].index(value) for value in made.answers]
    assert at == sorted(at) and len(at) == 4


def test_several_queries_are_answered_in_the_order_of_the_question():
    made = sample("niah_multiquery", 2)
    keys = [re.search(rf"for (\S+) is: {value}\.", made.pieces[0])[1] for value in made.answers]
    at = [made.pieces[-1].index(key) for key in keys]
    assert len(keys) == 4 and at == sorted(at)


def test_common_words_are_counted_as_ruler_counts_them():
    for length, often, seldom in ((2048, 6, 1), (8192, 30, 3)):
        made = sample("cwe", 1, length)
        numbers, listed = zip(*re.findall(r"(\d+)\. (\S+)", made.pieces[0]), strict=True)
        assert [int(number) for number in numbers] == list(range(1, len(listed) + 1))
        counts = Counter(listed)
        assert {word for word, n in counts.items() if n == often} == set(made.answers) and len(made.answers) == 10
        assert {n for word, n in counts.items() if word not in made.answers} == {seldom}


def test_frequent_words_have_the_shares_of_a_zeta_distribution():
    """Counts are floor(n k^-2 6 / pi^2) for one n and k = 1, 2, ...: the first is noise, the next three the answer."""
    made = sample("fwe", 1, 8192)
    counts = Counter(made.pieces[0].partition("coded words. ")[2].split(" ")).most_common()
    assert counts[0][0] == "..." and [word for word, _ in counts[1:4]] == list(made.answers)
    assert any(
        [int(n * k**-2 * 6 / 3.141592653589793**2) for k in range(1, len(counts) + 1)] == [c for _, c in counts]
        for n in range(1000, 20_000)
    )
    assert all(re.fullmatch(r"[a-z]{6}", word) for word, _ in counts[1:])


def test_rulers_needles_are_as_its_table_has_them():
    eleven = "niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3"
    assert list(RULER) == [*eleven.split(), "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"]
    needle = r"One of the special magic (\w+) for (\S+) is: (\S+)\."
    code = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    kinds = {"numbers": (r"[a-z]+-[a-z]+", r"\d{7}"), "uuids": (code, code)}
    many = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    for name in (name for name in RULER if name.startswith("niah")):
        made = sample(name, 1)
        found = re.findall(needle, made.pieces[0])
        if name in ("niah_multikey_2", "niah_multikey_3"):  # needles and nothing else
            assert len(found) > 10 and not re.sub(needle, "", made.pieces[0].partition("\n")[2]).strip()
        else:
            assert len(found) == many.get(name, 1)
        for noun, key, value in found:
            assert re.fullmatch(kinds[noun][1], value)
            assert re.fullmatch(kinds["uuids" if name == "niah_multikey_3" else "numbers"][0], key)
        assert ("uuids" in {noun for noun, _, _ in found}) == name.endswith("_3")
    noise = sample("niah_single_1", 1).pieces[0].partition("\n")[2]
    left = {line.strip() for line in re.sub(needle, "", noise).replace(". ", ".\n").splitlines()}
    sentences = {"The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go."}
    assert left - {""} == sentences | {"There and back again."}


# --------------------------------------------------------------------------------------------------------------- parts


def test_units_joined_are_the_text():
    rng = random.Random(0)
    made = ["".join(rng.choices("ab. \n!?\t", k=rng.randrange(600))) for _ in range(200)]
    for text in [*FILLER, *made, "x" * 1000, ""]:
        parts = haystack.units(text)
        assert "".join(parts) == text
        assert all(0 < len(part) <= haystack.MAX_UNIT_CHARS for part in parts)
    assert haystack.units("One. Two?\n\n  Three") == ["One. ", "Two?\n\n", "  Three"]


def test_a_haystack_is_runs_of_real_text():
    """Each from some unit of a text to that text's end."""
    for seed in range(5):
        ask = Ask(random.Random(seed), FILLER, 2000, None, TOKENS, "train", "seen", 1, "needle")
        text = "".join(unit for unit, _ in haystack.draw(ask))
        runs = 0
        ends = ["".join(parts[i:]) for parts in map(haystack.units, FILLER) for i in range(len(parts))]
        ends = sorted({end + "\n" * (not end.endswith("\n")) for end in ends}, key=len, reverse=True)
        while text:
            found = next(end for end in ends if text.startswith(end) or end.startswith(text))
            text, runs = text[len(found) :], runs + 1
        assert 2 < runs < 60
        kept = haystack.fit(haystack.draw(ask), 1000)
        assert 990 <= sum(n for _, n in kept) <= 1000


def test_what_stands_in_the_text_is_no_key():
    """Of all short words but six, as words; of pairs anywhere."""
    free = [word for word in TOKENS.words if words.split_of(word) == "train"][:6]
    text = ". ".join(word.upper() for word in TOKENS.words if word not in free)
    supply = words.Supply(random.Random(0), TOKENS, "train", text)
    assert sorted(supply.draw("short", 6)) == sorted(free)
    first = words.Supply(random.Random(1), TOKENS, "train").draw("pairs", 1)
    assert words.Supply(random.Random(1), TOKENS, "train", f"a {first[0]}s b").draw("pairs", 1) != first


def test_several_questions_on_one_context_each_have_their_answer():
    for name in ("needle", "key_value", "tracking", "ordering", "needle_multiquery", "picture_lookup"):
        made = exam(name, 1, 3, 2048)
        assert len(made.questions) == 3 and len({question.asked for question in made.questions}) == 3
        assert TOKENS.count(*made.context, *[part for q in made.questions for part in q[:2]]) < 2048
        if name not in PICTURES | {"ordering"}:
            for question in made.questions:
                assert all(times(answer, made.context[0]) in (1, 2) for answer in question.answers)
    assert len(exam("cwe", 1, 3).questions) == 1  # all there is to ask


def test_a_share_of_the_answers_scores():
    made = Sample(("?",), ("Red fox", "4711"), {})
    for text, points in ((" red FOX and 4711", 1), ("4711", 0.5), ("the red", 0), ("", 0), (" \n", 0)):
        assert score(made, text) == points
    for text, points in (
        ("red foxes, 4711", 0.5),
        ("infrared fox", 0),
        ("red fox-hole", 0),
        ("blue ox\nred fox, 4711", 0),
    ):
        assert score(made, text) == points, "the first line counts, and whole words"
    assert score(made, "red fox, 4711, 12, 13, 14, 15, 16, 17") == 2 / 8, "listing all there is, is no answer"
    assert (
        score(made._replace(answers=("b, a, c",)), "b, a, c") == 1
        and score(made._replace(answers=("b",)), "a, b") == 0.5
    )
    for text, points in (
        ("It is 4711.", 1),
        ("**4711**\r\n12", 1),
        ("4711 stands there", 1),
        ("12 13 4711 14 15", 0),
        ("12; 4711", 0.5),
    ):
        assert score(made._replace(answers=("4711",)), text) == points, "an item begins or ends with it"
    order = made._replace(answers=("b, a, c",))
    assert [score(order, text) for text in ("b,a , c.", "b / a / c", "The order is b, a, c", "a, b, c")] == [1, 1, 1, 0]
    changed = made._replace(answers=("colour, from red to blue",))
    assert score(changed, "Colour, from red to blue") == 1 and not score(changed, "shape, from red to blue")
    ruler = made._replace(meta={"rule": "contains"})
    assert score(ruler, "1, 2, 3,\n infrared foxes, 4711.") == 1 and score(ruler, "4711") == 0.5
    anyone = made._replace(meta={"rule": "contains", "any": True})
    assert score(anyone, "4711") == 1 and score(anyone, "47") == 0


def test_reciting_the_context_is_no_answer():
    for name in ("needle", "needle_multikey", "key_value", "key_value_short", "tracking"):
        made = sample(name, 3)
        everything = ", ".join(word for piece in made.pieces if isinstance(piece, str) for word in piece.split())
        assert score(made, everything) < 0.1, name
    assert {task.rule for name, task in TASKS.items() if name in RULER} == {"contains"}
    assert {task.rule for name, task in TASKS.items() if name not in RULER} == {"line"}


def test_a_guess_of_all_values_in_a_row_is_no_answer():
    """Of sixteen, also where no comma stands between them."""
    points = []
    for seed in range(20):
        made = TASKS["key_value_short"].with_options(dict(wording="colon"))(
            random.Random(seed), FILLER, 512, None, TOKENS
        )
        values = re.findall(r"^[a-z]+: ([a-z]+)$", made.pieces[0], re.MULTILINE)
        assert made.answers[0] in values and len(values) >= 16
        points.append(score(made, " ".join(values)))
    assert sum(points) / 20 < 0.3  # the first and the last


def test_words_of_the_templates_are_no_keys_and_no_values():
    """But in plain wording, which measured recipes have."""
    form = r"he (?:secret word|value) of (\w+) is (\w+)\."
    for name, wording, split, said in (
        ("needle", "secret", "eval", "word"),
        ("key_value", "sentence", "train", "value"),
    ):
        options = dict(key_kind="short", value_kind="short", wording=wording)
        task = TASKS[name].with_options(options | (dict(haystack="needles") if name == "needle" else {}))
        made = task(random.Random(0), FILLER, 30_000, None, TOKENS, split)  # all of the kind that there are
        used = {word for record in re.findall(form, made.pieces[0]) for word in record}
        free = {word for word in TOKENS.words if words.split_of(word) == split}
        assert said in free - used and len(free - used) < 20
    plain = TASKS["needle"].with_options(
        dict(key_kind="short", value_kind="short", wording="plain", haystack="needles")
    )
    used = plain(random.Random(0), FILLER, 30_000, None, TOKENS, "train").pieces[0].split()
    assert "all" in used and "word" not in used


def test_lists_of_any_length_are_made_of_the_words_that_there_are():
    """In a list of common words the others are repeated, less often than these."""
    task = TASKS["common_words"].with_options(dict(kind="short"))
    made = task(random.Random(0), FILLER, 1024, None, TOKENS)
    counts = Counter(made.pieces[0].splitlines()[-1].split())
    assert {word for word, n in counts.items() if n == 6} == set(made.answers) and max(counts.values()) == 6
    assert 1 < sorted(counts.values())[-4] < 6 and made.meta["tokens"] > 900
    with pytest.raises(ConfigError, match="no other is left"):
        task(random.Random(0), FILLER, 4096, None, TOKENS)
    made = TASKS["frequent_words"].with_options(dict(kind="short"))(random.Random(0), FILLER, 32_768, None, TOKENS)
    assert made.meta["tokens"] > 0.95 * 32_768


def test_short_keys_and_values_are_a_token_each():
    made = exam("key_value_short", 1, 4)
    for question in made.questions:
        assert len(TOKENS.tokenizer.encode(question.said)) == 2  # and the end of the line


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ConfigError, match="task needle at 20 tokens.*Ask for more tokens"):
        sample("needle", length=20)
    with pytest.raises(ConfigError, match="task cwe at 256 tokens"):
        sample("cwe", length=256)
    with pytest.raises(ConfigError, match="'test', but there is none"):
        sample("needle", split="test")
    with pytest.raises(ConfigError, match="no other is left"):
        words.Supply(random.Random(0), TOKENS, "eval").draw("short", 10_000)
    with pytest.raises(ConfigError, match="kind 'nonsense'"):
        words.Supply(random.Random(0), TOKENS, "eval").draw("nonsense", 1)
    with pytest.raises(ConfigError, match="have no text"):
        Texts([Document((Picture(b""),))])[0]


# -------------------------------------------------------------------------------------------------- words that run out

PLAIN = dict(key_kind="pairs", value_kind="pairs", wording="plain", n_words=64)


@pytest.mark.parametrize("length", [4096, 8192])
def test_records_of_few_words_fill_any_length(length):
    """What is asked for stands there once and is one of many that do; the other records are repeated, anywhere."""
    task = TASKS["key_value"].with_options(PLAIN)
    for seed in range(3):
        made = task(random.Random(seed), FILLER, length, None, TOKENS)
        assert 0.98 * length < made.meta["tokens"] < length
        lines = Counter(made.pieces[0].splitlines())
        asked, (answer,) = made.pieces[1], made.answers
        assert [line for line in lines if line.startswith(asked)] == [f"{asked} {answer}"]
        once = {line for line, n in lines.items() if n == 1}
        assert f"{asked} {answer}" in once and len(once) > 100 and len(lines) < lines.total()
        assert sum(line.endswith(f" {answer}") for line in lines) == 1
        assert all(len(line.split()) == 4 for line in lines)
        at = [i for i, line in enumerate(made.pieces[0].splitlines()) if line in once]
        assert 0.4 < sum(at) / len(at) / lines.total() < 0.6


def test_values_run_out_before_keys_do_and_keys_before_values():
    """Then a value stands at several keys, but a key never has two; a value that is asked for stands at one."""
    for kinds in (("uuids", "digits"), ("digits", "uuids")):
        options = dict(haystack="needles", key_kind=kinds[0], value_kind=kinds[1], wording="plain")
        for task in (TASKS["needle_multikey"].with_options(options), TASKS["key_value"].with_options(kinds_of(kinds))):
            made = task(random.Random(1), FILLER, 30_000, None, TOKENS)
            found = re.findall(r"^ ?(?:Remember )?(\S+) ([^\s.]+)\.?$", made.pieces[0], re.MULTILINE)
            keys = {key: {v for k, v in found if k == key} for key, _ in found}
            assert {len(values) for values in keys.values()} == {1} and len(found) > 400
            assert len({value for _, value in found}) < len(found)
            assert [value for _, value in found].count(made.answers[0]) == 1
            assert (len(keys) == len(found)) == (kinds[0] == "uuids")
            most = max(Counter(value for _, value in found).values())
            assert most < len(found) / 20, "no value stands out among those that are repeated"


def kinds_of(kinds: tuple[str, str]) -> dict:
    return dict(key_kind=kinds[0], value_kind=kinds[1], wording="plain")


def test_records_are_repeated_only_once_words_have_run_out():
    made = sample("key_value", 2, 8192)
    lines = made.pieces[0].splitlines()
    assert len(set(lines)) == len(lines)
    with pytest.raises(ConfigError, match="no other is left"):
        TASKS["key_value"].with_options(PLAIN | dict(n_words=2))(random.Random(0), FILLER, 200, None, TOKENS)
