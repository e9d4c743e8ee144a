"""The three surrogates that end in a Gaussian process: the exact GP, the infinitely wide network, and deep
kernel learning.

All three are BoTorch's `SingleTaskGP`, one for each output, and differ in their kernel and in what of it is
trained: the Matern or RBF kernel with priors by L-BFGS; the NNGP kernel of a deep ReLU network, where only
noise and mean are trained unless more is asked for; a Matern kernel on the last hidden layer of a network
that was pre-trained on the squared error and then trained with it by the marginal likelihood.

Sources: Balandat et al., BoTorch (2020); Hvarfner et al., Vanilla Bayesian optimization performs great in
high dimensions (2024) for the current priors; Lee et al., Deep neural networks as Gaussian processes (2018);
Wilson et al., Deep kernel learning (2016); Li, Rudner and Wilson (2024), section 3 and appendix B.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal
from torch.nn import functional as F

from paperback.bayes.bnn_surrogate.box import Bounds, BoxRegressor
from paperback.bayes.kernels import NNGPKernel
from paperback.bayes.networks import Activation, RegNet, map_estimate
from paperback.errors import DataError, MissingExtraError
from paperback.numerics.linear_algebra import cholesky
from paperback.training import generator, seeded

try:
    from botorch import settings
    from botorch.exceptions.errors import ModelFittingError
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.utils.gpytorch_modules import (
        get_gaussian_likelihood_with_gamma_prior,
        get_matern_kernel_with_gamma_prior,
    )
    from gpytorch import settings as gpytorch_settings
    from gpytorch.constraints import GreaterThan
    from gpytorch.kernels import Kernel, ScaleKernel
    from gpytorch.likelihoods import GaussianLikelihood
    from gpytorch.mlls import ExactMarginalLogLikelihood
    from gpytorch.priors import GammaPrior
    from linear_operator.utils.errors import NanError, NotPSDError
except ModuleNotFoundError as error:
    raise MissingExtraError('the surrogates need botorch: pip install "paperback[bayes]"') from error

FIRST_NOISE = 0.1  # of deep kernel learning, of standardised targets
JITTER = 1e-8  # part of the posterior variance: points of an acquisition function come to lie on each other
ROWS = 512  # of a prediction that are done at once: their joint covariance is held
REMEDY = "remove rows that are nearly equal, or look for targets that are far from all others"


class GaussianProcessRegressor(BoxRegressor):
    """What Gaussian processes of BoTorch share: models, their predictions, and how they are kept."""

    models_: Any  # an nn.ModuleList of BoTorch models, one for each output
    train_inputs_: NDArray[np.float64]
    train_targets_: NDArray[np.float64]

    @abstractmethod
    def _build_model(self, x: Tensor, y: Tensor) -> SingleTaskGP:
        """An untrained model of one output, ``y (rows, 1)``."""

    @abstractmethod
    def _train(self, model: SingleTaskGP) -> None:
        """Set the parameters of a model."""

    def _fit(self, x: Tensor, y: Tensor) -> None:
        self.train_inputs_, self.train_targets_ = x.numpy(), y.numpy()
        with seeded(self.random_state), _no_linear_algebra_errors():
            self.models_ = self._build_modules()["models_"]
            for model in self._models():
                model.train()
                self._train(model)
            self.log_marginal_ = math.fsum(_log_marginal(model) for model in self._models())
            self.models_.eval()
        noise = [float(model.likelihood.noise.detach().mean()) for model in self._models()]
        self.diagnostics_ = {"noise_variance": float(np.mean(noise))}

    def _build_modules(self) -> Mapping[str, nn.ModuleList]:
        x, y = torch.as_tensor(self.train_inputs_), torch.as_tensor(self.train_targets_)
        with settings.validate_input_scaling(False):
            return {"models_": nn.ModuleList([self._build_model(x, column) for column in y.split(1, dim=1)])}

    def _models(self) -> list[SingleTaskGP]:
        return cast(list[SingleTaskGP], list(self.models_))

    def _laws(self, x: Tensor) -> list[Any]:
        """The law of the function at ``(..., q, features)`` by each model, as gpytorch has it."""
        with _no_linear_algebra_errors():
            return [cast(Any, model.posterior(x)).distribution for model in self._models()]

    def _law(self, x: Tensor) -> Normal:
        rows = x.reshape(-1, x.shape[-1])
        means, variances = [], []
        for part in rows.split(ROWS):
            laws = self._laws(part)
            means.append(torch.stack([law.mean for law in laws], -1))
            variances.append(torch.stack([law.variance for law in laws], -1))
        noise = torch.stack([model.likelihood.noise.mean().detach() for model in self._models()])
        std = (torch.cat(variances).clamp_min(0) + noise).sqrt()
        shape = (*x.shape[:-1], len(self.models_))
        return Normal(torch.cat(means).reshape(shape), std.reshape(shape))

    def _joint(self, x: Tensor) -> MultivariateNormal:
        laws = self._laws(x)
        covariance = torch.stack([law.covariance_matrix for law in laws], -3)
        covariance = (covariance + covariance.mT) / 2
        lower = cholesky(covariance, "posterior covariance of the GP", jitter=JITTER, remedy=REMEDY).lower
        mean = torch.stack([law.mean for law in laws], -2)
        return MultivariateNormal(mean, scale_tril=lower, validate_args=False)


class GPSurrogate(GaussianProcessRegressor):
    """An exact Gaussian process with hyper-parameters at the maximum of their posterior.

    Args:
        priors: "current" is BoTorch's default since 0.12, an RBF kernel whose length scales have a prior that
            grows with the root of the dimension; "paper" what was the default at the time of the study, a
            scaled Matern-5/2 kernel with Gamma(3, 6) on length scales and Gamma(2, 0.15) on the scale.
        bounds: box of the inputs, ``(2, features)``; that of the training rows if not given.
        random_state: of the restarts of a failed optimisation.
    """

    def __init__(
        self,
        priors: Literal["current", "paper"] = "current",
        *,
        bounds: Bounds | None = None,
        random_state: int = 0,
    ) -> None:
        self.priors = priors
        self.bounds = bounds
        self.random_state = random_state

    def _build_model(self, x: Tensor, y: Tensor) -> SingleTaskGP:
        if self.priors not in ("current", "paper"):
            raise DataError(f'priors is {self.priors!r}; it is "current" or "paper".')
        if self.priors == "current":
            return SingleTaskGP(x, y, outcome_transform=None)
        likelihood = get_gaussian_likelihood_with_gamma_prior()
        kernel = get_matern_kernel_with_gamma_prior(x.shape[-1])
        return SingleTaskGP(x, y, likelihood=likelihood, covar_module=kernel, outcome_transform=None)

    def _train(self, model: SingleTaskGP) -> None:
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))


class InfiniteBNN(GaussianProcessRegressor):
    """I-BNN: the Gaussian process that a deep network with random weights becomes when it is wide.

    Args:
        depth: hidden layers, >= 1.
        activation: "relu" or "erf".
        weight_variance: vw > 0, of the weights times fan-in.
        bias_variance: vb > 0; the study takes 1.3 in few dimensions and 1.6 in many.
        learn_kernel: also train vw, vb and a scale of the whole kernel by the marginal likelihood; else only
            noise and mean, as the study does.
        bounds: box of the inputs, ``(2, features)``; that of the training rows if not given.
        random_state: of the restarts of a failed optimisation.
    """

    def __init__(
        self,
        depth: int = 3,
        activation: Literal["relu", "erf"] = "relu",
        weight_variance: float = 10.0,
        bias_variance: float = 1.6,
        learn_kernel: bool = False,
        *,
        bounds: Bounds | None = None,
        random_state: int = 0,
    ) -> None:
        self.depth = depth
        self.activation = activation
        self.weight_variance = weight_variance
        self.bias_variance = bias_variance
        self.learn_kernel = learn_kernel
        self.bounds = bounds
        self.random_state = random_state

    def _build_model(self, x: Tensor, y: Tensor) -> SingleTaskGP:
        kernel = NNGPKernel(
            self.depth,
            self.activation,
            weight_variance=self.weight_variance,
            bias_variance=self.bias_variance,
        )
        if not self.learn_kernel:
            kernel.requires_grad_(False)
        return SingleTaskGP(
            x, y, covar_module=ScaleKernel(kernel) if self.learn_kernel else kernel, outcome_transform=None
        )

    def _train(self, model: SingleTaskGP) -> None:
        if self.learn_kernel:  # begin with the scale that gives the targets their variance
            model.covar_module.outputscale = 1 / _mean_variance(model.covar_module.base_kernel, model)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))


class DeepKernelGP(GaussianProcessRegressor):
    """DKL: a Gaussian process on the last hidden layer of a network, trained together with it.

    Args:
        hidden: widths of the network's hidden layers; none is a GP on the inputs.
        activation: "tanh" or "relu".
        pretrain_steps: of Adam on the squared error, with a linear layer on top that is then dropped.
        train_steps: of Adam on the marginal likelihood of network and kernel together.
        lr: of the network; the study takes 1e-3, and 1e-4 for its 400-dimensional problem. Noise, mean, scale
            and length scales learn ten times as fast, and the noise starts at 0.1: with one rate for all and
            a start at twice the variance of the targets, as in the reference, 1,000 steps leave it there.
        bounds: box of the inputs, ``(2, features)``; that of the training rows if not given.
        random_state: of the first weights.

    Raises:
        DataError: when fitted to fewer than 4 rows: the network would carry them to any features.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (128, 128, 128),
        activation: Activation = "tanh",
        pretrain_steps: int = 1000,
        train_steps: int = 1000,
        lr: float = 1e-3,
        *,
        bounds: Bounds | None = None,
        random_state: int = 0,
    ) -> None:
        self.hidden = hidden
        self.activation = activation
        self.pretrain_steps = pretrain_steps
        self.train_steps = train_steps
        self.lr = lr
        self.bounds = bounds
        self.random_state = random_state

    def _build_model(self, x: Tensor, y: Tensor) -> SingleTaskGP:
        if len(x) < 4:
            raise DataError(
                f"there are n_samples = {len(x)}; deep kernel learning needs at least 4 rows, "
                "take a GP for fewer."
            )
        network = RegNet(x.shape[-1], 1, tuple(self.hidden), self.activation)
        width = network.widths[-2]
        kernel = FeatureKernel(network, get_matern_kernel_with_gamma_prior(width))
        # BoTorch's likelihood leaves it to the optimiser to keep the noise above its bound; Adam does not.
        likelihood = GaussianLikelihood(GammaPrior(1.1, 0.05), noise_constraint=GreaterThan(1e-4))
        likelihood.noise = FIRST_NOISE
        return SingleTaskGP(x, y, likelihood=likelihood, covar_module=kernel, outcome_transform=None)

    def _train(self, model: SingleTaskGP) -> None:
        x, y = model.train_inputs[0], model.train_targets[:, None]
        kernel = model.covar_module
        network = kernel.network
        if self.hidden:
            start = network.initial(1, generator(self.random_state, "weights"))
            weights = map_estimate(
                lambda theta: -(network(theta, x) - y).square().mean((1, 2)),
                start,
                steps=self.pretrain_steps,
                lr=self.lr,
            )
            kernel.weights.data = weights[0, : len(kernel.weights)].clone()
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        own = [parameter for name, parameter in model.named_parameters() if name != "covar_module.weights"]
        groups: list[dict[str, Any]] = [{"params": [kernel.weights]}, {"params": own, "lr": 10 * self.lr}]
        optimizer = torch.optim.Adam(groups, lr=self.lr)
        for _ in range(self.train_steps):
            optimizer.zero_grad()
            loss = -mll(model(*model.train_inputs), model.train_targets)
            loss.backward()
            optimizer.step()


