"""Damage of every kind is found by name, set aside, and never restored."""

from __future__ import annotations

import json
import logging
import random
import shutil
import threading
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llamax import config
from llamax.checkpoint import sums
from llamax.checkpoint.manager import Checkpoints
from llamax.config import ConfigError
from tests.checkpoint.test_manager import CFG, abstract, bits, data2, state, stream

ITEMS = ("params", "opt", "router_bias", "rng", "data", "extra")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the steps 1 and 2, every kind of item in them, and what went in."""
    folder = tmp_path_factory.mktemp("written")
    trees = state(data2()) | dict(router_bias={"layer": np.arange(4.0, dtype=np.float32)})
    with Checkpoints(folder, CFG) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, **trees, data_iterator=stream(), extra={"step": step})
    return folder, trees


@pytest.fixture
def copy(written, tmp_path):
    """A copy of it that may be spoilt, and the trees."""
    return Path(shutil.copytree(written[0], tmp_path / "checkpoints")), written[1]


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO, "llamax")
    return caplog


def one_file(step_folder: Path, item: str) -> Path:
    """The largest file of an item, which holds what matters."""
    return max((p for p in (step_folder / item).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def restore(folder: Path, trees, cfg=CFG, **how):
    with Checkpoints(folder, cfg) as checkpoints:
        return checkpoints.restore(**abstract(trees), data_iterator=stream(), **how)


def test_a_checkpoint_is_sound_and_its_sums_cover_all_of_it(written):
    folder, _ = written
    for step in ("1", "2"):
        written = json.loads((folder / step / "checksums.json").read_text())["files"]
        assert sums.check(folder / step) == []
        assert set(written) == set(sums.files(folder / step)) - {"checksums.json"}
        assert {"_CHECKPOINT_METADATA", "commit_success.txt"} < set(written)
        assert {path.split("/")[0] for path in written if "/" in path} == set(ITEMS)
        assert not list((folder / step).glob("*/checksums.json")), "items have none of their own"


@pytest.mark.parametrize("item", ITEMS)
def test_damage_to_any_item_is_found_and_named(item, copy):
    folder, _ = copy
    path = one_file(folder / "2", item)
    name, size, whole = path.relative_to(folder / "2").as_posix(), path.stat().st_size, path.read_bytes()
    flip(path, size // 2)
    assert sums.check(folder / "2") == [f"{name} changed"]
    path.write_bytes(whole[: size // 2])
    assert sums.check(folder / "2") == [f"{name} truncated {size} -> {size // 2} bytes"]
    path.write_bytes(whole + b"x")
    assert sums.check(folder / "2") == [f"{name} grown {size} -> {size + 1} bytes"]
    path.unlink()
    assert sums.check(folder / "2") == [f"{name} missing"]
    path.write_bytes(whole)
    assert sums.check(folder / "2") == []


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt", "params/_METADATA", "checksums.json"])
def test_damage_to_what_orbax_and_we_write_about_it_is_found(name, copy):
    folder, _ = copy
    flip(folder / "2" / name, 20)
    assert sums.check(folder / "2") == [f"{name} changed"]


@pytest.mark.parametrize("spoil", [lambda text: text.replace(" ", "\t", 1), lambda text: text[:-6] + "x" + text[-5:]])
def test_the_sums_have_a_sum_of_their_own(spoil, copy):
    """Even where what is left says the same of every file."""
    path = copy[0] / "2/checksums.json"
    spoilt = spoil(path.read_text())
    assert json.loads(spoilt)["files"] == json.loads(path.read_text())["files"]
    path.write_text(spoilt)
    assert sums.check(copy[0] / "2") == ["checksums.json changed"]


def test_unknown_and_lost_files_are_found(copy):
    folder, _ = copy
    (folder / "2/opt/d/extra").write_text("?")
    assert sums.check(folder / "2") == ["opt/d/extra unknown"]
    (folder / "1/checksums.json").unlink()
    assert sums.check(folder / "1") == [sums.NO_SUMS]
    shutil.rmtree(folder / "2/rng")
    assert any(line.startswith("rng/") and line.endswith("missing") for line in sums.check(folder / "2"))


def test_any_flipped_bit_of_any_file_is_found(copy):
    folder, _ = copy
    rng = random.Random(7)
    sizes = {path: n for path, n in sums.files(folder / "2").items() if n}
    for _ in range(100):
        name = rng.choice(list(sizes))
        at, bit = rng.randrange(sizes[name]), rng.randrange(8)
        flip(folder / "2" / name, at, bit)
        assert sums.check(folder / "2"), f"bit {bit} of byte {at} of {name}"
        flip(folder / "2" / name, at, bit)
    assert sums.check(folder / "2") == []


def test_damaged_is_set_aside_and_the_one_before_taken(copy, messages):
    folder, trees = copy
    flip(one_file(folder / "2", "opt"), 50)
    (folder / "2.damaged").mkdir()  # of an earlier time
    back = restore(folder, trees)
    assert back.pop("extra") == {"step": 1} and bits(back) == bits(trees)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2.damaged", "2.damaged-2"]
    assert "step 2 is damaged (opt/" in messages.text and "changed" in messages.text
    with Checkpoints(folder, CFG) as checkpoints:  # the step comes again
        assert checkpoints.steps() == [1]
        assert checkpoints.save(2, **trees, data_iterator=stream(), extra={})
    assert sums.steps(folder) == [1, 2] and sums.check(folder / "2") == []


def test_a_reader_takes_the_one_before_and_renames_nothing(copy, messages):
    folder, trees = copy
    flip(one_file(folder / "2", "params"), 50)
    asked = abstract({name: trees[name] for name in ("params", "router_bias")})
    with Checkpoints(folder) as checkpoints:
        params, _ = checkpoints.restore_weights(None, **asked)
        assert bits(params) == bits(trees["params"])
        with pytest.raises(ConfigError, match="step 2 in .* is damaged: params/.* changed. Name another: 1."):
            checkpoints.restore_weights(2, **asked)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    assert "step 2 is damaged" in messages.text


@pytest.mark.parametrize(("step", "spoil"), [("1", Path.unlink), ("2", lambda path: path.write_text("[]"))])
def test_spoilt_metadata_hinders_no_start(step, spoil, copy):
    """Orbax looks at the metadata of all steps when it opens a folder, so a killed deletion is met there too."""
    folder, trees = copy
    spoil(folder / step / "_CHECKPOINT_METADATA")
    asked = abstract({name: trees[name] for name in ("params", "router_bias")})
    with Checkpoints(folder) as checkpoints:
        assert bits(checkpoints.restore_weights(None, **asked)[0]) == bits(trees["params"])
    assert restore(folder, trees)["extra"] == {"step": 3 - int(step)}
    with Checkpoints(folder, CFG) as checkpoints:
        assert checkpoints.save(3, **trees, data_iterator=stream(), extra={})


def test_all_damaged_is_refused_now_and_later(copy):
    folder, trees = copy
    for step in ("1", "2"):
        (folder / step / "checksums.json").unlink()
    with pytest.raises(ConfigError, match=r"all that are there are damaged \(1.damaged, 2.damaged\). Bring one back"):
        restore(folder, trees)
    with pytest.raises(ConfigError, match="move these away to start afresh"):
        sums.newest_sound(folder, rename=True)
    for path in folder.iterdir():
        path.rename(folder.parent / path.name)
    assert sums.newest_sound(folder, rename=True) == 0


def test_set_aside_by_name(copy):
    folder, trees = copy
    with Checkpoints(folder, CFG) as checkpoints:
        assert checkpoints.set_aside(2, "rolled-back") == folder / "2.rolled-back"
        assert checkpoints.steps() == [1] and checkpoints.latest() == 1
        assert checkpoints.save(2, **trees, data_iterator=stream(), extra={})
        assert checkpoints.set_aside(2, "rolled-back") == folder / "2.rolled-back-2"
    assert sums.newest_sound(folder, rename=True) == 1, "what was rolled back is not damaged"
    assert sums.check(folder / "2.rolled-back") == []


def test_a_failure_that_is_no_damage_sets_nothing_aside(copy, monkeypatch):
    """Too little memory, another version of Orbax: the files are what was written, no other step would do better."""
    folder, trees = copy
    with Checkpoints(folder, CFG) as checkpoints:
        failing = lambda *_, **__: (_ for _ in ()).throw(MemoryError("too big"))  # noqa: E731
        monkeypatch.setattr(ocp.CheckpointManager, "restore", failing)
        with pytest.raises(ConfigError, match=r"step 2 .* files are sound, and reading them failed \(MemoryError: too"):
            checkpoints.restore(**abstract(trees), data_iterator=stream())
    assert sums.steps(folder) == [1, 2]


def test_the_sums_are_written_in_the_background(tmp_path, monkeypatch):
    """And before the step takes its name."""
    seen, write = {}, sums.write

    def note(folder, known):
        seen.update(thread=threading.current_thread(), name=folder.name, steps=sums.steps(folder.parent))
        write(folder, known)

    monkeypatch.setattr(sums, "write", note)
    with Checkpoints(tmp_path, CFG) as checkpoints:
        checkpoints.save(1, **state(data2()), data_iterator=stream(), extra={})
    assert seen["thread"] is not threading.main_thread()
    assert sums.UNFINISHED in seen["name"] and seen["steps"] == []


@pytest.mark.parametrize(("keep", "every", "left"), [(2, 0, [4, 5]), (1, 2, [2, 4, 5])])
def test_retention(keep, every, left, tmp_path):
    small = dict(params={"w": jax.numpy.ones(2)}, router_bias={}, opt={}, rng={})
    with Checkpoints(tmp_path, config.Checkpoint(keep=keep, keep_every_steps=every)) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, **small, data_iterator=stream(), extra={})
        assert checkpoints.steps() == left
    assert sums.steps(tmp_path) == left


def test_sums_taken_ahead_count_for_what_stayed_as_it_was(tmp_path, monkeypatch):
    """Two data files that rest, one of which then grows, and a file that is none: the step is sound in any case."""
    data = tmp_path / "params" / "d"
    data.mkdir(parents=True)
    (tmp_path / "manifest").write_bytes(b"m")
    for name in ("aa", "bb"):
        (data / name).write_bytes(name.encode() * 1000)
    monkeypatch.setattr(sums, "REST_S", 0.0)
    with sums.Ahead(tmp_path) as ahead:
        deadline = time.monotonic() + 30
        while len(ahead.known) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert ahead.known.keys() == {"aa", "bb"}
    with (data / "bb").open("ab") as file:
        file.write(b"more")
    read, digest = [], sums._digest
    monkeypatch.setattr(sums, "_digest", lambda path, *rest: read.append(path.name) or digest(path, *rest))
    sums.write(tmp_path, ahead.known)
    assert sorted(read) == ["bb", "manifest"]
    assert sums.check(tmp_path) == []
