"""Loss by position: mean nats a token in equal parts of documents that are at least so long, and the curve of them.

    nats of part k = mean over documents of -ln p(token) over the tokens of part k, given all before

A document is cut to its first T tokens (its begin-of-text id included, which is not predicted). A model that uses its
context predicts later parts better, and one that breaks beyond the length that it was trained at shows where. The first
part is what the others are compared with; the uncertainty is that of the mean over documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from llamax import config
from llamax.config import ConfigError
from llamax.data.sources import open_source, read_manifest
from llamax.data.tasks import Tokens
from llamax.evals import samples
from llamax.evals.report import Context, Report
from llamax.observe import plots
from llamax.sample.reading import Prompt, score_tokens


def check(run: config.Run, cfg: config.Eval) -> None:
    """ConfigError if no document is long enough, or the cache's budget too small."""
    samples.check_cache(run, cfg, cfg.lengths[0])
    if next(long_documents(run, cfg), None) is None:
        longest = max((len(ids) for ids in documents(run, cfg)), default=0)
        asked = f"position evaluation of {cfg.path} at {cfg.lengths[0]} tokens"
        true = f"its longest document has {longest} (of {cfg.max_docs} looked at, max_docs)"
        raise ConfigError(asked, true, f"Set lengths to {longest - longest % cfg.buckets}, or name longer documents.")


def documents(run: config.Run, cfg: config.Eval) -> Iterator[list[int]]:
    """Tokens of the documents that are nothing but text, behind the begin-of-text id."""
    tokens = Tokens(str(config.resolve_path(run.data.tokenizer)), run.model.vision)
    tokenizer, reader = tokens.tokenizer, open_source(read_manifest(config.resolve_path(cfg.path)), tokens)
    n = min(cfg.max_docs, len(reader))
    for i in range(n):
        document = reader[i * len(reader) // n]
        if not document.skip and all(isinstance(piece, str) for piece in document.pieces):
            yield [tokenizer.bos, *tokenizer.encode("".join(document.pieces))]


def long_documents(run: config.Run, cfg: config.Eval) -> Iterator[list[int]]:
    """Their first T tokens, of those that have as many."""
    T = cfg.lengths[0]
    return (ids[:T] for ids in documents(run, cfg) if len(ids) >= T)


def run(ctx: Context, cfg: config.Eval) -> Report:
    T, n = cfg.lengths[0], cfg.buckets
    texts = list(long_documents(ctx.run, cfg))
    nothing = np.zeros((0, 1, 1, 3), np.uint8)
    rows = samples.rows_at(ctx.run, cfg, T, len(texts))
    how = dict(rows=rows, row_multiple=-(-rows // ctx.row_multiple) * ctx.row_multiple, length=T, likeliest=False)
    nats = []
    for first in ctx.track(range(0, len(texts), rows), f"position at {T} tokens"):
        ctx.check_stop()
        some = [Prompt(ids, nothing) for ids in texts[first : first + rows]]
        scored = score_tokens(ctx.sampler, ctx.params, ctx.router_bias, some, [1] * len(some), **how)
        nats += [-one.logp.astype(float) for one in scored]
    # The begin-of-text id has no loss: the first part has a token less.
    parts = [[np.nanmean(part) for part in np.split(np.insert(x, 0, np.nan), n)] for x in nats]
    return told(cfg, np.array(parts))


def told(cfg: config.Eval, parts: np.ndarray) -> Report:
    """The report of nats by document and part [documents, parts]."""
    T, n = cfg.lengths[0], cfg.buckets
    mean, ends = parts.mean(axis=0), [T * (k + 1) // n for k in range(n)]
    last = parts[:, -max(1, n // 4) :].mean(axis=1)
    change = last - parts[:, 0]
    noise = float(change.std(ddof=1) / math.sqrt(len(change))) if len(change) > 1 else math.nan
    scalars = {f"nats/{end}": float(x) for end, x in zip(ends, mean, strict=True)}
    scalars |= {"nats_first": float(mean[0]), "nats_last_quarter": float(last.mean()), "documents": float(len(parts))}
    compared = f"first {ends[0]:,} tokens {mean[0]:.3f}, so {change.mean():+.3f} ± {noise:.3f} (1σ)"
    report = Report(scalars)
    report.rows.append(
        (f"nats in the last quarter of {T:,} tokens, {len(parts)} documents", f"{last.mean():.3f}", compared)
    )
    worst = int(mean.argmax())
    at = f"tokens {ends[worst] - T // n:,} to {ends[worst]:,}"
    report.rows.append((f"nats in the worst of {n} parts ({at})", f"{mean[worst]:.3f}", f"mean {mean.mean():.3f}"))
    middle = [end - T / n / 2 for end in ends]
    report.plots["position"] = plots.curves(
        middle, {"model": mean.tolist()}, x_title="position, tokens", y_title="nats a token", title="Loss by position"
    )
    report.details = {
        "ends": ends,
        "nats": mean.tolist(),
        "perplexity": np.exp(np.minimum(mean, 700)).tolist(),
        "documents": len(parts),
    }
    return report
