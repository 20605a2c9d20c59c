"""Conversations that share a row do not see each other: not the next one, not the other answer to the same prompt."""

from __future__ import annotations

import jax
import numpy as np

from llamax.data.encode import Encoder
from llamax.data.packing import pack_window
from llamax.data.sources import open_source, read_manifest
from llamax.model.score import score
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from tests.model import twins
from tests.runs import FIXTURES, tiny_run

RUN = tiny_run()


def test_what_one_segment_says_changes_no_bit_of_another():
    encoder, patch = Encoder(RUN.data.tokenizer, None), 3
    documents = [
        encoder(d) for name in ("pairs", "labelled") for d in open_source(read_manifest(FIXTURES / f"{name}.toml"))
    ]
    rows = pack_window(documents, 128, 0, np.random.default_rng(0), comparisons=9, lacking=("ref_logp",)).rows
    batch = rows._replace(**{name: x[:4] for name, x in rows.of_tokens().items()}, tiles=np.zeros((4, 0, 0, 0, 3)))
    bones = skeleton(RUN.model, Seam(), patch_id=patch, train=RUN.train)
    params, bias = jax.tree.map(
        lambda x: np.random.default_rng(0).normal(0, 0.2, x.shape).astype(np.float32), bones.shapes()
    )
    program = twins.quick_jit(lambda params, bias, batch: score(bones.bind(params, bias), batch).logp)
    before, two_sides = np.asarray(program(params, bias, batch)), 0
    for segment in (1, 2, 3):
        mine = batch.segment_ids == segment
        other = batch._replace(tokens=np.where(mine, batch.tokens % 4000 + 7, batch.tokens))
        after = np.asarray(program(params, bias, other))
        np.testing.assert_array_equal(after[~mine], before[~mine])
        assert (after[mine] != before[mine]).mean() > 0.9
        others = np.abs(batch.sides) * (~mine) == np.abs(batch.sides * mine).max(1, keepdims=True)
        two_sides += int((others & (batch.sides != 0)).any())
    assert two_sides, "the other answer to the same prompt is among those that do not change"
