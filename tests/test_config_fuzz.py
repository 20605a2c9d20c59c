"""Overrides at random, valid and not: each run freezes, or is refused in three parts, soon, without a traceback."""

from __future__ import annotations

import dataclasses
import math
import time
import types
import typing
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax import config
from llamax.checks import fields
from llamax.config import ConfigError, Run
from llamax.model import count
from tests.fuzz import quick, thorough

SPECS = ("recipes/scout_pretrain.py:tiny", "recipes/maverick_pretrain.py:tiny", "recipes/scout_context.py:tiny")
MOST_S = 2.0  # of processor time, for a case
CHOICES = {path: list(names) for path, names in fields.CHOICES.items()}
FROZEN = {spec: config.freeze(config.load(spec)) for spec in SPECS}


def paths(cls: type = Run, where: str = "") -> dict[str, typing.Any]:
    """Every dotted path of the schema and its type, sections included; named entries by a name that is there."""
    found: dict[str, typing.Any] = {}
    for key, kind in typing.get_type_hints(cls).items():
        here = f"{where}.{key}".lstrip(".")
        kind = typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind
        found[here] = kind
        if typing.get_origin(kind) is dict:
            name = "to_2048" if key == "stages" else "drawings"
            here, kind = f"{here}.{name}", typing.get_args(kind)[1]
        if dataclasses.is_dataclass(kind):
            found |= paths(kind, here)
    return found


PATHS = paths()
WEIRD = [
    *("", " ", "nan", "inf", "-inf", "-1", "0", "-0.0", "1", "2", "3", "1.5", "1e3", "1e308", "1e-308", "5e-324"),
    *("1e999", "9" * 25, "9" * 400, "9" * 5000, "-" + "9" * 30, "0x10", "1_000", "01", "True", "false", "None", "null"),
    *("'", '"', "''", "\\", "%s", "{}", "[]", "()", "(", "{", "(1,)", "[[]]", "{1: 2}", "{'a': {'b': 3}}", "{'': {}}"),
    *("語", "\u202e\u0301", "\x00", "\n", "\ud800", "a=b", "a.b=c", "--config.seed=3", "x" * 20_000, "lambda: 0"),
    *("__import__('os')", "@config.seed", "${seed}", "$HOME", "data.toml", "/", "..toml", "float32", "١٢"),
    *("{'path': 'x.toml'}", "{'x': {'path': 'x.toml'}}", "{'x': {'path': 3}}", "{'x': 3}", "{3: {'path': 'x.toml'}}"),
    *("{'x': {'path': 'x.toml', 'weight': 0}}", "{'x': {'path': 'x.toml', 'weight': True}}", "{'fsdp': 2, 'data': 1}"),
    *("{'x': {'path': 'x.toml', 'weight': 1e308}, 'y': {'path': 'y.toml', 'weight': 1e308}}", "{'mesh': {}}"),
]
NUMBERS = st.one_of(
    st.integers(-2, 70).map(str),
    st.sampled_from([2**n for n in range(20)]).map(str),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(repr),
    st.floats(0, 1).map(repr),
)
PLANS = st.one_of(
    st.lists(
        st.tuples(st.lists(st.sampled_from(config.LAYER_KINDS), min_size=1, max_size=3).map(tuple), st.integers(0, 4)),
        max_size=3,
    ).map(lambda plan: repr(tuple(plan))),
    st.sampled_from(
        [
            *("((('rope_full+moe',), 10**9),)", "((('rope_full+moe',), 1000000000),)", "((('rope_full+moe',), True),)"),
            *("((('rope_full+moe', 3), 1),)", "(((), 1),)", "((('rope_full+moe',), 1.0),)", "(((('a',),), 1),)"),
            *(
                "('rope_full+moe', 1)",
                "((None, 1),)",
                "(({},), 1)",
                "((['rope_full+moe'], 1),)",
                "[[['nope_full+moe'], 2]]",
            ),
            *("(" * 50 + ")" * 50, "(" * 300 + ")" * 300, "[" * 5000 + "]" * 5000, "(1," * 90 + ")" * 90, "(" * 90_000),
            *(
                "((('" + "x" * 5000 + "',), 1),)",
                "((('nope_full+moe',), " + "9" * 400 + "),)",
                "((('nope_full+moe',), 5000),)",
            ),
        ]
    ),
)


