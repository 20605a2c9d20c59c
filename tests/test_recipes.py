"""Every recipe in recipes/: it freezes at both sizes, says what it is, and its `:tiny` trains two steps."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest

from llamax import config

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def test_there_are_recipes():
    assert {"scout_pretrain", "maverick_pretrain"} <= {path.stem for path in RECIPES}


@every_recipe
@pytest.mark.parametrize("size", config.SIZES)
def test_freezes(path, size):
    run = config.freeze(config.load(f"{path}:{size}"))
    assert run.name == path.stem
    assert config.check_devices(run, 1 if size == "tiny" else 1024)


@every_recipe
def test_says_what_it_is(path):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    for spec in (path.name, f"{path.name}:tiny"):
        assert f"llamax train recipes/{spec} --workdir" in doc
    assert "expect" in doc.lower()


@every_recipe
def test_tiny_runs_the_same_code_paths(path):
    full, tiny = (config.freeze(config.load(f"{path}:{size}")) for size in config.SIZES)
    assert set(tiny.model.layers) == set(full.model.layers)
    assert (tiny.model.vision is None) == (full.model.vision is None)
    assert tiny.losses == full.losses
    assert full.data.multimodal_steps > 0 and tiny.data.multimodal_steps > 0


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Manifests of the names that the `:tiny` recipes read, a hundredth of their size."""
    from llamax.data.embedded.build import MAKERS, Recipe, build

    folder = tmp_path_factory.mktemp("data") / "built"
    build(folder, recipe=Recipe(counts=dict.fromkeys(MAKERS, 20), held_out_copies=1), library=ROOT / "llamax")
    return folder


@every_recipe
def test_tiny_trains_two_steps(path, built, tmp_path):
    from llamax.run import train

    cfg = config.load(f"{path}:tiny")
    for source in cfg.data.sources.values():
        source.path = str(built / Path(source.path).name)
    cfg.evals = {}
    cfg.data.update(seq_len=128, batch_tokens=8 * 128, multimodal_steps=0.6)  # text first, then pictures
    cfg.optim.update(schedule="cosine", warmup_steps=1)
    cfg.train.update(steps=2, log_every_steps=1)
    result = train(config.freeze(cfg), tmp_path)
    assert result.finished
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert 0 < line["loss/next_token"] < 2 * math.log(config.freeze(cfg).model.vocab_size)
