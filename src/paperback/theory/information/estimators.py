"""The estimators of I(X;T) and I(T;Y) of a layer behind one base.

X is discrete: each input is a state of its own unless the sample says which rows are the same input. An
estimator takes a `Sample` and gives an `Estimate`; what it is known to get wrong stands in its `bias`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from paperback.errors import DataError
from paperback.theory.information.binning import Low, bin_states, check_bins, ebab_edges, fixed_edges
from paperback.theory.information.cauchy_schwarz import cs_qmi, median_bandwidth
from paperback.theory.information.discrete import (
    Correction,
    discrete_mutual_information,
    entropy,
)
from paperback.theory.information.mixture import MixtureInformation, mixture_information
from paperback.theory.information.neighbours import ksg, ksg_with_labels

EstimatorName = Literal["ebab", "fixed", "akde", "cs_qmi", "ksg"]
NoiseRule = Literal["max", "range2"]

_NARROW = 0.02  # a kernel of this width tells whole numbers apart: exp(-1 / 2 w^2) < 1e-500


@dataclass(frozen=True, eq=False)
class Sample:
    """The activations of one layer at one epoch, with what they belong to, row by row.

    Attributes:
        T: ``(n, d)`` float.
        y: ``(n,)`` labels, numbered from 0.
        x_ids: ``(n,)`` which input a row is, numbered from 0; None where every row is another input.
        x: ``(n, dx)`` the inputs as vectors, for the estimators that need distances between them.
    """

    T: Float[np.ndarray, "n d"]
    y: Int[np.ndarray, " n"]
    x_ids: Int[np.ndarray, " n"] | None = None
    x: Float[np.ndarray, "n dx"] | None = None

    def __len__(self) -> int:
        return len(self.T)

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Some of the rows."""
        x_ids = None if self.x_ids is None else self.x_ids[rows]
        x = None if self.x is None else self.x[rows]
        return replace(self, T=self.T[rows], y=self.y[rows], x_ids=x_ids, x=x)

    @property
    def ids(self) -> Int[np.ndarray, " n"]:
        """Which input a row is, in any case."""
        return np.arange(len(self)) if self.x_ids is None else self.x_ids


@dataclass(frozen=True)
class Estimate:
    """What an estimator says of one layer.

    Attributes:
        xt: I(X;T), in the estimator's unit; NaN where it has none.
        ty: I(T;Y).
        xt_bounds: lower and upper bound of I(X;T), from estimators that bound.
        ty_bounds: the same of I(T;Y).
    """

    xt: float
    ty: float
    xt_bounds: tuple[float, float] | None = None
    ty_bounds: tuple[float, float] | None = None


class InformationEstimator(ABC):
    """An estimator of I(X;T) and I(T;Y).

    Attributes:
        name: as `make_estimator` has it.
        unit: of what it gives.
        bias: what it is known to get wrong, a sentence or two.
        pairwise: whether time grows with the square of the number of rows.
        bounds: whether it gives a lower and an upper bound.
    """

    name: ClassVar[EstimatorName]
    unit: ClassVar[str] = "bits"
    bias: ClassVar[str]
    pairwise: ClassVar[bool] = False
    bounds: ClassVar[bool] = False

    @abstractmethod
    def estimate(self, sample: Sample) -> Estimate:
        """I(X;T) and I(T;Y) of a sample.

        Args:
            sample: at least one row.

        Returns:
            The estimate.

        Raises:
            DataError: if the estimator needs what the sample does not have.
        """


# -- states and counts ---------------------------------------------------------------------------------------


class _Binned(InformationEstimator):
    """Plug-in information of binned activations: I(X;T) = H(T) - H(T|X), I(T;Y) = H(T) - H(T|Y)."""

    n_bins: int
    correction: Correction

    def __post_init__(self) -> None:
        check_bins(self.n_bins)

    @abstractmethod
    def edges(self, T: Float[np.ndarray, "n d"]) -> NDArray[np.floating]:
        """The edges for the activations of a layer."""

    def estimate(self, sample: Sample) -> Estimate:
        """See the base."""
        T = bin_states(sample.T, self.edges(sample.T))
        if sample.x_ids is None and self.correction == "none":
            xt = entropy(T)  # every input is another one: H(T|X) = 0
        else:
            xt = discrete_mutual_information(sample.ids, T, self.correction)
        return Estimate(xt, discrete_mutual_information(T, sample.y, self.correction))


