"""Quality against cost: one point per contender, and the front of those that nothing beats in both.

A contender is on the Pareto front when no other is at least as good and at least as cheap, and better in one
of the two. Labels stand at their points, at the first of several places where they cover neither a point nor
another label. Methods and baselines differ in shape as well as in colour, so that the figure reads without
colour.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from paperback.compare.bench import Kind
from paperback.compare.leaderboard import Leaderboard, Row, Spread
from paperback.study.encoding import write_atomically
from paperback.study.figures import BASELINE, METHOD, REFERENCE, style
from paperback.study.wording import size

FILE_NAME = "quality-against-cost.png"
LOOK: dict[Kind, tuple[str, str]] = {
    "method": (METHOD, "o"),
    "baseline": (BASELINE, "s"),
}  # colour and marker

Point = tuple[Row, Spread, Spread]  # row, cost, quality


def pareto_front(
    costs: Sequence[float], qualities: Sequence[float], better: Literal["higher", "lower"]
) -> list[int]:
    """Which points no other beats: is at least as cheap and as good as, and better in one of the two.

    Args:
        costs: of each point; lower is better.
        qualities: of each point.
        better: whether "higher" or "lower" quality is better.

    Returns:
        Positions on the front, cheapest first; equal points are all on it.
    """
    sign = 1.0 if better == "lower" else -1.0
    points = [(cost, sign * quality) for cost, quality in zip(costs, qualities, strict=True)]
    front = [
        index
        for index, (cost, loss) in enumerate(points)
        if not any(c <= cost and q <= loss and (c, q) != (cost, loss) for c, q in points)
    ]
    return sorted(front, key=lambda index: points[index])


def points_of(leaderboard: Leaderboard) -> list[Point]:
    """The contenders that can be drawn: those with both a cost above zero and a quality."""
    points = []
    for row in leaderboard.rows:
        cost, quality = leaderboard.cost_of(row), row.metrics.get(leaderboard.primary.name)
        if cost is not None and quality is not None and cost.mean > 0:
            points.append((row, cost, quality))
    return points


def alternative_text(leaderboard: Leaderboard) -> str:
    """What the figure shows, in words, for those who do not see it."""
    points = points_of(leaderboard)
    front = [points[index][0].label for index in _front(points, leaderboard)]
    return (
        f"{leaderboard.primary.label} of {len(points)} contenders against their cost, on a logarithmic axis. "
        f"On the Pareto front, from the cheapest: {', '.join(front)}."
    )


def draw(leaderboard: Leaderboard) -> Figure:
    """Draw quality against cost.

    Args:
        leaderboard: with at least one contender that has both.

    Returns:
        The figure, 7.2 by 4.6 inches, on white.
    """
    points = points_of(leaderboard)
    middles = [(cost.mean, quality.mean, row.label) for row, cost, quality in points]
    front = [middles[index][:2] for index in _front(points, leaderboard)]
    with style():
        figure = Figure(figsize=(7.2, 4.6), dpi=160)
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        _draw_axes(axes, leaderboard, points)
        axes.plot(
            [cost for cost, _ in front],
            [quality for _, quality in front],
            drawstyle="steps-post",  # what one cost buys, a higher one buys too
            color=REFERENCE,
            linewidth=1.2,
            alpha=0.6,
            zorder=1,
            label="Pareto front",
        )
        for kind, (colour, marker) in LOOK.items():
            _draw_points(axes, [point for point in points if point[0].kind == kind], kind, colour, marker)
        axes.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderpad=0)
        _label_points(axes, middles, front)
    return figure


def write_figure(leaderboard: Leaderboard) -> bytes | None:
    """Draw the figure into the leaderboard's folder, as PNG.

    Args:
        leaderboard: what to draw.

    Returns:
        The PNG; None, and no file, where no contender has both a cost and a quality.
    """
    path = leaderboard.folder / FILE_NAME
    if not points_of(leaderboard):
        path.unlink(missing_ok=True)
        return None
    buffer = io.BytesIO()
    with style():
        draw(leaderboard).savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
    return buffer.getvalue()


def _front(points: Sequence[Point], leaderboard: Leaderboard) -> list[int]:
    costs, qualities = [cost.mean for _, cost, _ in points], [quality.mean for _, _, quality in points]
    better: Literal["higher", "lower"] = "higher" if leaderboard.primary.better == "higher" else "lower"
    return pareto_front(costs, qualities, better)


def _draw_points(axes: Axes, points: Sequence[Point], name: str, colour: str, marker: str) -> None:
    """One kind of contender, with the intervals of quality and cost."""
    if not points:
        return
    costs, qualities = [cost for _, cost, _ in points], [quality for _, _, quality in points]
    below, above = _reach(costs)
    # A t interval of a cost may reach below zero, which a logarithmic axis does not have.
    below = [min(length, 0.9 * cost.mean) for length, cost in zip(below, costs, strict=True)]
    axes.errorbar(
        [cost.mean for cost in costs],
        [quality.mean for quality in qualities],
        xerr=[below, above],
        yerr=_reach(qualities),
        fmt=marker,
        color=colour,
        markersize=7,
        markerfacecolor="white" if name == "baseline" else colour,
        markeredgewidth=1.6,
        elinewidth=1.0,
        zorder=2,
        label=name,
    )


def _reach(spreads: Sequence[Spread]) -> tuple[list[float], list[float]]:
    """How far the intervals reach below and above the means; nothing where there is no interval."""
    below = [spread.mean - spread.low if spread.low is not None else 0.0 for spread in spreads]
    above = [spread.high - spread.mean if spread.high is not None else 0.0 for spread in spreads]
    return below, above


def _draw_axes(axes: Axes, leaderboard: Leaderboard, points: Sequence[Point]) -> None:
    """A logarithmic axis of the cost, a linear one of the quality, each saying which way is better."""
    cost, primary = leaderboard.cost, leaderboard.primary
    costs = [spread.mean for _, spread, _ in points]
    axes.set_xscale("log")
    room = max(3.0, (max(costs) / min(costs)) ** 0.15)  # for error bars, and on the right for labels
    axes.set_xlim(min(costs) / room, max(costs) * room**1.5)
    axes.margins(y=0.14)
    # Over a few decades, ticks at the powers of ten alone would leave the axis nearly bare.
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if max(costs) / min(costs) < 3000 else (1.0,)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    unit = cost.unit if cost else "s"
    writer = {"s": _tick_seconds, "B": lambda n: size(round(n))}.get(unit)
    if writer is not None:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: writer(value)))
        unit = ""  # it stands at the ticks
    axes.set_xlabel(f"{_with_unit(cost.label if cost else 'time of the whole job', unit)}   (← cheaper)")
    arrow = "higher is better →" if primary.better == "higher" else "← lower is better"
    axes.set_ylabel(f"{_with_unit(primary.label, primary.unit)}   ({arrow})")


def _with_unit(label: str, unit: str) -> str:
    return f"{label} [{unit}]" if unit else label


def _tick_seconds(seconds: float) -> str:
    """Ticks keep one unit on either side of a second: 300 s reads better on an axis than 5 min 00 s."""
    return f"{seconds * 1000:.3g} ms" if seconds < 0.9995 else f"{seconds:,.0f} s"


def _label_points(
    axes: Axes, points: Sequence[tuple[float, float, str]], front: Sequence[tuple[float, float]]
) -> None:
    """Write the labels, each at the first place about its point where it is free; the place that overlaps
    least, if none is.
    """
    places: list[tuple[float, float, Any, Any]] = [
        (10, 7, "left", "bottom"),
        (-10, 7, "right", "bottom"),
        (10, -7, "left", "top"),
        (-10, -7, "right", "top"),
        (0, 14, "center", "bottom"),
        (0, -14, "center", "top"),
        (10, 22, "left", "bottom"),
        (10, -22, "left", "top"),
        (-10, 22, "right", "bottom"),
        (-10, -22, "right", "top"),
    ]
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # places and sizes are known only after the layout
    marks = [
        Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in axes.transData.transform([p[:2] for p in points])
    ]
    taken = [*marks, *_line_boxes(axes, front)]
    for (x, y, text), own in zip(points, marks, strict=True):
        candidates: list[tuple[float, int, Bbox, tuple[float, float, Any, Any]]] = []
        for dx, dy, horizontal, vertical in places:
            label = axes.annotate(
                text,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=9,
            )
            box = label.get_window_extent()
            label.remove()
            covered = sum(_overlap(box, other) for other in taken if other is not own)
            outside = _area(box) - _overlap(box, axes.bbox)
            candidates.append((covered + outside, len(candidates), box, (dx, dy, horizontal, vertical)))
        _, _, box, (dx, dy, horizontal, vertical) = min(candidates, key=lambda candidate: candidate[:2])
        axes.annotate(
            text,
            (x, y),
            (dx, dy),
            textcoords="offset points",
            ha=horizontal,
            va=vertical,
            fontsize=9,
        )
        taken.append(box)


def _line_boxes(axes: Axes, front: Sequence[tuple[float, float]]) -> list[Bbox]:
    """Thin boxes about the steps of the front, in pixels."""
    corners = axes.transData.transform(front)
    boxes = []
    for (x, y), (next_x, next_y) in itertools.pairwise(corners):
        boxes.append(Bbox.from_extents(x, y - 2, next_x, y + 2))
        boxes.append(Bbox.from_extents(next_x - 2, min(y, next_y), next_x + 2, max(y, next_y)))
    return boxes


def _area(box: Bbox) -> float:
    return float(box.width * box.height)


def _overlap(a: Bbox, b: Bbox) -> float:
    common = Bbox.intersection(a, b)
    return _area(common) if common is not None else 0.0
