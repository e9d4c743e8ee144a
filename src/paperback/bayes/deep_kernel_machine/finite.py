"""A deep Gaussian process of finite width, sampled: what the deep kernel machine is the limit of.

Features F_l of width N are Gaussian given the layer below, F_l = chol(K(G_{l-1})) Z_l with Z_l ~ N(0, I) and
G_l = F_l F_l^T / N. Every output is replicated N times, so that the likelihood weighs as much as the features
do: log p = -|Z|^2 / 2 + N sum_lambda log N(y_lambda; 0, K(G_L) + noise I). Z is sampled by Hamiltonian Monte
Carlo; as N grows, the posterior means of the Gram matrices come to those of a machine with nu = 1.

Source: Yang et al. (2023), the Bayesian representation learning limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from paperback.bayes.samplers import hmc
from paperback.errors import DataError
from paperback.numerics.linear_algebra import cholesky

BLOCK = 20  # samples of all features that are held at once

KernelFunction = Callable[[Tensor], Tensor]


class FiniteGrams(NamedTuple):
    """Posterior means of the Gram matrices of a finite deep Gaussian process.

    Attributes:
        chains: of each layer and chain, ``(layers, chains, points, points)``.
        acceptance: mean acceptance probability.
    """

    chains: Float[Tensor, "layers chains points points"]
    acceptance: float

    @property
    def mean(self) -> Float[Tensor, "layers points points"]:
        """Over all chains."""
        return self.chains.mean(1)


def sample_finite_grams(
    gram: Float[Tensor, "points points"],
    y: Float[Tensor, "points outputs"],
    kernels: Sequence[KernelFunction],
    width: int,
    *,
    noise: float,
    samples: int,
    burn_in: int,
    chains: int = 4,
    leapfrog_steps: int = 10,
    generator: torch.Generator,
) -> FiniteGrams:
    """Posterior means of the Gram matrices of all layers.

    Args:
        gram: G_0 of the inputs.
        y: targets.
        kernels: functions from Gram matrices ``(..., points, points)`` to kernels, one more than there are
            layers of features: `GramKernel.matrix`, for instance.
        width: N >= 1, of each layer.
        noise: variance of an observation, > 0.
        samples: states of each chain that are averaged.
        burn_in: states before them.
        chains: in parallel.
        leapfrog_steps: of a trajectory.
        generator: of all draws.

    Returns:
        The means.

    Raises:
        DataError: if an argument is out of range.
    """
    if width < 1 or not noise > 0 or len(kernels) < 2:
        raise DataError(
            f"width is {width}, noise {noise} and there are {len(kernels)} kernels; "
            "give a width >= 1, noise > 0 and at least two kernels."
        )
    points, layers = len(gram), len(kernels) - 1

    def grams(z: Tensor) -> list[Tensor]:
        result = [gram.expand(len(z), -1, -1)]
        for kernel, white in zip(kernels, z.view(len(z), layers, points, width).unbind(1), strict=False):
            lower = cholesky(kernel(result[-1]), "kernel of a finite layer", jitter=1e-8).lower
            features = lower @ white
            result.append(features @ features.mT / width)
        return result[1:]

    def log_density(z: Tensor) -> Tensor:
        top = kernels[-1](grams(z)[-1])
        identity = torch.eye(points, dtype=z.dtype)
        lower = cholesky(top + noise * identity, "covariance of the targets").lower
        white = torch.linalg.solve_triangular(lower, y.expand(len(z), -1, -1), upper=False)
        log_det = 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        likelihood = -(white.square().sum((-2, -1)) + y.shape[1] * log_det) / 2
        return width * likelihood - z.square().sum(-1) / 2

    start = torch.randn(chains, layers * points * width, generator=generator, dtype=gram.dtype)
    step = 0.5 * (layers * points * width) ** -0.25
    warm = hmc(
        log_density, start, samples=1, burn_in=burn_in, step_size=step, leapfrog_steps=leapfrog_steps,
        generator=generator,
    )  # fmt: skip
    state, step = warm.samples[-1], float(warm.step_size.mean())
    total, accepted = gram.new_zeros(layers, chains, points, points), 0.0
    for block in _blocks(samples, BLOCK):  # not all at once: a state is large
        drawn = hmc(
            log_density, state, samples=block, burn_in=0, step_size=step, leapfrog_steps=leapfrog_steps,
            generator=generator,
        )  # fmt: skip
        state = drawn.samples[-1]
        accepted += block * float(drawn.acceptance.mean())
        for z in drawn.samples:
            total += torch.stack(grams(z))
    return FiniteGrams(total / samples, accepted / samples)


def _blocks(samples: int, size: int) -> list[int]:
    whole, rest = divmod(samples, size)
    return [size] * whole + ([rest] if rest else [])


def relative_distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in the Frobenius norm."""
    return math.sqrt(float((a - b).square().sum() / b.square().sum()))
