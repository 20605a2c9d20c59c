"""Whether a source can be trained on at all: looked at in a sample of its documents, before a run starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from llamax import config
from llamax.config import ConfigError
from llamax.data.encode import Encoder
from llamax.data.encoded import Encoded
from llamax.data.packing import split
from llamax.data.sources import SKIP_REASONS, Document
from llamax.data.tasks.source import Exams

SAMPLE_DOCS = 128  # documents that stand for a source whose manifest states no tokens
MOST_LOOKED_AT = 16  # documents that are looked at before a run where looking takes long


def sample(reader: Sequence[Document], encoder: Encoder, most: int = SAMPLE_DOCS) -> Iterator[Encoded]:
    """At most so many of a source's documents, spread evenly over it."""
    return (encoder(reader[number]) for number in _spread(reader, most))


def _spread(reader: Sequence[Document], most: int) -> list[int]:
    return np.unique(np.linspace(0, len(reader) - 1, most).astype(int)).tolist()


def check_compared(name: str, reader: Sequence[Document], where: str, data: config.Data) -> None:
    """ConfigError if answers are compared, as far as a sample tells, and the run has no place for that."""
    if data.comparisons_per_row or isinstance(reader, Exams):
        return
    for number in _spread(reader, MOST_LOOKED_AT):
        document = reader[number]
        if document.talk and document.talk.answers:
            asked, true = f"data source {name} ({where})", f"{document.where} compares answers, and the run does not"
            raise ConfigError(asked, true, "Set --config.data.comparisons_per_row=64, or drop the source.")


def labels(reader: Sequence[Document]) -> set[int]:
    """1 and -1 where a source has answers that are labelled good and bad, each by itself. Of a source that seems to
    have one kind of label every record is read, until another one is found."""
    found: set[int] = set()
    if isinstance(reader, Exams):
        return found
    for number in (*_spread(reader, SAMPLE_DOCS), *range(len(reader))):
        document = reader[number]
        if document.talk and len(document.talk.answers) == 1:
            found.add(document.talk.answers[0].side)
        if len(found) == 2 or (number == len(reader) - 1 and not found):
            break
    return found


def has_pairs(reader: Sequence[Document]) -> bool:
    """Whether a source compares two answers. One whose sample has answers by themselves alone is read to its end."""
    if isinstance(reader, Exams):
        return False
    answers = {_answers(reader[number]) for number in _spread(reader, SAMPLE_DOCS)}
    return 2 in answers or (1 in answers and any(_answers(reader[number]) == 2 for number in range(len(reader))))


def _answers(document: Document) -> int:
    return len(document.talk.answers) if document.talk else 0


def check_labels(found: Mapping[str, set[int]]) -> None:
    """ConfigError if all labels of all sources are the same: nothing tells good answers from bad ones."""
    if len(of_all := set().union(*found.values())) == 1:
        kind = "good (label true)" if of_all == {1} else "bad (label false)"
        names = ", ".join(sorted(name for name, of in found.items() if of))
        true = f"all of their answers that have a label are {kind}"
        raise ConfigError(f"data source {names}", true, "Add answers with the other label, or compare two answers.")


def check(name: str, reader: Sequence[Document], encoder: Encoder, data: config.Data) -> None:
    """ConfigError for a source none of whose documents, as far as a sample tells, could ever be trained on."""
    skips: dict[str, str] = {}
    for encoded in sample(reader, encoder):
        if not encoded.skip and split(encoded, data.seq_len, data.tiles_per_row, data.align_tokens) is not None:
            return
        skips.setdefault(encoded.skip or "image_too_large", encoded.where)
    sampled = f"the {SAMPLE_DOCS} that were looked at, spread over its {len(reader)} documents"
    raise ConfigError(
        f"data source {name} ({encoder.where})",
        f"none of {sampled if len(reader) > SAMPLE_DOCS else f'its {len(reader)} documents'} can be used: "
        + "; ".join(f"{SKIP_REASONS[reason]} ({where})" for reason, where in skips.items()),
        f"Look at them with `llamax data show {encoder.where}`, and repair them or drop the source.",
    )


def check_whole(name: str, reader: Sequence[Document], encoder: Encoder, data: config.Data) -> None:
    """ConfigError for tasks that a row does not hold: a question would come apart from its context."""
    if not isinstance(reader, Exams):
        return
    asked, longest = f"data source {name} ({encoder.where})", reader.table.longest
    if longest > data.seq_len:
        true = f"its tasks have up to {longest:,} tokens and a row {data.seq_len:,}"
        raise ConfigError(asked, true, f"Set --config.data.seq_len={longest} or more, or ask for shorter ones.")
    if encoder.vision is None:
        return
    tiles = max(len(encoded.tiles) for encoded in sample(reader, encoder, MOST_LOOKED_AT))
    if tiles > data.tiles_per_row:
        true = f"its tasks have up to {tiles} tiles and a row {data.tiles_per_row}: their documents would come apart"
        raise ConfigError(asked, true, f"Set --config.data.tiles_per_row={tiles} or more, or ask for fewer pictures.")
