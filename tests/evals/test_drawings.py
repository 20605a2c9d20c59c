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
from tests.runs import tiny_run

RUN = tiny_run()
TOKENIZER = Tokenizer(RUN.data.tokenizer)
CTX = Context(RUN, None, TOKENIZER, lambda batch: batch, 1, {}, {})
TRUTH = [("red", "star"), ("blue", "ring"), ("red", "ring"), ("blue", "star")]
PAINT = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), PAINT[colour]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def manifest(tmp_path) -> str:
    records = [
        {"pieces": [{"image": png(c)}, {"text": "unused"}], "meta": {"prompt": "What?", "colour": c, "shape": s}}
        for c, s in TRUTH
    ]
    write_arrayrecord(tmp_path / "d.arrayrecord", records)
    path = tmp_path / "d.toml"
    path.write_text('format = "arrayrecord"\nfiles = ["d.arrayrecord"]\nkind = "multimodal"\nlang = "en"\n')
    return str(path)


def test_an_eye_for_colour_alone(manifest, monkeypatch):
    """The stand-in names the colour that it is shown, red where it sees none, and always a star."""
    asked = []

    def look(skeleton, params, router_bias, prompts, **how):
        asked.extend(prompts)
        colours = ["blue" if p.tiles[0, 0, 0, 0] == 0 else "red" for p in prompts]
        said = [TOKENIZER.encode(f" {colour} star.") for colour in colours]
        if "allowed" not in how:
            return said
        return [[next(id for id in ids if id in how["allowed"])] for ids in said]  # " star" where shapes are asked

    monkeypatch.setattr(drawings, "generate", look)
    report = drawings.run(CTX, config.Eval(path=manifest))
    assert report.scalars == {
        **{"colour_accuracy": 1.0, "colour_accuracy_blank": 0.5},
        **{"shape_accuracy": 0.5, "shape_accuracy_blank": 0.5},
    }
    assert len(asked) == 12 and all((p.tiles == 255).all() for p in asked[4:])
    endings = ["What?"] * 8 + ["What? " + colour for colour, _ in TRUTH]
    assert all(TOKENIZER.decode(p.tokens).endswith(end) for p, end in zip(asked, endings, strict=True))
    assert report.pictures[1][1] == "blue star." and (report.pictures[1][0][..., 2] == 255).all()
    assert "chance 50.0%" in report.rows[0][2]


def test_the_first_name_counts():
    names = ["red", "blue"]
    texts = ["a red star", "", "blue.", "star, blue, red", "reddish blue"]
    assert drawings.accuracy(texts, ["red", "red", "blue", "red", "blue"], names) == 3 / 5


def test_pictures_that_cannot_be_read_are_refused(tmp_path):
    record = {"pieces": [{"image": b"no picture"}], "meta": {"prompt": "What?", "colour": "red", "shape": "star"}}
    write_arrayrecord(tmp_path / "d.arrayrecord", [record])
    path = tmp_path / "d.toml"
    path.write_text('format = "arrayrecord"\nfiles = ["d.arrayrecord"]\nkind = "multimodal"\nlang = "en"\n')
    with pytest.raises(ConfigError, match="cannot be decoded"):
        drawings.run(CTX, config.Eval(path=str(path)))
    path.write_text(path.read_text().replace("d.arrayrecord", "e.arrayrecord"))
    write_arrayrecord(tmp_path / "e.arrayrecord", [{"text": "no drawing"}])
    with pytest.raises(ConfigError, match="no document has a prompt"):
        drawings.run(CTX, config.Eval(path=str(path)))
