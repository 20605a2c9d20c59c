"""Whole runs that train adapters: what a checkpoint holds, what is read back, exported, resumed and refused."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

import llamax
from llamax import config, starting
from llamax.checkpoint import found, hf, layers, saved, stream
from llamax.checkpoint.inspect import inspect
from llamax.checkpoint.manager import Checkpoints
from llamax.config import ConfigError
from llamax.config_dict import merged
from llamax.data.tokenizer import Tokenizer
from llamax.model import lora, tuned
from llamax.model.score import score
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from llamax.observe import provenance
from llamax.train.state import COUNTS
from tests.model import twins
from tests.runs import tiny_run
from tests.test_run import losses, same_bits, train
from tests.tolerances import FOLDED

TEXT = dict(multimodal_steps=0.0, sources={"text": tiny_run().data.sources["text"]}, batch_tokens=2 * 128)


def adapting(base: Path, **sections) -> config.Run:
    """Of a decoder with every kind of matrix; its norms are trained too."""
    run = tiny_run(data=TEXT, router_bias=dict(rate=0.0), init=dict(path=str(base)), **sections)
    model = replace(run.model, vision=None, plan=(((*run.model.plan[0][0],), 1),))
    tune = config.Tune(lora_rank=2, freeze=("!*ffn_norm/*",))
    return replace(run, model=model, tune=tune)


def model_in(folder: Path) -> Path:
    """A converted model with random weights, of the runs above."""
    run = adapting(folder)
    bones = skeleton(run.model, Seam(), patch_id=-1, train=run.train)
    params, bias = jax.device_get(twins.quick_jit(bones.init)(jax.random.key(1)))

    def lazy(x: np.ndarray) -> stream.Lazy:
        return stream.Lazy(x.shape, x.dtype, x.shape, lambda box: np.ascontiguousarray(x[box]))

    folder.mkdir()
    stream.write(folder / saved.CHECKPOINTS, jax.tree.map(lazy, params), bias)
    how = dict(patch_id=-1, tokenizer=run.data.tokenizer, dtypes={}, source={})
    saved.record(folder, run.model, **how)
    return folder


class Workdir(NamedTuple):
    """Of a run: what it began with, and the parameters that it ended with."""

    run: config.Run
    base: Path
    folder: Path
    params: Any
    router_bias: Any


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Workdir:
    """What a run of four steps leaves behind, written without the steps."""
    folder = tmp_path_factory.mktemp("lora")
    base, workdir = model_in(folder / "base"), folder / "run"
    run = adapting(base)
    bones, began = bones_of(run), llamax.load(base)
    rng, shapes = np.random.default_rng(0), bones.shapes()[0]
    learnt = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), bones.kept(shapes))
    params = merged(began.params, learnt)
    provenance.record(workdir, config.to_dict(run), init=found.about(found.find(base)), step=4)
    with Checkpoints(workdir / saved.CHECKPOINTS, run.checkpoint) as checkpoints:
        rest = dict(router_bias=began.router_bias, opt={"n": np.zeros(1)}, rng={"key": np.zeros(2, np.uint32)})
        state = SimpleNamespace(get_state=dict)
        checkpoints.save(4, params=bones.kept(params), **rest, data_iterator=state, extra={})
    return Workdir(run, base, workdir, params, began.router_bias)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Workdir:
    """The same of a run that took its steps, with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("trained")
    run = adapting(model_in(folder / "base"))
    result = train(run, folder / "run")
    return Workdir(run, folder / "base", folder / "run", result.state.params, result.state.router_bias)


def bones_of(run: config.Run):
    return skeleton(run.model, Seam(), patch_id=-1, train=run.train, tune=run.tune)


@functools.partial(jax.jit, static_argnums=0)
def logp_of(bones, params, router_bias, batch):
    return score(bones.bind(params, router_bias), batch).logp


def real_logp_of(bones, params, router_bias) -> np.ndarray:
    """Of every token that is no padding."""
    batch = twins.batch()
    return np.where(batch.segment_ids > 0, logp_of(bones, params, router_bias, batch), 0)


