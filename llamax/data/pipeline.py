"""The data stream: manifests in, THE Batch out, by Grain.

    per source   reader -> shuffled epochs -> encode            document n is a pure function of n
    a stream     mixture -> window of documents -> pack         window n is a pure function of n and of all weights
                                                                that the run has had (schedule.py)
    a lane       its windows' rows, one after the other         lane l of S has the windows l, l + S, l + 2 S, ...
    build()      R rows: R / S of each lane, in order -> Batch, text-only or multimodal by the step's number

So the whole position is a few integers: the step, and for each stream's lanes the window and the row in it. A resumed
stream is the uninterrupted one bit for bit, and loader processes or prefetching change nothing: a stream saved with
none resumes with two. Nor does the number of training processes: S = `data.lanes` belongs to the run, and each process
reads the lanes that hold rows of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from llamax import config
from llamax.batch import COMPARING, Batch
from llamax.config import ConfigError
from llamax.data import packing, referenced, schedule, usable
from llamax.data.encode import Encoder
from llamax.data.encoded import row_of
from llamax.data.mixture import Shuffled, is_multimodal
from llamax.data.packing import Window, collate, pack_window
from llamax.data.sources import CUTS, SKIP_REASONS, Document, Manifest, open_source, read_manifest
from llamax.data.talk_encode import learnt_texts
from llamax.data.tasks.tokens import Tokens

logger = logging.getLogger("llamax")

MIN_WINDOW_ROWS = 32  # rows that a window of short documents grows to, for it wastes about half a row
MAX_GROWTH = 8  # times data.window_docs
MAX_UNUSABLE_DOCS = 5_000  # in a row, whole windows of them, before the stream gives up
WORKER_GRACE_S = 60  # a loader process outlives a SIGTERM by so much, for the run that is ending to be fed


def build(
    data: config.Data, vision: config.Vision | None, seed: int, share: Sequence[int] | None = None
) -> grain.IterDataset:
    """The training stream: an endless IterDataset of Batch (numpy), whose iterator's state is plain integers.

    Batches have `data.rows` rows; text-only ones M = 0 tile slots, multimodal ones M = `data.tiles_per_row`. `share`:
    only these of each batch's rows, as one process of several wants them. It reads the lanes that hold some of them and
    its iterator's state has these alone; `merge` makes one of all processes' states.
    ConfigError where a manifest, its files or the weights are wrong.
    """
    manifests = {name: read_manifest(source.path) for name, source in data.sources.items()}
    pictures = [name for name in sorted(manifests) if manifests[name].kind == "multimodal"]
    carrying = [name for name in pictures if name in schedule.ever_read(data.sources)]
    if carrying and vision is None:
        raise ConfigError(
            f"data source {carrying[0]} ({manifests[carrying[0]].path})",
            "it carries pictures and config.model.vision is None",
            "Take a model with a vision encoder, or drop the source.",
        )
    stream = Stream(Windows(data, vision, seed, manifests, pictures), data, vision, share)
    if not data.prefetch_batches:  # Grain's own 0 would let an endless queue fill after a restore
        return stream
    return grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=data.prefetch_batches)


def tile_slots(data: config.Data) -> list[int]:
    """Picture slots a row of the kinds of batch that `build` yields: 0, `tiles_per_row`, or both."""
    pictures = [name for name, source in data.sources.items() if read_manifest(source.path).kind == "multimodal"]
    steps = schedule.multimodal_steps(data.sources, pictures, data.multimodal_steps)
    return [0] * (steps < 1) + [data.tiles_per_row] * (steps > 0)


def lacking(data: config.Data) -> tuple[str, ...]:
    """The names of what `build`'s batches have not got: of a run without comparisons, all that is of comparisons."""
    if not data.comparisons_per_row:
        return COMPARING
    return () if data.ref_logp else ("ref_logp",)


class Opened(NamedTuple):
    """A source that is read."""

    reader: Sequence[Document]
    encoder: Encoder
    means: Means
    labels: set[int]


