"""The posteriors that a prior-fitted network approximates, where they are known: Gaussian processes.

For fixed hyper-parameters the posterior predictive is normal. Under hyper-priors it is a mixture of such
laws, weighted by hyper-prior and marginal likelihood; on a grid of two hyper-parameters it can be had to any
accuracy. Everything is batched over data sets.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Normal

from paperback.bayes.distributions import NormalMixture
from paperback.bayes.prior_fitted.priors import HyperPrior, Kernel, kernel_matrix
from paperback.numerics.linear_algebra import cholesky

POINTS_AT_ONCE = 48  # of a grid whose predictions are held in memory together
TAIL = 1e-4  # probability of a hyper-prior that a grid leaves out at each end


class Posterior(NamedTuple):
    """What a Gaussian process says of queries, and of the context itself.

    Attributes:
        law: of noisy observations, batch ``(*batch, queries)``.
        log_marginal: log density of the context's targets, ``batch``, nats.
    """

    law: Normal
    log_marginal: Tensor


def gp_posterior(
    context_x: Float[Tensor, "*batch n features"],
    context_y: Float[Tensor, "*batch n"],
    x: Float[Tensor, "*batch queries features"],
    *,
    lengthscale: Tensor | float,
    outputscale: Tensor | float,
    noise: Tensor | float,
    kernel: Kernel = "rbf",
) -> Posterior:
    """The exact posterior predictive of a Gaussian process without a mean function, in float64.

    Args:
        context_x: rows that were seen; n may be 0.
        context_y: their targets.
        x: where to predict.
        lengthscale: of all features, ``batch`` or a number.
        outputscale: variance of the function, likewise.
        noise: variance of the noise, likewise.
        kernel: "rbf" or "matern52".

    Returns:
        The law of noisy observations and the log marginal likelihood.
    """
    context_x, context_y, x = context_x.double(), context_y.double(), x.double()
    length, variance, noise = (
        torch.as_tensor(h, dtype=torch.float64) for h in (lengthscale, outputscale, noise)
    )
    length = length[..., None, None]
    n = context_x.shape[-2]
    covariance = kernel_matrix(context_x, context_x, length, variance, kernel)
    covariance = covariance + noise[..., None, None] * torch.eye(n, dtype=torch.float64)
    lower = cholesky(covariance, "the kernel matrix of the context").lower if n else covariance
    across = kernel_matrix(context_x, x, length, variance, kernel)
    targets = context_y[..., None].expand(*lower.shape[:-1], 1)
    whitened = torch.linalg.solve_triangular(lower, targets, upper=False)
    half = torch.linalg.solve_triangular(lower, across.expand(*lower.shape[:-1], -1), upper=False)
    mean = (half * whitened).sum(-2)
    explained = half.square().sum(-2)
    spread = (variance[..., None] - explained).clamp_min(0) + noise[..., None]
    log_marginal = (
        -whitened.square().sum((-1, -2)) / 2
        - lower.diagonal(dim1=-1, dim2=-2).log().sum(-1)
        - n / 2 * math.log(2 * math.pi)
    )
    return Posterior(Normal(mean, spread.sqrt(), validate_args=False), log_marginal)


def grid_posterior(
    context_x: Float[Tensor, "tasks n features"],
    context_y: Float[Tensor, "tasks n"],
    x: Float[Tensor, "tasks queries features"],
    *,
    lengthscale: HyperPrior,
    outputscale: HyperPrior,
    noise: float,
    kernel: Kernel = "rbf",
    points: int = 24,
) -> NormalMixture:
    """The posterior predictive under hyper-priors on lengthscale and outputscale, by quadrature.

    Args:
        context_x: rows that were seen.
        context_y: their targets.
        x: where to predict.
        lengthscale: a number, or a frozen distribution of scipy.stats.
        outputscale: likewise.
        noise: variance of the noise.
        kernel: "rbf" or "matern52".
        points: of the grid in each direction, at equal steps of the logarithm.

    Returns:
        A mixture of one normal law for each point of the grid, batch ``(tasks, queries)``.
    """
    (lengths, log_length), (variances, log_variance) = (
        _nodes(prior, points) for prior in (lengthscale, outputscale)
    )
    length, variance = (part.flatten()[:, None] for part in torch.meshgrid(lengths, variances, indexing="ij"))
    log_prior = (log_length[:, None] + log_variance[None]).flatten()
    parts = [
        gp_posterior(context_x, context_y, x, lengthscale=a, outputscale=b, noise=noise, kernel=kernel)
        for a, b in zip(length.split(POINTS_AT_ONCE), variance.split(POINTS_AT_ONCE), strict=True)
    ]
    mean, std, log_marginal = (
        torch.cat(values)
        for values in zip(*((p.law.mean, p.law.stddev, p.log_marginal) for p in parts), strict=True)
    )
    log_weights = log_prior[:, None] + log_marginal  # (points^2, tasks)
    return NormalMixture(mean, std, log_weights[..., None].expand_as(mean))


def _nodes(prior: HyperPrior, points: int) -> tuple[Tensor, Tensor]:
    """Values of a hyper-parameter and the logarithms of their prior masses, up to a constant."""
    if isinstance(prior, float | int):
        return torch.tensor([float(prior)], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    low, high = (math.log(prior.ppf(p)) for p in (TAIL, 1 - TAIL))
    logs = torch.linspace(low, high, points, dtype=torch.float64)
    values = logs.exp()
    # The density of the logarithm is that of the value times the value.
    return values, torch.as_tensor(prior.logpdf(values.numpy())) + logs
