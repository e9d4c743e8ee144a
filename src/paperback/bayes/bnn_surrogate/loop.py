"""The loop of Bayesian optimisation: fit a surrogate, maximise an acquisition function, evaluate, repeat.

Inputs live in [0, 1]^d inside. The first points are Sobol's. Then each `ask` fits the surrogate to all that
was told and maximises a Monte-Carlo acquisition function over q points together: log expected improvement for
one output, log expected hypervolume improvement for several. Discrete coordinates are optimised as if they
were continuous; each candidate is then rounded and the acquisition evaluated again at the rounded points,
which chooses between candidates. All values are maximised.

Everything random is a function of the seed and the number of asks, so that a history taken up again goes on
as the undisturbed one.

Sources: Li, Rudner and Wilson (2024), section 3; Balandat et al., BoTorch (2020); Ament et al., Unexpected
improvements to expected improvement (2023); Daulton et al., Differentiable expected hypervolume improvement
(2020).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from botorch.acquisition import AcquisitionFunction, qExpectedImprovement, qLogExpectedImprovement
from botorch.acquisition.multi_objective import (
    qExpectedHypervolumeImprovement,
    qLogExpectedHypervolumeImprovement,
)
from botorch.exceptions.warnings import BadInitialCandidatesWarning, OptimizationWarning
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from botorch.utils.multi_objective.box_decompositions import FastNondominatedPartitioning
from botorch.utils.sampling import draw_sobol_samples
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone
from torch import Tensor

from paperback.bayes.bnn_surrogate.box import check_bounds, check_inside
from paperback.bayes.bnn_surrogate.history import History
from paperback.bayes.bnn_surrogate.make import make_surrogate
from paperback.bayes.interface import BayesianRegressor
from paperback.errors import DataError
from paperback.training import derive, seeded

Acquisition = Literal["qlogei", "qei", "qlogehvi", "qehvi", "sobol", "random"]
OnFailure = Literal["raise", "drop", "penalise"]
Objective = Callable[[NDArray[np.float64]], ArrayLike]

SEVERAL = ("qlogehvi", "qehvi")  # for several outputs; the last two of Acquisition are for any
MODEL_FREE = ("sobol", "random")


class BayesianOptimizer:
    """Proposes points by `ask` and learns of their values by `tell`; values are maximised.

    Points may be asked for before earlier ones are told: those count as pending and are not proposed again.

    Args:
        bounds: ``(2, features)``, lower ends first.
        surrogate: a name for `make_surrogate` or an unfitted regressor of this wing; it is cloned.
        acquisition: "qlogei" or "qei" for one output, "qlogehvi" or "qehvi" for several; "sobol" and "random"
            propose without a model, after the same first points.
        n_init: Sobol points before the first model, >= 1.
        ref_point: for several outputs, ``(outputs,)``: what every useful point is better than.
        discrete: feature to the values that it may take, in the units of the bounds.
        mc_samples: draws of the posterior in an acquisition function, >= 2.
        restarts: of L-BFGS.
        raw_samples: points among which the restarts are chosen.
        acquisition_steps: of L-BFGS at most. The reference has 2 restarts, 16 raw samples and 10 steps; on
            Hartmann-6 a GP then ends at 1.6 instead of 2.6, hardly above random search.
        choose_every: a network surrogate whose variances are not given chooses them anew at each so-many-th
            ask, and keeps them in between.
        on_failure: what becomes of a value that is not finite: "raise"; "drop" it from the fit; "penalise" it
            with the worst value seen of that output.
        seed: of everything random.
        history: to go on from; it is changed.

    Attributes:
        history: what was asked and told.
        surrogate_: fitted at the last ask; None before.

    Raises:
        DataError: if an argument is out of range.
    """

    def __init__(
        self,
        bounds: ArrayLike,
        surrogate: str | BayesianRegressor = "ibnn",
        *,
        acquisition: Acquisition = "qlogei",
        n_init: int = 10,
        ref_point: ArrayLike | None = None,
        discrete: Mapping[int, Sequence[float]] | None = None,
        mc_samples: int = 128,
        restarts: int = 4,
        raw_samples: int = 64,
        acquisition_steps: int = 50,
        choose_every: int = 3,
        on_failure: OnFailure = "raise",
        seed: int = 0,
        history: History | None = None,
    ) -> None:
        self._low, self._high = check_bounds(bounds)
        _check_settings(acquisition, ref_point, on_failure)
        _check_least(1, n_init=n_init, restarts=restarts, acquisition_steps=acquisition_steps)
        _check_least(1, choose_every=choose_every)
        _check_least(2, mc_samples=mc_samples)
        _check_least(restarts, raw_samples=raw_samples)
        self._grid = _unit_grid(discrete or {}, self._low, self._high)
        self._surrogate = make_surrogate(surrogate) if isinstance(surrogate, str) else surrogate
        self._acquisition, self._on_failure = acquisition, on_failure
        self._ref_point = (
            None if ref_point is None else np.atleast_1d(np.asarray(ref_point, dtype=np.float64))
        )
        self._n_init, self._mc_samples, self._choose_every = n_init, mc_samples, choose_every
        self._restarts, self._raw_samples, self._steps = restarts, raw_samples, acquisition_steps
        self._seed = seed
        self.history = History.empty(len(self._low)) if history is None else history
        if self.history.X.shape[1] != len(self._low):
            raise DataError(
                f"the history has {self.history.X.shape[1]} features and the bounds {len(self._low)}; "
                "give those of one problem."
            )
        self.surrogate_: BayesianRegressor | None = None

    def ask(self, q: int = 1) -> NDArray[np.float64]:
        """The next points to evaluate.

        Args:
            q: how many, >= 1. The first ask may give up to `n_init` Sobol points; an ask is answered by Sobol
                points as long as fewer than that were asked for.

        Returns:
            ``(q, features)``, in the units of the bounds.

        Raises:
            DataError: if q < 1, or all that was told has failed.
        """
        _check_least(1, q=q)
        start = time.perf_counter()
        history = self.history
        before = len(history) + len(history.pending)
        if before < self._n_init or self._acquisition in MODEL_FREE:
            unit = self._without_model(before, q)
        elif len(history) == 0:
            raise DataError(
                f"{before} points are asked for and none is told; tell their values before asking."
            )
        else:
            unit = self._with_model(q)
        X = self._low + unit * (self._high - self._low)
        history.pending = np.concatenate([history.pending, X])
        history.asked += 1
        history.seconds.append(time.perf_counter() - start)
        return X

    def tell(self, X: ArrayLike, y: ArrayLike) -> None:
        """Learn values of points, asked for or not.

        Args:
            X: ``(n, features)``.
            y: ``(n,)`` or ``(n, outputs)``, to be maximised.

        Raises:
            DataError: if a point lies outside the bounds, shapes do not fit, the acquisition function is for
                another number of outputs, or a value is not finite and `on_failure` is "raise".
        """
        points = np.atleast_2d(np.asarray(X, dtype=np.float64))
        values = np.asarray(y, dtype=np.float64)
        values = values.reshape(len(points), -1) if values.size % max(1, len(points)) == 0 else values
        if points.shape[1] != len(self._low) or len(values) != len(points) or values.size == 0:
            raise DataError(
                f"X has shape {points.shape} and y {np.shape(y)}; give (n, {len(self._low)}) and a value for "
                "each row."
            )
        check_inside(points, self._low, self._high)
        self._check_outputs(values)
        failed = ~np.isfinite(values).all(1)
        if failed.any() and self._on_failure == "raise":
            row = int(failed.argmax())
            raise DataError(
                f"the value of row {row} is {values[row].tolist()}; a crashed evaluation can be dropped or "
                'penalised: on_failure="drop" or "penalise".'
            )
        values[failed] = np.nan
        history = self.history
        history.X = np.concatenate([history.X, points])
        history.Y = np.concatenate([history.Y.reshape(-1, values.shape[1]), values])
        told = (np.abs(history.pending[:, None] - points) <= 1e-9 * (self._high - self._low)).all(2).any(1)
        history.pending = history.pending[~told]

    # -- proposals -------------------------------------------------------------------------------------------

    def _without_model(self, before: int, q: int) -> NDArray[np.float64]:
        features = len(self._low)
        if self._acquisition == "random" and before >= self._n_init:
            unit = np.random.default_rng([self._seed, before]).random((q, features))
        else:  # one Sobol sequence for all asks
            box = torch.tensor([[0.0] * features, [1.0] * features], dtype=torch.float64)
            unit = draw_sobol_samples(box, before + q, 1, seed=derive(self._seed, "sobol"))[
                before:, 0
            ].numpy()
        return self._rounded(torch.as_tensor(unit)).numpy()

    def _with_model(self, q: int) -> NDArray[np.float64]:
        X, Y = self._usable()
        model = self._fitted(X, Y)
        seed = derive(self._seed, "ask", self.history.asked)
        box = torch.tensor([[0.0] * X.shape[1], [1.0] * X.shape[1]], dtype=torch.float64)
        acquire = self._acquire(model.to_botorch(), Y, seed)
        with seeded(seed), warnings.catch_warnings():
            # Steps are limited on purpose, and where no draw improves anything any start will do.
            for category in (RuntimeWarning, OptimizationWarning, BadInitialCandidatesWarning):
                warnings.simplefilter("ignore", category)
            candidates, values = optimize_acqf(
                acquire,
                bounds=box,
                q=q,
                num_restarts=self._restarts,
                raw_samples=self._raw_samples,
                options={"maxiter": self._steps, "batch_limit": self._restarts, "seed": seed},
                return_best_only=False,
                retry_on_optimization_warning=False,
            )
        rounded = self._rounded(candidates)
        if self._grid:
            with torch.no_grad():
                values = acquire(rounded)
        return rounded[int(torch.as_tensor(values).argmax())].numpy()

    def _fitted(self, X: NDArray[np.float64], Y: NDArray[np.float64]) -> BayesianRegressor:
        """The surrogate fitted to points of the unit cube."""
        model = clone(self._surrogate)
        parameters = model.get_params(deep=False)
        own: dict[str, Any] = {"random_state": derive(self._seed, "surrogate", self.history.asked)}
        if "bounds" in parameters:
            own["bounds"] = [[0.0] * X.shape[1], [1.0] * X.shape[1]]
        if (self.history.asked - 1) % self._choose_every:
            own |= self.history.variances
        model.set_params(**{key: value for key, value in own.items() if key in parameters})
        model.fit(X, Y[:, 0] if Y.shape[1] == 1 else Y)
        names = ("prior_variance", "noise_variance")
        self.history.variances = {n: float(getattr(model, f"{n}_")) for n in names if hasattr(model, f"{n}_")}
        self.surrogate_ = model
        return model

    def _usable(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Points of the unit cube with finite values, failures dropped or penalised."""
        X = (self.history.X - self._low) / (self._high - self._low)
        Y = self.history.Y
        failed = np.asarray(np.isnan(Y).any(axis=1))
        if failed.all():
            raise DataError("all evaluations have failed; tell the optimizer a finite value first.")
        if self._on_failure == "penalise":
            return X, np.where(failed[:, None], np.nanmin(Y, 0), Y)
        return X[~failed], Y[~failed]

    def _acquire(self, model: Any, Y: NDArray[np.float64], seed: int) -> AcquisitionFunction:
        sampler = SobolQMCNormalSampler(torch.Size([self._mc_samples]), seed=seed)
        pending = (self.history.pending - self._low) / (self._high - self._low)
        common: dict[str, Any] = {
            "model": model,
            "sampler": sampler,
            "X_pending": torch.as_tensor(pending) if len(pending) else None,
        }
        values = torch.as_tensor(Y)
        if self._acquisition not in SEVERAL:
            single = qLogExpectedImprovement if self._acquisition == "qlogei" else qExpectedImprovement
            return single(best_f=values.max(), **common)
        reference = torch.as_tensor(self._ref_point)
        common["partitioning"] = FastNondominatedPartitioning(reference, Y=values)
        if self._acquisition == "qlogehvi":
            return qLogExpectedHypervolumeImprovement(ref_point=reference, **common)
        return qExpectedHypervolumeImprovement(ref_point=reference, **common)

    def _rounded(self, unit: Tensor) -> Tensor:
        """Discrete coordinates at the nearest value that they may take."""
        unit = unit.clone()
        for feature, values in self._grid.items():
            nearest = (unit[..., feature, None] - values).abs().argmin(-1)
            unit[..., feature] = values[nearest]
        return unit

    def _check_outputs(self, values: NDArray[np.float64]) -> None:
        outputs = values.shape[1]
        known = self.history.Y.shape[1] if len(self.history) else outputs
        if outputs != known:
            raise DataError(f"y has {outputs} outputs and what was told before has {known}; give as many.")
        if self._acquisition in SEVERAL:
            assert self._ref_point is not None
            if len(self._ref_point) != outputs or outputs < 2:
                raise DataError(
                    f"y has {outputs} outputs and ref_point {len(self._ref_point)}; {self._acquisition} "
                    "needs two or more of each, qlogei is for one."
                )
        elif outputs != 1 and self._acquisition not in MODEL_FREE:
            raise DataError(
                f"y has {outputs} outputs and {self._acquisition} is for one; take qlogehvi with a ref_point."
            )


