"""`llamax data show FILE`: documents as a person would read them, and their pictures on contact sheets."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from llamax import config, variants
from llamax.data.encode import Encoder
from llamax.data.encoded import ENDLESS, row_of
from llamax.data.images import PictureError, open_image, to_rgb
from llamax.data.show_talk import plain as escape
from llamax.data.show_talk import show_talk, summary
from llamax.data.sources import SKIP_REASONS, Document, Manifest, Picture, open_source, read_manifest
from llamax.data.tasks.tokens import Tokens
from llamax.data.tokenizer import Tokenizer
from llamax.data.video import read_frames

MAX_CHARS, MAX_TAIL = 400, 60  # of a text piece, from its beginning and its end
CELL = 112  # pixels along a picture's side on a sheet
GAP = 6


def show(
    manifest: str | Path,
    n: int = 8,
    *,
    tokenizer: str | Path = "data/tokenizer.model",
    vision: config.Vision | None = None,
    data: config.Data | None = None,
    out_dir: str | Path | None = None,
    console: Console | None = None,
) -> Path | None:
    """Prints what a manifest says and n of its documents, evenly spaced. Tasks are made for `tokenizer` and `vision`.
    A file of JSON lines is shown without a manifest. Conversations are shown token by token, cut as the rows of `data`
    ask for (None: not at all), with a summary.

    Their pictures go to `out_dir`/<manifest>.png, a document a row (default folder: `runs/show`).
    Returns that file, or None if there were no pictures. ConfigError for a wrong manifest or tokenizer file.
    """
    console = console or Console()
    about = _without_manifest(Path(manifest)) if Path(manifest).suffix == ".jsonl" else read_manifest(manifest)
    reader = Tokenizer(config.resolve_path(tokenizer))
    source = open_source(about, Tokens(str(reader.path), vision))
    _print_manifest(console, about, len(source))
    n = min(n, len(source))
    rows, talks = [], 0
    its_vision = (vision or variants.scout().vision) if about.kind == "multimodal" else None
    row = row_of(data, its_vision) if data else ENDLESS
    frames = data.video_frames if data else config.Data.video_frames
    encoder = Encoder(reader.path, its_vision, 0, str(about.path), frames, row, about.learnt)
    for number in (i * len(source) // n for i in range(n)):
        document = source[number]
        if document.talk:
            talks += 1
            if shown := [
                image for picture in show_talk(console, document, number, encoder) for image in images(picture)
            ]:
                rows.append(shown)
            continue
        _print_document(console, document, number, reader)
        if about.kind == "text" and any(isinstance(piece, Picture) for piece in document.pieces):
            console.print(f"[red]skipped: {SKIP_REASONS['unexpected_picture']}[/red]", highlight=False)
        try:
            pictures = [image for piece in document.pieces if isinstance(piece, Picture) for image in images(piece)]
        except PictureError as error:
            console.print(
                f"[red]skipped: {SKIP_REASONS[error.reason]}: {escape(str(error.args[1]))}[/red]", highlight=False
            )
            continue
        if pictures:
            rows.append(pictures)
    if talks:
        summary(console, source, encoder)
    if not rows:
        return None
    folder = Path(out_dir or "runs/show")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{about.path.stem}.png"
    contact_sheet(rows).save(path)
    console.print(f"Pictures, a document a row: {escape(str(path))}", highlight=False)
    return path


def _without_manifest(path: Path) -> Manifest:
    """What is assumed of a file of JSON lines."""
    return Manifest(path, "jsonl", (path,), kind="multimodal")


def _print_manifest(console: Console, about, documents: int) -> None:
    table = Table(show_header=False, box=None, title=escape(str(about.path)), title_justify="left")
    table.add_row("what", escape(about.description))
    table.add_row("kind, language", f"{about.kind}, {escape(about.lang)}")
    table.add_row("licence", escape(about.licence))
    made = f", made as they are read from {len(about.files)} files of text" if about.tasks else ""
    files = f" in {len(about.files)} {about.format} files"
    table.add_row("documents", f"{documents:,}{made or files}")
    stated = [f"{n:,} {what}" for n, what in ((about.bytes, "bytes"), (about.tokens, "tokens")) if n]
    table.add_row("text", ", ".join(stated) or "amount not stated")
    console.print(table)


def _print_document(console: Console, document: Document, number: int, tokenizer: Tokenizer) -> None:
    title = f"[bold]{number}[/bold] {escape(document.id)}"
    if document.skip:
        why = SKIP_REASONS[document.skip] + (f": {document.detail}" if document.detail else "")
        console.print(f"\n{title} [red]skipped: {escape(why)}[/red]", highlight=False)
        return
    texts = [piece for piece in document.pieces if isinstance(piece, str)]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    pictures = len(document.pieces) - len(texts)
    console.print(
        f"\n{title}  {tokens} text tokens, {pictures} pictures{_weighed(document, tokenizer)}", highlight=False
    )
    for key, value in document.meta.items():
        console.print(f"  {escape(key)}: {escape(str(value))}", style="dim", highlight=False)
    weights = document.weights or (1.0,) * len(document.pieces)
    body = "".join(_shown(piece, weight) for piece, weight in zip(document.pieces, weights, strict=True))
    console.print(body, highlight=False)


def _weighed(document: Document, tokenizer: Tokenizer) -> str:
    """How many tokens weigh how much in the loss, where that is not 1 for all."""
    counts: dict[float, int] = {}
    for piece, weight in zip(document.pieces, document.weights, strict=bool(document.weights)):
        if isinstance(piece, str):
            counts[weight] = counts.get(weight, 0) + len(tokenizer.encode(piece))
    said = ", ".join(f"{n} weigh {weight:g}" for weight, n in sorted(counts.items(), reverse=True))
    return f" ({said})" if said else ""


def _shown(piece: str | Picture, weight: float) -> str:
    """A text that is not learnt is dim; one that weighs something else than 1 is set off, with its weight before it."""
    if isinstance(piece, Picture):
        return "[cyan]<video>[/cyan]" if piece.video else "[cyan]<picture>[/cyan]"
    left_out = len(piece) - MAX_CHARS - MAX_TAIL
    text = escape(piece)
    if left_out > 0:
        text = (
            f"{escape(piece[:MAX_CHARS])}[dim] ... {left_out:,} characters more ... [/dim]{escape(piece[-MAX_TAIL:])}"
        )
    if weight == 1:
        return text
    return f"[dim]{text}[/dim]" if not weight else f"[bold green]\\[x{weight:g}]{text}[/bold green]"


def images(picture: Picture) -> list[Image.Image]:
    """A picture as one image, a clip as its frames. PictureError if it cannot be read."""
    return list(read_frames(picture.data)) if picture.video else [to_rgb(open_image(picture.data))]


def contact_sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Pictures scaled into square cells, a row for each list."""
    width = max(len(row) for row in rows)
    sheet = Image.new("RGB", (width * (CELL + GAP) + GAP, len(rows) * (CELL + GAP) + GAP), (110, 110, 110))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            scale = CELL / max(image.size)
            size = tuple(max(1, round(side * scale)) for side in image.size)
            sheet.paste(image.resize(size), (GAP + x * (CELL + GAP), GAP + y * (CELL + GAP)))
    return sheet
