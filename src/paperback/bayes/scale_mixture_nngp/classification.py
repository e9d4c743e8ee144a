"""Classification with inducing points: the sparse variational Student-t process (SVTP).

With inducing values u_c = f_c(Z) of every class c, the variational posterior is

    q(s2) = InverseGamma(a, b),   q(u_c | s2) = N(m_c, s2 S_c),

against the prior s2 ~ InverseGamma(alpha, beta), u_c | s2 ~ N(0, s2 K_ZZ). Given s2, a point x then has the
mean A m_c and the variance s2 (A S_c A^T + k_xx - A k_Zx) with A = k_xZ K_ZZ^-1. One s2 serves all classes
and all points of a draw: that is the model's law, where the authors' code draws a Student-t variable for each
class when it tests. The bound is E_q[log softmax] - KL / N.

Source: Lee et al. (2022), section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from paperback.bayes.interface import BayesianClassifier
from paperback.bayes.scale_mixture_nngp.gram import REMEDY, build_kernel
from paperback.bayes.scale_mixture_nngp.scale_prior import InverseGamma, PointMass, Spec, scale_prior
from paperback.errors import DataError
from paperback.numerics.linear_algebra import cholesky
from paperback.training import derive, generator, seeded, train

JITTER = 1e-6  # of the mean diagonal of K_ZZ
ROWS = 1024  # of a prediction that are done at once


class StudentTProcess(nn.Module):
    """Inducing points, kernel and variational posterior.

    Args:
        n_inducing: M.
        features: of a row.
        classes: number of classes.
        kernel: as for `build_kernel`.
        depth: hidden layers.
        image_shape: of a convolutional kernel.
        alpha: of the prior; None with beta None fixes s2 at 1: a sparse variational GP.
        beta: of the prior.
        triangular: whether S_c is a full matrix, by its Cholesky factor, rather than diagonal.
    """

    def __init__(
        self,
        n_inducing: int,
        features: int,
        classes: int,
        kernel: str,
        depth: int,
        variances: tuple[float, float],
        image_shape: Sequence[int] | None,
        alpha: float | None,
        beta: float | None,
        triangular: bool,
    ) -> None:
        super().__init__()
        self.kernel = build_kernel(kernel, depth, *variances, image_shape)
        self.inducing = nn.Parameter(torch.zeros(n_inducing, features, dtype=torch.float64))
        # Whitened: u = L v with K_ZZ = L L^T, so that q(v | s2) = N(mean, s2 S) begins at the prior.
        self.mean = nn.Parameter(torch.zeros(classes, n_inducing, dtype=torch.float64))
        self.log_diagonal = nn.Parameter(torch.zeros(classes, n_inducing, dtype=torch.float64))
        self.below = nn.Parameter(torch.zeros(classes, n_inducing, n_inducing, dtype=torch.float64))
        self.below.requires_grad_(triangular)
        self.fixed = alpha is None
        start = torch.tensor([1.0, 1.0] if alpha is None else [alpha, beta], dtype=torch.float64)
        self.log_prior = nn.Parameter(start.log())  # of alpha and beta
        self.log_posterior = nn.Parameter(start.log())  # of a and b
        if self.fixed:
            self.log_prior.requires_grad_(False)
            self.log_posterior.requires_grad_(False)

    def factors(self) -> Float[Tensor, "classes inducing inducing"]:
        """Lower factors of the whitened S_c."""
        return self.below.tril(-1) + torch.diag_embed(self.log_diagonal.exp())

    def moments(self, x: Float[Tensor, "rows features"]) -> tuple[Tensor, Tensor]:
        """Mean ``(rows, classes)``, and variance ``(rows, classes)`` for s2 = 1."""
        gram = self.kernel.forward(self.inducing, self.inducing)
        lower = cholesky(gram, "kernel matrix of the inducing points", jitter=JITTER, remedy=REMEDY).lower
        cross = self.kernel.forward(self.inducing, x)
        white = torch.linalg.solve_triangular(lower, cross, upper=False)  # L^-1 k_Zx
        own = self.kernel.forward(x, x, diag=True)
        explained = torch.einsum("cij,ir->cjr", self.factors(), white).square().sum(1)
        variance = (own - white.square().sum(0)).clamp_min(0) + explained
        return (self.mean @ white).mT, variance.mT

    def scales(self, n: int, draws: torch.Generator) -> Float[Tensor, " n"]:
        """Draws of s2 from q, differentiable in a and b; ones if s2 is fixed."""
        if self.fixed:
            return torch.ones(n, dtype=torch.float64)
        a, b = self.log_posterior.exp()
        with seeded(int(torch.randint(2**31, (), generator=draws))):  # gamma variables take no generator
            return b / torch._standard_gamma(a.expand(n))

    def divergence(self) -> Tensor:
        """KL(q || p) of the scale and the inducing values together."""
        a, b = self.log_posterior.exp()
        alpha, beta = self.log_prior.exp()
        trace = self.factors().square().sum((1, 2))
        size = self.mean.shape[1]
        conditional = 0.5 * (trace - 2 * self.log_diagonal.sum(1) - size).sum()
        conditional = conditional + 0.5 * self.mean.square().sum() * (1.0 if self.fixed else a / b)
        if self.fixed:
            return conditional
        scale = (a - alpha) * torch.digamma(a) - torch.lgamma(a) + torch.lgamma(alpha)
        return conditional + scale + alpha * (b.log() - beta.log()) + a * (beta - b) / b

    def logits(
        self, x: Tensor, n: int, draws: torch.Generator, *, same: bool = False
    ) -> Float[Tensor, "n rows classes"]:
        """Draws of f at every row from its own law, with one s2 for a draw.

        Args:
            x: rows.
            n: draws.
            draws: of the numbers.
            same: the same normal numbers for every row, so that a row's draws do not depend on the others.
        """
        mean, variance = self.moments(x)
        roots = self.scales(n, draws).sqrt()[:, None, None]
        rows = 1 if same else len(x)
        normal = torch.randn(n, rows, mean.shape[1], generator=draws, dtype=torch.float64)
        return mean + roots * variance.sqrt() * normal


class ScaleMixtureClassifier(BayesianClassifier):
    """A classifier with the kernel of a wide network and a random scale, on inducing points.

    Args:
        kernel: "relu", "erf" (fully connected), "resnet" or "conv".
        n_inducing: inducing points, begun at training rows with classes in equal shares; at most the number
            of rows is used.
        depth: hidden layers.
        scale_prior: ("inverse-gamma", alpha, beta), learned too; ("point", 1.0) fixes the scale, which makes
            it a sparse variational GP.
        covariance: of the inducing values: "diagonal" or "triangular".
        weight_variance: of the weights times fan-in, where learning begins.
        bias_variance: of the biases, where learning begins.
        image_shape: (height, width) or (channels, height, width), of "conv".
        scale_inputs: standardise each column. Leave it out for images, where a pixel that is nearly constant
            would be blown up.
        epochs: passes over the rows.
        batch_size: rows of a step.
        lr: of Adam, falling to zero as a cosine.
        draws: of the logits, in training; a prediction takes ten times as many.
        random_state: of the inducing points and of all draws.

    Attributes:
        process_: the module.
        log_marginal_: its bound, nats.
        diagnostics_: bound per row, and a and b of the posterior of the scale.
    """

    process_: StudentTProcess
    n_inducing_: int

    def __init__(
        self,
        kernel: Literal["relu", "erf", "resnet", "conv"] = "relu",
        n_inducing: int = 100,
        depth: int = 4,
        scale_prior: Spec = ("inverse-gamma", 2.0, 2.0),
        covariance: Literal["diagonal", "triangular"] = "diagonal",
        *,
        weight_variance: float = 2.0,
        bias_variance: float = 0.1,
        image_shape: Sequence[int] | None = None,
        scale_inputs: bool = True,
        epochs: int = 60,
        batch_size: int = 250,
        lr: float = 1e-2,
        draws: int = 20,
        random_state: int = 0,
    ) -> None:
        self.kernel = kernel
        self.n_inducing = n_inducing
        self.depth = depth
        self.scale_prior = scale_prior
        self.covariance = covariance
        self.weight_variance = weight_variance
        self.bias_variance = bias_variance
        self.image_shape = image_shape
        self.scale_inputs = scale_inputs
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.draws = draws
        self.random_state = random_state

    def _fit_inputs(self, X: NDArray[Any]) -> Tensor:
        if self.scale_inputs:
            return super()._fit_inputs(X)
        self.input_shift_, self.input_scale_ = np.zeros(X.shape[1]), np.ones(X.shape[1])
        return self._scaled(torch.tensor(X, dtype=torch.float64))

    def _fit(self, x: Tensor, labels: Tensor) -> None:
        if self.n_inducing < 1 or self.draws < 1:
            raise DataError(f"n_inducing is {self.n_inducing} and draws {self.draws}; both are at least 1.")
        if self.covariance not in ("diagonal", "triangular"):
            raise DataError(f'covariance is {self.covariance!r}; it is "diagonal" or "triangular".')
        chosen = balanced_rows(labels, self.n_inducing, generator(self.random_state, "inducing"))
        self.n_inducing_ = len(chosen)
        self.process_ = self._build_modules()["process_"]
        self.process_.inducing.data = x[chosen].clone()
        rows = len(x)

        def loss(model: nn.Module, batch: tuple[Tensor, ...], draws: torch.Generator) -> Tensor:
            assert isinstance(model, StudentTProcess)
            logits = model.logits(batch[0], self.draws, draws)
            targets = batch[1].expand(self.draws, -1)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + model.divergence() / rows

        history = train(
            self.process_,
            loss,
            [x, labels],
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            schedule="cosine",
            clip_norm=10.0,
            seed=derive(self.random_state, "training"),
            description="inducing points",
        )
        self.log_marginal_ = -history.train_loss[-1] * rows
        self.diagnostics_ = {"elbo_per_row": -history.train_loss[-1]}
        if not self.process_.fixed:
            a, b = self.process_.log_posterior.detach().exp().tolist()
            self.diagnostics_ |= {"scale_a": a, "scale_b": b}

    def _build_modules(self) -> Mapping[str, StudentTProcess]:
        prior = scale_prior(self.scale_prior)
        alpha: float | None = None
        beta: float | None = None
        if isinstance(prior, InverseGamma):
            alpha, beta = prior.alpha, prior.beta
        elif not (isinstance(prior, PointMass) and math.isclose(prior.value, 1.0)):
            raise DataError(
                'the classifier takes an inverse gamma prior, or ("point", 1.0) for a sparse GP; '
                f"scale_prior is {self.scale_prior!r}."
            )
        process = StudentTProcess(
            self.n_inducing_,
            self.n_features_in_,
            len(self.classes_),
            self.kernel,
            self.depth,
            (self.weight_variance, self.bias_variance),
            self.image_shape,
            alpha,
            beta,
            self.covariance == "triangular",
        )
        return {"process_": process}

    def _probabilities(self, x: Tensor) -> Tensor:
        parts = []
        for rows in x.split(ROWS):
            draws = generator(self.random_state, "prediction")  # anew: the same for every row
            logits = self.process_.logits(rows, 10 * self.draws, draws, same=True)
            parts.append(logits.softmax(-1).mean(0))
        return torch.cat(parts)

    def _logits(self, x: Tensor, n: int, seed: int) -> Tensor:
        """Functions at all rows together: inducing values are drawn, and what they leave open, jointly."""
        process, draws = self.process_, generator(seed, "functions")
        gram = process.kernel.forward(process.inducing, process.inducing)
        lower = cholesky(gram, "kernel matrix of the inducing points", jitter=JITTER, remedy=REMEDY).lower
        white = torch.linalg.solve_triangular(lower, process.kernel.forward(process.inducing, x), upper=False)
        left = process.kernel.forward(x, x) - white.mT @ white
        rest = cholesky((left + left.mT) / 2, "posterior covariance of the classifier", remedy=REMEDY).lower
        roots = process.scales(n, draws).sqrt()[:, None, None]
        classes, size = process.mean.shape

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draws, dtype=torch.float64)

        spread = torch.einsum("cij,ncj->nci", process.factors(), normal(n, classes, size))
        values = (process.mean + roots * spread) @ white + roots * normal(n, classes, len(x)) @ rest.mT
        return values.mT


def balanced_rows(labels: Tensor, n: int, draws: torch.Generator) -> Tensor:
    """Indices of rows whose classes come in turn, as far as each has rows.

    Args:
        labels: of the rows.
        n: how many; all rows if there are fewer.
        draws: of the rows of a class.

    Returns:
        Different indices, ``(min(n, rows),)``.
    """
    order = torch.randperm(len(labels), generator=draws)
    one_hot = F.one_hot(labels[order])
    turn = (one_hot.cumsum(0) * one_hot).sum(1)  # the how-manieth of its class a row is
    return order[turn.argsort(stable=True)[:n]]
