"""Estimates of log Z of the energy that a marginalization model was trained on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch

from paperback.density.marginalization.energies import LogWeight, evaluate
from paperback.density.marginalization.orders import complete_in_order, fixed_orders
from paperback.errors import DataError
from paperback.numerics.spins import LogPartition

if TYPE_CHECKING:
    from paperback.density.marginalization.model import MarginalizationModel

PartitionEstimator = Literal["marginal", "bound", "importance"]

ORDER_SEED = 0  # of the orders along which an exact likelihood is taken, the same for all rows


@torch.no_grad()
def estimate_log_partition(
    model: MarginalizationModel,
    f: LogWeight,
    n: int,
    how: PartitionEstimator,
    n_orders: int,
    generator: torch.Generator,
) -> LogPartition:
    """Log Z from samples of the model; see `MarginalizationModel.log_partition` for the estimates.

    Raises:
        DataError: if n < 2 or `how` is unknown.
    """
    if n < 2 or how not in get_args(PartitionEstimator):
        raise DataError(
            f"n is {n} and how {how!r}; they must be at least 2, and one of {get_args(PartitionEstimator)}."
        )
    if how == "marginal":
        x = model.sample(n, generator)
        log_p = model.log_prob(x)
    else:
        device = generator.device
        ranks = fixed_orders(n_orders, model.n_variables, ORDER_SEED).to(device)
        which = torch.randint(0, n_orders, (n,), generator=generator, device=device)
        nothing = torch.zeros(n, model.n_variables, dtype=torch.int64, device=device)
        x = complete_in_order(model.network, nothing, nothing.bool(), ranks[which].float(), generator)
        log_p = model.log_prob(x, exact=True, n_orders=n_orders)
    log_weight = (evaluate(f, x, log_p.dtype) - log_p).double()
    if how != "importance":
        return LogPartition(float(log_weight.mean()), float(log_weight.std()) / math.sqrt(n), float(n))
    weight = log_weight.softmax(0) * n  # mean 1
    variance = float(weight.var())
    value = float(log_weight.logsumexp(0)) - math.log(n)
    return LogPartition(value, math.sqrt(variance / n), n / (1.0 + variance * (n - 1) / n))
