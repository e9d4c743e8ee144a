"""Logistic regression: each column's weight times its distance from the mean, and an exact certificate."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn import linear_model
from torch import Tensor

from paperback.explain.baselines.base import Baseline
from paperback.explain.interface import Array, Explanation


class LogisticRegression(Baseline):
    """Logistic regression with an L2 penalty on the weights.

    Columns keep their units among each other: bring columns of different units to one scale first. Brought to
    one scale in here, columns that hardly vary would get the largest weights, and no radius would be left.

    Args:
        C: one over the strength of the penalty, for rows of spread 1.
        max_iter: steps of L-BFGS.
        image_shape: (height, width) or (height, width, 3) of rows that are images.

    Attributes:
        coef_: ``(classes, features)`` in the units of X, also with two classes.
        intercept_: ``(classes,)``.
        n_iter_: steps that L-BFGS took.
    """

    coef_: Array
    intercept_: Array
    n_iter_: int

    def __init__(
        self, C: float = 1.0, *, max_iter: int = 1000, image_shape: tuple[int, ...] | None = None
    ) -> None:
        self.C = C
        self.max_iter = max_iter
        self.image_shape = image_shape

    def _fit(self, X: Array, y: NDArray[Any]) -> None:
        scale = float(np.sqrt(X.var(0).mean())) or 1.0
        model = linear_model.LogisticRegression(C=self.C, max_iter=self.max_iter)
        model.fit((X - self.mean_) / scale, y)
        self.n_iter_ = int(model.n_iter_.max())
        weights, constants = model.coef_ / scale, model.intercept_
        if len(self.classes_) == 2:  # one log odds becomes two scores that differ by it
            weights, constants = np.stack([-weights[0], weights[0]]) / 2, np.array([-1, 1]) * constants / 2
        self.coef_, self.intercept_ = weights, constants - weights @ self.mean_

    def scores(self, X: Tensor) -> Tensor:
        """Log probabilities up to a constant of the row."""
        return X @ torch.from_numpy(self.coef_).to(X).T + torch.from_numpy(self.intercept_).to(X)

    def explain(self, X: ArrayLike) -> Explanation:
        """Each column's weight times its distance from the training mean; the offset is the mean's score."""
        rows = self._rows(X)
        contributions = (rows - self.mean_)[:, None, :] * self.coef_
        offsets = np.broadcast_to(self.intercept_ + self.coef_ @ self.mean_, contributions.shape[:2])
        return self._explanation(
            rows, contributions, offsets, self._columns(), certificates=self._certificates(rows)
        )

    def _radii(self, X: Array, y: NDArray[Any]) -> Array:
        """Distances to the nearest hyperplane between y and another class: exact."""
        scores = self._scores(X)
        lead = scores[np.arange(len(X)), y][:, None] - scores
        slope = np.linalg.norm(self.coef_[:, None] - self.coef_, axis=2)[y]
        slope[np.arange(len(X)), y] = 0.0
        never = np.where(lead >= 0, np.inf, -np.inf)  # classes with equal weights keep their order everywhere
        return np.divide(lead, slope, out=never, where=slope > 0).min(1)
