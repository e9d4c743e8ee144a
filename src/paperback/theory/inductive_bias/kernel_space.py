"""The hypothesis space of a kernel: a Gaussian process, given an exact fit of the training data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from paperback.errors import DataError
from paperback.numerics.fixed_point import conjugate_gradient
from paperback.numerics.linear_algebra import cholesky
from paperback.theory.inductive_bias.laws import LossLaw

Kernel = Callable[[Tensor, Tensor], Any]

REMEDY = "remove rows that are nearly equal, shorten the kernel's length scale, or raise the jitter"
ROWS = 2_000  # of the kernel matrix that are held at once where it is too large to be held whole
ROUNDING = 1e-12  # eigenvalues of the covariance below this part of the prior's are rounding errors
CG_TOL = 1e-9


@dataclass(frozen=True)
class Posterior:
    """What the functions of a kernel that fit the training data do at the test points.

    Attributes:
        mean: ``(test, outputs)`` float64.
        covariance: ``(test, test)``, the same for each output.
        prior: mean prior variance, the scale that eigenvalues are compared with.
        jitter: variance at the training points that was needed, as a part of the prior's.
        rounding: part of the prior variance that an eigenvalue of the covariance may be off.
    """

    mean: Float[Tensor, "test outputs"]
    covariance: Float[Tensor, "test test"]
    prior: float
    jitter: float
    rounding: float = ROUNDING

    def spectrum(self) -> tuple[Float[Tensor, " test"], Float[Tensor, "test test"]]:
        """Eigenvalues of the covariance, those that are rounding errors set to 0, and its eigenvectors."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return torch.where(values > len(values) * self.rounding * self.prior, values, 0.0), vectors

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n test outputs"]:
        """Independent functions of the space, at the test points: mean + S^(1/2) z.

        Args:
            n: how many.
            generator: on the CPU.
        """
        values, vectors = self.spectrum()
        z = torch.randn(n, *self.mean.shape, dtype=torch.float64, generator=generator)
        return self.mean + (vectors * values.sqrt()) @ z.to(self.mean.device)

    def law(self, y_test: Float[Tensor, "test outputs"]) -> LossLaw:
        """The exact law of the mean squared error over test points and outputs.

        In the eigenvectors of S the error of an output is independent normal, with the variances of the
        eigenvalues and the projected error of the mean: one term per eigenvalue, with a degree of freedom per
        output.
        """
        values, vectors = self.spectrum()
        entries, outputs = y_test.numel(), y_test.shape[1]
        error = (vectors.T @ (self.mean - y_test.to(self.mean))).square().sum(1)
        random = values > 0
        weights = values[random] / entries
        return LossLaw(
            weights=weights.cpu().numpy(),
            degrees=np.full(len(weights), float(outputs)),
            noncentrality=(error[random] / values[random]).cpu().numpy(),
            constant=float(error[~random].sum()) / entries,
        )


