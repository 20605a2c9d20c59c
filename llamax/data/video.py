"""A clip becomes a list of frames, each of which is then a picture of the document, in order.

Clips are animated GIF, WebP or PNG files. A clip with more frames than the budget is sampled evenly, first and last
frame included.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from llamax.config import Data
from llamax.data.images import PictureError, check_pixels, open_image, to_rgb

MAX_CLIP_PIXELS = 2**30  # of all its frames: to reach the last, a decoder goes through those before it


def sample(n_frames: int, budget: int) -> list[int]:
    """Numbers of the frames to keep: all, or `budget` (at least 1) spread evenly from the first to the last."""
    assert n_frames >= 1 and budget >= 1
    if n_frames <= budget:
        return list(range(n_frames))
    return [int(round(x)) for x in np.linspace(0, n_frames - 1, budget)]


def read_frames(data: bytes | str | Path, budget: int = Data.video_frames) -> list[Image.Image]:
    """The sampled frames of an encoded clip, as RGB. PictureError if it is missing, unreadable or too large."""
    clip = open_image(data)
    try:
        n_frames, (width, height) = getattr(clip, "n_frames", 1), clip.size
        if n_frames * width * height > MAX_CLIP_PIXELS:
            true = f"{n_frames} frames of {width} x {height} pixels; at most {MAX_CLIP_PIXELS} pixels"
            raise PictureError("image_too_many_pixels", true)
        frames, rows = [], 0
        for number in sample(n_frames, budget):
            clip.seek(number)
            width, rows = max(width, clip.width), rows + clip.height  # frames of a TIFF have sizes of their own
            check_pixels(width, rows)  # of all that are kept, as if they were one picture
            frames.append(to_rgb(clip.copy()))  # a copy decodes it; the clip itself goes on to the next
        return frames
    except PictureError:
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged bytes, counting the frames included
        raise PictureError("image_unreadable", f"{type(error).__name__}: {error}") from None
