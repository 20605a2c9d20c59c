"""What tests of curation share: a small random model that sees pictures, standing where one is loaded; records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llamax import config
from llamax.checkpoint.saved import Saved
from llamax.data.tokenizer import Tokenizer
from llamax.loading import Found, Loaded
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from llamax.post.reader import Described, Reader
from tests.runs import FIXTURES, tiny_run

QUESTIONS = FIXTURES / "questions.jsonl"
RUN = tiny_run()
MODEL = dataclasses.replace(RUN.model, plan=((("rope_chunk+dense", "nope_full+moe"), 1),))
TOKENIZER = Tokenizer(RUN.data.tokenizer)


def make(seed: int = 0, model: config.Model = MODEL) -> Loaded:
    skel = skeleton(model, Seam(), patch_id=TOKENIZER.patch, train=config.Train(remat="none"))
    rng = np.random.default_rng(seed)
    params, bias = skel.shapes()
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), params)
    return Loaded(model, skel, params, jax.tree.map(lambda x: jnp.zeros(x.shape), bias), TOKENIZER)


def reader_of(model: Loaded) -> Reader:
    return Reader(model, TOKENIZER, Described("there", "there", "0" * 64, "float32", None, True))


class Models:
    """Folders that hold models; notes which are loaded."""

    def __init__(self, root: Path):
        self.root, self.loaded, self.made = root, [], {}

    def folder(self, name: str, seed: int = 0, model: config.Model = MODEL) -> str:
        """A folder whose weights, and their sums, are those of a seed."""
        folder = self.root / name
        (folder / "checkpoints" / "0").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / "0" / "checksums.json").write_text(str(seed))
        self.made[str(folder)] = (seed, model)
        return str(folder)

    def find(self, folder, step=None) -> Found:
        _, model = self.made[str(folder)]
        return Found(Saved(Path(folder), model, TOKENIZER.patch, Path(TOKENIZER.path), None, {}, None), step)

    def load(self, folder, dtype="float32", step=None) -> Loaded:
        self.loaded.append(str(folder))
        return make(*self.made[str(folder)])


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def asked(question: str, said: str | None = None, /, **meta) -> dict:
    """A record."""
    answers = [] if said is None else [{"role": "assistant", "content": said}]
    return {"messages": [{"role": "user", "content": question}, *answers], "meta": meta}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