def bayes_opt(
    f: Objective,
    bounds: ArrayLike,
    surrogate: str | BayesianRegressor = "ibnn",
    *,
    n_init: int = 10,
    iters: int = 6,
    q: int = 5,
    acquisition: Acquisition = "qlogei",
    discrete: Mapping[int, Sequence[float]] | None = None,
    seed: int = 0,
    path: str | Path | None = None,
    **settings: Any,
) -> History:
    """Maximise a function.

    Args:
        f: from points ``(n, features)`` to values ``(n,)`` or ``(n, outputs)``.
        bounds: ``(2, features)``, lower ends first.
        surrogate: a name for `make_surrogate` or an unfitted regressor.
        n_init: Sobol points first.
        iters: rounds after them.
        q: points of a round.
        acquisition: as for `BayesianOptimizer`.
        discrete: feature to the values that it may take.
        seed: of everything random.
        path: where the history is written after each round; if it is there already, the optimisation goes on
            from it.
        **settings: of `BayesianOptimizer`.

    Returns:
        The history.

    Raises:
        DataError: if an argument is out of range.
    """
    _check_least(0, iters=iters)
    _check_least(1, q=q)
    history = History.load(path) if path is not None and Path(path).exists() else None
    optimizer = BayesianOptimizer(
        bounds,
        surrogate,
        acquisition=acquisition,
        n_init=n_init,
        discrete=discrete,
        seed=seed,
        history=history,
        **settings,
    )
    history = optimizer.history
    if len(history.pending):  # asked for before an interruption
        optimizer.tell(history.pending.copy(), f(history.pending.copy()))
    while history.asked < iters + 1:
        X = optimizer.ask(q if history.asked else n_init)
        optimizer.tell(X, f(X))
        if path is not None:
            history.save(path)
    return history


