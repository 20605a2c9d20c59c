"""Tiling beside Meta's own results, a slow twin of the choice of canvas, and every kind of picture file."""

from __future__ import annotations

import io
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llamax.config import Vision
from llamax.data.encode import Encoder
from llamax.data.images import PictureError, canvases, choose_canvas, image_tokens, open_image, tile_image, to_rgb
from llamax.data.packing import pack_window
from llamax.data.sources import Document, Picture
from llamax.data.tokenizer import Tokenizer
from llamax.data.video import read_frames, sample

DATA = Path(__file__).resolve().parents[2] / "data"
VISION = Vision()
SMALL = Vision(tile_px=28, max_tiles=4)
SMALL5 = Vision(tile_px=28, max_tiles=5)

# The reference states its statistics with 5 decimals.
FIVE_DECIMALS = dict(rtol=0.0, atol=1e-5)


class Names:
    """Special tokens as their names."""

    patch, image, image_start, image_end = "<|patch|>", "<|image|>", "<|image_start|>", "<|image_end|>"
    tile_x_separator, tile_y_separator = "<|tile_x_separator|>", "<|tile_y_separator|>"


def golden_image(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def png(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_tiles_and_tokens_equal_metas(golden):
    for case in json.loads(golden("llama4/image_preprocess.json").read_text())["cases"]:
        tiles, (rows, cols) = tile_image(golden_image(case["height"], case["width"]), VISION)
        assert (rows, cols, len(tiles)) == (case["rows"], case["cols"], case["tiles"])
        normal = tiles / 127.5 - 1
        np.testing.assert_allclose(normal.mean((1, 2)), case["tile_mean_rgb"], **FIVE_DECIMALS)
        np.testing.assert_allclose(normal.std((1, 2), ddof=1), case["tile_std_rgb"], **FIVE_DECIMALS)
        runs = [[name, len(list(same))] for name, same in itertools.groupby(image_tokens(rows, cols, VISION, Names))]
        assert runs == case["token_rle"]


@pytest.mark.parametrize(
    "size, canvas",
    [
        *[((200, 300), (1, 1)), ((336, 336), (1, 1)), ((337, 336), (2, 1)), ((480, 640), (2, 2)), ((500, 900), (2, 3))],
        *[((600, 800), (2, 3)), ((1080, 1920), (3, 5)), ((1000, 3000), (2, 6)), ((3000, 300), (9, 1))],
        *[((100, 2000), (1, 6)), ((2000, 2000), (4, 4)), ((336, 5376), (1, 16)), ((5000, 4000), (4, 4))],
        *[((700, 340), (3, 2)), ((671, 1009), (2, 4))],
    ],
)
def test_canvases_of_the_reference(size, canvas):
    assert choose_canvas(*size, 336, 16) == canvas


def slow_canvas(height: int, width: int, tile_px: int, max_tiles: int) -> tuple[int, int]:
    """By the rule's words, in float32: least scale of those >= 1, else the largest; then area; then the order."""
    listed = [(rows, n // rows) for n in range(max_tiles, 0, -1) for rows in range(1, n + 1) if n % rows == 0]
    ratios = list(dict.fromkeys(Fraction(*canvas) for canvas in listed))  # in order of first appearance
    best, best_key = None, None
    for order, (rows, cols) in enumerate(sorted(listed, key=lambda canvas: ratios.index(Fraction(*canvas)))):
        scale = min(np.float32(rows * tile_px) / np.float32(height), np.float32(cols * tile_px) / np.float32(width))
        key = (0, scale, rows * cols, order) if scale >= 1 else (1, -scale, rows * cols, order)
        if best_key is None or key < best_key:
            best, best_key = (rows, cols), key
    return best


def slow_tiles(image: Image.Image, P: int, max_tiles: int) -> tuple[list[Image.Image], tuple[int, int]]:
    """Section D.1 of the specification, step by step on pictures: resize, paste, crop."""
    (width, height), bilinear = image.size, Image.Resampling.BILINEAR
    rows, cols = slow_canvas(height, width, P, max_tiles)
    target_height, target_width = min(max(height, P), rows * P), min(max(width, P), cols * P)
    scale_width, scale_height = target_width / width, target_height / height
    if scale_width < scale_height:
        fitted = (target_width, min(math.floor(height * scale_width), target_height))
    else:
        fitted = (min(math.floor(width * scale_height), target_width), target_height)
    canvas = Image.new("RGB", (cols * P, rows * P))  # black
    canvas.paste(image.resize((max(fitted[0], 1), max(fitted[1], 1)), bilinear), (0, 0))
    corners = [(x * P, y * P) for y in range(rows) for x in range(cols)]
    tiles = [canvas.crop((x, y, x + P, y + P)) for x, y in corners]
    return tiles + ([image.resize((P, P), bilinear)] if len(tiles) > 1 else []), (rows, cols)


def test_tiles_equal_the_slow_twin():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, np.log(300), (200, 2))).astype(int).tolist()
    sizes += [(k * rows, k * cols) for k in range(1, 60, 3) for rows, cols in ((1, 1), (2, 3), (4, 1), (5, 3))]
    cases = [(SMALL, size) for size in sizes] + [(SMALL5, size) for size in sizes]
    # Of these squares both sides bind, and rounding takes a pixel of the width.
    cases += [(VISION, size) for size in ((79, 79), (285, 285), (2085, 2085), (700, 340), (671, 1009), (90, 2000))]
    noise = rng.integers(0, 256, (2100, 2100, 3), dtype=np.uint8)
    for vision, (height, width) in cases:
        image = Image.fromarray(noise[:height, :width])
        tiles, canvas = tile_image(image, vision)
        slow, slow_canvas_of = slow_tiles(image, vision.tile_px, vision.max_tiles)
        assert (canvas, len(tiles)) == (slow_canvas_of, len(slow)), (height, width)
        for tile, slow_tile in zip(tiles, slow, strict=True):
            np.testing.assert_array_equal(tile, slow_tile)


def test_choice_of_canvas_equals_the_slow_twin():
    rng = np.random.default_rng(0)
    for height, width in np.exp(rng.uniform(0, np.log(3000), (300, 2))).astype(int).tolist():
        assert choose_canvas(height, width, 336, 16) == slow_canvas(height, width, 336, 16)
        assert choose_canvas(height, width, 28, 5) == slow_canvas(height, width, 28, 5)


def test_fifty_canvases_of_sixteen_tiles():
    assert len(canvases(16)) == 50 == len(set(canvases(16)))
    assert all(rows * cols <= 16 for rows, cols in canvases(16))


def test_tiles_put_together_are_the_picture_on_black():
    image = golden_image(40, 56)  # a canvas of 2 x 2; the width fits, the height is padded
    tiles, (rows, cols) = tile_image(image, SMALL)
    assert (rows, cols, len(tiles)) == (2, 2, 5)
    canvas = np.block([[[tiles[0]], [tiles[1]]], [[tiles[2]], [tiles[3]]]])
    np.testing.assert_array_equal(canvas[:40], np.asarray(image))
    assert not canvas[40:].any()


def test_small_pictures_grow_to_one_tile_at_most():
    tiles, canvas = tile_image(Image.new("RGB", (7, 14), (255, 255, 255)), SMALL)
    assert canvas == (1, 1) and len(tiles) == 1
    assert tiles[0, :28, :14].all() and not tiles[0, :, 14:].any()


def test_transparent_pixels_are_white_in_every_mode():
    image = Image.new("RGBA", (4, 2), (10, 20, 30, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    for converted in (image, image.quantize(4), image.convert("LA")):
        rgb = to_rgb(open_image(png(converted)))
        assert rgb.mode == "RGB" and rgb.getpixel((3, 1)) == (255, 255, 255) and sum(rgb.getpixel((0, 0))) < 100


def test_sixteen_bit_grey_keeps_its_range():
    grey = np.array([[0, 257 * 100, 65535]], np.uint16)
    np.testing.assert_array_equal(np.asarray(to_rgb(open_image(png(Image.fromarray(grey)))))[0, :, 0], [0, 100, 255])


def test_cmyk_palette_and_bilevel_become_rgb():
    cyan = to_rgb(open_image(png(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95)))
    red, green, blue = cyan.getpixel((4, 4))
    assert red < 60 and green > 120 and blue > 180
    assert to_rgb(open_image(png(Image.new("RGB", (4, 4), (9, 8, 7)).quantize(2)))).getpixel((0, 0)) == (9, 8, 7)
    assert to_rgb(open_image(png(Image.new("1", (4, 4), 1)))).getpixel((0, 0)) == (255, 255, 255)


# Orientation -> how the upright picture is stored, by the EXIF standard: which edge is row 0, and which is column 0.
STORED = {
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda upright: upright[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation, kind):
    upright = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"lossless": True} if kind == "WEBP" else {}
    stored = png(Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))), kind, exif=exif, **how)
    image = to_rgb(open_image(stored))
    np.testing.assert_array_equal(np.asarray(image), upright)
    assert tile_image(image, SMALL)[1] == slow_canvas(30, 50, 28, 4)


def test_bad_pictures_say_why(tmp_path):
    whole = png(golden_image(64, 64))
    assert to_rgb(open_image(whole)).size == (64, 64)
    with pytest.raises(PictureError) as error:
        open_image(tmp_path / "none.png")
    assert error.value.reason == "image_missing"
    for damaged in (b"", b"no picture", whole[: len(whole) // 2], png(Image.new("F", (2, 2)), "TIFF")):
        with pytest.raises(PictureError) as error:
            to_rgb(open_image(damaged))
        assert error.value.reason == "image_unreadable"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_clips_become_their_frames_in_order(kind):
    frames = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(6)]
    clip = png(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert [frame.getpixel((8, 8))[0] for frame in read_frames(clip)] == [0, 40, 80, 120, 160, 200]
    assert [frame.getpixel((8, 8))[0] for frame in read_frames(clip, 3)] == [0, 80, 200]
    with pytest.raises(PictureError):
        read_frames(clip[: len(clip) // 3])


def test_frames_are_sampled_from_first_to_last():
    assert sample(3, 8) == [0, 1, 2]
    assert sample(100, 4) == [0, 33, 66, 99]
    assert sample(9, 1) == [0]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_a_damaged_clip_is_a_picture_error_and_nothing_else(form):
    frames = [Image.new("RGB", (16, 16), (40 * i, 0, 90)) for i in range(4)]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    whole, rng = buffer.getvalue(), np.random.default_rng(0)
    assert len(read_frames(whole)) == 4
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.5 else whole)
        for at in rng.integers(0, len(damaged), 3):
            damaged[at] ^= int(rng.integers(1, 256))
        try:
            read_frames(bytes(damaged))
        except PictureError:
            refused += 1
    assert refused > 20


def test_normalised_pixels_are_the_references(golden):
    """x / 127.5 - 1, what the device does, is (x / 255 - 0.5) / 0.5; padding is -1."""
    tiles, _ = tile_image(golden_image(337, 336), VISION)
    normal = tiles.astype(np.float32) / np.float32(127.5) - 1
    np.testing.assert_allclose(normal, (tiles.astype(np.float64) / 255 - 0.5) / 0.5, rtol=0, atol=1e-6)
    assert (normal[1, 1:] == -1).all() and normal.min() == -1 and normal.max() == 1


def test_forty_eight_pictures_in_a_row_encode_and_pack():
    tokenizer = DATA / "tokenizer.model"
    small = Vision(tile_px=28, patch_px=7, max_tiles=4)
    shapes = [(20, 20), (28, 56), (60, 30), (90, 90)]
    pictures = tuple(Picture(png(golden_image(*shapes[i % 4]))) for i in range(48))
    encoded = Encoder(tokenizer, small)(Document(("before", *pictures, "after")))
    rows, cols = zip(*(slow_canvas(*shapes[i % 4], 28, 4) for i in range(48)), strict=True)
    n_tiles = [r * c + (r * c > 1) for r, c in zip(rows, cols, strict=True)]
    assert encoded.skip == "" and encoded.pictures[:, 2].tolist() == n_tiles
    window = pack_window([encoded], 64, 8, np.random.default_rng(0))
    assert window.tile_counts.sum() == len(encoded.tiles) and window.skipped == {}
    patches = (window.rows.tokens == Tokenizer(tokenizer).patch).sum()
    assert patches == len(encoded.tiles) * small.tokens_per_tile
