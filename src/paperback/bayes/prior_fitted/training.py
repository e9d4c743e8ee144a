"""Fitting a network to a prior: data sets are drawn, split, and their second parts predicted from the first.

The loss l(theta) = E[-log q_theta(y | x, D)] over data sets of the prior has its least value at the exact
posterior predictive: it equals the expected Kullback-Leibler divergence from that to q, plus a constant. The
size n of the context is drawn with weight 1 / (N - n): a context of n rows leaves N - n targets, so each size
has the same number of targets in expectation. One n holds for a batch, so that tensors stay rectangular.

Source: Müller et al., Transformers Can Do Bayesian Inference (2022), algorithm 1 and section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.bayes.prior_fitted.priors import Prior, draw_checked
from paperback.bayes.prior_fitted.transformer import PriorFittedTransformer
from paperback.errors import DataError
from paperback.training import History, generator, train

Split = Literal["weighted", "uniform"]
TARGETS_PER_BAR = 500  # of the sample whose quantiles are the borders of the bars
TAIL_MEDIANS = 3.0  # how far into a tail a target counts as it is
ROWS_OF_MOMENTS = 20_000  # at least so many rows for the moments of the prior


class Tasks(NamedTuple):
    """Data sets, split into contexts and queries, in the network's units.

    Attributes:
        context_x: ``(tasks, n, features)``.
        context_y: ``(tasks, n)``.
        x: features of the queries, ``(tasks, queries, features)``.
        y: targets of the queries, ``(tasks, queries)``.
    """

    context_x: Tensor
    context_y: Tensor
    x: Tensor
    y: Tensor


def fit_prior(
    network: PriorFittedTransformer,
    prior: Prior,
    *,
    steps: int,
    batch_size: int = 64,
    lr: float = 1e-3,
    queries: int = 1,
    split: Split = "weighted",
    warmup_fraction: float = 0.25,
    seed: int = 0,
    steps_per_epoch: int = 500,
    callbacks: Sequence[Callable[[int, nn.Module, History], None]] = (),
    progress: bool = True,
) -> History:
    """Train a network on data sets of a prior, in place. This is done once for a prior.

    Adam with the gradient clipped to norm 1, a learning rate that rises over the first quarter and then falls
    to zero along a cosine. Under `accelerate launch` each process draws data sets of its own.

    Args:
        network: fresh, or already fitted to a similar prior: then its borders and moments stay.
        prior: from the number of data sets, their rows and a generator to features and targets; see
            `paperback.bayes.prior_fitted.priors`.
        steps: gradient steps, >= 1; rounded to whole parts of `steps_per_epoch` or so.
        batch_size: data sets of a step.
        lr: peak learning rate.
        queries: rows of a data set that are queries at least; a data set has `max_context` more.
        split: how the size of a context is drawn: "weighted" as above, or "uniform".
        warmup_fraction: part of the steps in which the learning rate rises.
        seed: of all draws.
        steps_per_epoch: the history has one entry for so many steps.
        callbacks: called after so many steps with the count of such calls, the network and the history.
        progress: show a bar.

    Returns:
        The course of the training; losses are in nats per query, of the standardised targets where the
        network's units are "data".

    Raises:
        DataError: if an argument is out of range, or the prior returns wrong shapes or numbers that are not
            finite.
        PaperbackError: if the loss is no longer finite.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("queries", queries)):
        if value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1.")
    if split not in ("weighted", "uniform"):
        raise DataError(f'split is {split!r}; it is "weighted" or "uniform".')
    if not int(network.trained_steps):
        _note_moments(network, prior, queries, split, seed)

    def loss(model: nn.Module, batch: tuple[Tensor, ...], draws: torch.Generator) -> Tensor:
        tasks = draw_tasks(network, prior, len(batch[0]), queries, split, draws)
        outputs = model(tasks.context_x, tasks.context_y, tasks.x)
        return network.negative_log_likelihood(outputs, within_tails(network, tasks.y)).mean()

    # The rows that the loop goes through are numbers of data sets; their contents are drawn in the loss.
    epochs = max(1, round(steps / steps_per_epoch))
    per_epoch = round(steps / epochs)

    def count(epoch: int, model: nn.Module, history: History) -> None:
        network.trained_steps += per_epoch  # so that a training that was stopped is usable

    return train(
        network,
        loss,
        torch.arange(per_epoch * batch_size),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr, fused=True),
        schedule="cosine",
        warmup_fraction=warmup_fraction,
        clip_norm=1.0,
        seed=seed,
        callbacks=[count, *callbacks],
        progress=progress,
        description="fitting the prior",
    )


