"""The house style of figures: colours that colour-blind readers tell apart, thin lines, labels at the lines.

Figures are made with `matplotlib.figure.Figure`, never with pyplot, so that no state of the user's session is
touched:

    with style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots()
        axes.plot(iterations, residuals, label="Anderson")
        direct_labels(axes)
    run.figure("residuals", figure, caption="...", alt="...")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from paperback.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, ordered so that neighbours differ in lightness too. Black and yellow are left out:
# one is the text, the other too pale for a line.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
METHOD, BASELINE = PALETTE[0], PALETTE[1]  # the paper's method, and what it is measured against
REFERENCE = "#6B7280"  # bars, limits, chance level
HIDDEN = "#F3D9B1"  # a pixel that was not observed

NARROW, WIDE, TALL = (4.8, 3.6), (7.2, 4.0), (7.2, 7.2)  # inches

_INK, _FAINT = "#1F2933", "#D9DEE4"
_STYLE: dict[Any, Any] = {  # matplotlib types the keys as a Literal of all its settings
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "savefig.facecolor": "white",
    "text.color": _INK,
    "xtick.color": _INK,
    "xtick.major.width": 0.7,
    "ytick.color": _INK,
    "ytick.major.width": 0.7,
}


@contextmanager
def style() -> Iterator[None]:
    """Make and draw figures in the house style inside this block.

    Matplotlib's settings are as before after it.
    """
    from cycler import cycler
    from matplotlib import rc_context

    with rc_context({**_STYLE, "axes.prop_cycle": cycler(color=PALETTE)}):
        yield


def direct_labels(axes: Axes, gap: float = 13.0) -> None:
    """Write each line's label at its right end, in its colour, spread so that they do not overlap.

    Call it last: it reads the limits of the axes, and keeps them.

    Args:
        axes: with lines that have labels; a line without a finite point is not to be seen and gets none.
        gap: least distance between two labels, in points.
    """
    lines, ends = [], []
    for line in axes.get_lines():
        points = np.asarray(line.get_xydata(), dtype=float)
        finite = points[np.isfinite(points).all(axis=1)]
        if len(finite) and not str(line.get_label()).startswith("_"):  # matplotlib's mark for "no label"
            lines.append(line)
            ends.append((float(finite[-1, 0]), float(finite[-1, 1])))
    if not lines:
        return
    axes.set_xlim(axes.get_xlim())  # labels must not move the limits that they are placed by
    axes.set_ylim(axes.get_ylim())
    heights = axes.transData.transform(ends)[:, 1] * 72 / axes.get_figure(root=True).dpi  # type: ignore[union-attr]
    for line, end, shift in zip(lines, ends, spread(heights, gap) - heights, strict=True):
        axes.annotate(
            str(line.get_label()),
            end,
            xytext=(6, shift),
            textcoords="offset points",
            color=line.get_color(),
            va="center",
            annotation_clip=False,
        )


def spread(positions: ArrayLike, gap: float) -> np.ndarray:
    """Move positions apart as little as needed, in the least-squares sense.

    Args:
        positions: ``(n,)``, any order.
        gap: least distance, >= 0.

    Returns:
        New positions ``(n,)`` in the given order; the order along the axis is kept.
    """
    from scipy.optimize import isotonic_regression

    given = np.asarray(positions, dtype=float)
    if len(given) == 0:
        return given
    order = np.argsort(given, kind="stable")
    offsets = gap * np.arange(len(given))
    result = np.empty_like(given)
    # With p_i = q_i + i * gap the constraint on p is that q does not decrease: isotonic regression.
    result[order] = isotonic_regression(given[order] - offsets).x + offsets
    return result


def pixel_grid(
    axes: Axes,
    images: ArrayLike,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw grey images in rows and columns; NaN pixels are shown as not observed.

    Args:
        axes: emptied of ticks and spines.
        images: ``(rows, columns, height, width)``; higher is darker, as ink.
        row_labels: one per row, or none.
        column_labels: one per column, or none.
        limits: values of white and black; those of the images if not given.

    Raises:
        DataError: if the images do not have four dimensions, or labels and images differ in number.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize, to_rgba

    pixels = np.asarray(images, dtype=float)
    if pixels.ndim != 4 or 0 in pixels.shape:
        raise DataError(f"images have shape {pixels.shape}; a grid needs (rows, columns, height, width).")
    rows, columns, height, width = pixels.shape
    for labels, n, what in ((row_labels, rows, "row"), (column_labels, columns, "column")):
        if len(labels) not in (0, n):
            raise DataError(
                f"there are {len(labels)} {what} labels for {n} {what}s; give one for each, or none."
            )
    low, high = limits if limits is not None else (np.nanmin(pixels), np.nanmax(pixels))
    colours = colormaps["gray_r"].with_extremes(bad=HIDDEN)(
        Normalize(low, high)(np.ma.masked_invalid(pixels))
    )
    gap = max(1, round(min(height, width) / 8))
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), to_rgba("white"))
    for row in range(rows):
        for column in range(columns):
            top, left = row * (height + gap), column * (width + gap)
            canvas[top : top + height, left : left + width] = colours[row, column]
    axes.imshow(canvas, interpolation="nearest")
    axes.set_yticks(
        [r * (height + gap) + (height - 1) / 2 for r in range(rows)] if row_labels else [], row_labels or None
    )
    axes.set_xticks(
        [c * (width + gap) + (width - 1) / 2 for c in range(columns)] if column_labels else [],
        column_labels or None,
    )
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.grid(False)
