"""Deep kernel machines as scikit-learn estimators: what to build, how to train it, what it predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from paperback.bayes.deep_kernel_machine.gram import Normalisation
from paperback.bayes.deep_kernel_machine.layers import Divergence, Marginals
from paperback.bayes.deep_kernel_machine.machine import (
    FullMachine,
    Likelihood,
    Machine,
    SparseMachine,
    normal_law,
)
from paperback.bayes.interface import BayesianClassifier, BayesianRegressor, _BayesianEstimator
from paperback.errors import DataError
from paperback.numerics.linear_algebra import cholesky
from paperback.training import train
from paperback.training.progress import bar

MOST_ROWS = 3000  # of the full machine, whose cost grows with the cube
STEPS, ITERATIONS = 1200, 200  # of Adam and of L-BFGS, unless told otherwise
SPARSE_DOF = 100.0
FULL_DOF, LEAST_FULL_DOF = 10.0, 100.0  # for each row and output, but at least so many for each output
MEMORY = 20_000_000  # numbers that the history of L-BFGS may hold
PREDICTION_DRAWS = 512  # Sobol points for the expectation of a softmax
LEAST_VARIANCE = 1e-9  # added to joint covariances, of standardised targets


class _DeepKernelMachine(_BayesianEstimator):
    """What the regressor and the classifier share; the arguments are explained at the regressor."""

    machine_: Machine
    n_inducing_: int
    elbo_: float

    def __init__(
        self,
        depth: int = 2,
        dof: float | Sequence[float] | None = None,
        kernel: str | Sequence[str] = "sqexp",
        n_inducing: int | None = None,
        *,
        gram_norm: Normalisation = "no",
        stochastic_gram: int | None = None,
        divergence: Divergence = "exact",
        ard: bool = True,
        jitter: float = 1e-6,
        epochs: int | None = None,
        batch_size: int = 300,
        lr: float = 0.1,
        random_state: int = 0,
        progress: bool = False,
    ) -> None:
        self.depth = depth
        self.dof = dof
        self.kernel = kernel
        self.n_inducing = n_inducing
        self.gram_norm = gram_norm
        self.stochastic_gram = stochastic_gram
        self.divergence = divergence
        self.ard = ard
        self.jitter = jitter
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.random_state = random_state
        self.progress = progress

    # -- what the machine learned ----------------------------------------------------------------------------

    @torch.no_grad()
    def gram_(self, layer: int, X: ArrayLike | Tensor | None = None) -> NDArray[np.float64]:
        """The learned Gram matrix behind a layer.

        Args:
            layer: 1 to depth; 0 is the Gram matrix of the inputs.
            X: points ``(rows, features)``; the inducing points (all training rows, of the full machine) if
                not given.

        Returns:
            ``(rows, rows)`` or ``(n_inducing, n_inducing)``.

        Raises:
            DataError: if there is no such layer.
        """
        if not 0 <= layer <= self.depth:
            raise DataError(
                f"layer is {layer}; the machine has layers 1 to {self.depth}, and 0 is its input."
            )
        x = self.machine_.inputs.inducing[:0] if X is None else self._inputs(X)
        gram = self.machine_.gram(layer, x, whole=X is not None)
        return (gram.ii if X is None else gram.tt).numpy(force=True)

    @torch.no_grad()
    def effective_kernel(
        self, X: ArrayLike | Tensor, Z: ArrayLike | Tensor | None = None
    ) -> NDArray[np.float64]:
        """The learned kernel of the readout, for any other kernel method (``kernel="precomputed"``).

        Args:
            X: ``(rows, features)``.
            Z: ``(others, features)``; X itself if not given.

        Returns:
            ``(rows, others)``; the memory is that of a matrix of all rows and others together.
        """
        x = self._inputs(X)
        z = x[:0] if Z is None else self._inputs(Z)
        kernel = self.machine_.kernel(torch.cat([x, z]), whole=True).tt
        return (kernel if Z is None else kernel[: len(x), len(x) :]).numpy(force=True)

    # -- building and training -------------------------------------------------------------------------------

    def _count_inducing(self, rows: int) -> int:
        """Check the arguments that need the data; the number of inducing points."""
        if self.depth < 0:
            raise DataError(f"depth is {self.depth}; give 0 (an ordinary Gaussian process) or more.")
        if self.n_inducing is None:
            if rows > MOST_ROWS:
                raise DataError(
                    f"there are {rows} rows, the full machine takes {MOST_ROWS}; set n_inducing, e.g. 100."
                )
            return rows
        if not 1 <= self.n_inducing <= rows:
            raise DataError(
                f"n_inducing is {self.n_inducing} and n_samples={rows}; give 1 to {rows} inducing points, "
                "or None for all rows."
            )
        return self.n_inducing

    def _options(self, outputs: int) -> dict[str, Any]:
        """Arguments of a machine."""
        full = outputs * max(LEAST_FULL_DOF, FULL_DOF * self.n_inducing_)
        default = SPARSE_DOF if self.n_inducing is not None else full
        kernels = _one_each(self.kernel, self.depth + 1, "kernel")
        dof = _one_each(default if self.dof is None else self.dof, self.depth, "dof")
        return {
            "kernels": kernels,
            "dof": dof,
            "ard": self.ard,
            "gram_norm": self.gram_norm,
            "columns": self.stochastic_gram,
            "divergence": self.divergence,
            "jitter": self.jitter,
        }

    def _sparse(self, inducing: Tensor, outputs: int, likelihood: Likelihood) -> SparseMachine:
        learn = self.n_inducing is not None
        options = self._options(outputs)
        return SparseMachine(
            inducing, outputs=outputs, likelihood=likelihood, learn_inducing=learn, **options
        )

    def _inducing_points(self, x: Float[Tensor, "rows features"]) -> Float[Tensor, "inducing features"]:
        """Centres of k-means; all rows, if there are to be as many."""
        if self.n_inducing_ == len(x):
            return x
        means = KMeans(self.n_inducing_, n_init=1, max_iter=30, random_state=self.random_state)
        return torch.as_tensor(means.fit(x.numpy()).cluster_centers_)

    def _train(self, machine: SparseMachine, x: Tensor, y: Tensor) -> None:
        """Adam on mini-batches, with betas and clipping of the reference."""
        rows = len(x)
        steps = math.ceil(rows / self.batch_size)

        def loss(module: nn.Module, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
            assert isinstance(module, SparseMachine)
            elbo = module.elbo(batch[0], batch[1], rows, generator=generator)
            return -elbo - module.log_prior() / rows

        history = train(
            machine,
            loss,
            (x, y),
            epochs=math.ceil(STEPS / steps) if self.epochs is None else self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=self.lr, betas=(0.8, 0.9)),
            schedule="cosine",
            clip_norm=10.0,
            seed=self.random_state,
            progress=self.progress,
            description="deep kernel machine",
        )
        self.diagnostics_["elbo_first_epoch"] = -history.train_loss[0]

    @torch.no_grad()
    def _note(self, machine: FullMachine | SparseMachine, shift: float = 0.0) -> None:
        """Keep the machine, and what it says of itself; `shift` brings nats into the units of the data."""
        self.machine_ = machine.eval().requires_grad_(False)
        self.elbo_ -= shift
        self.diagnostics_["elbo"] = self.elbo_
        for number, kl in enumerate(machine.layer_kls(), 1):
            self.diagnostics_[f"kl_layer_{number}"] = float(kl)
        if machine.log_noise is not None:
            self.diagnostics_["noise_std"] = float(machine.noise.sqrt())


class DeepKernelMachine(_DeepKernelMachine, BayesianRegressor):
    """Regression with learned kernels and Gaussian noise.

    Args:
        depth: layers of learned Gram matrices, >= 0; 0 is an ordinary (sparse) Gaussian process.
        dof: nu, one number or one for each layer: how strongly learned Gram matrices are held to those of the
            infinitely wide network. Small ones learn more and may overfit; math.inf learns none (NNGP). None
            is 100 for the sparse machine; 10 is better with thousands of rows, and far too little for some
            hundreds. The full one, which has a Gram matrix of all rows to fit noise with, then takes 10 for
            each row and output, and at least 100 for each output.
        kernel: "sqexp", "arccos", "linear", "matern32" or "matern52", or several of them joined by "+"; one
            for all layers, or depth + 1 of them from the input to the readout.
        n_inducing: number of inducing points; None is the full machine, for up to 3,000 rows. Its cost grows
            with their cube: seconds for 200, minutes for 500.
        gram_norm: "no", "inducing" or "batch": bring Gram matrices to a common scale behind each layer.
        stochastic_gram: number of columns of the features that Gram matrices are drawn with in training, as a
            regulariser; None draws none.
        divergence: "exact", or "quadratic", its expansion to second order.
        ard: learn one scale for each feature at the input.
        jitter: part of the mean diagonal that is added to kernel matrices before they are factorised.
        epochs: passes over the data (iterations of L-BFGS for the full regressor); None is about 1,200 steps
            (200 iterations).
        batch_size: rows of a step.
        lr: peak learning rate of Adam; it falls along a cosine.
        random_state: seed of inducing points, batches and draws.
        progress: show a bar.

    Attributes:
        elbo_: objective per training row, nats, in the units of y.
        log_marginal_: of the full machine with depth 0 or infinite dof, which is a Gaussian process.
        machine_: the module, whose parts are those of `paperback.bayes.deep_kernel_machine`.
        diagnostics_: elbo, divergence of each layer, and the noise of standardised targets.
    """

    machine_: FullMachine | SparseMachine

    def _fit(self, x: Float[Tensor, "rows features"], y: Float[Tensor, "rows outputs"]) -> None:
        self.__dict__.pop("log_marginal_", None)  # of an earlier fit with other settings
        self.n_inducing_ = self._count_inducing(len(x))
        if self.n_inducing is None:
            machine: FullMachine | SparseMachine = self._fit_full(x, y)
        else:
            machine = self._sparse(self._inducing_points(x), y.shape[1], "gaussian")
            machine.eval().solve_readout(x, y)
            self._train(machine, x, y)
            machine.solve_readout(x, y)
            self.elbo_ = machine.whole_elbo(x, y)
        self._note(machine, float(np.log(self.target_scale_).sum()))

    def _fit_full(self, x: Tensor, y: Tensor) -> FullMachine:
        if self.stochastic_gram is not None or self.gram_norm == "batch":
            raise DataError(
                'stochastic_gram and gram_norm="batch" need the mini-batches of the sparse machine; '
                "set n_inducing, or leave them out."
            )
        machine = FullMachine(x, y, **self._options(y.shape[1]))
        converged = maximise(machine, ITERATIONS if self.epochs is None else self.epochs, self.progress)
        self.diagnostics_["converged"] = float(converged)
        with torch.no_grad():
            objective = float(machine.objective())
        self.elbo_ = objective / len(x)
        if all(layer.v is None for layer in machine.gram_layers):
            self.log_marginal_ = objective
        return machine

    def _law(self, x: Float[Tensor, "*batch features"]) -> Normal:
        return normal_law(self.machine_, x)

    def _joint(self, x: Float[Tensor, "*batch q features"]) -> MultivariateNormal:
        marginals = self.machine_(x, whole=True)
        lower = _root(marginals)[..., None, :, :]
        return MultivariateNormal(marginals.mean.mT, scale_tril=lower, validate_args=False)

    def _build_modules(self) -> Mapping[str, nn.Module]:
        x = torch.zeros(self.n_inducing_, self.n_features_in_, dtype=torch.float64)
        if self.n_inducing is not None:
            return {"machine_": self._sparse(x, self.n_outputs_, "gaussian").requires_grad_(False)}
        y = x.new_zeros(self.n_inducing_, self.n_outputs_)
        return {"machine_": FullMachine(x, y, **self._options(self.n_outputs_)).requires_grad_(False)}


class DeepKernelMachineClassifier(_DeepKernelMachine, BayesianClassifier):
    """Classification with learned kernels: a softmax of Gaussian processes on the top kernel.

    Arguments are those of `DeepKernelMachine`. The expectation over the softmax is one over draws, so that
    also the machine without n_inducing is trained by Adam, with all rows as inducing points that stay.

    Attributes:
        elbo_: objective per training row, nats.
        machine_: the module, whose parts are those of `paperback.bayes.deep_kernel_machine`.
        diagnostics_: elbo and the divergence of each layer.
    """

    machine_: SparseMachine

    def _fit(self, x: Float[Tensor, "rows features"], labels: Int[Tensor, " rows"]) -> None:
        self.n_inducing_ = self._count_inducing(len(x))
        machine = self._sparse(self._inducing_points(x), len(self.classes_), "categorical")
        self._train(machine, x, labels)
        self.elbo_ = machine.whole_elbo(x, labels, seed=self.random_state)
        self._note(machine)

    def _probabilities(self, x: Float[Tensor, "rows features"]) -> Float[Tensor, "rows classes"]:
        """E softmax(f); the same draws for each row, so that a row's result does not depend on the others."""
        classes = len(self.classes_)
        uniform = torch.quasirandom.SobolEngine(classes, scramble=True, seed=0).draw(PREDICTION_DRAWS)
        normal = torch.special.ndtri(uniform.double().clamp(1e-7, 1 - 1e-7))[:, None]
        parts = []
        for part in x.split(max(1, 2_000_000 // (PREDICTION_DRAWS * classes))):
            mean, variance = self.machine_(part)
            f = mean + variance.clamp_min(0).sqrt()[:, None] * normal
            parts.append(f.softmax(-1).mean(0))
        return torch.cat(parts)

    def _logits(self, x: Float[Tensor, "rows features"], n: int, seed: int) -> Tensor:
        marginals = self.machine_(x, whole=True)
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(n, *marginals.mean.shape, generator=generator, dtype=x.dtype)
        return marginals.mean + _root(marginals) @ normal

    def _build_modules(self) -> Mapping[str, nn.Module]:
        x = torch.zeros(self.n_inducing_, self.n_features_in_, dtype=torch.float64)
        return {"machine_": self._sparse(x, len(self.classes_), "categorical").requires_grad_(False)}


def maximise(machine: FullMachine, iterations: int, progress: bool = False) -> bool:
    """Maximise the objective of a full machine by L-BFGS; the machine ends with its best parameters.

    Args:
        machine: changed in place.
        iterations: at most so many.
        progress: show a bar.

    Returns:
        Whether the optimiser stopped by itself, and not because of the iterations or because it came to
        parameters whose matrices cannot be factorised.

    Raises:
        DataError: if the objective cannot be computed at the start.
    """
    parameters = [p for p in machine.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=iterations,
        history_size=min(30, max(3, MEMORY // sum(p.numel() for p in parameters))),
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )
    best: list[Tensor] = []
    lowest = math.inf

    def closure() -> Tensor:
        nonlocal best, lowest
        optimizer.zero_grad()
        loss = -machine.objective() - machine.log_prior()
        loss.backward()
        if not loss.isfinite():
            raise DataError("the objective is not finite; raise jitter.")
        value = float(loss.detach())
        if value < lowest:
            best, lowest = [p.detach().clone() for p in parameters], value
        advance(optimizer.state[parameters[0]].get("n_iter", 0), f"objective {-value:.5g}")
        return loss

    failed, rows = False, len(machine.readout.y)
    with torch.enable_grad(), bar("deep kernel machine", iterations, rows, show=progress) as advance:
        try:
            optimizer.step(closure)
        except DataError:
            if not best:
                raise
            failed = True
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return not failed and optimizer.state[parameters[0]]["n_iter"] < iterations


def _root(marginals: Marginals) -> Tensor:
    """A Cholesky factor of a joint covariance."""
    covariance = (marginals.covariance + marginals.covariance.mT) / 2
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return cholesky(covariance + LEAST_VARIANCE * identity, "joint covariance of the predictions").lower


def _one_each(value: Any, count: int, name: str) -> list[Any]:
    """One value for each layer, from one for all or from a list."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise DataError(f"{name} has {len(value)} entries; give one for all, or {count}.")
    return list(value)
