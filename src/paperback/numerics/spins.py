"""Potts and Ising systems: energies, chromatic Gibbs sampling, annealed importance sampling.

A Potts model over n variables of at most k states is ``log weight(x) = 1/2 x' J x + b' x`` with x stacked
one-hot, J symmetric of shape ``(n, k, n, k)`` with zero blocks on the diagonal, and b of shape ``(n, k)``.
Its conditionals are ``softmax_k((J x + b)_i)``. Variables of one colour of the coupling graph are independent
given the others, so a sweep draws each colour at once, for all chains together. Annealed importance sampling
follows Neal (2001) and Salakhutdinov & Murray (2008); it is written once, over any tempered family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

State = TypeVar("State")


def sample_categorical(
    probabilities: Float[Tensor, "*batch states"], generator: torch.Generator
) -> Int[Tensor, " *batch"]:
    """One draw from each row of probabilities, by inversion.

    Faster on many small rows than ``torch.multinomial``; rows need not sum to one exactly. A state of
    probability zero is never drawn.

    Args:
        probabilities: non-negative weights, any leading shape, each row with a positive sum.
        generator: source of randomness, on the same device.

    Returns:
        States int64 of the leading shape.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[..., -1:]
    level = (
        torch.rand(total.shape, generator=generator, dtype=cumulative.dtype, device=cumulative.device) * total
    )
    # Rounding can lift the level to the total; the last state that has any weight is meant then.
    level = torch.minimum(level, torch.nextafter(total, torch.zeros_like(total)))
    return (level >= cumulative).sum(-1)


def potts_log_weight(
    states: Int[Tensor, "batch n"], couplings: Float[Tensor, "n k n k"], bias: Float[Tensor, "n k"]
) -> Float[Tensor, " batch"]:
    """Unnormalised log-probability (minus the energy) of states of a Potts model, in nats.

    Args:
        states: one row per configuration, int64.
        couplings: symmetric, zero where a variable meets itself.
        bias: one field per variable and state.

    Returns:
        ``1/2 x' J x + b' x`` for each row.
    """
    x = nn.functional.one_hot(states, bias.shape[1]).to(bias.dtype).flatten(1)
    return 0.5 * ((x @ couplings.flatten(2).flatten(0, 1)) * x).sum(-1) + x @ bias.flatten()


def ising_to_potts(
    couplings: Float[Tensor, "n n"], field: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "n 2 n 2"], Float[Tensor, "n 2"]]:
    """The Potts model of an Ising model ``1/2 s' J s + h' s`` with spins s = -1 (state 0) and +1 (state 1).

    Args:
        couplings: symmetric with zero diagonal.
        field: external field of each spin.

    Returns:
        Couplings ``(n, 2, n, 2)`` and biases ``(n, 2)`` that give every configuration the same weight.
    """
    spin = torch.tensor([-1.0, 1.0], dtype=couplings.dtype, device=couplings.device)
    return torch.einsum("ij,a,b->iajb", couplings, spin, spin), field[:, None] * spin


def colour(coupled: Bool[Tensor, "n n"]) -> tuple[Int[Tensor, " members"], ...]:
    """Greedy colouring of a coupling graph, most connected variables first.

    Args:
        coupled: symmetric, True where two variables interact; the diagonal is ignored.

    Returns:
        The variables of each colour; no two of one colour are coupled, and together they are all variables.
    """
    coupled = coupled.cpu()
    n = len(coupled)
    degree = coupled.sum(1)
    colours = torch.full((n,), -1)
    for i in degree.argsort(descending=True, stable=True).tolist():
        neighbours = coupled[i].clone()
        neighbours[i] = False
        taken = set(colours[neighbours].tolist())
        colours[i] = next(c for c in range(n) if c not in taken)
    return tuple((colours == c).nonzero()[:, 0] for c in range(int(colours.max()) + 1))


