"""The hypothesis space of an architecture: networks trained from random weights until they fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import joblib
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from paperback.errors import DataError
from paperback.theory.inductive_bias.laws import FEWEST_LOSSES
from paperback.training import Schedule, derive, generator, seeded, train

FitFunction = Callable[[nn.Module, Tensor, Tensor, int], Any]
CHUNK = 1_000  # rows of a forward pass that measures an error


@dataclass(frozen=True)
class Fit:
    """How the networks of a space are trained to fit the training data: Adam on the mean squared error.

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows per step.
        lr: peak learning rate.
        schedule: of the learning rate.
        weight_decay: of the optimizer.
    """

    epochs: int = 300
    batch_size: int = 64
    lr: float = 1e-3
    schedule: Schedule = "cosine"
    weight_decay: float = 0.0


@dataclass(frozen=True, eq=False)
class Trained:
    """The networks that were trained.

    Attributes:
        train_errors: mean squared error on the training rows, ``(models,)``.
        test_errors: on the test rows.
        stacked: whether they were trained as one stack.
        why_not: why not, if they could have been.
    """

    train_errors: Float[Tensor, " models"]
    test_errors: Float[Tensor, " models"]
    stacked: bool
    why_not: str = ""


class NetworkSpace:
    """Networks of one architecture after training from independent initial weights and orders of the rows.

    Up to `stack_size` networks are trained at once as one stack (`torch.func.vmap`); each has its own weights
    and order, and what it learns does not depend on the others. What cannot be stacked (a module that looks
    at values, or keeps running statistics) is trained model by model, in `n_jobs` processes of joblib or on
    the cluster of a `joblib.parallel_config`; `trained_.why_not` says so.

    Args:
        make_model: returns a new module with random weights each time, drawn from torch's global generator.
        fit: how to train, or a function ``(model, X, y, seed)`` that trains a model in place.
        n_models: how many, >= 8.
        fit_tol: a network counts when its training error is at most this part of the variance of the
            training targets; in (0, 1].
        stack_size: networks of a stack; 1 trains model by model.
        n_jobs: processes that train models that are not stacked.
        progress: show progress.

    Attributes:
        trained_: what the last `errors` trained, the networks that do not fit included.

    Raises:
        DataError: if an argument is out of range.
    """

    trained_: Trained

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        fit: Fit | FitFunction | None = None,
        n_models: int = 24,
        *,
        fit_tol: float = 0.1,
        stack_size: int = 32,
        n_jobs: int = 1,
        progress: bool = True,
    ) -> None:
        if n_models < FEWEST_LOSSES:
            raise DataError(
                f"n_models is {n_models}; a law of the error needs at least {FEWEST_LOSSES} models."
            )
        if not 0 < fit_tol <= 1:
            raise DataError(f"fit_tol is {fit_tol}; it is a part of the targets' variance, in (0, 1].")
        if stack_size < 1:
            raise DataError(f"stack_size is {stack_size}; it must be at least 1.")
        self.make_model = make_model
        self.fit = Fit() if fit is None else fit
        self.n_models = n_models
        self.fit_tol = fit_tol
        self.stack_size = stack_size
        self.n_jobs = n_jobs
        self.progress = progress

    def errors(
        self,
        X: Tensor,
        y: Float[Tensor, "train outputs"],
        X_test: Tensor,
        y_test: Float[Tensor, "test outputs"],
        seed: int = 0,
    ) -> Trained:
        """Train the networks, and return those that fit the training data.

        Args:
            X: training inputs ``(train, ...)``.
            y: their targets.
            X_test: test inputs.
            y_test: their targets.
            seed: of initial weights and orders.

        Returns:
            The errors of the networks that fit.

        Raises:
            DataError: if fewer than 8 of them fit, the outputs of a network have the wrong shape, or
                `make_model` gives the same weights each time.
        """
        models = self._fresh(seed)
        _check_output(models[0], X[:2], y.shape[1])
        why_not = "" if isinstance(self.fit, Fit) else "the fit is a function for one model"
        if not why_not and self.stack_size > 1:
            why_not = why_not_stacked(models[:2], X[:2], y[:2])
        stacked = self.stack_size > 1 and not why_not
        data = (X, y, X_test, y_test)
        parts = self._train_stacks(models, data, seed) if stacked else self._train_each(models, data, seed)
        train_errors, test_errors = (torch.cat([part[i] for part in parts]).cpu().double() for i in (0, 1))
        self.trained_ = Trained(train_errors, test_errors, stacked, why_not)
        return self._those_that_fit(y)

    # -- helpers ---------------------------------------------------------------------------------------------

    def _fresh(self, seed: int) -> list[nn.Module]:
        models = []
        for i in range(self.n_models):
            with seeded(seed, "network", i):
                models.append(self.make_model())
        if not isinstance(models[0], nn.Module):
            raise DataError(
                f"make_model returned a {type(models[0]).__name__}; it must return a torch module."
            )
        first, second = ([p.detach() for p in model.parameters()] for model in models[:2])
        if not first or all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            raise DataError(
                "make_model gave the same weights twice; it must draw new ones at every call, from torch's "
                "global generator."
            )
        return models

    def _train_stacks(
        self, models: list[nn.Module], data: tuple[Tensor, ...], seed: int
    ) -> list[tuple[Tensor, Tensor]]:
        assert isinstance(self.fit, Fit)
        parts = []
        for start in range(0, len(models), self.stack_size):
            stack = NetworkStack(models[start : start + self.stack_size])
            train_stack(stack, data[0], data[1], self.fit, derive(seed, "stack", start), self.progress)
            parts.append((stack.errors(data[0], data[1]), stack.errors(data[2], data[3])))
        return parts

    def _train_each(
        self, models: list[nn.Module], data: tuple[Tensor, ...], seed: int
    ) -> list[tuple[Tensor, Tensor]]:
        jobs = (
            joblib.delayed(_train_one)(model, data, self.fit, derive(seed, "fit", i))
            for i, model in enumerate(models)
        )
        return list(joblib.Parallel(n_jobs=self.n_jobs)(jobs))

    def _those_that_fit(self, y: Tensor) -> Trained:
        trained, allowed = self.trained_, self.fit_tol * target_variance(y)
        good = (trained.train_errors <= allowed) & trained.test_errors.isfinite()
        if int(good.sum()) < FEWEST_LOSSES:
            raise DataError(
                f"{int(good.sum())} of {self.n_models} networks fit the training data (training error at "
                f"most {allowed:.3g}, their best is {float(trained.train_errors.min()):.3g}); at least "
                f"{FEWEST_LOSSES} must: train longer, use a larger network, or raise fit_tol."
            )
        return Trained(
            trained.train_errors[good], trained.test_errors[good], trained.stacked, trained.why_not
        )


class NetworkStack(nn.Module):
    """Networks of one architecture, evaluated side by side.

    Args:
        models: of equal structure.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        parameters, buffers = stack_module_state(list(models))
        self.names = {name: name.replace(".", "/") for name in (*parameters, *buffers)}
        for name, value in parameters.items():
            trained = models[0].get_parameter(name).requires_grad
            self.register_parameter(self.names[name], nn.Parameter(value.detach(), requires_grad=trained))
        for name, value in buffers.items():
            self.register_buffer(self.names[name], value)
        # The structure only: a list hides it from `parameters`.
        self._skeleton = [copy.deepcopy(models[0]).to("meta")]
        self.n_models = len(models)

    def forward(self, x: Tensor, shared: bool = False) -> Tensor:
        """Outputs ``(models, batch, outputs)``.

        Args:
            x: ``(models, batch, ...)``, or with `shared` one ``(batch, ...)`` for all.
            shared: see x.
        """
        state = {name: getattr(self, attribute) for name, attribute in self.names.items()}
        skeleton = self._skeleton[0].train(self.training)

        def one(state: dict[str, Tensor], x: Tensor) -> Tensor:
            result: Tensor = functional_call(skeleton, state, (x,))
            return result

        outputs: Tensor = vmap(one, in_dims=(0, None if shared else 0), randomness="different")(state, x)
        return outputs

    @torch.no_grad()
    def errors(self, x: Tensor, y: Tensor) -> Float[Tensor, " models"]:
        """Mean squared error of each network over rows and outputs."""
        self.eval()
        total = sum(
            (self(a, shared=True) - b).double().square().sum((1, 2))
            for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True)
        )
        assert isinstance(total, Tensor)
        return total / y.numel()


