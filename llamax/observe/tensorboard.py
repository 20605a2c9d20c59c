"""TensorBoard: scalars, pictures with captions, expert loads as a heat map, the configuration as a table.

A thin layer over tensorboardX that adds what it lacks: captions under pictures, silence about values that are not
finite (a gap in the curve; the step counts them), and resuming without doubled steps.
"""

from __future__ import annotations

import json
import logging
import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tensorboardX import SummaryWriter

from llamax.config_dict import flat
from llamax.observe.log import FULL

CELL_PX = 18  # of the heat map
TIME_PX, MAP_PX = 600, 2000  # width of the heat map over time, and its height where many experts are a pixel each
TILE_PX = 200  # width of a picture with its caption
COLUMNS = 4  # of pictures
FONT_PX = 22  # TensorBoard shows a sheet at a third of its size
# Load relative to an even share -> colour: nothing is black, too little blue, an even share white, too much red.
RAMP_LEVELS = (0.0, 0.05, 1.0, 3.0)
RAMP_COLOURS = ((0, 0, 0), (20, 60, 160), (255, 255, 255), (200, 20, 20))


class TensorBoard:
    """The event files of one run; a context manager.

    Names have slashes: loss/next_token, loss/source/python, loss/lang/en, optim/lr, optim/grad_norm,
    speed/tokens_per_s, experts/layer_07/max_over_mean, norms/gradient/layer_07, goodput/step.
    """

    def __init__(self, folder: str | Path | None, start_step: int = 0):
        """Events beyond `start_step`, of a run that got further before it died, are hidden; from step 0, all are.

        `folder` None: nothing is written (another process does).
        """
        self._folder, self._warned = folder and str(folder), False
        self._writer = self._open(start_step + 1 if start_step > 0 else 0)

    def _open(self, purge_step: int | None) -> SummaryWriter:
        return SummaryWriter(
            self._folder,
            write_to_disk=self._folder is not None,
            purge_step=purge_step,
            max_queue=10_000,  # far more than one step adds: none of them waits for a thread that has just died
            flush_secs=2,  # a kill loses what is not written
            filename_suffix=f".{time.time_ns()}",  # two starts in one second must not share a file
        )

    def rewind(self, step: int) -> None:
        """The run has gone back to step `step`: what was written beyond it is hidden."""
        self.close()
        self._writer = self._open(step + 1 if step > 0 else 0)

    def _do(self, method: str, *args, **named) -> None:
        """Calls the writer; what a full disk does not take is left out, with one warning.

        A full disk ends the thread that writes, and sooner or later an event would wait for it forever: a new file.
        """
        if self._folder is None:
            return
        try:
            if not self._writer.file_writer.event_writer._worker.is_alive():
                self._writer = self._open(None)
            getattr(self._writer, method)(*args, **named)
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not self._warned:
                logging.getLogger("llamax").warning("the disk is full: TensorBoard misses some points")
            self._warned = True

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point on each curve; what is not finite is left out."""
        for name, value in values.items():
            if math.isfinite(value):
                self._do("add_scalar", name, float(value), step)

    def pictures(self, tag: str, images: Sequence[np.ndarray], captions: Sequence[str], step: int) -> None:
        """Pictures, uint8 [height, width, 3] of any sizes, each above its caption, on one sheet."""
        tiles = [captioned(image, caption) for image, caption in zip(images, captions, strict=True)]
        if tiles:
            self._do("add_image", tag, sheet(tiles), step, dataformats="HWC")

    def picture(self, tag: str, image: np.ndarray, step: int) -> None:
        """One, uint8 [height, width, 3], as it is."""
        self._do("add_image", tag, image, step, dataformats="HWC")

    def expert_loads(self, load_LE: np.ndarray, layers: Sequence[int], step: int) -> None:
        """A heat map under experts/load, a row a layer, a column an expert; colours as in RAMP_COLOURS."""
        self.picture("experts/load", heat_map(load_LE, layers), step)

    def expert_loads_over_time(self, load_SLE: np.ndarray, steps: Sequence[int], layers: Sequence[int]) -> None:
        """A heat map under experts/load_over_time: a column for each of S steps; a band a layer, a row an expert."""
        image = time_map(load_SLE, steps, layers)
        self._do("add_image", "experts/load_over_time", image, steps[-1], dataformats="HWC")

    def text(self, tag: str, markdown: str, step: int) -> None:
        self._do("add_text", tag, markdown, step)

    def config(self, config: Mapping[str, Any], step: int = 0) -> None:
        """The resolved configuration, nested dicts, as a table."""
        cells = {key: json.dumps(value).replace("|", "\\|") for key, value in flat(config).items()}
        rows = [f"| {key} | {value} |" for key, value in cells.items()]
        self.text("config", "\n".join(["| key | value |", "|---|---|", *rows]), step)

    def close(self) -> None:
        self._do("close")


def heat_map(load_LE: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """Loads of [L, E] experts as a picture, uint8 [height, width, 3], with the layers' numbers at the left."""
    cells = colours(load_LE).repeat(CELL_PX, 0).repeat(CELL_PX, 1)
    return _labelled(cells, {row * CELL_PX: f"{layer}" for row, layer in enumerate(layers)})


