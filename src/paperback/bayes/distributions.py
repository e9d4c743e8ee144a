"""The laws that Bayesian methods predict, as torch distributions with cdf and icdf.

`Rescaled` puts a law into the units of the data, `NormalMixture` is what an ensemble or a set of posterior
draws says of one observation, `MultivariateStudentT` the joint law of a Student-t process, and
`FunctionDraws` a joint law that is known by sampled functions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    MultivariateNormal,
    Normal,
    StudentT,
    constraints,
)
from torch.distributions.utils import broadcast_all

from paperback.errors import DataError, NotSupportedError

EDGE = 1e-9  # probabilities of base samples are kept so far from 0 and 1
BISECTIONS = 60  # halvings of an interval: to the rounding error of float64


class Rescaled(Distribution):
    """The law of shift + scale * Y.

    Args:
        base: the law of Y, with a batch shape only.
        shift: broadcasts with the batch shape.
        scale: > 0, broadcasts with the batch shape.

    Raises:
        DataError: if a scale is not positive.
    """

    support = constraints.real
    has_rsample = True

    def __init__(self, base: Distribution, shift: Tensor, scale: Tensor) -> None:
        if not bool((scale > 0).all()):
            raise DataError("the scale of a law must be positive.")
        self.base, self.shift, self.scale = base, shift, scale
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """shift + scale E Y."""
        return self.shift + self.scale * self.base.mean

    @property
    def variance(self) -> Tensor:
        """scale^2 Var Y."""
        return self.scale.square() * self.base.variance

    def log_prob(self, value: Tensor) -> Tensor:
        """log p_Y((value - shift) / scale) - log scale."""
        return self.base.log_prob((value - self.shift) / self.scale) - self.scale.log()

    def cdf(self, value: Tensor) -> Tensor:
        """P(shift + scale Y <= value)."""
        return self.base.cdf((value - self.shift) / self.scale)

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile at probability `value`."""
        return self.shift + self.scale * self.base.icdf(value)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``(*sample_shape, *batch)``, differentiable if the base's are."""
        draws = self.base.rsample(sample_shape) if self.base.has_rsample else self.base.sample(sample_shape)
        return self.shift + self.scale * draws

    def expand(self, batch_shape: Any, _instance: Any = None) -> Rescaled:
        """The same law with its batch dimensions broadcast to `batch_shape`."""
        shift, scale = (part.expand(batch_shape) for part in (self.shift, self.scale))
        return Rescaled(self.base.expand(batch_shape), shift, scale)