class FeatureKernel(Kernel):
    """A kernel on the last hidden layer of a network, whose weights are its parameters.

    Args:
        network: whose hidden layers make the features.
        base_kernel: on the features.
    """

    def __init__(self, network: RegNet, base_kernel: Kernel) -> None:
        super().__init__()
        self.network = network
        self.base_kernel = base_kernel
        self._dropped = network.widths[-2] + 1  # weights and bias of the last layer, one output
        self.weights = nn.Parameter(torch.zeros(network.size - self._dropped, dtype=torch.float64))

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer at points ``(..., features)``."""
        weights = F.pad(self.weights, (0, self._dropped))[None]
        rows = self.network.last_hidden(weights, x.reshape(-1, x.shape[-1]))[0]
        return rows.reshape(*x.shape[:-1], rows.shape[-1])

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """The kernel between points ``(..., n, features)`` and ``(..., m, features)``."""
        return self.base_kernel.forward(self.features(x1), self.features(x2), diag=diag, **params)


def _mean_variance(kernel: Callable[..., Any], model: SingleTaskGP) -> Tensor:
    with torch.no_grad():
        return kernel(model.train_inputs[0], diag=True).mean()


def _log_marginal(model: SingleTaskGP) -> float:
    """log p(y | X) at the trained hyper-parameters, without their priors."""
    model.train()  # BoTorch's fit leaves it in evaluation mode, where it would predict
    with torch.no_grad():
        return float(model.likelihood(model(*model.train_inputs)).log_prob(model.train_targets))


@contextmanager
def _no_linear_algebra_errors() -> Iterator[None]:
    """What gpytorch says of a matrix it cannot factorise, as a sentence with a remedy."""
    try:
        with gpytorch_settings.debug(False):  # it would warn of a prediction at the training rows
            yield
    except (NotPSDError, NanError, ModelFittingError, torch.linalg.LinAlgError) as error:
        raise DataError(f"the kernel matrix of the GP has no Cholesky factor ({error}); {REMEDY}.") from error
