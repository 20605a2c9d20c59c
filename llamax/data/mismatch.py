"""KTO's baseline: a prompt with the answer to another prompt.

How far a policy has moved from its reference is measured on answers that nobody would give (KTO, arXiv:2402.01306,
section 4.1): of the labelled answers of a window, i with prompt i and the answer of i + 1, and the last with the first.
Such a segment stands behind its own example, in the same row, and weighs nothing in any loss but that baseline.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llamax.batch import MISMATCHED
from llamax.data.encoded import Encoded, joined, weights_of


def is_labelled(document: Encoded) -> bool:
    """Whether it is one answer with a label."""
    return document.sides is not None and not document.second


def with_mismatches(documents: Sequence[Encoded]) -> list[Encoded]:
    """The documents, labelled ones with a second segment: its prompt and the answer of the next of them.

    None has one where all answers are the same, or the next holds pictures.
    """
    labelled = [i for i, document in enumerate(documents) if is_labelled(document)]
    following = dict(zip(labelled, [*labelled[1:], *labelled[:1]], strict=True))
    return [_beside(d, documents[following[i]]) if i in following else d for i, d in enumerate(documents)]


def _beside(document: Encoded, other: Encoded) -> Encoded:
    prompt, answer = document.tokens[: document.answer], other.tokens[other.answer :]
    shown = document.pictures[document.pictures[:, 1] <= document.answer]
    if (other.pictures[:, 1] > other.answer).any() or np.array_equal(answer, document.tokens[document.answer :]):
        return document
    assert document.sides is not None and other.sides is not None, "labelled ones"
    assert document.ref_logp is None, "a cache knows answers to their own prompts"
    judged = np.where(other.sides[other.answer :] != 0, MISMATCHED + 1, 0)
    second = document._replace(
        tokens=np.concatenate([prompt, answer]),
        pictures=shown,
        tiles=document.tiles[: int(shown[:, 2].sum())],
        weights=np.zeros(len(prompt) + len(answer), np.float32),
    )
    return joined([document, second])._replace(
        second=len(document.tokens),
        sides=np.concatenate([document.sides, np.zeros(len(prompt), np.int32), judged.astype(np.int32)]),
        weights=np.concatenate([weights_of(document), weights_of(second)]),
    )
