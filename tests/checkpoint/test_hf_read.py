"""Reading Hugging Face's folders: eight-bit tensors beside a slow twin, and every kind of bad input."""

from __future__ import annotations

import base64
import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llamax
from llamax.checkpoint import hf, hf_read, hf_tokenizer, hf_write, saved, stream
from llamax.checkpoint.hf_read import Source
from llamax.config import ConfigError
from tests import hf_folders
from tests.checkpoint.test_hf import exportable, workdir

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
LIKE = hf_folders.ODD


# ------------------------------------------------------------------------------------------------------- eight bits


def quantised(x, axis):
    """(eight bits, scale) of a tensor, one scale for each index of the dimensions that are not in `axis`."""
    scale = np.abs(x).max(axis=axis, keepdims=True) / 448
    return (x / scale).astype(FP8), scale.astype(np.float32)


def slow_product(x, scale_of):
    """Every element by itself: its value times its scale in float32, rounded once."""
    out = np.zeros(x.shape, BF16)
    for at in np.ndindex(x.shape):
        out[at] = BF16.type(np.float32(x[at]) * np.float32(scale_of(at)))
    return out


def converted(tmp_path, tensors):
    source = hf_folders.write(tmp_path / "source", {**LIKE, "quantization_config": {"x": 1}}, tensors)
    hf.from_hf(source, tmp_path / "ckpt")
    back = hf.to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    return hf_folders.tensors(back)


def test_fused_experts_in_eight_bits(monkeypatch, tmp_path):
    """Llama 4's own way: a scale for each output of each expert; that of down_proj is stored as [E, out, 1]."""
    monkeypatch.setattr(stream, "PIECE", 1024)
    tensors = {name: x.astype(BF16) for name, x in hf_folders.random(LIKE).items()}
    at = "model.layers.3.feed_forward.experts."
    up, up_scale = quantised(tensors[at + "gate_up_proj"].astype(np.float32), axis=1)
    down, down_scale = quantised(tensors[at + "down_proj"].astype(np.float32), axis=1)
    tensors |= {at + "gate_up_proj": up, at + "gate_up_proj_scale": up_scale}
    tensors |= {at + "down_proj": down, at + "down_proj_scale": down_scale.reshape(*down.shape[::2], 1)}
    found = converted(tmp_path, tensors)
    np.testing.assert_array_equal(found[at + "gate_up_proj"], slow_product(up, lambda i: up_scale[i[0], 0, i[2]]))
    np.testing.assert_array_equal(found[at + "down_proj"], slow_product(down, lambda i: down_scale[i[0], 0, i[2]]))
    rest = {name for name in tensors if "layers.3.feed_forward.experts" not in name}
    assert hf_folders.same({name: tensors[name] for name in rest}, {name: found[name] for name in rest})


def test_linears_of_each_expert_in_eight_bits(tmp_path):
    """compressed-tensors: a Linear for each expert, a scale for each of its outputs."""
    tensors = {name: x.astype(BF16) for name, x in hf_folders.random(LIKE).items()}
    at, expected = "model.layers.5.feed_forward.experts", {}
    fused = {part: tensors.pop(f"{at}.{part}") for part in ("gate_up_proj", "down_proj")}
    halves = np.split(fused["gate_up_proj"], 2, axis=-1)
    for expert in range(len(fused["down_proj"])):
        parts = {"gate": halves[0], "up": halves[1], "down": fused["down_proj"]}
        for part, x in parts.items():
            weight, scale = quantised(np.ascontiguousarray(x[expert].T).astype(np.float32), axis=1)
            tensors[f"{at}.{expert}.{part}_proj.weight"] = weight
            tensors[f"{at}.{expert}.{part}_proj.weight_scale"] = scale.astype(BF16)
            rounded = scale.astype(BF16)
            expected[part, expert] = slow_product(weight, lambda i, s=rounded: s[i[0], 0]).T
    found = converted(tmp_path, tensors)
    for expert in range(len(fused["down_proj"])):
        both = np.concatenate([expected["gate", expert], expected["up", expert]], axis=-1)
        np.testing.assert_array_equal(found[f"{at}.gate_up_proj"][expert], both)
        np.testing.assert_array_equal(found[f"{at}.down_proj"][expert], expected["down", expert])


