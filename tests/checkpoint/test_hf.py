"""From Hugging Face's format and back: the same tensors to the last byte, the same configuration, the same logits."""

from __future__ import annotations

import dataclasses
import json
import shutil

import grain
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import llamax
from llamax import config
from llamax.batch import Batch
from llamax.checkpoint import hf, stream, sums
from llamax.checkpoint.inspect import look
from llamax.checkpoint.manager import Checkpoints
from llamax.data.tokenizer import Tokenizer, write_ranks
from llamax.observe import provenance
from llamax.parallel.mesh import make_mesh
from tests import goldens, hf_folders
from tests.model.twins import quick_jit
from tests.runs import tiny_run
from tests.tolerances import GOLDEN

BF16 = np.dtype(ml_dtypes.bfloat16)
EXPORTED = goldens.FOLDER.parent / "exported.safetensors"  # logits of transformers 5.23.0, see its README


def parsed(path):
    """A JSON file but for the version of the software that wrote it."""
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "transformers_version"}


def back_and_forth(source, tmp_path, **how):
    hf.from_hf(source, tmp_path / "ckpt")
    return hf.to_hf(tmp_path / "ckpt", tmp_path / "back", **how)


def logits(loaded, tokens_BT):
    shape = tokens_BT.shape
    zeros, positions = np.zeros(shape, np.int32), np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    tiles = np.zeros((shape[0], 0, 1, 1, 3), np.uint8)
    batch = Batch(tokens_BT, zeros, zeros.astype(np.float32), zeros + 1, positions, zeros, tiles)

    def program(params, bias):
        model = loaded.skeleton.bind(params, bias)
        return model.logits(model(batch)[0])

    return np.asarray(quick_jit(program)(loaded.params, loaded.router_bias))


# ------------------------------------------------------------------------------------------------------ round trips

ROUND_TRIPS = [(case, np.float32, 1) for case in (*goldens.LLAMA4, *goldens.DENSE)]
ROUND_TRIPS += [("vision", BF16, 3), ("llama32_tied", BF16, 2), ("maverick_like", np.float16, 5)]


