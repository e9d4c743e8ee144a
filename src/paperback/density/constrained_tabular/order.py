"""In which order the columns are corrected: the first move least, the last make up for them.

The paper's idea is to correct last what the unconstrained model gets most wrong. Four measures of "wrong"
compare real and generated rows, column by column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from paperback.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Ordering = Literal["given", "random", "corr", "kde", "wasserstein", "jsd"]
ORDERINGS: tuple[Ordering, ...] = get_args(Ordering)

ROWS_FOR_DENSITY = 1_000
GRID = 256
BINS = 50


def order_columns(
    how: Ordering,
    columns: Sequence[str],
    real: pd.DataFrame | None = None,
    generated: pd.DataFrame | None = None,
    seed: int = 0,
) -> list[str]:
    """An order of the columns.

    Args:
        how: "given" keeps the order; "random" shuffles; the others put the best-modelled column first: "corr"
            by how well its correlations with the others are met, "kde" by the distance between the densities
            of real and generated cells, "wasserstein" by the distance of that name relative to the spread,
            "jsd" by the Jensen-Shannon divergence of histograms.
        columns: the constrained columns.
        real: real rows; not needed for the first two.
        generated: rows of an unconstrained model; likewise.
        seed: of "random", and of the rows that densities are estimated from.

    Returns:
        The columns, reordered.

    Raises:
        DataError: if there is no such ordering, or rows are needed and not given.
    """
    if how not in ORDERINGS:
        raise DataError(f"order is {how!r}; it must be a list of columns or one of {', '.join(ORDERINGS)}.")
    if how == "given":
        return list(columns)
    rng = np.random.default_rng(seed)
    if how == "random":
        return [str(name) for name in rng.permutation(list(columns))]
    if real is None or generated is None:
        raise DataError(f"the order {how!r} compares real and generated rows; give both, or an order.")
    if how == "corr":
        scores = _correlation_errors(real[list(columns)], generated[list(columns)])
    else:
        measure = {"kde": _density_distance, "wasserstein": _wasserstein, "jsd": _jensen_shannon}[how]
        scores = np.array([measure(_known(real, name), _known(generated, name), rng) for name in columns])
    return [columns[i] for i in np.argsort(scores, kind="stable")]


def _known(frame: pd.DataFrame, name: str) -> NDArray[np.float64]:
    return frame[name].dropna().to_numpy(np.float64)


def _correlation_errors(real: pd.DataFrame, generated: pd.DataFrame) -> NDArray[np.float64]:
    """Mean distance between the real and the generated correlations of each column with the others."""
    gap = (real.astype(float).corr().fillna(0.0) - generated.astype(float).corr().fillna(0.0)).abs()
    return gap.to_numpy().mean(axis=0)


def _density_distance(
    real: NDArray[np.float64], generated: NDArray[np.float64], rng: np.random.Generator
) -> float:
    """Half the area between two kernel density estimates: 0 for equal ones, 1 for separate ones."""
    from scipy.stats import gaussian_kde

    samples = [rng.choice(v, min(len(v), ROWS_FOR_DENSITY), replace=False) for v in (real, generated)]
    both = np.concatenate(samples)
    if any(np.ptp(sample) == 0 for sample in samples):
        return float(len(np.unique(both)) > 1)
    margin = 0.1 * np.ptp(both)
    grid = np.linspace(both.min() - margin, both.max() + margin, GRID)
    first, second = (gaussian_kde(sample)(grid) for sample in samples)
    return float(0.5 * np.trapezoid(np.abs(first - second), grid))


def _wasserstein(
    real: NDArray[np.float64], generated: NDArray[np.float64], rng: np.random.Generator
) -> float:
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(real, generated) / (real.std() or 1.0))


def _jensen_shannon(
    real: NDArray[np.float64], generated: NDArray[np.float64], rng: np.random.Generator
) -> float:
    from scipy.spatial.distance import jensenshannon

    edges = np.histogram_bin_edges(np.concatenate([real, generated]), BINS)
    first, second = (np.histogram(values, edges)[0] for values in (real, generated))
    return float(jensenshannon(first, second) ** 2)
