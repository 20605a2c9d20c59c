"""Pictures in a haystack of text: a needle picture among many, and questions over pictures that are far apart.

Every picture is a generated drawing of one shape with a name before it, "Picture amber-fox:". Needle pictures: which of
them shows a red circle (`by` "content"; no other does), or what the picture of a name shows (`by` "name"). Change: two
of the pictures are asked for by their names; they differ in one attribute, which only who sees both can tell. In the
split "eval" all drawings are among those that no training drawing shows (scene.HELD_OUT).
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from llamax.data.document import Picture
from llamax.data.embedded import draw, scene
from llamax.data.tasks import haystack, words
from llamax.data.tasks.haystack import Needle
from llamax.data.tasks.sample import Ask, Exam, Maker, Question

VALUES = {"colour": tuple(scene.COLOURS), "shape": scene.SHAPES}  # what changes between two pictures
SIDES = 16, 2048  # pixels, of a drawing on which a shape can be told and that is made at once
NAMES = len(scene.COLOURS) * len(scene.SHAPES)  # that a drawing can have


class Wording(NamedTuple):
    name: str  # {key}, before a picture
    content: str  # which picture shows {shown}
    named: str  # what {key} shows
    change: str  # what is another in {other} than in {key}


SEEN = (
    Wording(
        "Picture {key}:",
        "Which picture shows a {shown}? It is",
        "Picture {key} shows a",
        "What changes from picture {key} to picture {other}? Answer:",
    ),
    Wording(
        "This is {key}:",
        "Question: Where is the {shown}? Answer: It is in",
        "Question: What is in {key}? Answer: a",
        "Question: How does {other} differ from {key}? Answer:",
    ),
)
HELD_OUT = (
    Wording(
        "{key} looks like this:",
        "Name the drawing of a {shown}:",
        "The drawing named {key} is of a",
        "Between {key} and {other} one thing is changed, namely",
    ),
)


@dataclass(frozen=True)
class Pictures(Maker):
    pictures: ClassVar = True
    choices: ClassVar = {"asked": ("content", "name", "change"), "key_kind": words.NAMES}

    asked: str = "content"  # | name | change
    n: int = 8  # pictures; more where there are more questions
    side: int = 56  # pixels of a drawing
    key_kind: str = "words"  # of words.KINDS
    seen: tuple[Wording, ...] = SEEN
    held_out: tuple[Wording, ...] = HELD_OUT

    def flaw(self, split: str) -> tuple[str, str] | None:
        if not SIDES[0] <= self.side <= SIDES[1]:
            return f"draws on {self.side} pixels a side", f"Set side to {SIDES[0]} ... {SIDES[1]}."
        return words.too_few(split, [(self.key_kind, max(self.n, 2))])

    def __call__(self, ask: Ask) -> Exam:
        if self.asked == "content":  # a picture of another name has to be left to those that are not asked for
            ask = dataclasses.replace(ask, questions=min(ask.questions, NAMES - (self.n > NAMES)))
        wording = ask.choose(self.seen, self.held_out)
        drawn = haystack.draw(ask)
        supply = words.Supply(ask.rng, ask.tokens, ask.split, words.around(wording, drawn))
        each = 2 if self.asked == "change" else 1
        keys = supply.draw(self.key_kind, max(self.n, each * ask.questions))
        shapes = self._shapes(ask, len(keys))
        asked = range(0, each * ask.questions, each)
        questions = [self._question(wording, keys[i : i + each], shapes[i : i + each]) for i in asked]
        needles = [
            Needle(wording.name.format(key=key), depth, Picture(draw.png_of(ask.rng, [shape], self.side)))
            for key, shape, depth in zip(keys, shapes, ask.depths(len(keys)), strict=True)
        ]
        hay = haystack.hide(ask, drawn, needles, ask.room(questions), "")
        asked_at = [q._replace(depth=hay.depths[i * each]) for i, q in enumerate(questions)]
        return Exam(hay.pieces, tuple(asked_at))

    def _shapes(self, ask: Ask, n: int) -> list[scene.Shape]:
        """What the pictures show: those that are asked for first; what is asked for by content only once."""
        shapes: list[scene.Shape] = []
        if self.asked == "change":
            while len(shapes) + 1 < n:
                shapes += _pair(ask.rng, ask.split)
            return [*shapes, *(_one(ask.rng, ask.split) for _ in range(n - len(shapes)))]
        while len(shapes) < n:
            shape = _one(ask.rng, ask.split)
            asked_for = [other.name for other in shapes[: ask.questions]]
            if self.asked == "name" or shape.name not in asked_for:
                shapes.append(shape)
        return shapes

    def _question(self, wording: Wording, keys: list[str], shapes: list[scene.Shape]) -> Question:
        if self.asked == "content":
            asked, answer = wording.content.format(shown=shapes[0].name), keys[0]
        elif self.asked == "name":
            asked, answer = wording.named.format(key=keys[0]), shapes[0].name
        else:
            asked = wording.change.format(key=keys[0], other=keys[-1])
            answer = _difference(shapes[0], shapes[-1])
        return Question(f"\n{asked}", f" {answer}\n", (answer,))


def _one(rng: random.Random, split: str) -> scene.Shape:
    """A shape of the split's own tuples (colour, shape, size, position)."""
    if split == "train":
        return scene.draw_one(rng)
    return scene.put(rng, *rng.choice(sorted(scene.HELD_OUT)))


def _pair(rng: random.Random, split: str) -> list[scene.Shape]:
    """Two drawings of the split's own tuples that differ in one attribute."""
    while True:
        before, attribute = _one(rng, split), rng.choice(list(VALUES))
        others = [dataclasses.replace(before, **{attribute: value}) for value in VALUES[attribute]]
        others = [after for after in others if after != before and (split == "train" or after.key in scene.HELD_OUT)]
        after = rng.choice(others) if others else before
        if after != before and (after.key in scene.HELD_OUT) == (split == "eval"):
            return [before, scene.put(rng, *after.key)]


def _difference(before: scene.Shape, after: scene.Shape) -> str:
    attribute = next(name for name in VALUES if getattr(before, name) != getattr(after, name))
    return f"{attribute}, from {getattr(before, attribute)} to {getattr(after, attribute)}"
