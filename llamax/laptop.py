"""The laptop sizes of the recipes: what each changes for a model of millions of parameters, the data that
`llamax data build` makes, and two cores. A recipe's `:tiny` begins with one of these, and takes the code paths of its
full size in minutes."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from llamax import config

BUILT = "data/built/{}.toml".format


def pretrain(run: ConfigDict, model: config.Model) -> ConfigDict:
    """The laptop size of a pretraining recipe: `model`, the data that `llamax data build` makes, minutes on 2 cores."""
    run.model = config.to_dict(model)
    run.data.update(seq_len=512, batch_tokens=8 * 512, multimodal_steps=0.68, tiles_per_row=24, window_docs=64)
    run.data.sources = {
        "python": {"path": BUILT("python"), "weight": 0.28},
        "docs": {"path": BUILT("docs"), "weight": 0.14},
        "drawings": {"path": BUILT("drawings"), "weight": 0.48},
        "interleaved": {"path": BUILT("interleaved"), "weight": 0.06},
        "clips": {"path": BUILT("clips"), "weight": 0.04},
    }
    run.mesh = {"data": -1}
    run.optim.update(peak_lr=2e-3, schedule="wsd", warmup_steps=40, decay_steps=250, end_lr_ratio=0.05)
    run.optim.vision_lr_ratio = 0.25  # at the full rate the decoder never comes to look at the pictures
    run.train.update(steps=700, accumulate=1, compute_dtype="float32", remat="none")
    run.evals = {
        "text": {"path": BUILT("text_heldout"), "every_steps": 0, "max_docs": 64},
        "python": {"path": BUILT("python_heldout"), "every_steps": 0, "max_docs": 64},
        "docs": {"path": BUILT("docs_heldout"), "every_steps": 0, "max_docs": 64},
        "drawings": {"kind": "drawings", "path": BUILT("drawings_heldout"), "every_steps": 0, "max_docs": 720},
    }
    run.checkpoint.update(every_steps=200, keep=2)
    return run


def context(run: ConfigDict, model: config.Model) -> ConfigDict:
    """A context extended: from the 512 tokens a row of `pretrain` to 1,024 and to 2,048."""
    run = pretrain(run, model)
    run.train.steps = 0
    run.data.multimodal_steps = 0.5
    for name, weight in dict(python=0.13, docs=0.07, drawings=0.22, interleaved=0.05, clips=0.03).items():
        run.data.sources[name].weight = weight
    run.optim.update(peak_lr=5e-4, schedule="cosine", warmup_steps=10, end_lr_ratio=0.1)
    longer = {
        n: dict(seq_len=n, tiles_per_row=tiles, sources=_beside(n, packages))
        for n, tiles, packages in ((1024, 48, 0.2), (2048, 96, 0.4))
    }
    last = dict(optim=dict(peak_lr=2.5e-4), train=dict(remat="block"))
    run.stages = dict(
        to_1024=dict(tokens=100 * 4096, data=longer[1024]),
        to_2048=dict(tokens=100 * 4096, data=longer[2048], **last),
    )
    plain = dict(key_kind="pairs", value_kind="pairs", wording="plain", n_words=64)
    asked = dict(kind="needle", lengths=(512, 2048), depths=3, samples=4, options=dict(needle=plain))
    run.evals.far = dict(path="data/built/docs_heldout.toml", every_steps=0, **asked)
    read = dict(kind="position", lengths=(2048,), max_docs=16)
    run.evals.position = dict(path="data/built/long_heldout.toml", every_steps=0, **read)
    return run


def sft(run: ConfigDict, model: config.Model) -> ConfigDict:
    """Fine-tuning on conversations with checkable answers: from the quickstart's model, which is of Scout's shape."""
    _post(run, model)
    run.init.path = "runs/quickstart"
    run.data.sources = {"instructions": {"path": BUILT("instructions"), "weight": 1.0}}
    run.optim.update(peak_lr=1e-3, warmup_steps=20)
    run.train.steps = 350
    run.evals = {"answers": dict(kind="instructions", path=BUILT("instructions_heldout"), every_steps=0, max_docs=600)}
    return run


def align(run: ConfigDict, model: config.Model) -> ConfigDict:
    """Captions for the vision side: from the quickstart's model."""
    _post(run, model)
    run.init.path = "runs/quickstart"
    run.data.update(multimodal_steps=1.0, tiles_per_row=40)
    run.data.sources = {"captions": {"path": BUILT("captions"), "weight": 1.0}}
    run.optim.update(peak_lr=1e-3, warmup_steps=10, vision_lr_ratio=1.0)
    run.train.steps = 100
    run.evals = {
        "captions": dict(path=BUILT("captions_heldout"), every_steps=50, max_docs=256),
        "text": dict(path=BUILT("text_heldout"), every_steps=0, max_docs=64),
    }
    return run


def dpo(run: ConfigDict, model: config.Model) -> ConfigDict:
    """Preferences between two answers: from a fine-tuned model."""
    _post(run, model)
    run.data.comparisons_per_row = 8
    run.data.sources = {"preferences": {"path": BUILT("preferences"), "weight": 1.0}}
    run.optim.update(peak_lr=3e-5, warmup_steps=5)
    run.train.steps = 60
    run.evals = {
        "answers": dict(kind="instructions", path=BUILT("instructions_heldout"), every_steps=0, max_docs=600),
        "preferences": dict(kind="preference", path=BUILT("preferences_heldout"), every_steps=20, max_docs=480),
    }
    return run


def _post(run: ConfigDict, model: config.Model) -> None:
    """What post-training's small runs share: short rows with pictures, of which 512 tokens of talk have some 10."""
    run.model = config.to_dict(model)
    run.data.update(seq_len=512, batch_tokens=8 * 512, multimodal_steps=0.7, tiles_per_row=16, window_docs=256)
    run.mesh = {"data": -1}
    run.optim.update(schedule="cosine", end_lr_ratio=0.1, vision_lr_ratio=0.25, weight_decay=0.01)
    run.train.update(accumulate=1, compute_dtype="float32", remat="none")
    run.checkpoint.update(every_steps=100, keep=2)


def _beside(length: int, packages: float) -> dict[str, Any]:
    """What stands beside the pretraining's data: tasks of that length, and the files of a folder joined."""
    tasks = dict(lookups=0.2, needles=0.1, pictures=0.05)
    made = {name: dict(path=f"data/tasks/{name}_{length}.toml", weight=weight) for name, weight in tasks.items()}
    return made | dict(packages=dict(path="data/built/packages.toml", weight=packages))
