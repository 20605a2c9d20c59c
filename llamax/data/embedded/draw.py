"""Pixels of drawings: drawn four times too large and averaged down, so that small shapes have clean edges."""

from __future__ import annotations

import functools
import io
import math
import random
from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

from llamax.data.embedded.scene import COLOURS, Shape

OVERSAMPLE = 4
PAPER = (240, 240, 240)  # light: every colour is darker in some channel, so that a silhouette is one direction
TINT = 12  # greatest change of a channel, of the background and of a shape's colour
STAR_INNER = 0.45  # of the outer radius
RING_HOLE = 0.55  # of the radius
CROSS_ARM = 0.36  # half an arm's width, of the radius
SQUARE_SIDE = 0.86  # half a side, of the radius

RGB = tuple[int, ...]  # three channels


def tint(rng: random.Random, rgb: RGB) -> RGB:
    """The colour, a little changed."""
    return tuple(min(255, max(0, channel + rng.randint(-TINT, TINT))) for channel in rgb)


class Canvas:
    """A light square to draw on, `side` pixels in the end. Coordinates are fractions of the side."""

    def __init__(self, rng: random.Random, side: int):
        self.rng = rng
        self.pixels = side * OVERSAMPLE
        self._image = Image.new("RGB", (self.pixels, self.pixels), tint(rng, PAPER))
        self._draw = ImageDraw.Draw(self._image)

    def shape(self, shape: Shape) -> None:
        background = self._image.getpixel((0, 0))
        fill = tint(self.rng, COLOURS[shape.colour])
        if shape.shape in ("circle", "ring"):
            self._disc(shape, shape.radius, fill)
            if shape.shape == "ring":
                self._disc(shape, shape.radius * RING_HOLE, background)
        else:
            outline = OUTLINES[shape.shape]
            self.polygon([(shape.x + shape.radius * u, shape.y + shape.radius * v) for u, v in outline], fill)

    def _disc(self, shape: Shape, radius: float, fill: RGB) -> None:
        self._draw.ellipse(
            self._scaled(((shape.x - radius, shape.y - radius), (shape.x + radius, shape.y + radius))), fill
        )

    def polygon(self, points: Iterable[tuple[float, float]], fill: RGB) -> None:
        self._draw.polygon(self._scaled(points), fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: RGB) -> None:
        self._draw.rectangle(self._scaled(((left, top), (right, bottom))), fill)

    def text(self, text: str, x: float, y: float, height: float, fill: RGB) -> None:
        """Text around a centre; `height` is the font's size."""
        self._draw.text((x * self.pixels, y * self.pixels), text, fill, font(round(height * self.pixels)), anchor="mm")

    def _scaled(self, points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x * self.pixels, y * self.pixels) for x, y in points]

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self._image.reduce(OVERSAMPLE).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def png_of(rng: random.Random, shapes: Iterable[Shape], side: int) -> bytes:
    """A drawing of some shapes as PNG."""
    canvas = Canvas(rng, side)
    for shape in shapes:
        canvas.shape(shape)
    return canvas.png()


@functools.cache
def font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(pixels)


def _regular(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """A regular polygon with a corner on top; with `inner`, every second of its corners is drawn in."""
    radii = [1.0 if i % 2 == 0 else inner for i in range(corners)]
    return [
        (radius * math.sin(2 * math.pi * i / corners), -radius * math.cos(2 * math.pi * i / corners))
        for i, radius in enumerate(radii)
    ]


def _cross(arm: float) -> list[tuple[float, float]]:
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    turns = [quarter]
    for _ in range(3):
        turns.append([(-y, x) for x, y in turns[-1]])
    return [point for turn in turns for point in turn]


OUTLINES = {  # in units of the radius, around the centre
    "square": [(sx * SQUARE_SIDE, sy * SQUARE_SIDE) for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))],
    "triangle": _regular(3),
    "star": _regular(10, STAR_INNER),
    "cross": _cross(CROSS_ARM),
}
