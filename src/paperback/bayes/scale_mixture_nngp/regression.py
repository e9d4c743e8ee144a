"""Regression with a scale mixture of NNGPs: closed form, quadrature or importance sampling over the scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.distributions import Distribution

from paperback.bayes.distributions import MultivariateStudentT, NormalVectorMixture, Reshaped, in_units
from paperback.bayes.interface import BayesianRegressor, as_numpy
from paperback.bayes.kernels import NNGPKernel
from paperback.bayes.scale_mixture_nngp.gram import (
    REMEDY,
    Tasks,
    additive_evidence,
    build_kernel,
    noiseless_grams,
    sufficient_statistics,
    task_grams,
)
from paperback.bayes.scale_mixture_nngp.posterior import AdditivePosterior, InsidePosterior
from paperback.bayes.scale_mixture_nngp.scale_prior import (
    FEW,
    FEWEST,
    InverseGamma,
    PointMass,
    Sampler,
    ScalePrior,
    Spec,
    WeightedPoints,
    importance_nodes,
    inverse_gamma_evidence,
    log_evidence,
    posterior_nodes,
    scale_prior,
    spec_of,
)
from paperback.bayes.scale_mixture_nngp.trained import ensemble_law
from paperback.errors import DataError, MissingExtraError
from paperback.numerics.linear_algebra import cholesky
from paperback.training import generator

try:
    from botorch.optim.closures import ForwardBackwardClosure
    from botorch.optim.core import scipy_minimize
except ModuleNotFoundError as error:
    raise MissingExtraError('scale mixtures need botorch: pip install "paperback[bayes]"') from error

ADDITIVE_NODES = 41  # of the scale, where each node needs a matrix of its own
LARGEST = 5000  # rows that are solved exactly
Inference = Literal["exact", "quadrature", "importance"]


class ScaleMixtureNNGP(BayesianRegressor):
    """A Gaussian process with the kernel of a wide network, whose scale has a prior: f | s2 ~ GP(0, s2 K).

    With an inverse gamma prior it is a Student-t process: the middle of a prediction is the NNGP's, its width
    answers to how large the targets are for the kernel, by (2 beta + q) / (2 alpha + n). `fit` learns kernel,
    noise and prior on one data set, where that gains little over a GP; `fit_tasks` learns them on many, and
    `condition` then predicts for a new one.

    Args:
        kernel: "relu", "erf" (fully connected), "resnet" or "conv".
        depth: hidden layers.
        scale_prior: a name and its parameters: ("inverse-gamma", alpha, beta), ("burr", c, d),
            ("half-cauchy", scale), ("exponential", rate), ("point", s2); or a function ``(n, generator) ->
            draws``, which cannot be saved.
        noise: "inside" the mixture, y | s2 ~ N(0, s2 (K + noise I)), or "additive", N(0, s2 K + noise I).
        inference: "exact" (inverse gamma or a point, noise inside), "quadrature" over log s2, or "importance"
            with the prior as the proposal, which turns to quadrature below 50 effective draws, if the prior
            has a density.
        weight_variance: of the weights times fan-in, > 0; where learning begins.
        bias_variance: of the biases, > 0; likewise.
        noise_variance: > 0; likewise.
        learn: learn these three, and alpha and beta, by the marginal likelihood.
        image_shape: (height, width) or (channels, height, width), of "conv".
        draws: of importance sampling.
        max_iter: steps of L-BFGS.
        random_state: of the draws.

    Attributes:
        kernel_: the learned kernel.
        n_iter_: steps of L-BFGS.
        noise_: the learned noise variance.
        scale_prior_: name and parameters of the learned prior.
        log_marginal_: of the data the model is conditioned on.
        diagnostics_: noise, and with importance sampling the effective sample size.

    Source: Lee et al., Scale mixtures of neural network Gaussian processes (2022).
    """

    kernel_: NNGPKernel
    noise_: float
    n_iter_: int
    scale_prior_: list[object]
    inputs_: Tensor
    targets_: Tensor
    _posterior: InsidePosterior | AdditivePosterior

    def __init__(
        self,
        kernel: Literal["relu", "erf", "resnet", "conv"] = "relu",
        depth: int = 4,
        scale_prior: Spec = ("inverse-gamma", 2.0, 2.0),
        noise: Literal["inside", "additive"] = "inside",
        inference: Inference = "exact",
        *,
        weight_variance: float = 2.0,
        bias_variance: float = 0.1,
        noise_variance: float = 0.1,
        learn: bool = True,
        image_shape: Sequence[int] | None = None,
        draws: int = 1000,
        max_iter: int = 200,
        random_state: int = 0,
    ) -> None:
        self.kernel = kernel
        self.depth = depth
        self.scale_prior = scale_prior
        self.noise = noise
        self.inference = inference
        self.weight_variance = weight_variance
        self.bias_variance = bias_variance
        self.noise_variance = noise_variance
        self.learn = learn
        self.image_shape = image_shape
        self.draws = draws
        self.max_iter = max_iter
        self.random_state = random_state

    # -- learning and conditioning ---------------------------------------------------------------------------

    def fit_tasks(self, tasks: Sequence[tuple[ArrayLike | Tensor, ArrayLike | Tensor]]) -> Self:
        """Learn kernel, noise and prior on many data sets that share them but not their scale.

        Inputs and targets are standardised together, so that scales stay what they are. The model is left
        without data: it predicts from the prior until `condition` gives it some.

        Args:
            tasks: pairs of X ``(rows, features)`` and y ``(rows,)`` or ``(rows, outputs)``.

        Returns:
            The estimator.

        Raises:
            DataError: if there is no data set, or their columns differ.
        """
        if not tasks:
            raise DataError("tasks is empty; give at least one pair of X and y.")
        Xs = [np.asarray(as_numpy(X), dtype=np.float64) for X, _ in tasks]
        ys = [np.asarray(as_numpy(y), dtype=np.float64) for _, y in tasks]
        for number, (X, y) in enumerate(zip(Xs, ys, strict=True)):
            fits = X.ndim == 2 and X.shape[1] == Xs[0].shape[1] and len(y) == len(X) and y.ndim == ys[0].ndim
            if not fits or not (np.isfinite(X).all() and np.isfinite(y).all()):
                raise DataError(
                    f"data set {number} has X {X.shape} and y {y.shape}; all need finite numbers and the "
                    f"{Xs[0].shape[-1]} columns of the first."
                )
        learn = self.learn
        try:  # the ways of `fit` into standard units, without its learning
            self.learn = False
            self.fit(np.concatenate(Xs), np.concatenate(ys))
        finally:
            self.learn = learn
        sets = [self._standard(X, y) for X, y in zip(Xs, ys, strict=True)]
        if learn:
            self._learn(Tasks.of(sets))
        self._condition(sets[0][0][:0], sets[0][1][:0])
        return self

    def condition(self, X: ArrayLike | Tensor, y: ArrayLike | Tensor) -> Self:
        """Take other data; kernel, noise, prior and units stay as they were learned.

        Args:
            X: ``(rows, features)``.
            y: ``(rows,)`` or ``(rows, outputs)``.

        Returns:
            The estimator.
        """
        check_is_fitted(self)
        self._condition(*self._standard(X, y))
        self.log_marginal_ = self.log_marginal(X, y)
        return self

    def log_marginal(self, X: ArrayLike | Tensor, y: ArrayLike | Tensor) -> float:
        """log p(y | X) of other data under the learned kernel, noise and prior, nats, in the units of y.

        Args:
            X: ``(rows, features)``.
            y: ``(rows,)`` or ``(rows, outputs)``.
        """
        check_is_fitted(self)
        x, target = self._standard(X, y)
        with torch.no_grad():
            value = float(self._evidence(Tasks.of([(x, target)]), self._prior()))
        return value - len(x) * float(np.log(self.target_scale_).sum())

    def _standard(self, X: ArrayLike | Tensor, y: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
        x = self._inputs(X).detach()
        target = np.asarray(as_numpy(y), dtype=np.float64).reshape(len(x), -1)
        if target.shape[1] != self.n_outputs_ or not np.isfinite(target).all():
            raise DataError(
                f"y has {target.shape[1]} columns; give {self.n_outputs_} of finite numbers, and one row for "
                f"each of the {len(x)} of X."
            )
        return x, torch.as_tensor((target - self.target_shift_) / self.target_scale_)

    def _fit(self, x: Tensor, y: Tensor) -> None:
        self._check(scale_prior(self.scale_prior))
        self.kernel_ = self._build_modules()["kernel_"]
        self.noise_ = float(self.noise_variance)
        self.n_iter_ = 1  # without learning: one solution
        prior = scale_prior(self.scale_prior)
        self.scale_prior_ = ["sampler"] if isinstance(prior, Sampler) else spec_of(prior)
        if self.learn:
            self._learn(Tasks.of([(x, y)]))
        self._condition(x, y)
        if not isinstance(prior, Sampler):
            with torch.no_grad():
                self.log_marginal_ = float(self._evidence(Tasks.of([(x, y)]), self._prior()))

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        super()._restore(tensors)
        self._condition(self.inputs_, self.targets_)

    def _build_modules(self) -> Mapping[str, NNGPKernel]:
        variances = self.weight_variance, self.bias_variance
        kernel = build_kernel(self.kernel, self.depth, *variances, self.image_shape)
        return {"kernel_": kernel.requires_grad_(False)}

    def _check(self, prior: ScalePrior) -> None:
        if self.noise not in ("inside", "additive"):
            raise DataError(f'noise is {self.noise!r}; it is "inside" or "additive".')
        if self.inference not in ("exact", "quadrature", "importance"):
            raise DataError(f'inference is {self.inference!r}; it is "exact", "quadrature" or "importance".')
        if not self.noise_variance > 0:
            raise DataError(f"noise_variance is {self.noise_variance}; it must be positive.")
        if isinstance(prior, Sampler) and (self.inference != "importance" or self.learn):
            raise DataError(
                'a sampler of scales has no density: take inference="importance" and learn=False, or a prior '
                "by name."
            )
        closed = isinstance(prior, InverseGamma | PointMass) and self.noise == "inside"
        if self.inference == "exact" and not closed:
            raise DataError(
                'inference="exact" is for an inverse gamma prior with noise inside the mixture; take '
                'inference="quadrature".'
            )
        if self.inference == "importance" and self.noise == "additive":
            raise DataError('importance sampling needs noise="inside"; take inference="quadrature".')

    def _prior(self) -> ScalePrior:
        if self.scale_prior_ == ["sampler"]:
            return scale_prior(self.scale_prior)
        return scale_prior(self.scale_prior_)

    def _learn(self, tasks: Tasks) -> None:
        """Maximise the sum of the log evidences by L-BFGS."""
        prior = self._prior()
        free = {
            "weight": self.kernel_.raw_weight_variance,
            "bias": self.kernel_.raw_bias_variance,
            "noise": nn.Parameter(torch.tensor(self.noise_, dtype=torch.float64).log()),
        }
        if isinstance(prior, InverseGamma):
            for name in ("alpha", "beta"):
                free[name] = nn.Parameter(torch.tensor(getattr(prior, name), dtype=torch.float64).log())
        total = tasks.observations.sum()

        def loss() -> Tensor:
            alpha, beta = (free[name].exp() if name in free else None for name in ("alpha", "beta"))
            return -self._evidence(tasks, prior, free["noise"].exp(), alpha, beta).sum() / total

        bounds = dict.fromkeys(("noise", "alpha", "beta"), (-14.0, 9.0))
        self.kernel_.requires_grad_(True)
        result = scipy_minimize(
            ForwardBackwardClosure(loss, free),
            free,
            bounds={name: bound for name, bound in bounds.items() if name in free},
            options={"maxiter": self.max_iter},
        )
        self.noise_ = float(free["noise"].detach().exp())
        if isinstance(prior, InverseGamma):
            alpha, beta = (float(free[name].detach().exp()) for name in ("alpha", "beta"))
            self.scale_prior_ = ["inverse-gamma", alpha, beta]
        self.kernel_.requires_grad_(False).zero_grad()
        self.n_iter_ = max(1, int(result.step))

    def _evidence(
        self,
        tasks: Tasks,
        prior: ScalePrior,
        noise: Tensor | None = None,
        alpha: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:
        """log p(y | X) of every task, differentiable in the kernel's parameters and in the arguments."""
        noise = torch.tensor(self.noise_, dtype=torch.float64) if noise is None else noise
        n = tasks.observations
        if self.noise == "additive":
            gram = noiseless_grams(self.kernel_, tasks)
            u, log_step = self._additive_nodes(gram, noise, tasks, prior)
            if alpha is not None and beta is not None:
                log_prior = alpha * beta.log() - torch.lgamma(alpha) - alpha * u - beta * (-u).exp()
            else:
                log_prior = prior.log_prob(u.exp()) + u
            return additive_evidence(log_prior, u, log_step, gram, noise, tasks)
        q, log_det = sufficient_statistics(task_grams(self.kernel_, noise, tasks), tasks.y)
        if alpha is not None and beta is not None:
            return inverse_gamma_evidence(alpha, beta, q, log_det, n)
        return log_evidence(prior, q, log_det, n)

    @torch.no_grad()
    def _additive_nodes(
        self, gram: Tensor, noise: Tensor, tasks: Tasks, prior: ScalePrior
    ) -> tuple[Tensor, Tensor]:
        """Nodes u = log s2 for additive noise: where the integrand is, found in the eigenbasis of K."""
        if isinstance(prior, PointMass):
            raise DataError('a point mass has no density to integrate; take noise="inside".')
        eigenvalues, eigenvectors = torch.linalg.eigh(gram)
        coarse = torch.linspace(-30, 30, 601, dtype=torch.float64)
        # Rows that are not there add the same to every node: their eigenvalue is 0 and their target 0.
        integrand = _additive_integrand(coarse, eigenvalues, eigenvectors.mT @ tasks.y, noise, prior)
        kept = integrand > integrand.amax(-1, keepdim=True) - 20
        low = coarse.where(kept, torch.inf).amin(-1, keepdim=True) - 0.1
        high = coarse.where(kept, -torch.inf).amax(-1, keepdim=True) + 0.1
        u = low + (high - low) * torch.linspace(0, 1, ADDITIVE_NODES, dtype=torch.float64)
        return u, ((high - low) / (ADDITIVE_NODES - 1)).log().expand_as(u)

    @torch.no_grad()
    def _condition(self, x: Tensor, y: Tensor) -> None:
        """Make the posterior of data in standard units."""
        if len(x) > LARGEST:
            raise DataError(
                f"there are {len(x):,} rows; the exact model takes {LARGEST:,}. SparseGP and the deep kernel "
                "machine with inducing points take more."
            )
        self.inputs_, self.targets_ = x, y
        self.diagnostics_ = {"noise_variance": self.noise_}
        gram, prior = self.kernel_.forward(x, x), self._prior()
        if self.noise == "additive":
            self._posterior = self._additive_posterior(gram, x, y, prior)
            return
        noisy = gram + self.noise_ * torch.eye(len(x), dtype=x.dtype)
        lower = cholesky(noisy, "kernel matrix of the scale mixture", remedy=REMEDY).lower
        solved = torch.cholesky_solve(y, lower)
        q, n = (y * solved).sum(), torch.tensor(float(y.numel()), dtype=torch.float64)
        scale = self._scale_posterior(prior, q, n)
        self._posterior = InsidePosterior(self.kernel_, x, self.noise_, lower, solved, scale)

    def _scale_posterior(
        self, prior: ScalePrior, q: Tensor, n: Tensor
    ) -> tuple[float, float] | WeightedPoints:
        """Alpha and beta of the inverse gamma law of s2 given the data, or weighted points."""
        if self.inference == "exact" and isinstance(prior, InverseGamma):
            return prior.alpha + float(n) / 2, prior.beta + float(q) / 2
        if self.inference == "importance":
            draws = generator(self.random_state, "scales")
            points = importance_nodes(prior, q, n, self.draws, draws)
            size = points.effective_size
            self.diagnostics_["effective_sample_size"] = size
            if size >= FEW or (isinstance(prior, Sampler) and size >= FEWEST):
                return points
            if isinstance(prior, Sampler):
                raise DataError(
                    f"of {self.draws} draws of the scale only {size:.1f} count; the prior is far from the "
                    "data: take more draws, another scale, or a prior by name, which is integrated by "
                    "quadrature."
                )
        return posterior_nodes(prior, q, n)

    def _additive_posterior(self, gram: Tensor, x: Tensor, y: Tensor, prior: ScalePrior) -> AdditivePosterior:
        eigenvalues, eigenvectors = torch.linalg.eigh(gram)
        tasks = Tasks(x[None], y[None], torch.ones(1, len(x), dtype=torch.bool))
        noise = torch.tensor(self.noise_, dtype=torch.float64)
        u, log_step = self._additive_nodes(gram[None], noise, tasks, prior)
        projected = eigenvectors.mT @ y
        log_weights = log_step[0] + _additive_integrand(u[0], eigenvalues, projected, noise, prior)
        kernel = self.kernel_
        scale = WeightedPoints(u[0].exp(), log_weights.log_softmax(-1))
        return AdditivePosterior(kernel, x, self.noise_, eigenvalues, eigenvectors, projected, scale)

    # -- prediction ------------------------------------------------------------------------------------------

    @property
    def scale_posterior_(self) -> Distribution:
        """The law of s2 given the data: an inverse gamma law, or weighted points."""
        check_is_fitted(self)
        posterior = self._posterior
        if isinstance(posterior.scale, WeightedPoints):
            return posterior.scale
        return torch.distributions.InverseGamma(*torch.tensor(posterior.scale, dtype=torch.float64))

    def _law(self, x: Tensor) -> Distribution:
        if x.ndim == 2:
            return self._posterior.law(x)
        law = self._posterior.law(x.reshape(-1, x.shape[-1]))
        return Reshaped(law, x.shape[:-1])

    def _joint(self, x: Tensor) -> MultivariateStudentT | NormalVectorMixture:
        return self._posterior.joint(x)

    def ensemble_law(self, X: ArrayLike | Tensor, train: Literal["last", "all"] = "last") -> Distribution:
        """The law of wide networks after training on the model's data, without noise; see `ensemble_law`.

        Args:
            X: ``(rows, features)``.
            train: "last", only the readout is trained; "all", all layers are.

        Returns:
            Of the networks' values, batch ``(rows,)`` or ``(rows, outputs)``.

        Raises:
            DataError: if the prior has no density, or `train` is none of the two.
        """
        points = self._inputs(X)
        law = ensemble_law(self.kernel_, self._prior(), self.inputs_, self.targets_, points, train)
        return in_units(law, *self._target_units(), flat=self.flat_target_)


def _additive_integrand(
    u: Tensor, eigenvalues: Tensor, projected: Tensor, noise: Tensor, prior: ScalePrior
) -> Tensor:
    """log p(y | s2) + log p(u) for u = log s2, up to a constant, in the eigenbasis of K.

    Args:
        u: ``(nodes,)``.
        eigenvalues: ``(*tasks, rows)``.
        projected: targets in the eigenbasis, ``(*tasks, rows, outputs)``.
        noise: variance.
        prior: of s2.

    Returns:
        ``(*tasks, nodes)``.
    """
    spread = u.exp()[:, None] * eigenvalues.clamp_min(0)[..., None, :] + noise  # (*tasks, nodes, rows)
    squares = projected.square().sum(-1)[..., None, :]
    fit = projected.shape[-1] * spread.log().sum(-1) + (squares / spread).sum(-1)
    return prior.log_prob(u.exp()) + u - fit / 2
