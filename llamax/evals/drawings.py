"""Does the model see? Accuracy of the colour and the shape that it names on held-out drawings of one object.

With the picture, the model says what it likes. With the picture blanked, where only chance is left, it has to choose:
the likeliest colour, and the likeliest shape after the true colour, so that it cannot dodge with another word. A
document's meta holds the `prompt` and the truth, `colour` and `shape`; the answer is "colour shape". Drawings that
cannot be read are left out of all figures, and their number is told.
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
from llamax.evals.report import Context, Report, left_out_of
from llamax.sample.engine import Prompt, generate

ASKED = ("colour", "shape")
ANSWER_TOKENS = 8
BATCH = 128  # prompts a program run
SHOWN = 8  # pictures in the report
BLANK = 255  # white paper


def scored_documents(cfg: config.Eval) -> list[Document]:
    """The documents that state a prompt and a truth, and damaged ones. ConfigError if none states them."""
    found = [d for d in documents(cfg.path, cfg.max_docs) if d.skip or {"prompt", *ASKED} <= d.meta.keys()]
    if all(document.skip for document in found):
        change = "Point the evaluation's path at drawings_heldout.toml, which `llamax data build` makes."
        raise ConfigError(
            f"drawings evaluation of {cfg.path}", "no document has a prompt, a colour and a shape", change
        )
    return found


def check(run: config.Run, cfg: config.Eval) -> None:
    del run
    scored_documents(cfg)


def run(ctx: Context, cfg: config.Eval) -> Report:
    looked_at = scored_documents(cfg)
    asked = [(document, prompt_of(ctx, document)) for document in looked_at]
    found = [document for document, prompt in asked if isinstance(prompt, Prompt)]
    prompts = [prompt for _, prompt in asked if isinstance(prompt, Prompt)]
    if not found:
        true = f"none of its {len(asked)} drawings can be used: {SKIP_REASONS[str(asked[0][1])]} ({asked[0][0].where})"
        raise ConfigError(f"drawings evaluation of {cfg.path}", true, "Build or copy the data again.")
    left_out = left_out_of(len(asked) - len(found), len(asked))
    blank = [p._replace(tiles=np.full_like(p.tiles, BLANK)) for p in prompts]
    seen = answers(ctx, prompts)
    report = Report({"left_out": len(asked) - len(found)})
    for what in ASKED:
        truth = [document.meta[what] for document in found]
        names = sorted(set(truth))
        chance = max(truth.count(name) for name in names) / len(truth)
        with_picture, without = accuracy(seen, truth, names), accuracy(choices(ctx, blank, names), truth, names)
        blank = [p._replace(tokens=p.tokens + ctx.tokenizer.encode(f" {t}")) for p, t in zip(blank, truth, strict=True)]
        noise = 3 * math.sqrt(chance * (1 - chance) / len(truth))
        report.scalars |= {f"{what}_accuracy": with_picture, f"{what}_accuracy_blank": without}
        compared = f"{without:.1%} with the picture blanked, chance {chance:.1%} ± {noise:.1%} (3σ)" + left_out
        report.rows.append((f"{what} of {len(found)}", f"{with_picture:.1%}", compared))
    for prompt, answer in list(zip(prompts, seen, strict=True))[:SHOWN]:
        report.pictures.append((prompt.tiles[0], answer.strip()))
    return report


def prompt_of(ctx: Context, document: Document) -> Prompt | str:
    """What the model is asked, or the reason, a key of SKIP_REASONS, for which it cannot be asked."""
    if document.skip:
        return document.skip
    if not all(isinstance(said := document.meta[key], str) and said.strip() for key in ("prompt", *ASKED)):
        return "malformed"
    if any("\ud800" <= char <= "\udfff" for key in ("prompt", *ASKED) for char in document.meta[key]):
        return "invalid_utf8"
    pictures = tuple(piece for piece in document.pieces if not isinstance(piece, str))
    if not pictures:
        return "malformed"
    encoder = Encoder(ctx.tokenizer.path, ctx.run.model.vision, video_frames=ctx.run.data.video_frames)
    encoded = encoder(document._replace(pieces=(*pictures, document.meta["prompt"])))
    # Without the end-of-text id.
    return encoded.skip or Prompt(encoded.tokens[:-1].tolist(), encoded.tiles)


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
        said = generate(ctx.sampler, ctx.params, ctx.router_bias, some, **how)
        new += [completion.text for (completion,) in said]
    return new


def accuracy(texts: Sequence[str], truth: Sequence[str], names: Sequence[str]) -> float:
    """The share of texts whose first word out of `names` is the true one."""
    right = 0
    for text, true in zip(texts, truth, strict=True):
        words = text.replace(".", " ").replace(",", " ").split()
        right += next((word for word in words if word in names), None) == true
    return right / len(truth)