def draw_tasks(
    network: PriorFittedTransformer,
    prior: Prior,
    tasks: int,
    queries: int,
    split: Split,
    draws: torch.Generator,
) -> Tasks:
    """Draw data sets of the prior, split them all at the same place, and put them into the network's units.

    Args:
        network: whose largest context, units and head matter.
        prior: where data sets come from.
        tasks: how many.
        queries: least number of queries.
        split: see `fit_prior`.
        draws: of all draws, on the CPU or the network's device.

    Returns:
        The tasks, on the network's device.
    """
    total = network.max_context + queries
    device = network.x_shift.device
    host = draws if draws.device.type == "cpu" else _host(draws)
    weights = split_weights(network.max_context, queries, split)
    weights[: network.fewest_rows] = 0
    n = int(torch.multinomial(weights, 1, generator=host))
    x, y = (part.to(device) for part in draw_checked(prior, tasks, total, network, host))
    return in_network_units(network, x[:, :n], y[:, :n], x[:, n:], y[:, n:])


def in_network_units(
    network: PriorFittedTransformer, context_x: Tensor, context_y: Tensor, x: Tensor, y: Tensor
) -> Tasks:
    """Standardise rows by their contexts where the network's units are "data"; else leave them."""
    if network.units == "prior":
        return Tasks(context_x, context_y, x, y)
    shift, scale = moments(context_x)
    context_x, x = (context_x - shift) / scale, (x - shift) / scale
    if network.head != "categorical":
        shift, scale = (part[..., 0] for part in moments(context_y[..., None]))
        context_y, y = (context_y - shift) / scale, (y - shift) / scale
    return Tasks(context_x, context_y, x, y)


def within_tails(network: PriorFittedTransformer, y: Tensor) -> Tensor:
    """Targets for the loss, far ones pulled to three medians of the tail they lie in.

    Standardised by two rows that happen to be close, a target has no variance, and a few of them would be all
    of the loss. Where the prior has units, nothing is changed.
    """
    if network.units == "prior" or network.head != "riemann":
        return y
    low, first, *_, last, high = network.borders
    return y.clamp(first - TAIL_MEDIANS * (first - low), last + TAIL_MEDIANS * (high - last))


def moments(rows: Float[Tensor, "tasks n features"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the rows, ``(tasks, 1, features)``, as the estimators take them.

    Where there is no row, or all are equal, they are 0 and 1, or the mean and 1.
    """
    if rows.shape[1] == 0:
        return rows.new_zeros(len(rows), 1, rows.shape[2]), rows.new_ones(len(rows), 1, rows.shape[2])
    mean, std = rows.mean(1, keepdim=True), rows.std(1, keepdim=True, correction=0)
    flat = std <= 1e-6 * mean.abs().clamp_min(1.0)
    return mean, torch.where(flat, 1.0, std)


def split_weights(max_context: int, queries: int, split: Split) -> Float[Tensor, " contexts"]:
    """Weights of contexts of n = 0 .. max_context rows in data sets of N = max_context + queries rows.

    With the weights 1 / (N - n) each size has the same number of targets in expectation. (The positions of a
    data set do not get equal shares of the loss, as is sometimes said: the last is a target for every n.)
    """
    n = torch.arange(max_context + 1, dtype=torch.float64)
    weights = 1 / (max_context + queries - n) if split == "weighted" else torch.ones_like(n)
    return weights / weights.sum()


def _note_moments(
    network: PriorFittedTransformer, prior: Prior, queries: int, split: Split, seed: int
) -> None:
    """Draw many tasks for the borders of the bars and the moments of features and targets."""
    draws = generator(seed, "moments of the prior")
    bars = len(network.borders) - 1 if network.head == "riemann" else 0
    wanted = max(ROWS_OF_MOMENTS, TARGETS_PER_BAR * bars)
    x, y, context_y, found = [], [], [torch.zeros(0)], 0
    while found < wanted:
        tasks = draw_tasks(network, prior, 256, queries, split, draws)
        x.append(network.filled(tasks.x).flatten(0, 1))
        context_y.append(tasks.context_y.flatten())
        # Small contexts leave more queries; every context counts the same here.
        y.append(tasks.y[:, : max(queries, 8)].flatten())
        found += y[-1].numel()
    seen = torch.cat([part.to(y[0]) for part in context_y])
    targets = torch.cat(y)
    network.set_prior_moments(torch.cat(x), targets, seen if len(seen) else targets)


def _host(draws: torch.Generator) -> torch.Generator:
    """A generator on the CPU that follows the one on the device."""
    seed = torch.randint(2**62, (), generator=draws, device=draws.device)
    return torch.Generator().manual_seed(int(seed))
