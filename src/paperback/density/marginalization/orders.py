"""Any-order machinery: random prefixes, likelihoods along given orders, sampling in any order, block Gibbs.

Everything here needs the conditionals only, as an object with ``logits(symbols)`` and ``logits_at(symbols,
columns)``.

A random order is held as arrival times: u ~ U(0, 1) for each variable. The variables that came before
variable i are {j: u_j < u_i}, and for i drawn uniformly their number is uniform on 0 .. D - 1: a random order
and a random step of it, without sorting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperback.density.marginalization.networks import to_symbols
from paperback.errors import DataError
from paperback.numerics.spins import sample_categorical

Order = Literal["random", "forward"] | Tensor

CHUNK_ENTRIES = 2**22  # entries of one-hot symbols held at once at inference
LARGEST_BLOCK = 2**12  # joint states of a block that is drawn from its marginals


class Conditionals(Protocol):
    """What this module asks of a network."""

    def logits(self, symbols: Tensor) -> Tensor: ...

    def logits_at(self, symbols: Tensor, columns: Tensor) -> Tensor: ...


def chunk_rows(n_variables: int, max_states: int) -> int:
    """Rows of symbols that inference takes in one network call."""
    return max(1, CHUNK_ENTRIES // (n_variables * (max_states + 1)))


def random_steps(
    states: Int[Tensor, "batch variables"], generator: torch.Generator
) -> tuple[Float[Tensor, "batch variables"], Int[Tensor, " batch"]]:
    """Arrival times of a random order for each row, and a variable of each row, whose step is then
    uniform."""
    arrival = torch.rand(states.shape, generator=generator, device=states.device)
    column = torch.randint(0, states.shape[1], (len(states),), generator=generator, device=states.device)
    return arrival, column


def at_columns(values: Tensor, columns: Int[Tensor, " batch"]) -> Tensor:
    """values[row, columns[row]] for each row."""
    return values.gather(1, columns[:, None])[:, 0]


def log_conditional_at(
    network: Conditionals,
    states: Int[Tensor, "batch variables"],
    known: Bool[Tensor, "batch variables"],
    columns: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """log c(x_i | x_known) for one variable i of each row."""
    logits = network.logits_at(to_symbols(states, known), columns)
    return at_columns(logits.log_softmax(-1), at_columns(states, columns))


def log_conditionals(
    network: Conditionals, states: Int[Tensor, "batch variables"], known: Bool[Tensor, "batch variables"]
) -> Float[Tensor, "batch variables"]:
    """log c(x_i | x_known) for every variable i, in one network call; meant where x_i is not known."""
    return network.logits(to_symbols(states, known)).log_softmax(-1).gather(2, states[..., None])[..., 0]


def fixed_orders(n_orders: int, n_variables: int, seed: int) -> Int[Tensor, "n_orders variables"]:
    """The rank of each variable in some orders that depend on the seed only.

    Raises:
        DataError: if n_orders < 1.
    """
    if n_orders < 1:
        raise DataError(f"n_orders is {n_orders}; it must be at least 1.")
    draws = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n_variables, generator=draws) for _ in range(n_orders)])


@torch.no_grad()
def ordered_log_prob(
    network: Conditionals,
    states: Int[Tensor, "batch variables"],
    observed: Bool[Tensor, "batch variables"],
    ranks: Int[Tensor, "n_orders variables"],
    rows: int,
) -> Float[Tensor, "n_orders batch"]:
    """log p of the observed part along each order: the sum of log c(x_i | what comes before i and is
    observed).

    All steps of all rows are independent network inputs, since x is known, and go through the network in
    large batches.

    Args:
        network: the conditionals.
        states: complete or partly known rows.
        observed: which of them count.
        ranks: place of each variable in each order.
        rows: largest number of inputs in one network call.

    Returns:
        One log-probability for each order and row, in nats.
    """
    ranks = ranks.to(states.device)
    row, column = observed.nonzero(as_tuple=True)
    totals = []
    for rank in ranks:
        terms = [
            log_conditional_at(network, states[r], observed[r] & (rank < rank[c][:, None]), c)
            for r, c in zip(row.split(rows), column.split(rows), strict=True)
        ]
        along = torch.cat(terms)
        totals.append(along.new_zeros(len(states)).index_add_(0, row, along))
    return torch.stack(totals)


def mixture_log_prob(
    network: Conditionals,
    states: Int[Tensor, "batch variables"],
    observed: Bool[Tensor, "batch variables"],
    ranks: Int[Tensor, "n_orders variables"],
    rows: int,
) -> Float[Tensor, " batch"]:
    """log p of the observed part under the mixture of the autoregressive models along the orders, see
    `ordered_log_prob`; for complete rows p sums to one.
    """
    along = ordered_log_prob(network, states, observed, ranks, rows)
    return along.logsumexp(0) - math.log(len(ranks))


@torch.no_grad()
def conditional_probabilities(
    network: Conditionals,
    states: Int[Tensor, "batch variables"],
    observed: Bool[Tensor, "batch variables"],
    rows: int,
) -> Float[Tensor, "batch variables states"]:
    """c(x_i | what is observed) for every variable i, in network calls of at most so many rows."""
    parts = to_symbols(states, observed).split(rows)
    return torch.cat([network.logits(part).softmax(-1) for part in parts])


def arrival_times(
    order: Order, batch: int, n_variables: int, generator: torch.Generator
) -> Float[Tensor, "batch variables"]:
    """Arrival times of the variables of each row under an order.

    Args:
        order: "random" (another one for each row), "forward", or a permutation ``(variables,)`` of the
            columns, first one first.
        batch: number of rows.
        n_variables: number of variables.
        generator: source of randomness.

    Raises:
        DataError: if the order is none of these.
    """
    device = generator.device
    if isinstance(order, Tensor):
        if order.shape != (n_variables,) or not torch.equal(
            order.sort().values.cpu(), torch.arange(n_variables)
        ):
            raise DataError(
                f"order must list each of the columns 0..{n_variables - 1} once; it has shape "
                f"{tuple(order.shape)}."
            )
        return order.to(device).argsort().float().expand(batch, -1)
    if order == "random":
        return torch.rand(batch, n_variables, generator=generator, device=device)
    if order == "forward":
        return torch.arange(n_variables, device=device).float().expand(batch, -1)
    raise DataError(f'order is {order!r}; it must be "random", "forward" or a permutation of the columns.')


@torch.no_grad()
def complete_in_order(
    network: Conditionals,
    states: Int[Tensor, "batch variables"],
    observed: Bool[Tensor, "batch variables"],
    arrival: Float[Tensor, "batch variables"],
    generator: torch.Generator,
    block: int = 1,
) -> Int[Tensor, "batch variables"]:
    """Draw what is not observed, variable by variable in the order of arrival.

    Args:
        network: the conditionals.
        states: rows; what is not observed is ignored.
        observed: what is given.
        arrival: arrival time of each variable.
        generator: source of randomness.
        block: variables drawn in one network call, independently of each other given those before; >= 1. More
            than one is faster and loses the dependence inside a block.

    Returns:
        The complete states.

    Raises:
        DataError: if block < 1.
    """
    if block < 1:
        raise DataError(f"block is {block}; it must be at least 1.")
    states, known = states.clone(), observed.clone()
    columns = arrival.masked_fill(observed, torch.inf).argsort(dim=1, stable=True)
    missing = (~observed).sum(1)
    for start in range(0, int(missing.max()) if len(missing) else 0, block):
        rows = (missing > start).nonzero()[:, 0]
        symbols = to_symbols(states[rows], known[rows])
        for_rows = columns[rows, start : start + block]
        if block == 1:
            drawn = sample_categorical(network.logits_at(symbols, for_rows[:, 0]).softmax(-1), generator)[
                :, None
            ]
        else:
            logits = network.logits(symbols)
            index = for_rows[..., None].expand(-1, -1, logits.shape[-1])
            drawn = sample_categorical(logits.gather(1, index).softmax(-1), generator)
        # A row may end within the block: its further columns are observed ones, and stay.
        drawn = torch.where(known[rows[:, None], for_rows], states[rows[:, None], for_rows], drawn)
        states[rows[:, None], for_rows] = drawn
        known[rows[:, None], for_rows] = True
    return states


@torch.no_grad()
def complete_by_marginals(
    log_marginal: Callable[[Tensor], Tensor],
    states: Int[Tensor, "batch variables"],
    observed: Bool[Tensor, "batch variables"],
    arrival: Float[Tensor, "batch variables"],
    generator: torch.Generator,
    valid: Bool[Tensor, "variables states"],
    block: int = 1,
) -> Int[Tensor, "batch variables"]:
    """Draw blocks of variables from p(x_B | x_S) = p(x_S, x_B) / p(x_S), by Bayes' rule on the marginals.

    Every joint state of a block is asked about, so that the dependence inside the block is kept.

    Args:
        log_marginal: symbols to log marginals, up to a constant.
        states: rows; what is not observed is ignored.
        observed: what is given.
        arrival: arrival time of each variable.
        generator: source of randomness.
        valid: which states exist.
        block: variables in a block, >= 1.

    Returns:
        The complete states.

    Raises:
        DataError: if block < 1, or a block has too many joint states.
    """
    n_variables, n_states = valid.shape
    if block < 1 or n_states**block > LARGEST_BLOCK:
        raise DataError(
            f"block is {block}, with {n_states ** max(block, 0)} joint states; it must be at least 1, and "
            f'the joint states at most {LARGEST_BLOCK}. Take a smaller block, or draw by="conditionals".'
        )
    states, known = states.clone(), observed.clone()
    columns = arrival.masked_fill(observed, torch.inf).argsort(dim=1, stable=True)
    missing = (~observed).sum(1)
    per_call = chunk_rows(n_variables, n_states)
    for start in range(0, int(missing.max()) if len(missing) else 0, block):
        for rows in (missing > start).nonzero()[:, 0].split(max(1, per_call // n_states**block)):
            c = columns[rows, start : start + block]
            choices = torch.cartesian_prod(*[torch.arange(n_states, device=states.device)] * c.shape[1])
            choices = choices.reshape(-1, c.shape[1])
            candidates = states[rows, None].repeat(1, len(choices), 1)
            given = known[rows].clone()
            index = c[:, None].expand(-1, len(choices), -1)
            candidates.scatter_(2, index, choices.expand(len(rows), -1, -1))
            given.scatter_(1, c, True)
            symbols = to_symbols(candidates, given[:, None])
            scores = log_marginal(symbols.flatten(0, 1)).unflatten(0, (len(rows), len(choices)))
            # A candidate must consist of states that exist, and agree with what is observed where a row ends
            # within the block.
            possible = valid[index, choices].all(2)
            fixed = known[rows].gather(1, c)[:, None]
            possible &= (~fixed | (choices == states[rows].gather(1, c)[:, None])).all(2)
            chosen = sample_categorical(scores.masked_fill(~possible, -torch.inf).softmax(1), generator)
            states[rows] = candidates[torch.arange(len(rows), device=states.device), chosen]
            known[rows] = given
    return states


@torch.no_grad()
def gibbs(
    network: Conditionals,
    states: Int[Tensor, "batch variables"],
    n_steps: int,
    generator: torch.Generator,
) -> Int[Tensor, "batch variables"]:
    """One step of block Gibbs sampling: forget n_steps random variables of each row, and draw them again one
    by one.

    Args:
        network: the conditionals.
        states: complete rows.
        n_steps: variables that are forgotten, 1 .. D; so many network calls are made.
        generator: source of randomness.

    Returns:
        New complete rows.
    """
    arrival = torch.rand(states.shape, generator=generator, device=states.device)
    columns = arrival.topk(n_steps, dim=1).indices
    states, known = states.clone(), torch.ones_like(states, dtype=torch.bool).scatter_(1, columns, False)
    for column in columns.unbind(1):
        logits = network.logits_at(to_symbols(states, known), column)
        states.scatter_(1, column[:, None], sample_categorical(logits.softmax(-1), generator)[:, None])
        known.scatter_(1, column[:, None], True)
    return states
