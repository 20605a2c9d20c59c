"""Pictures, texts and records as nobody would want them, each with what may come of it."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from llamax.data.images import MAX_PIXELS

UNREADABLE, PIXELS, MISSING = "image_unreadable", "image_too_many_pixels", "image_missing"
DECODED = ""
SPECIAL_TEXT = "<|begin_of_text|><|patch|><|image_start|><|image|><|end_of_text|><|image_end|><|eot|>"


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def drawing(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """A gradient, so that damage shows."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x * 7 + y) % 256, 255 - x * 200 // width], -1)
    return Image.fromarray(pixels.astype(np.uint8), "RGBA").convert(mode)


def noise(*seed: int) -> bytes:
    """A picture like no other, of one tile of 28 pixels or of several."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(8, 60, 2)
    return encoded(Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)))


def frames(n: int = 4, size: tuple[int, int] = (16, 16)) -> list[Image.Image]:
    return [Image.new("RGB", size, (60 * i % 256, 30, 90)) for i in range(n)]


def clip(form: str, n: int = 4) -> bytes:
    first, *rest = frames(n)
    return encoded(first, form, save_all=True, append_images=rest)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"\0") -> bytes:
    """A PNG by its parts: what its header says need not be what its data holds."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data


def gif_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("P", (16, 16)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def webp_of_size(width: int, height: int) -> bytes:
    data = bytearray(clip("WEBP"))
    data[24:27], data[27:30] = (width - 1).to_bytes(3, "little"), (height - 1).to_bytes(3, "little")
    return bytes(data)


def tiff_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("L", (16, 16)), "TIFF"))
    at = struct.unpack("<I", data[4:8])[0]
    for entry in range(at + 2, at + 2 + 12 * struct.unpack("<H", data[at : at + 2])[0], 12):
        tag = struct.unpack("<H", data[entry : entry + 2])[0]
        if tag in (256, 257):  # width, height
            data[entry + 2 : entry + 4] = struct.pack("<H", 4)
            data[entry + 8 : entry + 12] = struct.pack("<I", width if tag == 256 else height)
    return bytes(data)


def jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(drawing(), "JPEG"))
    at = data.index(b"\xff\xc0")  # the frame's header
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(drawing(), "JPEG", exif=exif)


def bad_exif() -> bytes:
    data = turned()
    at = data.index(b"Exif\0\0") + 6
    return data[: at + 4] + b"\xff" * 12 + data[at + 16 :]


class Kind(NamedTuple):
    make: object  # () -> bytes
    outcomes: tuple[str, ...]  # reasons to skip it, "" where it may be decoded
    size: tuple[int, int] | None = None  # width and height once decoded, where that is certain
    video: bool = False