def train_stack(
    stack: NetworkStack, X: Tensor, y: Float[Tensor, "train outputs"], fit: Fit, seed: int, progress: bool
) -> None:
    """Train all networks of a stack at once, each on its own order of the rows.

    The rows of the training are positions in an order; network i reads at position k the k-th row of a
    permutation of its own. The loss is the sum over the networks, so that the gradient of each is its own;
    Adam acts on each weight by itself.

    Args:
        stack: what is trained, in place.
        X: training inputs ``(train, ...)``.
        y: their targets.
        fit: how.
        seed: of the orders.
        progress: show a bar.
    """
    orders = torch.stack(
        [torch.randperm(len(X), generator=generator(seed, "order", i)) for i in range(stack.n_models)], 1
    )

    def loss(model: NetworkStack, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
        rows = batch[0].T  # (models, batch)
        return (model(X[rows]) - y[rows]).square().mean((1, 2)).sum()

    train(stack, loss, orders, seed=seed, progress=progress, description="networks", **_settings(fit))


def why_not_stacked(models: Sequence[nn.Module], X: Tensor, y: Tensor) -> str:
    """Why these modules cannot be trained as a stack, in words; empty if they can.

    Tried is one forward and backward pass on two rows.
    """
    if any(name.endswith("running_mean") for name, _ in models[0].named_buffers()):
        return "it keeps running statistics, which a stack does not update"
    try:
        stack = NetworkStack(models).train()
        outputs = stack(X, shared=True)
        (outputs - y).square().mean().backward()
    except Exception as error:  # whatever vmap cannot do with a user's module is a reason, not a failure
        return f"vmap does not take it ({' '.join(str(error).split())[:120]})"
    return ""


def target_variance(y: Tensor) -> float:
    """Variance of the targets about each output's mean, averaged over outputs: the error of a constant."""
    return float(y.double().var(0, unbiased=False).mean())


def _train_one(
    model: nn.Module, data: tuple[Tensor, ...], fit: Fit | FitFunction, seed: int
) -> tuple[Tensor, Tensor]:
    X, y, X_test, y_test = data
    if isinstance(fit, Fit):

        def loss(model: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
            return nn.functional.mse_loss(model(batch[0]), batch[1])

        train(model, loss, (X, y), seed=seed, progress=False, **_settings(fit))
    else:
        fit(model, X, y, seed)
    return _error(model, X, y), _error(model, X_test, y_test)


def _settings(fit: Fit) -> dict[str, Any]:
    optimizer: Literal["adam"] = "adam"
    return {
        "epochs": fit.epochs, "batch_size": fit.batch_size, "lr": fit.lr, "schedule": fit.schedule,
        "weight_decay": fit.weight_decay, "optimizer": optimizer,
    }  # fmt: skip


@torch.no_grad()
def _error(model: nn.Module, x: Tensor, y: Tensor) -> Float[Tensor, " 1"]:
    model.eval()
    total = sum(
        float((model(a) - b).double().square().sum())
        for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True)
    )
    return torch.tensor([total / y.numel()], dtype=torch.float64)


@torch.no_grad()
def _check_output(model: nn.Module, rows: Tensor, outputs: int) -> None:
    """One pass over two rows, so that a mistake shows before a training, and in words."""
    try:
        result = copy.deepcopy(model).eval()(rows)
    except Exception as error:
        raise DataError(
            f"the network does not take inputs of shape {tuple(rows.shape)}: {' '.join(str(error).split())}; "
            "give data of the shape that it is made for."
        ) from error
    if not isinstance(result, Tensor) or result.shape != (len(rows), outputs):
        found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise DataError(
            f"the network gave {found} for {len(rows)} rows; with {outputs} target column(s) it must give "
            f"({len(rows)}, {outputs})."
        )
