"""What a prior-fitted network is measured against under hyper-priors: MLE-II by gpytorch, and HMC.

Both treat a Gaussian process with a squared-exponential kernel, known noise and log-normal hyper-priors on
lengthscale and outputscale. HMC runs one chain for each data set, all side by side.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor
from torch.distributions import Normal

from paperback.bayes.distributions import NormalMixture
from paperback.bayes.prior_fitted.exact import gp_posterior, grid_posterior
from paperback.bayes.prior_fitted.priors import GPMixture
from paperback.bayes.samplers import Chains, hmc
from paperback.errors import MissingExtraError

DRAWS_AT_ONCE = 50  # sets of hyper-parameters whose predictions are held in memory together


@dataclass(frozen=True)
class LogNormalGP:
    """A Gaussian process on [0, 1] with log-normal hyper-priors.

    Attributes:
        lengthscale: median, and standard deviation of the logarithm.
        outputscale: likewise.
        noise: variance of the noise.
    """

    lengthscale: tuple[float, float] = (0.25, 0.6)
    outputscale: tuple[float, float] = (1.0, 0.7)
    noise: float = 0.01

    @property
    def hyper_priors(self) -> dict[str, Any]:
        """The two as frozen distributions of scipy.stats, by name."""
        return {
            "lengthscale": stats.lognorm(self.lengthscale[1], scale=self.lengthscale[0]),
            "outputscale": stats.lognorm(self.outputscale[1], scale=self.outputscale[0]),
        }

    def prior(self) -> GPMixture:
        """The prior over data sets that a network is fitted to."""
        return GPMixture(1, noise=self.noise, kernel="rbf", **self.hyper_priors)

    def exact(self, context_x: Tensor, context_y: Tensor, x: Tensor, points: int = 24) -> NormalMixture:
        """The posterior predictive, by quadrature over both hyper-parameters."""
        return grid_posterior(context_x, context_y, x, noise=self.noise, points=points, **self.hyper_priors)

    def log_density(
        self, context_x: Float[Tensor, "tasks n 1"], context_y: Float[Tensor, "tasks n"]
    ) -> Callable[[Tensor], Tensor]:
        """Log posterior density of the logarithms of lengthscale and outputscale, ``(tasks, 2)``, up to a
        constant; row i is the state of data set i.
        """
        rows = context_x.double()
        squared = (rows - rows.mT).square()
        targets = context_y.double()[..., None]
        noise = self.noise * torch.eye(targets.shape[1], dtype=torch.float64)
        medians, widths = torch.tensor([self.lengthscale, self.outputscale], dtype=torch.float64).T

        def log_density(state: Tensor) -> Tensor:
            length, variance = state.exp().clamp(1e-6, 1e6).T[..., None, None]
            covariance = variance * torch.exp(-squared / (2 * length.square())) + noise
            lower, _ = torch.linalg.cholesky_ex(covariance)  # NaN after a step too long: hmc rejects it
            white = torch.linalg.solve_triangular(lower, targets, upper=False)
            fit = -white.square().sum((1, 2)) / 2 - lower.diagonal(dim1=1, dim2=2).log().sum(1)
            return fit - ((state - medians.log()) / widths).square().sum(1) / 2

        return log_density

    def sample_posterior(
        self,
        context_x: Float[Tensor, "tasks n 1"],
        context_y: Float[Tensor, "tasks n"],
        *,
        samples: int = 500,
        burn_in: int = 200,
        leapfrog_steps: int = 3,
        generator: torch.Generator,
    ) -> Chains:
        """Draw hyper-parameters by HMC, one chain for each data set, begun at the prior's medians."""
        start = torch.tensor([[self.lengthscale[0], self.outputscale[0]]], dtype=torch.float64).log()
        return hmc(
            self.log_density(context_x, context_y),
            start.repeat(len(context_x), 1),
            samples=samples,
            burn_in=burn_in,
            step_size=0.3,
            leapfrog_steps=leapfrog_steps,
            generator=generator,
        )

    def predict_from(
        self, samples: Float[Tensor, "samples tasks 2"], context_x: Tensor, context_y: Tensor, x: Tensor
    ) -> NormalMixture:
        """The posterior predictive as the mean over sampled hyper-parameters."""
        laws = [
            gp_posterior(
                context_x, context_y, x, lengthscale=length, outputscale=variance, noise=self.noise
            ).law
            for length, variance in (part.exp().unbind(-1) for part in samples.split(DRAWS_AT_ONCE))
        ]
        return NormalMixture(torch.cat([law.mean for law in laws]), torch.cat([law.stddev for law in laws]))


def fit_mle2(
    context_x: Float[Tensor, "n 1"],
    context_y: Float[Tensor, " n"],
    x: Float[Tensor, "queries 1"],
    gp: LogNormalGP,
    *,
    restarts: int = 3,
    with_priors: bool = False,
    seed: int = 0,
) -> Normal:
    """Predict with the hyper-parameters of the largest marginal likelihood (MLE-II): gpytorch, L-BFGS-B.

    Args:
        context_x: one data set.
        context_y: its targets.
        x: where to predict.
        gp: the noise, and the hyper-priors that starts are drawn from.
        restarts: the first from the hyper-priors' medians, the others from draws of them.
        with_priors: add the hyper-priors' log densities, for the posterior mode (MAP).
        seed: of the starts.

    Returns:
        The law of noisy observations at x.

    Raises:
        MissingExtraError: if gpytorch or botorch is not installed.
    """
    try:
        import gpytorch
        from botorch.exceptions.errors import ModelFittingError
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from gpytorch.kernels import RBFKernel, ScaleKernel
        from gpytorch.priors import LogNormalPrior
    except ModuleNotFoundError as error:
        raise MissingExtraError('MLE-II needs botorch: pip install "paperback[bayes]"') from error
    priors = {
        name: LogNormalPrior(math.log(median), width) if with_priors else None
        for name, (median, width) in (("length", gp.lengthscale), ("output", gp.outputscale))
    }
    draws = torch.Generator().manual_seed(seed)
    medians, widths = torch.tensor([gp.lengthscale, gp.outputscale], dtype=torch.float64).T
    starts = (widths * torch.randn(restarts, 2, generator=draws, dtype=torch.float64)).exp() * medians
    starts[0] = medians
    best, chosen = -math.inf, starts[0]
    for start in starts:
        kernel = ScaleKernel(
            RBFKernel(lengthscale_prior=priors["length"]), outputscale_prior=priors["output"]
        )
        model = SingleTaskGP(
            context_x.double(),
            context_y.double()[:, None],
            torch.full((len(context_y), 1), gp.noise, dtype=torch.float64),
            covar_module=kernel,
            mean_module=gpytorch.means.ZeroMean(),
            outcome_transform=None,
        )
        kernel.base_kernel.lengthscale, kernel.outputscale = start
        marginal = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
        # A fit that stops at its limit of steps is as good a candidate as any; the best is taken.
        with warnings.catch_warnings(), contextlib.suppress(ModelFittingError):
            warnings.simplefilter("ignore")
            fit_gpytorch_mll(marginal)
        model.train()
        with torch.no_grad():
            value = float(marginal(model(*model.train_inputs), model.train_targets))
        if value > best:
            found = (kernel.base_kernel.lengthscale.detach().reshape(()), kernel.outputscale.detach())
            best, chosen = value, torch.stack(found)
    return gp_posterior(
        context_x, context_y, x, lengthscale=chosen[0], outputscale=chosen[1], noise=gp.noise
    ).law