ANY = (DECODED, UNREADABLE, PIXELS)
bombs = {
    "png 60,000 x 60,000": lambda: png(60_000, 60_000),
    "png just over the limit": lambda: png(2**14, MAX_PIXELS // 2**14 + 1),
    "gif 60,000 x 60,000": lambda: gif_of_size(60_000, 60_000),
    "webp 16,000 x 16,000": lambda: webp_of_size(16_000, 16_000),
    "tiff 60,000 x 60,000": lambda: tiff_of_size(60_000, 60_000),
    "jpeg 60,000 x 60,000": lambda: jpeg_of_size(60_000, 60_000),
}
PICTURES: dict[str, Kind] = {
    "good": Kind(lambda: encoded(drawing()), (DECODED,), (40, 30)),
    "jpeg": Kind(lambda: encoded(drawing(), "JPEG"), (DECODED,), (40, 30)),
    "webp": Kind(lambda: encoded(drawing(), "WEBP"), (DECODED,), (40, 30)),
    "alpha": Kind(lambda: encoded(drawing(mode="RGBA")), (DECODED,), (40, 30)),
    "alpha webp": Kind(lambda: encoded(drawing(mode="RGBA"), "WEBP"), (DECODED,), (40, 30)),
    "grey and alpha": Kind(lambda: encoded(drawing(mode="LA")), (DECODED,), (40, 30)),
    "palette": Kind(lambda: encoded(drawing().quantize(16)), (DECODED,), (40, 30)),
    "palette and alpha": Kind(lambda: encoded(drawing(mode="RGBA").quantize(16)), (DECODED,), (40, 30)),
    "bilevel": Kind(lambda: encoded(drawing(mode="1")), (DECODED,), (40, 30)),
    "16-bit": Kind(
        lambda: encoded(Image.fromarray((np.arange(1200) * 54).astype(np.uint16).reshape(30, 40))), (DECODED,), (40, 30)
    ),
    "32-bit": Kind(
        lambda: encoded(Image.fromarray((np.arange(1200) * 9999 - 5).astype(np.int32).reshape(30, 40)), "TIFF"),
        (UNREADABLE,),
    ),
    "float": Kind(lambda: encoded(Image.new("F", (4, 4), 0.5), "TIFF"), (UNREADABLE,)),
    "cmyk": Kind(lambda: encoded(drawing(mode="CMYK"), "JPEG"), (DECODED,), (40, 30)),
    "exif-rotated": Kind(turned, (DECODED,), (30, 40)),
    "broken exif": Kind(bad_exif, ANY),
    "1 x 1": Kind(lambda: encoded(drawing(1, 1)), (DECODED,), (1, 1)),
    "1 wide": Kind(lambda: encoded(drawing(1, 300)), (DECODED,), (1, 300)),
    "20,000 tall": Kind(lambda: encoded(drawing(1, 20_000)), (DECODED,), (1, 20_000)),
    "20,000 wide": Kind(lambda: encoded(drawing(20_000, 2)), (DECODED,), (20_000, 2)),
    "nothing": Kind(lambda: b"", (UNREADABLE,)),
    "no picture": Kind(lambda: b"no picture at all", (UNREADABLE,)),
    "header only": Kind(lambda: png(30, 30)[:33], (UNREADABLE,)),
    "no pixels": Kind(lambda: png(30, 30), (UNREADABLE,)),
    "0 wide": Kind(lambda: png(0, 30), (UNREADABLE,)),
    "truncated png": Kind(lambda: half(encoded(drawing(200, 200))), (UNREADABLE,)),
    "truncated jpeg": Kind(lambda: half(encoded(drawing(200, 200), "JPEG")), (UNREADABLE,)),
    "truncated webp": Kind(lambda: half(encoded(drawing(200, 200), "WEBP")), (UNREADABLE,)),
    "postscript": Kind(lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", (UNREADABLE,)),
    "zTXt bomb": Kind(lambda: png(4, 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26)))), (UNREADABLE, PIXELS)),
    "iCCP bomb": Kind(lambda: png(4, 4, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26)))), (UNREADABLE, PIXELS)),
    **{name: Kind(make, (PIXELS,)) for name, make in bombs.items()},
    "gif clip": Kind(lambda: clip("GIF"), (DECODED,), (16, 16), video=True),
    "webp clip": Kind(lambda: clip("WEBP"), (DECODED,), (16, 16), video=True),
    "png clip": Kind(lambda: clip("PNG"), (DECODED,), (16, 16), video=True),
    "still as clip": Kind(lambda: encoded(drawing()), (DECODED,), (40, 30), video=True),
    "clip of 300 frames": Kind(lambda: clip("GIF", 300), (DECODED,), (16, 16), video=True),
    "truncated clip": Kind(lambda: half(clip("WEBP", 9)), (UNREADABLE,), video=True),
    "clip without frames": Kind(lambda: clip("GIF")[:13], (UNREADABLE,), video=True),
    "clip bomb": Kind(lambda: clip_bomb(40), (PIXELS,), video=True),
    "clip bomb of few frames": Kind(lambda: clip_bomb(3), (PIXELS,), video=True),
}


def clip_bomb(n: int) -> bytes:
    """A GIF of n frames, each as large as a picture may be, by the size of its screen."""
    data = bytearray(clip("GIF", n))
    data[6:10] = struct.pack("<HH", 2**13, 2**13)
    return bytes(data)


@functools.cache
def picture(kind: str) -> bytes:
    return PICTURES[kind].make()


def damaged(data: bytes, seed: int) -> bytes:
    """Some bits turned, or cut short, or both."""
    rng = np.random.default_rng(seed)
    data = bytearray(data[: rng.integers(0, len(data) + 1)] if rng.random() < 0.4 else data)
    for at in rng.integers(0, len(data), rng.integers(1, 5)) if data else ():
        data[at] ^= 1 << int(rng.integers(8))
    return bytes(data)
