"""What a selection kept: a table by domain, pictures of the grades, examples from both sides of the cut."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from llamax.observe import log, plots
from llamax.post.ranking import ALL, Choice, Graded, rank
from llamax.post.records import Record, Records, pictured, text_of

NO_DOMAIN = "(none)"
HEADS = ("domain", "records", "kept", "share", "mean grade", "of the kept")
SHOWN, SHOWN_CHARS = 3, 600


def report(folder: Path, records: Records, graded: Graded | None, chosen: Choice, how: str) -> None:
    """FOLDER/report.md with the kept per domain and examples of each band; a PNG of the grades of each domain, and all.

    The same table is printed.
    """
    folder.mkdir()
    able = sorted(chosen.kept | set(chosen.dropped))
    domains: dict[str, list[int]] = defaultdict(list)
    for number in able:
        domains[records[number].domain or NO_DOMAIN].append(number)
    groups = {ALL: able, **dict(sorted(domains.items()))} if len(domains) > 1 else {ALL: able}
    rows = [_row(name, group, graded, chosen) for name, group in groups.items()]
    left_out = ", ".join(f"{why} ({n:,})" for why, n in chosen.left_out.items()) or "nothing"
    table = Table(title=how)
    for head in HEADS:
        table.add_column(head)
    for row in rows:
        table.add_row(*row)
    log.CONSOLE.print(table)
    log.CONSOLE.print(f"left out: {left_out}", markup=False)
    text = [f"# {records.path.name}: {how}", "", _markdown(HEADS), _markdown(["---"] * len(HEADS))]
    text += [*map(_markdown, rows), "", f"Left out: {left_out}.", ""]
    for name, group in groups.items():
        text += _picture(folder, name, group, graded, chosen) if graded is not None else []
    for title, numbers in bands(able, records, graded, chosen).items():
        text += [f"## {title}", ""]
        for number in numbers:
            text += _example(records[number], graded.values[number] if graded is not None else None)
    (folder / "report.md").write_text("\n".join(text) + "\n", encoding="utf-8", errors="replace")
    log.CONSOLE.print(f"{folder}/report.md has examples and pictures.", markup=False)


def _picture(folder: Path, name: str, group: Sequence[int], graded: Graded, chosen: Choice) -> list[str]:
    """Writes the histogram of a group; the lines that show it."""
    kept = [graded.values[n] for n in group if n in chosen.kept]
    dropped = [graded.values[n] for n in group if n not in chosen.kept]
    title = f"{name}: {graded.grade} by {graded.judge}"
    picture = plots.histogram({"kept": kept, "dropped": dropped}, title=title, x_title=graded.grade)
    file = f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)}.png"
    (folder / file).write_bytes(plots.png(picture))
    return [f"![{name}]({file})", ""]


def bands(able: Sequence[int], records: Records, graded: Graded | None, chosen: Choice) -> dict[str, list[int]]:
    """Some of the records from both ends of the ranking and from both sides of the cut, kept and dropped ones."""
    ranked = rank(able, records, graded)
    kept = [number for number in ranked if number in chosen.kept]
    dropped = [number for number in ranked if number not in chosen.kept]
    found = {
        "Kept, far from the cut": kept[:SHOWN],
        "Kept, at the cut": kept[SHOWN:][-SHOWN:],
        "Dropped, at the cut": dropped[:SHOWN],
        "Dropped, far from the cut": dropped[SHOWN:][-SHOWN:],
    }
    return {title: numbers for title, numbers in found.items() if numbers}


def _row(name: str, group: Sequence[int], graded: Graded | None, chosen: Choice) -> list[str]:
    kept = [number for number in group if number in chosen.kept]
    row = [name, f"{len(group):,}", f"{len(kept):,}", f"{len(kept) / len(group):.0%}"]
    if graded is None:
        return [*row, "", ""]
    return [*row, *(f"{np.mean([graded.values[n] for n in some]):.3f}" if some else "" for some in (group, kept))]


def _example(record: Record, value: float | None) -> list[str]:
    about = [f"grade {value:.3f}"] if value is not None else []
    about += [f"{name} {said}" for name, said in (("id", record.id), ("domain", record.domain)) if said]
    about += [f"tags {', '.join(sorted(record.tags))}"] if record.tags else []
    lines = [f"**{'; '.join(about) or record.where}**", ""]
    for message in record.messages:
        text = text_of(message) or ("(a picture)" if pictured([message]) else "")
        text = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]} ..."
        lines += [f"> *{message['role']}*", *(f"> {line}" for line in text.splitlines()), ">"]
    return [*lines, ""]


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
