"""`LogisticProbe`: the discriminative half of the comparison, multinomial logistic regression."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.represent.generative_classifier.naive_bayes import SCALES, plain_array
from paperback.saving import SavedEstimator
from paperback.training import derive, seeded, train

Array = NDArray[np.float64]

COSTS = tuple(10.0**e for e in range(-3, 4))  # C that cross-validation tries
FOLDS = 5
# The authors' recipe for stochastic gradient descent: the rate falls by 10 after 60 and after 80 epochs.
STAGES, BATCH, MOMENTUM, INITIAL = ((60, 1.0), (20, 0.1), (20, 0.01)), 256, 0.9, 0.01


class LogisticProbe(SavedEstimator, ClassifierMixin, BaseEstimator):
    """Multinomial logistic regression on features that are brought to one scale.

    Args:
        C: inverse strength of the squared penalty, > 0; "cv" chooses among 1e-3 .. 1e3 by the accuracy of
            5-fold cross-validation (fewer folds where a class has fewer rows).
        scale: "minmax" to [0, 1] by the training rows, "standard" to mean 0 and variance 1, or None.
        solver: "lbfgs", or "sgd" for the paper's recipe: batches of 256, momentum .9, 100 epochs whose rate
            falls by 10 after 60 and 80, no penalty. The momentum starts anew with each rate.
        max_iter: of L-BFGS.
        lr: of "sgd"; the paper has 30 for features of networks.
        seed: of the folds, and of the order and initial weights of "sgd".

    Attributes:
        classes_: labels.
        coef_: weights ``(classes, features)`` in the units of the features.
        intercept_: constants ``(classes,)``.
        C_: the C that was used; infinite for "sgd".
        n_iter_: iterations of L-BFGS, or epochs.
        tried_: what "cv" tried.
        cv_accuracy_: its accuracies.
    """

    tried_: list[float]
    cv_accuracy_: list[float]

    def __init__(
        self,
        C: float | str = 1.0,
        scale: str | None = "minmax",
        solver: str = "lbfgs",
        max_iter: int = 1000,
        lr: float = 30.0,
        seed: int = 0,
    ) -> None:
        self.C = C
        self.scale = scale
        self.solver = solver
        self.max_iter = max_iter
        self.lr = lr
        self.seed = seed

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to features and labels.

        Args:
            X: ``(rows, features)``, finite; numpy, pandas or torch.
            y: labels ``(rows,)`` of two classes or more.

        Returns:
            The probe.

        Raises:
            DataError: if an argument or the data cannot be used.
        """
        self._check_arguments()
        rows, labels = validate_data(self, plain_array(X), plain_array(y), dtype=np.float64)
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError("y has one class only; a probe needs rows of two classes or more.")
        offset, unit = self._scale(rows)
        scaled = (rows - offset) / unit
        self.tried_, self.cv_accuracy_ = [], []
        if self.solver == "sgd":
            weights, constants = self._descend(scaled, codes)
            self.C_ = float("inf")
        else:
            self.C_ = self._choose(rows, codes) if self.C == "cv" else float(self.C)
            weights, constants = self._regress(scaled, codes, self.C_)
        self.coef_ = weights / unit
        self.intercept_ = constants - self.coef_ @ offset
        return self

    def decision_function(self, X: Any) -> Array:
        """Scores ``(rows, classes)``; for two classes their difference ``(rows,)``."""
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict_proba(self, X: Any) -> Array:
        """Class probabilities ``(rows, classes)``."""
        probabilities: Array = softmax(self._scores(X), axis=1)
        return probabilities

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of each row, ``(rows,)``."""
        best = self._scores(X).argmax(1)
        labels: NDArray[Any] = self.classes_[best]
        return labels

    # -- helpers ---------------------------------------------------------------------------------------------

    def _check_arguments(self) -> None:
        if self.C != "cv" and not (isinstance(self.C, int | float) and self.C > 0):
            raise DataError(f'C is {self.C!r}; it must be a number above 0, or "cv".')
        if self.scale not in SCALES:
            raise DataError(f'scale is {self.scale!r}; it must be "minmax", "standard" or None.')
        if self.solver not in ("lbfgs", "sgd"):
            raise DataError(f'solver is {self.solver!r}; it must be "lbfgs" or "sgd".')

    def _scale(self, rows: Array) -> tuple[Array, Array]:
        """Offset and unit of each feature; 1 for a constant one."""
        if self.scale == "minmax":
            offset, unit = rows.min(0), np.ptp(rows, axis=0)
        elif self.scale == "standard":
            offset, unit = rows.mean(0), rows.std(0)
        else:
            return np.zeros(rows.shape[1]), np.ones(rows.shape[1])
        return offset, np.where(unit > 0, unit, 1.0)

    def _regress(self, scaled: Array, codes: NDArray[Any], cost: float) -> tuple[Array, Array]:
        fitted = LogisticRegression(C=cost, max_iter=self.max_iter).fit(scaled, codes)
        self.n_iter_ = int(fitted.n_iter_.max())
        if len(fitted.coef_) > 1:
            return fitted.coef_, fitted.intercept_
        # Two classes have one row of weights; halves of it give the same probabilities.
        halves = np.array([[-0.5], [0.5]])
        return halves * fitted.coef_, halves[:, 0] * fitted.intercept_

    def _choose(self, rows: Array, codes: NDArray[Any]) -> float:
        """The C with the best accuracy over the folds; of equals the strongest penalty."""
        folds = min(FOLDS, int(np.bincount(codes).min()))
        if folds < 2:
            raise DataError('C="cv" needs two rows of each class; give a number for C.')
        split = StratifiedKFold(folds, shuffle=True, random_state=self.seed)
        hits = np.zeros(len(COSTS))
        for fitted, held in split.split(rows, codes):
            offset, unit = self._scale(rows[fitted])
            for i, cost in enumerate(COSTS):
                weights, constants = self._regress((rows[fitted] - offset) / unit, codes[fitted], cost)
                scores = (rows[held] - offset) / unit @ weights.T + constants
                hits[i] += (scores.argmax(1) == codes[held]).sum()
        self.tried_, self.cv_accuracy_ = list(COSTS), (hits / len(rows)).tolist()
        return COSTS[int(hits.argmax())]

    def _descend(self, scaled: Array, codes: NDArray[Any]) -> tuple[Array, Array]:
        layer = nn.Linear(scaled.shape[1], len(self.classes_), dtype=torch.float64)
        with seeded(self.seed, "initial weights"):
            nn.init.normal_(layer.weight, std=INITIAL)
            nn.init.zeros_(layer.bias)
        tensors = (torch.from_numpy(scaled), torch.from_numpy(codes))
        for stage, (epochs, rate) in enumerate(STAGES):
            descent = partial(torch.optim.SGD, lr=self.lr * rate, momentum=MOMENTUM)
            train(
                layer, _cross_entropy, tensors, epochs=epochs, batch_size=BATCH, lr=self.lr * rate,
                optimizer=descent, seed=derive(self.seed, "sgd", stage), progress=False,
            )  # fmt: skip
        self.n_iter_ = sum(epochs for epochs, _ in STAGES)
        return layer.weight.detach().numpy(), layer.bias.detach().numpy()

    def _scores(self, X: Any) -> Array:
        check_is_fitted(self)
        scores: Array = validate_data(self, plain_array(X), reset=False, dtype=np.float64) @ self.coef_.T
        return scores + self.intercept_


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
