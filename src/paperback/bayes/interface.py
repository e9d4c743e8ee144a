"""Predictions with a distribution behind them: scikit-learn estimators for regression and classification.

`fit` takes numpy, pandas or torch. Targets are standardised inside, inputs as the method wants them, and
everything that comes out is in the units of what went in. A method of this wing writes `_fit`, `_law` and,
where it knows how function values at several points hang together, `_joint`; all else is written here once.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, MultivariateNormal

from paperback.bayes.distributions import (
    FunctionDraws,
    MultivariateStudentT,
    NormalVectorMixture,
    in_units,
)
from paperback.errors import DataError, NotSupportedError
from paperback.saving import SavedEstimator

if TYPE_CHECKING:
    from botorch.models.model import Model

Joint = MultivariateNormal | MultivariateStudentT | NormalVectorMixture | FunctionDraws
Scaling = Literal["standard", "unit", "none"]


class _BayesianEstimator(SavedEstimator, BaseEstimator):
    """What regressors and classifiers share: the way of inputs into the method's own scale."""

    _scaling: ClassVar[Scaling] = "standard"

    n_features_in_: int
    input_shift_: NDArray[np.float64]
    input_scale_: NDArray[np.float64]
    diagnostics_: dict[str, float]

    def _fit_inputs(self, X: NDArray[Any]) -> Tensor:
        """Note how columns are shifted and scaled, and give them so, ``(rows, features)`` float64."""
        shift, scale = np.zeros(X.shape[1]), np.ones(X.shape[1])
        if self._scaling == "standard":
            shift, scale = X.mean(0), X.std(0)
        elif self._scaling == "unit":
            shift, scale = X.min(0), X.max(0) - X.min(0)
        # A column of one value says nothing; its rounding must not be blown up.
        scale = np.where(scale > 1e-12 * np.maximum(1.0, np.abs(shift)), scale, 1.0)
        self.input_shift_, self.input_scale_ = shift.astype(np.float64), scale.astype(np.float64)
        # A copy in order: X may be read-only or have negative strides.
        return self._scaled(torch.tensor(np.ascontiguousarray(X), dtype=torch.float64))

    def _freeze(self) -> None:
        """What was learned is fixed: predictions have gradients in their inputs only."""
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.eval().requires_grad_(False)

    def _scaled(self, x: Tensor) -> Tensor:
        shift, scale = (torch.as_tensor(part).to(x.device) for part in (self.input_shift_, self.input_scale_))
        return (x - shift) / scale

    def _inputs(self, X: ArrayLike | Tensor) -> Tensor:
        """Inputs in the method's scale; a tensor that needs gradients keeps them."""
        check_is_fitted(self)
        checked = validate_data(self, as_numpy(X), reset=False, dtype=np.float64)
        if isinstance(X, Tensor) and X.requires_grad:
            return self._scaled(X.to(torch.float64))
        return self._scaled(torch.as_tensor(np.ascontiguousarray(checked)))


