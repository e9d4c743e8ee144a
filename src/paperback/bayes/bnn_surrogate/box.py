"""Regressors over a box: inputs are scaled to [0, 1]^d by the bounds of the search, not by the data seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from paperback.bayes.interface import BayesianRegressor
from paperback.errors import DataError

Bounds = Sequence[Sequence[float]]


class BoxRegressor(BayesianRegressor):
    """A regressor that knows the box of its inputs; `bounds` is a parameter of every subclass."""

    _scaling = "unit"
    bounds: Bounds | None

    def _fit_inputs(self, X: NDArray[Any]) -> Tensor:
        if self.bounds is None:
            return super()._fit_inputs(X)
        low, high = check_bounds(self.bounds, X.shape[1])
        check_inside(X, low, high)
        self.input_shift_, self.input_scale_ = low, high - low
        return self._scaled(torch.as_tensor(X, dtype=torch.float64))


def check_bounds(bounds: ArrayLike, features: int | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lower and upper ends of a box.

    Args:
        bounds: ``(2, features)``, lower ends first.
        features: how many there must be, if that is known.

    Returns:
        Lower and upper ends, ``(features,)`` float64 each.

    Raises:
        DataError: if the shape is another one, an end is not finite, or a lower end is not below the upper.
    """
    box = np.asarray(bounds, dtype=np.float64)
    if box.ndim != 2 or len(box) != 2 or (features is not None and box.shape[1] != features):
        wanted = "features" if features is None else features
        raise DataError(f"bounds has shape {box.shape}; give (2, {wanted}), lower ends first.")
    bad = ~(np.isfinite(box).all(0) & (box[0] < box[1]))
    if bad.any():
        i = int(bad.argmax())
        raise DataError(
            f"the bounds of feature {i} are {box[0, i]:g} and {box[1, i]:g}; give a finite lower end below a "
            "finite upper end."
        )
    return box[0], box[1]


def check_inside(X: NDArray[Any], low: NDArray[Any], high: NDArray[Any]) -> None:
    """Raise a `DataError` if a point lies outside the box, rounding apart."""
    slack = 1e-9 * (high - low)
    outside = (low - slack > X) | (high + slack < X)
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        raise DataError(
            f"row {row} has {X[row, column]:g} in feature {column}, outside its bounds {low[column]:g} to "
            f"{high[column]:g}; widen the bounds or leave the row out."
        )
