"""Every recipe in recipes/: it freezes at both sizes, says what it is, and its `:tiny` trains two steps."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import runpy
import tomllib
from pathlib import Path

import pytest

from llamax import config, stages
from llamax.data.tasks.source import read_table
from llamax.plan.chips import CHIPS

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
LAYOUTS = [
    (path.relative_to(ROOT), layout) for path in RECIPES for layout in runpy.run_path(str(path)).get("LAYOUTS", {})
]
MORE = [(path.relative_to(ROOT), size) for path in RECIPES for size in runpy.run_path(str(path)).get("SIZES", ())]
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def test_there_are_recipes():
    pretrain = {f"{name}_pretrain" for name in ("scout", "maverick", "behemoth")}
    assert pretrain | {"scout_midtrain", "scout_context", "maverick_context"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize(("path", "layout"), LAYOUTS, ids=str)
def test_a_layout_is_the_full_size_on_as_many_devices_as_it_says(path, layout):
    kind, devices, *_ = layout.split("_")
    full, laid_out = (config.freeze(config.load(f"{path}:{size}")) for size in ("full", layout))
    assert kind in CHIPS
    for part in stages.parts(laid_out):
        assert math.prod(config.check_devices(part.run, int(devices)).axes.values()) == int(devices)
        assert part.run.mesh.data in (-1, 1), "the mesh is the layout's alone, not the full size's with changes"
    of_the_layout = dict(mesh=full.mesh, train=full.train, data=full.data, stages=full.stages)
    assert dataclasses.replace(laid_out, **of_the_layout) == full
    assert laid_out.train.compute_dtype == full.train.compute_dtype, "what a layout leaves out stays"


def test_sizes_and_layouts_are_named_when_one_is_asked_for_that_is_none():
    with pytest.raises(config.ConfigError, match="its sizes are full, tiny, v5p_256"):
        config.load("recipes/scout_pretrain.py:v5e_256")


def test_a_layout_may_not_invent_fields(tmp_path):
    text = (ROOT / "recipes" / "scout_pretrain.py").read_text()
    (tmp_path / "bad.py").write_text(f"{text}\nLAYOUTS['bad'] = dict(train=dict(remt='block'))\n")
    with pytest.raises(config.ConfigError, match=r"Did you mean --config.train.remat\?"):
        config.load(f"{tmp_path}/bad.py:bad")


@every_recipe
@pytest.mark.parametrize("size", config.SIZES)
def test_freezes(path, size):
    run = config.freeze(config.load(f"{path}:{size}"))
    assert run.name == path.stem
    for part in stages.parts(run):
        assert config.check_devices(part.run, 1 if size == "tiny" else 1024)


@pytest.mark.parametrize(("path", "size"), MORE, ids=str)
def test_more_sizes_freeze_and_their_tasks_can_be_read(path, size):
    """And are named where the recipe says what it is."""
    for part in stages.parts(config.freeze(config.load(f"{path}:{size}"))):
        assert config.check_devices(part.run, 1)
        for source in part.run.data.sources.values():
            if Path(source.path).parts[1] == "tasks":
                table = tomllib.loads((ROOT / source.path).read_text())
                assert read_table(table["tasks"], source.path, table["kind"]).filler == "../built/docs.toml"
    assert f"{path.name}:{size}" in ast.get_docstring(ast.parse((ROOT / path).read_text()))


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
    # Text first, then pictures. Both are compiled, and that takes most of the time: elsewhere there are pictures only.
    shown = 0.6 if path.stem == "scout_pretrain" else 1.0
    cfg.data.update(seq_len=128, batch_tokens=8 * 128, multimodal_steps=shown)
    cfg.optim.update(schedule="cosine", warmup_steps=1)
    cfg.train.update(steps=0 if cfg.stages else 2, log_every_steps=1)
    cfg.init.path = ""
    for name in list(cfg.stages)[:-1]:  # each would be compiled: tests/test_stages.py has more than one
        del cfg.stages[name]
    for name in cfg.stages:
        cfg.stages[name] = dict(tokens=2 * 8 * 128, data=dict(seq_len=128), optim=dict(warmup_steps=0))
    result = train(config.freeze(cfg), tmp_path)
    assert result.finished
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert 0 < line["loss/next_token"] < 2 * math.log(config.freeze(cfg).model.vocab_size)