def gibbs_sweep(
    states: Int[Tensor, "chains n"],
    couplings: Float[Tensor, "n k n k"],
    bias: Float[Tensor, "n k"],
    colours: Sequence[Int[Tensor, " members"]],
    generator: torch.Generator,
    *,
    valid: Bool[Tensor, "n k"] | None = None,
    free: Bool[Tensor, "chains n"] | None = None,
    beta: float = 1.0,
) -> Int[Tensor, "chains n"]:
    """Draw every variable once from its exact conditional, one colour after another in random order.

    Args:
        states: one row per chain, int64; not changed.
        couplings: symmetric, zero where a variable meets itself.
        bias: one field per variable and state.
        colours: from `colour`; variables of one colour are drawn together.
        generator: source of randomness, on the device of the states.
        valid: states that a variable has; all, if not given.
        free: entries that may change; all, if not given.
        beta: inverse temperature, >= 0; the conditionals are softmax(beta (J x + b)).

    Returns:
        The new states.
    """
    n, k = bias.shape
    x = nn.functional.one_hot(states, k).to(bias.dtype)
    states = states.clone()
    for c in torch.randperm(len(colours), generator=generator, device=generator.device).tolist():
        members = colours[c].to(states.device)
        fields = x.flatten(1) @ couplings[members].reshape(len(members) * k, n * k).T
        logits = beta * (fields.unflatten(1, (len(members), k)) + bias[members])
        if valid is not None:
            logits = logits.masked_fill(~valid[members], -torch.inf)
        drawn = sample_categorical(logits.softmax(-1), generator)
        if free is not None:
            drawn = torch.where(free[:, members], drawn, states[:, members])
        states[:, members] = drawn
        x[:, members] = nn.functional.one_hot(drawn, k).to(x.dtype)
    return states


@dataclass(frozen=True)
class LogPartition:
    """A log-partition function, in nats.

    Attributes:
        value: the number, or its estimate.
        standard_error: of the estimate, by the delta method over chains; 0 where the value is exact.
        effective_chains: how many equally weighted chains the importance weights are worth; infinite where
            the value is exact. A number near 1 means that the standard error is not to be trusted: take more
            temperatures.
    """

    value: float
    standard_error: float = 0.0
    effective_chains: float = math.inf


def annealed_importance_sampling(
    log_density: Callable[[State, float], Tensor],
    transition: Callable[[State, float, torch.Generator], State],
    start: State,
    betas: Sequence[float],
    log_partition_start: float,
    generator: torch.Generator,
) -> LogPartition:
    """Estimate a log-partition function along a path of tempered distributions.

    The expectation of the estimated Z is Z, so log Z is underestimated on average (Jensen); the gap closes
    with more temperatures.

    Args:
        log_density: (states, beta) to unnormalised log-probabilities ``(chains,)``; beta = 0 is the start,
            beta = 1 the target.
        transition: (states, beta, generator) to new states, leaving the distribution at beta invariant.
        start: exact draws from beta = 0, one per chain; any type that the two functions share.
        betas: increasing from 0 to 1.
        log_partition_start: log-partition function at beta = 0, exact.
        generator: source of randomness.

    Returns:
        The estimate with its standard error.

    Raises:
        ValueError: if the betas do not increase from 0 to 1.
    """
    if len(betas) < 2 or betas[0] != 0.0 or betas[-1] != 1.0 or any(a >= b for a, b in pairwise(betas)):
        raise ValueError("betas must increase from 0 to 1.")
    states, log_weight = start, torch.zeros(())
    for previous, beta in pairwise(betas):
        log_weight = log_density(states, beta) - log_density(states, previous) + log_weight
        if beta < 1.0:
            states = transition(states, beta, generator)
    log_weight = log_weight.double()
    n_chains = len(log_weight)
    weight = log_weight.softmax(0) * n_chains  # mean 1
    variance = float(weight.var()) if n_chains > 1 else math.inf
    value = log_partition_start + float(log_weight.logsumexp(0)) - math.log(n_chains)
    return LogPartition(
        value, math.sqrt(variance / n_chains), n_chains / (1.0 + variance * (n_chains - 1) / n_chains)
    )
