"""A clip becomes a list of frames, each of which is then a picture of the document, in order.

Llama 4 has no input of its own for video: it was trained on stills, so a frame is tiled like any picture, and its place
among the frames is its time. Animated GIF, WebP, PNG and TIFF files are read by Pillow; MP4, MOV, Matroska, WebM, AVI,
MPEG and other containers by PyAV (`pip install 'llamax[video]'`), of which the first video stream counts. A clip with
more frames than the budget is sampled evenly over its time, first and last frame included.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import math
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from llamax.config import ConfigError, Data
from llamax.data.images import PictureError, check_pixels, open_image, to_rgb

MAX_CLIP_PIXELS = 2**30  # of all frames of an animated picture: to reach the last, those before it are decoded
MAX_VIDEO_PIXELS = 2**34  # decoded on the way to the frames that are kept: 8,000 frames of 1080p, a minute of one core
MAX_VIDEO_FRAMES = 2**20  # of a video file, nine hours at 30 a second: their times are all looked at
HEAD_BYTES = 512


def sample(n_frames: int, budget: int) -> list[int]:
    """Numbers of the frames to keep: all, or `budget` (at least 1) spread evenly from the first to the last."""
    return sample_times(range(n_frames), budget)


def sample_times(times: Any, budget: int) -> list[int]:
    """Those of the rising `times` (whole numbers) that lie nearest to `budget` moments, spread evenly over them."""
    assert len(times) >= 1 and budget >= 1
    if len(times) <= budget:
        return list(times)
    chosen = []
    for moment in np.linspace(times[0], times[-1], budget):
        i = bisect.bisect_left(times, moment)
        near = times[max(i - 1, 0) : i + 1]
        chosen.append(min(near, key=lambda time: abs(time - moment)))
    return sorted(set(chosen))


def read_frames(data: bytes | str | Path, budget: int = Data.video_frames) -> list[Image.Image]:
    """The sampled frames of an encoded clip, as RGB. See `each_frame`."""
    return list(each_frame(data, budget))


def each_frame(data: bytes | str | Path, budget: int = Data.video_frames) -> Iterator[Image.Image]:
    """The sampled frames of an encoded clip (bytes, or the path of a file), one after the other, as RGB.

    PictureError if it is missing, unreadable or too large; ConfigError if it needs PyAV, which is not installed.
    """
    try:
        container = container_of(_head(data))
        yield from _video_frames(data, container, budget) if container else _picture_frames(data, budget)
    except (PictureError, ConfigError):
        raise
    except FileNotFoundError as error:
        raise PictureError("image_missing", str(error)) from None
    except Exception as error:  # Pillow and PyAV raise nearly anything on damaged bytes
        raise PictureError("image_unreadable", f"{type(error).__name__}: {error}") from None


def _picture_frames(data: bytes | str | Path, budget: int) -> Iterator[Image.Image]:
    """Of an animated picture."""
    clip = open_image(data)
    n_frames, (width, height) = getattr(clip, "n_frames", 1), clip.size
    if n_frames * width * height > MAX_CLIP_PIXELS:
        true = f"{n_frames} frames of {width} x {height} pixels; at most {MAX_CLIP_PIXELS} pixels"
        raise PictureError("image_too_many_pixels", true)
    rows = 0
    for number in sample(n_frames, budget):
        clip.seek(number)
        width, rows = max(width, clip.width), rows + clip.height  # frames of a TIFF have sizes of their own
        check_pixels(width, rows)  # of all that are kept, as if they were one picture
        yield to_rgb(clip.copy())  # a copy decodes it; the clip itself goes on to the next


# ------------------------------------------------------------------------------------------------------ video files


def container_of(head: bytes) -> str:
    """FFmpeg's name of the container that a file's first bytes announce; empty if they announce none.

    The name is given to FFmpeg, which would else also try playlists and scripts that open other files.
    """
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
        return "mov"  # MP4, MOV, M4V, 3GP
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if (head[:1], head[188:189], head[376:377]) == (b"G",) * 3 and head[:4] != b"GIF8":  # packets of 188 bytes
        return "mpegts"
    signatures = {b"\x1aE\xdf\xa3": "matroska", b"OggS": "ogg", b"FLV\1": "flv", b"\0\0\1\xba": "mpeg"}
    return signatures.get(head[:4], "asf" if head[:4] == b"\x30\x26\xb2\x75" else "")


def _head(data: bytes | str | Path) -> bytes:
    if isinstance(data, bytes):
        return data[:HEAD_BYTES]
    if not stat.S_ISREG(Path(data).stat().st_mode):
        raise ValueError(f"{data} is not a file")  # a pipe would be waited for, without end
    with Path(data).open("rb") as file:
        return file.read(HEAD_BYTES)


def _video_frames(data: bytes | str | Path, container: str, budget: int) -> Iterator[Image.Image]:
    try:
        import av
    except ImportError:
        shown = "a video file" if isinstance(data, bytes) else f"video file {data}"
        change = "Install it: pip install 'llamax[video]'. Animated WebP, PNG and GIF files are read without it."
        raise ConfigError(f"{shown} ({container})", "PyAV, which reads it, is not installed", change) from None
    with contextlib.ExitStack() as stack:
        file: BinaryIO = io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb")  # noqa: SIM115
        stack.callback(file.close)

        def opened() -> tuple[Any, Any]:
            """The container at its start, and its first video stream."""
            file.seek(0)
            found = stack.enter_context(av.open(file, format=container, metadata_errors="ignore"))
            if not found.streams.video:
                raise ValueError("it holds no video")
            check_pixels(found.streams.video[0].codec_context.width, found.streams.video[0].codec_context.height)
            return found, found.streams.video[0]

        times, keys = _times(*opened())
        reader = _Reader(opened, keys)
        for time in sample_times(times, budget):
            frame = reader.frame_at(time)
            angle = getattr(frame, "rotation", 0)  # counterclockwise, as phones note how they were held
            image = frame.to_image()
            yield image.rotate(angle, expand=True) if angle else image


def _times(opened: Any, stream: Any) -> tuple[list[int], list[int]]:
    """When frames are shown, rising, and which of these times a decoder can start at; nothing is decoded."""
    times, keys = set(), set()
    for packet in opened.demux(stream):
        time = packet.dts if packet.pts is None else packet.pts
        if time is None or not packet.size:
            continue  # the end of the stream
        times.add(time)
        if packet.is_keyframe:
            keys.add(time)
        if len(times) > MAX_VIDEO_FRAMES:
            raise PictureError("image_too_many_pixels", f"more than {MAX_VIDEO_FRAMES} frames")
    if not times:
        raise ValueError("it holds no frames")
    return sorted(times), sorted(keys)


class _Reader:
    """Frames of a stream by their times, which may only rise; jumps over what lies before a key frame, if it can."""

    def __init__(self, opened: Callable[[], tuple[Any, Any]], keys: list[int]):
        self.opened, self.keys, self.pixels = opened, keys, 0
        self._start()

    def _start(self) -> None:
        self.container, self.stream = self.opened()
        self.frames = self.container.decode(self.stream)
        self.last: Any = None  # the frame decoded last

    def frame_at(self, time: int) -> Any:
        """The frame of a time; where it cannot be decoded, the next, or the last of all."""
        shown = -math.inf if self.last is None else _shown(self.last)
        key = self.keys[max(bisect.bisect_right(self.keys, time) - 1, 0)] if self.keys else -math.inf
        if key > max(shown, self.keys[0] if self.keys else 0):
            self.container.seek(time, stream=self.stream)
            self.frames = self.container.decode(self.stream)
            first = next(self.frames, None)
            if first is None or _shown(first) > time:  # beyond it: files without an index are only guessed at
                self.keys = []  # never again
                self._start()
            else:
                self._decoded(first)
        while self.last is None or _shown(self.last) < time:
            frame = next(self.frames, None)
            if frame is None:
                break
            self._decoded(frame)
        if self.last is None:
            raise ValueError("none of its frames can be decoded")
        return self.last

    def _decoded(self, frame: Any) -> None:
        check_pixels(frame.width, frame.height)
        self.pixels += frame.width * frame.height
        if self.pixels > MAX_VIDEO_PIXELS:
            true = f"more than {MAX_VIDEO_PIXELS} pixels to be decoded for the frames that are kept"
            raise PictureError("image_too_many_pixels", true)
        self.last = frame


def _shown(frame: Any) -> float:
    """When a frame is shown; before everything if it does not say."""
    time = frame.dts if frame.pts is None else frame.pts
    return -math.inf if time is None else time
