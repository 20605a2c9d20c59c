"""Comparisons on every mesh as on one device: the losses, every gradient, what is told of chosen and rejected answers,
and five steps of SGD; beside a reference that is held live, with adapters, for a reward model, and where unpaired
answers have their baseline."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from llamax import config
from llamax.batch import MISMATCHED, Batch
from tests.runs import FIXTURES
from tests.tolerances import MESH_LOSS, MESH_PARAMETER
from tests.train.matrix import Outcome, clear_rows, outcome, shaped

PAIRS = dict(pairs=0.3, pairs_pictures=0.7)
DPO = dict(
    preference=dict(losses=config.PreferenceLosses(sigmoid=1.0)),
    losses=dict(next_token=0.2),
    reference=dict(source="live"),
)
REWARD = dict(preference=dict(centring=0.01), losses=dict(next_token=0.0, preference=0.0, reward=1.0))
KTO = DPO | dict(preference=dict(losses=config.PreferenceLosses(kto=1.0)), losses=dict(next_token=0.0))
KINDS = {"dpo": DPO, "dpo beside adapters": DPO, "reward": REWARD, "kto": KTO}
MESHES = [
    dict(data=2, fsdp=2, expert=2, rules="zero"),
    dict(fsdp=2, context=2, tensor=2),
    dict(pipeline=2, fsdp=2, expert=2),
    dict(fsdp=2, expert=2, tensor=2),
]
QUICK = [("dpo", MESHES[1])]  # rows cut over devices: the two sides of a comparison lie on different ones
SLOW = [(kind, mesh) for kind in KINDS for mesh in MESHES if (kind, mesh) not in QUICK]
CASES = [pytest.param(*case, id=str(case)) for case in QUICK]
CASES += [pytest.param(*case, id=str(case), marks=pytest.mark.slow) for case in SLOW]


def compared(kind: str, **sections) -> config.Run:
    sources = {name: config.Source(str(FIXTURES / f"{name}.toml"), weight) for name, weight in PAIRS.items()}
    data = dict(sources=sources, multimodal_steps=1.0, comparisons_per_row=4, mismatched=kind == "kto")
    if kind == "kto":
        data |= dict(sources={"labelled": config.Source(str(FIXTURES / "labelled.toml"))}, multimodal_steps=0.0)
    run = shaped("maverick", data=data, **KINDS[kind], **sections)
    if kind == "reward":
        return dataclasses.replace(run, model=dataclasses.replace(run.model, reward_head=True))
    if kind == "dpo beside adapters":
        return dataclasses.replace(run, tune=config.Tune(lora_rank=2, lora_alpha=2.0))
    return run


@functools.cache
def batch_of(kind: str) -> Batch:
    batch = clear_rows(compared(kind))
    assert batch.sides is not None and batch.sides.max() > 1 and batch.sides.min() < 0, "some comparisons in a row"
    assert (abs(batch.sides) >= MISMATCHED).any() == (kind == "kto")
    return batch


@functools.cache
def on_one_device(kind: str) -> Outcome:
    return outcome(compared(kind), batch_of(kind), routed=False)


@pytest.mark.parametrize(("kind", "mesh"), CASES)
def test_numbers_are_those_of_one_device(kind, mesh):
    want = on_one_device(kind)
    got = outcome(compared(kind, mesh=dict(data=1) | mesh), batch_of(kind), routed=False)
    np.testing.assert_allclose(got.loss, want.loss, **MESH_LOSS)
    np.testing.assert_allclose(got.losses, want.losses, rtol=MESH_PARAMETER)
    assert want.told and got.told.keys() == want.told.keys()
    for name, value in want.told.items():
        np.testing.assert_allclose(got.told[name], value, **MESH_LOSS, err_msg=name)
    assert got.gradients.keys() == want.gradients.keys() and got.gradients
    size = max(np.linalg.norm(g) for g in want.gradients.values())
    for path, gradient in want.gradients.items():
        far, size_here = np.linalg.norm(got.gradients[path] - gradient), np.linalg.norm(gradient)
        assert far <= MESH_PARAMETER * max(size_here, 1e-3 * size), path
        moved = np.linalg.norm(got.params[path] - want.params[path])
        assert moved <= MESH_PARAMETER * np.linalg.norm(want.params[path]), path
