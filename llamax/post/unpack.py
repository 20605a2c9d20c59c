"""`llamax data unpack`: the records of a manifest as lines of JSON, their pictures as files beside.

    FILE.jsonl          a record a line, as the source has it, pictures by their paths
    FILE_files/         each picture once, by the SHA-256 of its bytes, which are the source's
    FILE.toml           a manifest that trains as the source's does

So what is embedded in shards can be graded, chosen and drawn from. A source of lines is copied with its pictures.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llamax.config import ConfigError
from llamax.data.images import PictureError, open_image
from llamax.data.sources import TASKS, Manifest, Shards, open_source, read_manifest
from llamax.data.video import HEAD_BYTES, container_of
from llamax.observe import log
from llamax.observe.progress import track
from llamax.post.records import PICTURES, as_line, check_new, write

SPOKEN = ("messages", "prompt", "chosen", "rejected", "completion")  # where messages may stand
Keep = Callable[[Any], str]  # a picture's bytes, or its path as it is written down -> its new path


def pictures_of(out: Path) -> Path:
    """The folder of the pictures of a file that is unpacked."""
    return out.with_name(f"{out.stem}_files")


def unpack(manifest: str | Path, out: str | Path, n: int = 0) -> Counter[str]:
    """Writes the first `n` records (0: all) of a manifest; how many were written, and left out for what reason.

    Raises:
        ConfigError: the manifest is of tasks, none of its records can be read, or something of OUT is there already.
    """
    log.setup()
    path, about = check_new(out), read_manifest(manifest)
    asked, files = f"unpack {manifest} into {out}", pictures_of(path)
    if files.exists():
        raise ConfigError(f"--out {out}", f"{files} is there already", "Choose another name, or move it away.")
    if about.format == TASKS:
        true = "it is of tasks, which are made as they are read, for a tokenizer and a length"
        raise ConfigError(asked, true, "Name a manifest of records that are written down.")
    source, counts = open_source(about), Counter[str]()
    assert isinstance(source, Shards)
    first = ""
    with _scratch(path) as scratch:

        def lines() -> Iterator[bytes]:
            nonlocal first
            numbers = range(min(n or len(source), len(source)))
            for number in track(numbers, "unpacking", len(numbers)):
                why = source[number].skip
                if not why:
                    try:
                        line = _line(source, number, scratch, files.name)
                    except PictureError as error:
                        why = error.reason
                    except TypeError:
                        why = "bytes outside of pictures, which JSON cannot hold"
                if why:
                    first = first or f"{source[number].where}: {why}"
                    counts[why] += 1
                    continue
                counts["written"] += 1
                yield line

        def settle() -> None:
            if not counts["written"]:
                raise ConfigError(asked, f"none of its records can be read: {first}", "Build or copy it again.")
            if any(scratch.iterdir()):
                scratch.rename(files)

        told = f"{f'The first {n:,} of ' if n else ''}{about.path.name}, unpacked. {about.description}".strip()
        seen = about.kind == "multimodal"
        try:
            write(path, lines(), pictures=seen, description=told, said=_said(about), settle=settle)
        except BaseException:
            if not path.exists() and not path.with_suffix(".toml").exists():
                shutil.rmtree(files, ignore_errors=True)
            raise
    log.CONSOLE.print(f"{path}: {dict(counts)}", markup=False)
    if first:
        log.CONSOLE.print(f"the first that was left out: {first}", markup=False)
    return counts


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder beside OUT that is gone at the end, unless it was renamed."""
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.stem}-", dir=out.parent))
        scratch.chmod(0o755)
    except OSError as error:
        true = f"its pictures cannot be written: {error.strerror}"
        raise ConfigError(f"--out {out}", true, "Choose another folder.") from None
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _said(about: Manifest) -> dict[str, Any]:
    """What the source's manifest says of its records, whatever their format."""
    told = {"lang": about.lang, "licence": about.licence, "learnt": list(about.learnt)}
    return {key: value for key, value in told.items() if value}


def _line(source: Shards, number: int, scratch: Path, name: str) -> bytes:
    """The record as it will stand in the file. TypeError: JSON cannot hold it; PictureError: a file is not there."""
    raw, folder = source.raw(number)

    def keep(picture: bytes | str) -> str:
        data = picture if isinstance(picture, bytes) else _read(folder or Path(), picture)
        file = f"{hashlib.sha256(data).hexdigest()}.{_ending(data)}"
        if not (scratch / file).exists():
            (scratch / file).write_bytes(data)
        return f"{name}/{file}"

    return as_line(_kept(raw, keep))


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        if not path.is_file():
            raise FileNotFoundError(2, "there is no such file")
        return path.read_bytes()
    except OSError as error:
        raise PictureError("image_missing", f"{path}: {error.strerror}") from None


def _ending(data: bytes) -> str:
    """Of a picture's name, for people: readers look at the bytes."""
    if container := container_of(data[:HEAD_BYTES]):
        return container
    try:
        return (open_image(data).format or "bin").lower()
    except PictureError:
        return "bin"


def _kept(record: Mapping[str, Any], keep: Keep) -> dict[str, Any]:
    """The record with its pictures' paths."""
    changed = {key: _talked(record[key], keep) for key in SPOKEN if key in record}
    if "pieces" in record:
        changed["pieces"] = [
            {key: keep(value) if key in PICTURES else value for key, value in piece.items()}
            for piece in record["pieces"]
        ]
    return {**record, **changed}


def _talked(said: Any, keep: Keep) -> Any:
    """Messages, a message or a text."""
    if isinstance(said, list):
        return [_talked(message, keep) for message in said]
    if not isinstance(said, dict) or not isinstance(said.get("content"), list):
        return said
    return {**said, "content": [_part(part, keep) for part in said["content"]]}


def _part(part: Any, keep: Keep) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    return {**part, kind: keep(part[kind])} if kind in PICTURES else part
