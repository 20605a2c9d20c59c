"""What an evaluation is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llamax import config
from llamax.batch import Batch
from llamax.data.tokenizer import Tokenizer
from llamax.model.skeleton import Skeleton


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
    check_stop: Callable[[], None] = lambda: None  # raises if the run is to stop: called between batches


@dataclass
class Report:
    """Figures by name; rows for people, each (what, figure, and what to compare it with); captioned pictures."""

    scalars: dict[str, float] = field(default_factory=dict)
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    pictures: list[tuple[np.ndarray, str]] = field(default_factory=list)


def left_out_of(n: int, total: int) -> str:
    """The end of a row that tells how many documents could not be used; empty if all could."""
    return f"; {n} of {total} documents left out" if n else ""
