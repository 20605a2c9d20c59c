"""Drawings: words that follow from the scene, pixels that show it, and held-out scenes that training never draws."""

from __future__ import annotations

import collections
import io
import random
import re
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from llamax.data.embedded import build, draw, drawings, scene, words

SIDE = 56
NUMBERS = {word: i for i, word in enumerate(words.NUMBERS)}
RGB = np.array(list(scene.COLOURS.values()))


@pytest.fixture
def drawn(monkeypatch):
    """The shapes of every drawing made during a test, in order."""
    made: list[tuple[scene.Shape, ...]] = []
    png_of = draw.png_of

    def recorded(rng, shapes, side):
        made.append(tuple(shapes))
        return png_of(rng, made[-1], side)

    monkeypatch.setattr(draw, "png_of", recorded)
    return made


def pixels(document: dict) -> list[np.ndarray]:
    """The document's pictures, int [side, side, 3]."""
    images = (piece["image"] for piece in document["pieces"] if "image" in piece)
    return [np.array(Image.open(io.BytesIO(image)), int) for image in images]


def text_of(document: dict) -> str:
    return "".join(piece.get("text", "|") for piece in document["pieces"])


def nearest_colour(rgb: np.ndarray) -> str:
    return list(scene.COLOURS)[((RGB - rgb) ** 2).sum(-1).argmin()]


def figure_of(image: np.ndarray) -> np.ndarray:
    """Where a drawing of one shape is not background, bool [side, side]."""
    return np.abs(image - image[0, 0]).sum(-1) > 100


