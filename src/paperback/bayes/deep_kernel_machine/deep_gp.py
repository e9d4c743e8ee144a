"""Two-layer deep Gaussian processes of gpytorch as an estimator, to measure deep kernel machines against.

Doubly stochastic inference draws samples through the layers (Salimbeni and Deisenroth, 2017); a deep sigma
point process replaces them by learned quadrature points and fits the predictive likelihood (Jankowiak, Pleiss
and Gardner, 2020). Inner layers have the identity as their mean and begin nearly without noise, as Salimbeni
and Deisenroth advise; inducing points begin at the centres of k-means.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from sklearn.cluster import KMeans
from torch import Tensor, nn

from paperback.bayes.distributions import NormalMixture
from paperback.bayes.interface import BayesianRegressor
from paperback.errors import DataError, MissingExtraError
from paperback.training import seeded, train

try:
    import gpytorch
    from gpytorch.distributions import MultivariateNormal
    from gpytorch.models.deep_gps import DeepGP, DeepGPLayer
    from gpytorch.models.deep_gps.dspp import DSPP, DSPPLayer
    from gpytorch.variational import CholeskyVariationalDistribution, VariationalStrategy
except ModuleNotFoundError as error:
    raise MissingExtraError(
        'deep Gaussian processes need gpytorch: pip install "paperback[bayes]"'
    ) from error

TRAIN_SAMPLES, PREDICTION_SAMPLES = 10, 64
INNER_ROOT = 1e-2  # of the covariance that an inner layer begins with


class DeepGaussianProcess(BayesianRegressor):
    """A deep Gaussian process with one hidden layer, as wide as the input, for one target.

    Args:
        kind: "sampled" (doubly stochastic) or "sigma-points" (DSPP).
        n_inducing: inducing points of each layer.
        steps: of Adam.
        batch_size: rows of a step.
        lr: peak learning rate; it falls along a cosine.
        sigma_points: of a DSPP.
        random_state: seed of all draws.
    """

    def __init__(
        self,
        kind: Literal["sampled", "sigma-points"] = "sampled",
        n_inducing: int = 50,
        *,
        steps: int = 1200,
        batch_size: int = 300,
        lr: float = 0.1,
        sigma_points: int = 8,
        random_state: int = 0,
    ) -> None:
        self.kind = kind
        self.n_inducing = n_inducing
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.sigma_points = sigma_points
        self.random_state = random_state

    def _fit(self, x: Float[Tensor, "rows features"], y: Float[Tensor, "rows outputs"]) -> None:
        if y.shape[1] != 1 or self.n_inducing > len(x):
            raise DataError(
                f"there are {y.shape[1]} targets and {len(x)} rows; a deep GP takes one target and at least "
                f"n_inducing = {self.n_inducing} rows."
            )
        means = KMeans(self.n_inducing, n_init=1, max_iter=30, random_state=self.random_state)
        centres = torch.as_tensor(means.fit(x.numpy()).cluster_centers_)
        with seeded(self.random_state, "deep gp"):
            self.module_ = _Module(centres, self.sigma_points if self.kind == "sigma-points" else 0)
        mll: Any
        if self.kind == "sigma-points":
            mll = gpytorch.mlls.DeepPredictiveLogLikelihood(
                self.module_.likelihood, self.module_.gp, num_data=len(x)
            )
        else:
            mll = gpytorch.mlls.DeepApproximateMLL(
                gpytorch.mlls.VariationalELBO(self.module_.likelihood, self.module_.gp, num_data=len(x))
            )

        def loss(module: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
            with gpytorch.settings.num_likelihood_samples(TRAIN_SAMPLES):
                return -mll(module(batch[0]), batch[1])

        steps = -(-len(x) // self.batch_size)
        train(
            self.module_,
            loss,
            (x, y[:, 0]),
            epochs=max(1, round(self.steps / steps)),
            batch_size=self.batch_size,
            lr=self.lr,
            schedule="cosine",
            seed=self.random_state,
            progress=False,
        )

    def _law(self, x: Float[Tensor, "*batch features"]) -> NormalMixture:
        samples = gpytorch.settings.num_likelihood_samples(PREDICTION_SAMPLES)
        with seeded(self.random_state, "prediction"), samples:
            law = self.module_.likelihood(self.module_(x))
        weights = self.module_.gp.quad_weights if self.kind == "sigma-points" else None
        return NormalMixture(law.mean[..., None], law.stddev[..., None], weights)


class _Module(nn.Module):
    """The two layers and the noise, float64."""

    def __init__(self, centres: Float[Tensor, "inducing features"], sigma_points: int) -> None:
        super().__init__()
        self.gp = _SigmaPoints(centres, sigma_points) if sigma_points else _Sampled(centres)
        self.likelihood = gpytorch.likelihoods.GaussianLikelihood()
        self.double()
        self.likelihood.noise = 0.1

    def forward(self, x: Float[Tensor, "*batch features"]) -> MultivariateNormal:
        """The law of the top layer, one for each sample."""
        return self.gp(x)


class _Sampled(DeepGP):
    def __init__(self, centres: Tensor) -> None:
        super().__init__()
        self.hidden = _layer(DeepGPLayer, centres, len(centres.T))
        self.top = _layer(DeepGPLayer, centres, None)

    def forward(self, x: Tensor) -> MultivariateNormal:
        return self.top(self.hidden(x))


class _SigmaPoints(DSPP):
    def __init__(self, centres: Tensor, sigma_points: int) -> None:
        super().__init__(sigma_points)
        self.hidden = _layer(DSPPLayer, centres, len(centres.T), num_quad_sites=sigma_points)
        self.top = _layer(DSPPLayer, centres, None, num_quad_sites=sigma_points)

    def forward(self, x: Tensor) -> MultivariateNormal:
        return self.top(self.hidden(x))


def _layer(kind: Any, centres: Tensor, outputs: int | None, **options: Any) -> Any:
    """A layer of `outputs` functions, or of one that is the target."""
    batch = torch.Size([] if outputs is None else [outputs])
    features = centres.shape[1]
    distribution = CholeskyVariationalDistribution(len(centres), batch_shape=batch)

    class Layer(kind):
        def __init__(self) -> None:
            points = centres.expand(*batch, -1, -1).clone()
            strategy = VariationalStrategy(self, points, distribution, learn_inducing_locations=True)
            super().__init__(strategy, features, outputs, **options)
            kernel = gpytorch.kernels.RBFKernel(batch_shape=batch, ard_num_dims=features)
            self.covar_module = gpytorch.kernels.ScaleKernel(kernel, batch_shape=batch)
            kernel.lengthscale = features**0.5  # of standardised inputs
            self.mean_module: Any = gpytorch.means.ConstantMean(batch_shape=batch)
            if outputs is not None:
                self.mean_module = gpytorch.means.LinearMean(features, batch_shape=batch, bias=False)
                with torch.no_grad():
                    self.mean_module.weights.copy_(torch.eye(outputs)[..., None])
                    distribution.chol_variational_covar.mul_(INNER_ROOT)
                strategy.variational_params_initialized.fill_(1)  # keep it as it is

        def forward(self, x: Tensor) -> MultivariateNormal:
            return MultivariateNormal(self.mean_module(x), self.covar_module(x))

    return Layer()
