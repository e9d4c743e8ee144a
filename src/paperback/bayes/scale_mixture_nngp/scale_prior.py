"""Priors H of the variance s2 of the last layer's weights, and integrals over them.

Everything that the data say of s2 goes through three numbers: n, the number of observations, q = y^T K^-1 y,
and log|K|:

    log N(y; 0, s2 K) = -n/2 log(2 pi s2) - log|K|/2 - q / (2 s2).

For an inverse gamma H the integral over s2 is in closed form. For any other H with a density it is a sum over
a grid in log s2, on which the integrand is smooth and falls exponentially at both ends, so that the
trapezoidal rule converges faster than any power of the spacing; for a sampler without a density it is
importance sampling with H as the proposal, as the paper does it.

Source: Lee, Yun, Yang and Lee, Scale mixtures of neural network Gaussian processes (2022), sections 3.1
and 4.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Categorical, Distribution

from paperback.errors import DataError

COARSE, FINE = 2001, 801  # nodes of the two grids
REACH = 100.0  # the coarse grid goes from exp(-100) to exp(100)
DEPTH = 70.0  # nats below its greatest value at which the integrand is cut off
FEWEST, FEW = 10.0, 50.0  # effective sample sizes: an error below the first, quadrature below the second


class ScalePrior(ABC):
    """A law of s2 > 0."""

    @abstractmethod
    def log_prob(self, s2: Tensor) -> Tensor:
        """Log density, of the shape of s2."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
        """n draws, float64."""


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    smallest = torch.finfo(torch.float64).tiny
    return torch.rand(n, generator=generator, dtype=torch.float64).clamp(smallest, 1 - 1e-16)


@dataclass(frozen=True)
class InverseGamma(ScalePrior):
    """p(s2) = beta^alpha / Gamma(alpha) s2^(-alpha-1) exp(-beta / s2): the Student-t process.

    Args:
        alpha: > 0; the process has 2 alpha degrees of freedom.
        beta: > 0; its scale matrix is beta / alpha K.
    """

    alpha: float = 2.0
    beta: float = 2.0

    def log_prob(self, s2: Tensor) -> Tensor:
        """Log density."""
        constant = self.alpha * math.log(self.beta) - math.lgamma(self.alpha)
        return constant - (self.alpha + 1) * s2.log() - self.beta / s2

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
        """Draws by the inverse of the gamma distribution function."""
        from scipy.special import gammainccinv

        u = _uniform(n, generator).numpy()
        return torch.as_tensor(self.beta / gammainccinv(self.alpha, u))


@dataclass(frozen=True)
class BurrXII(ScalePrior):
    """p(s2) = c d s2^(c-1) / (1 + s2^c)^(d+1).

    Args:
        c: > 0.
        d: > 0.
    """

    c: float = 2.0
    d: float = 1.0

    def log_prob(self, s2: Tensor) -> Tensor:
        """Log density."""
        log_power = self.c * s2.log()
        return math.log(self.c * self.d) + log_power - s2.log() - (self.d + 1) * _softplus(log_power)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
        """Draws by inverse cdf."""
        u = _uniform(n, generator)
        return torch.expm1(-torch.log1p(-u) / self.d).pow(1 / self.c)


@dataclass(frozen=True)
class HalfCauchy(ScalePrior):
    """A half-Cauchy law of the standard deviation: p(s2) = 1 / (pi scale sqrt(s2) (1 + s2 / scale^2)).

    Args:
        scale: median of s, > 0.
    """

    scale: float = 1.0

    def log_prob(self, s2: Tensor) -> Tensor:
        """Log density."""
        ratio = s2.log() - 2 * math.log(self.scale)
        return -math.log(math.pi * self.scale) - s2.log() / 2 - _softplus(ratio)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
        """Draws by inverse cdf."""
        return (self.scale * (math.pi / 2 * _uniform(n, generator)).tan()).square()


@dataclass(frozen=True)
class Exponential(ScalePrior):
    """p(s2) = rate exp(-rate s2): a Laplace process.

    Args:
        rate: > 0.
    """

    rate: float = 1.0

    def log_prob(self, s2: Tensor) -> Tensor:
        """Log density."""
        return math.log(self.rate) - self.rate * s2

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
        """Draws by inverse cdf."""
        return -torch.log1p(-_uniform(n, generator)) / self.rate


