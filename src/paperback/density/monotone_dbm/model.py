"""The monotone deep Boltzmann machine as a density model: training, inference, bounds, samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperback.density.interface import Capabilities, Classifying, DensityModel, Interval
from paperback.density.monotone_dbm import architectures, likelihood
from paperback.density.monotone_dbm.hollow import Coupling, Engine, MonotoneHollow
from paperback.density.monotone_dbm.mean_field import (
    SOLVERS,
    MeanField,
    MeanFieldProblem,
    Solver,
    check_converged,
    solve,
)
from paperback.density.monotone_dbm.objectives import ContrastiveLoss, imputation_loss
from paperback.density.monotone_dbm.structure import Rows, Structure
from paperback.errors import DataError, NotSupportedError
from paperback.numerics.fixed_point import Solution
from paperback.numerics.spins import LogPartition
from paperback.training import train

Margin = Literal["tight", "paper", "none"]
TEST_TOL = 1e-5


class MonotoneDBM(DensityModel, Classifying):
    """Deep Boltzmann machine over categorical variables whose mean-field inference has exactly one solution.

    Args:
        tiers: the variables, each a `Tier` or its tuple ``(role, states, variables[, height, width])``.
        connections: the row blocks of A, each a `Rows` or its tuple ``(channels, kernels)``; one block of 200
            rows that sees every tier, if not given (tiers without geometry only).
        columns: which column of X each visible variable holds, visible tiers one after the other; in order,
            if not given.
        margin: "tight" bounds the eigenvalues of Phi by 2 - m, "paper" by 1 - m, "none" does not (not
            monotone: for comparison).
        m: strong monotonicity, 0 < m < 1.
        center: remove from A what only moves biases, see `MonotoneHollow`.
        engine: "dense", "conv" or "auto", see `MonotoneHollow`.
        lipschitz_max: bound on ||Ahat||^2, which makes solves cheap and costs accuracy; off by default.
        solver: how inference iterates, see `mean_field.solve`.
        alpha: step size in (0, 1] or "auto".
        tol: relative change at which a training solve ends; inference uses the smaller of this and 1e-5.
        max_steps: most iterations of a solve.
        backward: "cg" solves the implicit system by preconditioned conjugate gradients, "anderson" by
            accelerated iteration.
        objective: "imputation" (the paper's: complete and classify from a random part) or "pcd" (likelihood,
            persistent Gibbs chains).
        obs_level: probability with which a visible variable is observed in training.
        class_weight: weight w of the classification loss, (1 - w) of completion.
        loss: "ce" (cross-entropy) or "focal" (the paper's class-balanced focal loss) for completion.
        strict: raise an error instead of a warning where inference does not converge.
        seed: of the initial weights.

    Raises:
        DataError: if an argument is out of range or the structure does not fit.

    Source: Feng, Winston and Kolter, Monotone deep Boltzmann machines (TMLR 2023).
    """

    order: Tensor
    capabilities = Capabilities(
        log_prob="bound",
        marginal="bound",
        conditional="estimate",
        sample="estimate",
        sample_conditional="estimate",
        classify="estimate",
    )

    def __init__(
        self,
        tiers: Sequence[Sequence[int | str]],
        connections: Sequence[Sequence] | None = None,
        columns: Sequence[int] | None = None,
        margin: Margin = "tight",
        m: float = 0.05,
        center: bool = True,
        engine: Engine = "auto",
        lipschitz_max: float | None = None,
        solver: Solver = "auto",
        alpha: float | Literal["auto"] = "auto",
        tol: float = 1e-3,
        max_steps: int = 500,
        backward: Literal["cg", "anderson"] = "cg",
        objective: Literal["imputation", "pcd"] = "imputation",
        obs_level: float = 0.4,
        class_weight: float = 0.5,
        loss: Literal["ce", "focal"] = "ce",
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        if connections is None:
            connections = [Rows(200, (1,) * len(tiers))]
        structure = Structure(tiers, connections)
        visible = [structure.tiers[t] for t in structure.visible]
        count = sum(tier.n_variables for tier in visible)
        order = list(range(count)) if columns is None else [int(c) for c in columns]
        if sorted(order) != list(range(count)):
            raise DataError(f"columns must list each of the {count} visible variables once.")
        states = [0] * count
        for column, k in zip(
            order, [tier.states for tier in visible for _ in range(tier.n_variables)], strict=True
        ):
            states[column] = k
        super().__init__(count, states)
        _check_settings(margin, m, solver, alpha, tol, obs_level, class_weight, backward, objective, loss)
        limit = {"tight": 2.0 - m, "paper": 1.0 - m, "none": None}[margin]
        draws = torch.Generator().manual_seed(seed)
        self.structure = structure
        self.hollow = MonotoneHollow(structure, limit, center, engine, lipschitz_max, draws)
        if structure.class_tier is not None:
            self.n_classes = structure.tiers[structure.class_tier].states
        else:
            self.capabilities = replace(self.capabilities, classify="none")
        self.bias = nn.Parameter(self._initial_bias(draws))
        # Read-out temperatures, in the order of the tiers: answers are softmax(tau^2 logits), the mean field
        # stays softmax(logits).
        self.tau = nn.Parameter(torch.full((count,), 10.0**0.5))
        self.class_tau = nn.Parameter(torch.ones(()))
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.solver, self.alpha, self.tol, self.max_steps = solver, alpha, tol, max_steps
        self.backward_solver, self.objective, self.obs_level = backward, objective, obs_level
        self.class_weight, self.loss, self.strict = class_weight, loss, strict
        self._cached: tuple[tuple[int, ...], Coupling, float] | None = None

    def _initial_bias(self, draws: torch.Generator) -> Tensor:
        parts = []
        for tier in self.structure.tiers:
            scale = 0.5 if tier.role == "hidden" else 0.0
            parts.append(scale * torch.randn(tier.size, generator=draws))
        return torch.cat(parts)

    # -- making one -----------------------------------------------------------------------------------------

    @classmethod
    def dense(
        cls,
        n_visible: int,
        n_states: int | Sequence[int],
        hidden: tuple[int, int] | None = (60, 4),
        n_classes: int | None = 10,
        rows: int = 200,
        **settings: Any,
    ) -> Self:
        """A model without geometry: every variable is coupled with every other.

        Args:
            n_visible: number of data variables.
            n_states: states of all of them, or of each.
            hidden: (number, states) of the hidden variables, or None.
            n_classes: states of the class variable, or None.
            rows: rows of A.
            **settings: further arguments of the constructor.

        Returns:
            The model.
        """
        tiers, connections, columns = architectures.dense(n_visible, n_states, hidden, n_classes, rows)
        return cls(tiers, connections, columns, **settings)

    @classmethod
    def conv(
        cls,
        image_shape: Sequence[int],
        n_states: int,
        hidden: Sequence[tuple[int, int, int]] = ((4, 6, 2),),
        n_classes: int | None = 10,
        kernel: int = 3,
        **settings: Any,
    ) -> Self:
        """A model with convolutional tiers, each coupled with itself and all finer ones; the class sees the
        coarsest.

        Args:
            image_shape: (height, width), or (channels, height, width).
            n_states: states of a pixel.
            hidden: (states, variables at a location, stride from the image) of each hidden tier, finest
                first.
            n_classes: states of the class variable, or None.
            kernel: size of all kernels.
            **settings: further arguments of the constructor.

        Returns:
            The model.

        Raises:
            DataError: if a stride does not divide the image.
        """
        return cls(*architectures.conv(image_shape, n_states, hidden, n_classes, kernel), **settings)

    @classmethod
    def for_data(
        cls,
        n_states: Sequence[int],
        image_shape: Sequence[int] | None = None,
        n_classes: int | None = None,
        **settings: Any,
    ) -> Self:
        """A sensible model for a data set: dense for tables and small images, convolutional for images above
        256 pixels.

        Args:
            n_states: states of each variable.
            image_shape: (height, width) or (channels, height, width), where the variables are pixels.
            n_classes: number of classes, or None.
            **settings: further arguments of the constructor.

        Returns:
            The model.
        """
        if (
            image_shape is not None
            and len(n_states) > 256
            and image_shape[-1] % 2 == 0
            and image_shape[-2] % 2 == 0
        ):
            return cls.conv(image_shape, n_states[0], n_classes=n_classes, **settings)
        return cls.dense(len(n_states), n_states, (max(8, min(60, len(n_states))), 4), n_classes, **settings)

    # -- coupling and problems ------------------------------------------------------------------------------

    def _coupling(self) -> tuple[Coupling, float]:
        """Phi without a graph, and its smallest eigenvalue; kept until the weights change."""
        versions = tuple(weight._version for weight in self.hollow.parameters())
        device = (self.bias.device, self.bias.dtype)
        key = (*versions, id(self.hollow.weights), hash(device))
        if self._cached is None or self._cached[0] != key:
            if not all(bool(weight.isfinite().all()) for weight in self.parameters()):
                raise DataError(
                    "the weights contain NaN or infinity; train again with a smaller learning rate."
                )
            with torch.no_grad():
                coupling = self.hollow.coupling()
            self._cached = (key, coupling, self.hollow.smallest_eigenvalue(coupling, num_steps=40))
        return self._cached[1], self._cached[2]

    def _evidence(
        self, states: Tensor, observed: Tensor | None, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Flat one-hot values of what is known, and the flat mask, from checked states ``(batch,
        n_variables)``.
        """
        batch = len(states)
        visible = states[:, self.order]
        mask = torch.ones_like(visible, dtype=torch.bool) if observed is None else observed[:, self.order]
        values, known, start = [], [], 0
        for tier in self.structure.tiers:
            if tier.role == "visible":
                values.append(visible[:, start : start + tier.n_variables])
                known.append(mask[:, start : start + tier.n_variables])
                start += tier.n_variables
            else:
                given = tier.role == "class" and y is not None
                values.append(
                    y[:, None] if given and y is not None else visible.new_zeros(batch, tier.n_variables)
                )
                known.append(mask.new_full((batch, tier.n_variables), given))
        flat = self.structure.spread(known)
        return self.structure.one_hot(values).to(self.bias).masked_fill(~flat, 0.0), flat

    def problem_of(
        self, states: Tensor, observed: Tensor | None, y: Tensor | None = None
    ) -> MeanFieldProblem:
        """The mean-field problems of checked states ``(batch, n_variables)``, at the current weights."""
        known, flat = self._evidence(states, observed, y)
        return self.problem(*self._coupling(), known, flat)

    def problem(self, coupling: Coupling, smallest: float, known: Tensor, flat: Tensor) -> MeanFieldProblem:
        """The mean-field problems of a batch, from flat one-hot values of what is known and the flat mask."""
        monotone = self.hollow.limit is not None
        return MeanFieldProblem(self.structure, coupling, self.bias.detach(), known, flat, smallest, monotone)

    def _visible(self, flat: Tensor) -> Tensor:
        """The data variables of a flat vector in the columns of X: ``(batch, n_variables, max_states)``,
        padded with zeros.
        """
        parts = self.structure.split(flat)
        padded = [
            F.pad(
                parts[t].movedim(2, -1).flatten(1, 2), (0, self.max_states - self.structure.tiers[t].states)
            )
            for t in self.structure.visible
        ]
        return torch.cat(padded, 1)[:, self.order.argsort()]

    # -- inference ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def infer(
        self,
        X: Int[Tensor, "batch ..."],
        observed: Bool[Tensor, "batch ..."] | None = None,
        y: Int[Tensor, " batch"] | None = None,
        *,
        solver: Solver | None = None,
        tol: float | None = None,
        max_steps: int | None = None,
        start: Float[Tensor, "batch N"] | None = None,
        calibrated: bool = False,
    ) -> MeanField:
        """Mean-field marginals of everything that was not observed.

        Args:
            X: states ``(batch, *event)``; unobserved entries are ignored.
            observed: mask of the known entries; all, if not given.
            y: known class labels; inferred, if not given.
            solver: instead of the model's.
            tol: relative change at which a sample is done; the smaller of the model's and 1e-5, if not given.
            max_steps: most iterations; the model's, if not given.
            start: marginals ``(batch, N)`` to start from, such as the `q` of an earlier answer.
            calibrated: read out softmax(tau^2 logits) instead of the mean field of the energy,
                softmax(logits).

        Returns:
            Marginals with their convergence. A solve that did not converge warns, or raises if the model is
            strict.

        Raises:
            DataError: if the input does not fit the model, or (strict) inference does not converge.
        """
        states, mask = self.check(X, observed)
        if y is not None:
            y = self._check_labels(y, len(states))
        problem = self.problem_of(states, mask, y)
        tolerance = min(self.tol, TEST_TOL) if tol is None else tol
        solution = solve(
            problem,
            solver or self.solver,
            alpha=self.alpha,
            tol=tolerance,
            max_steps=max_steps or self.max_steps,
            start=start,
        )
        residual = problem.residual(solution.x)
        check_converged(solution, residual, tolerance, self.strict)
        return self._answer(problem, solution, residual, calibrated)

    def _answer(
        self, problem: MeanFieldProblem, solution: Solution, residual: Tensor, calibrated: bool
    ) -> MeanField:
        q = solution.x
        logits = problem.logits(q)
        read = problem.clamp(self.structure.softmax(self._temper(logits))) if calibrated else q
        index = self.structure.class_tier
        return MeanField(
            q=q,
            logits=logits,
            visible=self._visible(read),
            class_probabilities=None if index is None else read[:, self.structure.slices[index]],
            steps=solution.steps,
            residual=residual,
            converged=solution.converged,
            free_energy=problem.free_energy(q),
            history=solution.history,
        )

    def _temper(self, logits: Tensor) -> Tensor:
        """The read-out logits tau^2, with one temperature per data variable and one for the class."""
        parts, start = [], 0
        for tier, part in zip(self.structure.tiers, self.structure.split(logits), strict=True):
            if tier.role == "visible":
                own = self.tau[start : start + tier.n_variables].unflatten(
                    0, (tier.groups, 1, tier.positions)
                )
                part = part * own**2
                start += tier.n_variables
            elif tier.role == "class":
                part = part * self.class_tau**2
            parts.append(part.flatten(1))
        return torch.cat(parts, 1)

    def _conditional(self, states: Tensor, observed: Tensor) -> Tensor:
        return self.infer(states, observed, calibrated=True).visible

    def predict_proba(
        self, X: Int[Tensor, "batch ..."], observed: Bool[Tensor, "batch ..."] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Class probabilities given the observed part, read out with the trained temperature (see
        `Classifying`).
        """
        if self.n_classes is None:
            raise NotSupportedError("this model has no class tier; build it with n_classes.")
        probabilities = self.infer(X, observed, calibrated=True).class_probabilities
        assert probabilities is not None
        return probabilities

    @torch.no_grad()
    def free_energy(
        self, X: Int[Tensor, "batch ..."], observed: Bool[Tensor, "batch ..."] | None = None
    ) -> Float[Tensor, " batch"]:
        """F at the mean-field solution given the observed part: an upper bound on minus the log of its
        unnormalised probability.
        """
        return self.infer(X, observed).free_energy

    # -- likelihood and samples -----------------------------------------------------------------------------

    def log_partition_bounds(self) -> Interval:
        """Bounds on log Z, in nats, both scalars; the lower one is the global mean-field optimum."""
        nothing = torch.zeros(1, self.n_variables, dtype=torch.int64, device=self.valid.device)
        bounds = self._partition_bounds(nothing, torch.zeros_like(nothing, dtype=torch.bool))
        return Interval(bounds.lower[0], bounds.upper[0])

    def _partition_bounds(self, states: Tensor, observed: Tensor | None) -> Interval:
        """Bounds on the log of the summed weights of all configurations that agree with the observed part."""
        problem = self.problem_of(states, observed)
        with torch.no_grad():
            q = solve(problem, self.solver, alpha=self.alpha, tol=TEST_TOL, max_steps=self.max_steps).x
            lower = -problem.free_energy(q)
        return Interval(lower, torch.maximum(likelihood.upper_bound(problem, q), lower))

    def _log_prob(self, states: Tensor, observed: Tensor | None) -> Interval:
        part, whole = self._partition_bounds(states, observed), self.log_partition_bounds()
        return Interval(part.lower - whole.upper, part.upper - whole.lower)

    def estimate_log_partition(
        self, n_chains: int = 64, n_betas: int = 200, generator: torch.Generator | None = None
    ) -> LogPartition:
        """Annealed importance sampling of log Z.

        Args:
            n_chains: independent chains, >= 1.
            n_betas: temperatures from the independent model to this one, >= 2.
            generator: source of randomness; a fresh one with seed 0 if not given.

        Returns:
            The estimate in nats with its standard error.
        """
        source = generator if generator is not None else torch.Generator(self.valid.device).manual_seed(0)
        with torch.no_grad():
            return likelihood.estimate_log_partition(self.free_problem(n_chains), n_betas, source)

    def free_problem(self, batch: int = 1) -> MeanFieldProblem:
        """So many mean-field problems with nothing observed."""
        nothing = torch.zeros(batch, self.n_variables, dtype=torch.int64, device=self.valid.device)
        return self.problem_of(nothing, torch.zeros_like(nothing, dtype=torch.bool))

    @torch.no_grad()
    def _sample_conditional(
        self, states: Tensor, observed: Tensor, generator: torch.Generator, n_sweeps: int = 100
    ) -> Tensor:
        problem = self.problem_of(states, observed)
        q = solve(problem, self.solver, alpha=self.alpha, tol=self.tol, max_steps=self.max_steps).x
        return self._visible(likelihood.gibbs(problem, q, n_sweeps, generator)).argmax(-1)

    # -- training -------------------------------------------------------------------------------------------

    def fit(
        self,
        X: Int[Tensor, "batch ..."],
        y: Int[Tensor, " batch"] | None = None,
        X_val: Int[Tensor, "batch_val ..."] | None = None,
        y_val: Int[Tensor, " batch_val"] | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
        epochs: int = 32,
        batch_size: int = 96,
        lr: float = 1e-2,
        **training: Any,
    ) -> Self:
        """Train the model (see `DensityModel.fit`).

        Args:
            X: states ``(batch, *event)``.
            y: class labels ``(batch,)``; the class tier, if there is one, is trained only with them.
            X_val: held-out states; the loss on them is recorded each epoch, and decides with ``patience``.
            y_val: their labels.
            seed: of the order of the rows and of the training masks.
            progress: show a progress bar.
            epochs: passes over the data.
            batch_size: rows in a step.
            lr: learning rate of Adam at the start; it falls to 0 along a cosine.
            **training: further settings of `paperback.training.train`, such as ``patience`` or
                ``checkpoint``.

        Returns:
            The model itself.

        Raises:
            DataError: if X or y cannot be used, or y is given without a class tier.
        """
        rows = self._training_rows(X, y)
        held_out = None if X_val is None else self._training_rows(X_val, y_val)
        self._initialise_visible_bias(rows[0])
        objective = imputation_loss if self.objective == "imputation" else ContrastiveLoss()
        train(
            self,
            objective,
            rows,
            val_tensors=held_out,
            epochs=epochs,
            batch_size=min(batch_size, len(rows[0])),
            lr=lr,
            schedule="cosine",
            drop_last=True,
            seed=seed,
            progress=progress,
            description="MonotoneDBM",
            **training,
        )
        return self

    def _check_labels(self, y: Tensor, batch: int) -> Tensor:
        if self.n_classes is None:
            raise DataError("y is given, but the model has no class tier; build it with n_classes.")
        if (
            y.dtype.is_floating_point
            or y.shape != (batch,)
            or (batch and not 0 <= int(y.min()) <= int(y.max()) < self.n_classes)
        ):
            raise DataError(
                f"y must be ({batch},) integers in 0..{self.n_classes - 1}; "
                f"it has dtype {y.dtype} and shape {tuple(y.shape)}."
            )
        return y.to(self.valid.device, torch.int64)

    def _training_rows(self, X: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        states, _ = self.check(X)
        if not len(states):
            raise DataError("X has no rows.")
        return (states,) if y is None else (states, self._check_labels(y, len(states)))

    @torch.no_grad()
    def _initialise_visible_bias(self, states: Tensor) -> None:
        """b = log of the data's marginals / tau^2: without couplings the read-out is the marginals."""
        known, _ = self._evidence(states, None)
        marginals = (known.sum(0) + 1.0) / (len(states) + self.max_states)
        visible = torch.cat(
            [torch.full((tier.size,), tier.role == "visible") for tier in self.structure.tiers]
        )
        read_out = self._temper(torch.ones(1, self.structure.size).to(self.bias))[0]
        self.bias.copy_(torch.where(visible.to(self.bias.device), marginals.log() / read_out, self.bias))


def _check_settings(
    margin: str,
    m: float,
    solver: str,
    alpha: float | str,
    tol: float,
    obs_level: float,
    class_weight: float,
    backward: str,
    objective: str,
    loss: str,
) -> None:
    choices = {
        "margin": (margin, ("tight", "paper", "none")),
        "solver": (solver, SOLVERS),
        "backward": (backward, ("cg", "anderson")),
        "objective": (objective, ("imputation", "pcd")),
        "loss": (loss, ("ce", "focal")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise DataError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")
    if not 0.0 < m < 1.0:
        raise DataError(f"m is {m}; strong monotonicity needs 0 < m < 1.")
    if alpha != "auto" and not (isinstance(alpha, float | int) and 0.0 < alpha <= 1.0):
        raise DataError(f'alpha is {alpha!r}; it must lie in (0, 1] or be "auto".')
    if not tol > 0.0:
        raise DataError(f"tol is {tol}; it must be positive.")
    for name, level in {"obs_level": obs_level, "class_weight": class_weight}.items():
        if not 0.0 <= level <= 1.0:
            raise DataError(f"{name} is {level}; it must lie in 0..1.")