@st.composite
def an_override(draw) -> str:
    """`--config.path=value`: mostly of the field's own kind, sometimes anything."""
    path = draw(st.sampled_from(sorted(PATHS)))
    kind = PATHS[path]
    pattern = path.replace("sources.drawings", "sources.*").replace("evals.drawings", "evals.*")
    form = draw(st.integers(0, 9))
    if form == 0:
        return draw(st.sampled_from(["--config", "--noconfig.", "-config.", "--config.", "", "config."])) + draw(
            st.sampled_from(
                [path, f"{path}.x", f"{path}[0]", f"{path}[0][1]=3", f"{path}[", f"{path}=", "=", ".", "[0]=1"]
            )
        )
    if form == 1:
        value = draw(st.one_of(st.sampled_from(WEIRD), st.text(max_size=20)))
    elif path == "model.plan":
        value = draw(PLANS)
    elif pattern in CHOICES:
        value = draw(st.sampled_from(CHOICES[pattern]))
    elif kind in (int, float) and form > 4:  # near what works
        now = NUMBERS_NOW[path]
        value = draw(st.sampled_from([now, now * 2, now / 2, now * 4, now * 3, now + 1, 0, 1]).map(kind).map(str))
    elif kind in (int, float):
        value = draw(NUMBERS)
    elif kind is bool:
        value = draw(st.sampled_from(["true", "false", "1", "0", "yes"]))
    else:
        value = draw(st.sampled_from(WEIRD))
    return f"--config.{path}={value}"


NUMBERS_NOW = {path: v for spec in SPECS[::-2] for path, _, v in fields.walk(FROZEN[spec]) if type(v) in (int, float)}
OUTCOMES: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def tally():
    yield
    print("\noutcomes:", dict(OUTCOMES))


def three_parts(error: ConfigError) -> None:
    for part in (error.asked, error.true, error.change):
        assert part.strip()
    text = str(error)
    assert text == f"{error.asked}, but {error.true}. {error.change}"
    assert len(text) < 3000 and text.isprintable()  # a terminal can show it whole
    text.encode()


def finite(run: Run) -> bool:
    return all(math.isfinite(v) for _, _, v in fields.walk(run) if isinstance(v, int | float))


def freeze_or_refuse(spec: str, overrides: list[str]) -> None:
    started = time.process_time()
    try:
        run = config.freeze(config.load(spec, overrides))
    except ConfigError as error:
        three_parts(error)
        OUTCOMES["refused"] += 1
    else:
        OUTCOMES["frozen"] += 1
        assert isinstance(run, Run) and finite(run)
        assert config.from_dict(Run, config.to_dict(run)) == run
        assert hash((run.model, run.mesh, run.optim)) is not None
        for devices in (1, 8):
            try:
                sizes = config.check_devices(run, devices).axes
                assert math.prod(sizes.values()) == devices
            except ConfigError as error:
                three_parts(error)
                OUTCOMES["refused for its devices"] += 1
        parameters = count.parameters(run.model)
        assert 0 < parameters.text_active <= parameters.text <= parameters.total
        assert count.step_flops(run) > 0
        if run.model.vision:
            assert count.step_flops(run, tiles=3) > count.step_flops(run)
    assert time.process_time() - started < MOST_S


ONE = given(st.sampled_from(SPECS), an_override().map(lambda one: [one]))
FEW = given(st.sampled_from(SPECS), st.lists(an_override(), min_size=2, max_size=5))
test_one_override = quick(250)(ONE(freeze_or_refuse))
test_a_few_overrides = quick(100)(FEW(freeze_or_refuse))
test_many_overrides = pytest.mark.slow(thorough(1000)(ONE(freeze_or_refuse)))
test_many_few_overrides = pytest.mark.slow(thorough(500)(FEW(freeze_or_refuse)))


ODD = ("", "nan", "1e999", "9" * 400, "'", "(", "{}", "語", "\x00", "\ud800", "None", "-1", "{'a': {'b': 3}}")


@pytest.mark.parametrize("odd", range(len(ODD)))
def test_every_field_takes_nothing_odd(odd):
    """Each path of the schema with an odd value, another one for the next path."""
    for i, path in enumerate(sorted(PATHS)):
        if i % len(ODD) == odd:
            freeze_or_refuse(SPECS[0], [f"--config.{path}={ODD[odd]}"])
            freeze_or_refuse(SPECS[0], [f"--config.{path}={ODD[odd - 1]}"])


@pytest.mark.parametrize("path", [path for path, kind in PATHS.items() if kind not in (int, float, bool, str, tuple)])
def test_every_section_takes_no_odd_dict(path):
    for value in WEIRD:
        if value.startswith("{"):
            freeze_or_refuse(SPECS[0], [f"--config.{path}={value}"])


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(10))
def test_every_field_with_everything_odd(turn):
    for i, path in enumerate(sorted(PATHS)):
        for value in WEIRD[(i + turn) % 10 :: 10]:
            freeze_or_refuse(SPECS[1], [f"--config.{path}={value}"])