@pytest.mark.parametrize("kind", ["channel", "tensor", "block"])
def test_linears_in_eight_bits(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(hf_read, "BLOCK", 16)  # 48 x 120: 3 blocks, and 7.5
    monkeypatch.setattr(stream, "PIECE", 6000)  # a chunk is half of the tensor: a block and a half
    tensors = {name: x.astype(BF16) for name, x in hf_folders.random(LIKE).items()}
    name = "model.layers.1.self_attn.o_proj.weight"
    weight, scale = quantised(tensors[name].astype(np.float32), axis=1)
    scale_of = {"channel": lambda i: scale[i[0], 0], "tensor": lambda i: 0.5}
    if kind == "block":
        blocks = np.random.default_rng(0).uniform(0.5, 2, (3, 8)).astype(np.float32)
        scale_of["block"] = lambda i: blocks[i[0] // 16, i[1] // 16]
    stored = {
        "channel": ("_scale", scale),
        "tensor": ("_scale", np.float32([0.5])),
        "block": ("_scale_inv", locals().get("blocks")),
    }
    end, values = stored[kind]
    tensors |= {name: weight, name + end: values, name.replace("weight", "input_scale"): np.float32([1.0])}
    np.testing.assert_array_equal(converted(tmp_path, tensors)[name], slow_product(weight, scale_of[kind]))


def test_an_eight_bit_folder_can_be_loaded_as_it_is(tmp_path):
    tensors = hf_folders.random(LIKE)
    name = "model.layers.1.feed_forward.up_proj.weight"
    weight, scale = quantised(tensors[name], axis=1)
    tensors |= {name: weight, name + "_scale": scale}
    loaded = llamax.load(hf_folders.write(tmp_path / "source", LIKE, tensors))
    assert [repeats for _, repeats in loaded.model.plan] == [3, 1]
    layers = loaded.params["stack"]["segment0"]["slot0"]["dense"]["up"]
    np.testing.assert_array_equal(layers[1], slow_product(weight, lambda i: scale[i[0], 0]).T.astype(np.float32))


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def source(tmp_path):
    return hf_folders.write(tmp_path / "source", LIKE, hf_folders.random(LIKE))


def refused(source, *says):
    """The error of converting, which leaves nothing behind, and of loading."""
    there = sorted(path.name for path in source.parent.iterdir())
    with pytest.raises(ConfigError) as error:
        hf.from_hf(source, source.parent / "out")
    assert sorted(path.name for path in source.parent.iterdir()) == there
    with pytest.raises(ConfigError) as other:
        llamax.load(source)
    assert str(other.value) == str(error.value) or not (source / "config.json").exists()
    for text in says:
        assert text in str(error.value)


def rewrite(source, change):
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def test_all_that_is_wrong_with_the_tensors_is_said_at_once(source):
    def spoil(tensors):
        for i in (0, 1, 2, 4):
            del tensors[f"model.layers.{i}.input_layernorm.weight"]
        del tensors["lm_head.weight"]
        tensors["model.norm.bias"] = np.zeros(48, np.float32)
        tensors["model.layers.6.input_layernorm.weight"] = np.zeros(48, np.float32)
        tensors["model.layers.3.self_attn.q_proj.weight"] = np.zeros((48, 120), np.float32)
        tensors["model.layers.2.self_attn.v_proj.weight"] = np.zeros((60, 48), np.int64)
        tensors["model.layers.1.self_attn.v_proj.weight"] = np.zeros((60, 48), FP8)

    rewrite(source, spoil)
    refused(
        source,
        "model.layers.{0-2,4}.input_layernorm.weight missing",
        "lm_head.weight missing",
        "model.norm.bias not of such a model",
        "model.layers.6.input_layernorm.weight not of such a model",
        "model.layers.3.self_attn.q_proj.weight has shape [48, 120] and not [120, 48]",
        "model.layers.2.self_attn.v_proj.weight is I64 and not one of F32",
        "model.layers.1.self_attn.v_proj.weight_scale missing, the scale",
    )


def test_a_long_list_is_logged_in_full(source, caplog):
    rewrite(source, lambda tensors: [tensors.pop(name) for name in list(tensors) if "embed" not in name])
    refused(source, " ... ")
    assert "model.layers.{0-5}.self_attn.q_proj.weight missing" in caplog.text
    assert "model.layers.{0-2,4}.feed_forward.up_proj.weight missing" in caplog.text


def test_one_expert_of_many_is_named(source):
    def split(tensors):
        for part in ("gate_up_proj", "down_proj"):
            tensors.pop(f"model.layers.5.feed_forward.experts.{part}")
        for expert in range(5):
            for part, shape in (("gate", (40, 48)), ("up", (40, 48)), ("down", (48, 40))):
                tensors[f"model.layers.5.feed_forward.experts.{expert}.{part}_proj.weight"] = np.zeros(shape, BF16)
        tensors.pop("model.layers.5.feed_forward.experts.3.up_proj.weight")

    rewrite(source, split)
    refused(source, "model.layers.5.feed_forward.experts.3.up_proj.weight missing")


def test_a_scale_that_fits_nothing_is_refused(source):
    def spoil(tensors):
        name = "model.layers.1.feed_forward.up_proj.weight"
        tensors |= {name: tensors[name].astype(FP8), name + "_scale": np.ones(7, np.float32)}

    rewrite(source, spoil)
    refused(source, "up_proj.weight_scale has shape [7], no scale of [56, 48]")


@pytest.mark.parametrize("cut", [0.5, 0.999, 0])
def test_a_truncated_file_is_refused(source, cut):
    path = source / "model.safetensors"
    os.truncate(path, int(cut * path.stat().st_size))
    refused(source, "model.safetensors", "cut short")


def test_an_index_that_names_a_missing_file_is_refused(tmp_path):
    source = hf_folders.write(tmp_path / "source", LIKE, hf_folders.random(LIKE), shards=4)
    (source / "model-1.safetensors").unlink()
    (source / "model-3.safetensors").unlink()
    refused(source, "model-1.safetensors, model-3.safetensors", "not there")


def test_an_index_that_names_a_missing_tensor_is_refused(tmp_path):
    source = hf_folders.write(tmp_path / "source", LIKE, hf_folders.random(LIKE), shards=2)
    tensors = load_file(source / "model-1.safetensors")
    name = tensors.popitem()[0]
    save_file(tensors, source / "model-1.safetensors")
    refused(source, f"{name} missing from its file")


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("config.json", None, "config.json"),
        ("config.json", "{", "cannot be read"),
        ("config.json", "[]", "a dict"),
        ("config.json", json.dumps(LIKE | {"model_type": "qwen3"}), "llama4_text"),
        ("config.json", json.dumps(LIKE | {"rope_parameters": {"rope_type": "yarn"}}), "yarn"),
        ("model.safetensors.index.json", '{"weight_map": {}}', "weight_map"),
        ("model.safetensors.index.json", "nothing", "cannot be read"),
        ("model.safetensors", None, "neither model.safetensors nor"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0, "b": 96}}}', "97 ids and the model's embedding 96"),
        ("tokenizer.json", '{"model": {"vocab": ["a", "b"]}}', "2 ids and the model's embedding 96"),
        ("tokenizer.json", '{"model": {}}', "no vocabulary"),
        ("tokenizer.model", "\n".join(f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)), "384 ids"),
        ("tokenizer.model", "YQ== 1", "tokenizer.model"),
    ],
)
def test_a_wrong_file_is_refused(source, file, text, says):
    (source / file).unlink(missing_ok=True)
    if text is not None:
        (source / file).write_text(text)
    refused(source, says)