@dataclass(frozen=True)
class PointMass(ScalePrior):
    """One scale: the NNGP.

    Args:
        value: of s2, > 0.
    """

    value: float = 1.0

    def log_prob(self, s2: Tensor) -> Tensor:
        """Infinite at the value; there is no density to integrate."""
        return torch.where(s2 == self.value, math.inf, -math.inf).to(s2)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
        """The value, n times."""
        return torch.full((n,), self.value, dtype=torch.float64)


class Sampler(ScalePrior):
    """A law that can only be drawn from.

    Args:
        function: ``(n, generator) -> draws (n,)``, positive.
    """

    def __init__(self, function: Callable[[int, torch.Generator], Tensor]) -> None:
        self.function = function

    def log_prob(self, s2: Tensor) -> Tensor:
        """Not there."""
        raise DataError('a sampler of scales has no density; use inference="importance", or a prior by name.')

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
        """Draws, checked."""
        draws = torch.as_tensor(self.function(n, generator), dtype=torch.float64)
        if draws.shape != (n,) or not bool((draws > 0).all() & draws.isfinite().all()):
            raise DataError(f"the sampler of scales must give {n} positive finite numbers of shape ({n},).")
        return draws


PRIORS: dict[str, type[ScalePrior]] = {
    "inverse-gamma": InverseGamma,
    "burr": BurrXII,
    "half-cauchy": HalfCauchy,
    "exponential": Exponential,
    "point": PointMass,
}
Spec = Sequence[object] | ScalePrior | Callable[[int, torch.Generator], Tensor]


def scale_prior(spec: Spec) -> ScalePrior:
    """A prior from what a user writes.

    Args:
        spec: a name with its parameters, such as ``("inverse-gamma", 2.0, 2.0)``, or "half-cauchy" with the
            default ones; a `ScalePrior`; or a function ``(n, generator) -> draws``.

    Returns:
        The prior.

    Raises:
        DataError: if there is no such prior, or a parameter is not positive.
    """
    if isinstance(spec, ScalePrior):
        prior = spec
    elif callable(spec):
        return Sampler(spec)
    else:
        name, *parameters = [spec] if isinstance(spec, str) else list(spec)
        if name not in PRIORS:
            raise DataError(f"scale_prior is {name!r}; there are {', '.join(PRIORS)}.")
        try:
            prior = PRIORS[str(name)](*map(float, parameters))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise DataError(f"scale_prior {name!r} does not take the parameters {parameters}.") from error
    if not isinstance(prior, Sampler):
        for value in astuple(prior):  # type: ignore[call-overload]
            if not (0 < value < math.inf):
                raise DataError(f"the parameters of {prior} must be positive and finite.")
    return prior


def spec_of(prior: ScalePrior) -> list[object]:
    """Name and parameters of a prior, as JSON values."""
    name = next(name for name, cls in PRIORS.items() if type(prior) is cls)
    return [name, *astuple(prior)]  # type: ignore[call-overload]


