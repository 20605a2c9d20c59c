"""`llamax data pairs`: comparisons from K samples a prompt, for preference tuning.

    {"prompt": [...], "chosen": {...}, "rejected": {...}, "meta": {..., "pair": {"of": "wrong", "chosen": "sampled",
     "rejected": "sampled"}}}

`of` says why the rejected answer is the worse one: it is `wrong` by the record's rule; it has not the `format` that was
asked for; it is over-`long`; it is a `refusal` of a request that does no harm. The chosen answer is the likeliest of
the right samples, or the record's own answer ("reference") if none was right and that one is. The last three are the
corners that such tuning is for (corners.py). Where no sample shows one, a share of the records gets one made by rule
from the right answer: it without its marks; it said over and over; a refusal in set words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

from llamax.config import ConfigError
from llamax.evals.continuations import power_of_two
from llamax.observe import log
from llamax.observe.progress import track
from llamax.post import drawing
from llamax.post.corners import BY_RULE, CORNERS, Pair, pairs_of
from llamax.post.drawing import Drawing
from llamax.post.grade import able_to_pass, log_skipped
from llamax.post.ledger import Ledger
from llamax.post.reader import MAX_TOKENS, describe
from llamax.post.records import Record, Records, as_line, check_new, moved, pictured, write


def pairs(
    file: str | Path,
    out: str | Path,
    *,
    model: str | Path,
    draw: Drawing,
    corners: Collection[str] = CORNERS,
    rule_share: float = 0.1,
    samples: str | Path | None = None,
    step: int | None = None,
    dtype: str = "float32",
    batch_size: int = 8,
    max_tokens: int = MAX_TOKENS,
) -> Counter[str]:
    """Writes OUT, comparisons, with a manifest; how many of each kind.

    Args:
        corners: which of CORNERS are wanted.
        rule_share: of the records, that which gets a corner by rule where no sample shows one.
        samples: what is drawn is kept there (FILE.samples.jsonl).

    Raises:
        ConfigError: before the model is loaded, if anything is missing or no answer can be verified.
    """
    log.setup()
    draw.check()
    strange = [name for name in corners if name not in CORNERS]
    if strange:
        raise ConfigError(f"--corners {strange[0]}", f"they are {', '.join(CORNERS)}", "Name some of these.")
    if not 0 <= rule_share <= 1:
        raise ConfigError(f"--rule-share {rule_share:g}", "it is a share of the records", "Give 0 to 1.")
    path = check_new(out)
    records = Records(file)
    log_skipped(records)
    about = describe(model, step=step, dtype=dtype, option="--model")
    able, counts = able_to_pass(records, about, str(file))
    reader, rows = cache(about.load), power_of_two(batch_size)
    with Ledger(samples or f"{file}.samples.jsonl") as ledger:
        drawn = drawing.drawn(ledger, records, able, draw, about, reader, rows, max_tokens)
        found = dict(sorted(track(drawn, f"drawing {draw.samples} answers each", len(able))))
    tokenizer, lines = about.tokenizer(), []
    for number, of in found.items():
        made = pairs_of(records[number], of or (), tokenizer, corners, rule_share)
        counts["without a pair"] += not made
        for pair in made:
            counts[pair.of] += 1
            counts["by rule"] += pair.rejected.source == BY_RULE
            lines.append(as_line(_written(records[number], pair, records.path.parent, path.parent)))
    if not lines:
        raise ConfigError(f"--out {out}", f"there is no pair to write: {dict(counts)}", "Draw more samples.")
    how = f"comparisons of {draw.samples} answers of {about.name} to each prompt of {records.path.name}"
    write(path, lines, pictures=any(pictured(records[n].prompt) for n in found), description=how)
    log.CONSOLE.print(f"{path}: {len(lines)} pairs, {dict(counts)}", markup=False)
    return counts


def _written(record: Record, pair: Pair, old: Path, new: Path) -> dict[str, Any]:
    raw = moved(record.raw, old, new)
    said = {"prompt": raw["messages"][: len(record.prompt)], "chosen": pair.chosen.message}
    said |= {"rejected": pair.rejected.message}
    rest = {key: value for key, value in raw.items() if key not in ("messages", "meta")}
    about = {"of": pair.of, "chosen": pair.chosen.source, "rejected": pair.rejected.source}
    return said | rest | {"meta": record.meta | {"pair": about}}
