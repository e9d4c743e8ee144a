"""The partition function and marginals of a restricted Boltzmann machine: exact or by annealing.

One side of the machine is summed state by state, the other in closed form, so the smaller side decides what
is small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperback.density.baselines.rbm.energy import Weights, draw_one_hot, tempered_step
from paperback.numerics.enumeration import joint_states
from paperback.numerics.spins import LogPartition, annealed_importance_sampling

LARGEST_SUM = 2**20
CHUNK = 2**12


def is_small(n_states: Sequence[int], n_hidden: int) -> bool:
    """Whether one side of the machine has at most 2^20 states, so that sums over it are exact."""
    return n_hidden <= math.log2(LARGEST_SUM) or math.prod(n_states) <= LARGEST_SUM


def exact_log_marginal(
    weights: Weights,
    n_states: Sequence[int],
    v: Float[Tensor, "batch entries"],
    observed: Bool[Tensor, "batch variables"],
) -> Float[Tensor, " batch"]:
    """Log weight of the observed part of each row; with nothing observed, the log-partition function.

    Args:
        weights: the machine; one side must be small, see `is_small`.
        n_states: states of every visible variable.
        v: one-hot visible variables, read where observed.
        observed: mask of the known variables.

    Returns:
        Unnormalised log-probabilities, in nats.
    """
    known = v.unflatten(1, weights.valid.shape) * observed[..., None]
    terms = _over_hidden if 2 ** len(weights.hidden_bias) <= math.prod(n_states) else _over_visible
    total = v.new_full((len(v),), -torch.inf)
    for term in terms(weights, n_states, known, observed):
        total = torch.logaddexp(total, term.logsumexp(1))
    return total


def _over_hidden(
    weights: Weights, n_states: Sequence[int], known: Tensor, observed: Tensor
) -> Iterator[Tensor]:
    """Log weight of (row, hidden configuration) with all else summed out, in chunks of configurations."""
    for states in joint_states((2,) * len(weights.hidden_bias), chunk=CHUNK, device=known.device):
        h = states.to(known)
        logits = weights.visible_logits(h)
        free = logits.logsumexp(-1)
        fixed = logits.masked_fill(~weights.valid, 0.0).flatten(1)
        label = weights.label_logits(h).logsumexp(1) if len(weights.label_bias) else 0.0
        yield known.flatten(1) @ fixed.T + (~observed).to(known) @ free.T + (h @ weights.hidden_bias + label)


def _over_visible(
    weights: Weights, n_states: Sequence[int], known: Tensor, observed: Tensor
) -> Iterator[Tensor]:
    """Log weight of (row, visible configuration), -inf where the two disagree, in chunks."""
    n_observed = observed.sum(1, keepdim=True)
    for states in joint_states(n_states, chunk=CHUNK, device=known.device):
        v = nn.functional.one_hot(states, known.shape[2]).to(known).flatten(1)
        agrees = known.flatten(1) @ v.T > n_observed - 0.5
        yield torch.where(agrees, weights.log_weight_by_class(v).logsumexp(1), -torch.inf)


def anneal_log_partition(
    weights: Weights, base: tuple[Tensor, Tensor], *, n_chains: int, n_temperatures: int, seed: int
) -> LogPartition:
    """Annealed importance sampling from independent base rates to the machine.

    Args:
        weights: the machine.
        base: logits of the base rates of visible entries and classes; the nearer to the data, the better the
            estimate.
        n_chains: independent chains.
        n_temperatures: inverse temperatures from 0 to 1, >= 2.
        seed: of the chains.

    Returns:
        The estimate with its standard error.
    """
    generator = torch.Generator(weights.visible.device).manual_seed(seed)
    base_v = base[0].unflatten(0, weights.valid.shape).masked_fill(~weights.valid, -torch.inf)
    log_partition = float(base_v.logsumexp(-1).sum()) + math.log(2) * len(weights.hidden_bias)
    if len(base[1]):
        log_partition += float(base[1].logsumexp(0))
    start = draw_one_hot(
        base_v.softmax(-1).expand(n_chains, -1, -1), base[1].softmax(-1).expand(n_chains, -1), generator
    )

    def log_density(state: tuple[Tensor, Tensor], beta: float) -> Tensor:
        v, y = state
        bias = v @ torch.lerp(base[0], weights.visible_bias, beta) + y @ torch.lerp(
            base[1], weights.label_bias, beta
        )
        return bias + nn.functional.softplus(beta * weights.hidden_input(v, y)).sum(1)

    def transition(
        state: tuple[Tensor, Tensor], beta: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return tempered_step(weights, base, state, beta, generator)

    betas = torch.linspace(0, 1, n_temperatures, dtype=torch.float64).tolist()
    return annealed_importance_sampling(log_density, transition, start, betas, log_partition, generator)
