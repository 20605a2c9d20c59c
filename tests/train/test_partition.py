"""What the compiler makes of a step on several devices: nothing is copied whole on the way from one place to another,
and no logits exist but a chunk's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import tiny_run

CHILD = Path(__file__).with_name("partition_child.py")
WARNING = "Involuntary full rematerialization"  # of XLA's partitioner: an array goes through every device whole
CASES = [
    dict(mesh=dict(data=1, fsdp=2, expert=2, tensor=2)),
    *(
        pytest.param(changes, marks=pytest.mark.slow)
        for changes in (
            dict(mesh=dict(data=2, fsdp=2, expert=2)),
            dict(mesh=dict(data=2, fsdp=2, expert=2, rules="zero")),
            dict(mesh=dict(data=2, fsdp=2, expert=2, rules="zero"), train=dict(accumulate=1, remat="attention")),
            dict(mesh=dict(data=2, fsdp=4)),
            dict(mesh=dict(data=1, expert=4, tensor=2)),
            dict(mesh=dict(data=2, fsdp=2, tensor=2, rules="zero"), train=dict(accumulate=2)),
            dict(mesh=dict(data=2, context=4)),
            dict(mesh=dict(data=1, fsdp=2, context=4)),
            dict(mesh=dict(data=1, expert=2, context=2, tensor=2)),
        )
    ),
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_nothing_is_copied_whole_and_no_logits_exist(changes):
    done = subprocess.run([sys.executable, CHILD, json.dumps([changes])], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    warnings = [line for line in done.stderr.splitlines() if WARNING in line]
    assert warnings == []
    told, run = json.loads(done.stdout), tiny_run(**changes)
    micro = run.data.batch_tokens // run.train.accumulate
    ways = run.mesh.data * run.mesh.fsdp * run.mesh.expert * run.mesh.context
    assert told["chunk"] >= micro // ways, "logits of a chunk are told apart"
    # Columns of the whole vocabulary have embedding and head only, [D, V / t] or its slice.
    assert told["rows"] <= run.model.dim < micro // ways