@dataclass(frozen=True)
class AdaptiveBins(_Binned):
    """Entropy-based adaptive binning (EBAB): bins that hold equally many of the values a layer shows.

    Args:
        n_bins: bins beside the lower bound's own, >= 2.
        low: lower bound of the activation; see `ebab_edges`.
        correction: "miller_madow" corrects each entropy for the states that were not seen.
    """

    n_bins: int = 30
    low: Low = "auto"
    correction: Correction = "none"

    name: ClassVar[EstimatorName] = "ebab"
    bias: ClassVar[str] = (
        "A plug-in estimate on n inputs saturates at log2 n: wide layers give every input its own state. "
        "A deterministic continuous network has infinite I(X;T); the number is geometric clustering at the "
        "resolution of the bins."
    )

    def edges(self, T: Float[np.ndarray, "n d"]) -> NDArray[np.floating]:
        """See `ebab_edges`."""
        return ebab_edges(T, self.n_bins, self.low)


@dataclass(frozen=True)
class FixedBins(_Binned):
    """Equal bins over a given range: the classic baseline.

    Args:
        n_bins: >= 2.
        bin_range: lowest and highest edge; see `fixed_edges` for what is taken if it is not given.
        correction: as in `AdaptiveBins`.
    """

    n_bins: int = 30
    bin_range: tuple[float, float] | None = None
    correction: Correction = "none"

    name: ClassVar[EstimatorName] = "fixed"
    bias: ClassVar[str] = AdaptiveBins.bias + " It depends on the range that the bins are laid over."

    def edges(self, T: Float[np.ndarray, "n d"]) -> NDArray[np.floating]:
        """See `fixed_edges`."""
        return fixed_edges(T, self.n_bins, self.bin_range)


# -- kernels -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdaptiveKDE(InformationEstimator):
    """Information through Gaussian noise whose variance follows the layer's largest activity (aKDE).

    I(X;T) is one of the two bounds, and lies between them. I(T;Y) = H(T) - sum_y p(y) H(T|y) takes the same
    bound for both terms, as the paper has it. A difference of upper bounds is no bound; the interval given
    for I(T;Y) takes the lower bound of one term and the upper of the other, within [0, H(Y)].

    Args:
        noise: c in s^2 = c * max |T|, > 0.
        bound: which one is given as the value, "upper" (KL) or "lower" (Bhattacharyya).
        noise_rule: "max" for that, the paper's; variance proportional to a range is not free of scale, and
            "range2", s^2 = c * max |T|^2, is.
    """

    noise: float = 1e-3
    noise_rule: NoiseRule = "max"
    bound: Literal["upper", "lower"] = "upper"

    name: ClassVar[EstimatorName] = "akde"
    pairwise: ClassVar[bool] = True
    bounds: ClassVar[bool] = True
    bias: ClassVar[str] = (
        "Information through added noise, which a deterministic network does not have: it depends on the "
        "variance of the noise, and saturates at log2 n. The interval is a pair of bounds."
    )

    def __post_init__(self) -> None:
        if not (np.isfinite(self.noise) and self.noise > 0):
            raise DataError(f"noise is {self.noise}; it must be a positive number.")
        if self.noise_rule not in ("max", "range2"):
            raise DataError(f'noise_rule is {self.noise_rule!r}; choose "max" or "range2".')
        if self.bound not in ("upper", "lower"):
            raise DataError(f'bound is {self.bound!r}; choose "upper" or "lower".')

    def variance(self, T: Float[np.ndarray, "n d"]) -> float:
        """s^2 of the noise for some activations; 0 where they are all 0."""
        largest = float(np.abs(T).max())
        return self.noise * (largest if self.noise_rule == "max" else largest**2)

    def estimate(self, sample: Sample) -> Estimate:
        """See the base."""
        variance = self.variance(sample.T)
        if variance == 0:
            return Estimate(0.0, 0.0, (0.0, 0.0), (0.0, 0.0))
        by_y = mixture_information(sample.T, variance, sample.y)
        if sample.x_ids is None:
            x_bounds = (by_y.lower, by_y.upper)
            xt = by_y.upper if self.bound == "upper" else by_y.lower
        else:  # rows of the same input: H(T|X) is that of a mixture too
            xt, x_bounds = self._between(mixture_information(sample.T, variance, sample.x_ids), np.inf)
        ty, y_bounds = self._between(by_y, entropy(sample.y))
        return Estimate(xt, ty, x_bounds, y_bounds)

    def _between(self, m: MixtureInformation, ceiling: float) -> tuple[float, tuple[float, float]]:
        """Information about the group, H(T) - H(T|group): same bounds for the value, opposite ones around."""
        low = max(0.0, m.lower - m.within_upper)
        high = max(low, min(ceiling, m.upper - m.within_lower))
        value = m.upper - m.within_upper if self.bound == "upper" else m.lower - m.within_lower
        return float(np.clip(value, low, high)), (low, high)


