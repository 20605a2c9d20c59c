"""run.json, and the refusal of another run's workdir."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import jax
import pytest

from llamax.config import ConfigError
from llamax.observe import provenance

CONFIG = {
    "name": "scout_pretrain",
    "seed": 0,
    "model": {"dim": 64, "plan": ((("rope_chunk+moe",), 2),), "vision": None},
    "optim": {"peak_lr": 3e-4},
    "train": {"steps": 100, "log_every_steps": 10},
    "mesh": {"data": -1},
    "data": {
        "workers": 0,
        "prefetch_batches": 4,
        "seq_len": 128,
        "sources": {"web": {"path": "a.toml", "weight": 1.0, "later": ()}},
    },
    "evals": {"held_out": {"every_steps": 10}},
    "checkpoint": {"keep": 3},
}


def changed(**leaves):
    config = copy.deepcopy(CONFIG)
    for key, value in leaves.items():
        *folders, last = key.split("__")
        node = config
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return config


@pytest.fixture
def workdir(tmp_path):
    provenance.record(tmp_path / "run", CONFIG, ["--config.seed=0"])
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    return tmp_path / "run"


def test_record(workdir):
    provenance.record(workdir, CONFIG)
    run = json.loads((workdir / "run.json").read_text())
    assert run["config"] == json.loads(json.dumps(CONFIG)) and run["overrides"] == []
    assert len(run["started"]) == 2 and run["started"][0] <= run["started"][1]
    assert run["devices"] == {"platform": "cpu", "kind": jax.devices()[0].device_kind, "count": 8, "processes": 1}
    assert run["versions"]["jax"] == jax.__version__ and run["versions"]["python"].startswith("3.")
    assert sorted(p.name for p in workdir.iterdir()) == ["checkpoints", "run.json"]


def test_a_workdir_without_a_checkpoint_may_become_another_run(workdir):
    (workdir / "checkpoints" / "5").rename(workdir / "checkpoints" / "5.orbax-checkpoint-tmp")
    assert provenance.latest_step(workdir) == 0
    provenance.check_same_run(workdir, changed(seed=5))
    provenance.check_same_files(workdir, {"text": "another hash"})


def test_checkpoints_of_nobody_are_refused(workdir):
    (workdir / "run.json").unlink()
    with pytest.raises(ConfigError, match="no run.json that says whose"):
        provenance.check_same_run(workdir, CONFIG)


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="that is a file"):
        provenance.check_same_run(tmp_path / "file", CONFIG)
    with pytest.raises(ConfigError, match="cannot be made"):
        provenance.record(tmp_path / "file" / "below", CONFIG)


def test_the_same_run_and_what_may_change_pass(workdir):
    provenance.check_same_run(workdir / "not_there", CONFIG)
    provenance.check_same_run(workdir, CONFIG)  # tuples against json's lists
    allowed = dict(train__steps=200, train__log_every_steps=1, mesh__data=4, checkpoint__keep=1)
    allowed |= dict(data__workers=2, data__prefetch_batches=1, evals__new={"kind": "perplexity"})
    allowed |= dict(data__sources__web__weight=0.5, data__sources__web__later=((1e9, 0.2),))
    provenance.check_same_run(workdir, changed(**allowed))


def test_what_changes_is_recorded(workdir):
    """At the step from which it holds; nothing where nothing changed, or before there is a checkpoint."""
    key, new = "data.sources.web.weight", changed(data__sources__web__weight=0.5)
    assert provenance.changes(workdir, CONFIG, 5) == [] and provenance.changes(workdir, new, 0) == []
    change = {"step": 5, "key": key, "old": 1.0, "new": 0.5}
    assert provenance.changes(workdir, new, 5) == [change]
    provenance.record(workdir, new, step=5)
    provenance.record(workdir, new, step=5)
    run = provenance.record(workdir, changed(train__steps=200), step=8)
    back = [dict(step=8, key=key, old=0.5, new=1.0), dict(step=8, key="train.steps", old=100, new=200)]
    assert sorted(run["changes"], key=lambda c: c["key"]) == [change, *back]
    assert provenance.record(workdir, new, step=0)["changes"] == [], "begun anew"


def test_a_run_from_before_weights_could_change_keeps_them_at_first(workdir):
    """Its run.json knows no schedules and no changes, its checkpoints no history."""
    run = json.loads((workdir / "run.json").read_text())
    del run["changes"], run["config"]["data"]["sources"]["web"]["later"]
    (workdir / "run.json").write_text(json.dumps(run))
    provenance.check_same_run(workdir, CONFIG)
    assert provenance.changes(workdir, CONFIG, 5) == []
    for other in (dict(data__sources__web__weight=0.5), dict(data__sources__web__later=((1e9, 0.2),))):
        with pytest.raises(ConfigError, match="data.sources.web.* from before weights could change"):
            provenance.check_same_run(workdir, changed(**other))
    provenance.record(workdir, CONFIG, step=5)
    provenance.check_same_run(workdir, changed(data__sources__web__weight=0.5))


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (dict(name="maverick_pretrain"), 'name: "scout_pretrain" → "maverick_pretrain"'),
        (dict(optim__peak_lr=1e-3), "optim.peak_lr: 0.0003 → 0.001"),
        (dict(model__plan=((("nope_full+moe",), 2),)), 'model.plan: [[["rope_chunk+moe"], 2]] → [[["nope_full+moe"]'),
        (dict(data__sources__code={"path": "c.toml", "weight": 2.0}), 'data.sources.code.path: (absent) → "c.toml"'),
        (dict(data__sources={}), 'data.sources.web.path: "a.toml" → (absent)'),
        (dict(data__sources__web__path="b.toml"), 'data.sources.web.path: "a.toml" → "b.toml"'),
        (dict(model__vision={"dim": 8}), "model.vision: null → (absent); model.vision.dim: (absent) → 8"),
    ],
)
def test_another_run_is_refused_with_the_difference(workdir, change, shown):
    with pytest.raises(ConfigError) as error:
        provenance.check_same_run(workdir, changed(**change))
    assert shown in str(error.value) and "Choose another --workdir" in str(error.value)


def test_many_differences_are_counted(workdir):
    with pytest.raises(ConfigError, match="and 4 more"):
        provenance.check_same_run(workdir, changed(**{f"model__k{i}": i for i in range(12)}))


@pytest.mark.parametrize("text", ["", '{"config"', "[]", '{"overrides": []}'])
def test_an_unreadable_run_json_is_refused(workdir, text):
    (workdir / "run.json").write_text(text)
    with pytest.raises(ConfigError, match="cannot be read"):
        provenance.check_same_run(workdir, CONFIG)


def test_git_state(tmp_path):
    assert provenance.git_state(tmp_path) is None, "not a repository"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    (tmp_path / "a").write_text("1")
    for words in (["init", "-q"], ["add", "a"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    clean = provenance.git_state(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert provenance.git_state(tmp_path) == {**clean, "dirty": True}


def test_the_check_needs_no_jax():
    code = "import sys, llamax.observe.provenance; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
