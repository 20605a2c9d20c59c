"""Verifiers, each by a table of (answer, truth, options, score), and what no answer may do to one."""

from __future__ import annotations

import random
import time

import pytest

from llamax import rewards
from llamax.config import ConfigError
from llamax.rewards import REWARDS, expression, final_answer

YES, NO, UNKNOWN = 1.0, 0.0, None
MARKED = {"marked": True}
COLOURS = {"choices": ["red", "blue", "dark blue", "green"]}

MATH = [
    # numbers, marked and not
    ("4", "4", {}, YES),
    ("It is 4.", "4", {}, YES),
    ("It is 4.0", "4", {}, YES),
    ("3 + 4 = 7", "7", {}, YES),
    (
        "First 3, then 4 more, which makes 7 apples in the basket that she has carried home with her brother.",
        7,
        {},
        YES,
    ),
    ("7 apples, of which he eats 3", "7", {}, NO),
    ("12 or 50", "50", {}, NO),
    ("She has 7.\n#### 7", "7", {}, YES),
    ("#### 1,234", 1234, {}, YES),
    ("so \\boxed{42}, not \\boxed{43}", "43", {}, YES),
    ("so \\boxed{42}, not \\boxed{43}", "42", {}, NO),
    ("The final answer is: **-5**.", "-5", {}, YES),
    ("Answer: $12", "12", {}, YES),
    ("Answer: 12 km", "12", {}, YES),
    ("Answer: 12 apples", "12", {}, YES),
    ("\\boxed{5\\text{ apples}}", "5", {}, YES),
    ("Answer: 12 apples", "12 apples", {}, YES),
    ("Answer: 13", 12, {}, NO),
    ("Answer: I do not know", 12, {}, NO),
    ("", 12, {}, NO),
    ("Answer:", 12, {}, NO),
    ("12", 12, MARKED, NO),
    ("Answer: 12", 12, MARKED, YES),
    ("0.5", "1/2", {}, YES),
    ("0.333", "1/3", {}, NO),
    ("0.333", "1/3", {"tolerance": 0.01}, YES),
    ("1 1/2", "1.5", {}, YES),
    ("1\\frac{1}{2}", "3/2", {}, YES),
    ("\\frac12", "0.5", {}, YES),
    ("2e3", "2000", {}, YES),
    ("50%", "0.5", {}, YES),
    ("50\\%", "50", {}, YES),
    ("50%", "5", {}, NO),
    ("90^\\circ", "90", {}, YES),
    ("x = 5", "5", {}, YES),
    ("100000000000000000000001", "100000000000000000000000", {}, NO),  # no float is asked
    # expressions
    ("\\boxed{\\frac{3\\sqrt{2}}{2}}", "3/sqrt(2)", {}, YES),
    ("\\boxed{(x+1)^2}", "x^2 + 2x + 1", {}, YES),
    ("\\boxed{(x+1)^2}", "x^2 + 2x - 1", {}, NO),
    ("\\boxed{2xy}", "x*y*2", {}, YES),
    ("\\boxed{2x}", "2", {}, NO),
    ("\\boxed{\\sin(\\pi/6)}", "1/2", {}, YES),
    ("\\boxed{2\\pi}", "6.2831853", {}, NO),
    ("\\boxed{2^{-3}}", "0.125", {}, YES),
    ("\\boxed{2^{3^2}}", "512", {}, YES),
    ("\\boxed{-2^2}", "-4", {}, YES),
    ("\\boxed{|-3|}", "3", {}, YES),
    ("\\boxed{1/(x-1)}", "-1/(1-x)", {}, YES),
    # lists
    ("\\boxed{1, 2}", "2, 1", {}, YES),
    ("x = 1 or x = 2", "1, 2", {}, YES),
    ("\\boxed{\\{1, 2\\}}", "{2, 1}", {}, YES),
    ("\\boxed{(1, 2)}", "(2, 1)", {}, NO),
    ("\\boxed{(1, 2)}", "(1, 2]", {}, NO),
    ("\\boxed{(1, 2)}", "(1, 2)", {}, YES),
    ("\\boxed{1, 1}", "1, 2", {}, NO),
    ("\\boxed{1, 2, 3}", "1, 2", {}, NO),
    # what cannot be judged
    ("\\boxed{\\int_0^1 x}", "1/2", {}, UNKNOWN),
    ("\\boxed{1/0}", "5", {}, UNKNOWN),
    ("\\boxed{7}", "\\int_0^1 x", {}, UNKNOWN),
    ("\\boxed{\\int_0^1 x}", "\\int_0^1x", {}, YES),
    ("7", None, {}, UNKNOWN),
    ("7", "", {}, UNKNOWN),
    ("True", True, {}, UNKNOWN),
]
CHOICE = [
    ("B", "B", {}, YES),
    ("b", "B", {}, YES),
    ("(B)", "B", {}, YES),
    ("B. blue", "B", {}, YES),
    ("B", "A", {}, NO),
    ("Answer: C", "C", {}, YES),
    ("The answer is (C).", "C", {}, YES),
    ("\\boxed{D}", "D", {}, YES),
    ("A is wrong, and so is C.\nAnswer: B", "B", {}, YES),
    ("A, B", "A", {}, NO),
    ("Answer: A or B", "A", {}, NO),
    ("Answer: A, B, C, D", "B", COLOURS, NO),
    ("", "A", {}, NO),
    ("A cat sat on the mat.", "A", {}, NO),
    ("I have thought about it.\nSo it has to be (B) after all", "B", {}, YES),
    ("(A) or (B)", "A", {}, NO),
    ("blue", "B", COLOURS, YES),
    ("Blue.", "blue", COLOURS, YES),
    ("B", "blue", COLOURS, YES),
    ("dark blue", "blue", COLOURS, NO),
    ("dark blue", "C", COLOURS, YES),
    ("It is dark blue, I think", "C", COLOURS, YES),
    ("It is green", "D", COLOURS, YES),
    ("It is red or green", "D", COLOURS, NO),
    ("Answer: green", "green", COLOURS, YES),
    ("purple", "red", COLOURS, NO),
    ("E", "A", COLOURS, NO),
    ("Y", "Y", {"choices": {"Y": "yes", "N": "no"}}, YES),
    ("no", "Y", {"choices": {"Y": "yes", "N": "no"}}, NO),
    ("B", "E", COLOURS, UNKNOWN),
    ("B", None, {}, UNKNOWN),
    ("B", "B", {"choices": "red"}, UNKNOWN),
    ("B", "B", {"choices": []}, UNKNOWN),
]
FORMAT = [
    ("Because.\nAnswer: 5", None, {}, YES),
    ("Answer: 5", None, {}, YES),
    ("Answer: 5\nOr not.", None, {}, NO),
    ("Answer: 4\nAnswer: 5", None, {}, YES),
    ("Answer:", None, {}, NO),
    ("5", None, {}, NO),
    ("  So \\boxed{5}. ", None, {"form": "boxed"}, YES),
    ("<think>Hm.\nYes.</think>5", None, {"form": "think"}, YES),
    ("5 <think>Hm.</think>", None, {"form": "think"}, NO),
    ("<think>Hm.", None, {"form": "think"}, NO),
    ("B", None, {"form": "letter"}, YES),
    ("Be", None, {"form": "letter"}, NO),
    ("-1,234.5", None, {"form": "number"}, YES),
    ("12 km", None, {"form": "number"}, NO),
    ("3 red circles", None, {"form": "{number} {word} {word}"}, YES),
    ("3 red circles.", None, {"form": "{number} {word} {word}"}, NO),
    ("x{1}", None, {"form": "{word}{{{number}}}"}, YES),
    ("a-b-a-b", None, {"form": "a{text}-a-b"}, YES),
    ("a-b", None, {"form": "a{text}-a-b"}, NO),
    ("abab", None, {"form": "{text}ab"}, YES),
    ("aXba", None, {"form": "{text}aXa"}, NO),
    ("Answer: 5", None, {"most_chars": 8}, NO),
    ("5", None, {"form": "{nonsense}"}, UNKNOWN),
    ("5", None, {"form": "{"}, UNKNOWN),
    ("5", None, {"form": 5}, UNKNOWN),
]
EXACT = [
    ("Oslo", "Oslo", {}, YES),
    (" oslo. ", "Oslo", {}, YES),
    ("New\n  York", "new york", {}, YES),
    ("I think so.\nAnswer: Oslo", "Oslo", {}, YES),
    ("I think of Oslo", "Oslo", {}, NO),
    ("Oslo", "Oslo", MARKED, NO),
    ("Answer: **Oslo**", "Oslo", MARKED, YES),
    ("Bergen", ["Oslo", "Bergen"], {}, YES),
    ("ﬁne", "fine", {}, YES),  # one letter that is two
    ("", "Oslo", {}, NO),
    ("Oslo", None, {}, UNKNOWN),
    ("", "", {}, UNKNOWN),
    ("?", "!", {}, UNKNOWN),
]
TABLES = {"math": MATH, "choice": CHOICE, "format": FORMAT, "exact": EXACT}
ROWS = [(name, *row) for name, rows in TABLES.items() for row in rows]


