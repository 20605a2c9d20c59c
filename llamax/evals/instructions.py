"""Does the model do what it is told? Held-out conversations whose last answer can be checked by a rule.

The model is given all but the answer, if the record has one, and answers greedily, as in a chat. Figures, over all
and by domain:

    exact     what the record's rule gives the answer (llamax/rewards), 0 to 1
    form      share of the answers that have the form that is asked for (`options.form` of the record's meta)
    ended     share of the answers that the model ended itself, within `max_tokens`

Records that no rule can judge, and those that cannot be read, are left out and their number is told.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llamax import config, rewards
from llamax.config import ConfigError
from llamax.data import chat
from llamax.data.sources import Document
from llamax.evals.held_out import documents
from llamax.evals.report import Context, Report, left_out_of
from llamax.sample.engine import Prompt, generate

BATCH = 128  # prompts a program run
SHOWN = 8  # answers in the report


class Asked(NamedTuple):
    document: Document
    prompt: Prompt

    @property
    def pictures(self) -> int:
        """Their tiles."""
        return len(self.prompt.tiles)


def check(run: config.Run, cfg: config.Eval) -> None:
    del run
    if not any(map(is_asked, documents(cfg.path, cfg.max_docs))):
        true = "none of its records is a conversation whose answer a rule can judge"
        change = 'Add {"meta": {"verify": "exact", "answer": ...}} to them, or name another manifest.'
        raise ConfigError(f"instructions evaluation of {cfg.path}", true, change)


def run(ctx: Context, cfg: config.Eval) -> Report:
    looked_at = documents(cfg.path, cfg.max_docs)
    asked = [one for document in looked_at if (one := asked_of(ctx, document)) is not None]
    if not asked:
        true = f"none of its {len(looked_at)} records can be asked"
        raise ConfigError(f"instructions evaluation of {cfg.path}", true, "Look at it with `llamax data show`.")
    said = answers(ctx, [one.prompt for one in asked], cfg.max_tokens)
    figures: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for one, (text, ended) in zip(asked, said, strict=True):
        meta = one.document.meta
        form = rewards.REWARDS["format"](text, None, meta.get("options") or {})
        row = (rewards.verify(text, meta) or 0.0, form or 0.0, float(ended))
        figures["all"].append(row)
        figures[str(meta.get("domain", "none"))].append(row)
    report = Report({"left_out": len(looked_at) - len(asked)})
    for domain, rows in sorted(figures.items(), key=lambda item: item[0] != "all"):
        exact, formed, stopped = (float(x) for x in np.mean(rows, axis=0))
        within = "" if domain == "all" else f"{domain}/"
        report.scalars |= {f"{within}exact": exact, f"{within}form": formed, f"{within}ended": stopped}
        told = f"{formed:.1%} in the form asked for, {stopped:.1%} ended"
        left_out = left_out_of(len(looked_at) - len(asked), len(looked_at)) if domain == "all" else ""
        report.rows.append((f"right of {len(rows)}, {domain}", f"{exact:.1%}", told + left_out))
    shown = zip(asked[:SHOWN], said, strict=False)
    report.details["answers"] = [
        {"asked": one.document.id, "said": text, "truth": one.document.meta.get("answer")} for one, (text, _) in shown
    ]
    seeing = ((one.prompt.tiles[0], text.strip()) for one, (text, _) in zip(asked, said, strict=True) if one.pictures)
    report.pictures += itertools.islice(seeing, SHOWN)
    return report


def is_asked(document: Document) -> bool:
    """Whether it is a conversation the answer to which a rule can judge."""
    talk = document.talk
    return talk is not None and not talk.answers and not document.skip and rewards.verifiable(document.meta)


def asked_of(ctx: Context, document: Document) -> Asked | None:
    """None: it cannot be asked."""
    talk, vision = document.talk, ctx.run.model.vision
    if talk is None or not is_asked(document):
        return None
    try:
        answered = talk.messages[-1]["role"] == "assistant"
        spans = chat.render(talk.messages[:-1] if answered else talk.messages, tools=talk.tools or None, prompt=True)
        encoded = chat.encode(spans, ctx.tokenizer, vision, video_frames=ctx.run.data.video_frames)
    except ConfigError:  # a picture that cannot be read, or that the model cannot see
        return None
    return Asked(document, Prompt(encoded.tokens.tolist(), encoded.tiles))


def answers(ctx: Context, prompts: Sequence[Prompt], max_tokens: int) -> list[tuple[str, bool]]:
    """(what the model says, whether it ended it itself), greedily."""
    said: list[tuple[str, bool]] = []
    for start in range(0, len(prompts), BATCH):
        ctx.check_stop()
        how = dict(max_tokens=max_tokens, stop=ctx.tokenizer.stop, row_multiple=ctx.row_multiple)
        new = generate(ctx.sampler, ctx.params, ctx.router_bias, prompts[start : start + BATCH], **how)
        said += [(ctx.tokenizer.decode(completion.text), completion.stopped) for (completion,) in new]
    return said
