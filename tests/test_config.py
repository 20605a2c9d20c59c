"""The configuration: what a recipe becomes, what overrides may do, and that every wrong one is refused with advice."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from llamax import checks, config, variants
from llamax.checks import fields, preference
from llamax.config import ConfigError, Run

ROOT = Path(__file__).resolve().parents[1]
TINY = "recipes/scout_pretrain.py:tiny"


def frozen(*overrides: str) -> Run:
    return config.freeze(config.load(TINY, overrides))


def refusal(*overrides: str, spec: str = TINY) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.freeze(config.load(spec, overrides))
    error = caught.value
    for part in (error.asked, error.true, error.change):
        assert len(part) > 3
    assert str(error) == f"{error.asked}, but {error.true}. {error.change}"
    assert "\n" not in str(error)
    return error


# ------------------------------------------------------------------------------------------------ recipes and dicts


def test_a_recipe_holds_every_default_and_is_locked():
    cfg = config.recipe("mine", variants.scout(), seed=3)
    assert config.from_dict(Run, cfg) == Run(name="mine", seed=3, model=variants.scout())
    for section in (cfg, cfg.data, cfg.model.rope):
        assert section.is_locked
    with pytest.raises(AttributeError, match="seq_len"):
        cfg.data.seq_length = 5
    with pytest.raises(TypeError):
        cfg.data.seq_len = "long"
    cfg.data.sources.web = {"path": "web.toml"}  # sources and evals are open
    cfg.evals = {"web": {"path": "web.toml"}}
    run = config.from_dict(Run, cfg)
    assert run.data.sources == {"web": config.Source("web.toml", 1.0)}
    assert run.evals == {"web": config.Eval(path="web.toml")}


def test_a_dict_given_to_a_section_means_the_defaults_but_for_these():
    cfg = config.recipe("mine", variants.scout())
    cfg.mesh = {"fsdp": 4}
    assert config.from_dict(Run, cfg).mesh == config.Mesh(data=-1, fsdp=4)


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_run_survives_json(name):
    run = dataclasses.replace(frozen(), model=variants.VARIANTS[name]())
    assert config.from_dict(Run, json.loads(json.dumps(config.to_dict(run)))) == run
    assert config.from_dict(Run, config.to_config(run)) == run


def test_whole_numbers_become_floats_and_nothing_else_changes_type():
    assert type(config.from_dict(Run, {"optim": {"peak_lr": 1}}).optim.peak_lr) is float
    for wrong in ({"train": {"steps": True}}, {"train": {"steps": 5.0}}, {"name": 3}, {"mesh": 3}, {"evals": []}):
        with pytest.raises(ConfigError):
            config.from_dict(Run, wrong)


def test_resolve_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.resolve_path("/a/b") == Path("/a/b")
    assert config.resolve_path("recipes/scout_pretrain.py") == ROOT / "recipes/scout_pretrain.py"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/scout_pretrain.py").touch()
    assert config.resolve_path("recipes/scout_pretrain.py") == Path("recipes/scout_pretrain.py")
    assert config.resolve_path("nowhere/x.toml") == Path("nowhere/x.toml")


# --------------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_typed_as_ml_collections_does_it():
    run = frozen(
        "--config.train.steps=1_000",
        "--config.optim.peak_lr=1",
        "--noconfig.model.qk_norm",
        "--config.model.tied_embeddings",
        "--config.model.plan=((('rope_chunk+moe',), 2), (('nope_full+dense',), 1))",
        "--config.mesh={'fsdp': 2}",
        "--config.data.sources.python.weight=2",
        "--config.data.tokenizer=a=b.model",
        "--config.train.log_every_steps=5",
        "--config.train.log_every_steps=7",
    )
    assert run.train.steps == 1000 and run.train.log_every_steps == 7  # the last one wins
    assert run.optim.peak_lr == 1.0 and type(run.optim.peak_lr) is float
    assert run.model.qk_norm is False and run.model.tied_embeddings is True
    assert run.model.layers == ("rope_chunk+moe", "rope_chunk+moe", "nope_full+dense")
    assert run.mesh == config.Mesh(data=-1, fsdp=2)
    assert run.data.sources["python"].weight == 2.0
    assert run.data.tokenizer == "a=b.model"


def test_overrides_leave_absl_alone_and_the_rest_of_the_run_as_it_was():
    from absl import flags

    before = set(flags.FLAGS)
    run = frozen("--config.seed=5")
    assert set(flags.FLAGS) == before
    assert run == dataclasses.replace(frozen(), seed=5)


@pytest.mark.parametrize(
    ("override", "nearest"),
    {
        "--config.data.seq_length=512": "--config.data.seq_len",
        "--config.seq_len=512": "--config.data.seq_len",  # the right name in the wrong place
        "--config.optim.seq_len=512": "--config.data.seq_len",
        "--config.optim.lr=1": "--config.optim.peak_lr",
        "--config.dta.seq_len=512": "--config.data",
        "--config.data.sources.pyton.weight=1": "--config.data.sources.python",
        "--config.data.sources.python.wieght=1": "--config.data.sources.python.weight",
        "--noconfig.model.qknorm": "--config.model.qk_norm",
        "--config.mesh={'fdsp': 2}": "--config.mesh.fsdp",
        "--config.model.vision.tile=28": "--config.model.vision.tile_px",
    }.items(),
)
def test_a_misspelt_key_answers_with_the_nearest(override, nearest):
    assert refusal(override).change == f"Did you mean {nearest}?"


@pytest.mark.parametrize(
    ("override", "advice"),
    {
        "--config.train.steps=abc": "--config.train.steps=700.",
        "--config.train.steps=1e3": "--config.train.steps=1000.",
        "--config.train.steps": "--config.train.steps=700.",
        "--config.mesh={'data': 2.0}": "--config.mesh.data=2.",
        "--config.optim.peak_lr=fast": "--config.optim.peak_lr=0.002.",
        "--config.model.qk_norm=maybe": "--config.model.qk_norm=true.",
        "--config.data=3": "--config.data.align_tokens.",
        "--config.model.plan[0]=3": "--config.model.plan as a whole.",
        "--config.train.steps.x=3": "--config.train.steps itself.",
        "--config.qqqq=3": "Known here: checkpoint, data,",
        "steps=3": "--config.train.steps=200.",
        "--config.=3": "--config.train.steps=200.",
    }.items(),
)
def test_a_wrong_type_or_form_is_refused_with_an_example(override, advice):
    assert advice in refusal(override).change


def test_overrides_that_undo_each_other_are_refused():
    assert "--config.mesh" in refusal("--config.mesh.data=2", "--config.mesh={'data': 4}").asked


# ------------------------------------------------------------------------------------------------------ recipe files


def test_unknown_file_and_size_answer_with_the_nearest():
    assert refusal(spec="recipes/scout_pretran.py").change == "Did you mean recipes/scout_pretrain.py?"
    assert refusal(spec="behemoth:tiny").change == "Did you mean recipes/behemoth_pretrain.py?"
    assert "recipes/scout_pretrain.py" in refusal(spec="qqqq").change
    assert refusal(spec="recipes/scout_pretrain.py:tyni").change == "Use recipes/scout_pretrain.py:tiny."


def write(path: Path, body: str) -> str:
    head = "from llamax import config as lx, variants\n\ndef get_config(size):\n"
    path.write_text(head + "    run = lx.recipe('mine', variants.scout_tiny())\n" + body + "    return run\n")
    return str(path)


@pytest.mark.parametrize(
    ("line", "advice"),
    {
        "run.data.seq_length = 5": "Did you mean run.data.seq_len?",
        "run.optim.peak_lr = run.optim.lr": "Did you mean run.optim.peak_lr?",
        "run.data.seq_len = 'long'": "Give the type",
    }.items(),
)
def test_a_slip_inside_a_recipe_names_its_line(tmp_path, line, advice):
    error = refusal(spec=write(tmp_path / "mine.py", f"    {line}\n"))
    assert error.asked == f"mine.py:5: {line}"
    assert advice in error.change


def test_a_bug_in_a_recipe_keeps_its_traceback(tmp_path):
    with pytest.raises(AttributeError, match="nothing"):
        config.load(write(tmp_path / "mine.py", "    lx.nothing\n"))


def test_a_file_without_get_config_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\n")
    (tmp_path / "mine.txt").write_text("x = 1\n")
    assert "get_config" in refusal(spec=str(tmp_path / "mine.py")).true
    assert "Python" in refusal(spec=str(tmp_path / "mine.txt")).true


def test_a_misspelt_key_in_a_dict_of_a_recipe_is_refused(tmp_path):
    body = "    run.data.sources = dict(web=dict(path='web.toml', wieght=1.0))\n"
    assert refusal(spec=write(tmp_path / "mine.py", body)).change == "Did you mean --config.data.sources.web.weight?"


# ------------------------------------------------------------------------------------------------------------ checks

SOURCES = ("python", "docs", "drawings", "interleaved", "clips")
PIPELINE, TWO = "--config.mesh.pipeline=2", "--config.model.plan=((('rope_chunk+moe', 'nope_full+moe'), 2),)"
COMPARING = ("--config.data.comparisons_per_row=8", "--config.reference.source=live", "--config.init.path=runs/sft")
CACHED = (*COMPARING, "--config.reference.source=cache")
SIGMOID, JS = "--config.preference.losses.sigmoid=1", "--config.preference.f_divergence=js"
KTO = (*COMPARING, "--config.preference.losses.kto=1", "--config.data.mismatched=true")
OTHER, FROZEN = ("--config.reference.path=runs/other",), "--config.tune.freeze=('*/router',)"
REWARD, CAPACITY = ("--config.losses.reward=1", "--config.model.reward_head=true"), "--config.train.expert_capacity=1.5"
WRONG = [  # (overrides, what the error says is true)
    (["--config.tune.lora_alpha=16"], "there are no adapters"),
    (["--config.tune.lora_targets=('attention',)"], "there are no adapters"),
    (["--config.seed=-1"], "0 or more"),
    (["--config.seed=4294967296"], "at most 4294967295"),
    (["--config.optim.peak_lr=nan"], "finite"),
    (["--config.train.steps=" + "9" * 400], "at most 2147483647"),
    (["--config.mesh.fsdp=" + "9" * 30], "1 to 2147483647"),
    (["--config.model.vision.max_tiles=100000", "--config.data.multimodal_steps=0"], "at most 1024"),
    (["--config.model.plan=((('rope_chunk+moe',), 1000000000),)"], "at most 10000"),
    ([f"--config.data.sources.{name}.weight=0" for name in SOURCES], "no shares of tokens"),
    ([f"--config.data.sources.{name}.later=((1e9, 0),)" for name in SOURCES], "no shares of tokens"),
    (
        ["--config.data.sources.docs.later=((1e9, 0.5), (1e9, 0.1))"],
        "is more than 1e+09 tokens, where the point before",
    ),
    (["--config.data.sources.docs.later=((0, 0.5),)"], "is more than 0 tokens"),
    (["--config.data.sources.docs.later=((1e999, 0.5),)"], "at most 1e+15"),
    (["--config.data.sources.docs.later=((1e9, -0.1),)"], "a weight is 0 or more"),
    (["--config.data.sources.docs.later=((1e9, 1e999),)"], "a weight is 0 or more"),
    (["--config.data.sources.docs.later=((1e9,),)"], "a point of a schedule is (tokens, weight)"),
    (["--config.data.sources.docs.later=(1e9, 0.5)"], "a point of a schedule is (tokens, weight)"),
    (["--config.losses.router_z=inf"], "finite number"),
    (["--config.train.steps=0", "--config.optim.warmup_steps=0", "--config.optim.schedule=cosine"], "more than 0"),
    (["--config.optim.peak_lr=-1"], "it is more than 0"),
    (["--config.data.multimodal_steps=1.5"], "is at most 1"),
    (["--config.optim.b2=1.0"], "at most 0.9999"),
    (["--config.losses.router_balance=-1"], "it is 0 or more"),
    (["--config.name="], "a run has a name"),
    (["--config.name=a\x1b[31m"], "without control characters"),
    (["--config.data.tokenizer=\ud800"], "valid Unicode"),
    (["--config.model.rope.scaling=llama4"], "one of none, linear, ntk, yarn, llama3"),
    (["--config.optim.schedule=cosin"], "one of cosine, wsd"),
    (["--config.train.compute_dtype=bf16"], "one of float32, bfloat16"),
    (["--config.train.remat=full"], "one of none, block, period"),
    (["--config.evals.docs.kind=perplex"], "one of perplexity, drawings"),
    (["--config.evals.docs.lengths=(64,)"], "kind needle, ruler, position or answer alone read it, and this is a perp"),
    (["--config.model.plan=((('rope_chunk+meo',), 4),)"], "a layer is one of"),
    (["--config.model.plan=((('rope_chunk+moe',), 0),)"], "a segment is (layer kinds, repeats >= 1)"),
    (["--config.model.plan=('rope_chunk+moe', 4)"], "a segment is"),
    (["--config.model.plan=()"], "a model has a layer"),
    (["--config.model.n_kv_heads=3"], "every kv head serves as many"),
    (["--config.model.head_dim=31"], "it is even"),
    (["--config.model.top_k=5"], "there are n_experts=4"),
    (["--config.model.router_score=relu"], "one of sigmoid, softmax"),
    (["--config.model.gate_on=outputs"], "one of input, output"),
    (["--config.model.choose_by=score"], "one of logits, scores"),
    (["--config.model.router_renormalise"], "is always 1: nothing would teach the router"),
    (["--config.model.n_groups=3"], "n_experts=4 make no equal groups"),
    (["--config.model.top_groups=2"], "there are n_groups=1"),
    (["--config.model.n_groups=2", "--config.model.group_best=3"], "a group has 2 experts"),
    (["--config.model.n_groups=2", "--config.model.top_k=3"], "top_groups=1 groups of 2 have 2 experts"),
    (["--config.model.vision.encoder=vits"], "one of vit, linear"),
    (["--config.model.rope.low_freq_factor=2"], "it is at most high_freq_factor"),
    (["--config.model.vision.tile_px=57"], "patches have 14 px"),
    (["--config.model.vision.tile_px=42"], "a tile has 3 x 3 patches"),
    (["--config.model.vision.n_heads=5"], "head width that is a multiple of 4"),
    (["--config.model.vision.dim=90"], "2D RoPE"),
    (["--config.data.batch_tokens=5000"], "rows have seq_len=512"),
    (["--config.data.lanes=3"], "each gives an equal part of the 8 rows of a step"),
    (["--config.train.accumulate=3"], "do not split into as many micro-batches"),
    (["--config.data.tiles_per_row=4"], "one picture has up to 5 tiles"),
    (["--config.data.seq_len=16"], "one picture is up to 27 tokens"),
    (["--config.data.sources={}"], "at least one source"),
    (["--config.data.sources={'my-web': {'path': 'web.toml'}}"], "must be able to name it"),
    (["--config.data.sources={3: {'path': 'web.toml'}}"], "is named by a string"),
    (["--config.evals={'3d': {'path': 'web.toml'}}"], "name it: letters"),
    (["--config.data.sources.docs.path=docs.jsonl"], "it is a manifest"),
    (["--config.evals.docs.path="], "a .toml file"),
    (["--config.train.steps=640", "--config.optim.warmup_steps=640"], "the run has train.steps=640"),
    (["--config.train.steps=640", "--config.optim.decay_steps=0"], "wsd decays over 1 to 600 steps"),
    (["--config.train.steps=640", "--config.optim.decay_steps=601"], "1 to 600 steps, those after the warm-up"),
    (["--config.checkpoint.keep_every_steps=300"], "checkpoints are written every 200 steps"),
    (["--config.checkpoint.keep_every_steps=50"], "checkpoints are written every 200 steps"),
    (["--config.optim.moments_dtype=bfloat16", "--config.optim.b2=0.999"], "bfloat16 rounds what such a moment loses"),
    (["--config.optim.moments_dtype=float16"], "one of float32, bfloat16"),
    (["--config.mesh.rules=zero3"], "one of fsdp, zero"),
    (["--config.mesh.data=0"], "an axis is 1 to"),
    (["--config.mesh.fsdp=-2"], "or -1 for the devices"),
    (["--config.mesh.fsdp=-1"], "-1 is allowed once"),
    (["--config.mesh.slices=0"], "there are 1 to"),
    (["--config.mesh.data=4", "--config.mesh.slices=3"], "an equal part of mesh.data=4"),
    (["--config.mesh.fsdp=3"], "a micro-batch has 8 rows"),
    (["--config.mesh.fsdp=4", "--config.train.accumulate=4"], "a micro-batch has 2 rows"),
    (["--config.mesh.expert=8", "--config.model.n_experts=12"], "it splits --config.model.n_experts=12"),
    (["--config.mesh.tensor=3"], "it splits --config.model.n_heads"),
    (["--config.mesh.tensor=4", "--config.model.expert_ffn_dim=66"], "it splits --config.model.expert_ffn_dim=66"),
    ([PIPELINE, "--config.model.plan=((('rope_chunk+moe',), 3),)"], "the 3 repeats of the period"),
    ([PIPELINE, "--config.model.plan=((('rope_chunk+dense',), 2), (('nope_full+moe',), 2))"], "periods of one segment"),
    ([PIPELINE, TWO, "--config.train.pipeline_microbatches=3"], "through the mesh.pipeline=2 stages in groups"),
    ([PIPELINE, TWO, "--config.train.pipeline_microbatches=16"], "8 rows (batch_tokens / seq_len / accumulate) do not"),
    (["--config.mesh.tensor=4", "--config.model.n_heads=24", "--config.model.n_kv_heads=6"], "n_kv_heads=6 divide it"),
    (["--config.mesh.context=3"], "into whole chunks of 64"),
    (["--config.mesh.context=16"], "into whole chunks of 64"),
    (["--config.mesh.context=2", "--config.model.chunk_len=500"], "into whole chunks of 500"),
    (["--config.mesh.context=3", "--config.model.plan=((('rope_full+moe',),1),)"], "into whole tokens"),
    (["--config.mesh.context=4", "--config.data.tiles_per_row=26"], "mesh.context=4 splits them evenly"),
    (["--config.data.align_tokens=100"], "of whole chunks of 64"),
    (["--config.data.align_tokens=192"], "a row of seq_len=512 is a whole number of stripes"),
    (["--config.data.align_tokens=256", "--config.mesh.context=2"], "it divides the 128 tokens of a stripe"),
    (["--config.preference.losses.sigmoid=-1"], "it is 0 or more"),
    (["--config.preference.f_divergence=kl", SIGMOID], "one of reverse_kl, forward_kl, js, alpha"),
    (["--config.preference.label_smoothing=0.5", SIGMOID], "at most 0.499"),
    (["--config.preference.ld_alpha=1.5", SIGMOID], "at most 1"),
    (["--config.preference.beta=0.3"], "of the losses that compare answers none is on"),
    (["--config.preference.simpo_gamma=1", SIGMOID], "read by simpo, and of the losses that compare answers sigmoid"),
    (["--config.preference.label_smoothing=0.1", "--config.preference.losses.kto=1"], "aot_unpaired or simpo, and"),
    (["--config.preference.desirable_weight=2", SIGMOID], "read by kto or apo_zero_unpaired"),
    (["--config.preference.per_token=true", "--config.preference.losses.ipo=1"], "of the losses that compare answers"),
    (["--config.preference.f_alpha=0.2", SIGMOID], "f_divergence is reverse_kl, which has no alpha"),
    ([JS, SIGMOID, "--config.preference.reference=false"], "a divergence is from a reference"),
    ([JS, SIGMOID, "--config.preference.per_token=true"], "of which no other divergence than reverse_kl is known"),
    ([SIGMOID, "--config.preference.ld_alpha=0.5", "--config.preference.per_token=true"], "an answer's length already"),
    (["--config.preference.losses.exo_pair=1"], "exo_pair's loss is infinite without it"),
]


@pytest.mark.parametrize(("overrides", "true"), WRONG)
def test_what_cannot_work_is_refused_and_the_advice_works(overrides, true):
    beside = COMPARING if any(override.startswith("--config.preference.") for override in overrides) else ()
    error = refusal(*beside, *overrides)
    assert true in error.true
    advice = re.match(r"Set (--config\.[\w.]+=[^\s,]+)", error.change)
    if advice:
        frozen(*beside, *overrides, advice[1].rstrip("."))
    else:
        assert "--config." in str(error)


def test_knobs_of_preferences_are_fine_where_a_loss_reads_them():
    mixed = frozen(*COMPARING, SIGMOID, "--config.preference.losses.bco_pair=0.2", "--config.preference.bco_shift=true")
    assert mixed.preference.weights == {"sigmoid": 1.0, "bco_pair": 0.2} and mixed.preference.needs_reference
    simpo = frozen(*COMPARING[:1], "--config.preference.losses.simpo=1", "--config.preference.wpo=true")
    assert not simpo.preference.needs_reference
    assert not frozen(*COMPARING[:1], SIGMOID, "--config.preference.reference=false").preference.needs_reference
    assert set(preference.READ_BY) | {"losses", "reference", "f_alpha", "centring"} == {
        f.name for f in dataclasses.fields(config.Preference)
    }


@pytest.mark.parametrize(
    ("overrides", "true"),
    [
        ([SIGMOID], "rows of this run hold no comparisons"),
        ([SIGMOID, COMPARING[0]], "what a reference model gives them, and there is none"),
        ([SIGMOID, *COMPARING[:2]], "neither reference.path nor init.path names a model"),
        (["--config.reference.path=runs/sft"], "reference.source is none"),
        (["--config.data.ref_logp=runs/kept"], "keeps nothing on disk"),
        (
            [*KTO, "--config.reference.source=cache"],
            "mismatched ones are to another",
        ),
        ([*COMPARING, "--config.data.mismatched=true"], "kto alone reads such answers"),
        (["--config.data.compare_marks=false"], "hold no comparisons"),
        (["--config.preference.centring=0.1"], "reward models alone read it"),
        ([*COMPARING, SIGMOID, *OTHER, FROZEN], "what is frozen is held once, and is of init.path="),
        ([*CACHED, SIGMOID, CAPACITY], "what experts drop depends on the rows"),
        ([*CACHED, SIGMOID, "--config.model.attn_temperature_when=inference"], "compute two functions"),
        ([*COMPARING, *REWARD], "measured against none"),
        (["--config.losses.reward=1", COMPARING[0]], "the model has no head that scores"),
        (["--config.model.reward_head=true"], "nothing teaches it"),
        (["--config.losses.reward=1", "--config.model.reward_head=true"], "rows of this run hold no comparisons"),
    ],
)
def test_what_compares_answers_needs_rows_a_reference_and_a_head(overrides, true):
    assert true in refusal(*overrides).true


def test_a_live_reference_of_other_weights_is_fine_where_nothing_is_frozen():
    assert frozen(*COMPARING, SIGMOID, *OTHER).reference.path == "runs/other"
    assert frozen(*COMPARING, SIGMOID, FROZEN).reference.source == "live"


def test_vision_is_asked_for_only_where_there_are_pictures(tmp_path):
    no_vision = "    run.model.vision = None\n    run.data.sources = dict(web=dict(path='web.toml'))\n"
    small = "    run.data.update(seq_len=64, batch_tokens=64, multimodal_steps=0.0)\n"
    spec = write(tmp_path / "mine.py", no_vision + small)
    assert config.freeze(config.load(spec)).model.vision is None
    assert "no vision encoder" in refusal("--config.data.multimodal_steps=0.5", spec=spec).true
    asked = "--config.evals={'d': {'kind': 'drawings', 'path': 'd.toml'}}"
    assert "no vision encoder" in refusal(asked, spec=spec).true
    assert "has no fields" in refusal("--config.model.vision.dim=64", spec=spec).true
    assert frozen("--config.data.multimodal_steps=0", "--config.data.tiles_per_row=1").data.tiles_per_row == 1


def test_a_linear_encoder_has_no_heads_to_fit():
    frozen("--config.model.vision.n_heads=5", "--config.model.vision.encoder=linear")


def test_odd_heads_are_fine_without_rope():
    plan = "--config.model.plan=((('nope_full+moe',), 2),)"
    frozen("--config.model.head_dim=31", plan, "--config.model.rope.scaling=none")


def with_number(run: Run, path: str, value: float) -> Run:
    """`run` with the number at a dotted path replaced, in its own type."""
    settings = config.to_dict(run)
    *sections, key = path.split(".")
    inner = settings
    for section in sections:
        inner = inner[section]
    inner[key] = type(inner[key])(value)
    return config.from_dict(Run, settings)


def test_every_number_of_the_schema_is_bounded():
    """-1 in any numeric field is refused, and 0 but in those that MAY_BE_ZERO names; and each of these exists."""
    run, patterns = frozen(), set()
    for path, pattern, value in fields.walk(run):
        if type(value) in (int, float) and not path.startswith("mesh."):
            patterns.add(pattern)
            for wrong in (-1,) if pattern in fields.MAY_BE_ZERO else (-1, 0):
                with pytest.raises(ConfigError, match=re.escape(f"--config.{path}={type(value)(wrong)}")):
                    checks.check(with_number(run, path, wrong))
    assert set(fields.MAY_BE_ZERO) | set(fields.AT_MOST) <= patterns and len(patterns) > 50


# ----------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [((-1, 1), 1, (1, 1)), ((-1, 1), 8, (8, 1)), ((-1, 4), 8, (2, 4)), ((2, -1), 8, (2, 4)), ((2, 4), 8, (2, 4))],
)
def test_the_mesh_takes_the_devices(mesh, devices, sizes):
    run = frozen(f"--config.mesh.data={mesh[0]}", f"--config.mesh.fsdp={mesh[1]}")
    resolved = config.check_devices(run, devices)
    assert resolved == config.Mesh(data=sizes[0], fsdp=sizes[1])
    assert math.prod(resolved.axes.values()) == devices


@pytest.mark.parametrize(
    ("mesh", "devices", "text"),
    [
        (
            (8, 8),
            8,
            "mesh: data=8 * fsdp=8 = 64, but 8 devices are visible. Set --config.mesh.data=1, or -1 to take the rest.",
        ),
        (
            (8, 1),
            1,
            "mesh: data=8, but 1 device is visible. Set --config.mesh.data=1, or -1 to take the rest.",
        ),
        (
            (-1, 8),
            12,
            "mesh: data=-1 * fsdp=8 = 8 times data, but 12 devices are visible. Set --config.mesh.fsdp=6.",
        ),
        ((4, 4), 6, "mesh: data=4 * fsdp=4 = 16, but 6 devices are visible. Set one axis to -1 and every other to 1."),
        (
            (-1, 4),
            32,
            "rows split 32 ways by mesh: data=8 * fsdp=4 = 32, but a micro-batch has 16 rows (batch_tokens / seq_len /"
            " accumulate). Set --config.data.batch_tokens=65536, or a smaller mesh axis.",
        ),
    ],
)
def test_an_impossible_mesh_is_refused(mesh, devices, text):
    rows = 64 if max(mesh) == 8 else 16
    sizes = [f"--config.mesh.data={mesh[0]}", f"--config.mesh.fsdp={mesh[1]}"]
    run = frozen(*sizes, f"--config.data.batch_tokens={rows * 512 * 4}", "--config.train.accumulate=4")
    with pytest.raises(ConfigError) as caught:
        config.check_devices(run, devices)
    assert str(caught.value) == text


# ---------------------------------------------------------------------------------------------------- the whole house


def test_freeze_takes_no_jax_and_little_time():
    code = (
        "import sys; from llamax import config; config.freeze(config.load(sys.argv[1], ['--config.seed=1']));"
        "sys.exit(' '.join({'jax', 'flax', 'grain', 'orbax', 'PIL'} & set(sys.modules)) or 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, "recipes/scout_pretrain.py"], cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 2.0


def test_names_of_the_schema_are_what_the_code_has():
    from llamax.evals import EVALS
    from llamax.losses import TERMS
    from llamax.losses.paired import DIVERGENCES, PAIRED
    from llamax.losses.preference import ONE_SIDED, PREFERENCE
    from llamax.model import remat
    from llamax.parallel import rules
    from llamax.parallel.mesh import AXES

    assert set(config.EVAL_KINDS) == set(EVALS)
    assert {f.name for f in dataclasses.fields(config.Losses)} == set(TERMS)
    assert tuple(PREFERENCE) == preference.LOSSES and tuple(PAIRED) == preference.PAIRED
    assert {*preference.ONE_SIDED, "nll"} == set(ONE_SIDED) and tuple(DIVERGENCES) == config.F_DIVERGENCES
    assert {f.name for f in dataclasses.fields(config.Mesh)} == {*AXES, "slices", "rules"}
    assert set(config.RULES) == set(rules.RESTING) and tuple(remat.KEPT) == config.REMATS


def test_config_dict_is_only_between_a_recipe_and_freeze():
    for _, _, value in fields.walk(frozen()):
        assert not isinstance(value, ConfigDict)
