"""Laws of the test error of a random hypothesis, and what they say of its left tail.

A law has ``mean``, ``std``, ``log_cdf(errors)`` in nats, and its name. `LossLaw` is a weighted sum of
non-central chi-squares: the exact law of a kernel, the non-central chi-square fitted to losses, and the
scaled chi-square of equal moments are all of this form. `PaperLaw` is the estimator of the authors' code, and
`EmpiricalLaw` counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from paperback.errors import DataError
from paperback.numerics.linear_algebra import quadratic_form_logcdf

FitMethod = Literal["ncx2", "paper", "scaled_chi2", "empirical"]
Array = NDArray[np.float64]

FEWEST_LOSSES = 8
# Shares of the noncentrality in df + nc from which the likelihood is climbed; mean and variance are matched.
STARTS = (0.02, 0.2, 0.5, 0.8, 0.98)


class Law(Protocol):
    """What every law of the test error has."""

    @property
    def mean(self) -> float:
        """Mean error."""
        ...

    @property
    def std(self) -> float:
        """Standard deviation of the error."""
        ...

    def log_cdf(self, errors: ArrayLike) -> Array:
        """Natural logarithm of P(L <= error), in the shape of `errors`."""
        ...


@dataclass(frozen=True, eq=False)
class LossLaw:
    """L = constant + sum_k weight_k chi'^2(degrees_k, noncentrality_k), independent terms.

    Attributes:
        weights: >= 0, ``(terms,)`` float64.
        degrees: of freedom, > 0, need not be whole.
        noncentrality: >= 0.
        constant: what no hypothesis of the space can avoid, >= 0.
    """

    weights: Array
    degrees: Array
    noncentrality: Array
    constant: float = 0.0

    @property
    def mean(self) -> float:
        """Mean error."""
        return self.constant + float((self.weights * (self.degrees + self.noncentrality)).sum())

    @property
    def std(self) -> float:
        """Standard deviation of the error."""
        return math.sqrt(2 * float((self.weights**2 * (self.degrees + 2 * self.noncentrality)).sum()))

    def log_cdf(self, errors: ArrayLike) -> Array:
        """log P(L <= error) by saddlepoint, in nats."""
        return quadratic_form_logcdf(
            torch.from_numpy(self.weights),
            torch.from_numpy(np.sqrt(self.noncentrality)),
            torch.tensor(np.asarray(errors, dtype=np.float64)),
            degrees=torch.from_numpy(self.degrees),
            constant=self.constant,
        ).numpy()

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """n independent errors, ``(n,)``."""
        total = np.full(n, self.constant)
        for weight, degrees, noncentrality in zip(
            self.weights, self.degrees, self.noncentrality, strict=True
        ):
            total += weight * rng.noncentral_chisquare(degrees, noncentrality, size=n)
        return total

    @classmethod
    def single(cls, degrees: float, noncentrality: float, scale: float) -> LossLaw:
        """The law of one scaled non-central chi-square."""
        return cls(np.array([scale]), np.array([degrees]), np.array([noncentrality]))


@dataclass(frozen=True)
class PaperLaw:
    """The estimator of the authors' code: scipy's ``ncx2.fit``, and Sankaran's formula where it underflows.

    Attributes:
        degrees: of freedom.
        noncentrality: of the variable.
        scale: of the variable.
    """

    degrees: float
    noncentrality: float
    scale: float

    @property
    def mean(self) -> float:
        """Mean error."""
        return self.scale * (self.degrees + self.noncentrality)

    @property
    def std(self) -> float:
        """Standard deviation of the error."""
        return self.scale * math.sqrt(2 * (self.degrees + 2 * self.noncentrality))

    def log_cdf(self, errors: ArrayLike) -> Array:
        """log P(L <= error) as the authors compute it, in nats."""
        from scipy.stats import ncx2

        e = np.asarray(errors, dtype=np.float64)
        with np.errstate(divide="ignore"):
            logs = np.asarray(ncx2.logcdf(e, self.degrees, self.noncentrality, scale=self.scale))
        lost = np.isneginf(logs) & (e > 0)
        return np.where(
            lost, -sankaran_nats(np.where(lost, e, 1.0), self.degrees, self.noncentrality, self.scale), logs
        )


@dataclass(frozen=True, eq=False)
class EmpiricalLaw:
    """The errors that were seen, each as probable as the other.

    Attributes:
        losses: ``(n,)``.
    """

    losses: Array

    @property
    def mean(self) -> float:
        """Mean error."""
        return float(self.losses.mean())

    @property
    def std(self) -> float:
        """Standard deviation of the error."""
        return float(self.losses.std(ddof=1))

    def log_cdf(self, errors: ArrayLike) -> Array:
        """log of the share of losses at or below each error; -infinity where there is none."""
        with np.errstate(divide="ignore"):
            return np.log((self.losses <= np.asarray(errors, dtype=np.float64)[..., None]).mean(-1))

    def interval(self, errors: ArrayLike, confidence: float) -> tuple[Array, Array]:
        """Clopper and Pearson's interval of log P(L <= error), lower and upper end."""
        from scipy.stats import beta

        hits = (self.losses <= np.asarray(errors, dtype=np.float64)[..., None]).sum(-1)
        n, tail = len(self.losses), (1 - confidence) / 2
        with np.errstate(divide="ignore"):
            low = np.log(np.where(hits > 0, beta.ppf(tail, np.maximum(hits, 1), n - hits + 1), 0.0))
            high = np.log(np.where(hits < n, beta.ppf(1 - tail, hits + 1, np.maximum(n - hits, 1)), 1.0))
        return low, high


