"""The losses: self-consistency, any-order conditionals, and the two objectives for energies.

Self-consistency ties the heads together: p(x_S) p(x_i | x_S) = p(x_S, x_i) for every S and i. If all these
one-step residuals vanish, m is the log marginal of the distribution that the conditionals define, in every
order (telescoping).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperback.density.marginalization.energies import LogWeight, evaluate
from paperback.density.marginalization.networks import MarginalizationNetwork, to_symbols
from paperback.density.marginalization.orders import (
    Conditionals,
    at_columns,
    complete_in_order,
    gibbs,
    log_conditional_at,
    log_conditionals,
    random_steps,
)

Objective = Literal["kl", "fm"]
Estimator = Literal["marginal", "conditionals"]

BLOCK_STRATA = 4  # network calls that estimate the conditionals through a block
SMALLEST_DEVIATION = 0.1  # nats: the least that the log ratio's deviation counts as
REFILL_CALLS = 64  # most network calls of a refill of the chain while learning from data


@dataclass(frozen=True)
class Residuals:
    """What self-consistency asks to vanish, for some rows.

    Attributes:
        value: m(x_S) + log c(x_T | x_S) - m(x_T), in nats.
        size: number of variables in T without S; 1 for one-step residuals.
    """

    value: Float[Tensor, " batch"]
    size: Float[Tensor, " batch"]

    def loss(self, n_variables: int) -> Float[Tensor, " batch"]:
        """Squared residuals, weighted so that each stands for the D / size of its kind that an order consists
        of."""
        return n_variables / self.size * self.value.square()


def one_step_residuals(
    network: MarginalizationNetwork,
    states: Int[Tensor, "batch variables"],
    generator: torch.Generator,
    n_states: Int[Tensor, " variables"] | None = None,
    explore: float = 0.0,
) -> Residuals:
    """Residuals of adding one variable, at a random step of a random order.

    Both sides go through the network together.

    Args:
        network: both heads.
        states: complete rows.
        generator: source of randomness.
        n_states: states of each variable, needed to explore.
        explore: share of the rows whose added variable gets a random state instead of its own. What holds
            for every state has to be seen where data and samples never come.

    Returns:
        One residual for each row.
    """
    arrival, column = random_steps(states, generator)
    if explore > 0.0:
        assert n_states is not None
        draws = torch.rand(2, len(states), generator=generator, device=states.device)
        anything = (draws[0] * n_states[column]).long()
        added = torch.where(draws[1] < explore, anything, at_columns(states, column))
        states = states.scatter(1, column[:, None], added[:, None])
    before = arrival < at_columns(arrival, column)[:, None]
    after = before.scatter(1, column[:, None], True)
    log_conditional = log_conditional_at(network, states, before, column)
    marginals = network.log_marginal(torch.cat([to_symbols(states, before), to_symbols(states, after)]))
    m_before, m_after = marginals.chunk(2)
    return Residuals(m_before + log_conditional - m_after, torch.ones_like(m_before))


def block_residuals(
    network: MarginalizationNetwork,
    states: Int[Tensor, "batch variables"],
    generator: torch.Generator,
    n_strata: int = BLOCK_STRATA,
) -> Residuals:
    """Residuals of adding a block of random size, between two random steps of a random order.

    The chain of conditionals through the block is estimated without bias. The block is cut into strata of
    equal time; from each a random step is taken, and the stratum's part of the chain is its length times the
    mean of log c over what is then left of the block, since every variable that is left is as likely as the
    others to be the next. Squared, the noise of the estimate adds a constant to the loss of the marginal
    head; the conditionals must not be trained through it, and are not.
    """
    n = len(states)
    arrival, first = random_steps(states, generator)
    start = at_columns(arrival, first)[:, None]
    end = start + (1.0 - start) * torch.rand(n, 1, generator=generator, device=states.device)
    before = arrival < start
    after = (arrival <= end).scatter(1, first[:, None], True)
    block = after & ~before
    with torch.no_grad():
        # (strata, batch, variables): the stratum of each variable of the block, and a random one of its
        # variables.
        stratum = (
            ((arrival - start) / (end - start).clamp(min=1e-9) * n_strata).floor().clamp(0, n_strata - 1)
        )
        members = block & (stratum == torch.arange(n_strata, device=states.device)[:, None, None])
        draws = torch.rand(members.shape, generator=generator, device=states.device)
        step = arrival.expand_as(members).gather(2, (draws * members).argmax(2, keepdim=True))
        known = arrival < step
        terms = log_conditionals(network, states.repeat(n_strata, 1), known.flatten(0, 1)).unflatten(
            0, (n_strata, n)
        )
        left = block & ~known
        mean = terms.masked_fill(~left, 0.0).sum(2) / left.sum(2).clamp(min=1)
        log_conditional = (members.sum(2) * mean).sum(0)
    m_before, m_after = network.log_marginal(
        torch.cat([to_symbols(states, before), to_symbols(states, after)])
    ).chunk(2)
    return Residuals(m_before + log_conditional - m_after, block.sum(1).to(m_before))


def begin_loss(network: MarginalizationNetwork, n_variables: int, log_z: Tensor) -> Float[Tensor, ""]:
    """(m("?") - log Z)^2: the constant of m."""
    nothing = torch.zeros(1, n_variables, dtype=torch.int64, device=log_z.device)
    return (network.log_marginal(nothing) - log_z).square().sum()


def any_order_nll(
    network: Conditionals, states: Int[Tensor, "batch variables"], generator: torch.Generator
) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each row over random orders, an upper bound, estimated without bias from one
    network call.

    At a random step with D - d + 1 variables left, D / (D - d + 1) times the sum of their -log c: all that is
    not known is scored.
    """
    arrival, column = random_steps(states, generator)
    known = arrival < at_columns(arrival, column)[:, None]
    terms = log_conditionals(network, states, known).masked_fill(known, 0.0)
    return -states.shape[1] * terms.sum(1) / (~known).sum(1)


