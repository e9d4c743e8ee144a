"""Small networks whose weights are one flat vector, their priors and likelihoods, and their MAP estimate.

Many weight vectors are evaluated in one batch: the members of an ensemble, the chains of a sampler or the
points of a grid of hyper-parameters. Everything here is a function of the vector, so that samplers see plain
log densities

    log p(theta | X, y) = log N(theta; 0, p2 I) + sum_i log N(y_i; f_theta(x_i), s2) + constant,

where p2 and s2 are variances. (The reference implementation of Li et al. hands s2 to a density that wants a
standard deviation, and pre-trains another network than the one it samples; neither is done here.)

Source: Li, Rudner and Wilson, A study of Bayesian neural network surrogates for Bayesian optimization (2024),
appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from paperback.errors import DataError
from paperback.training import schedule

Activation = Literal["tanh", "relu"]
LogPrior = Callable[[Tensor], Tensor]  # weights (..., size) to (...)
LogLikelihood = Callable[
    [Tensor, Tensor], Tensor
]  # predictions (..., rows, outputs) and targets to (..., rows)


@dataclass(frozen=True)
class RegNet:
    """A fully connected network with a linear last layer, as a function of its weights.

    Args:
        features: inputs, >= 1.
        outputs: >= 1.
        hidden: widths of the hidden layers; none is linear regression.
        activation: of the hidden layers.

    Raises:
        DataError: if a width is below 1 or the activation unknown.
    """

    features: int
    outputs: int = 1
    hidden: tuple[int, ...] = (128, 128, 128)
    activation: Activation = "tanh"

    def __post_init__(self) -> None:
        if min(self.widths) < 1:
            raise DataError(f"the layers have widths {self.widths}; each must be at least 1.")
        if self.activation not in ("tanh", "relu"):
            raise DataError(f'activation is {self.activation!r}; it is "tanh" or "relu".')

    @property
    def widths(self) -> tuple[int, ...]:
        """Of inputs, hidden layers and outputs."""
        return (self.features, *self.hidden, self.outputs)

    @property
    def size(self) -> int:
        """Number of weights and biases."""
        return sum((inputs + 1) * outputs for inputs, outputs in self._layers())

    def initial(self, n: int, generator: torch.Generator) -> Float[Tensor, "n size"]:
        """Weight vectors to begin training with: uniform in +-1 / sqrt(fan-in), as `torch.nn.Linear`'s."""
        sizes = torch.tensor([(inputs + 1) * outputs for inputs, outputs in self._layers()])
        scales = torch.tensor([inputs**-0.5 for inputs, _ in self._layers()], dtype=torch.float64)
        uniform = 2 * torch.rand(n, self.size, generator=generator, dtype=torch.float64) - 1
        return uniform * scales.repeat_interleave(sizes)

    def __call__(
        self, weights: Float[Tensor, "networks size"], x: Float[Tensor, "*networks rows features"]
    ) -> Float[Tensor, "networks rows outputs"]:
        """Outputs of every network at every row.

        Args:
            weights: one vector per network.
            x: rows for all networks, ``(rows, features)``, or for each its own.

        Returns:
            ``(networks, rows, outputs)``.
        """
        matrix, bias = list(self.split(weights))[-1]
        return torch.baddbmm(bias[:, None], self.last_hidden(weights, x), matrix.mT)

    def last_hidden(self, weights: Tensor, x: Tensor) -> Tensor:
        """What the last layer sees: ``(networks, rows, width)``; without hidden layers the inputs."""
        h = x.expand(len(weights), *x.shape[-2:])
        for matrix, bias in list(self.split(weights))[:-1]:
            h = self._activate(torch.baddbmm(bias[:, None], h, matrix.mT))
        return h

    def layer_gradients(
        self, weights: Float[Tensor, " size"], x: Float[Tensor, "rows features"]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Outputs, and of every layer what the gradient of the outputs is made of.

        Args:
            weights: of one network.
            x: rows.

        Returns:
            Outputs ``(rows, outputs)``, and per layer its inputs with a one appended, a ``(rows, inputs +
            1)``, and the gradients of the outputs by its preactivations, g ``(rows, outputs, units)``. The
            gradient of output k by the layer's ``[weights, bias]`` is g[:, k] outer a. All of it is
            differentiable in x.
        """
        layers = [(matrix[0], bias[0]) for matrix, bias in self.split(weights[None])]
        inputs, slopes, h = [], [], x
        for number, (matrix, bias) in enumerate(layers):
            inputs.append(F.pad(h, (0, 1), value=1.0))
            z = F.linear(h, matrix, bias)
            if number < len(layers) - 1:
                h = self._activate(z)
                slopes.append(1 - h.square() if self.activation == "tanh" else (z > 0).to(z))
        g = torch.eye(self.outputs, dtype=x.dtype).expand(len(x), -1, -1)
        gradients = [g]
        for (matrix, _), slope in zip(reversed(layers[1:]), reversed(slopes), strict=True):
            g = (g @ matrix) * slope[:, None]
            gradients.insert(0, g)
        return z, list(zip(inputs, gradients, strict=True))

    def split(self, weights: Float[Tensor, "networks size"]) -> Iterator[tuple[Tensor, Tensor]]:
        """Of every layer its matrix ``(networks, outputs, inputs)`` and bias ``(networks, outputs)``."""
        sizes = [size for inputs, outputs in self._layers() for size in (inputs * outputs, outputs)]
        parts = iter(weights.split(sizes, 1))  # one operation: slices would each have a gradient of full size
        for (inputs, outputs), matrix, bias in zip(self._layers(), parts, parts, strict=True):
            yield matrix.unflatten(1, (outputs, inputs)), bias

    def _layers(self) -> Iterator[tuple[int, int]]:
        return zip(self.widths[:-1], self.widths[1:], strict=True)

    def _activate(self, z: Tensor) -> Tensor:
        return torch.tanh(z) if self.activation == "tanh" else torch.relu(z)


# -- the posterior -------------------------------------------------------------------------------------------


def normal_prior(variance: float | Tensor) -> LogPrior:
    """Independent N(0, variance) for all weights.

    Args:
        variance: > 0, a number or one for each network, ``(networks,)``.

    Returns:
        The log density up to what depends on nothing.

    Raises:
        DataError: if a variance is not positive.
    """
    p2 = _variance("prior variance", variance)

    def log_prior(weights: Tensor) -> Tensor:
        return -weights.square().sum(-1) / (2 * p2) - weights.shape[-1] / 2 * p2.log()

    return log_prior


def gaussian_likelihood(variance: float | Tensor) -> LogLikelihood:
    """y ~ N(prediction, variance), independent over rows and outputs.

    Args:
        variance: of the noise, not its standard deviation; > 0, a number or one for each network.

    Returns:
        The log density of each row.

    Raises:
        DataError: if a variance is not positive.
    """
    s2 = _variance("noise variance", variance)[..., None]

    def log_likelihood(prediction: Tensor, y: Tensor) -> Tensor:
        squares = (y - prediction).square().sum(-1)
        return -squares / (2 * s2) - y.shape[-1] / 2 * (2 * math.pi * s2).log()

    return log_likelihood


def log_posterior(
    network: RegNet,
    x: Float[Tensor, "rows features"],
    y: Float[Tensor, "rows outputs"],
    log_prior: LogPrior,
    log_likelihood: LogLikelihood,
    row_weights: Float[Tensor, "networks rows"] | None = None,
) -> Callable[[Tensor], Tensor]:
    """The log density of the weights given data, up to a constant, for `samplers.hmc` and `map_estimate`.

    Args:
        network: whose weights.
        x: inputs.
        y: targets.
        log_prior: any function of the weights, one number per network.
        log_likelihood: any function of predictions and targets, one number per network and row.
        row_weights: how often each network sees each row; once if not given.

    Returns:
        From weights ``(networks, size)`` to ``(networks,)``.
    """

    def density(weights: Tensor) -> Tensor:
        rows = log_likelihood(network(weights, x), y)
        rows = rows if row_weights is None else rows * row_weights
        return rows.sum(-1) + log_prior(weights)

    return density


def minibatch_log_posterior(
    network: RegNet,
    x: Tensor,
    y: Tensor,
    log_prior: LogPrior,
    log_likelihood: LogLikelihood,
    batch_size: int,
    seen: Float[Tensor, "networks rows"] | None = None,
) -> Callable[[Tensor, torch.Generator], Tensor]:
    """An unbiased estimate of `log_posterior` from a few rows, drawn anew for each network, for `sghmc`.

    Args:
        network: whose weights.
        x: inputs.
        y: targets.
        log_prior: as for `log_posterior`.
        log_likelihood: as for `log_posterior`.
        batch_size: rows, >= 1; at most as many as the network that sees fewest.
        seen: 1 where a network sees a row, else 0; all if not given.

    Returns:
        From weights ``(networks, size)`` and a generator to ``(networks,)``.

    Raises:
        DataError: if batch_size < 1.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; take at least one row.")
    seen = x.new_ones(1, len(x)) if seen is None else seen
    total = seen.sum(1)
    size = min(batch_size, int(total.min()))

    def density(weights: Tensor, generator: torch.Generator) -> Tensor:
        chance = torch.rand(len(weights), len(x), generator=generator) + seen  # rows that are seen come first
        rows = chance.topk(size, dim=1).indices
        likelihood = log_likelihood(network(weights, x[rows]), y[rows]).sum(-1)
        return total / size * likelihood + log_prior(weights)

    return density


def map_estimate(
    log_density: Callable[[Tensor], Tensor],
    start: Float[Tensor, "networks size"],
    *,
    steps: int = 1000,
    lr: float = 0.01,
    course: Literal["constant", "cosine"] = "constant",
) -> Float[Tensor, "networks size"]:
    """Maximise a log density by Adam on all rows, every network for itself.

    Args:
        log_density: from weights to one number per network.
        start: first weights.
        steps: of Adam, >= 1.
        lr: learning rate at the start.
        course: of the learning rate.

    Returns:
        The weights of the last step.

    Raises:
        DataError: if steps < 1 or the weights ran away to numbers that are not finite.
    """
    if steps < 1 or not lr > 0:
        raise DataError(
            f"there are {steps} steps of Adam at lr {lr}; at least 1, and a positive lr, are needed."
        )
    weights = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=lr, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * schedule.factor(course, step, steps)
        loss = -log_density(weights).sum()
        (weights.grad,) = torch.autograd.grad(loss, weights)
        optimizer.step()
    if not bool(weights.isfinite().all()):
        raise DataError(f"training ran away with lr {lr}; make it smaller.")
    return weights.detach()


def _variance(name: str, value: float | Tensor) -> Tensor:
    variance = torch.as_tensor(value, dtype=torch.float64)
    if not bool((variance > 0).all()):
        raise DataError(f"a {name} is {float(variance.min())}; it must be positive.")
    return variance