class BayesianRegressor(RegressorMixin, _BayesianEstimator):
    """A regressor that predicts a law for every target.

    Attributes:
        n_outputs_: number of targets of a row.
        log_marginal_: log marginal likelihood of the training targets in their own units, nats; only methods
            that compute it have the attribute.
        diagnostics_: what the method says of its own fit, name to number.
    """

    n_outputs_: int
    target_shift_: NDArray[np.float64]
    target_scale_: NDArray[np.float64]
    flat_target_: bool
    log_marginal_: float

    def fit(self, X: ArrayLike | Tensor, y: ArrayLike | Tensor) -> Self:
        """Learn from rows with targets.

        Args:
            X: ``(rows, features)``, finite numbers.
            y: ``(rows,)`` or ``(rows, outputs)``, finite numbers in any unit.

        Returns:
            The estimator.

        Raises:
            DataError: if the method cannot use the data; ValueError, as scikit-learn's estimators do, if
                shapes do not fit or a number is not finite.
        """
        rows, targets = validate_data(
            self, as_numpy(X), as_numpy(y), multi_output=True, y_numeric=True, dtype=np.float64
        )
        targets = np.asarray(targets, dtype=np.float64)
        self.flat_target_ = targets.ndim == 1
        targets = targets.reshape(len(targets), -1)
        self.n_outputs_ = targets.shape[1]
        self.target_shift_ = targets.mean(0)
        spread = targets.std(0)
        smallest = 1e-12 * np.maximum(1.0, np.abs(self.target_shift_))
        self.target_scale_ = np.where(spread > smallest, spread, 1.0)
        self.diagnostics_ = {}
        standardised = torch.as_tensor((targets - self.target_shift_) / self.target_scale_)
        self._fit(self._fit_inputs(rows), standardised)
        self._freeze()
        if hasattr(self, "log_marginal_"):  # of the standardised targets so far: change of variables
            self.log_marginal_ = float(self.log_marginal_ - len(targets) * np.log(self.target_scale_).sum())
        return self

    def predict(
        self, X: ArrayLike | Tensor, return_std: bool = False
    ) -> NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean, and standard deviation, of a new observation in each row.

        Args:
            X: ``(rows, features)``.
            return_std: also give standard deviations; noise of the observation is included.

        Returns:
            ``(rows,)`` or ``(rows, outputs)`` as the targets were, or a pair of them.
        """
        with torch.no_grad():
            law = self.predict_distribution(X)
            mean = law.mean.cpu().numpy()
            return (mean, law.stddev.cpu().numpy()) if return_std else mean

    def predict_distribution(self, X: ArrayLike | Tensor) -> Distribution:
        """The law of a new observation in each row, in the units of y, noise included.

        Args:
            X: ``(rows, features)``; a tensor that needs gradients gets them.

        Returns:
            A distribution of batch shape ``(rows,)`` or ``(rows, outputs)``, with mean, variance, log_prob,
            cdf and icdf.
        """
        x = self._inputs(X)
        shift, scale = self._target_units()
        return in_units(self._law(x), shift, scale, flat=self.flat_target_)

    def sample_functions(
        self, X: ArrayLike | Tensor, n: int = 1, *, seed: int = 0
    ) -> Float[Tensor, "n rows *outputs"]:
        """Draw functions from the posterior and give their values, noise-free, in the units of y.

        Args:
            X: ``(rows, features)``; the values are differentiable in it if it is a tensor.
            n: number of functions; one draw is one function, at all rows.
            seed: of the draws.

        Returns:
            ``(n, rows)`` or ``(n, rows, outputs)`` as the targets were, float64.

        Raises:
            NotSupportedError: if the method knows each point's law only.
            DataError: if n < 1.
        """
        if n < 1:
            raise DataError(f"n is {n}; draw at least one function.")
        x = self._inputs(X)
        joint = self._joint(x)
        with torch.random.fork_rng(devices=[]):  # torch's distributions take no generator
            torch.manual_seed(seed)
            values = joint.rsample((n,)).movedim(-2, -1)  # (n, rows, outputs)
        shift, scale = self._target_units()
        values = shift + scale * values
        return values[..., 0] if self.flat_target_ else values

    def to_botorch(self) -> Model:
        """The fitted estimator as a BoTorch model, for acquisition functions (extra ``bayes``).

        Returns:
            A `botorch.models.model.Model`: its posterior takes points ``(..., q, features)``, in the units of
            X, and is differentiable in them. A method without a joint law gives independent points.

        Raises:
            MissingExtraError: if botorch is not installed.
        """
        from paperback.bayes.botorch import as_botorch

        check_is_fitted(self)
        return as_botorch(self)

    # -- what a method writes --------------------------------------------------------------------------------

    @abstractmethod
    def _fit(self, x: Float[Tensor, "rows features"], y: Float[Tensor, "rows outputs"]) -> None:
        """Learn from scaled inputs and standardised targets, float64; fill `diagnostics_`."""

    @abstractmethod
    def _law(self, x: Float[Tensor, "*batch features"]) -> Distribution:
        """The law of an observation, standardised, of batch shape ``(*batch, outputs)``."""

    def _joint(self, x: Float[Tensor, "*batch q features"]) -> Joint:
        """The law of the noise-free function at q points: batch ``(*batch, outputs)``, event ``(q,)``.

        It is differentiable in x. Sampled functions are the same in every call.
        """
        raise NotSupportedError(
            f"{type(self).__name__} knows the law of each point, not of several together; "
            "predict_distribution(X).sample() draws points independently."
        )

    # -- helpers ---------------------------------------------------------------------------------------------

    def _target_units(self) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(self.target_shift_), torch.as_tensor(self.target_scale_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class BayesianClassifier(ClassifierMixin, _BayesianEstimator):
    """A classifier whose probabilities are averages over a posterior.

    Attributes:
        classes_: labels, sorted.
        log_marginal_: log marginal likelihood of the labels, nats, or its bound; only methods that compute it
            have the attribute.
        diagnostics_: what the method says of its own fit, name to number.
    """

    classes_: NDArray[Any]

    def fit(self, X: ArrayLike | Tensor, y: ArrayLike | Tensor) -> Self:
        """Learn from rows with labels.

        Args:
            X: ``(rows, features)``, finite numbers.
            y: labels ``(rows,)``, of at least two classes.

        Returns:
            The estimator.

        Raises:
            DataError: if there is one class only, or the method cannot use the data.
        """
        rows, targets = validate_data(self, as_numpy(X), as_numpy(y), dtype=np.float64)
        check_classification_targets(targets)
        self.classes_, labels = np.unique(targets, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(
                f"all rows have the label {self.classes_[0]}; a classifier needs more than one class."
            )
        self.diagnostics_ = {}
        self._fit(self._fit_inputs(rows), torch.as_tensor(labels, dtype=torch.int64))
        self._freeze()
        return self

    def predict(self, X: ArrayLike | Tensor) -> NDArray[Any]:
        """The most probable label of each row, ``(rows,)``."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(1)]

    def predict_proba(self, X: ArrayLike | Tensor) -> NDArray[np.float64]:
        """Probability of each class in each row, ``(rows, classes)``."""
        with torch.no_grad():
            probabilities = self._probabilities(self._inputs(X)).cpu().numpy()
        return probabilities / probabilities.sum(1, keepdims=True)

    def predict_distribution(self, X: ArrayLike | Tensor) -> Categorical:
        """The law of the label's index in `classes_`, of batch shape ``(rows,)``."""
        return Categorical(probs=self._probabilities(self._inputs(X)), validate_args=False)

    def sample_functions(
        self, X: ArrayLike | Tensor, n: int = 1, *, seed: int = 0
    ) -> Float[Tensor, "n rows classes"]:
        """Draw functions from the posterior and give their logits.

        Args:
            X: ``(rows, features)``; the values are differentiable in it if it is a tensor.
            n: number of functions.
            seed: of the draws.

        Returns:
            Logits, float64.

        Raises:
            NotSupportedError: if the method has no functions to draw.
            DataError: if n < 1.
        """
        if n < 1:
            raise DataError(f"n is {n}; draw at least one function.")
        return self._logits(self._inputs(X), n, seed)

    # -- what a method writes --------------------------------------------------------------------------------

    @abstractmethod
    def _fit(self, x: Float[Tensor, "rows features"], labels: Int[Tensor, " rows"]) -> None:
        """Learn from scaled inputs, float64, and labels from 0; fill `diagnostics_`."""

    @abstractmethod
    def _probabilities(self, x: Float[Tensor, "rows features"]) -> Float[Tensor, "rows classes"]:
        """Probabilities of the classes."""

    def _logits(self, x: Float[Tensor, "rows features"], n: int, seed: int) -> Tensor:
        """Logits of n sampled functions, ``(n, rows, classes)``."""
        raise NotSupportedError(
            f"{type(self).__name__} gives probabilities, and no functions; use predict_proba."
        )


def as_numpy(values: ArrayLike | Tensor) -> Any:
    """A tensor as a numpy array; everything else, also a DataFrame with its column names, as it is."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values
