"""Documents of several pictures: text interleaved with one to four drawings, and clips of three to six frames."""

from __future__ import annotations

import dataclasses
import random

from llamax.data.embedded import draw, scene, words
from llamax.data.embedded.drawings import record
from llamax.data.embedded.words import NUMBERS, question

DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}


def interleaved(rng: random.Random, side: int) -> dict:
    """An album, a program and what it draws, or two drawings that differ in one attribute."""
    return rng.choice((_album, _program, _change))(rng, side)


def _album(rng: random.Random, side: int) -> dict:
    shapes = [scene.draw_one(rng) for _ in range(rng.randint(1, 4))]
    pieces: list[str | bytes] = []
    for number, shape in zip(NUMBERS[1:], shapes, strict=False):
        pieces += [f"Picture {number}:", draw.png_of(rng, [shape], side), f" {words.caption(shape)}.\n"]
    return record([*pieces, _about_album(rng, shapes)])


def _about_album(rng: random.Random, shapes: list[scene.Shape]) -> str:
    kinds = [shape.shape for shape in shapes]
    kind = rng.choice(scene.SHAPES)
    if kinds.count(kind) == 1:
        return question(f"which picture shows {words.a(kind)}", f"picture {NUMBERS[1 + kinds.index(kind)]}")
    return question(f"how many pictures show {words.a(kind)}", NUMBERS[kinds.count(kind)])


def _program(rng: random.Random, side: int) -> dict:
    pieces: list[str | bytes] = ["These calls draw the pictures.\n"]
    for _ in range(rng.randint(1, 4)):
        shape = scene.draw_one(rng)
        call = f'draw("{shape.shape}", colour="{shape.colour}", size="{shape.size}", at="{shape.position}")'
        pieces += [draw.png_of(rng, [shape], side), f" {call}\n"]
    return record(pieces)


def _change(rng: random.Random, side: int) -> dict:
    """Two drawings of a shape; one attribute differs."""
    attribute, values = rng.choice(
        (
            ("colour", list(scene.COLOURS)),
            ("shape", list(scene.SHAPES)),
            ("size", list(scene.SIZES)),
            ("position", list(scene.POSITIONS)),
        )
    )
    while True:
        before = scene.draw_one(rng)
        value = rng.choice([value for value in values if value != getattr(before, attribute)])
        changed = dataclasses.replace(before, **{attribute: value})
        if changed.key not in scene.HELD_OUT:
            break
    first, second = _drawn_alike(rng, [before, scene.put(rng, *changed.key)], side)
    answers = [
        question("what changed", f"the {attribute}"),
        question(f"what was the {attribute} before", getattr(before, attribute)),
        question(f"what is the {attribute} now", value),
    ]
    return record([first, " then", second, "\n" + " ".join(answers)])


def _drawn_alike(rng: random.Random, shapes: list[scene.Shape], side: int) -> list[bytes]:
    """A drawing of each shape, all with the same tints."""
    look = rng.getrandbits(64)
    return [draw.png_of(random.Random(look), [shape], side) for shape in shapes]


def clip(rng: random.Random, side: int) -> dict:
    """Three to six frames of a shape that crosses the picture; in half of them its colour changes on the way."""
    n = rng.randint(3, 6)
    direction = rng.choice(list(DIRECTIONS))
    stages = rng.choice((1, 1, 2, 3))
    colours = rng.sample(list(scene.COLOURS), stages)
    frames = _crossing(rng, direction, [colours[i * stages // n] for i in range(n)])
    while any(frame.key in scene.HELD_OUT for frame in frames):
        frames = _crossing(rng, direction, [colours[i * stages // n] for i in range(n)])
    asked = [question(f"which way does the {frames[0].shape} move", direction)]
    if stages == 1:
        asked.append(question("what moves", words.a(frames[0].name)))
    else:
        after = rng.randrange(stages - 1)
        asked.append(question("which colours, in order", ", ".join(colours)))
        asked.append(question(f"which colour comes after {colours[after]}", colours[after + 1]))
    return record(["A clip:", *_drawn_alike(rng, frames, side), f" {' '.join(rng.sample(asked, len(asked)))}"])


def moving(rng: random.Random, direction: str, colours: list[str], side: int) -> tuple[list[bytes], str]:
    """(frames of a shape that crosses the picture, as many as there are colours; its kind), none of them held out."""
    while True:
        frames = _crossing(rng, direction, colours)
        if not any(frame.key in scene.HELD_OUT for frame in frames):
            return _drawn_alike(rng, frames, side), frames[0].shape


def _crossing(rng: random.Random, direction: str, colours: list[str]) -> list[scene.Shape]:
    """A shape from one edge to the other, in as many steps as there are colours."""
    size, kind = rng.choice(list(scene.SIZES)), rng.choice(scene.SHAPES)
    start, end = scene.place(size, "top left")[0], scene.place(size, "bottom right")[0]
    far = scene.JITTER * scene.spacing(size)
    across = rng.choice((start, 0.5, end)) + rng.uniform(-far, far)
    dx, dy = DIRECTIONS[direction]
    if dx + dy < 0:
        start, end = end, start
    frames = []
    for i, colour in enumerate(colours):
        along = start + (end - start) * i / (len(colours) - 1)
        x, y = (along, across) if dx else (across, along)
        frames.append(scene.Shape(colour, kind, size, scene.nearest_position(size, x, y), x, y, scene.SIZES[size]))
    return frames
