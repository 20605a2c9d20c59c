"""How likely a text is behind another, and what a model says behind it, as evaluation harnesses ask: texts in, batched.

    log-likelihood of (context, continuation) = sum over the continuation's tokens of ln p(token | all before it)

Every text stands behind the begin-of-text id, as documents do in training. The rules for what is a continuation,
for windows and for what is cut off are those of EleutherAI's lm-evaluation-harness (`lm_eval.api.model`,
`lm_eval.utils`), so that figures compare with those of other models; nothing here needs it to be installed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llamax.config import ConfigError
from llamax.data import chat
from llamax.data.tokenizer import Tokenizer
from llamax.loading import Loaded
from llamax.sample.engine import Completion, Sampling, generate
from llamax.sample.reading import Prompt, score_tokens

logger = logging.getLogger("llamax")
NO_TILES = np.zeros((0, 1, 1, 3), np.uint8)


class Pair(NamedTuple):
    """Token ids, as the model reads them."""

    context: list[int]  # one at least
    continuation: list[int]


class Likelihood(NamedTuple):
    logp: float  # of the whole continuation, nats
    greedy: bool  # whether every token of it is the likeliest


class How(NamedTuple):
    """How a text is continued."""

    max_tokens: int
    until: tuple[str, ...]  # ends before the first of these
    sampling: Sampling


# ------------------------------------------------------------------------------------------------------- texts to ids


def encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids behind the begin-of-text id. In a text that spells that id (`chat_text` does) the special tokens are meant;
    in any other they are plain text."""
    templated = text.startswith(spelt(tokenizer, "begin_of_text"))
    ids = tokenizer.encode(text, specials=templated)
    return ids if templated else [tokenizer.bos, *ids]


def spelt(tokenizer: Tokenizer, name: str) -> str:
    return tokenizer.decode([tokenizer.special(name)])


def chat_text(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, prompt: bool) -> str:
    """A conversation as the text that `encode` reads: with the assistant's header for its next turn (`prompt`), or with
    its last turn left open."""
    spans = chat.render(messages, prompt=prompt)
    contents = [span.content for span in (spans if prompt else spans[:-1])]
    return "".join(spelt(tokenizer, c.name) if isinstance(c, chat.Special) else str(c) for c in contents)


def pair(context: str, continuation: str, tokenizer: Tokenizer) -> Pair:
    """The continuation's ids are those that context and continuation have together beyond the number that the context
    has alone. White space at the context's end goes with the continuation: a token begins with it."""
    bare = context.rstrip()
    whole, before = encode(context + continuation, tokenizer), encode(bare, tokenizer)
    after = whole[len(before) :]
    if not after and continuation:  # it melted into the context's last token; nothing would be certain
        after = tokenizer.encode(continuation)
    return Pair(before, after)


def fit(pairs: Sequence[Pair], max_length: int) -> list[Pair]:
    """The pairs with contexts cut from the left, so that at most `max_length` tokens stand before any token.

    ConfigError if a continuation alone is longer."""
    longest = max((len(pair.continuation) for pair in pairs), default=0)
    if longest > max_length:
        change = f"Give max_length={longest} or more if the model can read that, or leave the task out."
        true = f"the model is given {max_length} tokens at most"
        raise ConfigError(f"a continuation of {longest} tokens", true, change)
    fitted = []
    for context, continuation in pairs:
        room = max_length + 1 - len(continuation)  # the last token of all is never read
        fitted.append(Pair(context[-room:], continuation))
    _warn(sum(a.context != b.context for a, b in zip(pairs, fitted, strict=True)), len(pairs), max_length)
    return fitted


def _warn(cut: int, n: int, max_length: int) -> None:
    if cut:
        logger.warning("%d of %d contexts cut from the left: the model is given %d tokens", cut, n, max_length)


def windows(ids: Sequence[int], prefix: int, max_length: int) -> list[Pair]:
    """Pairs that together ask for each id once: the first behind `prefix`, all of full length, the last one's context
    reaching back over what was asked before."""
    found = [Pair([prefix], list(ids[:max_length]))] if ids else []
    for first in range(max_length, len(ids), max_length):
        end = min(len(ids), first + max_length)
        found.append(Pair(list(ids[end - max_length - 1 : first]), list(ids[first:end])))
    return found


# --------------------------------------------------------------------------------------------------------- likelihoods


