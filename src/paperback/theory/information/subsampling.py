"""Subsampling: how far an estimate spreads when the sample is another one, without a model of it.

Random subsets of b of N rows, drawn without replacement, vary around each other as estimates from N fresh
rows do, up to the factor sqrt(b / (N - b)) (finite-population correction); for halves it is 1. This is the
standard error of the estimate about its own mean. It says nothing of the bias, which for entropies depends on
the number of rows: the subsets' own mean is not used as an estimate unless all rows are too many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paperback.errors import DataError


class Subsampled(NamedTuple):
    """Estimates on random subsets.

    Attributes:
        mean: over subsets, ``(entries,)``.
        standard_error: of an estimate from all rows, ``(entries,)``.
    """

    mean: NDArray[np.float64]
    standard_error: NDArray[np.float64]


def subsample(
    estimate: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    n: int,
    size: int | None = None,
    repeats: int = 20,
    seed: int = 0,
) -> Subsampled:
    """Estimate on random subsets of the rows.

    Args:
        estimate: takes row numbers, gives one or several numbers.
        n: rows there are.
        size: rows of a subset, 2 <= size < n; half of them if not given.
        repeats: subsets, >= 2.
        seed: of the subsets.

    Returns:
        Mean and standard error.

    Raises:
        DataError: if size or repeats is out of range.

    Source:
        Politis, Romano and Wolf, Subsampling (1999), section 2.
    """
    size = n // 2 if size is None else size
    if not 2 <= size < n or repeats < 2:
        raise DataError(
            f"size is {size} of {n} rows, repeats {repeats}; give 2 to {n - 1} rows and at least two repeats."
        )
    rng = np.random.default_rng(seed)
    draws = np.stack(
        [
            np.asarray(estimate(np.sort(rng.choice(n, size, replace=False))), np.float64)
            for _ in range(repeats)
        ]
    )
    return Subsampled(draws.mean(0), draws.std(0, ddof=1) * math.sqrt(size / (n - size)))
