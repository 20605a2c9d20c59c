"""Plots as pictures, uint8 [height, width, 3]: for TensorBoard, and as PNG files. Nothing here opens a window."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

DPI = 110
CELL_INCHES, EDGE_INCHES = 0.75, 1.6


def heat_map(
    values: np.ndarray, *, x: Sequence[str], y: Sequence[str], title: str, x_title: str = "", y_title: str = ""
) -> np.ndarray:
    """Shares, 0 to 1, of [rows, columns], each written in its cell: 0 is red, 1 green. The first row is on top."""
    values = np.asarray(values, float)
    rows, columns = values.shape
    figure, axes = _blank(EDGE_INCHES + 0.6 + CELL_INCHES * columns, EDGE_INCHES + CELL_INCHES * rows * 0.6)
    axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(columns), x)
    axes.set_yticks(range(rows), y)
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8)
    return _drawn(figure, axes, title, x_title, y_title)


def curves(
    x: Sequence[float], ys: Mapping[str, Sequence[float]], *, title: str, x_title: str = "", y_title: str = ""
) -> np.ndarray:
    """Curves over the same points, named in a legend if there are several."""
    figure, axes = _blank(6.4, 3.6)
    for name, y in ys.items():
        axes.plot(x, y, marker="o", markersize=3, label=name)
    if len(ys) > 1:
        axes.legend()
    axes.grid(alpha=0.3)
    return _drawn(figure, axes, title, x_title, y_title)


def scatter(
    points: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str, x_title: str = "", y_title: str = ""
) -> np.ndarray:
    """Points (x, y) by name."""
    figure, axes = _blank(6.4, 3.6)
    for name, (x, y) in points.items():
        axes.scatter(x, y, s=8, alpha=0.5, label=name)
    axes.legend()
    axes.grid(alpha=0.3)
    return _drawn(figure, axes, title, x_title, y_title)


def histogram(
    values: Mapping[str, Sequence[float]], *, title: str, x_title: str = "", y_title: str = "records", bins: int = 30
) -> np.ndarray:
    """How often values fall where, for each kind, one kind on top of the other; bins are those of all together."""
    figure, axes = _blank(6.4, 3.6)
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(of, float) for of in values.values()]), bins)
    axes.hist([np.asarray(of, float) for of in values.values()], edges, stacked=True, label=list(values))
    axes.legend(loc="upper right")  # the best place takes long to find among many values
    axes.grid(alpha=0.3)
    return _drawn(figure, axes, title, x_title, y_title)


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _blank(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # a second to import, and few commands plot

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.add_subplot()


def _drawn(figure: Any, axes: Any, title: str, x_title: str, y_title: str) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
