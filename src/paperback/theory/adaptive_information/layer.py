"""Both informations of one layer at one epoch, as a `Measurement`."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from paperback.errors import DataError
from paperback.theory.information import (
    Estimate,
    EstimatorName,
    InformationEstimator,
    Sample,
    entropy,
    make_estimator,
    subsample,
)
from paperback.theory.information.binning import as_floats
from paperback.theory.interface import Measurement

FEW_ROWS = 100  # fewer make every plug-in entropy doubtful
SATURATION = 0.1  # bits below the ceiling
POINTS = 5000  # rows of a subset, for estimators whose time grows with the square of them
SUBSETS = 5


def mutual_information(
    T: ArrayLike | Tensor,
    y: ArrayLike | Tensor,
    x_ids: ArrayLike | Tensor | None = None,
    estimator: EstimatorName | InformationEstimator = "ebab",
    *,
    x: ArrayLike | Tensor | None = None,
    subsets: int = 0,
    max_points: int = POINTS,
    seed: int = 0,
    **settings: Any,
) -> Measurement:
    """How much a layer's activations tell of the input, I(X;T), and of the label, I(T;Y).

    Args:
        T: activations over all inputs, training and test, ``(n, ...)``; flattened to ``(n, d)``. From 100
            rows on; fewer warn.
        y: ``(n,)`` integer labels.
        x_ids: ``(n,)`` integers, which input a row is; if not given, every row is another input.
        estimator: "ebab", "fixed", "akde", "cs_qmi" or "ksg", or an object of
            `paperback.theory.information`.
        x: the inputs as vectors, ``(n, ...)``, for "cs_qmi" and "ksg".
        subsets: if >= 2, a 95 % interval from so many random halves of the rows: the spread over samples, not
            the bias. It has no meaning when the rows are all the inputs there are.
        max_points: estimators that compare all pairs of rows take random subsets of this size where there are
            more rows; then there is an interval in any case.
        seed: of the subsets.
        **settings: of the estimator: `n_bins` and `low` ("ebab"), `n_bins` and `bin_range` ("fixed"),
            `correction` (both), `noise`, `noise_rule` and `bound`
            ("akde"), `sigma_x` and `sigma_t` ("cs_qmi"), `k`
            ("ksg").

    Returns:
        I(X;T), with I(T;Y) as its part. The interval of "akde" is its pair of bounds. The flag "saturated"
        marks an I(X;T) within 0.1 bit of H(X), where nothing more can be told.

    Raises:
        DataError: if rows differ in number, T is not finite, labels are not integers, or the estimator or a
            setting of it cannot be used.

    Source:
        Chelombiev et al. (2019), section 2.
    """
    sample = make_sample(T, y, x_ids, x)
    return measure(sample, make_estimator(estimator, **settings), subsets, max_points, seed)


# -- one layer -----------------------------------------------------------------------------------------------


def measure(
    sample: Sample,
    estimator: InformationEstimator,
    subsets: int = 0,
    max_points: int = POINTS,
    seed: int = 0,
) -> Measurement:
    """Estimate, with an interval where the estimator bounds or subsets were asked for."""
    n, notes = len(sample), []
    if n < FEW_ROWS:
        warnings.warn(f"information from {n} inputs says little; give at least {FEW_ROWS}.", stacklevel=3)
        notes.append(f"Only {n} inputs.")
    half_width, error, seen = np.zeros(6), np.zeros(6), sample

    def estimate(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return _numbers(estimator.estimate(sample.take(rows)))

    if too_many := estimator.pairwise and n > max_points:
        subsets = subsets or SUBSETS
        seen = sample.take(np.arange(max_points))
        notes.append(f"The mean of {subsets} random subsets of {max_points:,} of {n:,} inputs.")
    if subsets:
        drawn = subsample(estimate, n, max_points if too_many else None, subsets, seed)
        error = drawn.standard_error
        half_width = float(stats.t.ppf(0.975, subsets - 1)) * error
    numbers = drawn.mean if too_many else _numbers(estimator.estimate(sample))
    ceiling = math.log2(len(seen)) if seen.x_ids is None else entropy(seen.x_ids)
    saturated = estimator.unit == "bits" and numbers[0] >= ceiling - SATURATION
    if saturated:
        notes.append(f"I(X;T) has reached H(X) = {ceiling:.2f} bits: every input has a state of its own.")
    xt, ty = (
        _quantity(name, numbers[i::2], half_width[i::2], error[i], n, estimator)
        for i, name in enumerate(("I(X;T)", "I(T;Y)"))
    )
    flags = frozenset({"saturated"} if saturated else ())
    return replace(xt, parts={ty.name: ty}, bias=estimator.bias, notes=tuple(notes), flags=flags)


def _numbers(estimate: Estimate) -> NDArray[np.float64]:
    """Both informations, their lower and their upper bounds."""
    x_low, x_high = estimate.xt_bounds or (estimate.xt, estimate.xt)
    y_low, y_high = estimate.ty_bounds or (estimate.ty, estimate.ty)
    return np.array([estimate.xt, estimate.ty, x_low, y_low, x_high, y_high])


def _quantity(
    name: str,
    numbers: NDArray[np.float64],
    half_width: NDArray[np.float64],
    error: float,
    n: int,
    estimator: InformationEstimator,
) -> Measurement:
    """One of the two informations; `numbers` are value, lower and upper bound, each with its half-width."""
    value, low, high = numbers
    spread = error > 0
    if not (spread or estimator.bounds):
        return Measurement(name, value, unit=estimator.unit, n=n)
    return Measurement(
        name,
        value,
        (low - half_width[1], high + half_width[2]),
        unit=estimator.unit,
        n=n,
        standard_error=error if spread else None,
        confidence=0.95 if spread else None,
    )


# -- checks --------------------------------------------------------------------------------------------------


def make_sample(
    T: ArrayLike | Tensor,
    y: ArrayLike | Tensor,
    x_ids: ArrayLike | Tensor | None,
    x: ArrayLike | Tensor | None,
) -> Sample:
    values = as_rows(T, "T")
    labels = _codes(y, "y", len(values))
    ids = None if x_ids is None else _codes(x_ids, "x_ids", len(values))
    vectors = None if x is None else as_rows(x, "x")
    if vectors is not None and len(vectors) != len(values):
        raise DataError(f"x has {len(vectors)} rows and T {len(values)}; give one input per row of T.")
    return Sample(values, labels, ids, vectors)


def as_rows(values: ArrayLike | Tensor, name: str) -> Float[np.ndarray, "n d"]:
    array = as_floats(values, name)
    if array.ndim == 0:
        raise DataError(f"{name} is a single number; give (n, d).")
    return array.reshape(len(array), -1)


def _codes(values: ArrayLike | Tensor | None, name: str, n: int) -> Int[np.ndarray, " n"]:
    """Integers, numbered from 0."""
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if array.dtype.kind not in "iub":
        what = "missing" if values is None else f"of dtype {array.dtype}"
        raise DataError(f"{name} is {what}; give integers (bin a number first, as with numpy.digitize).")
    if array.shape != (n,):
        raise DataError(f"{name} has shape {array.shape} for {n} rows of T; give one integer per row.")
    return np.unique(array, return_inverse=True)[1]
