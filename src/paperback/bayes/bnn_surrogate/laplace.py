"""The linearised Laplace surrogate: one trained network, made Gaussian in its weights and linear in them.

At the MAP weights the curvature of the loss is taken as the generalised Gauss-Newton matrix, one Kronecker
product per layer: with a the inputs of the layer (a one appended for the bias) and g the gradients of the
outputs by its preactivations,

    precision = A kron G / s2 + delta I,   A = sum_i a_i a_i',   G = sum_i g_i g_i' / rows.

The function is f(x) ~ N(f_MAP(x), J(x) Sigma J(x')'), jointly over points, where J is the gradient by the
weights. In the eigenvectors of A and G the covariance is a product of features, so that nothing of the size
of Sigma is formed. The prior precision delta maximises the Laplace approximation of the marginal likelihood.
For a linear network of one output all of this is exact.

Sources: MacKay (1992); Ritter et al., A scalable Laplace approximation (2018); Immer et al., Improving
predictions of Bayesian neural nets via local linearization (2021); Li, Rudner and Wilson (2024), appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from paperback.bayes.bnn_surrogate.box import Bounds, BoxRegressor
from paperback.bayes.bnn_surrogate.variances import (
    FALLBACK,
    FEWEST_ROWS,
    Variance,
    folds,
    nearest,
    variance_grid,
)
from paperback.bayes.networks import Activation, RegNet, map_estimate
from paperback.errors import DataError
from paperback.numerics.linear_algebra import cholesky
from paperback.training import generator

BUFFER = 4_000_000  # numbers of a gradient by the weights that are held at once
JITTER = 1e-8  # part of the variance: points of an acquisition function come to lie on each other
LOG_PRECISIONS = (-12.0, 12.0)  # where log delta is looked for


class LaplaceSurrogate(BoxRegressor):
    """LLA: a network's MAP estimate with a Kronecker-factored Gaussian about it, linearised.

    Args:
        hidden: widths of the hidden layers; none is Bayesian linear regression.
        activation: "tanh" or "relu".
        noise_variance: s2 of standardised targets; a list is the grid it is chosen from by the density of a
            fifth of the rows held out, five times over; None the grid 0.1, 1, 10.
        prior_precision: delta; None maximises the marginal likelihood.
        map_steps: of Adam on the mean squared error.
        lr: of Adam at the start; it falls along a cosine.
        weight_decay: of the training, half of it times the squared weights is added to the loss.
        bounds: box of the inputs, ``(2, features)``; that of the training rows if not given.
        random_state: of the first weights.

    With several outputs, their covariance with each other at a point is left out of the joint law.
    """

    weights_: Float[Tensor, " size"]
    posterior_: KroneckerPosterior
    noise_variance_: float

    def __init__(
        self,
        hidden: Sequence[int] = (128, 128, 128),
        activation: Activation = "tanh",
        noise_variance: Variance = None,
        prior_precision: float | None = None,
        map_steps: int = 1000,
        lr: float = 0.1,
        weight_decay: float = 1e-3,
        *,
        bounds: Bounds | None = None,
        random_state: int = 0,
    ) -> None:
        self.hidden = hidden
        self.activation = activation
        self.noise_variance = noise_variance
        self.prior_precision = prior_precision
        self.map_steps = map_steps
        self.lr = lr
        self.weight_decay = weight_decay
        self.bounds = bounds
        self.random_state = random_state

    def _fit(self, x: Tensor, y: Tensor) -> None:
        self.noise_variance_ = s2 = self._choose_noise(x, y)
        self.weights_ = self._train(x, y, x.new_ones(1, len(x)))[0]
        self.posterior_ = KroneckerPosterior(self._network())
        self.log_marginal_ = self.posterior_.fit(self.weights_, x, y, s2, self.prior_precision)
        precision = self.posterior_.get_buffer("prior_precision")
        self.diagnostics_ |= {"noise_variance": s2, "prior_precision": float(precision)}

    def _law(self, x: Tensor) -> Normal:
        rows = x.reshape(-1, x.shape[-1])
        size = max(1, BUFFER // (len(self.weights_) * self.n_outputs_))
        parts = [self._features(part) for part in rows.split(size)]
        mean = torch.cat([mean for mean, _ in parts])
        variance = torch.cat([features.square().sum(-1) for _, features in parts])
        std = (variance + self.noise_variance_).sqrt()
        return Normal(mean.unflatten(0, x.shape[:-1]), std.unflatten(0, x.shape[:-1]))

    def _joint(self, x: Tensor) -> MultivariateNormal:
        mean, features = self._features(x.reshape(-1, x.shape[-1]))
        mean = mean.unflatten(0, x.shape[:-1]).mT
        features = features.unflatten(0, x.shape[:-1]).transpose(-3, -2)  # (..., outputs, q, size)
        covariance = features @ features.mT
        lower = cholesky(covariance, "covariance of the linearised network", jitter=JITTER).lower
        return MultivariateNormal(mean, scale_tril=lower, validate_args=False)

    def _build_modules(self) -> Mapping[str, nn.Module]:
        return {"posterior_": KroneckerPosterior(self._network())}

    def _network(self) -> RegNet:
        return RegNet(self.n_features_in_, self.n_outputs_, tuple(self.hidden), self.activation)

    def _features(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.posterior_.features(self.weights_, rows)

    def _train(self, x: Tensor, y: Tensor, seen: Float[Tensor, "networks rows"]) -> Tensor:
        """Weights of one network for each set of rows."""
        network = self._network()

        def objective(weights: Tensor) -> Tensor:
            error = ((network(weights, x) - y).square().mean(2) * seen).sum(1) / seen.sum(1)
            return -error - self.weight_decay / 2 * weights.square().sum(1)

        start = network.initial(1, generator(self.random_state, "weights")).expand(len(seen), -1)
        return map_estimate(objective, start, steps=self.map_steps, lr=self.lr, course="cosine")

    def _choose_noise(self, x: Tensor, y: Tensor) -> float:
        """The training does not depend on s2, so the networks of five folds serve the whole grid."""
        grid = variance_grid("noise_variance", self.noise_variance)
        if len(grid) == 1:
            return grid[0]
        if len(x) < FEWEST_ROWS:
            return nearest(grid, FALLBACK[1])
        held = folds(len(x), generator(self.random_state, "variances"))
        networks = self._train(x, y, (~held).double())
        posterior, scores = KroneckerPosterior(self._network()), dict.fromkeys(grid, 0.0)
        for rows, weights in zip(held, networks, strict=True):
            for s2 in grid:
                posterior.fit(weights, x[~rows], y[~rows], s2, self.prior_precision)
                mean, features = posterior.features(weights, x[rows])
                law = Normal(mean, (features.square().sum(-1) + s2).sqrt())
                scores[s2] += float(law.log_prob(y[rows]).sum())
        best = max(scores, key=lambda s2: scores[s2])
        self.diagnostics_["held_out_log_density"] = scores[best] / y.numel()
        return best


class KroneckerPosterior(nn.Module):
    """The Gaussian over the weights: of each layer the eigenvectors of A and G, and standard deviations.

    Args:
        network: whose weights.
    """

    def __init__(self, network: RegNet) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("prior_precision", torch.ones((), dtype=torch.float64))
        for number, (inputs, units) in enumerate(network._layers()):
            for name, shape in _buffers(inputs + 1, units):
                self.register_buffer(f"{name}_{number}", torch.zeros(shape, dtype=torch.float64))

    @torch.no_grad()
    def fit(self, weights: Tensor, x: Tensor, y: Tensor, s2: float, prior_precision: float | None) -> float:
        """Take the curvature at the weights.

        Args:
            weights: ``(size,)``.
            x: inputs.
            y: targets.
            s2: noise variance, > 0.
            prior_precision: delta > 0; None maximises the marginal likelihood.

        Returns:
            Laplace's approximation of log p(y | x).

        Raises:
            DataError: if the prior precision is not positive.
        """
        if prior_precision is not None and not prior_precision > 0:
            raise DataError(f"prior_precision is {prior_precision}; it must be positive.")
        prediction, layers = self.network.layer_gradients(weights, x)
        curvatures = []
        for number, (a, g) in enumerate(layers):
            a_values, a_vectors = torch.linalg.eigh(a.mT @ a)
            g_rows = g.flatten(0, 1)
            g_values, g_vectors = torch.linalg.eigh(g_rows.mT @ g_rows / len(x))
            self.get_buffer(f"input_rotation_{number}").copy_(a_vectors)
            self.get_buffer(f"gradient_rotation_{number}").copy_(g_vectors)
            curvatures.append(g_values.clamp_min(0)[:, None] * a_values.clamp_min(0) / s2)
        every = torch.cat([each.flatten() for each in curvatures])
        norm = float(weights.square().sum())

        def log_prior_and_volume(log_delta: float) -> float:
            delta = math.exp(log_delta)
            return (-delta * norm + len(weights) * log_delta - float((every + delta).log().sum())) / 2

        if prior_precision is None:
            best = minimize_scalar(
                lambda t: -log_prior_and_volume(t), bounds=LOG_PRECISIONS, method="bounded"
            )
            prior_precision = math.exp(best.x)
        self.get_buffer("prior_precision").fill_(prior_precision)
        for number, curvature in enumerate(curvatures):
            self.get_buffer(f"deviation_{number}").copy_((curvature + prior_precision).rsqrt())
        likelihood = Normal(prediction, s2**0.5).log_prob(y).sum()
        return float(likelihood) + log_prior_and_volume(math.log(prior_precision))

    def features(
        self, weights: Float[Tensor, " size"], x: Float[Tensor, "rows features"]
    ) -> tuple[Float[Tensor, "rows outputs"], Float[Tensor, "rows outputs size"]]:
        """Mean of the function, and phi with covariance phi(x) . phi(x'), differentiable in x."""
        mean, layers = self.network.layer_gradients(weights, x)
        parts = []
        for number, (a, g) in enumerate(layers):
            turned_a = a @ self.get_buffer(f"input_rotation_{number}")
            turned_g = g @ self.get_buffer(f"gradient_rotation_{number}")
            scaled = turned_g[..., None] * turned_a[:, None, None, :] * self.get_buffer(f"deviation_{number}")
            parts.append(scaled.flatten(-2))
        return mean, torch.cat(parts, -1)


def _buffers(inputs: int, units: int) -> list[tuple[str, tuple[int, int]]]:
    return [
        ("input_rotation", (inputs, inputs)),
        ("gradient_rotation", (units, units)),
        ("deviation", (units, inputs)),
    ]
