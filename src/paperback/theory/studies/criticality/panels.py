"""The figure of the study, one panel for each part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from paperback.study import Run
from paperback.study.figures import BASELINE, METHOD, PALETTE, REFERENCE, WIDE, direct_labels, style
from paperback.theory.studies.criticality.flow import FLOW_DEPTH, FLOW_WIDTH, MeasuredFlow
from paperback.theory.studies.criticality.networks import ACTIVATIONS
from paperback.theory.studies.criticality.training import CLASSES, INITIALIZATIONS
from paperback.theory.studies.criticality.width import Spread


def draw_panels(
    run: Run,
    flows: dict[str, MeasuredFlow],
    accuracies: dict[tuple[str, int], dict[str, list[float]]],
    spreads: Sequence[Spread],
) -> None:
    depth = max(depth for _, depth in accuracies)
    with style():
        figure = Figure(figsize=(2 * WIDE[0], WIDE[1]))
        flow_axes, training_axes, width_axes = figure.subplots(1, 3, width_ratios=(1, 1.25, 1))
        _panel_flow(flow_axes, flows)
        _panel_training(training_axes, {name: accuracies[name, depth] for name in ACTIVATIONS}, depth)
        _panel_width(width_axes, [s for s in spreads if s.seed == run.seed])
    run.figure(
        "criticality",
        figure,
        "Left: fluctuations of random networks of width 64, measured (points, three standard errors) and "
        "predicted (lines; for ReLU the resummed form). Middle: test accuracy after three epochs, ranges "
        "over the seeds. Right: spread of the output's log-norm; every point is one width and depth.",
        "Three panels: curves that rise with depth over width with the points on them, bars of which the "
        "critical ones are high for all four activations, and points of all widths on common curves.",
    )


def _panel_flow(axes: Axes, flows: dict[str, MeasuredFlow]) -> None:
    ratio = np.arange(FLOW_DEPTH) / FLOW_WIDTH
    for (name, flow), colour in zip(flows.items(), PALETTE, strict=False):
        vertex = flow.measured[0]["V/(n K^2)"]
        predicted = flow.theory.relative_vertex if flow.theory.resummed is None else flow.theory.resummed
        axes.plot(ratio, predicted, color=colour, label=name)
        error = 3 * np.asarray(vertex.standard_error)
        axes.errorbar(ratio, vertex.value, error, color=colour, fmt="o", markersize=3.5, elinewidth=1)
    axes.set(xlabel="depth / width", ylabel="V / (n K²)", title="Fluctuations of the signal")
    direct_labels(axes)


def _panel_training(axes: Axes, accuracies: dict[str, dict[str, list[float]]], depth: int) -> None:
    colours = (REFERENCE, PALETTE[4], BASELINE, PALETTE[3], METHOD)
    for i, (key, colour) in enumerate(zip(INITIALIZATIONS, colours, strict=True)):
        found = np.array([accuracies[name][key] for name in accuracies])
        mean = found.mean(1)
        place = np.arange(len(found)) + (i - 2) * 0.16
        axes.bar(place, mean, 0.15, color=colour, label=key)
        axes.errorbar(
            place,
            mean,
            [mean - found.min(1), found.max(1) - mean],
            fmt="none",
            ecolor="#1F2933",
            elinewidth=1,
        )
    axes.axhline(1 / CLASSES, color=REFERENCE, linestyle=":", linewidth=1)
    axes.set_xticks(range(len(accuracies)), list(accuracies))
    axes.set(ylabel="test accuracy", title=f"Training at depth {depth}", ylim=(0, 1))
    axes.legend(ncols=3, loc="upper left", fontsize=9)


def _panel_width(axes: Axes, spreads: Sequence[Spread]) -> None:
    for width, colour in zip(sorted({s.width for s in spreads}), PALETTE, strict=False):
        for name, marker in (("ReLU", "o"), ("tanh", "^")):
            of = [s for s in spreads if (s.activation, s.width) == (name, width)]
            label = f"width {width}" if name == "ReLU" else None
            axes.plot([s.depth / s.width for s in of], [s.std for s in of], marker, color=colour, label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="depth / width", ylabel="standard deviation of log |z|",
        title="From network to network",
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xticks([0.03, 0.1, 0.3, 1.0])
    axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1.0])
    axes.legend(title="circles ReLU, triangles tanh", fontsize=8, loc="upper left")