def parallel_log_prob(
    network: Conditionals, states: Int[Tensor, "batch variables"], generator: torch.Generator
) -> Float[Tensor, " batch"]:
    """The parallel estimate of log p(x) by the conditionals, from one network call."""
    return -any_order_nll(network, states, generator)


def standardise(reward: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """(r - mean) / std over all processes: REINFORCE's baseline and scale.

    A deviation below `SMALLEST_DEVIATION` does not scale up: a model that has met its target would be thrown
    off it by amplified rounding.
    """
    mean, square = reward.mean(), reward.square().mean()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        both = torch.stack([mean, square])
        torch.distributed.all_reduce(both)
        mean, square = both / torch.distributed.get_world_size()
    deviation = (square - mean.square()).clamp(min=0.0).sqrt()
    return (reward - mean) / deviation.clamp(min=SMALLEST_DEVIATION)


@dataclass
class Chain:
    """Persistent samples of the model's conditionals, kept between steps and refilled at the start of every
    epoch.

    Attributes:
        gibbs_steps: variables that each step draws again.
        block: variables that a refill draws in one network call.
        states: the samples; none before the first refill.
        stale: whether the next step refills.
    """

    gibbs_steps: int
    block: int = 1
    states: Tensor | None = None
    stale: bool = True

    def step(
        self, network: MarginalizationNetwork, batch: int, n_variables: int, generator: torch.Generator
    ) -> Int[Tensor, "batch variables"]:
        """The next samples, ``batch`` of them."""
        if self.states is None or self.stale or len(self.states) < batch:
            nothing = torch.zeros(batch, n_variables, dtype=torch.int64, device=generator.device)
            arrival = torch.rand(batch, n_variables, generator=generator, device=generator.device)
            known = torch.zeros_like(nothing, dtype=torch.bool)
            self.states = complete_in_order(network, nothing, known, arrival, generator, self.block)
            self.stale = False
        drawn = gibbs(network, self.states[:batch], self.gibbs_steps, generator)
        self.states = torch.cat([drawn, self.states[batch:]])
        return drawn

    def refill(self, *_: object) -> None:
        """Start anew at the next step; a callback of the training loop."""
        self.stale = True


def conditional_loss(model: Any, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    """Stage one, the any-order objective: nats per row."""
    return any_order_nll(model.network, batch[0], generator).mean()


@dataclass
class MarginalLoss:
    """Stage two: self-consistency on data and on the model's own samples, and the constant.

    Attributes:
        chain: samples of the model.
        q_mix: weight of the data, against that of the samples.
        block_weight: share of the rows that are used in blocks of random size, see `block_residuals`; 0 is
            the paper's.
        explore: see `one_step_residuals`; 0 is the paper's.
        joint: also train the conditionals, by their own loss and through the residuals.
    """

    chain: Chain
    q_mix: float
    block_weight: float
    explore: float
    joint: bool

    def __call__(
        self, model: Any, batch: tuple[Tensor, ...], generator: torch.Generator
    ) -> dict[str, Tensor]:
        network: MarginalizationNetwork = model.network
        data = batch[0]
        n, d = data.shape
        rows, weight = data, torch.ones(n, device=data.device)
        if self.q_mix < 1.0 and network.training:  # the validation part is judged on data alone
            samples = self.chain.step(network, n, d, generator)
            rows = torch.cat([data, samples])
            weight = torch.cat([2 * self.q_mix * weight, 2 * (1 - self.q_mix) * weight])
        mixed = torch.randperm(len(rows), generator=generator, device=data.device)
        in_blocks, one_by_one = mixed.split(
            [n_block := round(self.block_weight * len(rows)), len(rows) - n_block]
        )
        loss = begin_loss(network, d, model.log_z)
        one = weight.new_tensor(0.0)
        if len(one_by_one):
            n_states = model.valid.sum(1)
            residuals = one_step_residuals(network, rows[one_by_one], generator, n_states, self.explore)
            loss = loss + (weight[one_by_one] * residuals.loss(d)).sum() / len(rows)
            one = residuals.value.detach().square().mean()
        if len(in_blocks):
            residuals = block_residuals(network, rows[in_blocks], generator)
            loss = loss + (weight[in_blocks] * residuals.loss(d)).sum() / len(rows)
        if self.joint:
            loss = loss + any_order_nll(network, data, generator).mean()
        return {"loss": loss, "consistency": one}


@dataclass
class EnergyLoss:
    """Training from an energy, without data.

    ``"kl"``: KL(p || exp f / Z) on the model's own samples. REINFORCE through the marginal head, with the log
    ratio r = m(x) - f(x),
    standardised, as reward: its gradient is r times that of log p(x), and log p(x) is one network call here.
    ``"fm"``: m(x) is brought to f(x) directly, half on rows from anywhere, half on samples, with log Z
    learned.

    Attributes:
        f: the energy.
        objective: "kl" or "fm".
        alpha: weight of self-consistency.
        estimator: what "kl" takes as log p(x) in the gradient: the "marginal" head, or the parallel estimate
            by "conditionals".
        q_mix: for "fm": weight of the rows from anywhere.
        chain: samples of the model.
        data: for "fm": rows to draw from in place of uniform ones.
    """

    f: LogWeight
    objective: Objective
    alpha: float
    estimator: Estimator
    q_mix: float
    chain: Chain
    data: Tensor | None = field(default=None, repr=False)

    def __call__(
        self, model: Any, batch: tuple[Tensor, ...], generator: torch.Generator
    ) -> dict[str, Tensor]:
        network: MarginalizationNetwork = model.network
        n, valid = len(batch[0]), model.valid
        d = valid.shape[0]
        x = self.chain.step(network, n, d, generator)
        f_x = evaluate(self.f, x, model.log_z.dtype)
        if self.objective == "kl":
            m_x = network.log_marginal(to_symbols(x, torch.ones_like(x, dtype=torch.bool)))
            log_p = m_x if self.estimator == "marginal" else parallel_log_prob(network, x, generator)
            fit = (standardise(m_x.detach() - f_x) * log_p).mean()
            residuals = one_step_residuals(network, x, generator)
            one, consistency = residuals.value.square().mean(), residuals.loss(d).mean()
        else:
            anywhere = self._rows_from_anywhere(n, valid, generator)
            rows = torch.cat([anywhere, x])
            weight = torch.cat(
                [torch.full_like(f_x, 2 * self.q_mix), torch.full_like(f_x, 2 * (1 - self.q_mix))]
            )
            target = torch.cat([evaluate(self.f, anywhere, f_x.dtype), f_x])
            m_rows = network.log_marginal(to_symbols(rows, torch.ones_like(rows, dtype=torch.bool)))
            fit = 0.5 * (weight * (m_rows - target).square()).mean()
            residuals = one_step_residuals(network, rows, generator)
            one, consistency = residuals.value.square().mean(), (weight * residuals.loss(d)).mean()
            m_x = m_rows[n:]
        loss = fit + self.alpha * (consistency + begin_loss(network, d, model.log_z))
        return {"loss": loss, "consistency": one, "log_ratio": (m_x.detach() - f_x).mean()}

    def _rows_from_anywhere(
        self, batch: int, valid: Bool[Tensor, "variables states"], generator: torch.Generator
    ) -> Int[Tensor, "batch variables"]:
        device = generator.device
        if self.data is not None:
            return self.data[torch.randint(0, len(self.data), (batch,), generator=generator, device=device)]
        level = torch.rand(batch, len(valid), generator=generator, device=device)
        return (level * valid.sum(1)).long().minimum(valid.sum(1) - 1)
