"""Documents of one drawing and its words: one shape, several shapes, something written, a bar chart.

Each function here takes a random generator and a side in pixels and returns a document's record (see `sources.py`).
"""

from __future__ import annotations

import random

from llamax.data.embedded import draw, scene, words
from llamax.data.embedded.words import question

SHORT_WORDS = """
    ant ape arm bag bat bed bee box boy bun bus can cap car cat cow cup day dog ear egg elm eye fan fig fox gem hat
    hen hut ink jam jar jug key kid lamp leaf lion milk moon nest owl pan pea pen pig pot rain rock root rose sand
    sea ship snow star sun tea ten toe tree van web wind wolf yak zoo
"""
BAR_LEVELS = 5


def record(pieces: list[str | bytes], **meta: str) -> dict:
    """A document's record from its texts and PNGs."""
    parts = [{"text": piece} if isinstance(piece, str) else {"image": piece} for piece in pieces]
    return {"pieces": parts, "meta": meta} if meta else {"pieces": parts}


def one_shape(rng: random.Random, side: int) -> dict:
    """Most of these ask what the drawing shows or describe it; the rest ask for one attribute after another."""
    shape = scene.draw_one(rng)
    png = draw.png_of(rng, [shape], side)
    form = rng.random()
    if form < 0.55:
        text = words.what_is_this(shape)
    elif form < 0.9:
        text = f"{words.caption(shape)}."
    else:
        colour = question("what colour is the shape", shape.colour)
        kind = question("what shape is it", shape.shape)
        where = question("where is it", shape.position)
        size = question("what size is it", shape.size)
        text = " ".join(rng.sample((colour, kind, where, size), 2))
    return record([png, text])


def held_out_shapes(rng: random.Random, side: int, copies: int) -> list[dict]:
    """Every held-out tuple `copies` times, each with its own jitter and tints, and the truth in its meta; shuffled."""
    documents, keys = [], sorted(scene.HELD_OUT) * copies
    rng.shuffle(keys)
    for key in keys:
        shape = scene.put(rng, *key)
        png = draw.png_of(rng, [shape], side)
        meta = {"colour": shape.colour, "shape": shape.shape, "size": shape.size, "position": shape.position}
        documents.append(record([png, words.what_is_this(shape)], prompt=words.WHAT, **meta))
    return documents


def caption(rng: random.Random, side: int) -> dict:
    """A drawing and a sentence on it."""
    shape = scene.draw_one(rng)
    return record([draw.png_of(rng, [shape], side), f"{words.caption(shape)}."])


def held_out_caption(rng: random.Random, side: int) -> dict:
    """The same of a held-out tuple."""
    shape = scene.put(rng, *rng.choice(sorted(scene.HELD_OUT)))
    return record([draw.png_of(rng, [shape], side), f"{words.caption(shape)}."])


def several_shapes(rng: random.Random, side: int) -> dict:
    shapes = scene.draw_several(rng, rng.randint(2, 4))
    png = draw.png_of(rng, shapes, side)
    if rng.random() < 0.5:
        text = words.listing([f"{words.a(shape.name)} {words.at(shape.position)}" for shape in shapes]) + "."
    else:
        text = " ".join(rng.sample(_questions(rng, shapes), 2))
    return record([png, text])


def _questions(rng: random.Random, shapes: tuple[scene.Shape, ...]) -> list[str]:
    """Questions that have exactly one answer."""
    asked = [question("how many shapes", words.NUMBERS[len(shapes)])]
    first, second = rng.sample(shapes, 2)
    left = "yes" if first.x < second.x else "no"
    if abs(first.x - second.x) > 0.1:
        asked.append(question(f"is the {first.name} left of the {second.name}", left))
    for shape in shapes:
        if [other.shape for other in shapes].count(shape.shape) == 1:
            asked.append(question(f"what colour is the {shape.shape}", shape.colour))
        if [other.colour for other in shapes].count(shape.colour) == 1:
            asked.append(question(f"what shape is {shape.colour}", shape.shape))
        asked.append(question(f"what is {words.at(shape.position)}", shape.name))
    return asked


def written(rng: random.Random, side: int) -> dict:
    """A number below 100 or a short word."""
    number = rng.random() < 0.5
    text = str(rng.randint(0, 99)) if number else rng.choice(SHORT_WORDS.split())
    colour = rng.choice(list(scene.COLOURS))
    canvas = draw.Canvas(rng, side)
    height = rng.uniform(0.5, 0.6) if number else rng.uniform(0.34, 0.4)
    x, y = 0.5 + rng.uniform(-0.06, 0.06), 0.5 + rng.uniform(-0.15, 0.15)
    canvas.text(text, x, y, height, draw.tint(rng, scene.COLOURS[colour]))
    if rng.random() < 0.5:
        return record([canvas.png(), f"the {'number' if number else 'word'} {text} in {colour}."])
    return record([canvas.png(), question("what is written", text)])


def chart(rng: random.Random, side: int) -> dict:
    """Two to four bars of different colours, 1 to 5 lines high."""
    colours = rng.sample(list(scene.COLOURS), rng.randint(2, 4))
    heights = [rng.randint(1, BAR_LEVELS) for _ in colours]
    canvas = draw.Canvas(rng, side)
    left, bottom, level, line = 0.08, 0.92, 0.16, 0.012
    for i in range(BAR_LEVELS + 1):
        y = bottom - i * level
        canvas.box(left, y - line / 2, 0.96, y + line / 2, (90, 90, 90) if i == 0 else (205, 205, 205))
    width = (0.96 - left) / len(colours)
    for i, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        x = left + (i + 0.5) * width
        top = bottom - height * level
        canvas.box(x - 0.3 * width, top, x + 0.3 * width, bottom, draw.tint(rng, scene.COLOURS[colour]))
    asked = [question("how many bars", words.NUMBERS[len(colours)])]
    for name, extreme in (("tallest", max(heights)), ("shortest", min(heights))):
        if heights.count(extreme) == 1:
            asked.append(question(f"which bar is the {name}", colours[heights.index(extreme)]))
    i = rng.randrange(len(colours))
    asked.append(question(f"how high is the {colours[i]} bar", words.NUMBERS[heights[i]]))
    if rng.random() < 0.5:
        bars = [f"{colour} {height}" for colour, height in zip(colours, heights, strict=True)]
        return record([canvas.png(), f"a bar chart: {', '.join(bars)}."])
    return record([canvas.png(), " ".join(rng.sample(asked, 2))])