class SingleOutput(Distribution):
    """A law whose last batch dimension has one entry, without that dimension.

    Args:
        law: of batch shape ``(*batch, 1)``.
    """

    support = constraints.real
    has_rsample = True

    def __init__(self, law: Distribution) -> None:
        self.law = law
        super().__init__(law.batch_shape[:-1], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Of each point."""
        return self.law.mean[..., 0]

    @property
    def variance(self) -> Tensor:
        """Of each point."""
        return self.law.variance[..., 0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of each point."""
        return self.law.log_prob(torch.as_tensor(value)[..., None])[..., 0]

    def cdf(self, value: Tensor) -> Tensor:
        """P(Y <= value)."""
        return self.law.cdf(torch.as_tensor(value)[..., None])[..., 0]

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile at probability `value`."""
        return self.law.icdf(torch.as_tensor(value)[..., None])[..., 0]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``(*sample_shape, *batch)``."""
        return self.law.rsample(sample_shape)[..., 0]


class Reshaped(Distribution):
    """A law whose first batch dimension is taken apart.

    Args:
        law: of batch shape ``(rows, outputs)``.
        shape: whose product is the number of rows.
    """

    support = constraints.real
    has_rsample = True

    def __init__(self, law: Distribution, shape: torch.Size) -> None:
        self.law, self.shape = law, torch.Size(shape)
        super().__init__(self.shape + law.batch_shape[1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Of each point."""
        return self.law.mean.reshape(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Of each point."""
        return self.law.variance.reshape(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of each point."""
        return self._through(self.law.log_prob, value)

    def cdf(self, value: Tensor) -> Tensor:
        """P(Y <= value)."""
        return self._through(self.law.cdf, value)

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile at probability `value`."""
        return self._through(self.law.icdf, value)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``(*sample_shape, *batch)``."""
        draws = self.law.rsample(sample_shape) if self.law.has_rsample else self.law.sample(sample_shape)
        return draws.reshape(self._extended_shape(torch.Size(sample_shape)))

    def _through(self, function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        full = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        extra = full.shape[: full.ndim - len(self.batch_shape)]
        return function(full.reshape(*extra, *self.law.batch_shape)).reshape(full.shape)


def in_units(law: Distribution, shift: Tensor, scale: Tensor, *, flat: bool) -> Distribution:
    """The law of shift + scale * Y; an ordinary torch Normal if Y has one.

    Args:
        law: of Y, batch ``(rows, outputs)``.
        shift: ``(outputs,)``.
        scale: ``(outputs,)``, > 0.
        flat: there is one output, and its dimension is dropped.

    Returns:
        A law of batch ``(rows, outputs)``, or ``(rows,)``.
    """
    shift, scale = shift.expand(law.batch_shape), scale.expand(law.batch_shape)
    if isinstance(law, Normal):
        mean, std = shift + scale * law.mean, scale * law.stddev
        return Normal(mean[..., 0], std[..., 0]) if flat else Normal(mean, std)
    rescaled = Rescaled(law, shift, scale)
    return SingleOutput(rescaled) if flat else rescaled


class StudentTWithQuantiles(StudentT):
    """torch's Student-t distribution with the cdf and icdf that it lacks.

    Both are exact in value (scipy's). Their gradients with respect to location and scale are exact too; the
    degrees of freedom get none.
    """

    @property
    def _scipy_df(self) -> Any:
        return self.df.detach().cpu().numpy()

    def cdf(self, value: Tensor) -> Tensor:
        """P(Y <= value)."""
        from scipy.special import stdtr

        standard = (value - self.loc) / self.scale
        result = torch.as_tensor(stdtr(self._scipy_df, standard.detach().cpu().numpy())).to(standard)
        # The slope of the cdf is the density: a term of value zero carries it.
        density = StudentT(self.df).log_prob(standard.detach()).exp().detach()
        return result + density * (standard - standard.detach())

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile at probability `value`."""
        from scipy.special import stdtrit

        standard = torch.as_tensor(stdtrit(self._scipy_df, value.detach().cpu().numpy())).to(self.loc)
        return self.loc + self.scale * standard


class NormalMixture(Distribution):
    """A mixture of normal laws over the first dimension.

    Args:
        mean: ``(draws, *batch)``.
        std: > 0, broadcasts with it.
        log_weights: ``(draws,)`` or ``(draws, *batch)``, normalised here; equal weights if not given.

    Raises:
        DataError: if there is no component or a standard deviation is not positive.
    """

    support = constraints.real
    has_rsample = False

    def __init__(self, mean: Tensor, std: Tensor | float, log_weights: Tensor | None = None) -> None:
        means, stds = broadcast_all(mean, std)
        if means.ndim == 0 or means.shape[0] == 0:
            raise DataError("a mixture needs at least one component, in the first dimension.")
        if not bool((stds > 0).all()):
            raise DataError("the standard deviations of a mixture must be positive.")
        weights = means.new_zeros(len(means)) if log_weights is None else log_weights.to(means)
        weights = weights.reshape(weights.shape + (1,) * (means.ndim - weights.ndim)).expand_as(means)
        # Components stand last from here on, so that values and draws broadcast with the batch.
        self.components = Normal(means.movedim(0, -1), stds.movedim(0, -1), validate_args=False)
        self.log_weights = weights.movedim(0, -1).log_softmax(-1)
        super().__init__(means.shape[1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Weighted mean of the components' means."""
        return (self.log_weights.exp() * self.components.mean).sum(-1)

    @property
    def variance(self) -> Tensor:
        """Mean of the variances and variance of the means."""
        spread = (self.components.mean - self.mean[..., None]).square()
        return (self.log_weights.exp() * (self.components.variance + spread)).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log of the weighted sum of densities."""
        return (self.log_weights + self.components.log_prob(value[..., None])).logsumexp(-1)

    def cdf(self, value: Tensor) -> Tensor:
        """P(Y <= value)."""
        return (self.log_weights.exp() * self.components.cdf(value[..., None])).sum(-1)

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile at probability `value`, by bisection, with exact gradients."""
        probability = torch.as_tensor(value).to(self.components.mean)
        probability = probability.expand(torch.broadcast_shapes(probability.shape, self.batch_shape))
        with torch.no_grad():  # the components' own quantiles bound the mixture's
            quantiles = self.components.icdf(probability[..., None])
            low, high = quantiles.amin(-1), quantiles.amax(-1)
        return icdf_by_bisection(self, probability, low, high)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``(*sample_shape, *batch)``."""
        with torch.no_grad():
            index = Categorical(logits=self.log_weights).sample(torch.Size(sample_shape))[..., None]
            parts = (self.components.mean, self.components.stddev)
            mean, std = (part.expand(*index.shape[:-1], -1).gather(-1, index)[..., 0] for part in parts)
            return torch.normal(mean, std)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NormalMixture:
        """The same mixture with its batch dimensions broadcast to `batch_shape`."""
        size = (*batch_shape, self.log_weights.shape[-1])
        parts = (self.components.mean, self.components.stddev, self.log_weights)
        return NormalMixture(*(part.expand(size).movedim(-1, 0) for part in parts))


class MultivariateStudentT(Distribution):
    """A multivariate Student-t law: a normal vector divided by the root of a shared chi-squared over df.

    Args:
        df: degrees of freedom > 0, ``batch`` or a number.
        loc: ``(*batch, q)``.
        scale_tril: lower Cholesky factor of the scale matrix, ``(*batch, q, q)``. The covariance is
            df / (df - 2) times the scale matrix.
        shared: one chi-squared variable for the whole batch, as for the outputs of one network.

    Raises:
        DataError: if df is not positive.
    """

    support = constraints.real_vector
    has_rsample = True

    def __init__(self, df: Tensor | float, loc: Tensor, scale_tril: Tensor, *, shared: bool = False) -> None:
        self.shared = shared
        self.df = torch.as_tensor(df).to(loc)
        if not bool((self.df > 0).all()):
            raise DataError("the degrees of freedom of a Student-t law must be positive.")
        batch = torch.broadcast_shapes(self.df.shape, loc.shape[:-1], scale_tril.shape[:-2])
        q = loc.shape[-1]
        self.df = self.df.expand(batch)
        self.loc, self.scale_tril = loc.expand(*batch, q), scale_tril.expand(*batch, q, q)
        super().__init__(batch, torch.Size([q]), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The location; NaN where df <= 1, where there is no mean."""
        return self.loc.where(self.df[..., None] > 1, torch.nan)

    @property
    def variance(self) -> Tensor:
        """Of each entry; infinite where df <= 2."""
        return self.marginal().variance

    @property
    def covariance_matrix(self) -> Tensor:
        """df / (df - 2) times the scale matrix; infinite where df <= 2."""
        factor = (self.df / (self.df - 2)).where(self.df > 2, math.inf)
        return factor[..., None, None] * (self.scale_tril @ self.scale_tril.mT)

    def marginal(self) -> StudentTWithQuantiles:
        """The laws of the single entries, batch ``(*batch, q)``."""
        scale = self.scale_tril.square().sum(-1).sqrt()
        return StudentTWithQuantiles(self.df[..., None], self.loc, scale, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of vectors ``(..., q)``."""
        q = self.event_shape[0]
        difference = (value - self.loc)[..., None]
        whitened = torch.linalg.solve_triangular(
            self.scale_tril.expand(*difference.shape[:-2], q, q), difference, upper=False
        )[..., 0]
        log_det = self.scale_tril.diagonal(dim1=-1, dim2=-2).log().sum(-1)
        half = (self.df + q) / 2
        normaliser = torch.lgamma(half) - torch.lgamma(self.df / 2) - q / 2 * (self.df * math.pi).log()
        return normaliser - log_det - half * torch.log1p(whitened.square().sum(-1) / self.df)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``(*sample_shape, *batch, q)``, differentiable in location and scale."""
        shape = torch.Size(sample_shape)
        normal = torch.randn(self._extended_shape(shape), dtype=self.loc.dtype, device=self.loc.device)
        one = (1,) * len(self.batch_shape) if self.shared else self.batch_shape
        return self.from_base(normal, torch.randn(shape + one, dtype=self.loc.dtype, device=self.loc.device))

    def from_base(self, normal: Tensor, first: Tensor) -> Tensor:
        """The draw of standard normal numbers: ``(..., q)``, and ``(...)`` for the chi-squared variable."""
        from scipy.special import chdtri, ndtr

        upper = ndtr(-first.detach().cpu().numpy()).clip(EDGE, 1 - EDGE)
        chi2 = torch.as_tensor(chdtri(self.df.detach().cpu().numpy(), upper)).to(normal)
        spread = (self.scale_tril @ normal[..., None])[..., 0]
        return self.loc + spread * (self.df / chi2).sqrt()[..., None]


class NormalVectorMixture(Distribution):
    """A mixture of multivariate normal laws over the first dimension; one component for the whole batch.

    Args:
        log_weights: ``(components,)``, normalised here.
        loc: ``(components or 1, *batch, q)``.
        scale_tril: lower Cholesky factors of the covariances, ``(components or 1, *batch, q, q)``.
        factors: numbers that multiply the factors, ``(components,)``, where the components differ by a scale
            only; ones if not given.
    """

    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, log_weights: Tensor, loc: Tensor, scale_tril: Tensor, factors: Tensor | None = None
    ) -> None:
        self.log_weights = log_weights.log_softmax(0)
        self.loc, self.scale_tril = loc, scale_tril
        self.factors = torch.ones_like(log_weights) if factors is None else factors
        super().__init__(loc.shape[1:-1], loc.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Weighted mean of the components' means."""
        return self.marginal().mean

    @property
    def variance(self) -> Tensor:
        """Of each entry."""
        return self.marginal().variance

    def marginal(self) -> NormalMixture:
        """The laws of the single entries, batch ``(*batch, q)``."""
        std = self._each(self.factors, 1) * self.scale_tril.square().sum(-1).sqrt()
        return NormalMixture(self.loc.expand_as(std), std, self.log_weights)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of vectors ``(..., q)``, ... ending with the batch."""
        laws = MultivariateNormal(
            self.loc, scale_tril=self._each(self.factors, 2) * self.scale_tril, validate_args=False
        )
        extra = value.ndim - 1 - len(self.batch_shape)
        laws = laws.expand((len(self.log_weights), *self.batch_shape))
        densities = torch.stack([laws.log_prob(part) for part in value.reshape(-1, *value.shape[extra:])])
        total = (densities + self._each(self.log_weights, 0)).logsumexp(1)
        return total.reshape(value.shape[:-1])

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``(*sample_shape, *batch, q)``, differentiable in means and factors."""
        shape = torch.Size(sample_shape)
        normal = torch.randn(self._extended_shape(shape), dtype=self.loc.dtype)
        return self.from_base(normal, torch.randn(shape + (1,) * len(self.batch_shape)))

    def from_base(self, normal: Tensor, first: Tensor) -> Tensor:
        """The draw of standard normal numbers: ``(..., q)``, and ``(...)`` for the component.

        The component is that of the first entry of the batch, so that a batch has one.
        """
        chosen = first.flatten(first.ndim - len(self.batch_shape))[..., 0] if self.batch_shape else first
        steps = self.log_weights.exp().cumsum(0)
        index = torch.searchsorted(steps, torch.special.ndtr(chosen.double())).clamp(max=len(steps) - 1)
        loc = self.loc[index if len(self.loc) > 1 else torch.zeros_like(index)]
        tril = self.scale_tril[index if len(self.scale_tril) > 1 else torch.zeros_like(index)]
        factor = self.factors[index].reshape(*index.shape, *[1] * (loc.ndim - index.ndim))
        return loc + factor * (tril @ normal[..., None])[..., 0]

    def _each(self, values: Tensor, event: int) -> Tensor:
        """One number per component, shaped to multiply entries or matrices of the batch."""
        return values.reshape(-1, *[1] * (len(self.batch_shape) + event))


class FunctionDraws(Distribution):
    """A joint law that is a set of functions, equally likely, at q points.

    Args:
        values: ``(draws, *batch, q)``: draw i is the same function whatever the points are.

    Raises:
        DataError: if there is no draw.
    """

    support = constraints.real_vector
    has_rsample = True

    def __init__(self, values: Tensor) -> None:
        if values.ndim < 2 or values.shape[0] == 0:
            raise DataError("function draws are (draws, ..., points) with at least one draw.")
        self.values = values
        super().__init__(values.shape[1:-1], values.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean over the draws."""
        return self.values.mean(0)

    @property
    def variance(self) -> Tensor:
        """Variance over the draws."""
        return self.values.var(0, correction=0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Not there: functions that were drawn have no density."""
        raise NotSupportedError(
            "sampled functions have no joint density; predict_distribution gives the density of each point."
        )

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Functions drawn with replacement, ``(*sample_shape, *batch, q)``; one index for all of a draw."""
        index = torch.randint(len(self.values), torch.Size(sample_shape), device=self.values.device)
        return self.values[index]


def icdf_by_bisection(law: Distribution, probability: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Quantiles of a law that has a cdf and a density, with gradients by the implicit function theorem.

    Args:
        law: with `cdf` and `log_prob`.
        probability: where, of the shape of the result.
        low: no quantile lies below.
        high: no quantile lies above.

    Returns:
        y with cdf(y) = probability, float64 to rounding. dy/dtheta = -(d cdf / dtheta) / density.
    """
    with torch.no_grad():
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            below = law.cdf(middle) < probability
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        quantile = (low + high) / 2
        density = law.log_prob(quantile).exp().clamp_min(torch.finfo(quantile.dtype).tiny)
    cdf = law.cdf(quantile)
    return quantile - (cdf - cdf.detach()) / density