def _check_settings(acquisition: str, ref_point: ArrayLike | None, on_failure: str) -> None:
    if acquisition not in get_args(Acquisition):
        raise DataError(f"acquisition is {acquisition!r}; it is one of {', '.join(get_args(Acquisition))}.")
    if on_failure not in get_args(OnFailure):
        raise DataError(f"on_failure is {on_failure!r}; it is one of {', '.join(get_args(OnFailure))}.")
    if acquisition in SEVERAL and ref_point is None:
        raise DataError(
            f"{acquisition} needs a ref_point: a value of each output that useful points are better than."
        )


def _check_least(least: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if value < least:
            raise DataError(f"{name} is {value}; it must be at least {least}.")


def _unit_grid(
    discrete: Mapping[int, Sequence[float]], low: NDArray[np.float64], high: NDArray[np.float64]
) -> dict[int, Tensor]:
    grid = {}
    for feature, values in discrete.items():
        if not 0 <= feature < len(low):
            raise DataError(f"discrete names feature {feature}; there are features 0 to {len(low) - 1}.")
        array = np.asarray(values, dtype=np.float64)
        if array.size == 0 or ((array < low[feature]) | (array > high[feature])).any():
            raise DataError(
                f"the values of discrete feature {feature} are {array.tolist()}; give some, all within its "
                "bounds."
            )
        grid[feature] = torch.as_tensor((array - low[feature]) / (high[feature] - low[feature]))
    return grid