def time_map(load_SLE: np.ndarray, steps: Sequence[int], layers: Sequence[int]) -> np.ndarray:
    """Loads at S steps as a picture: time to the right, a band for each layer, in it a row for each expert.

    The numbers at the left are the layers'; the first and last step stand below.
    """
    rgb_SLEC = colours(load_SLE)
    width = max(1, TIME_PX // len(steps))
    row = max(1, min(CELL_PX // 2, MAP_PX // load_SLE[0].size))
    bands, labels, height = [], {}, 0
    for number, layer in enumerate(layers):
        band = rgb_SLEC[:, number].swapaxes(0, 1).repeat(row, 0).repeat(width, 1)
        gap = np.full((FONT_PX, band.shape[1], 3), 255, np.uint8)
        labels[height] = f"{layer}"
        bands += [band, gap]
        height += len(band) + len(gap)
    cells = np.concatenate(bands)
    out = Image.fromarray(_labelled(cells, labels))
    draw = ImageDraw.Draw(out)
    first, last = f"step {steps[0]}", f"{steps[-1]}"
    draw.text((out.width - cells.shape[1], height - FONT_PX), first, fill="black", font=_font())
    draw.text((out.width - draw.textlength(last, _font()), height - FONT_PX), last, fill="black", font=_font())
    return np.asarray(out)


def colours(load: np.ndarray) -> np.ndarray:
    """Loads [..., E] relative to an even share as colours of the ramp, uint8 [..., E, 3]."""
    load = np.nan_to_num(np.asarray(load, np.float64))
    even = np.maximum(load.mean(-1, keepdims=True), 1e-30)
    rgb = [np.interp(load / even, RAMP_LEVELS, channel) for channel in zip(*RAMP_COLOURS, strict=True)]
    return np.stack(rgb, -1).astype(np.uint8)


def _labelled(cells: np.ndarray, labels: Mapping[int, str]) -> np.ndarray:
    """A picture with texts at its left, at these heights."""
    margin = 2 * CELL_PX
    out = Image.new("RGB", (margin + cells.shape[1], cells.shape[0]), "white")
    out.paste(Image.fromarray(cells), (margin, 0))
    draw = ImageDraw.Draw(out)
    for height, label in labels.items():
        draw.text((2, height + 2), label, fill="black", font=_font())
    return np.asarray(out)


def captioned(image: np.ndarray, caption: str) -> Image.Image:
    """A picture, enlarged in whole steps or reduced to the sheet's width, with its caption below."""
    assert image.dtype == np.uint8 and image.ndim == 3, (image.dtype, image.shape)
    height, width = image.shape[:2]
    scale = max(TILE_PX // width, 1) if width <= TILE_PX else TILE_PX / width
    picture = Image.fromarray(image).resize((round(width * scale), max(round(height * scale), 1)), Image.Resampling.BOX)
    per_line = int(TILE_PX / (0.55 * FONT_PX))
    lines = [piece for line in caption.splitlines() for piece in textwrap.wrap(line, per_line) or [""]]
    row_px = FONT_PX + 4
    out = Image.new("RGB", (TILE_PX, picture.height + row_px * len(lines) + 6), "white")
    out.paste(picture, ((TILE_PX - picture.width) // 2, 0))
    draw = ImageDraw.Draw(out)
    for i, line in enumerate(lines):
        draw.text((2, picture.height + 2 + row_px * i), line, fill="black", font=_font())
    return out


def sheet(tiles: Sequence[Image.Image]) -> np.ndarray:
    """Tiles in rows of COLUMNS, uint8 [height, width, 3]."""
    rows = [tiles[i : i + COLUMNS] for i in range(0, len(tiles), COLUMNS)]
    gap = 6
    heights = [max(tile.height for tile in row) + gap for row in rows]
    out = Image.new("RGB", (min(len(tiles), COLUMNS) * (TILE_PX + gap), sum(heights)), "white")
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            out.paste(tile, (c * (TILE_PX + gap), sum(heights[:r])))
    return np.asarray(out)


def _font():
    return ImageFont.load_default(FONT_PX)