def test_tiles_are_read_where_later_versions_write_them(tmp_path):
    source = hf_folders.golden(tmp_path / "source", "vision")
    assert Source(source).model.vision.max_tiles == 16
    (source / "processor_config.json").write_text(json.dumps({"image_processor": {"max_patches": 4}}))
    assert Source(source).model.vision.max_tiles == 4
    (source / "preprocessor_config.json").write_text(json.dumps({"max_patches": 9}))
    assert Source(source).model.vision.max_tiles == 9


def test_a_tokenizer_that_leaves_the_ids_unnamed_that_llama_4_does_is_taken(source, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_tokenizer, "LLAMA4_ROWS", 96)
    monkeypatch.setattr(hf_tokenizer, "LLAMA4_NAMED", (91,))
    named = {"model": {"vocab": {str(i): i for i in range(80)}}, "added_tokens": [{"id": 90}]}
    (source / "tokenizer.json").write_text(json.dumps(named))
    (source / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")  # SentencePiece's
    back = hf.to_hf(hf.from_hf(source, tmp_path / "ckpt"), tmp_path / "back")
    assert json.loads((back / "tokenizer.json").read_text()) == named
    assert (back / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert llamax.load(tmp_path / "ckpt").tokenizer is None


def test_a_head_that_repeats_the_tied_embedding_is_taken_and_another_is_not(tmp_path):
    like = hf_folders.ODD_DENSE | {"tie_word_embeddings": True}
    tensors = hf_folders.random(like)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(10, np.float32)
    source = hf_folders.write(tmp_path / "source", like, tensors)
    hf.from_hf(source, tmp_path / "ckpt")
    rewrite(source, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
    refused(source, "lm_head.weight not of such a model")


def test_a_folder_without_a_model_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="neither a run.json, nor a model.json, nor a config.json"):
            llamax.load(folder)
        with pytest.raises(ConfigError, match="neither a run.json nor a model.json"):
            hf.to_hf(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="no such folder"):
        hf.from_hf(tmp_path / "none", tmp_path / "out")
    (tmp_path / "model.json").write_text('{"model": 3}')
    with pytest.raises(ConfigError, match=r"model.json, but it cannot be read"):
        saved.find(tmp_path)
    with pytest.raises(ConfigError, match="float64"):
        llamax.load(tmp_path, dtype="float64")


# ------------------------------------------------------------------------------------------------------- the output


def test_a_folder_that_is_there_is_left_alone(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(ConfigError, match="it is there already"):
        hf.from_hf(source, out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    hf.from_hf(source, out)  # an empty one is taken
    with pytest.raises(ConfigError, match="it is there already"):
        hf.to_hf(out, source)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("way", ["from", "to"])
def test_an_interruption_leaves_nothing_behind(monkeypatch, source, tmp_path, way, error):
    if way == "to":
        source = hf.from_hf(source, tmp_path / "ckpt")
        monkeypatch.setattr(hf_write, "_write_shard", lambda *_, **__: (_ for _ in ()).throw(error))
    else:
        monkeypatch.setattr(hf.stream, "write", lambda *_, **__: (_ for _ in ()).throw(error))
    there = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error if error is KeyboardInterrupt else ConfigError):
        (hf.to_hf if way == "to" else hf.from_hf)(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_an_export_is_on_the_disk_when_it_is_done(monkeypatch, source, tmp_path):
    """In pieces: bytes that are synchronised last are the end of each file."""
    monkeypatch.setattr(hf_write, "PIECE", 1000)
    synced, fsync = {}, os.fsync

    def noted(number):
        synced[os.readlink(f"/proc/self/fd/{number}").rsplit("/")[-1]] = os.fstat(number).st_size
        fsync(number)

    ckpt = hf.from_hf(source, tmp_path / "ckpt")
    monkeypatch.setattr(os, "fsync", noted)
    back = hf.to_hf(ckpt, tmp_path / "back", max_shard_gb=1e-4)
    shards = {path.name: path.stat().st_size for path in back.glob("*.safetensors")}
    assert len(shards) > 1
    assert shards.items() <= synced.items()


def test_a_disk_that_fails_late_ends_the_export(monkeypatch, source, tmp_path):
    """When what was written goes to the disk, in the background."""
    ckpt = hf.from_hf(source, tmp_path / "ckpt")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="the disk was full before all was written"):
        hf.to_hf(ckpt, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert list(tmp_path.glob(".back*")) == []


def test_a_file_that_cannot_be_read_any_more_ends_the_conversion(monkeypatch, source, tmp_path):
    """In the background threads that make chunks."""

    def broken(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(hf_read.Stored, "get", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        hf.from_hf(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_known_beforehand(monkeypatch, source, tmp_path):
    ckpt = hf.from_hf(source, tmp_path / "ckpt")
    monkeypatch.setattr(hf.space, "free", lambda _: 100_000)
    for convert, folder in ((hf.from_hf, source), (hf.to_hf, ckpt)):
        with pytest.raises(ConfigError, match="100.0kB are free"):
            convert(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "source"]


def test_exports_that_cannot_be_are_refused(tmp_path):
    model = exportable()
    folder, _ = workdir(tmp_path, model, bias=0.5)
    with pytest.raises(ConfigError, match="router_bias is not zero"):
        hf.to_hf(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="holds 3"):
        hf.to_hf(folder, tmp_path / "out", step=4)
    with pytest.raises(ConfigError, match="more than 0"):
        hf.to_hf(folder, tmp_path / "out", max_shard_gb=0)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_values_beyond_half_precision_are_refused(tmp_path):
    tensors = hf_folders.random(LIKE)
    tensors["model.norm.weight"][3] = 1e5
    ckpt = hf.from_hf(hf_folders.write(tmp_path / "source", LIKE, tensors), tmp_path / "ckpt")
    with pytest.raises(ConfigError, match="model.norm.weight has values beyond"):
        hf.to_hf(ckpt, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(source, tmp_path):
    ckpt = hf.from_hf(source, tmp_path / "ckpt")
    largest = max((ckpt / "checkpoints" / "0" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    for read in (lambda: hf.to_hf(ckpt, tmp_path / "out"), lambda: llamax.load(ckpt)):
        with pytest.raises(ConfigError, match="damaged"):
            read()