class Windows:
    """Packed windows of the streams, as a history of weights wants them. A source is opened when one first asks for it.

    ConfigError if nothing in it can be used.
    """

    def __init__(
        self,
        data: config.Data,
        vision: config.Vision | None,
        seed: int,
        manifests: Mapping[str, Manifest],
        pictures: Sequence[str],
    ):
        self.data, self.vision, self.seed, self.manifests, self.pictures = data, vision, seed, manifests, pictures
        self.names, self._opened = sorted(data.sources), dict[str, Opened]()

    def of(self, history: schedule.History) -> tuple[Fraction, dict[str, grain.MapDataset]]:
        """(share of multimodal steps, windows of each stream) at the end of a history."""
        steps, streams = schedule.plan(
            history,
            self.pictures,
            self.data.multimodal_steps,
            lambda name: self._open(name).means.tokens,
            self._window_docs,
        )
        now = {"text": steps < 1, "multimodal": steps > 0}
        return steps, {stream: self._pack(stream, planned) for stream, planned in streams.items() if now[stream]}

    def _pack(self, stream: str, planned: schedule.Planned) -> grain.MapDataset:
        parts = []
        for name in planned.names:
            # One order a source, whichever stream reads it.
            order = np.random.SeedSequence([self.seed, self.names.index(name)]).generate_state(1)
            opened = self._open(name)
            reader = referenced.with_logps(opened.reader, self.manifests[name].path, self.data, self.vision)
            parts.append(grain.MapDataset.source(Shuffled(reader, int(order[0]))).map(opened.encoder))
        mixed = grain.MapDataset.select_from_datasets(parts, planned.mixture)
        seed = (self.seed, schedule.STREAMS.index(stream))
        return _pack(mixed, planned.window_docs, self.data, self._tiles(stream), seed)

    def _window_docs(self, stream: str, weights: Mapping[str, float]) -> int:
        means = {name: self._open(name).means for name in weights}
        return _window_docs(weights, means, self.data, self._tiles(stream), self.vision)

    def _tiles(self, stream: str) -> int:
        return self.data.tiles_per_row if stream == "multimodal" else 0

    def _open(self, name: str) -> Opened:
        if name not in self._opened:
            data, manifest = self.data, self.manifests[name]
            reader = open_source(manifest, Tokens(data.tokenizer, self.vision))
            vision = self.vision if name in self.pictures else None
            source_id = self.names.index(name)
            encoder = encoder_of(manifest, data, vision, source_id)
            usable.check_compared(name, reader, encoder.where, data)
            usable.check(name, reader, encoder, data)
            usable.check_whole(name, reader, encoder, data)
            labels = usable.labels(reader) if data.comparisons_per_row else set()
            self._opened[name] = Opened(reader, encoder, _means(manifest, reader, encoder), labels)
        return self._opened[name]

    def check_labels(self) -> None:
        """ConfigError if all answers that have a label have the same one."""
        usable.check_labels({name: opened.labels for name, opened in self._opened.items()})


def encoder_of(manifest: Manifest, data: config.Data, vision: config.Vision | None, source_id: int) -> Encoder:
    """The encoder of a source."""
    row = row_of(data, vision)
    return Encoder(data.tokenizer, vision, source_id, str(manifest.path), data.video_frames, row, manifest.learnt)


class Means(NamedTuple):
    """Of a source's documents."""

    tokens: float  # less the last one, which is only a target
    tiles: float
    compared: float = 0.0  # share of comparisons


def _means(manifest: Manifest, reader: Sequence[Document], encoder: Encoder) -> Means:
    """Text tokens are the manifest's where it states them. Pictures depend on the model's tiling and are counted, like
    text that is not stated, in documents spread evenly over the source.
    """
    text = manifest.tokens / len(reader) + 1
    if manifest.tokens and manifest.kind == "text":
        return Means(text, 0)
    total = tiles = compared = n = 0
    for encoded in usable.sample(reader, encoder):  # one at a time: a sample of large documents is not held in memory
        of_pictures = int((encoded.pictures[:, 1] - encoded.pictures[:, 0]).sum())
        total, n = total + (of_pictures if manifest.tokens else max(0, len(encoded.tokens) - 1)), n + 1
        tiles, compared = tiles + len(encoded.tiles), compared + (encoded.sides is not None)
    return Means(text + total / n if manifest.tokens else max(1.0, total / n), tiles / n, compared / n)


