"""Conversations and comparisons as token ids that fit into a row.

A conversation is never split over rows. What to do with one that is longer than a row (`data.too_long`):

    skip        leave it out
    cut_begin   leave out its oldest turns, up to the first question of the user from which on the rest fits; a system
                message and the description of tools stay. Of a comparison, the same turns of the prompt on both sides
    cut_end     leave out its end, before a picture where one would be cut. Of a comparison, the ends of the answers:
                both are cut after the same number of tokens, the most that fits, and the prompt stays

What no cut makes fit is left out too. Of a comparison two segments have to fit into one row.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llamax.config import ConfigError, Vision
from llamax.data import chat, packing
from llamax.data.document import Answer, Message, Talk
from llamax.data.encoded import Encoded, Row, joined, shortened, weights_of
from llamax.data.tokenizer import Tokenizer


class Unfit(ValueError):
    """A talk that cannot be trained on; `reason` is a key of sources.SKIP_REASONS."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class How(NamedTuple):
    """What a source's talks are encoded with."""

    tokenizer: Tokenizer
    vision: Vision | None
    video_frames: int
    row: Row
    learnt: tuple[str, ...]  # roles
    source_id: int = 0

    def encode(self, spans: Sequence[chat.Span]) -> Encoded:
        of = dict(video_frames=self.video_frames, source_id=self.source_id)
        return chat.encode(spans, self.tokenizer, self.vision, **of)._replace(whole=True)

    def fits(self, encoded: Encoded) -> bool:
        return packing.split(encoded, self.row.seq_len, self.row.tiles, self.row.stripe) is not None


def encode_talk(talk: Talk, how: How) -> Encoded:
    """The talk with its cut, if it needs one. Unfit if there is nothing to learn or to compare, or it does not fit."""
    _check(talk, how)
    try:
        encoded = (_compared if talk.answers else _conversation)(talk, how)
    except chat.BadPicture as error:
        raise Unfit(error.reason, f"{error.asked}: {error.true}") from None
    except ConfigError as error:
        raise Unfit("malformed", f"{error.asked}: {error.true}") from None
    learnt = encoded.sides if talk.answers else encoded.weights
    if learnt is None or not learnt[1:].any():
        raise Unfit("no_answer", "no token is learnt" + (" where it was cut" if encoded.cut else ""))
    return encoded


def _check(talk: Talk, how: How) -> None:
    """Unfit for what no row could help."""
    if talk.answers and not how.row.comparisons:
        raise Unfit("unexpected_comparison", "")
    stop = how.tokenizer.stop
    for number, message in enumerate(talk.messages if not talk.answers else ()):
        if message["role"] == "assistant" and chat.is_learnt(message, how.learnt) and _says_nothing(message, stop):
            raise Unfit("no_answer", f"message {number}, of the assistant, says nothing")
    for answer in talk.answers:
        if all(_says_nothing(message, stop) for message in answer.messages):
            raise Unfit("no_answer", "an answer says nothing")
    ends = {how.tokenizer.special(name) for name in ("header_start", "header_end") if how.tokenizer.has(name)}
    ends |= {how.tokenizer.bos, *how.tokenizer.stop}
    for message in (*talk.messages, *(message for answer in talk.answers for message in answer.messages)):
        ids = message.get("token_ids")
        if ids is not None and ends & {int(i) for i in ids[:-1]}:
            raise Unfit(
                "malformed", "token_ids have an end of turn, or a header, inside: what follows would be another"
            )


def _says_nothing(message: Message, stop: Collection[int]) -> bool:
    """`stop`: the tokens that end a turn, which say nothing."""
    content, ids = message.get("content"), message.get("token_ids")
    if ids is not None:
        return all(int(i) in stop for i in ids)
    if isinstance(content, list | tuple):
        return not message.get("tool_calls") and not any(part.get("text", "x").strip() for part in content)
    return not message.get("tool_calls") and not (isinstance(content, str) and content.strip())


def _conversation(talk: Talk, how: How) -> Encoded:
    def since(turn: int) -> Encoded:
        return how.encode(chat.render(_from(talk.messages, turn), tools=talk.tools, learnt=how.learnt))

    encoded = since(0)
    if how.fits(encoded):
        return encoded
    if how.row.too_long == "cut_begin":
        return _cut_begin(talk, how, since)
    if how.row.too_long == "cut_end":
        return _cut_end(len(encoded.tokens), how, lambda n: shortened(encoded, n))
    raise _too_long(encoded, how)


def _compared(talk: Talk, how: How) -> Encoded:
    parts = _Parts.of(talk, how)
    encoded = parts.joined(how)
    if not how.fits(encoded):
        if how.row.too_long == "cut_begin":
            encoded = _cut_begin(talk, how, lambda turn: _Parts.of(talk, how, turn).joined(how))
        elif how.row.too_long == "cut_end":
            longest = max(len(answer.tokens) for answer in parts.answers)
            encoded = _cut_end(longest, how, lambda n: parts.joined(how, n))
        else:
            raise _too_long(encoded, how)
    return encoded