class KernelSpace:
    """The functions of a kernel: a Gaussian process of mean 0, the same and independent for each output.

    Args:
        kernel: ``(A, B) -> (rows of A, rows of B)`` on float64 tensors ``(rows, ...)``, such as `rbf`; a
            kernel of gpytorch or of scikit-learn is one too.
        jitter: variance of the deviations at the training points that count as a fit, as a part of the mean
            prior variance, > 0. It belongs to the space: with a smooth kernel, less of it leaves fewer
            functions.
        dense_limit: training rows up to which the kernel matrix is factorised; beyond, its systems are solved
            by conjugate gradients, and it is never held whole.
        n_landmarks: rows of the Nystrom preconditioner of the conjugate gradients.

    Raises:
        DataError: if the jitter is not above zero.
    """

    def __init__(
        self, kernel: Kernel, jitter: float = 1e-6, *, dense_limit: int = 5_000, n_landmarks: int = 1_000
    ) -> None:
        if not jitter > 0:
            raise DataError(f"jitter is {jitter}; it must be above zero, such as 1e-6.")
        self.kernel = kernel
        self.jitter = jitter
        self.dense_limit = dense_limit
        self.n_landmarks = n_landmarks

    def posterior(self, X: Tensor, y: Float[Tensor, "train outputs"], X_test: Tensor) -> Posterior:
        """The process given the training data.

        Args:
            X: training inputs ``(train, ...)``.
            y: their targets.
            X_test: test inputs ``(test, ...)``.

        Returns:
            Mean and covariance at the test points: a = k(x, X) K^-1 y, S = k(x, x') - k(x, X) K^-1 k(X, x').

        Raises:
            DataError: if the kernel's result has the wrong shape, is not finite or not positive definite with
                a jitter of 1e-2, or conjugate gradients do not converge.
        """
        X, X_test, y = X.double(), X_test.double(), y.double()
        prior, cross = self._matrix(X_test, X_test), self._matrix(X, X_test)
        scale = float(prior.diagonal().mean())
        if len(X) <= self.dense_limit:
            K = self._matrix(X, X)
            factor = cholesky(K, "kernel matrix", jitter=self.jitter, remedy=REMEDY)
            solved = torch.linalg.solve_triangular(factor.lower, torch.cat([cross, y], 1), upper=False)
            half, whitened = solved[:, : len(X_test)], solved[:, len(X_test) :]
            mean, explained, rounding = half.T @ whitened, half.T @ half, ROUNDING
            jitter = float(factor.jitter / K.diagonal().mean())
        else:
            solved = self._solve_iteratively(X, torch.cat([cross, y], 1), self.jitter * scale)
            mean, explained = cross.T @ solved[:, len(X_test) :], cross.T @ solved[:, : len(X_test)]
            jitter, rounding = self.jitter, CG_TOL
        covariance = prior - explained
        return Posterior(mean, (covariance + covariance.T) / 2, scale, jitter, rounding)

    def log_marginal_likelihood(self, X: Tensor, y: Float[Tensor, "train outputs"]) -> float:
        """log p(y | X), nats per training target: the usual way to compare kernels.

        Args:
            X: training inputs ``(train, ...)``, at most `dense_limit`.
            y: their targets.
        """
        K, y = self._matrix(X.double(), X.double()), y.double()
        lower = cholesky(K, "kernel matrix", jitter=self.jitter, remedy=REMEDY).lower
        whitened = torch.linalg.solve_triangular(lower, y, upper=False)
        log_det = float(lower.diagonal().log().sum())
        square = float(whitened.square().sum()) / y.shape[1]
        return (-0.5 * square - log_det) / len(y) - 0.5 * math.log(2 * math.pi)

    # -- helpers ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _matrix(self, A: Tensor, B: Tensor) -> Tensor:
        result = self.kernel(A, B)
        if hasattr(result, "to_dense"):  # a lazy one, of gpytorch
            result = result.to_dense()
        matrix = torch.as_tensor(result, dtype=torch.float64, device=A.device)
        if matrix.shape != (len(A), len(B)):
            raise DataError(
                f"the kernel gave shape {tuple(matrix.shape)} for {len(A)} and {len(B)} rows; it must give "
                "one row per row of its first argument and one column per row of its second."
            )
        if not bool(matrix.isfinite().all()):
            raise DataError(
                "the kernel gave numbers that are not finite; look for extreme values in the inputs."
            )
        return matrix

    def _solve_iteratively(self, X: Tensor, rhs: Tensor, jitter: float) -> Tensor:
        """(K + jitter I)^-1 rhs without holding K, preconditioned by its Nystrom approximation."""
        chosen = torch.linspace(0, len(X) - 1, min(self.n_landmarks, len(X))).long()
        landmarks = X[chosen]
        lower = cholesky(
            self._matrix(landmarks, landmarks), "kernel matrix", jitter=self.jitter, remedy=REMEDY
        ).lower
        features = torch.linalg.solve_triangular(
            lower, self._matrix(landmarks, X), upper=False
        )  # (landmarks, n)
        inner = cholesky(
            features @ features.T + jitter * torch.eye(len(landmarks), dtype=X.dtype, device=X.device),
            "preconditioner",
        ).lower

        def operator(p: Tensor) -> Tensor:  # p is (right-hand sides, n)
            parts = [p @ self._matrix(X, rows) for rows in X.split(ROWS)]
            return torch.cat(parts, 1) + jitter * p

        def precondition(r: Tensor) -> Tensor:  # (F'F + jitter I)^-1 by the Woodbury identity
            return (r - torch.cholesky_solve(features @ r.T, inner).T @ features) / jitter

        solution = conjugate_gradient(operator, rhs.T, precondition, tol=CG_TOL, max_steps=1_000)
        if not bool(solution.converged.all()):
            raise DataError(
                f"conjugate gradients on the kernel matrix ({len(X)} x {len(X)}) stopped at a residual of "
                f"{float(solution.residual.max()):.1e}; raise the jitter or n_landmarks."
            )
        return solution.x.T


def rbf(length: float) -> Kernel:
    """The Gaussian kernel exp(-|a - b|^2 / (2 length^2)) on flattened inputs.

    Args:
        length: length scale, > 0.

    Raises:
        DataError: if the length is not above zero.
    """
    if not length > 0:
        raise DataError(f"length is {length}; a length scale must be above zero.")

    def kernel(A: Tensor, B: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(A.flatten(1), B.flatten(1)).square() / (2 * length**2))

    return kernel
