"""The marginalization model as a density model: queries, samples, training from data or an energy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperback.density.interface import Capabilities, DensityModel, How
from paperback.density.marginalization.energies import LogWeight
from paperback.density.marginalization.fitting import check_energy_settings, fit_to_data, fit_to_energy
from paperback.density.marginalization.networks import (
    Heads,
    MarginalizationNetwork,
    to_symbols,
    uniform_log_table,
)
from paperback.density.marginalization.objectives import (
    REFILL_CALLS,
    Chain,
    EnergyLoss,
    Estimator,
    Objective,
    one_step_residuals,
)
from paperback.density.marginalization.orders import (
    Order,
    arrival_times,
    chunk_rows,
    complete_by_marginals,
    complete_in_order,
    conditional_probabilities,
    fixed_orders,
    mixture_log_prob,
)
from paperback.density.marginalization.partition import ORDER_SEED, PartitionEstimator, estimate_log_partition
from paperback.errors import DataError, NotSupportedError
from paperback.numerics.spins import LogPartition
from paperback.training import seeded

By = Literal["conditionals", "marginals"]
BYS: tuple[By, ...] = get_args(By)

INCONSISTENT = 0.5  # nats^2: above this the marginals are not to be trusted, and a warning says so


class InconsistentMarginals(UserWarning):
    """The two heads of a model disagree, so that its marginals are not those of one distribution."""


class MarginalizationModel(DensityModel):
    """Any marginal p(x_S) of discrete variables in one network call, tied to any-order conditionals.

    Args:
        n_variables: number of variables D, >= 1.
        n_states: states of every variable (>= 2), or one number per variable.
        trunk: "mlp", "transformer", or a module from symbols ``(batch, D)`` (0 not known, k + 1 state k) to
            features ``(batch, width)`` or ``(batch, D, width)``; a model with a module of yours cannot be
            saved.
        hidden: width of the trunks.
        n_blocks: their residual layers.
        heads: "dual" gives each head a trunk of its own, "single" one to both.
        gibbs_steps: variables that a step of the persistent chain draws again, 1 .. D; 4, or D if that is
            fewer, if not given.
        q_mix: share of data (or of rows from anywhere) against the model's own samples where self-consistency
            is trained, in [0, 1].
        seed: of the initial weights.

    Attributes:
        consistency: mean squared one-step residual after training, nats^2; NaN before. The marginals are as
            good as this number.

    Raises:
        DataError: if an argument is out of range.

    Source: Liu, Ramadge, Adams, Generative Marginalization Models (ICML 2024).
    """

    capabilities = Capabilities(
        log_prob="estimate",
        marginal="estimate",
        conditional="estimate",
        sample="estimate",
        sample_conditional="estimate",
        classify="none",
    )
    log_z: Tensor
    consistency: Tensor

    def __init__(
        self,
        n_variables: int,
        n_states: int | Sequence[int],
        trunk: str | nn.Module = "mlp",
        hidden: int = 256,
        n_blocks: int = 3,
        heads: Heads = "dual",
        gibbs_steps: int | None = None,
        q_mix: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(n_variables, n_states)
        self.gibbs_steps = min(4, n_variables) if gibbs_steps is None else gibbs_steps
        if not 1 <= self.gibbs_steps <= n_variables:
            raise DataError(
                f"gibbs_steps is {gibbs_steps}; it must lie in 1..{n_variables}, the number of variables."
            )
        if not 0.0 <= q_mix <= 1.0:
            raise DataError(f"q_mix is {q_mix}; it must lie in 0..1.")
        self.q_mix = q_mix
        with seeded(seed, "weights"):
            self.network = MarginalizationNetwork(self.valid, trunk, hidden, n_blocks, heads)
        self.network.start_from(uniform_log_table(self.n_states, self.max_states), 0.0)
        self.log_z = nn.Parameter(torch.zeros(()), requires_grad=False)  # the constant m("?") is trained to
        self.register_buffer("consistency", torch.tensor(math.nan))
        self._energy: LogWeight | None = None
        self.eval()

    # -- queries --------------------------------------------------------------------------------------------

    def log_prob(
        self,
        X: Int[Tensor, " batch *event"],
        observed: Bool[Tensor, " batch *event"] | None = None,
        *,
        exact: bool = False,
        n_orders: int = 5,
    ) -> Float[Tensor, " batch"]:
        """Log-probability of each row, or of its observed part, in nats.

        Args:
            X: states ``(batch, *event)``.
            observed: mask of the known entries; the others are summed out.
            exact: False takes the marginal head, one network call; it is as right as `consistency` says. True
                takes the conditionals along `n_orders` orders, the same for all rows, and their mean
                probability: D calls, and for complete rows a distribution that sums to one.
            n_orders: how many orders.

        Returns:
            ``(batch,)``.

        Raises:
            DataError: if X, the mask or n_orders cannot be used.
        """
        states, mask = self.check(X, observed)
        known = torch.ones_like(states, dtype=torch.bool) if mask is None else mask
        if not exact:
            return self._log_prob(states, known)
        ranks = fixed_orders(n_orders, self.n_variables, ORDER_SEED)
        return mixture_log_prob(self.network, states, known, ranks, self._chunk)

    @torch.no_grad()
    def _log_prob(self, states: Tensor, observed: Tensor | None) -> Tensor:
        self._warn()
        known = torch.ones_like(states, dtype=torch.bool) if observed is None else observed
        return self._log_marginals(to_symbols(states, known))

    @torch.no_grad()
    def _log_marginals(self, symbols: Int[Tensor, "batch variables"]) -> Float[Tensor, " batch"]:
        """m(x_S) - m("?"), the two in one network call."""
        nothing = symbols.new_zeros(1, self.n_variables)
        parts = [self.network.log_marginal(torch.cat([nothing, part])) for part in symbols.split(self._chunk)]
        return torch.cat([part[1:] - part[:1] for part in parts])

    def evidence(
        self, X: Int[Tensor, " batch *event"], subsets: Bool[Tensor, " subsets *event"]
    ) -> Float[Tensor, "batch subsets"]:
        """Log marginals of many subsets of the variables of each row, by the marginal head.

        Args:
            X: states ``(batch, *event)``; every entry that some subset holds must be a state.
            subsets: masks ``(subsets, *event)``, True where a variable belongs to the subset.

        Returns:
            Log-probabilities ``(batch, subsets)`` in nats.

        Raises:
            DataError: if X or the subsets do not fit the model.
        """
        if subsets.dtype != torch.bool or subsets.shape[1:] != X.shape[1:]:
            raise DataError(
                f"subsets have shape {tuple(subsets.shape)} and dtype {subsets.dtype}; expected booleans "
                f"(subsets, {', '.join(map(str, X.shape[1:]))}), one mask of a row of X for each."
            )
        states, _ = self.check(X, subsets.any(0).expand(X.shape))
        masks = subsets.reshape(len(subsets), self.n_variables).to(states.device)
        symbols = to_symbols(states[:, None], masks[None]).flatten(0, 1)
        self._warn()
        return self._log_marginals(symbols).unflatten(0, (len(states), len(masks)))

    def _conditional(self, states: Tensor, observed: Tensor) -> Tensor:
        return conditional_probabilities(self.network, states, observed, self._chunk)

    @torch.no_grad()
    def consistency_error(
        self, X: Int[Tensor, " batch *event"], *, n_repeats: int = 4, generator: torch.Generator | None = None
    ) -> float:
        """Mean squared one-step residual of self-consistency along random orders of some rows, in nats^2.

        Args:
            X: complete states ``(batch, *event)``, such as held-out data or samples.
            n_repeats: random steps for each row, >= 1.
            generator: source of randomness; a fresh one with seed 0 if not given.

        Returns:
            The number; 0 means that the marginals are those of the conditionals, in every order.

        Raises:
            DataError: if X cannot be used, has no rows, or n_repeats < 1.
        """
        states, _ = self.check_training(X)
        if n_repeats < 1:
            raise DataError(f"n_repeats is {n_repeats}; it must be at least 1.")
        source = generator if generator is not None else torch.Generator(states.device).manual_seed(0)
        total = 0.0
        for _ in range(n_repeats):
            for part in states.split(self._chunk):
                total += float(one_step_residuals(self.network, part, source).value.square().sum())
        return total / (n_repeats * len(states))

    def _warn(self) -> None:
        if float(self.consistency) > INCONSISTENT:
            warnings.warn(
                f"the marginals are not consistent: the mean squared one-step residual is "
                f"{float(self.consistency):.2g} nats^2, more than {INCONSISTENT}; train longer, or ask for "
                "log_prob(..., exact=True).",
                InconsistentMarginals,
                stacklevel=3,
            )

    @property
    def _chunk(self) -> int:
        return chunk_rows(self.n_variables, self.max_states)

    # -- samples --------------------------------------------------------------------------------------------

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        order: Order = "random",
        block: int = 1,
        by: By = "conditionals",
    ) -> Int[Tensor, "n variables"]:
        """Draw from the model.

        Args:
            n: how many, >= 1.
            generator: source of randomness; a fresh one with seed 0 if not given.
            order: "random" (another one for each sample), "forward", or a permutation of the columns
                ``(variables,)``.
            block: variables drawn at once; D / block steps are made.
            by: "conditionals" draws the variables of a block independently of each other, in one network
                call. "marginals" draws the joint state of the block by p(x_S, x_B) / p(x_S): dependence is
                kept, and n_states^block candidates are asked about.

        Returns:
            States ``(n, n_variables)`` int64.

        Raises:
            DataError: if an argument is out of range.
        """
        if n < 1:
            raise DataError(f"n is {n}; ask for at least one sample.")
        nothing = torch.zeros(n, self.n_variables, dtype=torch.int64, device=self.valid.device)
        return self._fill(nothing, nothing.bool(), self._source(generator), order, block, by)

    def complete(
        self,
        X: Int[Tensor, " batch *event"],
        observed: Bool[Tensor, " batch *event"],
        how: How = "mode",
        generator: torch.Generator | None = None,
        *,
        order: Order = "random",
        block: int = 1,
        by: By = "conditionals",
    ) -> Tensor:
        """Fill in what was not observed, see `DensityModel.complete`; ``order``, ``block`` and ``by`` are
        those of `sample`."""
        if how != "sample":
            return super().complete(X, observed, how, generator)
        states, mask = self.check(X, observed)
        assert mask is not None
        return self._fill(states, mask, self._source(generator), order, block, by).reshape(X.shape).to(X)

    def _sample_conditional(self, states: Tensor, observed: Tensor, generator: torch.Generator) -> Tensor:
        return self._fill(states, observed, generator, "random", 1, "conditionals")

    def _fill(
        self, states: Tensor, observed: Tensor, generator: torch.Generator, order: Order, block: int, by: By
    ) -> Tensor:
        if by not in BYS:
            raise DataError(f"by is {by!r}; it must be one of {', '.join(BYS)}.")
        arrival = arrival_times(order, len(states), self.n_variables, generator)
        if by == "conditionals":
            return complete_in_order(self.network, states, observed, arrival, generator, block)
        m = self.network.log_marginal
        return complete_by_marginals(m, states, observed, arrival, generator, self.valid, block)

    def _source(self, generator: torch.Generator | None) -> torch.Generator:
        return generator if generator is not None else torch.Generator(self.valid.device).manual_seed(0)

    # -- training from data ---------------------------------------------------------------------------------

    def fit(
        self,
        X: Int[Tensor, " batch *event"],
        y: Int[Tensor, " batch"] | None = None,
        X_val: Int[Tensor, " batch_val *event"] | None = None,
        y_val: Int[Tensor, " batch_val"] | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
        stage_epochs: tuple[int, int] = (50, 50),
        batch_size: int = 128,
        lr: float | tuple[float, float] = 1e-3,
        block_weight: float = 0.5,
        explore: float = 0.25,
        joint: bool | None = None,
        clip_norm: float = 100.0,
        patience: int | None = None,
        **training: Any,
    ) -> Self:
        """Maximum likelihood in two stages: conditionals on random orders, marginals by self-consistency.

        Args:
            X: complete states ``(batch, *event)``.
            y: ignored.
            X_val: held-out states; each stage keeps its weights of the best epoch on them.
            y_val: ignored.
            seed: of every random draw.
            progress: show a progress bar.
            stage_epochs: passes over the data of the two stages; 0 leaves a stage out.
            batch_size: rows in a step; the second stage adds as many of the model's own samples.
            lr: learning rate of Adam at the start, of both stages or of each; it falls to 0 along a cosine.
            block_weight: share of the second stage's rows that are used in blocks of random size, in [0, 1];
                0 is the paper's.
            explore: share of the other rows whose added variable gets a random state, in [0, 1]; 0 is the
                paper's.
            joint: train the conditionals in the second stage too; if not given, only with ``heads="single"``,
                which has to.
            clip_norm: gradients are scaled down to this norm.
            patience: stop a stage after so many epochs without a better validation loss.
            **training: further settings of `paperback.training.train`.

        Returns:
            The model itself.

        Raises:
            DataError: if X cannot be used, or a setting is out of range.
        """
        if callable(X):
            raise DataError("X is a function; an energy is fitted by fit_energy, without data.")
        states, _ = self.check_training(X)
        held_out = None if X_val is None else self.check_training(X_val)[0]
        self._energy = None
        settings = {
            "batch_size": min(batch_size, len(states)),
            "schedule": "cosine",
            "drop_last": True,
            "clip_norm": clip_norm,
            "patience": patience,
            "seed": seed,
            "progress": progress,
        } | training
        fit_to_data(
            self,
            states,
            held_out,
            stage_epochs=stage_epochs,
            lr=lr,
            block_weight=block_weight,
            explore=explore,
            joint=joint,
            settings=settings,
        )
        if stage_epochs[1]:
            self._note_consistency(states if held_out is None else held_out, seed)
        return self

    def _note_consistency(self, rows: Int[Tensor, "batch variables"], seed: int) -> None:
        """Measure `consistency` on rows and on fresh samples, in the mixture that training aims at."""
        generator = torch.Generator(rows.device).manual_seed(seed)
        block = math.ceil(self.n_variables / REFILL_CALLS)
        samples = self.sample(min(len(rows), 512), generator, block=block)
        on_rows = self.consistency_error(rows, generator=generator)
        on_samples = self.consistency_error(samples, generator=generator)
        self.consistency.fill_(self.q_mix * on_rows + (1.0 - self.q_mix) * on_samples)
        self._warn()

    # -- training from an energy ----------------------------------------------------------------------------

    def fit_energy(
        self,
        f: LogWeight,
        *,
        steps: int,
        objective: Objective = "kl",
        X: Int[Tensor, " batch *event"] | None = None,
        alpha: float = 4.0,
        batch_size: int = 512,
        lr: float = 5e-4,
        log_z_lr: float = 5e-2,
        estimator: Estimator = "marginal",
        refill_every: int = 200,
        seed: int = 0,
        progress: bool = True,
        **training: Any,
    ) -> Self:
        """Train towards p(x) = exp f(x) / Z, without data, with as many network calls a step whatever D is.

        Args:
            f: states ``(batch, variables)`` int64 to log-weights ``(batch,)``, finite; see `energies`.
            steps: of the optimizer, >= 1; rounded up to whole rounds of `refill_every`.
            objective: "kl" learns on its own samples (REINFORCE), "fm" brings m to f on rows from anywhere
                and on samples.
            X: for "fm": complete states that take the place of uniform ones.
            alpha: weight of self-consistency, > 0.
            batch_size: samples in a step, >= 2.
            lr: learning rate of Adam at the start; it falls linearly to 0.
            log_z_lr: that of log Z, which "fm" learns.
            estimator: for "kl": log p(x) in the gradient by the "marginal" head, or in parallel by the
                "conditionals".
            refill_every: steps after which the chain is drawn anew, >= 1.
            seed: of every random draw.
            progress: show a progress bar.
            **training: further settings of `paperback.training.train`, such as ``clip_norm`` or
                ``checkpoint``.

        Returns:
            The model itself.

        Raises:
            DataError: if an argument is out of range, or f does not give one finite number for each row.
        """
        check_energy_settings(f, objective, estimator, X is not None, alpha, steps, batch_size, refill_every)
        data = None if X is None else self.check_training(X)[0]
        loss = EnergyLoss(f, objective, alpha, estimator, self.q_mix, Chain(self.gibbs_steps), data)
        fit_to_energy(
            self,
            loss,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            log_z_lr=log_z_lr,
            refill_every=refill_every,
            settings={"seed": seed, "progress": progress} | training,
        )
        self._energy = f
        generator = torch.Generator(self.valid.device).manual_seed(seed)
        self.consistency.fill_(self.consistency_error(self.sample(512, generator), generator=generator))
        self._warn()
        return self

    def log_partition(
        self,
        n: int = 1000,
        *,
        f: LogWeight | None = None,
        how: PartitionEstimator = "marginal",
        n_orders: int = 5,
        generator: torch.Generator | None = None,
    ) -> LogPartition:
        """Estimate log Z of the energy that the model was trained on.

        Args:
            n: samples of the model, >= 2.
            f: the energy; that of the last `fit_energy`, if not given. A loaded model needs it, an energy is
                not saved.
            how: "marginal": the mean of f(x) - log p(x) by the marginal head, O(1) calls for a sample; a
                lower bound in expectation where the head is consistent. "bound": the same by the
                conditionals, a lower bound in expectation always. "importance": log of the mean of exp f(x) /
                p(x), whose expectation is Z before the log.
            n_orders: for "bound" and "importance": the orders whose mixture is drawn from.
            generator: source of randomness; a fresh one with seed 0 if not given.

        Returns:
            The estimate in nats with its standard error.

        Raises:
            DataError: if n < 2 or `how` is unknown.
            NotSupportedError: if there is no energy.
        """
        f = f if f is not None else self._energy
        if f is None:
            raise NotSupportedError("there is no energy to take log Z of; call fit_energy first, or give f.")
        return estimate_log_partition(self, f, n, how, n_orders, self._source(generator))
