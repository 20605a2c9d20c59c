"""`llamax data select`: a part of a file by its grades or tags, as a new file, with a report of what was kept.

Records are ranked by their grade from the end that is worth keeping (of difficulty the hard one), over all or domain by
domain; those with one grade by their keys, so that the same grades choose the same records.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from llamax.config import ConfigError
from llamax.observe import log
from llamax.post import ledger
from llamax.post.grade import log_skipped
from llamax.post.ranking import ALL, Choice, Graded, rank
from llamax.post.records import Records, as_line, check_new, moved, pictured, write
from llamax.post.report import report

PRESETS = {"llama4": 0.5, "behemoth": 0.05}  # of the data the share that their supervised tuning kept, the hardest


def select(
    file: str | Path,
    out: str | Path,
    *,
    by: str | None = None,
    keep: float = 1.0,
    band: tuple[float, float] | None = None,
    end: str | None = None,
    per_domain: bool = False,
    keep_tags: Collection[str] = (),
    drop_tags: Collection[str] = (),
    judge: str | None = None,
    grades: str | Path | None = None,
) -> Choice:
    """Writes OUT (JSONL, with a manifest beside it) and OUT's report; what was kept.

    Args:
        by: the grade that ranks; None: tags alone choose.
        keep: the share that is kept; `band`: instead, the records between these two shares of the ranking.
        end: "high" or "low", if other than what the grade says is worth keeping.
        keep_tags, drop_tags: records need one of the first, if there are any, and none of the second.
        judge: whose grades, if several have given some.

    Raises:
        ConfigError: there are no such grades, nothing would be kept, or something is there already.
    """
    log.setup()
    low, high = band or (0.0, keep)
    if not 0 <= low < high <= 1:
        asked = f"--band {low:g},{high:g}" if band else f"--keep {keep:g}"
        raise ConfigError(asked, "shares are from 0 to 1, the smaller one first", "Give one such as 0.5, or 0.2,0.8.")
    path = check_new(out)
    folder = path.with_suffix(".report")
    if folder.exists():
        raise ConfigError(f"--out {out}", f"{folder} is there already", "Choose another name, or move it away.")
    records = Records(file)
    log_skipped(records)
    graded = read_grades(grades or f"{file}.grades.jsonl", records, by, judge) if by else None
    if graded is not None and end:
        graded = graded._replace(keep=end)
    chosen = choose(records, graded, (low, high), per_domain, keep_tags, drop_tags)
    if not chosen.kept:
        true = f"no record would be kept: {_listed(chosen.left_out)}"
        raise ConfigError(f"--out {out}", true, "Ask for a larger share, or for other tags.")
    same = records.path.parent.resolve() == path.parent.resolve()
    kept = sorted(chosen.kept)
    lines = (
        records.line(n) if same else as_line(moved(records[n].raw, records.path.parent, path.parent)) for n in kept
    )
    how = f"{_how(graded, (low, high), per_domain)} of {records.path.name}"
    write(path, lines, pictures=any(pictured(records[n].messages) for n in kept), description=how)
    report(folder, records, graded, chosen, how)
    return chosen


def read_grades(path: str | Path, records: Records, by: str, judge: str | None) -> Graded:
    """The grades `by` of the file's records, as they are now; of several judges', of one judge by other weights, or by
    another wording, those that were given last: two scales are not one ranking."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, key in enumerate(records.keys):
        numbers[key].append(number)
    there, found = Counter[str](), dict[Way, dict[int, float]]()
    if not Path(path).exists():
        true = "there is no such file of grades"
        raise ConfigError(f"{path}", true, f"Make it: llamax data grade {records.path} --judge CKPT --rubric {by}.")
    for row in ledger.rows(path):
        there[row["grade"]] += 1
        if row["grade"] != by or (judge is not None and row["judge"] != judge):
            continue
        way = Way(row["judge"], row["keep"], row.get("identity", ""), row.get("method", ""))
        values = {number: float(row["value"]) for number in numbers.get(row["record"], ())}
        if values:
            so_far = found.pop(way, {})
            so_far.update(values)
            found[way] = so_far  # the newest stands last
    if not found:
        of = f" by {judge}" if judge else ""
        true = f"{path} has none{of} of the records as they are; it has {_listed(there) or 'nothing'}"
        raise ConfigError(f"--by {by}", true, "Grade the file first, or name another grade or judge.")
    judges = dict.fromkeys(way.judge for way in found)
    newest, values = found.popitem()
    if len(judges) > 1:
        told = f"{by} was graded by {', '.join(judges)}; taking {newest.judge} (--judge takes another)"
        log.CONSOLE.print(told, markup=False)
    if older := sum(len(other) for way, other in found.items() if way.judge == newest.judge):
        told = f"{by}: {older} grades of {newest.judge} by other weights, or by another wording, are left out"
        log.CONSOLE.print(told, markup=False)
    return Graded(by, newest.judge, newest.keep, values)


class Way(NamedTuple):
    """How a grade was given."""

    judge: str
    keep: str
    identity: str  # of the judge's weights
    method: str  # of a rubric every word


def choose(
    records: Records,
    graded: Graded | None,
    band: tuple[float, float],
    per_domain: bool,
    keep_tags: Collection[str] = (),
    drop_tags: Collection[str] = (),
) -> Choice:
    """Of each group of n records those ranked from floor(low n) to ceil(high n)."""
    left_out, groups = Counter[str](), defaultdict[str, list[int]](list)
    for number in range(len(records)):
        record = records[number]
        if keep_tags and not record.tags & set(keep_tags):
            left_out["no tag that is kept"] += 1
        elif record.tags & set(drop_tags):
            left_out["a tag that is dropped"] += 1
        elif graded is not None and number not in graded.values:
            left_out["no grade"] += 1
        else:
            groups[record.domain if per_domain else ALL].append(number)
    kept: set[int] = set()
    for group in groups.values():
        ranked = rank(group, records, graded)
        first, last = math.floor(band[0] * len(ranked) + 1e-9), math.ceil(band[1] * len(ranked) - 1e-9)
        kept.update(ranked[first:last])
    able = [number for group in groups.values() for number in group]
    return Choice(frozenset(kept), tuple(sorted(set(able) - kept)), left_out)


def _how(graded: Graded | None, band: tuple[float, float], per_domain: bool) -> str:
    if graded is None:
        return "by tags"
    share = f"{band[1]:.0%}" if not band[0] else f"from {band[0]:.0%} to {band[1]:.0%}"
    each = " of each domain" if per_domain else ""
    end = "highest" if graded.keep == "high" else "lowest"
    return f"the {share}{each} with the {end} {graded.grade} by {graded.judge}"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({n:,})" for name, n in counts.items())
