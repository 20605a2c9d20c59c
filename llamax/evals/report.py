"""What an evaluation is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llamax import config
from llamax.batch import Batch
from llamax.data.tokenizer import Tokenizer
from llamax.model.skeleton import Skeleton


def untracked(items: Sequence, what: str) -> Iterable:
    """In training, whose own line goes on."""
    del what
    return items


class Context(NamedTuple):
    """The run that is evaluated; without weights, all but them."""

    run: config.Run
    skeleton: Skeleton
    sampler: Skeleton  # the same for rows that are not cut: what `generate` takes
    tokenizer: Tokenizer
    put: Callable[[Batch], Batch]  # a host batch onto the mesh
    row_multiple: int  # the rows of a batch divide by it
    params: Any = None
    router_bias: Any = None
    reference: Any = None  # (what is trained of it, router_bias): the model that answers are measured against
    check_stop: Callable[[], None] = lambda: None  # raises if the run is to stop: called between batches
    track: Callable[[Sequence, str], Iterable] = untracked  # of batches, and what they are of: shows how far it is


@dataclass
class Report:
    """Figures by name; rows for people, each (what, figure, and what to compare it with); captioned pictures; plots by
    name, uint8 [height, width, 3]; and what a program would like to know beside these, as JSON takes it."""

    scalars: dict[str, float] = field(default_factory=dict)
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    pictures: list[tuple[np.ndarray, str]] = field(default_factory=list)
    plots: dict[str, np.ndarray] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    rises: tuple[str, ...] = ()  # scalars that should not fall from one evaluation to the next


def left_out_of(n: int, total: int) -> str:
    """The end of a row that tells how many documents could not be used; empty if all could."""
    return f"; {n} of {total} documents left out" if n else ""