@pytest.mark.parametrize(("case", "dtype", "shards"), ROUND_TRIPS)
def test_there_and_back_is_equal_byte_for_byte(monkeypatch, tmp_path, case, dtype, shards):
    monkeypatch.setattr(stream, "PIECE", 4096)  # so small that leaves are cut, by layer and within one
    source = hf_folders.golden(tmp_path / "source", case, dtype, shards=shards)
    back = back_and_forth(source, tmp_path, max_shard_gb=1e-4)
    assert hf_folders.same(hf_folders.tensors(source), hf_folders.tensors(back))
    assert parsed(source / "config.json") == parsed(back / "config.json")
    assert parsed(source / "generation_config.json") == parsed(back / "generation_config.json")
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in hf_folders.tensors(back).values())
    for name, file in index["weight_map"].items():
        assert name in load_file(back / file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ckpt", "source"]  # nothing temporary is left


@pytest.mark.parametrize("like", [hf_folders.ODD, hf_folders.ODD_DENSE], ids=["odd", "odd_dense"])
def test_other_shapes_give_the_recorded_logits(tmp_path, like):
    """Weights from a seed; the logits are those of transformers on the same folder."""
    source = hf_folders.write(tmp_path / "source", like, hf_folders.random(like))
    back = back_and_forth(source, tmp_path)
    assert hf_folders.same(hf_folders.tensors(source), hf_folders.tensors(back))
    expected = load_file(EXPORTED)[like["model_type"]]
    np.testing.assert_allclose(logits(llamax.load(back), hf_folders.tokens()), expected, **GOLDEN)


def test_layers_of_several_dtypes_come_back_as_they_were(tmp_path):
    like = hf_folders.ODD_DENSE
    tensors = hf_folders.random(like)
    for name, dtype in (("layers.1.self_attn.q_proj", BF16), ("layers.0.mlp.up_proj", np.float16)):
        tensors = {key: x.astype(dtype) if name in key else x for key, x in tensors.items()}
    source = hf_folders.write(tmp_path / "source", like, tensors)
    assert hf_folders.same(tensors, hf_folders.tensors(back_and_forth(source, tmp_path)))


def test_one_file_has_no_index_and_other_files_are_kept(tmp_path):
    source = hf_folders.golden(tmp_path / "source", "llama32_tied")
    kept = {"chat_template.jinja": "{{ x }}", "special_tokens_map.json": "{}", "tokenizer_config.json": '{"a": 1}'}
    for name, text in kept.items():
        (source / name).write_text(text)
    back = back_and_forth(source, tmp_path)
    assert sorted(path.name for path in back.iterdir()) == sorted(
        [*kept, "config.json", "generation_config.json", "model.safetensors"]
    )
    assert all((back / name).read_text() == text for name, text in kept.items())


def test_an_export_has_a_tokenizer_json_if_the_source_had_a_tokenizer(tmp_path):
    """One of 256 single bytes and 128 special tokens, and embeddings of as many rows."""
    single = tmp_path / "tokenizer.model"
    write_ranks({bytes([i]): i for i in range(256)}, single)
    tensors = hf_folders.tensors(hf_folders.golden(tmp_path / "source", "vision"))
    said = json.loads((tmp_path / "source" / "config.json").read_text())
    said["text_config"]["vocab_size"] = 384
    ends = {name: np.resize(x, (384, x.shape[1])) for name, x in tensors.items() if "embed_t" in name or "head" in name}
    grown = hf_folders.write(tmp_path / "grown", said, tensors | ends)
    shutil.copyfile(single, grown / "tokenizer.model")
    back = back_and_forth(grown, tmp_path)
    assert (back / "tokenizer.model").read_bytes() == single.read_bytes()
    assert Tokenizer(back / "tokenizer.json").encode("déjà vu") == list("déjà vu".encode())


def test_an_export_in_another_dtype_says_so(tmp_path):
    source = hf_folders.golden(tmp_path / "source", "vision")
    said = json.loads((source / "config.json").read_text())
    said["torch_dtype"], said["text_config"]["dtype"] = "float32", "float32"
    (source / "config.json").write_text(json.dumps(said))
    back = back_and_forth(source, tmp_path, dtype="bfloat16")
    assert {x.dtype for x in hf_folders.tensors(back).values()} == {BF16}
    again = json.loads((back / "config.json").read_text())
    assert again["torch_dtype"] == again["text_config"]["dtype"] == "bfloat16"


def test_a_converted_model_is_a_checkpoint_like_any_other(tmp_path):
    hf.from_hf(hf_folders.golden(tmp_path / "source", "scout_like"), tmp_path / "ckpt")
    (row,) = look(tmp_path / "ckpt" / "checkpoints")
    assert (row.step, row.health, set(row.items)) == (0, "sound", {"params", "router_bias"})
    assert sums.check(tmp_path / "ckpt" / "checkpoints" / "0") == []


# -------------------------------------------------------------------------------------------------------- of a run


def workdir(tmp_path, model, *, bias=0.0, split=1):
    """A run's folder with random weights, saved as a run saves them, from `split` devices."""
    run = dataclasses.replace(tiny_run(), model=model)
    provenance.record(tmp_path / "run", config.to_dict(run))
    shapes, bias_shapes = hf.shapes(model)
    mesh = jax.make_mesh((split,), ("fsdp",), devices=jax.devices()[:split])
    rng = np.random.default_rng(3)

    def value(x):
        sharding = NamedSharding(mesh, PartitionSpec(*(None,) * (x.ndim - 1), None if x.shape[-1] % split else "fsdp"))
        return jax.device_put(rng.standard_normal(x.shape, np.float32) * x.shape[-1] ** -0.5, sharding)

    params = jax.tree.map(value, shapes)
    state = dict(params=params, router_bias=jax.tree.map(lambda x: np.full(x.shape, bias, x.dtype), bias_shapes))
    data = iter(grain.MapDataset.range(8).to_iter_dataset())
    with Checkpoints(tmp_path / "run" / "checkpoints", config.Checkpoint()) as checkpoints:
        checkpoints.save(3, **state, opt={"x": np.zeros(1)}, rng={"k": np.zeros(1)}, data_iterator=data, extra={})
    return tmp_path / "run", params


def exportable():
    """The tests' run, with a vision encoder as Hugging Face has it."""
    model = tiny_run().model
    vision = dataclasses.replace(model.vision, ffn_dim=4 * model.vision.dim)
    return dataclasses.replace(model, vocab_size=4096, vision=vision)


def test_a_run_goes_to_hugging_face_and_back(tmp_path):
    folder, params = workdir(tmp_path, exportable(), split=4)
    out = hf.to_hf(folder, tmp_path / "out", max_shard_gb=1e-3)
    hf.from_hf(out, tmp_path / "ckpt")
    run, exported, again = llamax.load(folder), llamax.load(out), llamax.load(tmp_path / "ckpt")
    for loaded in (run, exported, again):
        jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
        assert loaded.model == exportable() and loaded.tokenizer.vocab_size == 4096
        assert loaded.skeleton.graph == run.skeleton.graph  # the same picture token, so the same program
    said = json.loads((out / "config.json").read_text())
    assert said["image_token_index"] == run.tokenizer.patch and said["text_config"]["bos_token_id"] == run.tokenizer.bos
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == sorted(run.tokenizer.stop)
    text = "def main(): # déjà vu <|eot|>\n\n  42"
    assert {loaded.tokenizer.path.name for loaded in (exported, again)} == {"tokenizer.json"}
    assert run.tokenizer.encode(text) == exported.tokenizer.encode(text) == again.tokenizer.encode(text)
    (out / "tokenizer.json").unlink()
    assert llamax.load(out).tokenizer.path == out / "tokenizer.model"
    half = hf.to_hf(folder, tmp_path / "half", dtype="bfloat16", step=3)
    for name, x in hf_folders.tensors(out).items():
        np.testing.assert_array_equal(x.astype(BF16), hf_folders.tensors(half)[name])


def test_transformers_gives_the_same_logits(tmp_path):
    """Of exports of everything: goldens, other shapes, a run."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    folders = [hf_folders.golden(tmp_path / case, case) for case in (*goldens.LLAMA4, *goldens.DENSE)]
    for like in (hf_folders.ODD, hf_folders.ODD_DENSE):
        folders.append(hf_folders.write(tmp_path / f"odd-{like['model_type']}", like, hf_folders.random(like)))
    exports = [back_and_forth(folder, tmp_path / f"of-{folder.name}") for folder in folders]
    exports.append(hf.to_hf(workdir(tmp_path, exportable())[0], tmp_path / "exported"))
    for folder in exports:
        theirs = theirs_of(transformers, folder)
        loaded = llamax.load(folder)
        vocabulary = min(loaded.model.vocab_size, 96)  # no picture tokens among them
        tokens = hf_folders.tokens(vocabulary)
        with torch.no_grad():
            expected = theirs(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
        np.testing.assert_allclose(logits(loaded, tokens), expected, **GOLDEN, err_msg=str(folder))


def theirs_of(transformers, folder):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    name = {
        "llama": "LlamaForCausalLM",
        "llama4_text": "Llama4ForCausalLM",
        "llama4": "Llama4ForConditionalGeneration",
    }[kind]
    model, info = getattr(transformers, name).from_pretrained(
        folder, attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


# --------------------------------------------------------------------------------------------------- onto a mesh


@pytest.mark.parametrize("kind", ["hugging face", "converted", "run"])
def test_loading_onto_eight_devices_equals_one(tmp_path, kind):
    if kind == "run":
        folder, _ = workdir(tmp_path, exportable())
    else:
        folder = hf_folders.golden(tmp_path / "source", "vision", BF16)
    if kind == "converted":
        folder = hf.from_hf(folder, tmp_path / "ckpt")
    one, eight = llamax.load(folder), llamax.load(folder, mesh=make_mesh({"data": 2, "fsdp": 4}))
    jax.tree.map(np.testing.assert_array_equal, one.params, eight.params)
    embed = eight.params["embed"]
    assert len(embed.sharding.device_set) == 8 and "fsdp" in embed.sharding.spec[1]
    assert {shard.data.shape for shard in embed.addressable_shards} == {(embed.shape[0], embed.shape[1] // 4)}
    assert one.params["embed"].dtype == jnp.float32
    half = llamax.load(folder, dtype="bfloat16")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a).astype(BF16), b), one.params, half.params)
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {BF16}
    assert half.skeleton.bind(half.params, half.router_bias).dtype == jnp.bfloat16
