"""The posterior of the function given data: what `predict` needs, with the scale integrated out.

With noise inside the mixture, everything but one factor is that of a GP: mean k*^T K^-1 y, variance s2 (k** +
noise - k*^T K^-1 k*). With additive noise each scale has a mean and a variance of its own, which one
eigendecomposition of K serves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution

from paperback.bayes.distributions import (
    MultivariateStudentT,
    NormalMixture,
    NormalVectorMixture,
    StudentTWithQuantiles,
)
from paperback.bayes.kernels import NNGPKernel
from paperback.bayes.scale_mixture_nngp.gram import REMEDY
from paperback.bayes.scale_mixture_nngp.scale_prior import WeightedPoints
from paperback.numerics.linear_algebra import cholesky

BLOCK = 2**22  # entries of K(X, rows) that are held at once


class InsidePosterior:
    """Noise inside the mixture.

    Args:
        kernel: K.
        x: training rows.
        noise: variance of the noise for s2 = 1.
        lower: Cholesky factor of K + noise I.
        solved: (K + noise I)^-1 y, ``(rows, outputs)``.
        scale: alpha and beta of the inverse gamma posterior of s2, or its points.
    """

    def __init__(
        self,
        kernel: NNGPKernel,
        x: Tensor,
        noise: float,
        lower: Tensor,
        solved: Tensor,
        scale: tuple[float, float] | WeightedPoints,
    ) -> None:
        self.kernel, self.x, self.noise = kernel, x, noise
        self.lower, self.solved, self.scale = lower, solved, scale

    def law(self, x: Tensor) -> Distribution:
        """Student-t for an inverse gamma posterior, else a mixture of normal laws."""
        parts = [self._moments(rows) for rows in x.split(max(1, BLOCK // (len(self.x) + 1)))]
        mean = torch.cat([part[0] for part in parts])
        std = torch.cat([part[1] for part in parts]).add(self.noise).sqrt()[:, None].expand_as(mean)
        if isinstance(self.scale, WeightedPoints):
            roots = self.scale.points.sqrt()[:, None, None]
            return NormalMixture(mean.expand(len(roots), *mean.shape), roots * std, self.scale.log_weights)
        alpha, beta = self.scale
        return StudentTWithQuantiles(2 * alpha, mean, (beta / alpha) ** 0.5 * std, validate_args=False)

    def joint(self, x: Tensor) -> MultivariateStudentT | NormalVectorMixture:
        """The function without noise; all outputs have one scale."""
        cross = self.kernel.forward(self.x.expand(*x.shape[:-2], -1, -1), x)  # (..., n, q)
        lower = self.lower.expand(*cross.shape[:-2], -1, -1)
        white = torch.linalg.solve_triangular(lower, cross, upper=False)
        tril = _factor(self.kernel.forward(x, x) - white.mT @ white)
        mean = (cross.mT @ self.solved).mT  # (..., outputs, q)
        tril = tril.unsqueeze(-3).expand(*mean.shape, mean.shape[-1])
        if isinstance(self.scale, WeightedPoints):
            roots = self.scale.points.sqrt()
            return NormalVectorMixture(self.scale.log_weights, mean[None], tril[None], roots)
        alpha, beta = self.scale
        return MultivariateStudentT(2 * alpha, mean, (beta / alpha) ** 0.5 * tril, shared=True)

    def _moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(rows, outputs)``, and variance ``(rows,)`` for s2 = 1."""
        cross = self.kernel.forward(self.x, rows)
        own = self.kernel.forward(rows, rows, diag=True)
        white = torch.linalg.solve_triangular(self.lower, cross, upper=False)
        return cross.mT @ self.solved, (own - white.square().sum(0)).clamp_min(0)


class AdditivePosterior:
    """Noise of its own variance.

    Args:
        kernel: K.
        x: training rows.
        noise: variance of the noise.
        eigenvalues: of K at the training rows.
        eigenvectors: likewise.
        projected: the targets in that basis, ``(rows, outputs)``.
        scale: the posterior of s2.
    """

    def __init__(
        self,
        kernel: NNGPKernel,
        x: Tensor,
        noise: float,
        eigenvalues: Tensor,
        eigenvectors: Tensor,
        projected: Tensor,
        scale: WeightedPoints,
    ) -> None:
        self.kernel, self.x, self.noise = kernel, x, noise
        self.eigenvectors, self.projected = eigenvectors, projected
        self.scale = scale
        # s2 / (s2 lambda + noise): K^-1 of each scale, in the eigenbasis
        s2 = scale.points[:, None]
        self.gain = s2 / (s2 * eigenvalues.clamp_min(0) + noise)

    def law(self, x: Tensor) -> NormalMixture:
        """A mixture over the nodes of s2."""
        parts = [self._moments(rows) for rows in x.split(max(1, BLOCK // (len(self.x) + 1)))]
        mean = torch.cat([part[0] for part in parts], 1)
        std = torch.cat([part[1] for part in parts], 1).add(self.noise).sqrt()[..., None]
        return NormalMixture(mean, std.expand_as(mean), self.scale.log_weights)

    def joint(self, x: Tensor) -> NormalVectorMixture:
        """The function without noise."""
        cross = self.kernel.forward(self.x.expand(*x.shape[:-2], -1, -1), x)
        rotated = self.eigenvectors.mT @ cross  # (..., n, q)
        mean = torch.einsum("kn,...nq,no->k...oq", self.gain, rotated, self.projected)
        explained = torch.einsum("kn,...np,...nq->k...pq", self.gain, rotated, rotated)
        scales = self.scale.points.reshape(-1, *[1] * (explained.ndim - 1))
        tril = _factor(scales * (self.kernel.forward(x, x) - explained))
        tril = tril.unsqueeze(-3).expand(*mean.shape, mean.shape[-1])
        return NormalVectorMixture(self.scale.log_weights, mean, tril)

    def _moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(nodes, rows, outputs)`` and variance ``(nodes, rows)``."""
        rotated = self.eigenvectors.mT @ self.kernel.forward(self.x, rows)  # (n, rows)
        own = self.kernel.forward(rows, rows, diag=True)
        mean = torch.einsum("kn,nr,no->kro", self.gain, rotated, self.projected)
        explained = self.gain @ rotated.square()
        return mean, (self.scale.points[:, None] * (own - explained)).clamp_min(0)


def _factor(covariance: Tensor) -> Tensor:
    """Cholesky factor of a posterior covariance."""
    symmetric = (covariance + covariance.mT) / 2
    return cholesky(symmetric, "posterior covariance of the scale mixture", remedy=REMEDY).lower
