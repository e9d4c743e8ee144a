"""What studies and comparisons decide with: intervals over seeds, paired bootstrap, Wilcoxon, Holm.

One rule for the interval over seeds everywhere (`mean_interval`). numpy and scipy are imported where they are
used, so that reading a recorded result needs neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from paperback.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

MINIMUM_FOR_T = 5  # fewer values than this give no useful t interval; see mean_interval


class MeanInterval(NamedTuple):
    """A mean, or another estimate, and the interval about it.

    Attributes:
        mean: the estimate.
        low: lower end, <= high.
        high: upper end.
    """

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> MeanInterval:
    """Mean of repeated measurements and how far they spread.

    From five values on, the interval is Student's t interval of the mean. With two to four it is their range:
    the t quantile for two values is 12.7, so that interval says nothing, while the range at least says what
    was seen. One value gives itself, three times.

    Args:
        values: one measurement per seed, at least one.
        confidence: of the t interval, in (0, 1).

    Returns:
        Mean, lower and upper end; all NaN if a value is not finite.

    Raises:
        DataError: if there are no values.
    """
    if len(values) == 0:
        raise DataError("there are no values to take the mean of; give at least one.")
    if not all(math.isfinite(value) for value in values):
        return MeanInterval(math.nan, math.nan, math.nan)
    mean = math.fsum(values) / len(values)
    if len(values) < MINIMUM_FOR_T:
        low, high = min(values), max(values)
        return MeanInterval(min(max(mean, low), high), low, high)  # rounding may carry the mean outside
    from scipy import stats

    standard_error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * standard_error
    return MeanInterval(mean, mean - half, mean + half)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    statistic: Callable[..., np.ndarray] | None = None,
    *,
    n: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> MeanInterval:
    """Interval of ``statistic(a) - statistic(b)`` when the same cases were given to both.

    Cases are drawn with replacement, for a and b together, and the percentiles of the differences are the
    interval.

    Args:
        a: one number per case, ``(cases,)``, for instance whether each test image was classified rightly.
        b: the same for the other model, on the same cases in the same order.
        statistic: takes an array and ``axis``; the mean if not given.
        n: number of bootstrap samples.
        confidence: of the interval, in (0, 1).
        seed: of the draws.

    Returns:
        The observed difference and the ends of its interval.

    Raises:
        DataError: if a and b differ in length, are not one-dimensional, or have fewer than two cases.
    """
    import numpy as np
    from scipy import stats

    first, second = _paired(a, b)
    measure = np.mean if statistic is None else statistic

    def difference(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(measure(x, axis=axis) - measure(y, axis=axis))

    interval = stats.bootstrap(
        (first, second),
        difference,
        n_resamples=n,
        batch=max(1, 2_000_000 // len(first)),  # at most 2 million indices at a time
        vectorized=True,
        paired=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return MeanInterval(float(difference(first, second)), float(interval.low), float(interval.high))


def wilcoxon(
    a: ArrayLike, b: ArrayLike, alternative: Literal["two-sided", "greater", "less"] = "two-sided"
) -> float:
    """p-value of the Wilcoxon signed-rank test that a and b do not differ, pair by pair.

    Args:
        a: one number per pair, ``(pairs,)``: a seed, a data set.
        b: the other measurement of each pair.
        alternative: "greater" asks whether a is larger than b.

    Returns:
        The p-value in [0, 1]; 1 when no pair differs.

    Raises:
        DataError: if a and b differ in length, are not one-dimensional, or have fewer than two pairs.
    """
    import numpy as np
    from scipy import stats

    first, second = _paired(a, b)
    if np.array_equal(first, second):
        return 1.0
    return float(stats.wilcoxon(first, second, alternative=alternative).pvalue)


def holm(p_values: ArrayLike) -> np.ndarray:
    """p-values adjusted for several tests by Holm's step-down method.

    It controls the family-wise error under any dependence between the tests.

    Args:
        p_values: ``(tests,)`` in [0, 1].

    Returns:
        Adjusted p-values in the given order, float64; reject those at or below the level.

    Raises:
        DataError: if a value lies outside [0, 1].
    """
    import numpy as np

    p = np.asarray(p_values, dtype=np.float64).reshape(-1)
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError(f"p_values holds {p.tolist()}; every p-value must lie in 0..1.")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise DataError(
            f"a has shape {first.shape} and b {second.shape}; give one number per case, for the same cases."
        )
    if len(first) < 2:
        raise DataError(f"there are {len(first)} pairs; a paired test needs at least two.")
    return first, second
