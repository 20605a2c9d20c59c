"""Conversations with answers that can be checked: over drawings and clips, sums, and what short programs print.

A function of TASKS makes a question, its answer and a sentence that says it; `instruction` makes a record of them
(sources.py). What the assistant says ends with a line "Answer: ...". In HEDGED of the instructions it hedges before,
though nothing is uncertain: a bad habit for preferences to correct. A preference has an answer without hedging as the
chosen one, and as the rejected one the same answer hedged, or a wrong answer.

Held out of training are drawings of the held-out tuples (scene.py), one tenth of the pairs of numbers, and one tenth of
the programs, by their hash.
"""

from __future__ import annotations

import io
import random
import zlib
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image

from llamax.data.embedded import draw, drawings, scene, sequences, words

HEDGED = 0.8  # of the instructions
WRONG = 0.1  # of the preferences: the rejected answer is a wrong one
HELD_OUT_TENTH = 10  # one of so many
HEDGES = (" But I am not sure.", " Sorry if I am wrong.")
SYSTEMS = ("You are brief.", "Answer the question.", "Look closely and answer.", "You are a careful assistant.")
SYSTEM_SHARE = 0.5  # of the conversations that have a system message
FORM = "{line}\nAnswer: {line}"  # of what the assistant says (llamax/rewards/form.py)
MOST = 20  # numbers below it
FRAME_MS = 100  # of a clip
NOUNS = tuple(drawings.SHORT_WORDS.split())


class Asked(NamedTuple):
    content: list[str | bytes | list[bytes]]  # what the user says: texts, PNGs, and frames of clips
    sentence: str  # that says the answer, in lower case: {} is the answer, {a} the answer with its article
    answer: str
    others: tuple[str, ...]  # that would be wrong


Task = Callable[[random.Random, int, bool], Asked]


# ------------------------------------------------------------------------------------------------------------ the tasks


def picture(rng: random.Random, side: int, held_out: bool) -> Asked:
    """One shape: what it is, or one of its attributes."""
    shape = scene.put(rng, *rng.choice(sorted(scene.HELD_OUT))) if held_out else scene.draw_one(rng)
    names = [f"{colour} {kind}" for colour in scene.COLOURS for kind in scene.SHAPES]
    asked, sentence, answer, others = rng.choice(
        (
            ("What is in the picture?", "it shows {a}.", shape.name, names),
            ("What colour is the shape?", "its colour is {}.", shape.colour, list(scene.COLOURS)),
            ("Which shape is it?", "its shape is {a}.", shape.shape, list(scene.SHAPES)),
        )
    )
    return Asked([draw.png_of(rng, [shape], side), asked], sentence, answer, _without(others, answer))


def two_pictures(rng: random.Random, side: int, held_out: bool) -> Asked:
    """Which of two pictures shows a colour."""
    keys = sorted(scene.HELD_OUT)
    shapes = [scene.put(rng, *rng.choice(keys)) if held_out else scene.draw_one(rng) for _ in range(2)]
    while shapes[0].colour == shapes[1].colour:
        shapes[1] = scene.put(rng, *rng.choice(keys)) if held_out else scene.draw_one(rng)
    wanted = rng.randrange(2)
    answer = words.NUMBERS[wanted + 1]
    first, second = (draw.png_of(rng, [shape], side) for shape in shapes)
    asked = f"Which picture shows something {shapes[wanted].colour}?"
    sentence = f"picture {{}} shows {words.a(shapes[wanted].name)}."
    return Asked(["Picture one:", first, "Picture two:", second, asked], sentence, answer, (words.NUMBERS[2 - wanted],))


def video(rng: random.Random, side: int, held_out: bool) -> Asked:
    """A clip of a moving shape: which way it moves, or its colour."""
    del held_out  # no clip is ever drawn twice
    direction, colour = rng.choice(list(sequences.DIRECTIONS)), rng.choice(list(scene.COLOURS))
    clip, shape = sequences.moving(rng, direction, [colour] * rng.randint(3, 5), side)
    if rng.random() < 0.5:
        others = _without(sequences.DIRECTIONS, direction)
        return Asked([clip, f"Which way does the {shape} move?"], "it moves {}.", direction, others)
    return Asked([clip, "What colour is the shape that moves?"], "it is {}.", colour, _without(scene.COLOURS, colour))


def arithmetic(rng: random.Random, side: int, held_out: bool) -> Asked:
    """A sum or a difference of numbers below MOST."""
    del side
    while True:
        a, b = rng.randrange(MOST), rng.randrange(MOST)
        if held_out == is_held_out(f"{a},{b}"):
            break
    if rng.random() < 0.5 or a < b:
        told, answer = f"{a} + {b}", a + b
    else:
        told, answer = f"{a} - {b}", a - b
    others = tuple(str(n) for n in range(max(0, answer - 3), answer + 4) if n != answer)
    return Asked([f"What is {told}?"], f"{told} is {{}}.", str(answer), others)


