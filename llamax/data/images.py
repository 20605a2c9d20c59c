"""A picture becomes square tiles and token ids, as Llama 4 does it.

Canvases are all (rows, cols) of tiles with rows * cols <= max_tiles. The picture goes on the canvas that enlarges it
least, or shrinks it least where none is large enough; it is resized with its aspect kept, but never enlarged past one
tile's side, pasted top left on black, and cut into tiles, row by row. When there is more than one tile, a last "global"
tile holds the whole picture stretched to a square.

Tokens, for N = tokens_per_tile: one tile is `<|image_start|> <|image|> <|patch|>*N <|image_end|>`; more are
`<|image_start|>`, then for each row its tiles of `<|patch|>*N` joined by `<|tile_x_separator|>` and closed by
`<|tile_y_separator|>`, then `<|image|> <|patch|>*N` for the global tile and `<|image_end|>`.

Letters: P pixels along a tile's side, n tiles. Tiles are uint8; the device maps x to x / 127.5 - 1.
Source: Llama 4's image preprocessing and chat format (Meta's reference code).
"""

from __future__ import annotations

import functools
import io
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llamax.config import Vision
from llamax.data.tokenizer import Tokenizer

WHITE = (255, 255, 255)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow knows more, and some start other programs
MAX_PIXELS = 2**26  # of a picture, by its header: below the 89 million at which Pillow warns; 192 MiB as RGB
MAX_FILE_BYTES = 2**28  # of an encoded picture: several formats are read whole before a header is looked at


class PictureError(ValueError):
    """A picture that cannot be used; `reason` is a key of `sources.SKIP_REASONS` that starts with `image_`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason


def open_image(data: bytes | str | Path) -> Image.Image:
    """Opens an encoded picture (bytes, or the path of a file); its pixels are not decoded yet.

    PictureError if it is missing, no picture of `FORMATS`, or larger than `MAX_PIXELS` or `MAX_FILE_BYTES`.
    """
    try:
        if not isinstance(data, bytes):
            status = Path(data).stat()
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{data} is not a file")  # a pipe would be waited for, without end
        size = len(data) if isinstance(data, bytes) else status.st_size
        if size > MAX_FILE_BYTES:
            raise PictureError("image_too_many_pixels", f"{size} bytes; at most {MAX_FILE_BYTES}")
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS)
        check_pixels(*image.size)
        return image
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureError("image_missing", str(error)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # a warning may be made an error
        raise PictureError("image_too_many_pixels", str(error)) from None
    except UnidentifiedImageError:  # its own message shows an address in memory
        raise PictureError("image_unreadable", f"no picture in one of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow raises nearly anything on damaged bytes
        raise PictureError("image_unreadable", f"{type(error).__name__}: {error}") from None


def check_pixels(width: int, height: int) -> None:
    """PictureError if there are more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise PictureError("image_too_many_pixels", f"{width} x {height} pixels; at most {MAX_PIXELS}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB, upright by its EXIF tag, transparent pixels over white. PictureError if it cannot be."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it to 255
            grey = np.asarray(image)
            if grey.min() < 0 or grey.max() > 65535:
                raise ValueError("pixels of 32 bits have no agreed range")
            return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
        if image.mode == "F":
            raise ValueError("floating-point pixels have no agreed range")
        if not image.has_transparency_data:
            return image if image.mode == "RGB" else image.convert("RGB")
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, WHITE)
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    except Exception as error:  # as above: this is where the pixels are decoded
        raise PictureError("image_unreadable", f"{type(error).__name__}: {error}") from None


@functools.cache
def canvases(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (rows, cols) with rows * cols <= max_tiles, in the order that settles ties.

    More tiles first and fewer rows first, but grouped by aspect ratio, in the order in which the ratios appear.
    """
    groups: dict[float, list[tuple[int, int]]] = {}
    for n in range(max_tiles, 0, -1):
        for rows in range(1, n + 1):
            if n % rows == 0:
                groups.setdefault(rows / (n // rows), []).append((rows, n // rows))
    return tuple(canvas for group in groups.values() for canvas in group)


@functools.lru_cache(4096)
def choose_canvas(height: int, width: int, tile_px: int, max_tiles: int) -> tuple[int, int]:
    """(rows, cols) of the canvas for a picture: least enlargement, else least shrinking, then least area.

    The scale of a canvas is min(canvas_h / height, canvas_w / width), in float32 as in the reference.
    """
    grid = np.array(canvases(max_tiles))
    sides = (grid * tile_px).astype(np.float32)
    scales = (sides / np.array([height, width], np.float32)).min(axis=1)
    best = scales[scales >= 1].min() if (scales >= 1).any() else scales.max()
    area = np.where(scales == best, grid.prod(axis=1), np.iinfo(np.int64).max)
    rows, cols = grid[area.argmin()]  # the first of equals
    return int(rows), int(cols)


def _fit(height: int, width: int, max_height: int, max_width: int) -> tuple[int, int]:
    """(height, width) scaled to the limit that binds, aspect kept: the other rounded down, at least 1.

    Where both bind, the height is the limit and the width is rounded, which may take a pixel, as in the reference. That
    computes in float64, as here; Hugging Face in float32, which is a pixel off for one size in two thousand.
    """
    if max_width * height < max_height * width:  # max_width / width < max_height / height
        return max(1, min(int(height * (max_width / width)), max_height)), max_width
    return max_height, max(1, min(int(width * (max_height / height)), max_width))


def tile_image(image: Image.Image, vision: Vision) -> tuple[np.ndarray, tuple[int, int]]:
    """An RGB picture to (tiles uint8 [n, P, P, 3], (rows, cols)); n = rows * cols, and 1 more if that exceeds 1."""
    width, height = image.size
    P = vision.tile_px
    rows, cols = choose_canvas(height, width, P, vision.max_tiles)
    new_height, new_width = _fit(
        height, width, min(max(height, P), rows * P), min(max(width, P), cols * P)
    )  # a side shorter than a tile may grow to one tile, no further
    if (width, height) == (cols * P, rows * P):  # as large as its canvas, like most generated drawings
        canvas = np.array(image)
    else:
        resized = image.resize((new_width, new_height), Image.Resampling.BILINEAR)  # antialiased when it shrinks
        canvas = np.zeros((rows * P, cols * P, 3), np.uint8)
        canvas[:new_height, :new_width] = np.asarray(resized)
    tiles = canvas.reshape(rows, P, cols, P, 3).swapaxes(1, 2).reshape(rows * cols, P, P, 3)
    if len(tiles) > 1:
        stretched = np.asarray(image.resize((P, P), Image.Resampling.BILINEAR))
        tiles = np.concatenate([tiles, stretched[None]])
    return tiles, (rows, cols)


def image_tokens(rows: int, cols: int, vision: Vision, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a picture of rows x cols tiles."""
    patches = [tokenizer.patch] * vision.tokens_per_tile
    ids = [tokenizer.image_start]
    if rows * cols > 1:
        for _ in range(rows):
            for col in range(cols):
                ids += patches + [tokenizer.tile_x_separator if col < cols - 1 else tokenizer.tile_y_separator]
    return ids + [tokenizer.image, *patches, tokenizer.image_end]
