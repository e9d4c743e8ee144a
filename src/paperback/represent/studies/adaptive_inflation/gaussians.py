"""Part 1: what more data do to the augmentation graph of two Gaussians, and theorem 3.1 on histograms."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from paperback.represent.adaptive_inflation import (
    augmentation_graph,
    total_variation,
    total_variation_mixture,
)
from paperback.study import Run
from paperback.study.figures import PALETTE, REFERENCE, WIDE, style

VARIANCE = 0.7  # of the two Gaussians at (-1, 0) and (1, 0)
K = 3  # the eigenvalue that is watched is the fourth
CONNECTED = 0.02  # lambda_{k+1} from which the graph counts as connected
RADII = (0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
DRAWS = 6  # independent sets of points for each seed

Points = NDArray[np.float64]


def gaussians(run: Run) -> None:
    """lambda_4, the labelling error and the radius that connects the graph, for several numbers of points."""
    sizes = run.size(smoke=(30, 100), standard=(100, 300, 1000))
    few, many = sizes[0], sizes[-1]
    values: dict[tuple[int, float], list[float]] = {}
    errors: dict[tuple[int, float], list[float]] = {}
    thresholds: dict[int, list[float]] = {n: [] for n in sizes}
    for seed in run.track(run.seeds, "Gaussians"):
        for n in sizes:
            rng = np.random.default_rng([seed, n])
            draws = [_two_gaussians(n, rng)[0] for _ in range(run.size(smoke=1, quick=2, standard=DRAWS))]
            thresholds[n].append(float(np.mean([_connecting_radius(points) for points in draws])))
            for radius in RADII:
                values.setdefault((n, radius), []).append(_lambda(draws, radius))
                errors.setdefault((n, radius), []).append(_labelling_error(n, radius, seed, run))
    rows = [
        {
            "points": n,
            "radius": r,
            "lambda_4": np.mean(values[n, r]),
            "labelling error": np.mean(errors[n, r]),
        }
        for n in sizes
        for r in RADII
    ]
    run.table(
        "graph", rows, "Two Gaussians: the fourth eigenvalue and the labelling error, means over seeds."
    )
    ratio = np.mean(values[many, 0.5]) / (np.mean(values[few, 0.5]) + 1e-12)
    run.claim(
        f"{many:,} points make the graph at r = 0.5 better connected than 1.5 times that of {few} points",
        paper="inflation raises lambda_{k+1}: a graph of fewer data is a random part of that of more",
        measured=values[many, 0.5],
        baseline=[1.5 * value for value in values[few, 0.5]],
        at_least=0.0,
        note=f"lambda_4 against 1.5 times that of {few} points; the ratio of the means is {ratio:.1f}.",
    )
    apart = [max(abs(errors[many, r][i] - errors[few, r][i]) for r in RADII) for i in range(len(run.seeds))]
    run.claim(
        "The labelling error is set by the radius, not by the number of points",
        paper="inflation leaves the labelling error alpha alone",
        measured=apart,
        at_most=0.01,
        note=f"Largest difference over all radii between {many:,} and {few} points; Monte Carlo, "
        "views that fall on the other side of the Bayes boundary than their point.",
    )
    run.claim(
        f"With {many:,} points the graph connects at a radius at least 20 % smaller than with {few}",
        paper="more data, weaker augmentation suffices",
        measured=[a / b for a, b in zip(thresholds[many], thresholds[few], strict=True)],
        at_most=0.8,
        note=f"Ratio of the radii where lambda_4 first reaches {CONNECTED}, each the mean over several sets "
        f"of points; in the mean {np.mean(thresholds[many]):.2f} and {np.mean(thresholds[few]):.2f}. It is "
        "the farthest points of the tails that join last, and more points have farther ones, so that this "
        "radius falls slowly.",
    )
    _draw_graph(run, sizes, values, errors)


def _two_gaussians(n: int, rng: np.random.Generator) -> tuple[Points, NDArray[np.int64]]:
    labels = rng.integers(0, 2, n)
    centres = np.stack([2.0 * labels - 1, np.zeros(n)], 1)
    return centres + np.sqrt(VARIANCE) * rng.normal(size=(n, 2)), labels


def _lambda(draws: list[Points], radius: float) -> float:
    """lambda_{k+1}, the mean over several sets of points."""
    return float(np.mean([augmentation_graph(points, radius, k=K).lambda_after(K) for points in draws]))


def _connecting_radius(points: Points) -> float:
    """The radius at which lambda_{k+1} first reaches the threshold, to 0.005, by bisection."""
    low, high = 0.1, 1.5
    while high - low > 0.005:
        middle = (low + high) / 2
        connected = augmentation_graph(points, middle, k=K).lambda_after(K) >= CONNECTED
        low, high = (low, middle) if connected else (middle, high)
    return high


def _labelling_error(n: int, radius: float, seed: int, run: Run) -> float:
    """How often a view's class is not that of its point, over many sets of n points."""
    total = run.size(smoke=2_000, standard=200_000)
    rng = np.random.default_rng([seed, n, round(1000 * radius)])
    points, _ = _two_gaussians(max(total // n, 1) * n, rng)
    angle, length = rng.uniform(0, 2 * np.pi, len(points)), radius * np.sqrt(rng.uniform(size=len(points)))
    view = points[:, 0] + length * np.cos(angle)
    return float(np.mean((view > 0) != (points[:, 0] > 0)))


def mixture_identity(run: Run) -> None:
    """Theorem 3.1 on random histograms."""
    worst = []
    for seed in run.seeds:
        rng = np.random.default_rng([seed, 31])
        errors = []
        for _ in range(run.size(smoke=10, standard=1000)):
            p, q = rng.dirichlet(np.full(50, 0.3), size=2)
            beta = rng.uniform(0.01, 1)
            mixed = total_variation(beta * p + (1 - beta) * q, p)
            errors.append(abs(mixed - total_variation_mixture(beta, total_variation(q, p))))
        worst.append(max(errors))
    run.claim(
        "TV(beta P_d + (1 - beta) P_g, P_d) = (1 - beta) TV(P_g, P_d)",
        paper="theorem 3.1, exactly",
        measured=worst,
        at_most=1e-12,
        note="Largest error over random histograms of 50 cells.",
    )


def _draw_graph(
    run: Run,
    sizes: tuple[int, ...],
    values: dict[tuple[int, float], list[float]],
    errors: dict[tuple[int, float], list[float]],
) -> None:
    with style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots(1, 2)
        for n, colour in zip(sizes, PALETTE, strict=False):
            axes[0].plot(RADII, [np.mean(values[n, r]) for r in RADII], color=colour, label=f"{n:,} points")
            axes[1].plot(RADII, [np.mean(errors[n, r]) for r in RADII], color=colour)
        axes[0].axhline(CONNECTED, color=REFERENCE, linewidth=0.8, linestyle="--")
        axes[0].set(title="Connection", xlabel="radius of the augmentation", ylabel="λ₄ of the graph")
        axes[1].set(title="Wrong labels", xlabel="radius of the augmentation", ylabel="labelling error α")
        axes[0].legend(loc="upper left")
    run.figure(
        "graph",
        figure,
        caption="Two Gaussians, augmented by uniform noise in a disc. Left: more points connect the graph at "
        "a smaller radius (dashed: the threshold). Right: the share of views that end up in the other class "
        "depends on the radius alone; the lines lie on each other.",
        alt="Two panels over the radius. Left, the fourth eigenvalue rises from 0 to nearly 1, earlier for "
        "more points. Right, the labelling error rises along one common line.",
    )
