"""The layers of a deep kernel machine: learned Gram matrices, and the Gaussian process on top.

Both are whitened. With K_ii = L L^T of the layer below and A = L^-1 K_it,

    G_ii = L W W^T L^T,   G_ti = (W^T A)^T (L W)^T,   G_tt = K_tt - A^T A + (W^T A)^T (W^T A),

which is T G_ii and K_tt - T K_it + T G_ii T^T with T = K_ti K_ii^-1. W = I is the infinitely wide network
that learns nothing, G = K. The divergence from it needs no inverse:

    KL(N(0, G_ii) || N(0, K_ii)) = (|W|^2 - inducing - 2 log |det W|) / 2.

Source: Yang et al. (2023), the objective and the inducing-point scheme; the whitening is ours.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.bayes.deep_kernel_machine.gram import StructGram
from paperback.errors import DataError
from paperback.numerics.linear_algebra import cholesky

Divergence = Literal["exact", "quadratic"]

REMEDY = "raise jitter, use fewer inducing points, or set gram_norm if the machine has many layers"


class Marginals(NamedTuple):
    """What a readout says of its functions at the points t.

    Attributes:
        mean: ``(*batch, points, outputs)``.
        covariance: the same for all outputs: variances ``(*batch, points)``, or the whole matrix ``(*batch,
            points, points)`` if the Gram matrix came with all of tt.
    """

    mean: Float[Tensor, "*batch points outputs"]
    covariance: Tensor


class GramLayer(nn.Module):
    """One layer of learned Gram matrices, G_ii near the kernel K_ii of the layer below.

    Args:
        inducing: number of inducing points.
        dof: nu > 0, how strongly G is held to K. Infinity: G = K, and nothing is learned.
        number: of the layer, from 1, for errors.
        jitter: part of the mean diagonal of K_ii that is added to its diagonal.
        divergence: "exact", or "quadratic": its expansion to second order in G^-1 K - I, which grows faster
            where G gets singular and is the better one in single precision.
        columns: of features; in training G_ii is drawn anew at each step from the Wishart law with so many
            degrees of freedom around its value, as a regulariser. None leaves it as it is.

    Raises:
        DataError: if an argument is out of range.
    """

    def __init__(
        self,
        inducing: int,
        dof: float,
        *,
        number: int = 1,
        jitter: float = 1e-6,
        divergence: Divergence = "exact",
        columns: int | None = None,
    ) -> None:
        super().__init__()
        if not dof > 0:
            raise DataError(f"dof is {dof}; degrees of freedom must be positive, math.inf among them.")
        if divergence not in ("exact", "quadratic"):
            raise DataError(f'divergence is {divergence!r}; it is "exact" or "quadratic".')
        if columns is not None and columns < 1:
            raise DataError(f"stochastic_gram is {columns}; give at least one column, or None.")
        self.dof, self.number, self.jitter = float(dof), number, jitter
        self.divergence, self.columns = divergence, columns
        self.v: nn.Parameter | None = None
        if math.isfinite(self.dof):
            # Of scale sqrt(n), so that a step of Adam changes W by lr / sqrt(n), and G by no more than lr.
            start = math.sqrt(inducing) * torch.eye(inducing, dtype=torch.float64)
            self.v = nn.Parameter(start)

    @property
    def root(self) -> Tensor:
        """W; the learned layer must have one."""
        assert self.v is not None
        return self.v / math.sqrt(len(self.v))

    def forward(self, kernel: StructGram) -> StructGram:
        """From the kernel of the layer below to the Gram matrix of this one."""
        if self.v is None:
            return kernel
        lower = cholesky(
            kernel.ii, f"kernel matrix below layer {self.number}", jitter=self.jitter, remedy=REMEDY
        ).lower
        w = self.root
        if self.training and self.columns is not None:
            noise = torch.randn(len(w), self.columns, dtype=w.dtype, device=w.device)
            w = w @ noise / math.sqrt(self.columns)
        a = torch.linalg.solve_triangular(lower, kernel.ti.mT, upper=False)
        root, wa = lower @ w, w.mT @ a
        return StructGram(root @ root.mT, wa.mT @ root.mT, _conditioned(kernel, a, wa))

    def kl(self) -> Tensor:
        """nu times the divergence, nats."""
        if self.v is None:
            return torch.zeros((), dtype=torch.float64)
        w = self.root
        if self.divergence == "exact":
            log_det = torch.linalg.slogdet(w).logabsdet
            return self.dof * (w.square().sum() - len(w) - 2 * log_det) / 2
        # The eigenvalues of G^-1 K are those of (W W^T)^-1.
        inverse = torch.linalg.inv(w)
        deviation = inverse.mT @ inverse - torch.eye(len(w), dtype=w.dtype, device=w.device)
        return self.dof * deviation.square().sum() / 4


class GPReadout(nn.Module):
    """A Gaussian process on the top kernel, by global inducing points: q(u) = N(L m, L S L^T), K_ii = L L^T.

    The outputs have means of their own and one covariance S for all.

    Args:
        inducing: number of inducing points.
        outputs: number of functions.
        jitter: as for `GramLayer`.
    """

    def __init__(self, inducing: int, outputs: int, *, jitter: float = 1e-6) -> None:
        super().__init__()
        self.jitter = jitter
        self.mean = nn.Parameter(torch.zeros(inducing, outputs, dtype=torch.float64))
        # The lower triangle of a root of S, with the logarithm of its diagonal.
        self.root = nn.Parameter(torch.zeros(inducing, inducing, dtype=torch.float64))

    @property
    def scale_tril(self) -> Tensor:
        """The Cholesky factor of S."""
        return self.root.tril(-1) + self.root.diagonal().exp().diag_embed()

    def project(self, kernel: StructGram) -> Float[Tensor, "*batch inducing points"]:
        """A = L^-1 K_it."""
        lower = cholesky(kernel.ii, "kernel matrix of the top layer", jitter=self.jitter, remedy=REMEDY).lower
        return torch.linalg.solve_triangular(lower, kernel.ti.mT, upper=False)

    def forward(self, kernel: StructGram) -> Marginals:
        """Mean A^T m and covariance K_tt - A^T A + A^T S A."""
        a = self.project(kernel)
        return Marginals(a.mT @ self.mean, _conditioned(kernel, a, self.scale_tril.mT @ a))

    def kl(self) -> Tensor:
        """KL(q(u) || p(u)), summed over outputs, nats."""
        inducing, outputs = self.mean.shape
        trace, log_det = self.scale_tril.square().sum(), 2 * self.root.diagonal().sum()
        return (self.mean.square().sum() + outputs * (trace - inducing - log_det)) / 2

    @torch.no_grad()
    def solve(self, moment: Tensor, response: Tensor, noise: Tensor) -> None:
        """Set q to its optimum for observations with Gaussian noise.

        Args:
            moment: A A^T over all points, ``(inducing, inducing)``.
            response: A y, ``(inducing, outputs)``.
            noise: variance, ``()``.
        """
        identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        precision = (moment + moment.mT) / (2 * noise) + identity  # eigenvalues >= 1
        lower = torch.linalg.cholesky(precision)
        self.mean.copy_(torch.cholesky_solve(response / noise, lower))
        covariance = torch.cholesky_inverse(lower)
        tril = cholesky((covariance + covariance.mT) / 2, "covariance of the inducing values").lower
        self.root.copy_(tril.tril(-1) + tril.diagonal().log().diag_embed())


class ExactReadout(nn.Module):
    """A Gaussian process on the top kernel whose inducing points are the training data.

    Args:
        y: targets, ``(inducing, outputs)``.
    """

    y: Tensor

    def __init__(self, y: Float[Tensor, "inducing outputs"]) -> None:
        super().__init__()
        self.register_buffer("y", y.clone())

    def forward(self, kernel: StructGram, noise: Tensor) -> Marginals:
        """Mean and covariance of the functions, given the observations.

        Args:
            kernel: of the training points i and other points t.
            noise: variance of an observation, ``()``.
        """
        lower = self._lower(kernel.ii, noise)
        a = torch.linalg.solve_triangular(lower, kernel.ti.mT, upper=False)
        white = torch.linalg.solve_triangular(lower, self.y, upper=False)
        covariance = kernel.tt - (a.mT @ a if kernel.whole else a.square().sum(-2))
        return Marginals(a.mT @ white, covariance)

    def log_marginal(self, kernel: Float[Tensor, "inducing inducing"], noise: Tensor) -> Tensor:
        """Sum over outputs of log N(y; 0, K + noise I)."""
        rows, outputs = self.y.shape
        lower = self._lower(kernel, noise)
        white = torch.linalg.solve_triangular(lower, self.y, upper=False)
        log_det = 2 * lower.diagonal().log().sum()
        return -(white.square().sum() + outputs * (log_det + rows * math.log(2 * math.pi))) / 2

    def _lower(self, kernel: Tensor, noise: Tensor) -> Tensor:
        identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
        return cholesky(kernel + noise * identity, "covariance of the targets", remedy=REMEDY).lower


def _conditioned(kernel: StructGram, a: Tensor, b: Tensor) -> Tensor:
    """K_tt - A^T A + B^T B, whole or its diagonal, as tt is."""
    if kernel.whole:
        return kernel.tt - a.mT @ a + b.mT @ b
    return kernel.tt - a.square().sum(-2) + b.square().sum(-2)