def test_every_reward_has_a_table():
    assert TABLES.keys() == REWARDS.keys()
    for rows in TABLES.values():
        assert {row[3] for row in rows} == {YES, NO, UNKNOWN}


@pytest.mark.parametrize(("name", "answer", "truth", "options", "score"), ROWS)
def test_scores(name, answer, truth, options, score):
    found = REWARDS[name](answer, truth, options)
    assert found == score and (found is None) == (score is None)
    assert rewards.verify(answer, {"verify": name, "answer": truth, "options": options}) == score


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("no marks", None),
        ("\\boxed{a{b}c} and", "a{b}c"),
        ("\\boxed{never closed", None),
        ("\\boxed{} ", ""),
        ("#### 3\nAnswer: 4", "3"),
        ("ANSWER: yes\nmore", "yes"),
        ("the answer is\n", ""),
        ("İ said: the Answer: İstanbul", "İstanbul"),  # grows by a character when it is made small
    ],
)
def test_final_answers(text, final):
    assert final_answer(text) == final


# --------------------------------------------------------------------------------------------------------- hostile text

HOSTILE = [
    "(" * 100_000,
    "\\boxed{" * 50_000,
    "\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "\\boxed{" + "{" * 200_000,
    "\\boxed{" + "sqrt " * 150 + "2}",
    "\\boxed{" + "-" * 1000 + "2}",
    "\\boxed{" + "2^" * 90 + "2}",
    "\\boxed{9^{9^{9^9}}}",
    "\\boxed{" + "9" * 1000 + "}",
    "\\boxed{" + "*".join(["9" * 300] * 3) + "}",
    "\\boxed{1e999^999}",
    "\\boxed{exp(exp(exp(9)))}",
    "\\boxed{|" + "|" * 100 + "}",
    "Answer: " * 20_000,
    "Answer: " + "a" * 1_000_000,
    "####" * 50_000,
    "1," * 100_000,
    "1,234" * 50_000,
    "1.1" * 50_000,
    "1/1" * 50_000,
    "1 " * 100_000,
    "a b" * 100_000 + "!",
    "\\" * 100_000,
    "\\text{" * 10_000,
    "<think>" * 50_000,
    "\x00\ud800\ufffe" * 1000,
    " " * 1_000_000 + "1",
    "\n" * 500_000 + "A",
    "(A) " * 50_000,
    "B" * 500_000,
]
TRUTHS = ["12", "x^2", "red", "B", [1], {"a": 1}, float("nan"), float("inf"), 10**400, "(" * 5000]
OPTIONS = [
    COLOURS,
    *(
        {"form": form}
        for form in ("answer", "boxed", "think", "{line}{line}{number}x", "{text}" * 8, "{word}" * 20 + "!")
    ),
    {"form": "{text}".join("abcdefgh")},
]


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_nothing_takes_long_or_fails(name, number):
    answer, began = HOSTILE[number], time.process_time()
    for truth, options in [*((truth, {}) for truth in TRUTHS), *(("12", options) for options in OPTIONS)]:
        assert REWARDS[name](answer, truth, options) in (YES, NO, UNKNOWN)
    assert time.process_time() - began < 2  # of some twenty scores


@pytest.mark.parametrize(
    "text", ["9" * 5000, "(" * 60 + "1" + ")" * 60, "1+" * 150 + "1", "2^(9999999)", "1/0", "a b c word"]
)
def test_what_is_too_large_is_not_read(text):
    with pytest.raises(expression.Unreadable):
        expression.value(expression.read(text), {})


def test_random_texts_are_scored_or_not_but_never_fail():
    rng = random.Random(0)
    signs = [
        "\\frac",
        "{",
        "}",
        "(",
        ")",
        "|",
        "^",
        "1",
        "2.5",
        "x",
        "-",
        "+",
        "*",
        "/",
        "%",
        ",",
        "\\boxed{",
        "=",
        " ",
        "and",
        "\\",
    ]
    for _ in range(3000):
        answer, truth = ("".join(rng.choices(signs, k=rng.randint(0, 12))) for _ in range(2))
        for score in REWARDS.values():
            assert score(answer, truth, {}) in (YES, NO, UNKNOWN)


def slow_value(rng: random.Random, depth: int) -> tuple[str, float]:
    """A random expression as text, and Python's own value of it."""
    if depth == 0:
        n = rng.randint(1, 9)
        return str(n), n
    (a, x), (b, y) = slow_value(rng, depth - 1), slow_value(rng, depth - 1)
    op = rng.choice("+-*/^")
    if op == "^":
        n = rng.randint(-2, 3)
        if x == 0:
            return a, x
        return f"({a})^{{{n}}}", x**n
    if op == "/":
        return (f"\\frac{{{a}}}{{{b}}}", x / y) if y else (a, x)
    return f"({a}){op}({b})", {"+": x + y, "-": x - y, "*": x * y}[op]


def test_values_are_those_of_python():
    rng = random.Random(1)
    for _ in range(300):
        text, want = slow_value(rng, 3)
        assert float(expression.value(expression.read(text), {})) == pytest.approx(want, rel=1e-9, abs=1e-9)


# -------------------------------------------------------------------------------------------------------------- records


def test_records_say_how_they_are_verified():
    assert rewards.verify("4", {}) is None and not rewards.verifiable({})
    assert rewards.verifiable({"verify": "math", "answer": 0}) and not rewards.verifiable({"verify": "math"})
    assert rewards.verifiable({"verify": "format"})
    rewards.check({}, "here")
    rewards.check({"verify": "math"}, "here")
    for meta, said in (
        ({"verify": "maths"}, "record 3, verify 'maths', but there is no such rule. Did you mean 'math'?"),
        ({"verify": 5}, "record 3, verify 5, but there is no such rule. There are math"),
        ({"verify": "math", "options": 3}, "record 3, options, but they are no table"),
    ):
        with pytest.raises(ConfigError) as caught:
            rewards.check(meta, "record 3")
        assert str(caught.value).startswith(said)
