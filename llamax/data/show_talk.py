"""How `llamax data show` prints a conversation or a comparison: the tokens that a model reads, and which it learns.

Learnt text is green and all other dim, special tokens as `<|name|>`; where the output has no colours, «learnt» text
stands in marks.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape as escape_markup

from llamax.data import chat
from llamax.data.document import Document, Picture, Talk
from llamax.data.encode import Encoder
from llamax.data.encoded import Encoded
from llamax.data.sources import CUTS, SKIP_REASONS
from llamax.data.tokenizer import Tokenizer
from llamax.data.usable import SAMPLE_DOCS, sample

LEARNT, READ, MARK, PICTURE = "green", "dim", "yellow", "cyan"
GOOD, BAD = "bold green", "bold red"


def show_talk(console: Console, document: Document, number: int, encoder: Encoder) -> list[Picture]:
    """Prints a document; returns its pictures, in order, or none if it is skipped."""
    encoded, tokenizer = encoder(document), encoder.tokenizer
    title = f"\n[bold]{number}[/bold] {plain(document.id)}"
    if encoded.skip:
        why = SKIP_REASONS[encoded.skip] + encoded.where.removeprefix(document.where)
        console.print(f"{title} [red]skipped: {plain(why)}[/red]", highlight=False)
        return []
    lost = CUTS.get(encoded.cut, "").replace("their ends", "its end").replace("their", "its")
    cut = f" [red]{lost}[/red]" if lost else ""
    console.print(f"{title}  {counted(encoded)}{cut}", highlight=False)
    for key, value in document.meta.items():
        console.print(f"  {plain(key)}: {plain(str(value))}", style="dim", highlight=False)
    bounds = [0, encoded.second, len(encoded.tokens)] if encoded.second else [0, len(encoded.tokens)]
    for start, end in itertools.pairwise(bounds):
        if encoded.sides is not None:
            console.print(heading(encoded, start, end), highlight=False)
        console.print(body(encoded, start, end, tokenizer, marks=not console.is_terminal), highlight=False)
    return pictures(document.talk) if document.talk else []


def heading(encoded: Encoded, start: int, end: int) -> str:
    assert encoded.sides is not None
    judged = encoded.sides[start:end]
    good, n, alone = bool((judged > 0).any()), int((judged != 0).sum()), not encoded.second
    name = ("good" if good else "bad") if alone else ("chosen" if good else "rejected")
    margin = f", better by {encoded.margin:g}" if encoded.margin and good else ""
    style = GOOD if good else BAD
    return f"[{style}]-- {name}[/{style}] ({n} tokens are compared{margin})"


def counted(encoded: Encoded) -> str:
    learnt, read, of_pictures = tokens_of(encoded)
    return f"{learnt} tokens learnt, {read} only read, {of_pictures} of pictures"


def tokens_of(encoded: Encoded) -> tuple[int, int, int]:
    """Tokens that are learnt (of a comparison: those of the chosen answer), only read, and of pictures."""
    weights = np.zeros(0) if encoded.weights is None else encoded.weights
    of_pictures = int((encoded.pictures[:, 1] - encoded.pictures[:, 0]).sum())
    learnt = int((weights > 0).sum())
    return learnt, len(encoded.tokens) - learnt - of_pictures, of_pictures


def body(encoded: Encoded, start: int, end: int, tokenizer: Tokenizer, marks: bool) -> str:
    """The tokens [start, end) as text with rich's markup; a picture by its size."""
    learnt = np.zeros(len(encoded.tokens), bool) if encoded.weights is None else encoded.weights > 0
    if encoded.sides is not None:
        learnt = learnt | (encoded.sides != 0)
    shown: list[str] = []
    at = start
    for begin, stop, n_tiles in [*encoded.pictures.tolist(), (end, end, 0)]:
        if begin < start or begin > end:
            continue
        for of, run in itertools.groupby(range(at, begin), key=lambda i: bool(learnt[i])):
            shown.append(_styled(encoded.tokens[list(run)].tolist(), of, tokenizer, marks))
        if stop > begin:
            shown.append(f"[{PICTURE}]<picture: {n_tiles} tiles, {stop - begin} tokens>[/{PICTURE}]")
        at = stop
    return "".join(shown)


def _styled(ids: Sequence[int], learnt: bool, tokenizer: Tokenizer, marks: bool) -> str:
    """Tokens that are all learnt, or none of them."""
    style, parts = LEARNT if learnt else READ, []
    for special, run in itertools.groupby(ids, key=lambda i: i >= tokenizer.n_ranks):
        text = plain(tokenizer.decode(list(run)))
        one = f"{style} {MARK}" if special else style
        parts.append(f"[{one}]{text}[/{one}]")
    inside = "".join(parts)
    return f"«{inside}»" if learnt and marks else inside


def pictures(talk: Talk) -> list[Picture]:
    """Those of the messages and of all answers."""
    answers = [message for answer in talk.answers for message in answer.messages]
    spans = chat.render((*talk.messages, *answers), tools=talk.tools)
    return [span.content for span in spans if isinstance(span.content, Picture)]


def summary(console: Console, reader: Sequence[Document], encoder: Encoder) -> None:
    """What a sample of the source comes to, all of it if it is small."""
    tokens, fates, n = np.zeros(3, int), Counter[str](), 0
    for encoded in sample(reader, encoder):
        n += 1
        fates.update([encoded.skip or encoded.cut] if encoded.skip or encoded.cut else [])
        tokens += tokens_of(encoded)
    learnt, read, of_pictures = tokens.tolist()
    of_all = f"all {n}" if n == len(reader) else f"{n} of {len(reader)}, spread evenly (at most {SAMPLE_DOCS}),"
    console.print(f"\nOf {of_all} documents:", highlight=False)
    share = f" ({learnt / max(1, int(tokens.sum())):.1%})"
    console.print(
        f"  {learnt:,} tokens learnt{share}, {read:,} only read, {of_pictures:,} of pictures", highlight=False
    )
    for fate, count in sorted(fates.items()):
        why = f"{count} {CUTS[fate]}" if fate in CUTS else f"{count} skipped: {SKIP_REASONS[fate]}"
        console.print(f"  [red]{plain(why)}[/red]", highlight=False)


def plain(text: str) -> str:
    """Text as rich prints it unchanged; characters that a terminal would obey, or cannot take, become escapes."""
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return escape_markup("".join(shown))
