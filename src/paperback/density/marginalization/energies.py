"""Targets for training without data: f(x), the log of an unnormalised probability.

Any function from states ``(batch, variables)`` int64 to ``(batch,)`` numbers will do. Here are the usual
ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from joblib import Parallel, delayed
from torch import Tensor

from paperback.errors import DataError
from paperback.numerics.spins import potts_log_weight

LogWeight = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class IsingEnergy:
    """f(x) = 1/2 s'Js + h's with spins s = -1 (state 0) and +1 (state 1).

    Attributes:
        couplings: J, symmetric with zero diagonal.
        field: h.
    """

    couplings: Float[Tensor, "n n"]
    field: Float[Tensor, " n"]

    @classmethod
    def lattice(cls, side: int, sigma: float, bias: float = 0.0) -> Self:
        """A square lattice with periodic borders, f(x) = s' (sigma A) s + bias sum(s), A its adjacency
        matrix.

        As in the authors' code every edge counts twice in the sum, so that J is 2 sigma A here.

        Args:
            side: spins along a side, >= 2.
            sigma: strength of an edge; positive aligns neighbours.
            bias: field of every spin.

        Returns:
            The energy of side^2 spins, row by row.

        Raises:
            DataError: if side < 2.
        """
        if side < 2:
            raise DataError(f"side is {side}; a lattice needs at least 2 spins along a side.")
        index = torch.arange(side * side).reshape(side, side)
        adjacency = torch.zeros(side * side, side * side)
        for dim in (0, 1):
            neighbour = index.roll(-1, dim)
            adjacency[index, neighbour] = adjacency[neighbour, index] = 1.0
        return cls(2.0 * sigma * adjacency, torch.full((side * side,), float(bias)))

    def __call__(self, states: Int[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """f of each row."""
        spins = (2 * states - 1).to(self.couplings.dtype)
        couplings, field = self.couplings.to(states.device), self.field.to(states.device)
        return 0.5 * ((spins @ couplings) * spins).sum(1) + spins @ field


@dataclass(frozen=True)
class PottsEnergy:
    """f(x) = 1/2 x'Jx + b'x over one-hot states, see `paperback.numerics.spins`.

    Attributes:
        couplings: J, symmetric, zero where a variable meets itself.
        bias: b.
    """

    couplings: Float[Tensor, "n k n k"]
    bias: Float[Tensor, "n k"]

    def __call__(self, states: Int[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """f of each row."""
        return potts_log_weight(states, self.couplings.to(states.device), self.bias.to(states.device))


@dataclass(frozen=True)
class RewardEnergy:
    """f(x) = score(x) / temperature, for rewards that are any Python code, such as a property of a molecule.

    Each different row of a batch is scored once, in several processes if wanted.

    Attributes:
        score: a function of one row, a tuple of ints, to a number; with ``n_jobs`` > 1 it must be importable.
        temperature: > 0; the lower, the more the model keeps to the best rows.
        n_jobs: processes that score, as in joblib; with ``joblib.parallel_config`` also on a cluster.

    Raises:
        DataError: if the temperature is not positive.
    """

    score: Callable[[tuple[int, ...]], float]
    temperature: float = 1.0
    n_jobs: int = 1

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise DataError(f"temperature is {self.temperature}; it must be greater than 0.")

    def __call__(self, states: Int[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """f of each row."""
        rows, inverse = torch.unique(states, dim=0, return_inverse=True)
        scores: list[Any] = Parallel(n_jobs=self.n_jobs)(
            delayed(self.score)(tuple(row)) for row in rows.tolist()
        )
        return torch.tensor([float(s) for s in scores], device=states.device)[inverse] / self.temperature


def evaluate(f: LogWeight, states: Int[Tensor, "batch n"], dtype: torch.dtype) -> Float[Tensor, " batch"]:
    """f of some states, checked.

    Raises:
        DataError: if f does not give one finite number for each row.
    """
    with torch.no_grad():
        values = f(states)
    if not isinstance(values, Tensor) or values.shape != (len(states),):
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise DataError(
            f"the energy turned {len(states)} rows into {found}; it must give one number for each row."
        )
    if not bool(values.isfinite().all()):
        row = int((~values.isfinite()).nonzero()[0, 0])
        raise DataError(
            f"the energy is {float(values[row])} at {states[row].tolist()[:32]}; it must be finite, so give "
            "forbidden rows a large negative number."
        )
    return values.to(states.device, dtype)
