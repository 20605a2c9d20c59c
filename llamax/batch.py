"""THE Batch: what the data stream yields and the step consumes. Arrays only; numpy on the host, jax past the door.

Letters: B rows, T tokens a row, M picture tiles a row, P pixels along a tile's side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

COMPARING = ("sides", "ref_logp", "margins")  # fields of data that compares answers
MISMATCHED = 2**20  # sides beyond it: MISMATCHED + k on an answer to another prompt, after that of comparison k (KTO)
Array = Any  # numpy.ndarray on the host, jax.Array on a device


class Batch(NamedTuple):
    """Packed rows. Several documents share a row; `segment_ids` keeps them apart.

    `targets` are shifted on the host: `targets[b, t]` is what should follow `tokens[b, t]`, also across a row's end
    where a long document goes on in another row. The picture tiles of row b are `tiles[b, :n]` in the order of its
    `<|patch|>` tokens, of which every tile fills the same number; slots past n hold zeros. A batch without pictures
    has M = 0, and runs a program without the vision encoder.

    The last three are of data that compares answers, and None elsewhere: a program without them is another one. Of a
    comparison, prompt and chosen answer are one segment and prompt and rejected answer another, both in the same row;
    an answer that is only labelled good or bad is a comparison with one side. `loss_weights` are those of a
    conversation on the chosen side, and 0 on the rejected one.

    On devices that share rows, tokens stand in another order (stripes.py); tiles stay in the order of the row.
    """

    tokens: Array  # int32 [B, T]
    targets: Array  # int32 [B, T]
    loss_weights: Array  # float32 [B, T]; 0 on padding and where the target belongs to a picture
    segment_ids: Array  # int32 [B, T]; 1, 2, ... in row order, 0 on padding
    positions: Array  # int32 [B, T]; restart at 0 in every segment, 0 on padding
    source_ids: Array  # int32 [B, T]; index into the sorted names of the run's sources
    tiles: Array  # uint8 [B, M, P, P, 3]
    sides: Array | None = None  # int32 [B, T]; k where the target is of the chosen answer of the row's comparison k =
    #                             1, 2, ...; -k where it is of the rejected one; MISMATCHED + k where it is an answer to
    #                             another prompt (data.mismatched); 0 elsewhere
    ref_logp: Array | None = None  # float32 [B, T]; what a reference gives the target, where sides != 0
    margins: Array | None = None  # float32 [B, T]; where sides != 0, how much better the chosen answer is

    def lacking(self) -> tuple[str, ...]:
        """The names of what is None."""
        return tuple(name for name, x in self._asdict().items() if x is None)

    def of_tokens(self) -> dict[str, Array]:
        """The arrays [B, T] that are there, by name."""
        return {name: x for name, x in self._asdict().items() if name != "tiles" and x is not None}
