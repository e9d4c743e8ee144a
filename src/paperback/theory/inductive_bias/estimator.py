"""`InductiveBias`: bits of a hypothesis space on a task, with an interval and a curve over errors."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from paperback.errors import DataError, NotSupportedError
from paperback.theory.inductive_bias.kernel_space import KernelSpace
from paperback.theory.inductive_bias.laws import (
    EmpiricalLaw,
    FitMethod,
    Law,
    LossLaw,
    checked_targets,
    fit_law,
    matched_chi_square,
    to_bits,
)
from paperback.theory.inductive_bias.network_space import NetworkSpace
from paperback.theory.interface import Measurement
from paperback.training import derive

Method = Literal["auto", "exact", "ncx2", "paper", "scaled_chi2", "empirical"]
METHODS: tuple[Method, ...] = ("auto", "exact", "ncx2", "paper", "scaled_chi2", "empirical")

FAR = 6.0  # standard deviations below the mean from which the form of the law, not the data, decides
CONFIDENCE = 0.95
Array = NDArray[np.float64]


class InductiveBias:
    """Bits that a hypothesis space lacks to generalise to a wanted error on a task.

        bias = InductiveBias(KernelSpace(rbf(2.0))).fit(X_train, y_train, X_test, y_test)
        print(bias.bits(0.01))

    Args:
        space: a `KernelSpace` or a `NetworkSpace`.
        method: the law of the test error. "exact" is a kernel's own and needs no draws; "ncx2", "paper",
            "scaled_chi2" and "empirical" are fitted to sampled errors, see `fit_law`. "auto" is "exact" for a
            kernel and "ncx2" for networks.
        n_samples: errors drawn from a kernel space; networks have one error per model.
        n_bootstrap: resamples of the errors behind an interval.
        seed: of the draws, the networks and the bootstrap.

    Attributes:
        losses_: the sampled test errors, ``(n,)`` float64.
        law_: the law that the bits come from.

    Raises:
        DataError: if the method or a number is out of range.
    """

    losses_: Array
    law_: Law

    def __init__(
        self,
        space: KernelSpace | NetworkSpace,
        method: Method = "auto",
        n_samples: int = 1_000,
        *,
        n_bootstrap: int = 100,
        seed: int = 0,
    ) -> None:
        if method not in METHODS:
            raise DataError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
        if method == "exact" and not isinstance(space, KernelSpace):
            raise DataError('the law of trained networks is not known exactly; use method "ncx2".')
        if n_samples < 8 or n_bootstrap < 2:
            raise DataError(
                f"n_samples is {n_samples}, n_bootstrap {n_bootstrap}; at least 8 and 2 are needed."
            )
        self.space = space
        self.method = method
        self.n_samples = n_samples
        self.n_bootstrap = n_bootstrap
        self.seed = seed

    def fit(self, X_train: Tensor, y_train: Tensor, X_test: Tensor, y_test: Tensor) -> Self:
        """Condition the space on the training data, and find the law of its test error.

        Args:
            X_train: inputs ``(train, ...)``, floating point.
            y_train: targets ``(train,)`` or ``(train, outputs)``, floating point: numbers or one-hot.
            X_test: inputs ``(test, ...)``.
            y_test: targets, in the form of `y_train`.

        Returns:
            The object itself.

        Raises:
            DataError: if the data cannot be used, the kernel matrix is not positive definite, or too few
                networks fit the training data.

        Warns:
            UserWarning: with the number of test rows that are training rows too.
        """
        X, y, X_test, y_test = check_task(X_train, y_train, X_test, y_test)
        self._notes: list[str] = []
        duplicates = count_duplicates(X, X_test)
        if duplicates:
            self._notes.append(f"{duplicates} of {len(X_test)} test rows are training rows too")
            warnings.warn(f"{self._notes[0]}; the test error is lower for it.", stacklevel=2)
        self._y_test = y_test
        self._bootstrapped: dict[str, list[Law]] = {}
        exact: LossLaw | None = None
        if isinstance(self.space, KernelSpace):
            exact = self._fit_kernel(self.space, X, y, X_test, y_test)
        else:
            trained = self.space.errors(X, y, X_test, y_test, self.seed)
            self.losses_ = trained.test_errors.numpy()
            left_out = self.space.n_models - len(self.losses_)
            if left_out:
                self._notes.append(f"{left_out} networks do not fit the training data and are left out")
            if trained.why_not:
                self._notes.append(f"trained model by model: {trained.why_not}")
        self._exact = exact
        self.law_ = self._law(self._chosen)
        return self

    def bits(self, target_error: float) -> Measurement:
        """The bits to this error.

        Args:
            target_error: mean squared test error over points and outputs, > 0.

        Returns:
            The bits with their interval over the bootstrap (none for an exact law; with "empirical" that of
            Clopper and Pearson). Its parts are "scaled chi-square", the bits under another form of the law,
            and "extrapolation", how many standard deviations the target lies below the mean error. Beyond 6
            the flag "extrapolated" is set: the form of the law decides the number.

        Raises:
            DataError: if the error is not above zero.
            NotSupportedError: if `fit` has not been called.
        """
        return self._measure(float(target_error), None)

    def curve(self, errors: ArrayLike) -> Measurement:
        """The bits to each of several errors.

        Args:
            errors: ``(errors,)``, each > 0.

        Returns:
            As `bits`, with one entry per error.

        Raises:
            DataError: if an error is not above zero.
            NotSupportedError: if `fit` has not been called.
        """
        e = np.asarray(errors, dtype=np.float64).reshape(-1)
        return self._measure(e, tuple(float(x) for x in e))

    # -- helpers ---------------------------------------------------------------------------------------------

    @property
    def _chosen(self) -> str:
        if self.method != "auto":
            return self.method
        return "exact" if isinstance(self.space, KernelSpace) else "ncx2"

    def _fit_kernel(
        self, space: KernelSpace, X: Tensor, y: Tensor, X_test: Tensor, y_test: Tensor
    ) -> LossLaw:
        posterior = space.posterior(X, y, X_test)
        if posterior.jitter > space.jitter * (1 + 1e-6):
            self._notes.append(f"the kernel matrix needed a jitter of {posterior.jitter:.0e}")
        law = posterior.law(y_test)
        self.losses_ = law.sample(self.n_samples, np.random.default_rng(derive(self.seed, "losses")))
        return law

    def _law(self, name: str) -> Law:
        if name == "exact":
            assert self._exact is not None
            return self._exact
        if name == "scaled_chi2" and self._exact is not None:  # its two moments are known without draws
            return matched_chi_square(self._exact.mean, self._exact.std**2)
        return fit_law(self.losses_, _fit_method(name))

    def _resampled(self, name: str) -> list[Law]:
        """The law fitted to resamples of the errors; kept, since every target error needs it."""
        if name not in self._bootstrapped:
            rng = np.random.default_rng(derive(self.seed, "bootstrap"))
            laws: list[Law] = []
            while len(laws) < self.n_bootstrap:
                losses = rng.choice(self.losses_, len(self.losses_))
                if np.ptp(losses) > 0:
                    laws.append(fit_law(losses, _fit_method(name)))
            self._bootstrapped[name] = laws
        return self._bootstrapped[name]

    def _interval(self, name: str, law: Law, errors: Array) -> tuple[Array, Array] | None:
        if name == "exact" or (name == "scaled_chi2" and self._exact is not None):
            return None
        if isinstance(law, EmpiricalLaw):
            low, high = law.interval(errors, CONFIDENCE)
            return to_bits(high), to_bits(low)
        drawn = np.stack([to_bits(each.log_cdf(errors)) for each in self._resampled(name)])
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = np.percentile(drawn, [tail, 100 - tail], axis=0, method="nearest")
        value = to_bits(law.log_cdf(errors))
        return np.minimum(low, value), np.maximum(high, value)

    def _measure(self, errors: float | Array, index: tuple[float, ...] | None) -> Measurement:
        if not hasattr(self, "law_"):
            raise NotSupportedError("the inductive bias has no task yet; call fit with its data first.")
        e, chosen, law = checked_targets(errors), self._chosen, self.law_
        exact = chosen == "exact"
        n = len(self._y_test) if exact else len(self.losses_)
        common: dict[str, Any] = {"index": index, "axis": "test error" if index else "", "n": n}

        def measure(name: str, method: str, law: Law, **rest: Any) -> Measurement:
            return Measurement(
                name,
                to_bits(law.log_cdf(e)),
                self._interval(method, law, e),
                "bits",
                **common,
                **rest,
            )

        extrapolation = (law.mean - e) / law.std if law.std > 0 else np.full_like(e, math.inf)
        far = bool(np.any(extrapolation > FAR)) and not exact
        notes, parts = list(self._notes), {}
        if far:
            notes.append(
                f"the error lies {float(np.max(extrapolation)):.1f} standard deviations below the mean of "
                "the sampled errors; the form of the law decides the number"
            )
        if chosen != "scaled_chi2":
            parts["scaled chi-square"] = measure("scaled chi-square", "scaled_chi2", self._law("scaled_chi2"))
        parts["extrapolation"] = Measurement(
            "extrapolation",
            extrapolation,
            unit="standard deviations",
            confidence=None,
            **common,
        )
        return measure(
            "inductive bias", chosen, law, confidence=None if exact else CONFIDENCE, bias=_BIAS[chosen],
            notes=tuple(notes), flags=frozenset({"extrapolated"} if far else ()), parts=parts,
        )  # fmt: skip


_BIAS = {
    "exact": "exact for these test points but for the saddlepoint, a few per cent of the probability.",
    "ncx2": "in the far tail too low where few directions of the hypotheses vary most.",
    "paper": "its optimizer may stop far from the best fit, and its tail formula stays finite as the error "
    "goes to 0.",
    "scaled_chi2": "in the far tail too low where few directions of the hypotheses vary most.",
    "empirical": "says nothing beyond the smallest error that was seen.",
}


def added_bias(a: InductiveBias, b: InductiveBias, target_error: float) -> Measurement:
    """The bits that space b adds to what space a has: I_a - I_b, on the same task.

    Args:
        a: the base, fitted.
        b: the other, fitted on the same data.
        target_error: the wanted error, > 0.

    Returns:
        The difference; its interval combines those of the two, taken as independent.

    Raises:
        DataError: if the two were fitted on different test targets.
        NotSupportedError: if one is not fitted.
    """
    first, second = a.bits(target_error), b.bits(target_error)
    if not torch.equal(a._y_test.cpu(), b._y_test.cpu()):
        raise DataError("the two spaces were fitted on different test targets; fit both on one task.")
    value = float(first.value) - float(second.value)
    (low_a, high_a), (low_b, high_b) = (
        (float(m.value), float(m.value))
        if m.interval is None
        else (float(m.interval[0]), float(m.interval[1]))
        for m in (first, second)
    )
    # Independent errors add in squares, on each side by itself.
    low = value - math.hypot(float(first.value) - low_a, high_b - float(second.value))
    high = value + math.hypot(high_a - float(first.value), float(second.value) - low_b)
    return Measurement(
        "added bias", value, (low, high), "bits", n=min(first.n, second.n), notes=first.notes + second.notes,
        flags=first.flags | second.flags, parts={"base": first, "other": second},
    )  # fmt: skip


def check_task(
    X: Tensor, y: Tensor, X_test: Tensor, y_test: Tensor
) -> tuple[Tensor, Float[Tensor, "train outputs"], Tensor, Float[Tensor, "test outputs"]]:
    """The data of a task, targets as columns.

    Raises:
        DataError: naming what does not fit.
    """
    tensors = {"X_train": X, "y_train": y, "X_test": X_test, "y_test": y_test}
    for name, values in tensors.items():
        if not isinstance(values, Tensor):
            raise DataError(f"{name} is a {type(values).__name__}; give a torch tensor.")
        if name.startswith("y") and not values.is_floating_point():
            raise DataError(
                f"{name} holds {values.dtype}, as class labels do; give one-hot targets: "
                f"torch.nn.functional.one_hot({name}).float()."
            )
        if not values.is_floating_point():
            raise DataError(
                f"{name} holds {values.dtype}; give floating-point inputs, such as {name}.float()."
            )
        if len(values) == 0 or not bool(values.isfinite().all()):
            raise DataError(f"{name} is empty or holds numbers that are not finite; clean it first.")
    y, y_test = (values[:, None] if values.ndim == 1 else values for values in (y, y_test))
    if y.ndim != 2 or y_test.ndim != 2 or y.shape[1] != y_test.shape[1] or X.shape[1:] != X_test.shape[1:]:
        raise DataError(
            f"training data have shapes {tuple(X.shape)} and {tuple(y.shape)}, test data "
            f"{tuple(X_test.shape)} and {tuple(y_test.shape)}; rows must have one shape, and targets "
            "one or two dimensions."
        )
    if len(X) != len(y) or len(X_test) != len(y_test):
        raise DataError(
            f"there are {len(X)} training inputs for {len(y)} targets, and {len(X_test)} test inputs for "
            f"{len(y_test)}; give one target per input."
        )
    return X, y, X_test, y_test


def count_duplicates(X: Tensor, X_test: Tensor) -> int:
    """Test rows that equal a training row exactly."""
    seen = {row.tobytes() for row in X.flatten(1).cpu().numpy()}
    return sum(row.tobytes() in seen for row in X_test.flatten(1).cpu().numpy())


def _fit_method(name: str) -> FitMethod:
    assert name in ("ncx2", "paper", "scaled_chi2", "empirical")
    return name  # type: ignore[return-value]