def code(rng: random.Random, side: int, held_out: bool) -> Asked:
    """What a program of one or two lines prints."""
    del side
    while True:
        program, answer, others = rng.choice((_item, _length, _joined, _upper))(rng)
        if held_out == is_held_out(program):
            break
    return Asked([f"What does this print?\n\n{program}"], "it prints {}.", answer, _without(others, answer))


def _item(rng: random.Random) -> tuple[str, str, list[str]]:
    chosen = rng.sample(NOUNS, rng.randint(2, 4))
    i = rng.randrange(len(chosen))
    listed = ", ".join(f'"{noun}"' for noun in chosen)
    return f"words = [{listed}]\nprint(words[{i}])", chosen[i], chosen


def _length(rng: random.Random) -> tuple[str, str, list[str]]:
    n = rng.randint(1, 6)
    listed = ", ".join(str(rng.randrange(10)) for _ in range(n))
    return f"numbers = [{listed}]\nprint(len(numbers))", str(n), [str(i) for i in range(1, 7)]


def _joined(rng: random.Random) -> tuple[str, str, list[str]]:
    a, b = rng.sample(NOUNS, 2)
    return f'print("{a}" + "{b}")', a + b, [b + a, a, b]


def _upper(rng: random.Random) -> tuple[str, str, list[str]]:
    noun = rng.choice(NOUNS)
    return f'print("{noun}".upper())', noun.upper(), [noun, noun.title()]


TASKS: dict[str, tuple[Task, float]] = {  # name -> how it is made, and its share
    "picture": (picture, 0.4),
    "two_pictures": (two_pictures, 0.1),
    "video": (video, 0.15),
    "arithmetic": (arithmetic, 0.2),
    "code": (code, 0.15),
}


# ---------------------------------------------------------------------------------------------------------- the records


def instruction(rng: random.Random, side: int, held_out: bool = False) -> dict:
    """A conversation of one question and its answer."""
    name, asked = _asked(rng, side, held_out)
    said = _said(asked, asked.answer, rng.choice(HEDGES) if rng.random() < HEDGED else "")
    return {"messages": [*_prompt(rng, asked), {"role": "assistant", "content": said}], "meta": _meta(name, asked)}


def preference(rng: random.Random, side: int, held_out: bool = False) -> dict:
    """A question, a good answer and a worse one."""
    name, asked = _asked(rng, side, held_out)
    wrong = bool(asked.others) and rng.random() < WRONG
    other, hedge = (rng.choice(asked.others), "") if wrong else (asked.answer, rng.choice(HEDGES))
    said = {"chosen": _said(asked, asked.answer, ""), "rejected": _said(asked, other, hedge)}
    answers = {key: {"role": "assistant", "content": text} for key, text in said.items()}
    kind = {"rejected_for": "wrong" if wrong else "hedging"}
    return {"prompt": _prompt(rng, asked), **answers, "meta": _meta(name, asked) | kind}


def _asked(rng: random.Random, side: int, held_out: bool) -> tuple[str, Asked]:
    names = list(TASKS)
    (name,) = rng.choices(names, [TASKS[name][1] for name in names])
    return name, TASKS[name][0](rng, side, held_out)


def _said(asked: Asked, answer: str, hedge: str) -> str:
    sentence = asked.sentence.format(answer, a=words.a(answer))
    return f"{sentence[0].upper()}{sentence[1:]}{hedge}\nAnswer: {answer}"


def _prompt(rng: random.Random, asked: Asked) -> list[dict]:
    parts = [_part(piece) for piece in asked.content]
    content = parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts
    user = {"role": "user", "content": content}
    return [{"role": "system", "content": rng.choice(SYSTEMS)}, user] if rng.random() < SYSTEM_SHARE else [user]


def _part(piece: str | bytes | list[bytes]) -> dict:
    if isinstance(piece, str):
        return {"type": "text", "text": piece}
    return {"type": "video", "video": gif(piece)} if isinstance(piece, list) else {"type": "image", "image": piece}


def _meta(name: str, asked: Asked) -> dict:
    verify = "math" if name == "arithmetic" else "exact"
    return {"domain": name, "answer": asked.answer, "verify": verify, "options": {"marked": True, "form": FORM}}


def gif(frames: list[bytes]) -> bytes:
    """PNGs as one animated GIF, its palette exact enough for eight colours."""
    images = [Image.open(io.BytesIO(frame)).convert("RGB") for frame in frames]
    out = io.BytesIO()
    images[0].save(out, "GIF", save_all=True, append_images=images[1:], duration=FRAME_MS, loop=0)
    return out.getvalue()


def is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT_TENTH == 0


def _without(names, answer: str) -> tuple[str, ...]:
    return tuple(name for name in names if name != answer)
