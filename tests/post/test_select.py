"""`llamax data select`: which records, in what order, where to; the report."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from PIL import Image

from llamax.config import ConfigError
from llamax.post.ranking import rank
from llamax.post.records import Records
from llamax.post.select import PRESETS, choose, read_grades, select
from tests.post.small import QUESTIONS, asked, rows, write


@pytest.fixture
def file(tmp_path):
    """40 records of two domains, 30 and 10, with a grade each: that of number n is n % 20."""
    made = [asked(f"Question {n}?", f"{n}", domain="a" if n < 30 else "b", tags=["odd"] * (n % 2)) for n in range(40)]
    path = write(tmp_path / "x.jsonl", *made)
    give(path, {n: n % 20 for n in range(40)})
    return path


def give(path, values, grade="difficulty", judge="j@1", keep="high", **more):
    keys = Records(path).keys
    with path.with_name(f"{path.name}.grades.jsonl").open("a") as file:
        for n, value in values.items():
            row = {"key": f"{n}{judge}{grade}", "record": keys[n], "grade": grade, "keep": keep, "judge": judge}
            file.write(json.dumps(row | more | {"value": value}) + "\n")


def numbers(path) -> list[int]:
    return [int(row["messages"][1]["content"]) for row in rows(path)]


def test_the_hardest_half_is_kept_in_the_file_s_order(file, tmp_path):
    out = tmp_path / "out.jsonl"
    select(file, out, by="difficulty", keep=PRESETS["llama4"])
    found = numbers(out)
    assert len(found) == 20 and found == sorted(found) and {n % 20 for n in found} == set(range(10, 20))
    lines = set(file.read_bytes().splitlines(keepends=True))
    assert set(out.read_bytes().splitlines(keepends=True)) <= lines  # byte for byte


def test_a_share_of_each_domain(file, tmp_path):
    select(file, tmp_path / "each.jsonl", by="difficulty", keep=0.1, per_domain=True)
    select(file, tmp_path / "all.jsonl", by="difficulty", keep=0.1)
    assert sorted(n < 30 for n in numbers(tmp_path / "each.jsonl")) == [False, True, True, True]
    assert {n % 20 for n in numbers(tmp_path / "all.jsonl")} == {18, 19}


def test_shares_are_of_what_a_slow_twin_ranks(file):
    """Each record's rank by counting those that are ahead of it."""
    records = Records(file)
    rng = random.Random(0)
    values = {n: float(rng.randint(0, 5)) for n in range(40)}
    graded = read_grades(f"{file}.grades.jsonl", records, "difficulty", None)._replace(values=values)
    for end in ("high", "low"):
        of = graded._replace(keep=end)
        sign = 1 if end == "high" else -1
        for low, high in ((0, 0.5), (0.2, 0.8), (0, 0.05), (0.99, 1), (0, 1)):
            ahead = {
                n: sum((sign * values[m], records.keys[n]) > (sign * values[n], records.keys[m]) for m in values)
                for n in values
            }
            want = {n for n, place in ahead.items() if np.floor(low * 40 + 1e-9) <= place < np.ceil(high * 40 - 1e-9)}
            assert choose(records, of, (low, high), False).kept == want
        assert rank(range(40), records, of) == sorted(range(40), key=ahead.get)


def test_bands_ends_and_presets(file, tmp_path):
    select(file, tmp_path / "band.jsonl", by="difficulty", band=(0.25, 0.75))
    assert {n % 20 for n in numbers(tmp_path / "band.jsonl")} == set(range(5, 15))
    select(file, tmp_path / "low.jsonl", by="difficulty", keep=0.1, end="low")
    assert {n % 20 for n in numbers(tmp_path / "low.jsonl")} == {0, 1}
    select(file, tmp_path / "hard.jsonl", by="difficulty", keep=PRESETS["behemoth"])
    assert {n % 20 for n in numbers(tmp_path / "hard.jsonl")} == {19} and PRESETS == {"llama4": 0.5, "behemoth": 0.05}
    give(file, {n: n / 40 for n in range(40)}, "pass", keep="low")
    select(file, tmp_path / "pass.jsonl", by="pass", keep=0.1)
    assert numbers(tmp_path / "pass.jsonl") == [0, 1, 2, 3]  # what is passed least


