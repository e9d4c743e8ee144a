"""Priors over data sets, as functions that draw them.

A prior takes the number of data sets, the number of rows of each and a generator, and returns features
``(data sets, rows, features)`` and targets ``(data sets, rows)``, noise included. That is all that a
prior-fitted network needs to know of it: densities are never evaluated. A hyper-parameter is a number, or a
frozen distribution of `scipy.stats` from which each data set draws its own value (the authors share one among
a tenth of a batch).

Source: Müller et al., Transformers Can Do Bayesian Inference (2022), sections 5 and 6 and appendix. The
defaults of `GPMixture` are the authors', which are BoTorch's hyper-priors of 2021; their noise variance has
the mean 22, so most of its data sets are noise: for use, give narrower ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from paperback.errors import DataError
from paperback.numerics.linear_algebra import cholesky

if TYPE_CHECKING:
    from paperback.bayes.prior_fitted.transformer import PriorFittedTransformer

Prior = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
Kernel = Literal["rbf", "matern52"]
HyperPrior = float | Any  # a number, or a frozen distribution of scipy.stats


@dataclass(frozen=True)
class GP:
    """Gaussian processes with one set of hyper-parameters; inputs are uniform in the unit cube.

    Attributes:
        features: number of features.
        lengthscale: of all features.
        outputscale: variance of the function.
        noise: variance of the noise, > 0.
        kernel: "rbf" or "matern52".
    """

    features: int = 1
    lengthscale: float = 0.6
    outputscale: float = 1.0
    noise: float = 1e-4
    kernel: Kernel = "rbf"

    def __call__(self, tasks: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw data sets."""
        x = torch.rand(tasks, rows, self.features, generator=generator, dtype=torch.float64)
        length, variance, noise = torch.tensor(
            [self.lengthscale, self.outputscale, self.noise], dtype=torch.float64
        )
        return x.float(), _gp_targets(x, length, variance, noise, self.kernel, generator).float()


