"""Every golden notices every feature that it has: with one changed, the logits move exactly as far as they did in the
implementation that made the goldens (`meta.json` of each case), which is 35 times the tolerance and more.

A feature that is an array (angles, chunks, temperature, the order of lanes) is changed from outside in one program of
the case; one that is code is changed in the configuration, or by other code in its place, and compiled again.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from llamax import config
from llamax.model import attention, llama, vision
from llamax.model.rope import Rotation
from tests import goldens
from tests.model.twins import quick_jit
from tests.tolerances import GOLDEN

# name of the case -> what was changed -> how far the largest of its logits moved
RECORDED = {
    name: json.loads((goldens.FOLDER / name / "meta.json").read_text())["sensitivity_max_abs_logit_change"]
    for name in ("scout_like", "maverick_like", "vision")
}


class Case:
    """A golden, its arrays that can be changed, and the program that takes them."""

    def __init__(self, name: str, **changes):
        self.golden = goldens.load(name)
        self.skel, self.params, self.bias = goldens.build(self.golden, **changes)
        self.model = replace(self.golden.model, **changes)
        self.program = quick_jit(self.logits)

    def logits(self, params, at, turn):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llama, "places", lambda *_: at)
            patch.setattr(vision, "grid_rotation", lambda *_: turn)
            model = self.skel.bind(params, self.bias)
            return model.logits(model(self.golden.batch)[0])

    def places(self, **changes):
        batch = self.golden.batch
        return attention.places(batch.positions, batch.segment_ids, replace(self.model, **changes))

    def moved(self, *, params=None, at=None, turn=None) -> float:
        """How far the largest logit is from the golden's."""
        turn = grid_turn(self.model.vision) if turn is None and self.model.vision else turn
        logits = self.program(params or self.params, at or self.places(), turn)
        return np.abs(logits - self.golden.outputs["logits"]).max()


@functools.cache
def case(name: str) -> Case:
    return Case(name)


def in_every_layer(params: dict, change) -> dict:
    """The parameters with change(layer) in place of each of the text model's layers."""
    segment = {slot: change(layer) for slot, layer in params["stack"]["segment0"].items()}
    return params | {"stack": {"segment0": segment}}


def half_rotated(layer: dict) -> dict:
    """Lanes (j, j + Dh/2) where the model pairs (2j, 2j+1)."""
    lanes = np.arange(16).reshape(2, 8).T.ravel()
    turned = {name: layer["attention"][name][..., lanes] for name in ("query", "key")}
    return layer | {"attention": layer["attention"] | turned}


def up_for_gate(layer: dict) -> dict:
    if "moe" not in layer:
        return layer
    return layer | {"moe": layer["moe"] | dict(gate=layer["moe"]["up"], up=layer["moe"]["gate"])}


def other_scaling(rope: config.Rope) -> config.Rope:
    factor, high = (8.0, 4.0) if rope.factor == 16 else (16.0, 1.0)
    return replace(rope, factor=factor, high_freq_factor=high)


def grid_turn(cfg: config.Vision, *, first: int = 1, swapped: bool = False) -> Rotation:
    """The encoder's 2D angles from the formula: half of the pairs by column, half by row."""
    pairs = cfg.dim // cfg.n_heads // 4
    freq = cfg.rope_theta ** (-np.arange(pairs) / pairs)
    row, column = np.divmod(np.arange(cfg.grid**2), cfg.grid) + np.array(first)
    angle = np.concatenate([np.outer(side, freq) for side in ((row, column) if swapped else (column, row))], axis=1)
    angle = np.pad(angle, ((0, 1), (0, 0)))[:, None].astype(np.float32)
    return Rotation(np.cos(angle), np.sin(angle))


def columns_first(encoder: dict) -> dict:
    """The adapter's input with the four patches of a token in the order (0, 0), (1, 0), (0, 1), (1, 1)."""
    weight = encoder["adapter_in"]["weight"]
    order = np.arange(len(weight)).reshape(2, 2, -1).transpose(1, 0, 2).ravel()
    return encoder | {"adapter_in": {"weight": weight[order]}}