def test_tags(file, tmp_path):
    select(file, tmp_path / "odd.jsonl", keep_tags=["odd"])
    assert all(n % 2 for n in numbers(tmp_path / "odd.jsonl")) and len(numbers(tmp_path / "odd.jsonl")) == 20
    chosen = select(file, tmp_path / "even.jsonl", by="difficulty", keep=0.1, drop_tags=["odd"])
    assert {n % 20 for n in numbers(tmp_path / "even.jsonl")} == {18} and chosen.left_out == {
        "a tag that is dropped": 20
    }


def test_records_without_a_grade_are_left_out(tmp_path):
    file = write(tmp_path / "x.jsonl", *[asked(f"Question {n}?", f"{n}") for n in range(4)])
    give(file, {0: 1, 2: 0})
    chosen = select(file, tmp_path / "out.jsonl", by="difficulty", keep=0.5)
    assert numbers(tmp_path / "out.jsonl") == [0] and chosen.left_out == {"no grade": 2} and chosen.dropped == (2,)


def test_the_last_judge_s_grades_count_unless_another_is_named(file, tmp_path, capsys):
    give(file, {n: -n for n in range(40)}, judge="k@2")
    select(file, tmp_path / "last.jsonl", by="difficulty", keep=0.05)
    assert numbers(tmp_path / "last.jsonl") == [0, 1] and "taking k@2" in capsys.readouterr().out
    select(file, tmp_path / "first.jsonl", by="difficulty", keep=0.05, judge="j@1")
    assert {n % 20 for n in numbers(tmp_path / "first.jsonl")} == {19}


def test_grades_by_two_wordings_or_by_other_weights_are_not_one_ranking(file, tmp_path, capsys):
    """Of one judge, by its name: the newer count, and what has only an older grade has none."""
    for number, how in enumerate((dict(method="reworded"), dict(method="reworded", identity="another"))):
        give(file, {n: -n for n in range(10, 20)}, **how)
        chosen = select(file, tmp_path / f"{number}.jsonl", by="difficulty", keep=0.1)
        assert numbers(tmp_path / f"{number}.jsonl") == [10] and chosen.left_out == {"no grade": 30}
        assert f"{40 + 10 * number} grades of j@1 by other weights, or by another" in capsys.readouterr().out


def test_pictures_are_found_from_the_new_file(tmp_path):
    (tmp_path / "a").mkdir()
    grades = tmp_path / "grades.jsonl"
    keys = Records(QUESTIONS).keys
    made = [
        {"key": key, "record": key, "grade": "g", "keep": "high", "judge": "j", "value": n}
        for n, key in enumerate(keys)
    ]
    grades.write_text("".join(json.dumps(row) + "\n" for row in made))
    select(QUESTIONS, tmp_path / "a" / "out.jsonl", by="g", band=(0.1, 0.35), grades=grades)
    assert set(Records(tmp_path / "a" / "out.jsonl").keys) < set(keys)
    assert 'kind = "multimodal"' in (tmp_path / "a" / "out.toml").read_text()


def test_the_report(file, tmp_path, capsys):
    select(file, tmp_path / "out.jsonl", by="difficulty", keep=0.5, per_domain=True)
    folder = tmp_path / "out.report"
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "all.png", "b.png", "report.md"]
    text = (folder / "report.md").read_text()
    assert "| all | 40 | 20 | 50% | 9.500 |" in text and "| a | 30 | 15 | 50% |" in text and "![b](b.png)" in text
    assert text.count("**grade") == 12 and "**grade 19.000; domain a; tags odd**" in text
    for title in ("Kept, far from the cut", "Kept, at the cut", "Dropped, at the cut", "Dropped, far from the cut"):
        assert f"## {title}" in text
    assert np.asarray(
        Image.open(folder / "all.png")
    ).std() > 0 and "out.report/report.md" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (dict(by="quality"), "has none of the records as they are; it has difficulty"),
        (dict(by="difficulty", judge="x"), "has none by x"),
        (dict(by="difficulty", grades="none.jsonl"), "no such file of grades. Make it: llamax data grade"),
        (dict(by="difficulty", keep=0.0), "--keep 0"),
        (dict(by="difficulty", band=(0.5, 0.2)), "--band 0.5,0.2"),
        (dict(keep_tags=["none"]), "no record would be kept: no tag that is kept"),
        (dict(by="difficulty", out="there.jsonl"), "is there already"),
    ],
)
def test_what_cannot_be_selected_is_told(file, tmp_path, how, said):
    (tmp_path / "there.jsonl").write_text("")
    out = tmp_path / how.pop("out", "out.jsonl")
    with pytest.raises(ConfigError, match=said):
        select(file, out, **how)
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out.report").exists()
    assert (tmp_path / "there.jsonl").read_text() == ""
