"""Test error against the number of labelled rows, and how many are enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone

from paperback.errors import DataError
from paperback.represent.evaluate.checks import check_width, checked

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curve:
    """Errors over sizes and repeats.

    Attributes:
        sizes: labelled rows, increasing.
        errors: test errors in [0, 1], ``(sizes, repeats)``.
    """

    sizes: tuple[int, ...]
    errors: Array

    @property
    def mean(self) -> Array:
        """Mean error at each size."""
        return self.errors.mean(1)


def sample_curve(
    probe: Any,
    X: Any,
    y: Any,
    X_test: Any,
    y_test: Any,
    sizes: Sequence[int],
    repeats: int = 5,
    seed: int = 0,
) -> Curve:
    """Fit a probe to random subsets that hold all classes, and test it.

    The subsets of one repeat are nested, and depend on the seed alone, so that two probes with one seed see
    the same rows. The first K rows are one of each class.

    Args:
        probe: a scikit-learn classifier; it is cloned.
        X: features ``(rows, features)`` that subsets are drawn from.
        y: their labels.
        X_test: features.
        y_test: their labels.
        sizes: numbers of rows, from the number of classes to all.
        repeats: random subsets of each size.
        seed: of the subsets.

    Returns:
        The curve.

    Raises:
        DataError: if a size is below the number of classes or above the number of rows.
    """
    x, labels = checked(X, y, "X")
    x_test, labels_test = checked(X_test, y_test, "X_test")
    check_width(x, x_test, ("X", "X_test"))
    classes = np.unique(labels)
    ordered = tuple(sorted({int(size) for size in sizes}))
    if not ordered or ordered[0] < len(classes) or ordered[-1] > len(x):
        raise DataError(
            f"sizes are {list(sizes)}; they must lie between {len(classes)}, the number of classes, and "
            f"{len(x)}, the number of rows."
        )
    if repeats < 1:
        raise DataError(f"repeats is {repeats}; it must be at least 1.")
    errors = np.empty((len(ordered), repeats))
    for repeat in range(repeats):
        order = _covering_order(labels, np.random.default_rng((seed, repeat)))
        for i, size in enumerate(ordered):
            rows = order[:size]
            predictions = clone(probe).fit(x[rows], labels[rows]).predict(x_test)
            errors[i, repeat] = np.mean(predictions != labels_test)
    return Curve(ordered, errors)


def samples_to_converge(curve: Curve, eps: float = 0.01, asymptote: float | None = None) -> int | None:
    """The first size at which the mean error is within eps of its asymptote.

    Args:
        curve: of one probe.
        eps: tolerance.
        asymptote: the error that is approached; the mean error at the largest size if not given.

    Returns:
        A size, or None if the curve does not come so near.
    """
    goal = float(curve.mean[-1]) if asymptote is None else asymptote
    reached = np.flatnonzero(curve.mean <= goal + eps + 1e-12)
    return curve.sizes[int(reached[0])] if len(reached) else None


def _covering_order(labels: NDArray[Any], rng: np.random.Generator) -> NDArray[np.int64]:
    """All rows in random order, one of each class first."""
    order = rng.permutation(len(labels))
    first = np.sort(np.unique(labels[order], return_index=True)[1])
    return np.concatenate([order[first], np.delete(order, first)])
