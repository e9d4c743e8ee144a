"""What all baselines share: checks, labels, prediction by the greatest score, the sign of a certificate."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from paperback.errors import DataError
from paperback.explain.interface import Array, ExplainableClassifier, Explanation
from paperback.saving import SavedEstimator

ROUNDING = 1e-7  # of a row's length, by which a radius is made smaller
BATCH = 1024  # rows whose scores are computed at once


class Baseline(SavedEstimator, ExplainableClassifier):
    """A classifier by the greatest of its scores.

    A baseline writes `_fit`, `scores` and `explain`, and `_radii` where it has a guarantee.

    Attributes:
        classes_: labels.
        mean_: of the training rows, ``(features,)``.
    """

    image_shape: tuple[int, ...] | None

    classes_: NDArray[Any]
    mean_: Array
    n_features_in_: int

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit to rows and labels.

        Args:
            X: ``(rows, features)``, finite.
            y: labels ``(rows,)`` of two classes or more.

        Returns:
            The classifier.

        Raises:
            DataError: if an argument or the data cannot be used.
        """
        rows, codes = self._checked(X, y)
        if self.image_shape is not None and int(np.prod(self.image_shape)) != rows.shape[1]:
            raise DataError(
                f"image_shape is {tuple(self.image_shape)} and a row has {rows.shape[1]} values; give "
                "(height, width) or (height, width, 3) with that product."
            )
        self.mean_ = rows.mean(0)
        self._fit(rows, codes)
        return self

    @abstractmethod
    def scores(self, X: Tensor) -> Tensor:
        """Scores of rows; the greatest is the prediction.

        Args:
            X: ``(rows, features)`` float64.

        Returns:
            ``(rows, classes)``, differentiable where the method is.
        """

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The class with the greatest score, ``(rows,)``."""
        best = self._scores(self._rows(X)).argmax(1)
        result: NDArray[Any] = self.classes_[best]
        return result

    def predict_proba(self, X: ArrayLike) -> Array:
        """``(rows, classes)``, rows sum to 1."""
        return self._probabilities(self._scores(self._rows(X)))

    def certify(self, X: ArrayLike, y: ArrayLike | None = None) -> Array:
        """The L2 radius around each row within which its prediction cannot change.

        Args:
            X: rows.
            y: labels; a row that is classified otherwise has a radius of at most 0. The predictions if None.

        Returns:
            ``(rows,)``, in the units of X.

        Raises:
            NotSupportedError: if the method gives no guarantee.
            DataError: if a label was never seen.
        """
        rows = self._rows(X)
        if y is None:
            return self._certificates(rows)
        labels = np.asarray(y)
        if labels.shape != (len(rows),) or not np.isin(labels, self.classes_).all():
            raise DataError("y must hold, for each row of X, the label of a class that was fitted.")
        return self._certificates(rows, np.searchsorted(self.classes_, labels))

    # -- what a baseline writes ------------------------------------------------------------------------------

    @abstractmethod
    def _fit(self, X: Array, y: NDArray[Any]) -> None:
        """Fit to checked rows and class indices."""

    def _radii(self, X: Array, y: NDArray[Any]) -> Array:
        """Signed radii of checked rows against class indices; see `certify`."""
        return super().certify(X)  # which says that there is none

    def _probabilities(self, scores: Array) -> Array:
        """Softmax of the scores, not calibrated."""
        return torch.tensor(scores).softmax(1).numpy()

    # -- helpers ---------------------------------------------------------------------------------------------

    def _rows(self, X: ArrayLike) -> Array:
        check_is_fitted(self)
        rows: Array = validate_data(self, X, reset=False, dtype=np.float64)
        return rows

    def _scores(self, rows: Array) -> Array:
        with torch.no_grad():
            parts = [self.scores(part) for part in torch.from_numpy(np.array(rows)).split(BATCH)]
        result: Array = torch.cat(parts).numpy()
        return result

    def _certificates(self, rows: Array, codes: NDArray[Any] | None = None) -> Array:
        """Radii of checked rows, smaller by what rounding may have added, with the sign of `certify`."""
        predicted = self._scores(rows).argmax(1)
        wanted = predicted if codes is None else codes
        radii = self._radii(rows, wanted) - ROUNDING * np.linalg.norm(rows, axis=1)
        return np.where(predicted == wanted, radii.clip(min=0), radii.clip(max=0))

    def _columns(self) -> tuple[str, ...]:
        """Names of the columns: the user's, or their place in the image or the row."""
        if hasattr(self, "feature_names_in_"):
            return tuple(map(str, self.feature_names_in_))
        if self.image_shape is not None:
            return tuple(f"pixel {', '.join(map(str, place))}" for place in np.ndindex(*self.image_shape))
        return tuple(f"column {i}" for i in range(self.n_features_in_))

    def _explanation(
        self, rows: Array, contributions: Array, offsets: Array, parts: tuple[str, ...], **more: Any
    ) -> Explanation:
        """With scores that are the sums, and how a row is drawn."""
        return Explanation(
            classes=self.classes_,
            scores=contributions.sum(2) + offsets,
            contributions=contributions,
            parts=parts,
            inputs=rows,
            kind="table" if self.image_shape is None else "image",
            offsets=offsets,
            columns=self._columns(),
            image_shape=None if self.image_shape is None else tuple(self.image_shape),
            **more,
        )
