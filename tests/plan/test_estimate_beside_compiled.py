"""The estimate beside what a compiler says, at true size: the table of docs/how-to/plan.md. Needs libtpu (extra `tpu`).

Each case compiles for minutes, so all of this is slow.
"""

from __future__ import annotations

import importlib.util

import pytest

from llamax import config
from llamax.plan import ahead, compiled, hlo, plan
from llamax.plan.topology import parse
from tests.tolerances import ESTIMATE

NEEDED = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: extra `tpu`")
CASES = [
    ("recipes/scout_pretrain.py:v5p_256", "v5p:8x8x4"),
    ("recipes/scout_pretrain.py:v5p_256_long", "v5p:8x8x4"),
    ("recipes/maverick_pretrain.py:v5p_512", "v5p:8x8x8"),
]


@NEEDED
@pytest.mark.slow
@pytest.mark.parametrize(("spec", "topology"), CASES, ids=[spec.split("/")[1] for spec, _ in CASES])
def test_peak_flops_and_bytes_sent_are_near(spec, topology):
    run = config.freeze(config.load(spec))
    guess, made = plan(run, topology, estimate=True), plan(run, topology)
    assert (guess.how, made.how) == ("estimated", "compiled")
    assert made.bytes.fits
    assert guess.bytes.peak == pytest.approx(made.bytes.peak, rel=ESTIMATE)
    assert guess.flops.total == pytest.approx(made.flops.total, rel=ESTIMATE)
    sent = [sum(t.sent_bytes for t in each.traffic) for each in (guess, made)]
    assert sent[0] == pytest.approx(sent[1], rel=ESTIMATE)
    assert made.flops.total - made.flops.recomputed == pytest.approx(made.flops.model, rel=0.05)


@NEEDED
@pytest.mark.slow
def test_a_program_is_that_of_a_compile_to_its_end():
    """Its FLOPs and collectives, and no less memory than is in use at the worst moment: tiny Scout on four chips."""
    where = parse("v5e:2x2")
    run = config.freeze(config.load("recipes/scout_pretrain.py:tiny", ["--config.mesh.fsdp=4", "--config.mesh.data=1"]))
    step = compiled.traced(run, where.devices())
    whole = compiled.lower(step, where).compile()
    part = ahead.program(run, where)
    most = compiled.peak_of(whole)
    assert most <= part.peak_bytes <= 1.5 * most  # gaps are many where all is small
    mine, theirs = (hlo.cost(text) for text in (part.text, whole.as_text()))
    assert mine.flops == theirs.flops and mine.recomputed == theirs.recomputed
    assert dict(mine.sent) == dict(theirs.sent)
