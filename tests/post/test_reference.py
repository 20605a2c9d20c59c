"""What a reference gives, kept on disk: as live, whatever the packing and the mesh; resumed; refused when stale."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from llamax import config, run, starting
from llamax.config import ConfigError
from llamax.data import pipeline, referenced
from llamax.data.embedded import instructions
from llamax.data.tokenizer import Tokenizer
from llamax.post import reference
from tests.runs import FIXTURES, tiny_run
from tests.tolerances import CACHED_LOGP

N = 24  # comparisons
TEXT = dict(multimodal_steps=0.0, sources={"text": config.Source(str(FIXTURES / "text.toml"))})


def manifest(folder: Path, seed: int = 0) -> str:
    """Comparisons of text alone."""
    lines = []
    while len(lines) < N:
        record = instructions.preference(random.Random(f"{seed}/{len(lines)}/{random.random()}"), 56)
        if record["meta"]["domain"] in ("arithmetic", "code"):
            lines.append(json.dumps(record))
    folder.mkdir(exist_ok=True)
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "pairs.toml").write_text('format = "jsonl"\nfiles = ["pairs.jsonl"]\nkind = "text"\n')
    return str(folder / "pairs.toml")


def run_of(pairs: str, base: Path, steps: int = 2, **sections) -> config.Run:
    """DPO on them, from a run of one step."""
    data = dict(sources={"pairs": config.Source(pairs)}, comparisons_per_row=2, multimodal_steps=0.0, window_docs=8)
    data |= dict(seq_len=256, batch_tokens=8 * 256)
    told = dict(
        data=data | sections.pop("data", {}),
        preference=dict(losses=config.PreferenceLosses(sigmoid=1.0)),
        losses=dict(next_token=0.2),
        init=dict(path=str(base)),
        reference=dict(source="cache"),
        router_bias=dict(rate=0.0),
        optim=dict(warmup_steps=0),
        train=dict(steps=steps, log_every_steps=1),
    )
    return tiny_run(steps, **told | sections)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(manifest, workdir of a model)."""
    folder = tmp_path_factory.mktemp("reference")
    pairs = manifest(folder / "data")
    train(tiny_run(1, data=TEXT), folder / "base")
    return pairs, folder / "base"


def train(made: config.Run, workdir: Path, devices: int = 1) -> run.Result:
    return run.train(made, workdir, devices=jax.devices()[:devices])


def lines_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def logps_of(made: config.Run, pairs: str) -> list[np.ndarray]:
    """What the folder has of every comparison."""
    reader = pipeline.open_source(pipeline.read_manifest(pairs))
    (folder,) = {path.parent for path in Path(made.data.ref_logp).rglob("*.arrayrecord")}
    return [document.ref_logp for document in referenced.Referenced(reader, folder)]


def in_folder(made: config.Run, folder: Path) -> config.Run:
    return dataclasses.replace(made, data=dataclasses.replace(made.data, ref_logp=str(folder)))