def _window_docs(
    weights: Mapping[str, float], means: Mapping[str, Means], data: config.Data, tiles_per_row: int, vision
) -> int:
    """Documents of a window: data.window_docs, more if they are short, fewer if they are so large that the mean window
    would take more than half of the memory that a window may take.
    """
    documents = {name: weight / means[name].tokens for name, weight in weights.items()}  # a token of the stream
    enough = int(MIN_WINDOW_ROWS * data.seq_len * sum(documents.values()))
    window_docs = max(data.window_docs, min(enough, MAX_GROWTH * data.window_docs))
    share = {name: n / sum(documents.values()) for name, n in documents.items()}
    of_a_row = data.seq_len, tiles_per_row, data.comparisons_per_row
    n_places = sum(p * packing.places(*means[name], *of_a_row) for name, p in share.items())
    n_tiles = sum(p * means[name].tiles for name, p in share.items())
    most = packing.ROOM.places / 2 / n_places
    if n_tiles and vision:
        most = min(most, packing.ROOM.tile_bytes / 2 / (n_tiles * vision.tile_px**2 * 3))
    return max(1, min(window_docs, int(most)))


def _pack(
    documents: grain.MapDataset, window_docs: int, data: config.Data, tiles_per_row: int, seed: tuple[int, int]
) -> grain.MapDataset:
    """Encoded documents to packed windows. A window's are encoded one after the other, as the packer asks for them."""

    room, rest = packing.ROOM, (data.align_tokens, data.comparisons_per_row, lacking(data), data.mismatched)

    def pack(number: int) -> Window:
        first = number * window_docs
        window = (documents[n] for n in range(first, min(first + window_docs, len(documents))))
        rng = np.random.default_rng((*seed, number))
        return pack_window(window, data.seq_len, tiles_per_row, rng, room, *rest)

    return grain.MapDataset.range(-(-len(documents) // window_docs)).map(pack)


class Rows(Iterator[tuple[Window, int]]):
    """The rows of numbered windows, one after the other: (window, row in it).

    `state` says where it stands. `row` is 0 exactly when window `window` has not been opened yet; a window's skipped
    documents are counted when it is opened. `lane` (l, S): only the windows l, l + S, l + 2 S, ...
    """

    def __init__(self, windows: grain.MapDataset, workers: int, names: Sequence[str], lane: tuple[int, int] = (0, 1)):
        self._windows, self._workers, self._names = windows, workers, names
        first, self._stride = lane
        self._told: set[str] = set()  # "source id/reason" of skips whose first document was named
        self._iterator: grain.DatasetIterator | None = None
        self._open: Window | None = None
        self.state = {"window": first, "row": 0, "skipped": {}}

    @property
    def state(self) -> dict[str, Any]:
        state = {"window": self._window, "row": self._row, "skipped": dict(self._skipped)}
        return state | ({"cut": dict(self._cut)} if self._cut else {})

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.close()
        self._window, self._row, self._skipped = state["window"], state["row"], Counter(state["skipped"])
        self._cut = Counter(state.get("cut", {}))

    def start(self) -> grain.DatasetIterator:
        """Opens the windows from the present one on, and starts the loader processes if there are any."""
        if self._iterator is None:
            options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            dataset = self._windows[self._window :: self._stride].to_iter_dataset(options)
            if self._workers:
                if not flags.FLAGS.is_parsed():
                    flags.FLAGS.mark_as_parsed()  # Grain's loader processes read absl flags
                processes = grain.multiprocessing.MultiprocessingOptions(self._workers, 1)
                dataset = dataset.mp_prefetch(processes, worker_init_fn=attend_parent)
            self._iterator = iter(dataset)
            self._iterator.start_prefetch()
        return self._iterator

    def _open_window(self) -> Window:
        """The next window that has rows."""
        windows, unusable = self.start(), 0
        while unusable < MAX_UNUSABLE_DOCS:
            window = next(windows)
            if self._row == 0:
                self._skipped.update(window.skipped)
                self._cut.update(window.cut)
                self._tell(window.first_skipped)
            if len(window.tile_counts):
                return window
            self._window += self._stride
            unusable += max(1, sum(window.skipped.values()))
        raise ConfigError(
            f"data source {', '.join(sorted({self._name_and_reason(key)[0] for key in self._skipped}))}",
            f"{unusable} documents in a row hold nothing usable: "
            + "; ".join(sorted({self._name_and_reason(key)[1] for key in self._skipped})),
            "Look at them with `llamax data show MANIFEST`, and repair them or drop the source.",
        )

    def _tell(self, first_skipped: dict[str, str]) -> None:
        """Logs the first document that a source left out for a reason; the counts are in the state."""
        for key in sorted(first_skipped.keys() - self._told):
            name, reason = self._name_and_reason(key)
            logger.info("source %s leaves out %s: %s", name, first_skipped[key], reason)
        self._told |= first_skipped.keys()

    def _name_and_reason(self, key: str) -> tuple[str, str]:
        source_id, reason = key.split("/")
        return self._names[int(source_id)], SKIP_REASONS[reason]

    def __next__(self) -> tuple[Window, int]:
        window = self._open = self._open or self._open_window()
        row = self._row
        self._row += 1
        if self._row == len(window.tile_counts):
            self._window, self._row, self._open = self._window + self._stride, 0, None
        return window, row

    def close(self) -> None:
        """Ends the loader processes and lets go of their shared memory; `state` stays."""
        self._open = None
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def attend_parent(worker: int, workers: int) -> None:
    """Run by a loader process as it starts: it ends with the training process, however that dies, and not before.

    Signals to the whole group (a Ctrl-C, a scheduler's SIGTERM) would else take the data from a run that has a step to
    finish.
    """

    def end_with(parent: Any) -> None:
        parent.join()
        os._exit(1)

    if parent := multiprocessing.parent_process():
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_S))