def likelihoods(model: Loaded, pairs: Sequence[Pair], rows: int) -> Iterator[tuple[int, Likelihood]]:
    """(number of the pair, its likelihood), longest pairs first, `rows` at a time, a power of two.

    Every batch has as many rows and one of few lengths, so there is one program for each of those.
    """
    assert rows == power_of_two(rows), rows
    prompts = [Prompt(pair.context + pair.continuation, NO_TILES) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -len(prompts[i].tokens))
    for first in range(0, len(order), rows):
        some = order[first : first + rows]
        starts = [len(pairs[i].context) for i in some]
        weights = (model.skeleton, model.params, model.router_bias)
        scored = score_tokens(*weights, [prompts[i] for i in some], starts, rows=rows, row_multiple=rows)
        for i, one in zip(some, scored, strict=True):
            yield i, Likelihood(float(one.logp.sum(dtype=np.float64)), bool(one.likeliest.all()))


def power_of_two(n: int) -> int:
    """The largest that is not above n."""
    return 1 << n.bit_length() - 1


# ---------------------------------------------------------------------------------------------------------- generation


COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one thing; first wins
NEUTRAL = {  # what is not done here, and the values that ask for nothing
    "top_k": (0, -1, None),
    "min_p": (0, None),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}


def how_of(settings: Mapping[str, Any], max_tokens: int, seed: int) -> How:
    """A task's `generation_kwargs`. ConfigError for what would change the text and is not done here."""
    known = (*COUNTS, "until", "do_sample", "temperature", "top_p")
    for name, value in settings.items():
        if name not in known and value not in NEUTRAL.get(name, ()):
            true = f"texts are drawn by {', '.join(known)}"
            raise ConfigError(f"generation with {name}={value!r}", true, "Leave it out of the task, or the task.")
    until = settings.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(filter(None, until))
    given = [settings[name] for name in COUNTS if settings.get(name) is not None]
    sampled, temperature, top_p = (settings.get(name) for name in ("do_sample", "temperature", "top_p"))
    if sampled is False:
        temperature = 0.0
    elif temperature is None:
        temperature = 1.0 if sampled else 0.0
    sampling = Sampling(float(temperature), 1.0 if top_p is None else float(top_p), seed)
    return How(int(given[0]) if given else max_tokens, until, sampling)


def prompts_of(texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int, max_length: int) -> list[list[int]]:
    """Ids of contexts, cut from the left so that `max_tokens` more have room."""
    room = max_length - max_tokens
    if room < 1:
        true = f"the model is given {max_length} tokens at most, the context's too"
        change = f"Give max_length={max_tokens + 1} or more if the model can read that, or a smaller max_gen_toks."
        raise ConfigError(f"a generation of {max_tokens} tokens", true, change)
    whole = [encode(text, tokenizer) for text in texts]
    _warn(sum(len(ids) > room for ids in whole), len(whole), room)
    return [ids[-room:] for ids in whole]


def batches(prompts: Sequence[list[int]], how: How, rows: int) -> list[Sequence[int]]:
    """The prompts' numbers in groups that `continued` takes one after the other: longest first, `rows` at a time; all
    at once where texts are sampled, for a sample depends on its prompt's number in the group."""
    if how.sampling.temperature > 0:
        return [range(len(prompts))]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    return [order[first : first + rows] for first in range(0, len(order), rows)]


def continued(model: Loaded, prompts: Sequence[list[int]], how: How, rows: int) -> list[str]:
    """What the model says behind each prompt, up to the end of its turn or text or to the first of `how.until`."""
    tokenizer = model.tokenizer
    assert tokenizer is not None, "whoever has made the prompts has one"
    asked = [Prompt(ids, NO_TILES) for ids in prompts]
    found = generate(
        *(model.skeleton, model.params, model.router_bias, asked),
        max_tokens=how.max_tokens,
        stop=tokenizer.stop | ending(tokenizer, how.until),
        sampling=how.sampling,
        rows=rows,
        row_multiple=rows,
    )
    return [said(completion, how.until, tokenizer) for (completion,) in found]


def ending(tokenizer: Tokenizer, until: Sequence[str]) -> frozenset[int]:
    """The ids whose own text has one of `until` in it: no token after them can matter."""
    ids = (*range(tokenizer.n_ranks), *tokenizer.specials.values()) if until else ()
    ends = [text.encode() for text in until]
    return frozenset(i for i in ids if any(end in tokenizer.decode_bytes([i]) for end in ends))


def said(completion: Completion, until: Sequence[str], tokenizer: Tokenizer) -> str:
    """Its text without special tokens, before the first of `until`."""
    specials = set(tokenizer.specials.values())
    text = tokenizer.decode(token for token in completion.tokens if token not in specials)
    return text[: min((at for end in until if (at := text.find(end)) >= 0), default=None)]
