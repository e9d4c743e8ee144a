"""`NaiveBayesProbe`: Gaussian classes, fitted in one pass and updated exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from paperback.errors import DataError, NotSupportedError
from paperback.represent.generative_classifier.statistics import ClassStatistics, Scatter
from paperback.saving import SavedEstimator

Array = NDArray[np.float64]

SCALES = ("minmax", "standard", None)


class NaiveBayesProbe(SavedEstimator, ClassifierMixin, BaseEstimator):
    """Gaussian classes with shared variances: a linear classifier that needs one pass over the rows.

    Features are brought to one scale first, by the training rows alone. For naive Bayes that changes only
    what `var_smoothing` and `floor` weigh, so it happens in the parameters; the rows are read as they are,
    and `partial_fit` is exact.

    Args:
        shared: one variance of a feature for all classes, the paper's model. False gives each class its own
            (scikit-learn's GaussianNB), which is quadratic.
        covariance: "diag", or "full" for one covariance matrix (linear discriminant analysis).
        var_smoothing: added to every variance, in units of the scaled features, >= 0.
        floor: part of each variance, in [0, 1], that is replaced by the mean over features (for "full", part
            of the matrix that is replaced by a multiple of the identity). "auto" takes K / m for K classes
            and m > K rows, 1/2 for m = K: with few rows many pooled variances are near 0.
        scale: "minmax" to [0, 1], "standard" to mean 0 and variance 1, or None.

    Attributes:
        classes_: labels.
        class_count_: training rows of each class ``(classes,)``.
        theta_: class means ``(classes, features)``.
        var_: variances ``(features,)``, ``(classes, features)`` without `shared`, or the matrix, in the units
            of the features.
        coef_: weights ``(classes, features)`` of the linear form; not without `shared`.
        intercept_: its constants ``(classes,)``.
    """

    classes_: NDArray[Any]

    def __init__(
        self,
        shared: bool = True,
        covariance: str = "diag",
        var_smoothing: float = 1e-9,
        floor: float | str = 0.0,
        scale: str | None = "minmax",
    ) -> None:
        self.shared = shared
        self.covariance = covariance
        self.var_smoothing = var_smoothing
        self.floor = floor
        self.scale = scale

    # -- scikit-learn ----------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to features and labels.

        Args:
            X: ``(rows, features)``, finite; numpy, pandas or torch.
            y: labels ``(rows,)``.

        Returns:
            The probe.

        Raises:
            DataError: if an argument or the data cannot be used; it names constant features.
        """
        for name in [key for key in vars(self) if key.endswith("_") and not key.startswith("_")]:
            delattr(self, name)
        return self.partial_fit(X, y)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Take in more rows; the result is that of `fit` on all rows so far, in any order.

        Args:
            X: ``(rows, features)``.
            y: labels ``(rows,)``; new ones become new classes, and leave the means of the others as they
                were.
            classes: labels that may come later; until then their probability is 0.

        Returns:
            The probe.

        Raises:
            DataError: if an argument or the data cannot be used.
        """
        self._check_arguments()
        first = not hasattr(self, "counts_")
        rows, labels = validate_data(
            self, plain_array(X), plain_array(y), reset=first, dtype=(np.float64, np.float32)
        )
        check_classification_targets(labels)
        known = [] if first else [self.classes_]
        declared = [] if classes is None else [np.asarray(classes)]
        all_classes = np.unique(np.concatenate([*known, *declared, labels]))
        statistics = ClassStatistics.empty(self._kind, len(all_classes), rows.shape[1])
        if not first:
            places = np.searchsorted(all_classes, self.classes_).astype(np.int64)
            statistics = self._statistics().widened(places, len(all_classes))
        statistics.add(rows, np.searchsorted(all_classes, labels))
        self.classes_ = all_classes
        self.counts_, self.theta_, self.scatter_ = statistics.counts, statistics.means, statistics.scatter
        self.low_, self.high_ = statistics.low, statistics.high
        self._derive(statistics)
        return self

    @property
    def class_count_(self) -> Array:
        """Training rows of each class ``(classes,)``."""
        return self.counts_

    def decision_function(self, X: Any) -> Array:
        """Scores up to what is common to the classes, ``(rows, classes)``.

        For two classes their difference, ``(rows,)``, as scikit-learn has it.
        """
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict_proba(self, X: Any) -> Array:
        """Posterior probabilities, ``(rows, classes)``."""
        posterior: Array = softmax(self._scores(X), axis=1)
        return posterior

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of each row, ``(rows,)``."""
        best = self._scores(X).argmax(1)
        labels: NDArray[Any] = self.classes_[best]
        return labels

    # -- what is peculiar to this classifier -----------------------------------------------------------------

    @property
    def coef_(self) -> Array:
        """Weights of the linear form, ``(classes, features)``: (mu_kj - c_j) / sigma_j^2.

        The paper has mu_kj / sigma_j^2. The centre c of the class means is common to the classes, changes no
        posterior, and without it digits are lost on features with a large offset.
        """
        self._need_shared("coef_", AttributeError)
        return self.precision_means_

    @property
    def intercept_(self) -> Array:
        """Constants of the linear form, ``(classes,)``, for rows as they are."""
        self._need_shared("intercept_", AttributeError)
        constants: Array = self.constants_ - self.precision_means_ @ self.center_
        return constants

    def to_linear(self) -> nn.Linear:
        """The probe as a torch layer in float64, features to scores; their softmax is the posterior.

        Raises:
            NotSupportedError: without `shared`.
        """
        check_is_fitted(self)
        self._need_shared("a linear layer", NotSupportedError)
        layer = nn.Linear(self.n_features_in_, len(self.classes_), dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(self.coef_))
            layer.bias.copy_(torch.from_numpy(self.intercept_))
        return layer.requires_grad_(False)

    def diagnose(self, X: Any, y: Any) -> Diagnosis:
        """How far the assumptions of the theory hold on labelled rows.

        Args:
            X: features ``(rows, features)``, for instance the training rows.
            y: labels ``(rows,)``, of classes that were fitted.

        Returns:
            Shared variances, separation of the classes for each feature, and dependence of the features.

        Raises:
            DataError: if a label was never fitted, or there is one class only.
            NotSupportedError: with a covariance matrix or without `shared`.
        """
        check_is_fitted(self)
        if not self.shared or self.covariance != "diag":
            raise NotSupportedError('only the probe with shared=True and covariance="diag" is diagnosed.')
        rows, labels = validate_data(self, plain_array(X), plain_array(y), reset=False, dtype=np.float64)
        if not np.isin(labels, self.classes_).all() or len(self.classes_) < 2:
            raise DataError("y must hold labels of the fitted classes, of which there must be two or more.")
        codes = np.searchsorted(self.classes_, labels)
        means, variances = self.theta_[self.counts_ > 0], self.var_
        separation, single, joint, pairs = 0.0, np.zeros(rows.shape[1]), 0.0, 0
        for k in np.unique(codes):
            own = rows[codes == k] - self.theta_[k]
            slopes = (self.theta_[k] - means) / variances  # of log p_k - log p_l in each feature
            separation += float((slopes * (self.theta_[k] - means)).sum()) / 2
            single += (slopes**2).sum(0) * own.var(0)
            joint += float((own @ slopes.T).var(0).sum())
            pairs += len(means) - 1
        unit = self._unit()
        return Diagnosis(
            sigma=np.sqrt(variances) / unit,
            divergence=separation / pairs / rows.shape[1],
            variances=single / pairs,
            dependence=joint / max(float(single.sum()), np.finfo(float).tiny),
        )

    # -- helpers ---------------------------------------------------------------------------------------------

    @property
    def _kind(self) -> Scatter:
        if self.covariance == "full":
            return "full"
        return "pooled" if self.shared else "class"

    def _statistics(self) -> ClassStatistics:
        return ClassStatistics(
            self._kind, self.counts_.copy(), self.theta_.copy(), self.scatter_.copy(), self.low_.copy(),
            self.high_.copy(),
        )  # fmt: skip

    def _check_arguments(self) -> None:
        if self.covariance not in ("diag", "full"):
            raise DataError(f'covariance is {self.covariance!r}; it must be "diag" or "full".')
        if self.covariance == "full" and not self.shared:
            raise DataError('covariance="full" is one matrix for all classes; set shared=True.')
        if not (isinstance(self.var_smoothing, int | float) and self.var_smoothing >= 0):
            raise DataError(f"var_smoothing is {self.var_smoothing}; it must be 0 or larger.")
        if self.floor != "auto" and not (isinstance(self.floor, int | float) and 0 <= self.floor <= 1):
            raise DataError(f'floor is {self.floor!r}; it must lie in [0, 1], or be "auto".')
        if self.scale not in SCALES:
            raise DataError(f'scale is {self.scale!r}; it must be "minmax", "standard" or None.')

    def _unit(self) -> Array:
        """What one unit of each scaled feature is in the units of the rows; 1 for a constant one."""
        if self.scale == "minmax":
            unit = self.high_ - self.low_
        elif self.scale == "standard":
            m = self.counts_.sum()
            centre = self.counts_ @ self.theta_ / m
            between = self.counts_ @ (self.theta_ - centre) ** 2
            scatter = self.scatter_
            within = scatter.diagonal() if self._kind == "full" else np.atleast_2d(scatter).sum(0)
            unit = np.sqrt((within + between) / m)
        else:
            return np.ones(self.n_features_in_)
        return np.where(unit > 0, unit, 1.0)

    def _floor(self) -> float:
        if self.floor != "auto":
            return float(self.floor)
        m, classes = float(self.counts_.sum()), int((self.counts_ > 0).sum())
        return min(1.0, classes / (classes + m - classes * (m > classes)))

    def _derive(self, statistics: ClassStatistics) -> None:
        """Variances, and from them the linear or quadratic form, from the statistics.

        The form is about the mean of the class means, so that large offsets cost no digits.
        """
        m, unit, rho = statistics.counts.sum(), self._unit(), self._floor()
        seen = statistics.counts > 0
        with np.errstate(divide="ignore"):
            log_prior = np.log(statistics.counts / m)
        self.center_ = statistics.means[seen].mean(0)
        means = np.where(seen[:, None], (statistics.means - self.center_) / unit, 0.0)
        if self._kind == "full":
            matrix = statistics.scatter / m / np.outer(unit, unit)
            matrix += self.var_smoothing * np.eye(len(unit))
            matrix = (1 - rho) * matrix + rho * np.trace(matrix) / len(unit) * np.eye(len(unit))
            weights = self._solve(matrix, means)
            self.var_ = matrix * np.outer(unit, unit)
            self.constants_ = log_prior - 0.5 * np.einsum("kj,kj->k", means, weights)
            self.precision_means_ = weights / unit
            return
        divisor = m if self.shared else np.maximum(statistics.counts, 1)[:, None]
        variances = statistics.scatter / divisor / unit**2 + self.var_smoothing
        variances = (1 - rho) * variances + rho * variances.mean(-1, keepdims=True)
        self._check_variances(variances if self.shared else variances[seen])
        self.var_ = variances * unit**2
        # For a class without rows any positive variance serves: its prior is 0.
        safe = np.where(variances > 0, variances, 1.0)
        self.constants_ = log_prior - 0.5 * (means**2 / safe).sum(1)
        if not self.shared:
            self.constants_ -= 0.5 * np.log(safe).sum(1)
        self.precision_means_ = means / safe / unit

    def _check_variances(self, variances: Array) -> None:
        zero = (variances <= 0) if variances.ndim == 1 else (variances <= 0).any(0)
        if zero.any():
            columns = np.flatnonzero(zero)
            shown = ", ".join(map(str, columns[:5])) + (" ..." if len(columns) > 5 else "")
            raise DataError(
                f"X is constant within the classes in column(s) {shown}; remove them, or set var_smoothing "
                "or floor above 0."
            )

    @staticmethod
    def _solve(matrix: Array, means: Array) -> Array:
        try:
            weights: Array = cho_solve(cho_factor(matrix), means.T).T
        except LinAlgError as error:
            raise DataError(
                "the covariance matrix of X is singular: fewer rows than features, or dependent ones; set "
                "floor above 0."
            ) from error
        return weights

    def _scores(self, X: Any) -> Array:
        check_is_fitted(self)
        rows = validate_data(self, plain_array(X), reset=False, dtype=np.float64) - self.center_
        scores: Array = rows @ self.precision_means_.T + self.constants_
        if not self.shared:
            scores -= 0.5 * rows**2 @ (1 / np.where(self.var_ > 0, self.var_, 1.0)).T
        return scores

    def _need_shared(self, what: str, error: type[Exception]) -> None:
        if not self.shared:
            raise error(f"{what} needs shared=True; a variance for each class is quadratic.")


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What the theory assumes, measured.

    Attributes:
        sigma: shared standard deviation of each scaled feature ``(features,)``.
        divergence: Kullback-Leibler divergence of two fitted classes over the number of features, in nats,
            averaged over pairs. O(log n) rows are enough while it does not shrink as features are added.
        variances: of each feature's log-likelihood difference of two classes ``(features,)``, averaged over
            pairs.
        dependence: variance of the whole log-likelihood difference over the sum of those of the features: 1
            for features that are independent within the classes, larger if they say the same.
    """

    sigma: Array
    divergence: float
    variances: Array
    dependence: float


def plain_array(values: Any) -> Any:
    """Tensors as numpy arrays; all else as it is."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values