class Stream(grain.IterDataset):
    """Batches from the windows of the text stream and of the multimodal one, or of one of them."""

    def __init__(self, windows: Windows, data: config.Data, vision: config.Vision | None, share: Sequence[int] | None):
        super().__init__()
        self.share = range(data.rows) if share is None else share
        self.windows, self.data, self.tile_px = windows, data, vision.tile_px if vision else 0
        windows.of(schedule.began(data.sources))  # what is wrong with them is met here
        windows.check_labels()

    def __iter__(self) -> grain.DatasetIterator:
        return StreamIterator(self)


class StreamIterator(grain.DatasetIterator):
    """Walks a Stream; its state is plain integers, the skipped documents' counts and the mixture's history.

    {"step": 7, "text": {a lane's state}, "multimodal": {...}}, or with several lanes "text/0", "text/1", ...: those
    that hold rows of the share.
    """

    def __init__(self, stream: Stream):
        super().__init__()
        self._stream, self._step = stream, 0
        self._of_lane = stream.data.rows // stream.data.lanes
        self._lanes = sorted({row // self._of_lane for row in stream.share})
        self._rows: dict[str, Rows] = {}
        self._idle: dict[str, Any] = {}  # states of a stream that the mixture has no steps for now
        self._follow(schedule.began(stream.data.sources))

    def _follow(self, history: schedule.History) -> None:
        """Reads on as a history of weights wants it; where, the lanes' states say."""
        for rows in self._rows.values():
            rows.close()
        self._history, (self._multimodal_steps, streams) = history, self._stream.windows.of(history)
        names, n = sorted(self._stream.data.sources), self._stream.data.lanes
        workers = -(-self._stream.data.workers // len(streams))  # two streams share them, and the lanes of each
        self._rows = {
            key_of(name, lane, n): Rows(windows, len(range(i, workers, len(self._lanes))), names, (lane, n))
            for name, windows in sorted(streams.items())
            for i, lane in enumerate(self._lanes)
        }

    def __next__(self) -> Batch:
        self._assert_not_closed()
        stream, data = self._stream, self._stream.data
        pictures = is_multimodal(self._step, self._multimodal_steps)
        rows: list[tuple[Window, int]] = []
        for lane in self._lanes:
            source = self._rows[key_of("multimodal" if pictures else "text", lane, data.lanes)]
            rows += itertools.islice(source, self._of_lane)
        first = {lane: i * self._of_lane for i, lane in enumerate(self._lanes)}
        rows = [rows[first[row // self._of_lane] + row % self._of_lane] for row in stream.share]
        self._step += 1
        return collate(rows, len(stream.share), data.seq_len, (data.tiles_per_row if pictures else 0, stream.tile_px))

    def get_state(self) -> dict[str, Any]:
        where = {"step": self._step, "align_tokens": self._stream.data.align_tokens, "mixture": self._history}
        return where | self._idle | {name: rows.state for name, rows in self._rows.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """All lanes' states have to be in it if the weights are other ones than they were: what is new begins where
        none has been. ConfigError if the rows were aligned to other stripes: these would be other rows.
        """
        data = self._stream.data
        was, now = state.get("align_tokens", 0), data.align_tokens
        if was != now:
            change = f"Set --config.data.align_tokens={was}, and a --config.mesh.context that it fits."
            if not was:
                change = "Set --config.mesh.context=1 and --config.data.align_tokens=0, or choose another --workdir."
            true = f"the run's rows so far are aligned to {was} (0: to none), and all after them would be others"
            raise ConfigError(f"Rows aligned to stripes of {now} tokens", true, change)
        # Without a history it is of a run from before weights could change: they are what they were.
        history = state.get("mixture") or schedule.began(data.sources)
        opened = {stream: _unopened(state, stream, data.lanes) for stream in schedule.STREAMS}
        history = schedule.followed(history, data.sources, state["step"], opened)
        if history != self._history:
            self._follow(history)
        self._step = state["step"]
        lanes = {key_of(stream, lane, data.lanes): stream for stream in schedule.STREAMS for lane in self._lanes}
        for name, rows in self._rows.items():
            if opened[lanes[name]] or name in state:  # else a stream that the run has not had so far
                rows.state = state[name]
        self._idle = {name: state[name] for name in lanes if name in state and name not in self._rows}

    def start_prefetch(self) -> None:
        for rows in self._rows.values():
            rows.start()

    def close(self) -> None:
        self._closed = True
        for rows in self._rows.values():
            rows.close()


def key_of(stream: str, lane: int, lanes: int) -> str:
    """Of a lane, in the iterator's state."""
    return stream if lanes == 1 else f"{stream}/{lane}"


def _unopened(state: Mapping[str, Any], stream: str, lanes: int) -> int:
    """The first window of a stream that neither any lane has opened, nor any after it."""
    places = [state.get(key_of(stream, lane, lanes)) for lane in range(lanes)]
    return max([0, *(place["window"] + 1 - (0 if place["row"] else lanes) for place in places if place)])


def merge(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The iterator's state, all lanes in it, from those of all processes after the same step."""
    assert len({state.get("step") for state in states}) == 1, "states of different steps"
    return {key: part for state in states for key, part in state.items()}


Combine = Callable[[np.ndarray], np.ndarray]


def skipped(
    iterator: grain.DatasetIterator, data: config.Data, combine: Combine | None = None
) -> dict[str, dict[str, int]]:
    """Documents left out up to the last batch: source -> reason (a key of sources.SKIP_REASONS) -> count.

    `combine` gives the largest that any process has of each number, where processes read different lanes.
    """
    return _counted(iterator, data, "skipped", list(SKIP_REASONS), combine)


def cut(
    iterator: grain.DatasetIterator, data: config.Data, combine: Combine | None = None
) -> dict[str, dict[str, int]]:
    """Conversations cut to fit into a row, up to the last batch: source -> key of sources.CUTS -> count."""
    return _counted(iterator, data, "cut", list(CUTS), combine)


def _counted(
    iterator: grain.DatasetIterator, data: config.Data, what: str, reasons: list[str], combine: Combine | None
) -> dict[str, dict[str, int]]:
    names = sorted(data.sources)
    counts, state = np.zeros((2, data.lanes, len(names), len(reasons)), np.int32), iterator.get_state()
    for i, stream in enumerate(("text", "multimodal")):
        for lane in range(data.lanes):
            for key, count in state.get(key_of(stream, lane, data.lanes), {}).get(what, {}).items():
                source, reason = key.split("/")
                counts[i, lane, int(source), reasons.index(reason)] = count
    totals = (combine(counts) if combine else counts).sum((0, 1))
    found = {
        name: {why: int(n) for why, n in zip(reasons, of, strict=True) if n}
        for name, of in zip(names, totals, strict=True)
    }
    return {name: of for name, of in found.items() if of}


class HeldOut:
    """The documents of one manifest, once each, as Batches of the training shapes; the last one is padded.

    Takes at most `max_docs` documents (0: all), spread evenly; `beside`: with what `data.ref_logp` has of them, where a
    run keeps such. Of the last pass, `taken` has the numbers in the source of the documents in those batches, and
    `skipped` the number of those left out, by reason.
    """

    def __init__(
        self,
        path: str | Path,
        data: config.Data,
        vision: config.Vision | None,
        max_docs: int = 0,
        source_id: int = 0,
        beside: bool = False,
    ):
        self.manifest, self.source_id = read_manifest(path), source_id
        self.data = data if beside else dataclasses.replace(data, ref_logp="")
        self.model_vision = vision
        self.vision = vision if self.manifest.kind == "multimodal" else None
        self.max_docs = max_docs
        self.taken: list[int] = []
        self.skipped: dict[str, int] = {}

    def __iter__(self) -> Iterator[Batch]:
        data, vision = self.data, self.vision
        reader = self._reader()
        n = min(self.max_docs or len(reader), len(reader))
        encode = encoder_of(self.manifest, data, vision, self.source_id)
        tiles = (data.tiles_per_row, vision.tile_px) if vision else (0, 0)
        self.taken, self.skipped = [], {}

        def note(number: int, window: Window) -> Window:
            first = number * data.window_docs
            self.taken += [(first + int(i)) * len(reader) // n for i in window.taken]
            return window

        encoded = grain.MapDataset.range(n).map(lambda i: encode(reader[i * len(reader) // n]))
        windows = _pack(encoded, data.window_docs, data, tiles[0], (0, 0)).map_with_index(note)
        rows = Rows(windows, workers=0, names=[str(self.manifest.path)] * (self.source_id + 1))
        while batch := list(itertools.islice(rows, data.rows)):
            yield collate(batch, data.rows, data.seq_len, tiles)
        self.skipped = {key.split("/")[1]: count for key, count in rows.state["skipped"].items()}

    def _reader(self) -> Sequence[Document]:
        reader = open_source(self.manifest, Tokens(self.data.tokenizer, self.vision))
        return referenced.with_logps(reader, self.manifest.path, self.data, self.model_vision)

    def texts(self) -> Iterator[str]:
        """The texts that weigh in the batches of the last pass, read again: all of them may not fit in memory."""
        reader = self._reader()
        for number in self.taken:
            document = reader[number]
            if document.talk:
                yield from learnt_texts(document.talk, self.manifest.learnt)
            weights = document.weights or (1.0,) * len(document.pieces)
            for piece, weight in zip(document.pieces, weights, strict=True):
                if isinstance(piece, str) and weight:
                    yield piece


def numbered(
    path: str | Path, data: config.Data, vision: config.Vision | None, numbers: Sequence[int]
) -> Iterator[Batch]:
    """Some documents of a manifest, by their numbers, as such Batches whose `source_ids` are these numbers."""
    manifest = read_manifest(path)
    vision = vision if manifest.kind == "multimodal" else None
    reader = open_source(manifest, Tokens(data.tokenizer, vision))
    encode = encoder_of(manifest, data, vision, 0)
    tiles = (data.tiles_per_row, vision.tile_px) if vision else (0, 0)
    encoded = grain.MapDataset.source(numbers).map(lambda n: encode(reader[n])._replace(source_id=n))
    windows = _pack(encoded, data.window_docs, data, tiles[0], (0, 0))
    for i in range(len(windows)):
        window = windows[i]  # packs it
        rows = [(window, row) for row in range(len(window.tile_counts))]
        for first in range(0, len(rows), data.rows):
            yield collate(rows[first : first + data.rows], data.rows, data.seq_len, tiles)


def text_bytes(batch: Batch, byte_lengths: np.ndarray, n_sources: int = 1) -> np.ndarray:
    """Bytes of text that the batch's targets stand for, each as often as it weighs: by source, float64 [n_sources].

    `byte_lengths` is `Tokenizer.byte_lengths`. Bits per byte = summed nll (of the same weights) / ln 2 / these.
    """
    lengths = batch.loss_weights.astype(np.float64) * byte_lengths[batch.targets]
    return np.bincount(batch.source_ids.ravel(), lengths.ravel(), n_sources)
