"""Every recipe in recipes/: it freezes at both sizes, says what it is, and its `:tiny` trains two steps."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
import runpy
import tomllib
from pathlib import Path

import pytest

from llamax import config, stages, variants
from llamax.data.tasks import TASKS
from llamax.data.tasks.source import read_table
from llamax.evals import samples
from llamax.plan.chips import CHIPS

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
LAYOUTS = [
    (path.relative_to(ROOT), layout) for path in RECIPES for layout in runpy.run_path(str(path)).get("LAYOUTS", {})
]
MORE = [(path.relative_to(ROOT), size) for path in RECIPES for size in runpy.run_path(str(path)).get("SIZES", ())]
EVERY = [(path.relative_to(ROOT), size) for path in RECIPES for size in config.SIZES] + LAYOUTS + MORE
PICTURES = ("captions", "drawings", "interleaved", "clips")  # sources that have some, beside tasks
QUICK = ("scout_pretrain", "scout_sft")
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def quick_or_slow(path: Path):
    return pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow)


def test_there_are_recipes():
    pretrain = {f"{name}_pretrain" for name in ("scout", "maverick", "behemoth")}
    later = {"scout_midtrain", "scout_context", "maverick_context"}
    post = {"vision_align", "scout_sft", "maverick_sft", "maverick_dpo", "reward_model"}
    assert pretrain | later | post <= {path.stem for path in RECIPES}


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
def test_more_sizes_freeze(path, size):
    """And are named where the recipe says what it is."""
    for part in stages.parts(config.freeze(config.load(f"{path}:{size}"))):
        assert config.check_devices(part.run, 1)
    assert f"{path.name}:{size}" in ast.get_docstring(ast.parse((ROOT / path).read_text()))


@pytest.mark.parametrize(("path", "size"), EVERY, ids=str)
def test_tasks_can_be_read_and_fit_rows_and_pictures_come_in_steps_that_have_some(path, size):
    for part in stages.parts(config.freeze(config.load(f"{path}:{size}"))):
        data, pictures = part.run.data, 0.0
        read = {source.path for source in data.sources.values()}
        for name, source in data.sources.items():
            multimodal = name in PICTURES
            if source.path.startswith("data/tasks/"):
                table = tomllib.loads((ROOT / source.path).read_text())
                tasks, multimodal = (
                    read_table(table["tasks"], source.path, table["kind"]),
                    table["kind"] == "multimodal",
                )
                assert tasks.filler.replace("../", "data/") in {"data/built/docs.toml", *read}, "text that is there"
                assert tasks.longest <= data.seq_len
            pictures += multimodal * source.weight
        assert pictures / sum(source.weight for source in data.sources.values()) <= data.multimodal_steps


@every_recipe
def test_evaluations_of_the_full_size_fit_their_caches(path):
    run = config.freeze(config.load(str(path)))
    for evaluation in run.evals.values():
        if evaluation.lengths:
            samples.check_cache(run, evaluation, evaluation.lengths[-1] + samples.BEYOND)


@pytest.mark.parametrize("stem", ["scout_context", "maverick_context"])
def test_the_stages_of_a_tiny_context_extend_one(stem):
    run = config.freeze(config.load(f"recipes/{stem}.py:tiny"))
    assert run.init.path, "nothing starts from random weights unasked"
    first, last = stages.parts(run)
    assert run.data.seq_len < first.run.data.seq_len < last.run.data.seq_len
    for part in (first, last):
        sources = part.run.data.sources
        assert sources["lookups"].path == f"data/tasks/lookups_{part.run.data.seq_len}.toml"
        assert sources["packages"].weight and sources["docs"].weight and sources["drawings"].weight
    assert first.run.data.sources != last.run.data.sources and last.run.train.remat == "block"
    assert {"needle", "position"} <= {evaluation.kind for evaluation in run.evals.values()}


@every_recipe
def test_says_what_it_is(path):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    for spec in (path.name, f"{path.name}:tiny"):
        assert f"llamax train recipes/{spec} --workdir" in doc
    assert "expect" in doc.lower()


@every_recipe
def test_tiny_runs_the_same_code_paths(path):
    full, tiny = (config.freeze(config.load(f"{path}:{size}")) for size in config.SIZES)
    # These begin with the quickstart's model, a Scout: scout_sft.py has the same code paths at its full size.
    shaped = variants.scout() if path.stem in ("maverick_sft", "maverick_dpo") else full.model
    assert set(tiny.model.layers) == set(shaped.layers)
    assert (tiny.model.vision is None) == (full.model.vision is None)
    assert tiny.losses == full.losses
    assert full.data.multimodal_steps > 0 and tiny.data.multimodal_steps > 0


@pytest.mark.parametrize("stem", ["vision_align", "scout_sft", "maverick_sft", "maverick_dpo", "reward_model"])
def test_post_training_keeps_the_terms_that_balance_experts(stem):
    """Lost silently elsewhere: a mixture of experts that is tuned without them may collapse."""
    pretrained = config.freeze(config.load("recipes/scout_pretrain.py")).losses
    for size in config.SIZES:
        losses = config.freeze(config.load(f"recipes/{stem}.py:{size}")).losses
        assert losses.router_balance == pretrained.router_balance > 0 and losses.router_z == pretrained.router_z


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Manifests of the names that the `:tiny` recipes read, a hundredth of their size."""
    from llamax.data.embedded.build import MAKERS, Recipe, build

    folder = tmp_path_factory.mktemp("data") / "built"
    build(folder, recipe=Recipe(counts=dict.fromkeys(MAKERS, 20), held_out_copies=1), library=ROOT / "llamax")
    return folder


