"""Sparse Gaussian process by Titsias' bound: linear in the rows, with inducing points that are trained.

Source: Titsias, Variational learning of inducing variables in sparse Gaussian processes (2009); the start of
the inducing points: Burt, Rasmussen and van der Wilk (2020).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from paperback.bayes.bnn_surrogate.gaussian_processes import GaussianProcessRegressor
from paperback.errors import DataError, MissingExtraError
from paperback.numerics.linear_algebra import cholesky

try:
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.utils.gpytorch_modules import (
        get_covar_module_with_dim_scaled_prior,
        get_gaussian_likelihood_with_lognormal_prior,
    )
    from botorch.models.utils.inducing_point_allocators import GreedyVarianceReduction
    from gpytorch.kernels import InducingPointKernel, Kernel, ScaleKernel
    from gpytorch.mlls import ExactMarginalLogLikelihood
except ModuleNotFoundError as error:
    raise MissingExtraError('a sparse GP needs gpytorch: pip install "paperback[bayes]"') from error


JITTER = 1e-8  # of the mean diagonal of K_uu
REMEDY = "remove rows that are nearly equal, or take fewer inducing points"


class SparseGP(GaussianProcessRegressor):
    """A Gaussian process with an RBF kernel, a length scale for each column, on inducing points.

    Args:
        n_inducing: inducing points, >= 1; at most the number of rows is used.
        steps: of L-BFGS at most.
        bounds: box of the inputs, ``(2, features)``; that of the training rows if not given.
        random_state: of the restarts of a failed optimisation.
    """

    def __init__(
        self,
        n_inducing: int = 100,
        steps: int = 200,
        *,
        bounds: list[list[float]] | None = None,
        random_state: int = 0,
    ) -> None:
        self.n_inducing = n_inducing
        self.steps = steps
        self.bounds = bounds
        self.random_state = random_state

    def _fit(self, x: Tensor, y: Tensor) -> None:
        super()._fit(x, y)
        del self.log_marginal_  # it would be that of the approximated prior, not of the GP

    def _build_model(self, x: Tensor, y: Tensor) -> SingleTaskGP:
        if self.n_inducing < 1:
            raise DataError(f"n_inducing is {self.n_inducing}; there must be at least one inducing point.")
        likelihood = get_gaussian_likelihood_with_lognormal_prior().double()
        kernel = ScaleKernel(get_covar_module_with_dim_scaled_prior(ard_num_dims=x.shape[1])).double()
        inducing = GreedyVarianceReduction().allocate_inducing_points(
            x, kernel, min(self.n_inducing, len(x)), x.shape[:-2]
        )
        sparse = InducingPointKernel(kernel, inducing.contiguous(), likelihood)
        return SingleTaskGP(x, y, likelihood=likelihood, covar_module=sparse, outcome_transform=None)

    def _train(self, model: SingleTaskGP) -> None:
        options = {"options": {"maxiter": self.steps}}
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model), optimizer_kwargs=options)

    def _law(self, x: Tensor) -> Normal:
        rows = x.reshape(-1, x.shape[-1])
        parts = [self._moments(model, rows) for model in self.models_]
        mean = torch.stack([mean for mean, _ in parts], -1)
        std = torch.stack([variance.sqrt() for _, variance in parts], -1)
        shape = (*x.shape[:-1], len(parts))
        return Normal(mean.reshape(shape), std.reshape(shape))

    def _joint(self, x: Tensor) -> MultivariateNormal:
        means, lowers = [], []
        for model in self.models_:
            prior, white, seen, mean = self._projections(model, x)
            covariance = prior.forward(x, x) - white.mT @ white + seen.mT @ seen
            name = "posterior covariance of the sparse GP"
            lowers.append(cholesky((covariance + covariance.mT) / 2, name, remedy=REMEDY).lower)
            means.append(mean)
        return MultivariateNormal(
            torch.stack(means, -2), scale_tril=torch.stack(lowers, -3), validate_args=False
        )

    def _moments(self, model: SingleTaskGP, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of observations, ``(rows,)``."""
        prior, white, seen, mean = self._projections(model, rows)
        variance = prior.forward(rows, rows, diag=True) - white.square().sum(-2) + seen.square().sum(-2)
        return mean, variance.clamp_min(0) + model.likelihood.noise

    def _projections(self, model: SingleTaskGP, x: Tensor) -> tuple[Kernel, Tensor, Tensor, Tensor]:
        """The kernel, L^-1 K_ux, B^-1 L^-1 K_ux and the mean, of Titsias' posterior with K_uu = L L^T and
        I + L^-1 K_uf K_fu L^-T / noise = B B^T.

        (gpytorch's own prediction depends on whether the points equal the training rows.)
        """
        kernel = model.covar_module.base_kernel
        inducing, noise = model.covar_module.inducing_points, model.likelihood.noise
        rows, targets = model.train_inputs[0], model.train_targets
        gram = kernel.forward(inducing, inducing)
        lower = cholesky(gram, "kernel matrix of the inducing points", jitter=JITTER, remedy=REMEDY).lower

        def whitened(points: Tensor) -> Tensor:
            cross = kernel.forward(inducing.expand(*points.shape[:-2], -1, -1), points)
            return torch.linalg.solve_triangular(lower.expand(*cross.shape[:-2], -1, -1), cross, upper=False)

        known = whitened(rows)
        identity = torch.eye(len(lower), dtype=lower.dtype)
        information = cholesky(identity + known @ known.mT / noise, "information of the sparse GP").lower
        offset = model.mean_module(rows[:1])[0]
        weights = torch.cholesky_solve((known @ (targets - offset))[:, None] / noise, information)[:, 0]
        white = whitened(x)
        factor = information.expand(*white.shape[:-2], -1, -1)
        seen = torch.linalg.solve_triangular(factor, white, upper=False)
        return kernel, white, seen, offset + white.mT @ weights
