"""Small discrete domains, summed out state by state: the truth that approximations are measured against.

A model is given as ``log_weight``, a function from states ``(batch, n)`` to unnormalised log-probabilities
``(batch,)`` in nats. All joint states are visited in chunks, in lexicographic order (the last variable runs
fastest), so memory stays bounded while time is the product of the numbers of states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperback.errors import DataError

LogWeight = Callable[[Tensor], Tensor]

LARGEST_DOMAIN = 2**26
CHUNK = 2**16


def joint_states(
    n_states: Sequence[int],
    *,
    clamp: Int[Tensor, " n"] | None = None,
    chunk: int = CHUNK,
    device: torch.device | str | None = None,
) -> Iterator[Int[Tensor, "chunk n"]]:
    """All joint states of n variables, in lexicographic order and in chunks.

    Args:
        n_states: number of states of every variable, each >= 1.
        clamp: the state of every variable that is held fixed, -1 where it is free; all are free if not given.
        chunk: largest number of rows in one piece, >= 1.
        device: where the rows are made.

    Yields:
        Pieces of at most ``chunk`` rows, int64.

    Raises:
        DataError: if there are more than 2^26 joint states.
    """
    free = [i for i in range(len(n_states)) if clamp is None or int(clamp[i]) < 0]
    total = math.prod(n_states[i] for i in free)
    if total > LARGEST_DOMAIN:
        raise DataError(
            f"{len(free)} free variables have {total:.3g} joint states, more than the {LARGEST_DOMAIN} "
            "that are enumerated; clamp some of them."
        )
    base = (
        torch.zeros(len(n_states), dtype=torch.int64) if clamp is None else clamp.clamp(min=0).to(torch.int64)
    )
    base = base.to(device)
    for start in range(0, total, chunk):
        index = torch.arange(start, min(start + chunk, total), device=device)
        states = base.repeat(len(index), 1)
        for i in reversed(free):
            states[:, i] = index % n_states[i]
            index = index // n_states[i]
        yield states


def log_partition(
    log_weight: LogWeight,
    n_states: Sequence[int],
    *,
    clamp: Int[Tensor, " n"] | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, ""]:
    """The log of the summed weights of all joint states, in nats.

    Args:
        log_weight: states ``(batch, n)`` to unnormalised log-probabilities ``(batch,)``.
        n_states: number of states of every variable.
        clamp: variables held fixed, as in `joint_states`; the sum then runs over the others.
        device: where the states are made.

    Returns:
        A scalar. With ``clamp`` it is the log weight of the clamped part, so that a difference of two gives a
        log marginal.
    """
    pieces = [
        torch.logsumexp(log_weight(states), 0)
        for states in joint_states(n_states, clamp=clamp, device=device)
    ]
    return torch.logsumexp(torch.stack(pieces), 0)


def log_probabilities(
    log_weight: LogWeight, n_states: Sequence[int], *, device: torch.device | str | None = None
) -> Float[Tensor, " states"]:
    """Normalised log-probability of every joint state, in the order of `joint_states`.

    Args:
        log_weight: states ``(batch, n)`` to unnormalised log-probabilities ``(batch,)``.
        n_states: number of states of every variable.
        device: where the states are made.

    Returns:
        One number for each of the prod(n_states) joint states, in nats.
    """
    return torch.cat([log_weight(states) for states in joint_states(n_states, device=device)]).log_softmax(0)


def marginals(
    log_weight: LogWeight,
    n_states: Sequence[int],
    *,
    clamp: Int[Tensor, " n"] | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "n states"]:
    """The marginal distribution of every variable, given the clamped ones.

    Args:
        log_weight: states ``(batch, n)`` to unnormalised log-probabilities ``(batch,)``.
        n_states: number of states of every variable.
        clamp: variables held fixed, as in `joint_states`; their marginals come back one-hot.
        device: where the states are made.

    Returns:
        Probabilities ``(n, max(n_states))``, zero at states that a variable does not have.
    """
    total = log_partition(log_weight, n_states, clamp=clamp, device=device)
    result = torch.zeros(len(n_states), max(n_states), dtype=total.dtype, device=total.device)
    for states in joint_states(n_states, clamp=clamp, device=device):
        probability = (log_weight(states) - total).exp()
        result.scatter_add_(1, states.T, probability.expand(len(n_states), -1))
    return result


def kl_divergence(log_p: Float[Tensor, " states"], log_q: Float[Tensor, " states"]) -> Float[Tensor, ""]:
    """KL(p || q) of two distributions over the same enumerated states, in nats.

    Unlike ``torch.nn.functional.kl_div`` it takes 0 log 0 as 0, so that p may leave states out.

    Args:
        log_p: normalised log-probabilities; -inf is allowed.
        log_q: the same for q.

    Returns:
        A scalar >= 0 (up to rounding), infinite where p has mass that q has not.
    """
    term = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -torch.inf, 0.0, term).sum()