def fit_law(losses: ArrayLike, method: FitMethod = "ncx2") -> Law:
    """A law for a sample of test errors.

    Args:
        losses: one per hypothesis, > 0, at least 8.
        method: "ncx2", the scaled non-central chi-square of greatest likelihood; "paper", the same family as
            the authors fit it; "scaled_chi2", the scaled chi-square of equal mean and variance; "empirical".

    Returns:
        The law.

    Raises:
        DataError: if there are too few losses, they do not vary, or one is not positive and finite.
    """
    x = checked_losses(losses)
    if method == "empirical":
        return EmpiricalLaw(x)
    if method == "scaled_chi2":
        return matched_chi_square(float(x.mean()), float(x.var(ddof=1)))
    if method == "ncx2":
        return _fit_noncentral(x)
    if method == "paper":
        from scipy.stats import ncx2

        degrees, noncentrality, _, scale = ncx2.fit(x, floc=0)
        return PaperLaw(float(degrees), float(noncentrality), float(scale))
    raise DataError(f'method is {method!r}; it must be "ncx2", "paper", "scaled_chi2" or "empirical".')


def bits_from_losses(losses: ArrayLike, target_error: ArrayLike, method: FitMethod = "ncx2") -> Array:
    """Bits of inductive bias from the test errors of hypotheses that fit the training data.

    Args:
        losses: one test error per hypothesis, > 0, at least 8.
        target_error: the wanted error or errors, > 0.
        method: see `fit_law`.

    Returns:
        -log2 P(L <= error), >= 0, in the shape of `target_error`.

    Raises:
        DataError: if the losses or a target error cannot be used.
    """
    return to_bits(fit_law(losses, method).log_cdf(checked_targets(target_error)))


def to_bits(log_cdf: ArrayLike) -> Array:
    """Nats of log-probability as bits of information, >= 0."""
    return np.maximum(0.0, -np.asarray(log_cdf) / math.log(2))


def sankaran_nats(error: ArrayLike, degrees: float, noncentrality: float, scale: float) -> Array:
    """-log P(L <= error) of a scaled non-central chi-square, by Sankaran's normal approximation.

    As in the authors' code this is z^2 / 2, the leading term of -log Phi(z), which leaves out
    log(|z| sqrt(2 pi)). With hundreds of degrees of freedom z itself is good to 2 % down to P = 1e-6. In the
    far tail, where the authors use it, it falls short: by a third at 460 nats of 200 degrees of freedom. As
    the error goes to 0 it stays finite, which the truth does not.

    Args:
        error: > 0.
        degrees: of freedom.
        noncentrality: of the variable.
        scale: of the variable.

    Returns:
        Nats, in the shape of `error`.

    Source: Sankaran (1959), Biometrika 46.
    """
    total = degrees + noncentrality
    h = 1 - 2 / 3 * total * (degrees + 3 * noncentrality) / (degrees + 2 * noncentrality) ** 2
    p = (degrees + 2 * noncentrality) / total**2
    m = (h - 1) * (1 - 3 * h)
    x = np.asarray(error, dtype=np.float64) / scale
    mean = 1 + h * p * (h - 1 - (2 - h) * m * p / 2)
    z = ((x / total) ** h - mean) / (h * math.sqrt(2 * p) * (1 + m * p / 2))
    return z**2 / 2