@dataclass(frozen=True)
class GPMixture:
    """Gaussian processes whose hyper-parameters each data set draws anew.

    Attributes:
        features: number of features, or the least and the largest number; a batch has one.
        lengthscale: of each feature; the features draw independently.
        outputscale: variance of the function.
        noise: variance of the noise.
        kernel: "rbf" or "matern52".
    """

    features: int | tuple[int, int] = 1
    lengthscale: HyperPrior = field(default_factory=lambda: stats.gamma(3.0, scale=1 / 6.0))
    outputscale: HyperPrior = field(default_factory=lambda: stats.gamma(0.5, scale=1 / 0.15))
    noise: HyperPrior = field(default_factory=lambda: stats.gamma(1.1, scale=1 / 0.05))
    kernel: Kernel = "matern52"

    def __call__(self, tasks: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw data sets."""
        rng = _numpy(generator)
        features = _number(self.features, rng)
        x = torch.rand(tasks, rows, features, generator=generator, dtype=torch.float64)
        lengthscale = _drawn(self.lengthscale, (tasks, 1, features), rng)
        outputscale = _drawn(self.outputscale, (tasks,), rng)
        noise = _drawn(self.noise, (tasks,), rng)
        y = _gp_targets(x, lengthscale, outputscale, noise, self.kernel, generator)
        return x.float(), y.float()


@dataclass(frozen=True)
class Ridge:
    """Linear functions of standard normal features with normal weights: the posterior is in closed form.

    Attributes:
        features: number of features.
        weight_std: of each weight and of the intercept.
        noise: variance of the noise.
    """

    features: int = 1
    weight_std: float = 1.0
    noise: float = 0.01

    def __call__(self, tasks: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw data sets."""
        x, weights, intercept, noise = (
            torch.randn(shape, generator=generator)
            for shape in ((tasks, rows, self.features), (tasks, self.features), (tasks, 1), (tasks, rows))
        )
        y = self.weight_std * (torch.einsum("tnf,tf->tn", x, weights) + intercept)
        return x, y + math.sqrt(self.noise) * noise


@dataclass(frozen=True)
class BNN:
    """Random networks with tanh units: weights N(0, s^2 / inputs), s of each data set; some weights are zero.

    Width and depth are drawn for a batch; the scale of the weights, the share of weights that are kept and
    the noise on the hidden units for each data set. With `classes` the target is cut into that many classes
    of equal size: a tabular classification task.

    Attributes:
        features: number of features, or the least and the largest number.
        layers: hidden layers, least and most.
        width: hidden units, least and most.
        weight_scale: s.
        keep: probability that a weight is not zero.
        hidden_noise: standard deviation of the noise on hidden units and on the output.
        correlated: features are mixtures of a few common factors and noise of their own, as columns of
            tables are; otherwise they are independent and normal.
        classes: None for the output itself, which is regression; or a number of classes, or the least and the
            largest number: a batch has one.
    """

    features: int | tuple[int, int] = 1
    layers: tuple[int, int] = (1, 3)
    width: tuple[int, int] = (8, 64)
    weight_scale: HyperPrior = field(default_factory=lambda: stats.gamma(4.0, scale=0.5))
    keep: HyperPrior = field(default_factory=lambda: stats.uniform(0.3, 0.7))
    hidden_noise: HyperPrior = field(default_factory=lambda: stats.gamma(1.0, scale=0.05))
    correlated: bool = False
    classes: int | tuple[int, int] | None = None

    def __call__(self, tasks: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw data sets."""
        rng = _numpy(generator)
        features = _number(self.features, rng)
        x = self._features(tasks, rows, features, generator, rng)
        scale, keep, noise = (
            _drawn(prior, (tasks, 1, 1), rng).float()
            for prior in (self.weight_scale, self.keep, self.hidden_noise)
        )
        width = _number(self.width, rng)
        sizes = [features, *[width] * _number(self.layers, rng), 1]
        h = x
        for i, (inputs, outputs) in enumerate(pairwise(sizes)):
            weights = scale * torch.randn(tasks, inputs, outputs, generator=generator) / math.sqrt(inputs)
            kept = torch.rand(tasks, inputs, outputs, generator=generator) < keep
            bias = 0.5 * scale * torch.randn(tasks, 1, outputs, generator=generator)
            h = h @ (weights * kept) + bias
            h = h + noise * torch.randn(h.shape, generator=generator)
            if i < len(sizes) - 2:
                h = h.tanh()
        y = h[..., 0]
        return (x, y) if self.classes is None else (x, _ranked(y, _number(self.classes, rng), generator))

    def _features(
        self, tasks: int, rows: int, features: int, generator: torch.Generator, rng: np.random.Generator
    ) -> Tensor:
        own = torch.randn(tasks, rows, features, generator=generator)
        if not self.correlated:
            return own
        factors = int(rng.integers(1, features + 1))
        common = torch.randn(tasks, rows, factors, generator=generator)
        mixing = torch.randn(tasks, factors, features, generator=generator) / math.sqrt(factors)
        share = torch.rand(tasks, 1, features, generator=generator)
        return share.sqrt() * (common @ mixing) + (1 - share).sqrt() * own


def from_callable(draw: Callable[[torch.Generator, int], tuple[Tensor, Tensor]]) -> Prior:
    """A prior from a function that draws one data set, such as a simulator.

    Args:
        draw: from a generator and the number of rows to features ``(rows, features)`` and targets
            ``(rows,)``.

    Returns:
        The prior; it calls the function once for each data set.
    """

    def prior(tasks: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        sets = [draw(generator, rows) for _ in range(tasks)]
        return torch.stack([x for x, _ in sets]), torch.stack([y for _, y in sets])

    return prior


def draw_checked(
    prior: Prior, tasks: int, rows: int, network: PriorFittedTransformer, generator: torch.Generator
) -> tuple[Float[Tensor, "tasks rows features"], Float[Tensor, "tasks rows"]]:
    """Data sets of a prior, once they were found usable for a network.

    Raises:
        DataError: if shapes or numbers are not what a prior must return; it names the prior.
    """
    name = getattr(prior, "__name__", type(prior).__name__)
    drawn = prior(tasks, rows, generator)
    if not (isinstance(drawn, tuple) and len(drawn) == 2 and all(isinstance(p, Tensor) for p in drawn)):
        raise DataError(f"the prior {name} must return a pair of tensors, features and targets.")
    x, y = drawn
    if x.ndim != 3 or x.shape[:2] != (tasks, rows) or y.shape != (tasks, rows):
        raise DataError(
            f"the prior {name} returned shapes {tuple(x.shape)} and {tuple(y.shape)} for {tasks} data sets "
            f"of {rows} rows; they must be ({tasks}, {rows}, features) and ({tasks}, {rows})."
        )
    if x.shape[2] > network.num_features:
        raise DataError(
            f"the prior {name} returned {x.shape[2]} features and the network takes {network.num_features}; "
            "make the network with a larger num_features."
        )
    if not bool(x.isfinite().all() and y.isfinite().all()):
        part = "targets" if bool(x.isfinite().all()) else "features"
        raise DataError(f"the prior {name} returned {part} that are not finite; look for overflows in it.")
    if network.head == "categorical":
        if bool(((y < 0) | (y >= network.n_classes) | (y != y.round())).any()):
            raise DataError(
                f"the prior {name} returned targets that are no classes 0 .. {network.n_classes - 1}, which "
                'the head "categorical" needs; cut them into classes, or take the head "riemann".'
            )
        return x, y
    return x, y.float()


def kernel_matrix(
    a: Float[Tensor, "*batch n features"],
    b: Float[Tensor, "*batch m features"],
    lengthscale: Tensor,
    outputscale: Tensor,
    kernel: Kernel,
) -> Float[Tensor, "*batch n m"]:
    """Covariances of a function's values at rows of a and of b.

    Args:
        a: rows.
        b: rows.
        lengthscale: broadcasts with both.
        outputscale: ``batch`` or a scalar.
        kernel: "rbf", or "matern52": (1 + r + r^2 / 3) e^-r with r = sqrt(5) distance.

    Returns:
        The matrix.
    """
    squared = torch.cdist(
        a / lengthscale, b / lengthscale, compute_mode="donot_use_mm_for_euclid_dist"
    ).square()
    if kernel == "rbf":
        shape = torch.exp(-squared / 2)
    elif kernel == "matern52":
        r = (5 * squared).sqrt()
        shape = (1 + r + r.square() / 3) * torch.exp(-r)
    else:
        raise DataError(f'kernel is {kernel!r}; it is "rbf" or "matern52".')
    return outputscale[..., None, None] * shape


def _gp_targets(
    x: Tensor,
    lengthscale: Tensor,
    outputscale: Tensor,
    noise: Tensor,
    kernel: Kernel,
    generator: torch.Generator,
) -> Tensor:
    """Noisy values at the rows, one function for each data set, float64."""
    covariance = kernel_matrix(x, x, lengthscale, outputscale, kernel)
    diagonal = (noise + 1e-9 * outputscale).expand(len(x))[:, None].expand(x.shape[:2])
    lower = cholesky(covariance + torch.diag_embed(diagonal), "the prior's kernel matrix").lower
    normal = torch.randn(*x.shape[:2], 1, generator=generator, dtype=x.dtype)
    return (lower @ normal)[..., 0]


def _drawn(prior: HyperPrior, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """One value of a hyper-parameter for each entry, float64."""
    if isinstance(prior, float | int):
        return torch.full(shape, float(prior), dtype=torch.float64)
    return torch.from_numpy(np.asarray(prior.rvs(size=shape, random_state=rng), dtype=np.float64))


def _number(value: int | tuple[int, int], rng: np.random.Generator) -> int:
    return value if isinstance(value, int) else int(rng.integers(value[0], value[1] + 1))


def _numpy(generator: torch.Generator) -> np.random.Generator:
    """A numpy generator that follows torch's."""
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def _ranked(y: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Targets cut into classes of equal size, numbered by rank and then shuffled for each data set."""
    # A constant output would have no order; noise far below it makes one.
    y = y + 1e-6 * torch.randn(y.shape, generator=generator)
    labels = y.argsort(1).argsort(1) * classes // y.shape[1]
    order = torch.rand(len(y), classes, generator=generator).argsort(1)
    return order.gather(1, labels)
