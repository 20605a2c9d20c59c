"""Accuracy of named colours and shapes: a model that sees, one that does not, and words that stand for nothing."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from llamax import config
from llamax.config import ConfigError
from llamax.data.sources import write_arrayrecord
from llamax.data.tokenizer import Tokenizer
from llamax.evals import drawings
from llamax.evals.report import Context
from llamax.sample.engine import Completion
from tests.runs import tiny_run

RUN = tiny_run()
TOKENIZER = Tokenizer(RUN.data.tokenizer)
CTX = Context(RUN, None, None, TOKENIZER, lambda batch: batch, 1, {}, {})
TRUTH = [("red", "star"), ("blue", "ring"), ("red", "ring"), ("blue", "star")]
PAINT = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), PAINT[colour]).save(buffer, "PNG")
    return buffer.getvalue()


def record(picture: bytes, **meta) -> dict:
    return {"pieces": [{"image": picture}, {"text": "unused"}], "meta": {"prompt": "What?"} | meta}


GOOD = [record(png(colour), colour=colour, shape=shape) for colour, shape in TRUTH]


def source(folder, records: list[dict]) -> str:
    write_arrayrecord(folder / "d.arrayrecord", records)
    path = folder / "d.toml"
    path.write_text('format = "arrayrecord"\nfiles = ["d.arrayrecord"]\nkind = "multimodal"\nlang = "en"\n')
    return str(path)


@pytest.fixture
def manifest(tmp_path) -> str:
    return source(tmp_path, GOOD)


@pytest.fixture
def asked(monkeypatch) -> list:
    """What a stand-in is asked: it names the colour that it is shown, red where it sees none, and always a star."""
    asked = []

    def look(skeleton, params, router_bias, prompts, **how):
        asked.extend(prompts)
        colours = ["blue" if p.tiles[0, 0, 0, 0] == 0 else "red" for p in prompts]
        said = [TOKENIZER.encode(f" {colour} star.") for colour in colours]
        if "allowed" in how:
            said = [[next(id for id in ids if id in how["allowed"])] for ids in said]  # " star" where shapes are asked
        return [[Completion(ids, [0.0] * len(ids), stopped=False)] for ids in said]

    monkeypatch.setattr(drawings, "generate", look)
    return asked


def test_an_eye_for_colour_alone(manifest, asked):
    report = drawings.run(CTX, config.Eval(path=manifest))
    assert report.scalars == {
        **{"colour_accuracy": 1.0, "colour_accuracy_blank": 0.5},
        **{"shape_accuracy": 0.5, "shape_accuracy_blank": 0.5},
        "left_out": 0,
    }
    assert len(asked) == 12 and all((p.tiles == 255).all() for p in asked[4:])
    endings = ["What?"] * 8 + ["What? " + colour for colour, _ in TRUTH]
    assert all(TOKENIZER.decode(p.tokens).endswith(end) for p, end in zip(asked, endings, strict=True))
    assert report.pictures[1][1] == "blue star." and (report.pictures[1][0][..., 2] == 255).all()
    assert "chance 50.0%" in report.rows[0][2] and "left out" not in report.rows[0][2]


def test_the_first_name_counts():
    names = ["red", "blue"]
    texts = ["a red star", "", "blue.", "star, blue, red", "reddish blue"]
    assert drawings.accuracy(texts, ["red", "red", "blue", "red", "blue"], names) == 3 / 5


BAD = [
    record(b"no picture", colour="green", shape="cube"),
    {"pieces": [{"text": " "}], "meta": {}},  # an empty document
    record(png("red"), colour=["red"], shape="star"),
    record(png("red"), colour="red", shape=" "),
    record(png("red"), colour="red", shape=3),
    {"text": "no picture at all", "meta": {"prompt": "What?", "colour": "red", "shape": "star"}},
]


def test_drawings_that_cannot_be_read_are_left_out_and_told(tmp_path, asked):
    good = drawings.run(CTX, config.Eval(path=source(tmp_path, GOOD)))
    del asked[:]
    report = drawings.run(CTX, config.Eval(path=source(tmp_path, [*BAD[:3], *GOOD, *BAD[3:], {"text": "other"}])))
    assert report.scalars == good.scalars | {"left_out": 6}
    assert len(asked) == 12 and len(report.pictures) == 4
    assert all(what == f"{name} of 4" for name, (what, *_) in zip(drawings.ASKED, report.rows, strict=True))
    assert all(compared.endswith("; 6 of 10 documents left out") for *_, compared in report.rows)


def test_drawings_of_which_none_can_be_used_are_refused(tmp_path):
    path = source(tmp_path, [BAD[0]])
    with pytest.raises(
        ConfigError, match=r"none of its 1 drawings can be used: a picture cannot be decoded \(record 0"
    ):
        drawings.run(CTX, config.Eval(path=path))
    for other in ({"text": "no drawing"}, {"text": ""}):
        with pytest.raises(ConfigError, match="no document has a prompt"):
            drawings.run(CTX, config.Eval(path=source(tmp_path, [other])))
