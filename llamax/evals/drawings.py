"""Does the model see? Accuracy of the colour and the shape that it names on held-out drawings of one object.

With the picture, the model says what it likes. With the picture blanked, where only chance is left, it has to choose:
the likeliest colour, and the likeliest shape after the true colour, so that it cannot dodge with another word. A
document's meta holds the `prompt` and the truth, `colour` and `shape`; the answer is "colour shape".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llamax import config
from llamax.config import ConfigError
from llamax.data.encode import Encoder
from llamax.data.sources import SKIP_REASONS, Document
from llamax.evals.held_out import documents
from llamax.evals.report import Context, Report
from llamax.sample.engine import Prompt, generate

ASKED = ("colour", "shape")
ANSWER_TOKENS = 8
BATCH = 128  # prompts a program run
SHOWN = 8  # pictures in the report
BLANK = 255  # white paper


def scored_documents(cfg: config.Eval) -> list[Document]:
    """The documents that state a prompt and a truth. ConfigError if there is none."""
    found = [d for d in documents(cfg.path, cfg.max_docs) if {"prompt", *ASKED} <= d.meta.keys()]
    if not found:
        change = "Point the evaluation's path at drawings_heldout.toml, which `llamax data build` makes."
        raise ConfigError(
            f"drawings evaluation of {cfg.path}", "no document has a prompt, a colour and a shape", change
        )
    return found


def run(ctx: Context, cfg: config.Eval) -> Report:
    found = scored_documents(cfg)
    prompts = [prompt_of(ctx, document) for document in found]
    blank = [p._replace(tiles=np.full_like(p.tiles, BLANK)) for p in prompts]
    seen = answers(ctx, prompts)
    report = Report()
    for what in ASKED:
        truth = [document.meta[what] for document in found]
        names = sorted(set(truth))
        chance = max(truth.count(name) for name in names) / len(truth)
        with_picture, without = accuracy(seen, truth, names), accuracy(choices(ctx, blank, names), truth, names)
        blank = [p._replace(tokens=p.tokens + ctx.tokenizer.encode(f" {t}")) for p, t in zip(blank, truth, strict=True)]
        noise = 3 * math.sqrt(chance * (1 - chance) / len(truth))
        report.scalars |= {f"{what}_accuracy": with_picture, f"{what}_accuracy_blank": without}
        compared = f"{without:.1%} with the picture blanked, chance {chance:.1%} ± {noise:.1%} (3σ)"
        report.rows.append((f"{what} of {len(found)}", f"{with_picture:.1%}", compared))
    for prompt, answer in list(zip(prompts, seen, strict=True))[:SHOWN]:
        report.pictures.append((prompt.tiles[0], answer.strip()))
    return report


def prompt_of(ctx: Context, document: Document) -> Prompt:
    """ConfigError if the document's picture cannot be read: an evaluation with holes would look like a worse model."""
    encoder = Encoder(ctx.tokenizer.path, ctx.run.model.vision)
    pictures = tuple(piece for piece in document.pieces if not isinstance(piece, str))
    encoded = encoder(document._replace(pieces=(*pictures, document.meta["prompt"])))
    if encoded.skip:
        asked = f"drawings evaluation of document {document.id!r}"
        raise ConfigError(asked, SKIP_REASONS[encoded.skip], "Build or copy the data again.")
    return Prompt(encoded.tokens[:-1].tolist(), encoded.tiles)  # without the end-of-text id


def answers(ctx: Context, prompts: Sequence[Prompt]) -> list[str]:
    """What the model says, freely."""
    return [ctx.tokenizer.decode(ids) for ids in continued(ctx, prompts, max_tokens=ANSWER_TOKENS)]


def choices(ctx: Context, prompts: Sequence[Prompt], names: Sequence[str]) -> list[str]:
    """The likeliest of the names as the next word, told by its first token. ConfigError if two names share theirs."""
    name_of = {ctx.tokenizer.encode(f" {name}")[0]: name for name in names}
    if len(name_of) < len(names):
        asked, true = f"a choice between {', '.join(names)}", "two of them begin with the same token"
        raise ConfigError(asked, true, "Use a tokenizer that tells them apart, or other names.")
    return [name_of[ids[0]] for ids in continued(ctx, prompts, max_tokens=1, allowed=name_of.keys())]


def continued(ctx: Context, prompts: Sequence[Prompt], **how: Any) -> list[list[int]]:
    """New ids for every prompt."""
    new: list[list[int]] = []
    for start in range(0, len(prompts), BATCH):
        ctx.check_stop()
        some = prompts[start : start + BATCH]
        how |= dict(stop={ctx.tokenizer.eos}, row_multiple=ctx.row_multiple)
        new += generate(ctx.skeleton, ctx.params, ctx.router_bias, some, **how)
    return new


def accuracy(texts: Sequence[str], truth: Sequence[str], names: Sequence[str]) -> float:
    """The share of texts whose first word out of `names` is the true one."""
    right = 0
    for text, true in zip(texts, truth, strict=True):
        words = text.replace(".", " ").replace(",", " ").split()
        right += next((word for word in words if word in names), None) == true
    return right / len(truth)