def pairs(a, b):
    """(path, x, y) of two trees alike."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), np.asarray(x), np.asarray(y)) for (p, x), y in leaves]


def test_what_is_loaded_and_exported_is_what_was_trained(made, tmp_path, capsys):
    """Log-probabilities of base and adapters, folded in layer by layer as in training, beside those of weights into
    which they are folded on a device, and in numpy."""
    want = real_logp_of(bones_of(made.run), made.params, made.router_bias)
    loaded, began = llamax.load(made.folder), llamax.load(made.base)
    assert loaded.skeleton.plain is None
    np.testing.assert_allclose(real_logp_of(*loaded[1:4]), want, **FOLDED)
    exported = llamax.load(hf.to_hf(made.folder, tmp_path / "hf"))
    for path, x, y in pairs(exported.params, loaded.params):
        np.testing.assert_allclose(x, y, **FOLDED, err_msg=path)
    assert np.abs(real_logp_of(*began[1:4]) - want).max() > 100 * FOLDED["atol"]  # so the adapters tell
    off = bones_of(made.run).bind(made.params, made.router_bias, adapters=False)
    assert same_bits(nnx.to_pure_dict(nnx.state(off, nnx.Param)), lora.without(made.params))
    assert inspect(made.folder)
    assert f"beside the weights in {made.base}" in capsys.readouterr().out.replace("\n", " ")


def test_a_base_that_has_changed_or_is_gone_is_refused(made, tmp_path):
    copied = shutil.copytree(made.folder, tmp_path / "run")
    said = json.loads((copied / "run.json").read_text())
    other = shutil.copytree(made.base, tmp_path / "base")
    said["init"]["path"] = str(other)
    (copied / "run.json").write_text(json.dumps(said))
    base_of(copied)  # moved, and the same
    sums = other / "checkpoints/0/checksums.json"
    found_sum = json.loads(sums.read_text())["sha256"]
    said["init"]["sum"] = found_sum[::-1]
    (copied / "run.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=r"The adapters in .*beside the weights in .*base, but these .*run.json"):
        llamax.load(copied)
    shutil.rmtree(other)
    with pytest.raises(ConfigError, match=r"these cannot be read: A model in .*base.*Bring them back"):
        starting.find(made.run, copied, Tokenizer(made.run.data.tokenizer))


def base_of(workdir: Path) -> found.Found:
    said = saved.find(workdir)
    assert said is not None
    return found.base_of(said)


def test_weights_of_hugging_faces_are_told_apart(made, tmp_path):
    """By a number in the middle of a file, too; the same weights in another folder are the same."""
    there = hf.to_hf(made.base, tmp_path / "hf")
    copied = shutil.copytree(there, tmp_path / "copied")
    first = found.fingerprint(found.find(there))
    assert found.fingerprint(found.find(copied)) == first
    with (copied / "model.safetensors").open("r+b") as file:
        file.seek(-3000, 2)
        file.write(b"\x11")
    assert found.fingerprint(found.find(copied)) != first


@pytest.mark.slow
def test_a_checkpoint_holds_what_was_trained_and_the_rest_is_where_the_run_began(trained):
    bones = bones_of(trained.run)
    names = {path.split("/")[-1] for path in tuned.paths_of(bones.kept(trained.params))}
    matrices = {name for _, of in lora.TARGETS.values() for name in of}
    assert names == {"weight", *(name + end for name in matrices for end in (lora.A, lora.B))}
    size = {p: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in _params(trained)}
    assert size[_params(trained)[1]] < 0.3 * size[_params(trained)[0]]
    for path, x, y in pairs(lora.without(trained.params), llamax.load(trained.base).params):
        assert np.array_equal(x, y) == ("ffn_norm" not in path), path
    assert any(np.any(x) for path, x, _ in pairs(trained.params, trained.params) if path.endswith(lora.B))


def _params(of: Workdir) -> tuple[Path, Path]:
    return of.base / "checkpoints/0/params", of.folder / "checkpoints/4/params"


def test_the_head_of_a_reward_model_is_trained_and_kept_beside_its_adapters(made, tmp_path):
    """What it adapts has none: that is read without, and the head from the run's own checkpoint."""
    run = replace(made.run, model=replace(made.run.model, reward_head=True), tune=config.Tune(lora_rank=2))
    bones, began = bones_of(run), llamax.load(made.base)
    assert bones.trained["reward"] and not bones.trained["head"]
    learnt = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), bones.kept(bones.shapes()[0]))
    provenance.record(tmp_path, config.to_dict(run), init=found.about(found.find(made.base)), step=4)
    with Checkpoints(tmp_path / saved.CHECKPOINTS, run.checkpoint) as checkpoints:
        rest = dict(opt={"n": np.zeros(1)}, rng={"key": np.zeros(2, np.uint32), "recent": np.zeros(2, np.float32)})
        rest |= dict(extra=dict.fromkeys(COUNTS, 4), data_iterator=SimpleNamespace(get_state=dict))
        checkpoints.save(4, params=learnt, router_bias=began.router_bias, **rest)
        checkpoints.wait()
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        kinds = dict(params=bones.shapes()[0], router_bias=began.router_bias, opt=rest["opt"], step=np.int32(0))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), kinds | rest["rng"])
        shapes = SimpleNamespace(**shapes, rng=shapes["key"])
        state = starting.restore(shapes, checkpoints, 4, None, found.find(made.base), bones)
    assert (np.asarray(state.params["reward"]) == 0.5).all()
    assert (np.asarray(llamax.load(tmp_path).params["reward"]) == 0.5).all()
    assert (layers.leaves(found.find(tmp_path), *_shapes(run))("reward").read() == 0.5).all()
    with pytest.raises(ConfigError, match="saved nowhere.*'!reward'"):
        frozen = replace(run, tune=config.Tune(lora_rank=2, freeze=("reward",)))
        starting.check_nothing_is_drawn(made.run.model, frozen)
    with pytest.raises(ConfigError, match="that is a reward model"):
        starting.check_same_function(run.model, made.run, "--config.init.path")


def _shapes(run: config.Run):
    return skeleton(run.model, Seam(), patch_id=-1, train=run.train).shapes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ours", "hugging face"])
def test_a_run_that_goes_on_is_one_that_was_not_stopped(trained, tmp_path, kind):
    """To the bit, from either kind of base; and another run begins with what it learnt."""
    run, workdir = trained.run, trained.folder
    if kind == "hugging face":
        run = replace(run, init=config.Init(path=str(hf.to_hf(trained.base, tmp_path / "hf"))))
        workdir = tmp_path / "run"
        assert same_bits(train(run, workdir).state.params, trained.params)
    copied = shutil.copytree(workdir, tmp_path / "copied")
    shutil.rmtree(copied / "checkpoints/4")
    assert same_bits(train(run, copied).state.params, trained.params)
    assert losses(copied, after=2) == losses(workdir, after=2)
    after = train(replace(run, init=config.Init(path=str(copied))), tmp_path / "next").state
    for path, x, y in pairs(lora.without(after.params), llamax.load(copied).params):
        assert np.array_equal(x, y) == ("ffn_norm" not in path), path
    twice = llamax.load(tmp_path / "next")  # adapters beside weights into which others are folded
    want = real_logp_of(bones_of(run), after.params, after.router_bias)
    np.testing.assert_allclose(real_logp_of(*twice[1:4]), want, **FOLDED)