@pytest.fixture(scope="session")
def scout(built, tmp_path_factory):
    """A small Scout of two steps, that a reference can be."""
    folder = tmp_path_factory.mktemp("scout")
    trained(ROOT / "recipes" / "scout_pretrain.py", built, folder)
    return folder


@pytest.mark.parametrize("path", [quick_or_slow(path) for path in RECIPES])
def test_tiny_trains_two_steps(path, built, tmp_path, request):
    reference = request.getfixturevalue("scout") if path.stem == "maverick_dpo" else None
    vocab_size = trained(path, built, tmp_path, reference)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    learnt = "loss/reward" if path.stem == "reward_model" else "loss/next_token"
    for line in lines:
        assert 0 < line[learnt] < 2 * math.log(vocab_size)
    assert ("preference/margin" in lines[0]) == (path.stem in ("maverick_dpo", "reward_model"))


def trained(path, built, workdir, reference=None) -> int:
    """Two steps of a recipe's `:tiny` on small data; the vocabulary's size."""
    from llamax.run import train

    cfg = config.load(f"{path}:tiny")
    cfg.evals = {}
    # Text first, then pictures. Both are compiled, and that takes most of the time: elsewhere there are pictures only.
    shown = 0.6 if path.stem == "scout_pretrain" else 1.0
    long = 256 if cfg.data.comparisons_per_row else 128  # both answers in a row
    rows = dict(seq_len=long, tiles_per_row=24)
    cfg.data.update(batch_tokens=8 * long, multimodal_steps=shown, **rows)
    cfg.reference.path = str(reference or "")
    cfg.optim.update(schedule="cosine", warmup_steps=1)
    cfg.train.update(steps=0 if cfg.stages else 2, log_every_steps=1)
    cfg.init.path = ""
    for name in list(cfg.stages)[:-1]:  # each would be compiled: tests/test_stages.py has more than one
        del cfg.stages[name]
    for stage in cfg.stages.values():
        stage.update(tokens=2 * 8 * 128, optim=dict(warmup_steps=0), train=dict(remat="none"))  # which compiles faster
        stage.data.update(rows)
        small(stage.data.sources, built)
    small(cfg.data.sources, built)
    assert train(config.freeze(cfg), workdir).finished
    return config.freeze(cfg).model.vocab_size


def small(sources, built):
    """Sources read the small data; tasks are of a length that fits in its rows, and have few pictures."""
    for source in sources.values():
        name = Path(source.path)
        source.path = str(built / name.name)
        if name.parent.name == "tasks":
            text = re.sub("length_range = .*", "length_range = [96, 128]", (ROOT / name).read_text())
            few = "".join(f"options.{task} = {{n = 2}}\n" for task in TASKS if task in text and TASKS[task].pictures)
            source.path = str(built.parent / "tasks" / name.name)
            Path(source.path).parent.mkdir(exist_ok=True)
            Path(source.path).write_text(f"{text}{few}")