def seen_shape(image: np.ndarray) -> tuple[str, str, str, str]:
    """(colour, shape, size, position) measured from the pixels of one shape."""
    figure = figure_of(image)
    rows, columns = np.flatnonzero(figure.any(1)), np.flatnonzero(figure.any(0))
    box = figure[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = box.shape
    top, middle, bottom = (box[int(height * at)].mean() for at in (0.1, 0.5, 0.9))
    if not box[height // 2, width // 2]:
        shape = "ring"
    elif box.mean() > 0.93:
        shape = "square"
    elif max(top, bottom) < 0.5 and middle > 0.9:
        shape = "cross"
    elif box.mean() > 0.68:
        shape = "circle"
    else:
        shape = "triangle" if bottom > 0.8 else "star"
    # A square's sides and a triangle's height are shorter than the diameter of the circle around them.
    radius = (
        max(height, width)
        / 2
        / len(image)
        / {"square": draw.SQUARE_SIDE, "triangle": 0.866, "star": 0.95}.get(shape, 1)
    )
    size = min(scene.SIZES, key=lambda size: abs(scene.SIZES[size] - radius))
    stands_low = shape in ("triangle", "star")  # their lowest points are nearer to the centre than the top
    y = rows[0] / len(image) + radius if stands_low else (rows[0] + rows[-1] + 1) / 2 / len(image)
    x = (columns[0] + columns[-1] + 1) / 2 / len(image)
    return nearest_colour(np.median(image[figure], axis=0)), shape, size, scene.nearest_position(size, x, y)


def documents(maker: str, n: int, side: int = SIDE) -> Iterator[dict]:
    """One at a time, so that `drawn` ends with the shapes of the last."""
    for i in range(n):
        yield build.MAKERS[maker](random.Random(f"test/{maker}/{i}"), side)


def answers(text: str) -> list[tuple[str, str]]:
    return re.findall(r"Question: (.+?)\? Answer: (.+?)\.", text)


def test_every_colour_and_shape_has_three_held_out_places():
    pairs = collections.Counter((colour, shape) for colour, shape, _, _ in scene.HELD_OUT)
    assert len(pairs) == 8 * 6 and set(pairs.values()) == {3}


def test_no_shape_can_be_ruled_out_by_colour_and_place():
    """Where a colour and place is held out, it is held out with every shape."""
    cells = collections.Counter((colour, size, position) for colour, _, size, position in scene.HELD_OUT)
    assert len(cells) == 8 * 3 and set(cells.values()) == {len(scene.SHAPES)}


def test_held_out_scenes_are_new_and_their_pairs_are_not(drawn):
    for maker in (name for name in build.MAKERS if not name.endswith("_heldout")):
        assert sum(1 for _ in documents(maker, 400, side=8)) == 400
    trained = {shape.key for shapes in drawn for shape in shapes}
    assert not trained & scene.HELD_OUT
    assert {key[:2] for key in trained} == {key[:2] for key in scene.HELD_OUT}
    drawn.clear()
    held_out = drawings.held_out_shapes(random.Random(0), 8, 5)
    assert len(held_out) == len(drawn) == 720
    assert collections.Counter(shape.key for (shape,) in drawn) == dict.fromkeys(scene.HELD_OUT, 5)
    for (shape,), document in zip(drawn, held_out, strict=True):
        meta = document["meta"]
        assert (meta["colour"], meta["shape"], meta["size"], meta["position"]) == shape.key
        assert text_of(document) == f"|{meta['prompt']} {meta['colour']} {meta['shape']}."


def test_pixels_show_what_the_held_out_truth_says():
    held_out = drawings.held_out_shapes(random.Random(1), SIDE, 1)
    for document in held_out:
        meta = document["meta"]
        (image,) = pixels(document)
        assert image.shape == (SIDE, SIDE, 3)
        assert seen_shape(image) == (meta["colour"], meta["shape"], meta["size"], meta["position"])


def test_colours_are_far_apart():
    background = (240, 240, 240)
    colours = [*scene.COLOURS.values(), background]
    distances = [np.linalg.norm(np.subtract(a, b)) for i, a in enumerate(colours) for b in colours[:i]]
    assert min(distances) > 2 * draw.TINT * 3**0.5  # no two can be tinted into each other


def test_one_shape_says_what_is_drawn(drawn):
    asked_what = 0
    for document in documents("one_shape", 300):
        (shape,) = drawn.pop()
        (image,) = pixels(document)
        assert seen_shape(image) == shape.key
        text = text_of(document).removeprefix("|")
        if text.startswith("a "):
            assert text == f"a {shape.size} {shape.colour} {shape.shape} {words.at(shape.position)}."
            continue
        truth = {
            "what is this": shape.name,
            "what colour is the shape": shape.colour,
            "what shape is it": shape.shape,
            "what size is it": shape.size,
            "where is it": shape.position,
        }
        assert all(truth[question] == answer for question, answer in answers(text)) and answers(text)
        asked_what += text.startswith(words.WHAT)
    assert asked_what > 100


def test_several_shapes_say_what_is_drawn(drawn):
    seen = collections.Counter()
    for document in documents("several_shapes", 300):
        shapes = drawn.pop()
        assert 2 <= len(shapes) <= 4 and not any(scene.overlap(a, b) for a in shapes for b in shapes if a is not b)
        by_name, text = {shape.name: shape for shape in shapes}, text_of(document).removeprefix("|")
        for question, answer in answers(text):
            if question == "how many shapes":
                assert NUMBERS[answer] == len(shapes)
            elif match := re.fullmatch(r"is the (.+) left of the (.+)", question):
                first, second = (by_name[name] for name in match.groups())
                assert answer == ("yes" if first.x < second.x else "no")
            elif match := re.fullmatch(r"what colour is the (.+)", question):
                assert [shape.colour for shape in shapes if shape.shape == match[1]] == [answer]
            elif match := re.fullmatch(r"what shape is (.+)", question):
                assert [shape.shape for shape in shapes if shape.colour == match[1]] == [answer]
            else:
                where = re.fullmatch(r"what is (?:at|on) the (.+)", question)[1]
                assert [shape.name for shape in shapes if shape.position == where] == [answer]
            seen["yes" if answer == "yes" else question.split()[1]] += 1
        if not answers(text):
            parts = re.split(r", | and ", text.removesuffix("."))
            said = {re.fullmatch(r"an? (.+) (?:at|on) the (.+)", part).groups() for part in parts}
            assert said == {(shape.name, shape.position) for shape in shapes}
            seen["list"] += 1
    assert len(seen) >= 6 and seen["list"] > 100


def test_charts_have_the_bars_that_they_name():
    checked = 0
    for document in documents("chart", 100, side=112):
        (image,) = pixels(document)
        text = text_of(document)
        heights = dict(_bars(image))
        if "a bar chart: " in text:
            said = re.findall(r"(\w+) (\d)", text.split(": ")[1])
            assert [(colour, int(height)) for colour, height in said] == _bars(image)
        for question, answer in answers(text):
            checked += 1
            if question == "how many bars":
                assert NUMBERS[answer] == len(heights)
            elif match := re.fullmatch(r"how high is the (\w+) bar", question):
                assert NUMBERS[answer] == heights[match[1]]
            else:
                extreme = max if question.endswith("tallest") else min
                assert [c for c, h in heights.items() if h == extreme(heights.values())] == [answer]
    assert checked > 50


def _bars(image: np.ndarray) -> list[tuple[str, int]]:
    """(colour, height in lines) of the bars from left to right, measured in the middle between two lines."""
    side = len(image)
    middles = [round((0.92 - (line + 0.5) * 0.16) * side) for line in range(5)]
    figure = np.abs(image - image[0, 0]).sum(-1) > 100
    lowest = figure[middles[0]]
    starts = np.flatnonzero(lowest[1:] & ~lowest[:-1]) + 1
    ends = np.flatnonzero(~lowest[1:] & lowest[:-1]) + 1
    columns = [(start + end) // 2 for start, end in zip(starts, ends, strict=True)]
    return [(nearest_colour(image[middles[0], x]), sum(int(figure[y, x]) for y in middles)) for x in columns]


def test_written_words_are_drawn():
    """Not read back, but: the colour is right, and another word gives another picture."""
    pictures = {}
    for document in documents("written", 60):
        (image,) = pixels(document)
        figure = np.abs(image - image[0, 0]).sum(-1)
        assert 0.02 < (figure > 100).mean() < 0.4
        if match := re.search(r"the (?:number|word) (\w+) in (\w+)\.", text_of(document)):
            assert nearest_colour(image[np.unravel_index(figure.argmax(), figure.shape)]) == match[2]
            pictures.setdefault(match[1], []).append(figure)
    assert len(pictures) > 15


def test_clips_say_how_the_shape_moves(drawn):
    directions = set()
    for document in documents("clip", 150):
        n = sum("image" in piece for piece in document["pieces"])
        frames = [shape for (shape,) in drawn[-n:]]
        assert 3 <= n <= 6
        assert [seen_shape(image)[:2] for image in pixels(document)] == [(f.colour, f.shape) for f in frames]
        dx, dy = frames[-1].x - frames[0].x, frames[-1].y - frames[0].y
        direction = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
        colours = list(dict.fromkeys(frame.colour for frame in frames))
        for question, answer in answers(text_of(document)):
            if question.startswith("which way"):
                assert question == f"which way does the {frames[0].shape} move" and answer == direction
            elif question == "what moves":
                assert len(colours) == 1 and answer == words.a(frames[0].name)
            elif question == "which colours, in order":
                assert answer.split(", ") == colours
            else:
                before = question.removeprefix("which colour comes after ")
                assert colours.index(answer) == colours.index(before) + 1
        directions.add(direction)
    assert directions == {"up", "down", "left", "right"}


def test_interleaved_documents_say_what_is_drawn(drawn):
    forms = collections.Counter()
    for document in documents("interleaved", 200):
        n, text = sum("image" in piece for piece in document["pieces"]), text_of(document)
        shapes = [shape for (shape,) in drawn[-n:]]
        assert 1 <= n <= 4
        if text.startswith("These calls"):
            calls = re.findall(r'\| draw\("(.+)", colour="(.+)", size="(.+)", at="(.+)"\)', text)
            assert calls == [(s.shape, s.colour, s.size, s.position) for s in shapes]
            forms["program"] += 1
        elif text.startswith("Picture one:"):
            assert re.findall(r"\| (.+)\.\n", text) == [words.caption(shape) for shape in shapes]
            ((question, answer),) = answers(text)
            kind = question.rsplit(maxsplit=1)[1]
            places = [i for i, shape in enumerate(shapes, start=1) if shape.shape == kind]
            if question.startswith("which"):
                assert places == [NUMBERS[answer.removeprefix("picture ")]]
            else:
                assert len(places) == NUMBERS[answer] != 1
            forms["album"] += 1
        else:
            before, after = shapes
            changed = [
                name
                for name in ("colour", "shape", "size", "position")
                if getattr(before, name) != getattr(after, name)
            ]
            (name,) = changed
            assert [answer for _, answer in answers(text)] == [
                f"the {name}",
                getattr(before, name),
                getattr(after, name),
            ]
            forms["change"] += 1
    assert min(forms.values()) > 40 and len(forms) == 3