class WeightedPoints(Distribution):
    """A law of finitely many points.

    Args:
        points: ``(points,)``.
        log_weights: normalised, ``(points,)``.
    """

    def __init__(self, points: Tensor, log_weights: Tensor) -> None:
        self.points, self.log_weights = points, log_weights
        super().__init__(validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Of the points."""
        return (self.log_weights.exp() * self.points).sum()

    @property
    def variance(self) -> Tensor:
        """Of the points."""
        return (self.log_weights.exp() * (self.points - self.mean).square()).sum()

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Points, drawn."""
        index = Categorical(logits=self.log_weights).sample(torch.Size(sample_shape))
        return self.points[index]

    @property
    def effective_size(self) -> float:
        """1 / sum of squared weights: of so many equal ones."""
        return float(1 / self.log_weights.exp().square().sum())


# -- integrals over s2 ---------------------------------------------------------------------------------------


def log_likelihood(s2: Tensor, q: Tensor, log_det: Tensor, n: Tensor) -> Tensor:
    """log N(y; 0, s2 K) from the three numbers; shapes broadcast."""
    return -0.5 * (n * (2 * math.pi * s2).log() + log_det + q / s2)


def log_evidence(prior: ScalePrior, q: Tensor, log_det: Tensor, n: Tensor) -> Tensor:
    """log of the integral of N(y; 0, s2 K) H(d s2).

    Args:
        prior: with a density, or a point mass.
        q: y^T K^-1 y of each data set, ``(sets,)``.
        log_det: log|K|, ``(sets,)``.
        n: observations, ``(sets,)``.

    Returns:
        ``(sets,)`` float64, differentiable in q and log_det.
    """
    if isinstance(prior, InverseGamma):
        return inverse_gamma_evidence(
            torch.tensor(prior.alpha).to(q), torch.tensor(prior.beta).to(q), q, log_det, n
        )
    if isinstance(prior, PointMass):
        return log_likelihood(torch.tensor(prior.value).to(q), q, log_det, n)
    u, log_step = log_grid(prior, q, n)
    values = (
        prior.log_prob(u.exp()) + u + log_likelihood(u.exp(), q[..., None], log_det[..., None], n[..., None])
    )
    return (values + log_step).logsumexp(-1)


def inverse_gamma_evidence(alpha: Tensor, beta: Tensor, q: Tensor, log_det: Tensor, n: Tensor) -> Tensor:
    """The evidence in closed form, differentiable in alpha and beta too."""
    half = alpha + n / 2
    constant = torch.lgamma(half) - torch.lgamma(alpha) - n / 2 * (2 * math.pi * beta).log()
    return constant - log_det / 2 - half * torch.log1p(q / (2 * beta))


@torch.no_grad()
def log_grid(prior: ScalePrior, q: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes in u = log s2 where the integrand of each data set is not negligible.

    Args:
        prior: with a density.
        q: of each data set, ``(sets,)``.
        n: observations of each, ``(sets,)``.

    Returns:
        u ``(sets, nodes)``, and the logarithm of their weights ``(sets, nodes)``.
    """

    def integrand(u: Tensor) -> Tensor:
        return prior.log_prob(u.exp()) + u - n[..., None] / 2 * u - q[..., None] / 2 * (-u).exp()

    coarse = torch.linspace(-REACH, REACH, COARSE, dtype=torch.float64).expand(*q.shape, -1)
    values = integrand(coarse).nan_to_num(-math.inf)
    kept = values > values.amax(-1, keepdim=True) - DEPTH
    low = coarse.where(kept, math.inf).amin(-1, keepdim=True) - 0.2
    high = coarse.where(kept, -math.inf).amax(-1, keepdim=True) + 0.2
    fractions = torch.linspace(0, 1, FINE, dtype=torch.float64)
    step = (high - low) / (FINE - 1)
    return low + (high - low) * fractions, step.log().expand(*q.shape, FINE)


def posterior_nodes(prior: ScalePrior, q: Tensor, n: Tensor) -> WeightedPoints:
    """The posterior of s2 on a grid.

    Args:
        prior: with a density, or a point mass.
        q: y^T K^-1 y, a number.
        n: observations, a number.

    Returns:
        s2 and normalised log weights; nodes of negligible weight are left out.
    """
    if isinstance(prior, PointMass):
        return WeightedPoints(*torch.tensor([[prior.value], [0.0]], dtype=torch.float64))
    u, log_step = log_grid(prior, q, n)
    weights = prior.log_prob(u.exp()) + u - n / 2 * u - q / 2 * (-u).exp() + log_step
    weights = weights.log_softmax(-1)
    kept = weights > math.log(1e-24)
    return WeightedPoints(u[kept].exp(), weights[kept].log_softmax(-1))


def importance_nodes(
    prior: ScalePrior, q: Tensor, n: Tensor, draws: int, generator: torch.Generator
) -> WeightedPoints:
    """The posterior of s2 by draws from the prior, weighted by the likelihood.

    Args:
        prior: any.
        q: y^T K^-1 y, a number.
        n: observations, a number.
        draws: how many.
        generator: of the draws.

    Returns:
        The draws and their weights.
    """
    s2 = prior.sample(draws, generator)
    weights = (-n / 2 * s2.log() - q / (2 * s2)).log_softmax(-1)
    return WeightedPoints(s2, weights)


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))