def class_first(encoder: dict) -> dict:
    """Positions in another order: the class token's before the patches', not after."""
    return encoder | {"position_embedding": np.roll(encoder["position_embedding"], 1, axis=0)}


# By their names in meta.json; a case has those that it records.
ARRAYS = {
    "temperature_tuning_off": lambda c: dict(at=c.places(attn_temperature=0.0)),
    "no_chunking(chunk=10000)": lambda c: dict(at=c.places(chunk_len=10_000)),
    "chunk_size+1": lambda c: dict(at=c.places(chunk_len=c.model.chunk_len + 1)),
    "nope_layers_chunked_too": lambda c: dict(at=c.places()._replace(segments=c.places().chunks)),
    "rope_scaling_off": lambda c: dict(at=c.places(rope=replace(c.model.rope, scaling="none"))),
    "rope_scaling_16/1/1<->8/1/4": lambda c: dict(at=c.places(rope=other_scaling(c.model.rope))),
    "half_rotated_rope": lambda c: dict(params=in_every_layer(c.params, half_rotated)),
    "gate_up_order_swapped": lambda c: dict(params=in_every_layer(c.params, up_for_gate)),
    "vision_rope_swap_xy": lambda c: dict(turn=grid_turn(c.model.vision, swapped=True)),
    "vision_rope_no_plus_one": lambda c: dict(turn=grid_turn(c.model.vision, first=0)),
    "pixel_shuffle_col_row_c": lambda c: dict(params=c.params | {"vision": columns_first(c.params["vision"])}),
    "pos_embed_cls_row_first": lambda c: dict(params=c.params | {"vision": class_first(c.params["vision"])}),
}


def full_rope_for_nope(model: config.Model) -> dict:
    ((period, repeats),) = model.plan
    return dict(plan=((tuple(kind.replace("nope_full", "rope_full") for kind in period), repeats),))


CODE = {
    "rope_on_nope_layers_mask_unchanged": full_rope_for_nope,
    "qk_norm_toggled": lambda model: dict(qk_norm=not model.qk_norm),
    "score_on_expert_output": lambda model: dict(gate_on="output"),
    "softmax_router": lambda model: dict(router_score="softmax"),
}


def assert_as_recorded(moved: float, recorded: float) -> None:
    assert moved == pytest.approx(recorded, rel=0, abs=GOLDEN["atol"])
    assert moved > 35 * GOLDEN["atol"]


@pytest.mark.parametrize("name", RECORDED)
def test_with_nothing_changed_the_program_gives_the_golden(name):
    """What is passed in is what the model computes for itself."""
    assert case(name).moved() <= GOLDEN["atol"]


@pytest.mark.parametrize(
    ("name", "feature"), [(name, feature) for name in RECORDED for feature in ARRAYS if feature in RECORDED[name]]
)
def test_a_changed_array_moves_the_logits_as_recorded(name, feature):
    assert_as_recorded(case(name).moved(**ARRAYS[feature](case(name))), RECORDED[name][feature])


@pytest.mark.parametrize(("name", "feature"), [(name, feature) for name in RECORDED for feature in CODE])
def test_changed_code_moves_the_logits_as_recorded(name, feature):
    changed = Case(name, **CODE[feature](goldens.load(name).model))
    assert_as_recorded(changed.moved(), RECORDED[name][feature])


def test_the_gelu_of_tanh_moves_the_logits_as_recorded(monkeypatch):
    monkeypatch.setattr(jax.nn, "gelu", functools.partial(by_tanh, jax.nn.gelu))
    assert_as_recorded(Case("vision").moved(), RECORDED["vision"]["vision_gelu_tanh"])


def by_tanh(gelu, x, approximate):
    assert approximate is False
    return gelu(x, approximate=True)


def test_nothing_that_is_recorded_is_left_out():
    """But for two other plans of layers, which every hidden state of test_golden.py would notice."""
    covered = {*ARRAYS, *CODE, "vision_gelu_tanh"}
    assert set().union(*RECORDED.values()) - covered == {"all_layers_rope+chunked", "nope_at_i%interval==0"}
