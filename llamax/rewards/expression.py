"""Expressions as people and LaTeX write them, read and compared by their values; nothing is ever run.

    3/4   1,234.5   \\frac{3}{4}   2\\sqrt{2}   x^2 + 2x + 1   50%   2^{-3}   \\sin(\\pi/6)   1 1/2

Two expressions are the same if they have the same value wherever their letters are put: at a few fixed rational points,
exactly where there are sums, products, quotients and whole powers alone (a polynomial that is zero at all of them is
zero but for bad luck: Schwartz 1980, Zippel 1979), else to 1e-9. All is bounded: characters, symbols, depth, powers.
"""

from __future__ import annotations

import cmath
import math
import operator
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

MOST_CHARS, MOST_SYMBOLS, MOST_DEPTH, MOST_BITS = 1024, 200, 40, 4096
CLOSE = 1e-9
POINTS = 4
SYMBOL = re.compile(
    r"""\s*+(?: (?P<number> (?:\d{1,300}+ (?:\.\d{0,300}+)?+ | \.\d{1,300}+) (?:[eE][-+]?\d{1,3}+)?+ )
            | (?P<name> \\?[A-Za-z]{1,32}+ ) | (?P<op> \S ) )""",
    re.VERBOSE,
)
SPACING = re.compile(
    r"\\(?:left|right|displaystyle|limits|quad|qquad|,|!|;|:|\s)|[$~]|\\\$|\^\s*\\?circ|\^\{\\circ\}|°"
)
WORDS = re.compile(r"\\(?:text|mathrm|mbox|textbf|operatorname)\s?\{([^{}]{0,200})\}")
THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})++)(?![\d,])")
MIXED = re.compile(r"(?<![\d.])(\d{1,40}+)\s++(?=\d{1,40}+\s*/\s*\d)|(?<![\d.\w}])(\d{1,40}+)(?=\\[dt]?frac\s?\{\d)")
CHANGED = {"×": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-", "–": "-", "**": "^", "²": "^2", "³": "^3"}
CHANGED |= {"π": "\\pi ", "√": "\\sqrt ", "\\%": "%"}
FUNCTIONS: dict[str, Any] = {
    "sqrt": cmath.sqrt,
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "exp": cmath.exp,
    "ln": cmath.log,
    "log": cmath.log,
    "abs": abs,
}
ARITHMETIC: dict[str, Any] = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
CONSTANTS = {"pi": math.pi, "e": math.e}
TIMES, FRACTIONS = ("cdot", "times"), ("frac", "dfrac", "tfrac", "cfrac")

SHORT_WORDS = frozenset(
    [
        "am",
        "an",
        "as",
        "at",
        "be",
        "by",
        "do",
        "go",
        "he",
        "if",
        "in",
        "is",
        "it",
        "me",
        "my",
        "no",
        "of",
        "on",
        "or",
        "so",
        "to",
        "up",
        "us",
        "we",
    ]
)

Value = Fraction | complex


class Unreadable(ValueError):
    """No expression that is known here, or a larger one than is looked at."""


class Node(NamedTuple):
    kind: str  # number | letter | call | + | - | * | / | ^ | neg
    parts: tuple[Any, ...]


def same(a: Node, b: Node, tolerance: float = 0.0) -> bool:
    """Whether they have the same value at every point. `tolerance`: relative, for what is not a matter of rounding."""
    letters = sorted(of_letters(a) | of_letters(b))
    compared = 0
    for point in range(POINTS if letters else 1):
        at = {letter: Fraction(7 + 13 * point + 31 * i, 11 + 2 * i + 6 * point) for i, letter in enumerate(letters)}
        try:
            x, y = value(a, at), value(b, at)
        except Unreadable:
            continue
        compared += 1
        if not _equal(x, y, tolerance):
            return False
    if not compared:
        raise Unreadable("it has no value")
    return True


def _equal(x: Value, y: Value, tolerance: float) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y or (tolerance > 0 and abs(x - y) <= Fraction(tolerance) * max(abs(x), abs(y)))
    try:
        x, y = complex(x), complex(y)
    except OverflowError:
        return False
    return abs(x - y) <= max(CLOSE, tolerance) * max(abs(x), abs(y), CLOSE)


def of_letters(node: Node) -> set[str]:
    """The letters that stand for something."""
    if node.kind == "letter":
        return {node.parts[0]}
    return set().union(*(of_letters(part) for part in node.parts if isinstance(part, Node)))


# --------------------------------------------------------------------------------------------------------------- values


def value(node: Node, at: Mapping[str, Fraction]) -> Value:
    """Of an expression where its letters have these values. Unreadable where it has none, or a huge one."""
    try:
        return _value(node, at)
    except (ArithmeticError, ValueError) as error:
        raise Unreadable(f"it has no value: {error}") from None


def _value(node: Node, at: Mapping[str, Fraction]) -> Value:
    if node.kind == "number":
        return node.parts[0]
    if node.kind == "letter":
        return at[node.parts[0]]
    if node.kind == "call":
        name, argument = node.parts
        found = _value(argument, at)
        if name == "abs" and isinstance(found, Fraction):
            return abs(found)
        if name == "sqrt" and isinstance(found, Fraction) and (root := _root(found)) is not None:
            return root
        return complex(FUNCTIONS[name](complex(found)))
    x, *rest = (_value(part, at) for part in node.parts)
    if node.kind == "neg":
        return -x
    (y,) = rest
    if node.kind == "^":
        return _power(x, y)
    if isinstance(x, Fraction) != isinstance(y, Fraction):
        x, y = complex(x), complex(y)
    return _bounded(ARITHMETIC[node.kind](x, y))


def _bounded(x: Value) -> Value:
    if isinstance(x, Fraction) and _bits(x) > MOST_BITS:
        raise Unreadable("its value has too many digits")
    return x


def _bits(x: Fraction) -> int:
    return x.numerator.bit_length() + x.denominator.bit_length()


def _power(x: Value, y: Value) -> Value:
    """Exact for whole powers that are not huge."""
    if isinstance(x, Fraction) and isinstance(y, Fraction) and y.denominator == 1:
        if _bits(x) * abs(y.numerator) > MOST_BITS:
            raise Unreadable("a power is too large")
        return x**y.numerator
    if isinstance(x, Fraction) and y == Fraction(1, 2) and (root := _root(x)) is not None:
        return root
    return complex(x) ** complex(y)


def _root(x: Fraction) -> Fraction | None:
    """The square root where it is rational."""
    if x < 0:
        return None
    a, b = math.isqrt(x.numerator), math.isqrt(x.denominator)
    return Fraction(a, b) if a * a == x.numerator and b * b == x.denominator else None


# -------------------------------------------------------------------------------------------------------------- reading


def read(text: str) -> Node:
    """An expression. Unreadable if it is none that is known here, or too long or deep."""
    if len(text) > MOST_CHARS:
        raise Unreadable(f"it has more than {MOST_CHARS} characters")
    text = tidy(text)
    return _Reader(MIXED.sub(lambda found: f"{found[1] or found[2]}+", text)).whole()


def tidy(text: str) -> str:
    """The same without commas of thousands, spacing, boxes of words and signs for money and degrees."""
    for old, new in CHANGED.items():
        text = text.replace(old, new)
    text = SPACING.sub(" ", WORDS.sub(r" \1 ", text))
    return THOUSANDS.sub(lambda n: n[1].replace(",", ""), text).strip()


class _Reader:
    """Recursive descent: sums of products of signed powers; what stands side by side is multiplied."""

    def __init__(self, text: str):
        self.symbols: list[tuple[str, str]] = []
        at, text = 0, text.rstrip()
        while at < len(text):
            found = SYMBOL.match(text, at)
            if found is None or len(self.symbols) >= MOST_SYMBOLS:
                raise Unreadable("it has too many symbols")
            kind = str(found.lastgroup)
            self.symbols.append((kind, found[kind].lstrip("\\") if kind == "name" else found[kind]))
            at = found.end()
        self.at = self.depth = 0
        self.bars = False  # inside of |x|

    def whole(self) -> Node:
        if not self.symbols:
            raise Unreadable("it is empty")
        node = self.sum()
        if self.at < len(self.symbols):
            raise Unreadable(f"{self.next()[1]} is not expected")
        return node

    def next(self) -> tuple[str, str]:
        return self.symbols[self.at] if self.at < len(self.symbols) else ("end", "")

    def take(self, *ops: str) -> str:
        """The next symbol if it is one of these, and goes on; else ""."""
        if self.next()[0] != "number" and self.next()[1] in ops:
            self.at += 1
            return self.symbols[self.at - 1][1]
        return ""

    def sum(self) -> Node:
        node = self.product()
        while op := self.take("+", "-"):
            node = Node(op, (node, self.product()))
        return node

    def product(self) -> Node:
        node = self.signed()
        while True:
            if op := self.take("*", "/", *TIMES, "div"):
                node = Node("/" if op in ("/", "div") else "*", (node, self.signed()))
            elif self.next()[0] in ("number", "name") or self.next()[1] in ("(", "{", "|") and not self.closes():
                node = Node("*", (node, self.power()))
            else:
                return node

    def closes(self) -> bool:
        """Whether a | is the second of two: no value opens with one inside of another."""
        return self.next()[1] == "|" and self.bars

    def signed(self) -> Node:
        negative = False
        while op := self.take("+", "-"):
            negative ^= op == "-"
        node = self.power()
        return Node("neg", (node,)) if negative else node

    def power(self) -> Node:
        """All that nests goes through here."""
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise Unreadable("it is too deep")
        node = self.atom()
        while self.take("%"):
            node = Node("/", (node, HUNDRED))
        if self.take("^"):
            node = Node("^", (node, self.signed()))
        self.depth -= 1
        return node

    def atom(self) -> Node:
        kind, text = self.next()
        self.at += 1
        if kind == "number":
            return _number(text)
        if kind == "name":
            return self.named(text)
        if text in ("(", "{"):
            return self.closed(")" if text == "(" else "}")
        if text == "|" and not self.bars:
            self.bars = True
            inside = self.sum()
            self.bars = False
            if not self.take("|"):
                raise Unreadable("a | is never closed")
            return Node("call", ("abs", inside))
        raise Unreadable(f"{text or 'its end'} is not expected")

    def closed(self, end: str) -> Node:
        bars, self.bars = self.bars, False
        node = self.sum()
        self.bars = bars
        if not self.take(end):
            raise Unreadable(f"a {end} is missing")
        return node

    def named(self, name: str) -> Node:
        if name in FRACTIONS:
            return Node("/", (self.group(), self.group()))
        if name in FUNCTIONS:
            return Node("call", (name, self.power()))
        if name in CONSTANTS:
            return Node("number", (complex(CONSTANTS[name]),))
        if len(name) > 2 or name.lower() in SHORT_WORDS:
            raise Unreadable(f"{name} is a word")
        letters = [Node("letter", (letter,)) for letter in name]
        return letters[0] if len(letters) == 1 else Node("*", tuple(letters))

    def group(self) -> Node:
        """What LaTeX takes as one: braces, or a single digit."""
        if self.take("{"):
            self.at -= 1
            return self.atom()
        kind, text = self.next()
        if kind == "number" and len(text) > 1 and text.isdigit():  # \frac12
            self.symbols[self.at] = (kind, text[1:])
            return _number(text[0])
        return self.atom()


def _number(text: str) -> Node:
    return Node("number", (Fraction(text),))


HUNDRED = _number("100")