def matched_chi_square(mean: float, variance: float) -> LossLaw:
    """The scaled chi-square of this mean and variance."""
    return LossLaw.single(2 * mean**2 / variance, 0.0, variance / (2 * mean))


def checked_losses(losses: ArrayLike) -> Array:
    """Losses as a float64 vector.

    Raises:
        DataError: if there are fewer than 8, one is not positive and finite, or all are equal.
    """
    x = np.asarray(losses, dtype=np.float64).reshape(-1)
    if len(x) < FEWEST_LOSSES:
        raise DataError(
            f"there are {len(x)} losses; a law needs at least {FEWEST_LOSSES}, train more models."
        )
    bad = ~(np.isfinite(x) & (x > 0))
    if bad.any():
        raise DataError(
            f"loss {int(bad.argmax())} is {x[bad.argmax()]}; every test error must be positive and finite."
        )
    if np.ptp(x) == 0:
        raise DataError(f"all {len(x)} losses are {x[0]:.6g}; the hypotheses must differ from each other.")
    return x


def checked_targets(target_error: ArrayLike) -> Array:
    """Target errors as float64.

    Raises:
        DataError: if one is not above zero.
    """
    e = np.asarray(target_error, dtype=np.float64)
    if not (e > 0).all():  # NaN too
        raise DataError(f"target_error is {np.asarray(target_error).tolist()}; it must be above zero.")
    return e


# -- the non-central chi-square of greatest likelihood -------------------------------------------------------


def _fit_noncentral(losses: Array) -> LossLaw:
    """Climb the likelihood in log(df + nc), the logit of nc's share of it, and log mean.

    The likelihood is nearly flat along laws of equal mean and variance, so that the climb starts at the best
    of a few of them.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    mean, variance = float(losses.mean()), float(losses.var())

    def parameters(point: Array) -> tuple[float, float, float]:
        total, share = math.exp(min(point[0], 40.0)), float(expit(point[1]))
        return total * (1 - share), total * share, math.exp(point[2]) / total

    def cost(point: Array) -> float:
        return -float(_log_density(losses, *parameters(point)).sum())

    starts = [
        np.array(
            [math.log(2 * mean**2 * (1 + share) / variance), math.log(share / (1 - share)), math.log(mean)]
        )
        for share in STARTS
    ]
    best = minimize(
        cost, min(starts, key=cost), method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-5}
    ).x
    return LossLaw.single(*parameters(best))


def _log_density(x: Array, degrees: float, noncentrality: float, scale: float) -> Array:
    """Of a scaled non-central chi-square; -infinity where a parameter has left its range.

    scipy's has a Bessel function that underflows where there are many degrees and little noncentrality; there
    its uniform expansion for large orders is exact to 1e-6 (Abramowitz and Stegun 9.7.7).
    """
    from scipy.special import ive

    if degrees <= 0 or noncentrality <= 0 or scale <= 0:
        return np.full_like(x, -math.inf)
    order, y = degrees / 2 - 1, x / scale
    z = np.sqrt(noncentrality * y)
    scaled = ive(order, z)
    small = scaled < 1e-280
    with np.errstate(divide="ignore"):
        log_bessel = np.log(scaled) + z
    if small.any() and order > 1:
        root = np.hypot(order, z)
        t = order / root
        expansion = root - order * np.arcsinh(order / z) - 0.5 * np.log(2 * math.pi * root)
        expansion += np.log1p((3 * t - 5 * t**3) / (24 * order))
        log_bessel = np.where(small, expansion, log_bessel)
    tail = (degrees / 4 - 0.5) * np.log(y / noncentrality) - (y + noncentrality) / 2
    return tail + log_bessel - math.log(2 * scale)