def test_what_is_kept_is_what_the_live_reference_gives(base, tmp_path):
    """The first step's figures, and those of a second, whose weights have moved."""
    pairs, folder = base
    kept = train(run_of(pairs, folder), tmp_path / "cache")
    live = train(run_of(pairs, folder, reference=dict(source="live")), tmp_path / "live")
    assert kept.finished and live.finished
    first, *_ = lines_of(tmp_path / "live")
    assert first["preference/margin"] == 0 and first["preference/kl"] == 0, "to the bit: one program, one mesh"
    for ours, theirs in zip(lines_of(tmp_path / "cache"), lines_of(tmp_path / "live"), strict=True):
        for key in ("loss/total", "preference/margin", "preference/kl", "preference/reward_accuracy"):
            if key != "preference/reward_accuracy" or ours["step"] > 1:
                np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-4, err_msg=key)
    for a, b in zip(*(jax.tree.leaves(of.state.params) for of in (kept, live)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_packings_and_meshes_give_the_same(base, tmp_path):
    """Other windows, rows of two lengths would be other rows; on one device, on eight, and over a row."""
    pairs, folder = base
    one = in_folder(run_of(pairs, folder, steps=1), tmp_path / "one")
    train(one, tmp_path / "a")
    want = logps_of(one, pairs)
    assert all(len(logp) > 10 and (logp < 0).all() for logp in want)
    others = {
        "window": dict(data=dict(window_docs=3)),
        "mesh": dict(mesh=dict(data=2, fsdp=2, expert=2)),
        "context": dict(mesh=dict(data=1, context=2), data=dict(align_tokens=0)),
    }
    for name, sections in others.items():
        made = in_folder(run_of(pairs, folder, steps=1, **sections), tmp_path / name)
        n = np.prod([max(1, n) for n in made.mesh.axes.values()])
        train(made, tmp_path / f"run_{name}", devices=int(n))
        for a, b in zip(logps_of(made, pairs), want, strict=True):
            np.testing.assert_allclose(a, b, **CACHED_LOGP, err_msg=name)


def test_it_is_computed_once_and_goes_on_where_it_was_left(base, tmp_path, monkeypatch):
    pairs, folder = base
    monkeypatch.setattr(reference, "SHARD", 7)
    made = in_folder(run_of(pairs, folder, steps=1), tmp_path / "kept")
    calls = []
    whole = reference._of_documents

    def counted(run, task, numbers, *rest):
        calls.append(numbers)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(run, task, numbers, *rest)

    monkeypatch.setattr(reference, "_of_documents", counted)
    with pytest.raises(KeyboardInterrupt):
        train(made, tmp_path / "a")
    assert len(list((tmp_path / "kept").rglob("*.arrayrecord"))) == 2
    train(made, tmp_path / "a")
    assert calls == [range(0, 7), range(7, 14), range(14, 21), range(14, 21), range(21, 24)]
    train(made, tmp_path / "b")
    assert len(calls) == 5, "another run reads what is there"


def test_what_follows_from_something_else_is_refused_with_what_changed(base, tmp_path):
    pairs, folder = base
    made = in_folder(run_of(pairs, folder, steps=1), tmp_path / "kept")
    train(made, tmp_path / "a")
    train(tiny_run(1, seed=5, data=TEXT), tmp_path / "other")
    with pytest.raises(ConfigError, match="computed from other weights"):
        train(dataclasses.replace(made, init=config.Init(str(tmp_path / "other"))), tmp_path / "b")
    with pytest.raises(ConfigError, match="computed from other dtype"):
        other = dataclasses.replace(made.train, compute_dtype="bfloat16")
        train(dataclasses.replace(made, train=other), tmp_path / "c")
    (found,) = (tmp_path / "kept").rglob("key.json")
    found.write_text(json.dumps(json.loads(found.read_text()) | {"code": "older"}))
    with pytest.raises(ConfigError, match=r"computed from other code\. Delete it"):
        train(made, tmp_path / "d")


def test_data_that_is_corrected_without_growing_is_other_data(base, tmp_path):
    """The file's size tells nothing, nor does what the manifest said of it."""
    pairs = manifest(tmp_path / "data")
    made, read = run_of(pairs, base[1]), pipeline.read_manifest
    before = reference.key_of(made, read(pairs), 0)
    path = tmp_path / "data" / "pairs.jsonl"
    path.write_text(path.read_text().replace("e", "a", 1))
    changed = {name for name, said in reference.key_of(made, read(pairs), 0).items() if said != before[name]}
    assert changed == {"data"}
    Path(pairs).write_text(Path(pairs).read_text() + f'[sha256]\n"pairs.jsonl" = "{"0" * 64}"\n')
    path.write_text(path.read_text().replace("e", "a", 1))
    assert reference.key_of(made, read(pairs), 0)["data"] not in (before["data"], None)


def test_other_evaluations_of_comparisons_need_nothing_kept(base, tmp_path):
    """They score what is chosen, or read the head: nothing has been computed for them."""
    pairs, folder = base
    data = in_folder(run_of(pairs, folder), tmp_path / "nothing").data
    batches = list(pipeline.HeldOut(pairs, data, None))
    assert batches and all(batch.ref_logp is None and batch.sides.any() for batch in batches)


def test_a_run_goes_on_beside_the_reference_that_it_began_with(base, tmp_path):
    """Though the run that it names has gone on since; if that step's weights are others now, it is refused."""
    pairs, folder = base
    theirs, workdir = tmp_path / "base", tmp_path / "ours"
    shutil.copytree(folder, theirs)
    made = run_of(pairs, theirs, reference=dict(source="live"))
    tokenizer = Tokenizer(made.data.tokenizer)
    found = starting.find_reference(made, workdir, tokenizer)
    about = json.loads(json.dumps(starting.about(found)))
    shutil.copytree(theirs / "checkpoints" / "1", theirs / "checkpoints" / "2")
    assert starting.find_reference(made, workdir, tokenizer).step == 2, "nothing has been learnt yet"
    (workdir / "checkpoints" / "4").mkdir(parents=True)
    (workdir / "run.json").write_text(json.dumps({"config": config.to_dict(made), "reference": about}))
    assert starting.find_reference(made, workdir, tokenizer).step == 1
    (workdir / "run.json").write_text(json.dumps({"config": {}, "reference": about | {"sum": "other"}}))
    with pytest.raises(ConfigError, match="not the weights with which it began"):
        starting.find_reference(made, workdir, tokenizer)


@pytest.mark.slow
def test_a_run_that_is_done_computes_what_is_gone_for_its_evaluations(base, tmp_path):
    pairs, folder = base
    made = run_of(pairs, folder, steps=1, evals={"kept": config.Eval("preference", pairs, every_steps=1)})
    first = train(made, tmp_path / "a").reports["kept"].scalars
    said = json.loads((tmp_path / "a" / "run.json").read_text())
    assert said["reference"] == said["init"]
    shutil.rmtree(tmp_path / "a" / "reference")
    assert train(made, tmp_path / "a").reports["kept"].scalars == first