class _Parts(NamedTuple):
    """A comparison's prompt and answers, each by itself: the prompt's tokens are a prefix of both conversations'."""

    prompt: Encoded
    answers: tuple[Encoded, ...]
    sides: tuple[int, ...]
    margin: float

    @classmethod
    def of(cls, talk: Talk, how: How, turn: int = 0) -> _Parts:
        """From the prompt's message `turn` on, but for the system's."""
        prompt = _from(talk.messages, turn)
        before = chat.render(prompt, tools=talk.tools, since=len(prompt))

        def encode(answer: Answer) -> Encoded:
            whole = (*prompt, *answer.messages)
            return how.encode(chat.render(whole, tools=talk.tools, learnt=how.learnt, since=len(prompt))[len(before) :])

        answers = tuple(encode(answer) for answer in talk.answers)
        return cls(how.encode(before), answers, tuple(answer.side for answer in talk.answers), talk.margin)

    def joined(self, how: How, most: int | None = None) -> Encoded:
        """One segment for each answer; of no answer more than `most` tokens. Unfit if both say the same."""
        answers = [answer if most is None else shortened(answer, most) for answer in self.answers]
        if len(answers) == 2 and np.array_equal(answers[0].tokens, answers[1].tokens):
            raise Unfit("identical", "" if most is None else "where they were cut")
        segments = [joined([self.prompt, answer]) for answer in answers]
        sides = [side * self._compared(segment, how) for side, segment in zip(self.sides, segments, strict=True)]
        weights = [weights_of(segment) * (side > 0) for side, segment in zip(self.sides, segments, strict=True)]
        if not all(of[1:].any() for of in sides):
            raise Unfit("no_answer", "no token of an answer is learnt")
        return joined(segments)._replace(
            weights=np.concatenate(weights).astype(np.float32),
            second=len(segments[0].tokens) if len(segments) == 2 else 0,
            sides=np.concatenate(sides),
            margin=self.margin,
            answer=len(self.prompt.tokens),
        )

    @staticmethod
    def _compared(segment: Encoded, how: How) -> np.ndarray:
        """int32 [L]: 1 for the tokens by which an answer is judged."""
        compared: np.ndarray = weights_of(segment) > 0
        if not how.row.compare_marks:
            compared = compared & (segment.tokens < how.tokenizer.n_ranks)
        return compared.astype(np.int32)


def _from(messages: tuple[Message, ...], turn: int) -> tuple[Message, ...]:
    """The messages from `turn` on, behind the system's."""
    opening = 1 if messages[0]["role"] == "system" else 0
    return messages if turn <= opening else (*messages[:opening], *messages[turn:])


def _cut_begin(talk: Talk, how: How, since: Callable[[int], Encoded]) -> Encoded:
    """What is said since the earliest question of the user from which on it fits."""
    turns = [i for i, message in enumerate(talk.messages) if message["role"] == "user"][1:]
    at = bisect.bisect_left(turns, True, key=lambda turn: how.fits(since(turn)))
    if at == len(turns):
        raise _too_long(since(turns[-1] if turns else 0), how)
    return since(turns[at])._replace(cut="cut_begin")


def _cut_end(longest: int, how: How, to: Callable[[int], Encoded]) -> Encoded:
    """The most of it that fits; `longest` is more."""

    def too_long(n: int) -> bool:
        try:
            return not how.fits(to(n))
        except Unfit:  # nothing to compare is left of it
            return False

    most = bisect.bisect_left(range(1, longest), True, key=too_long)
    if not most:
        raise _too_long(to(1), how)
    return to(most)._replace(cut="cut_end")


def _too_long(encoded: Encoded, how: How) -> Unfit:
    size, row = f"{len(encoded.tokens) - 1:,} tokens", f"{how.row.seq_len:,}"
    if len(encoded.tiles):
        size, row = f"{size} and {len(encoded.tiles)} tiles", f"{row} and {how.row.tiles}"
    return Unfit("too_long", f"it takes {size}, and a row has {row}")


def learnt_texts(talk: Talk, learnt: Sequence[str]) -> Iterator[str]:
    """The texts that weigh in the loss, of a comparison those of the chosen answer; none of what was sampled."""
    answers = [answer.messages for answer in talk.answers if answer.side > 0] if talk.answers else [()]
    for answer in answers:
        since = len(talk.messages) if talk.answers else 0
        for span in chat.render((*talk.messages, *answer), tools=talk.tools, learnt=learnt, since=since):
            if span.trained and isinstance(span.content, str):
                yield span.content
