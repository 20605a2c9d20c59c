"""The scene graph: shapes with exact attributes, from which both the pixels and the words of a drawing are made.

Lengths and coordinates are fractions of the drawing's side, x to the right, y down. A shape's tuple (colour, shape,
size, position) is one of 8 x 6 x 3 x 9. Of the 18 (size, position) that a colour can have alone in a drawing, three are
held out with every shape: such a drawing is new, although its colour and shape were seen together. With every shape,
because a model that has seen five of six shapes at such a place learns that the sixth is never the answer there.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

COLOURS = {  # RGB; far apart from each other and from the light background
    "red": (220, 30, 40),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 40),
    "green": (30, 150, 60),
    "cyan": (60, 205, 215),
    "blue": (40, 70, 220),
    "purple": (145, 45, 165),
    "black": (25, 25, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.17, "medium": 0.24, "large": 0.32}  # mean radius
SIZE_JITTER = 0.08  # greatest change of a radius, as a share of it
LONE_SIZES = ("medium", "large")  # of a shape that is alone in its drawing; small ones stand among others
POSITIONS = (
    *("top left", "top", "top right"),
    *("left", "centre", "right"),
    *("bottom left", "bottom", "bottom right"),
)
MARGIN = 0.03  # between a shape and the drawing's edge
JITTER = 0.4  # a centre's greatest distance from its place along each side, of the distance between two places
HELD_OUT_PLACES = 3  # of the 18 (size, position) of each colour that stands alone


@dataclass(frozen=True)
class Shape:
    colour: str
    shape: str
    size: str
    position: str
    x: float  # centre
    y: float
    radius: float

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.colour} {self.shape}"

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.colour, self.shape, self.size, self.position


def _held_out() -> frozenset[tuple[str, str, str, str]]:
    rng = random.Random("llamax held-out scenes")  # one fixed choice, whatever seed a build has
    places = list(itertools.product(LONE_SIZES, POSITIONS))
    return frozenset(
        (colour, shape, *place)
        for colour in COLOURS
        for place in rng.sample(places, HELD_OUT_PLACES)
        for shape in SHAPES
    )


HELD_OUT = _held_out()


def spacing(size: str) -> float:
    """Distance between two neighbouring places of a size: as far apart as the margin and the jitters allow."""
    return (0.5 - MARGIN - SIZES[size] * (1 + SIZE_JITTER)) / (1 + JITTER)


def place(size: str, position: str) -> tuple[float, float]:
    """The mean centre of a shape of a size at a position."""
    row, column = divmod(POSITIONS.index(position), 3)
    return 0.5 + (column - 1) * spacing(size), 0.5 + (row - 1) * spacing(size)


def put(rng: random.Random, colour: str, shape: str, size: str, position: str) -> Shape:
    """A shape near its place and about its size: what is learnt of a few places should hold between them."""
    (x, y), far = place(size, position), JITTER * spacing(size)
    radius = SIZES[size] * (1 + rng.uniform(-SIZE_JITTER, SIZE_JITTER))
    return Shape(colour, shape, size, position, x + rng.uniform(-far, far), y + rng.uniform(-far, far), radius)


def draw_one(rng: random.Random, *, sizes: tuple[str, ...] = LONE_SIZES) -> Shape:
    """A shape of a tuple that is not held out, uniformly."""
    while True:
        key = rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(sizes), rng.choice(POSITIONS)
        if key not in HELD_OUT:
            return put(rng, *key)


def overlap(a: Shape, b: Shape) -> bool:
    """Whether the circles around two shapes come closer than half the margin."""
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2 < (a.radius + b.radius + MARGIN / 2) ** 2


def draw_several(rng: random.Random, n: int) -> tuple[Shape, ...]:
    """n shapes that do not overlap and differ in colour or shape, in reading order (rows, then columns)."""
    while True:
        shapes: list[Shape] = []
        for _ in range(20 * n):
            new = draw_one(rng, sizes=("small", "medium") if n < 4 else ("small",))
            if not any(overlap(new, old) or new.name == old.name for old in shapes):
                shapes.append(new)
            if len(shapes) == n:
                return tuple(sorted(shapes, key=lambda shape: POSITIONS.index(shape.position)))


def nearest_position(size: str, x: float, y: float) -> str:
    """The position whose place is closest to a centre."""

    def distance(position: str) -> float:
        place_x, place_y = place(size, position)
        return (place_x - x) ** 2 + (place_y - y) ** 2

    return min(POSITIONS, key=distance)