@dataclass(frozen=True)
class CauchySchwarz(InformationEstimator):
    """Normalised Cauchy-Schwarz quadratic mutual information, see `cs_qmi`.

    Args:
        sigma_x: kernel width on the inputs; their median distance if not given.
        sigma_t: the same on the activations.
    """

    sigma_x: float | None = None
    sigma_t: float | None = None

    name: ClassVar[EstimatorName] = "cs_qmi"
    unit: ClassVar[str] = ""
    pairwise: ClassVar[bool] = True
    bias: ClassVar[str] = (
        "Not a Shannon information but a normalised dependence, 1 for T = X, that depends on kernel widths: "
        "compare layers with each other, not with bits."
    )

    def estimate(self, sample: Sample) -> Estimate:
        """Inputs without vectors, and labels, are told apart by a kernel that is 1 on equals, else 0."""
        T = torch.from_numpy(np.array(sample.T, dtype=np.float64))
        sigma_t = self.sigma_t or median_bandwidth(T)
        if sample.x is None:
            x, sigma_x = _column(sample.ids), _NARROW
        else:
            x = torch.from_numpy(np.array(sample.x, dtype=np.float64))
            sigma_x = self.sigma_x or median_bandwidth(x)
        with torch.no_grad():
            xt = cs_qmi(x, T, sigma_x, sigma_t)
            ty = cs_qmi(T, _column(sample.y), sigma_t, _NARROW)
        return Estimate(float(xt), float(ty))


def _column(codes: Int[np.ndarray, " n"]) -> torch.Tensor:
    return torch.from_numpy(codes.astype(np.float64))[:, None]


# -- neighbours ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NearestNeighbours(InformationEstimator):
    """Kraskov's estimator for I(X;T), Ross's for I(T;Y), see `ksg` and `ksg_with_labels`.

    I(X;T) needs the inputs as vectors of a continuous variable; without them, or where the sample says that
    inputs are discrete states, it is NaN.

    Args:
        k: neighbours, >= 1.
        seed: of the noise that parts equal points.
    """

    k: int = 3
    seed: int = 0

    name: ClassVar[EstimatorName] = "ksg"
    bias: ClassVar[str] = (
        "For continuous variables of few dimensions; too small for strong dependence and many dimensions. "
        "Where T is a function of X the truth is infinite and the estimate grows with log n."
    )

    def __post_init__(self) -> None:
        if self.k < 1:
            raise DataError(f"k is {self.k}; give at least one neighbour.")

    def estimate(self, sample: Sample) -> Estimate:
        """See the base."""
        has_vectors = sample.x is not None and sample.x_ids is None
        xt = ksg(sample.x, sample.T, self.k, seed=self.seed) if has_vectors else float("nan")  # type: ignore[arg-type]
        return Estimate(xt, ksg_with_labels(sample.T, sample.y, self.k, seed=self.seed))


ESTIMATORS: dict[EstimatorName, type[InformationEstimator]] = {
    kind.name: kind for kind in (AdaptiveBins, FixedBins, AdaptiveKDE, CauchySchwarz, NearestNeighbours)
}


def make_estimator(
    estimator: EstimatorName | InformationEstimator, **settings: object
) -> InformationEstimator:
    """An estimator by name, with settings; or the one given.

    Args:
        estimator: "ebab", "fixed", "akde", "cs_qmi", "ksg", or an object.
        **settings: of the class of that name; none for an object.

    Returns:
        The estimator.

    Raises:
        DataError: if there is no such estimator, or it has no such setting.
    """
    if isinstance(estimator, InformationEstimator):
        if settings:
            raise DataError(f"{next(iter(settings))} belongs into the estimator object that was given.")
        return estimator
    if estimator not in ESTIMATORS:
        raise DataError(f"estimator is {estimator!r}; choose one of {', '.join(ESTIMATORS)}.")
    kind = ESTIMATORS[estimator]
    unknown = [name for name in settings if name not in kind.__dataclass_fields__]  # type: ignore[attr-defined]
    if unknown:
        raise DataError(f"{unknown[0]} is no setting of the estimator {estimator!r}.")
    return kind(**settings)
