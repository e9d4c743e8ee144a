"""The two trainings of a marginalization model: in two stages from data, and from an energy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from paperback.density.marginalization.energies import LogWeight
from paperback.density.marginalization.networks import log_shares, uniform_log_table
from paperback.density.marginalization.objectives import (
    REFILL_CALLS,
    Chain,
    EnergyLoss,
    Estimator,
    MarginalLoss,
    Objective,
    conditional_loss,
)
from paperback.errors import DataError
from paperback.training import train

if TYPE_CHECKING:
    from paperback.density.marginalization.model import MarginalizationModel


def fit_to_data(
    model: MarginalizationModel,
    states: Int[Tensor, "batch variables"],
    held_out: Int[Tensor, "batch_val variables"] | None,
    *,
    stage_epochs: tuple[int, int],
    lr: float | tuple[float, float],
    block_weight: float,
    explore: float,
    joint: bool | None,
    settings: dict[str, Any],
) -> None:
    """Train the conditionals on random orders, then the marginal head on self-consistency.

    See `MarginalizationModel.fit` for the arguments.
    """
    network, single = model.network, model.network.heads == "single"
    joint = single if joint is None else joint
    if single and not joint:
        raise DataError('joint=False needs heads="dual": one trunk makes the second stage change both heads.')
    if not (0.0 <= block_weight <= 1.0 and 0.0 <= explore <= 1.0):
        raise DataError(f"block_weight is {block_weight} and explore {explore}; both must lie in 0..1.")
    if len(stage_epochs) != 2 or min(stage_epochs) < 0:
        raise DataError(f"stage_epochs is {stage_epochs}; it must be two numbers of at least 0.")
    rates = (lr, lr) if isinstance(lr, float | int) else lr
    with torch.no_grad():
        model.log_z.zero_()
    callbacks = settings.pop("callbacks", ())
    marginal, conditional = network.marginal, network.conditional
    if stage_epochs[0]:
        network.start_from(log_shares(states, model.valid).to(model.log_z), 0.0)
        with _frozen(marginal.head if single else marginal):
            train(
                model,
                conditional_loss,
                states,
                val_tensors=held_out,
                epochs=stage_epochs[0],
                lr=rates[0],
                callbacks=callbacks,
                description="conditionals",
                **settings,
            )
        if not single:  # what the conditionals learned to see is a good start for the marginals
            marginal.trunk.load_state_dict(conditional.trunk.state_dict())
    if stage_epochs[1]:
        chain = Chain(model.gibbs_steps, block=math.ceil(model.n_variables / REFILL_CALLS))
        with _frozen(*([] if joint else [conditional])):
            train(
                model,
                MarginalLoss(chain, model.q_mix, block_weight, explore, joint),
                states,
                val_tensors=held_out,
                epochs=stage_epochs[1],
                lr=rates[1],
                callbacks=(*callbacks, chain.refill),
                description="marginals",
                **settings,
            )


def fit_to_energy(
    model: MarginalizationModel,
    loss: EnergyLoss,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    log_z_lr: float,
    refill_every: int,
    settings: dict[str, Any],
) -> None:
    """Train towards exp f / Z from the uniform distribution on; see `MarginalizationModel.fit_energy`."""
    gauge = sum(math.log(k) for k in model.n_states)
    model.network.start_from(uniform_log_table(model.n_states, model.max_states), gauge)
    with torch.no_grad():
        model.log_z.fill_(gauge)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p is not model.log_z], "lr": lr}]
        if model.log_z.requires_grad:
            groups.append({"params": [model.log_z], "lr": log_z_lr})
        return torch.optim.Adam(groups, fused=True)

    defaults: dict[str, Any] = {"optimizer": optimizer, "schedule": "linear", "description": "energy"}
    settings = defaults | settings
    settings["callbacks"] = (*settings.get("callbacks", ()), loss.chain.refill)
    per_round = min(refill_every, steps)
    model.log_z.requires_grad_(loss.objective == "fm")
    try:
        train(
            model,
            loss,
            torch.zeros(per_round * batch_size, 1),  # there are no data: the rows only count the steps
            epochs=math.ceil(steps / per_round),
            batch_size=batch_size,
            lr=lr,
            **settings,
        )
    finally:
        model.log_z.requires_grad_(False)


def check_energy_settings(
    f: LogWeight,
    objective: str,
    estimator: str,
    has_data: bool,
    alpha: float,
    steps: int,
    batch_size: int,
    refill_every: int,
) -> None:
    """Refuse what `MarginalizationModel.fit_energy` cannot work with.

    Raises:
        DataError: naming the argument, its value and what it must be.
    """
    if isinstance(f, Tensor) or not callable(f):
        raise DataError(f"f is a {type(f).__name__}; it must be a function of states. Data go to fit.")
    if objective not in get_args(Objective) or estimator not in get_args(Estimator):
        raise DataError(
            f"objective is {objective!r} and estimator {estimator!r}; they must be one of "
            f"{get_args(Objective)} and one of {get_args(Estimator)}."
        )
    if has_data and objective == "kl":
        raise DataError(
            'X is given, but objective="kl" learns on its own samples; leave X out, or take objective="fm".'
        )
    if steps < 1 or batch_size < 2 or refill_every < 1 or not alpha > 0:
        raise DataError(
            f"steps is {steps}, batch_size {batch_size}, refill_every {refill_every} and alpha {alpha}; "
            "they must be at least 1, 2, 1, and greater than 0."
        )


@contextmanager
def _frozen(*modules: nn.Module) -> Iterator[None]:
    """Inside this context the parameters of some modules are not trained."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
