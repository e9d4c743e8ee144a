"""A support vector machine, the ceiling of accuracy, explained by integrated gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.svm import SVC
from torch import Tensor

from paperback.errors import DataError
from paperback.explain.baselines.base import Baseline
from paperback.explain.baselines.gradients import integrated_gradients
from paperback.explain.interface import Array, Explanation


class SVM(Baseline):
    """Each class against the rest, exp(-gamma |x - v|^2).

    Args:
        C: one over the strength of the penalty.
        gamma: of the kernel, relative to one over the number of columns times their mean variance.
        image_shape: (height, width) or (height, width, 3) of rows that are images.

    Attributes:
        support_: rows that any class uses, ``(vectors, features)``.
        dual_: their weights, ``(vectors, classes)``.
        intercept_: ``(classes,)``.
        rate_: gamma in the units of X.
    """

    support_: Array
    dual_: Array
    intercept_: Array
    rate_: float

    def __init__(
        self, C: float = 10.0, *, gamma: float = 1.0, image_shape: tuple[int, ...] | None = None
    ) -> None:
        self.C = C
        self.gamma = gamma
        self.image_shape = image_shape

    def _fit(self, X: Array, y: NDArray[Any]) -> None:
        if not self.gamma > 0 or not self.C > 0:
            raise DataError(f"C is {self.C} and gamma is {self.gamma}; both must be positive.")
        spread = float(X.var())
        self.rate_ = self.gamma / (X.shape[1] * (spread if spread > 0 else 1.0))
        two = len(self.classes_) == 2
        dual = np.zeros((len(X), len(self.classes_)))
        constants = np.zeros(len(self.classes_))
        for label in [1] if two else range(len(self.classes_)):
            machine = SVC(C=self.C, gamma=self.rate_, random_state=0).fit(X, y == label)
            dual[machine.support_, label] = machine.dual_coef_[0]
            constants[label] = machine.intercept_[0]
        if two:  # one decision becomes two scores that differ by it
            dual, constants = np.stack([-dual[:, 1], dual[:, 1]], 1) / 2, constants[1] * np.array([-0.5, 0.5])
        used = (dual != 0).any(1)
        self.support_, self.dual_, self.intercept_ = X[used].copy(), dual[used], constants

    def scores(self, X: Tensor) -> Tensor:
        """Signed distances from each class's boundary, in the space of the kernel."""
        support, dual = torch.from_numpy(self.support_).to(X), torch.from_numpy(self.dual_).to(X)
        squared = X.square().sum(1)[:, None] + support.square().sum(1) - 2 * X @ support.T
        return (-self.rate_ * squared).exp() @ dual + torch.from_numpy(self.intercept_).to(X)

    def explain(self, X: ArrayLike) -> Explanation:
        """Integrated gradients of every class's score from the training mean.

        The offset is the score of the mean; it takes up the error of the integral.
        """
        rows = self._rows(X)
        scores = self._scores(rows)
        x, mean = torch.tensor(rows), torch.from_numpy(self.mean_)
        contributions = np.stack(
            [
                integrated_gradients(lambda z, c=c: self.scores(z)[:, c], x, mean).numpy()
                for c in range(len(self.classes_))
            ],
            1,
        )
        return self._explanation(rows, contributions, scores - contributions.sum(2), self._columns())
