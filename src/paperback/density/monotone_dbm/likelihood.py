"""Likelihoods and samples of a monotone deep Boltzmann machine: our extensions to the paper.

Bounds on the log-partition function, of the free model or with variables clamped:

    lower:  -F(q*), the mean-field optimum, which is global because F is convex;
    upper:  with u = Ahat x and -1/2 |u|^2 <= 1/2 |v|^2 - v'u for every v,
            log Z <= min_v 1/2 |v|^2 + sum_i logsumexp_k(b_ik + 1/2 (Ahat_i'Ahat_i)_kk - (Ahat_i' v)_k),
            convex in v.

Samples come from Gibbs sweeps with the exact conditionals softmax((Phi x + b)_i), annealed from the
independent model; the same chains weighted (annealed importance sampling) estimate log Z.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperback.density.monotone_dbm.hollow import ConvCoupling, DenseCoupling
from paperback.density.monotone_dbm.mean_field import MeanFieldProblem
from paperback.density.monotone_dbm.structure import Structure
from paperback.numerics.spins import LogPartition, annealed_importance_sampling, colour, sample_categorical

Sweep = Callable[[Tensor, float, torch.Generator], Tensor]


def upper_bound(
    problem: MeanFieldProblem, q: Float[Tensor, "batch N"], max_steps: int = 100
) -> Float[Tensor, " batch"]:
    """Upper bound on the log-partition function of every clamped problem, in nats.

    Every v gives a valid bound, so an early stop costs tightness only.

    Args:
        problem: the model with its observed variables.
        q: the mean-field solution, which gives the first v = Ahat q.
        max_steps: most L-BFGS steps.

    Returns:
        The bound for each sample.
    """
    coupling, structure = problem.coupling, problem.structure
    field = problem.bias + 0.5 * coupling.diagonal
    excluded = problem.observed & (problem.known == 0)  # an observed variable has one state left

    def bound(v: Tensor) -> Tensor:
        logits = (field - coupling.rows_transposed(v)).masked_fill(excluded, -torch.inf)
        total = 0.5 * (v**2).sum(1)
        for tier in structure.split(logits):
            total = total + tier.logsumexp(2).flatten(1).sum(1)
        return total

    v = coupling.rows(q).detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([v], max_iter=max_steps, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bound(v).sum()  # the samples do not interact, so the sum is minimised where each is
        loss.backward()
        return loss

    with torch.no_grad():
        first = bound(v)
    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        return torch.minimum(bound(v), first)


def colours(structure: Structure, coupling: DenseCoupling | ConvCoupling) -> list[tuple[int, Tensor]]:
    """(tier, members) of every colour: variables of one tier that are not coupled, drawn together in a Gibbs
    sweep.

    Members index the variables of the tier in the order (groups, positions). A dense Phi is coloured by its
    zero blocks. Convolutions couple two pixels of a tier only within the largest kernel k, so the position
    modulo k colours a spatial tier, each group apart.
    """
    result = []
    for t, tier in enumerate(structure.tiers):
        if isinstance(coupling, DenseCoupling):
            part = structure.slices[t]
            inner = coupling.phi[part, part].unflatten(0, (tier.groups, tier.states, tier.positions))
            inner = inner.abs().amax(1).unflatten(-1, (tier.groups, tier.states, tier.positions)).amax(3)
            result += [(t, members) for members in colour(inner.flatten(2).flatten(0, 1) > 0)]
            continue
        spatial_rows = [
            k[t] for r, (_, k) in enumerate(structure.rows) if k[t] and not structure.dense_rows(r)
        ]
        whole = any(k[t] and structure.dense_rows(r) for r, (_, k) in enumerate(structure.rows))
        if whole or not tier.spatial:
            result += [(t, torch.tensor([index])) for index in range(tier.n_variables)]
            continue
        reach = max(spatial_rows, default=1)
        index = torch.arange(tier.n_variables).reshape(tier.groups, tier.height, tier.width)
        for group in range(tier.groups):
            for row in range(min(reach, tier.height)):
                for column in range(min(reach, tier.width)):
                    result.append((t, index[group, row::reach, column::reach].flatten()))
    return result


def gibbs_sweep(problem: MeanFieldProblem, colouring: list[tuple[int, Tensor]]) -> Sweep:
    """A sweep ``(x, beta, generator) -> x`` over flat one-hot states ``(chains, N)``, with couplings
    multiplied by beta.

    Each colour is drawn from its exact conditional softmax(beta (Phi x)_i + b_i), in random order; observed
    variables stay. With a dense Phi the field of one colour costs its own rows only.
    """
    structure, coupling = problem.structure, problem.coupling
    states_of = []
    for t, members in colouring:
        tier = structure.tiers[t]
        group, position = members // tier.positions, members % tier.positions
        state = torch.arange(tier.states)[:, None]
        flat = structure.slices[t].start + (group * tier.states + state) * tier.positions + position
        states_of.append(flat.to(problem.bias.device))  # (states, members) into the flat vector

    def field(x: Tensor, index: Tensor) -> Tensor:
        if isinstance(coupling, DenseCoupling):
            return (x @ coupling.phi[:, index.flatten()]).unflatten(1, index.shape)
        return coupling(x)[:, index]

    def sweep(x: Tensor, beta: float, generator: torch.Generator) -> Tensor:
        x = x.clone()
        for c in torch.randperm(len(states_of), generator=generator, device=generator.device).tolist():
            index = states_of[c]
            probabilities = (beta * field(x, index) + problem.bias[index]).softmax(1)
            drawn = sample_categorical(probabilities.movedim(1, 2), generator)
            fresh = torch.nn.functional.one_hot(drawn, len(index)).movedim(2, 1).to(x)
            x[:, index] = torch.where(problem.observed[:, index], x[:, index], fresh)
        return x

    return sweep


def draw_independent(
    problem: MeanFieldProblem, q: Float[Tensor, "chains N"], generator: torch.Generator
) -> Tensor:
    """Flat one-hot states with each variable drawn from its own marginal in q; observed variables at their
    values.
    """
    parts = []
    for tier in problem.structure.split(q):
        drawn = sample_categorical(tier.movedim(2, -1), generator)
        parts.append(torch.nn.functional.one_hot(drawn, tier.shape[2]).movedim(-1, 2).flatten(1).to(q))
    return problem.clamp(torch.cat(parts, 1))


def gibbs(
    problem: MeanFieldProblem, q: Float[Tensor, "chains N"], n_sweeps: int, generator: torch.Generator
) -> Float[Tensor, "chains N"]:
    """Draws after `n_sweeps` Gibbs sweeps, started at draws from q; the first half is annealed from half the
    coupling to all of it.
    """
    sweep = gibbs_sweep(problem, colours(problem.structure, problem.coupling))
    x = draw_independent(problem, q, generator)
    for index in range(n_sweeps):
        x = sweep(x, min(1.0, 0.5 + index / max(n_sweeps, 1)), generator)
    return x


def log_weight(
    problem: MeanFieldProblem, x: Float[Tensor, "batch N"], beta: float = 1.0
) -> Float[Tensor, " batch"]:
    """Unnormalised log-probability beta/2 x'Phi x + b'x of flat one-hot states."""
    return 0.5 * beta * (x * problem.coupling(x)).sum(1) + x @ problem.bias


def estimate_log_partition(
    problem: MeanFieldProblem, n_betas: int, generator: torch.Generator
) -> LogPartition:
    """Annealed importance sampling of log Z from the independent model (beta = 0); one chain per problem of
    the batch, nothing observed.
    """
    structure = problem.structure
    sweep = gibbs_sweep(problem, colours(structure, problem.coupling))
    independent = structure.softmax(problem.bias[None]).expand(len(problem.known), -1)
    start = draw_independent(problem, independent, generator)
    log_partition_start = sum(float(tier.logsumexp(2).sum()) for tier in structure.split(problem.bias[None]))
    return annealed_importance_sampling(
        lambda x, beta: log_weight(problem, x, beta),
        sweep,
        start,
        torch.linspace(0.0, 1.0, n_betas, dtype=torch.float64).tolist(),
        log_partition_start,
        generator,
    )


def flat_to_states(structure: Structure, x: Float[Tensor, "batch N"]) -> list[Int[Tensor, "batch variables"]]:
    """The states of each tier, variables in the order (groups, positions), from flat one-hot vectors or
    marginals (most probable).
    """
    return [tier.argmax(2).flatten(1) for tier in structure.split(x)]
