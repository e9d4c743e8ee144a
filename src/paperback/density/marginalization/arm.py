"""The rival: an any-order autoregressive model of the same size, which has the conditionals and no marginal
head.

Its likelihood is a sum over all observed variables, one network call for each, so that a marginal costs O(D)
and a training step on an energy too. It is what the marginalization model is measured against, and its first
stage of training from data.

Source: Uria, Murray, Larochelle, A deep and tractable density estimator (ICML 2014); Hoogeboom et al.,
Autoregressive diffusion models (ICLR 2022); as rival in Liu, Ramadge, Adams (ICML 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from paperback.density.interface import Capabilities, DensityModel
from paperback.density.marginalization.energies import LogWeight, evaluate
from paperback.density.marginalization.networks import (
    ConditionalNet,
    log_shares,
    start_bias,
    uniform_log_table,
)
from paperback.density.marginalization.objectives import conditional_loss, standardise
from paperback.density.marginalization.orders import (
    at_columns,
    chunk_rows,
    complete_in_order,
    conditional_probabilities,
    fixed_orders,
    log_conditional_at,
    mixture_log_prob,
)
from paperback.errors import DataError
from paperback.training import seeded, train

ArmEstimator = Literal["exact", "one_step"]


class AnyOrderARM(DensityModel):
    """Conditionals p(x_i | x_S) for every i and S, by one network.

    The model is the mixture of the autoregressive models along `n_orders` orders. Its likelihood and samples
    are exact; its marginals would be only if the conditionals were those of one distribution.

    Args:
        n_variables: number of variables D, >= 1.
        n_states: states of every variable (>= 2), or one number per variable.
        trunk: as of `MarginalizationModel`.
        hidden: width of the trunk.
        n_blocks: its residual layers.
        n_orders: orders of the mixture, >= 1.
        seed: of the initial weights and of the orders.

    Raises:
        DataError: if an argument is out of range.
    """

    capabilities = Capabilities(
        log_prob="exact",
        marginal="estimate",
        conditional="estimate",
        sample="exact",
        sample_conditional="estimate",
        classify="none",
    )
    ranks: Tensor

    def __init__(
        self,
        n_variables: int,
        n_states: int | Sequence[int],
        trunk: str | nn.Module = "mlp",
        hidden: int = 256,
        n_blocks: int = 3,
        n_orders: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__(n_variables, n_states)
        with seeded(seed, "weights"):
            self.network = ConditionalNet(self.valid, trunk, hidden, n_blocks)
        start_bias(self.network.head, uniform_log_table(self.n_states, self.max_states))
        self.register_buffer("ranks", fixed_orders(n_orders, n_variables, seed), persistent=False)
        self.eval()

    def fit(
        self,
        X: Int[Tensor, " batch *event"],
        y: Int[Tensor, " batch"] | None = None,
        X_val: Int[Tensor, " batch_val *event"] | None = None,
        y_val: Int[Tensor, " batch_val"] | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
        epochs: int = 50,
        batch_size: int = 128,
        lr: float = 1e-3,
        clip_norm: float = 100.0,
        **training: Any,
    ) -> Self:
        """Train the conditionals on random orders (see `DensityModel.fit`).

        Args:
            X: complete states ``(batch, *event)``.
            y: ignored.
            X_val: held-out states; the weights of the best epoch on them are kept.
            y_val: ignored.
            seed: of every random draw.
            progress: show a progress bar.
            epochs: passes over the data.
            batch_size: rows in a step.
            lr: learning rate of Adam at the start; it falls to 0 along a cosine.
            clip_norm: gradients are scaled down to this norm.
            **training: further settings of `paperback.training.train`.

        Returns:
            The model itself.

        Raises:
            DataError: if X cannot be used.
        """
        states, _ = self.check_training(X)
        held_out = None if X_val is None else self.check_training(X_val)[0]
        start_bias(self.network.head, log_shares(states, self.valid).to(self.network.head.bias))
        settings: dict[str, Any] = {
            "schedule": "cosine",
            "drop_last": True,
            "description": "AnyOrderARM",
        } | training
        train(
            self,
            conditional_loss,
            states,
            val_tensors=held_out,
            epochs=epochs,
            batch_size=min(batch_size, len(states)),
            lr=lr,
            clip_norm=clip_norm,
            seed=seed,
            progress=progress,
            **settings,
        )
        return self

    def fit_energy(
        self,
        f: LogWeight,
        *,
        steps: int,
        estimator: ArmEstimator = "exact",
        batch_size: int = 512,
        lr: float = 5e-4,
        seed: int = 0,
        progress: bool = True,
        steps_per_epoch: int = 50,
        **training: Any,
    ) -> Self:
        """Train towards p(x) = exp f(x) / Z by REINFORCE, without data. A step costs D network calls to
        sample.

        Args:
            f: states to log-weights, see `energies`.
            steps: of the optimizer, >= 1; rounded up to whole epochs.
            estimator: log p(x) by all D conditionals along a random order ("exact"), or D times that of one
                random step ("one_step").
            batch_size: samples in a step, >= 2.
            lr: learning rate of Adam at the start; it falls linearly to 0.
            seed: of every random draw.
            progress: show a progress bar.
            steps_per_epoch: steps between two calls of the callbacks.
            **training: further settings of `paperback.training.train`.

        Returns:
            The model itself.

        Raises:
            DataError: if an argument is out of range, or f does not give one finite number for each row.
        """
        if estimator not in get_args(ArmEstimator) or steps < 1 or batch_size < 2:
            raise DataError(
                f"estimator is {estimator!r}, steps {steps} and batch_size {batch_size}; they must be one of "
                f"{get_args(ArmEstimator)}, at least 1 and at least 2."
            )
        per_epoch = min(steps_per_epoch, steps)
        settings: dict[str, Any] = {"schedule": "linear", "description": "AnyOrderARM"} | training
        train(
            self,
            ArmEnergyLoss(f, estimator),
            torch.zeros(per_epoch * batch_size, 1),
            epochs=math.ceil(steps / per_epoch),
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            progress=progress,
            **settings,
        )
        return self

    def _log_prob(self, states: Tensor, observed: Tensor | None) -> Tensor:
        known = torch.ones_like(states, dtype=torch.bool) if observed is None else observed
        return mixture_log_prob(self.network, states, known, self.ranks, self._chunk)

    def _conditional(self, states: Tensor, observed: Tensor) -> Tensor:
        return conditional_probabilities(self.network, states, observed, self._chunk)

    @property
    def _chunk(self) -> int:
        return chunk_rows(self.n_variables, self.max_states)

    def _sample_conditional(self, states: Tensor, observed: Tensor, generator: torch.Generator) -> Tensor:
        which = torch.randint(0, len(self.ranks), (len(states),), generator=generator, device=states.device)
        return complete_in_order(self.network, states, observed, self.ranks[which].float(), generator)


@dataclass
class ArmEnergyLoss:
    """REINFORCE for the any-order autoregressive model on its own samples.

    Attributes:
        f: the energy.
        estimator: "exact" or "one_step".
    """

    f: LogWeight
    estimator: ArmEstimator

    def __call__(
        self, model: Any, batch: tuple[Tensor, ...], generator: torch.Generator
    ) -> dict[str, Tensor]:
        network: ConditionalNet = model.network
        n, d = len(batch[0]), model.valid.shape[0]
        nothing = torch.zeros(n, d, dtype=torch.int64, device=generator.device)
        arrival = torch.rand(n, d, generator=generator, device=generator.device)
        x = complete_in_order(network, nothing, nothing.bool(), arrival, generator)
        f_x = evaluate(self.f, x, network.head.bias.dtype)
        if self.estimator == "exact":
            # All D steps of all rows are one batch, since x is known.
            steps = torch.arange(d, device=x.device).repeat_interleave(n)
            known = arrival.repeat(d, 1) < at_columns(arrival.repeat(d, 1), steps)[:, None]
            log_p = log_conditional_at(network, x.repeat(d, 1), known, steps).unflatten(0, (d, n)).sum(0)
            reward = log_p.detach() - f_x
        else:
            with torch.no_grad():  # another step than that of the gradient, so that the two are independent
                reward = self._one_step(network, x, arrival, generator) - f_x
            log_p = self._one_step(network, x, arrival, generator)
        return {"loss": (standardise(reward) * log_p).mean(), "log_ratio": reward.mean()}

    @staticmethod
    def _one_step(network: ConditionalNet, x: Tensor, arrival: Tensor, generator: torch.Generator) -> Tensor:
        d = x.shape[1]
        column = torch.randint(0, d, (len(x),), generator=generator, device=x.device)
        known = arrival < at_columns(arrival, column)[:, None]
        return d * log_conditional_at(network, x, known, column)
