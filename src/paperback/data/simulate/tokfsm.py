"""TokFSM: strings of digits written by a random finite-state machine whose states are known.

Every state is a number of `digits` digits in some base, and has `edges` successors, drawn once and equally
likely. A trajectory is written digit by digit behind a token that marks the beginning. A language model of
such strings can only be right if it keeps track of the state, and every statement about its features can be
checked against the machine (Tamkin, Taufeeque and Goodman, 2023, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperback.errors import DataError


@dataclass(frozen=True, eq=False)
class TokFSM:
    """A machine; made by `tokfsm`.

    Attributes:
        base: of the digits; the tokens are the digits 0 .. base - 1 and `bos`.
        digits: of a state, two or more.
        edges: successors of each state.
        transitions: whether state j may follow state i, ``(states, states)``.
    """

    base: int
    digits: int
    edges: int
    transitions: Bool[Tensor, "states states"]

    @property
    def n_states(self) -> int:
        """All numbers of `digits` digits are states."""
        return int(self.base**self.digits)

    @property
    def bos(self) -> int:
        """The token at the beginning of every sequence."""
        return self.base

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.base + 1

    def write(self, states: Int[Tensor, "*shape length"]) -> Int[Tensor, "*shape tokens"]:
        """States as tokens: the beginning, then each state's digits, the highest first."""
        powers = self.base ** torch.arange(self.digits - 1, -1, -1)
        digits = (states[..., None] // powers % self.base).flatten(-2)
        return torch.cat((torch.full((*states.shape[:-1], 1), self.bos), digits), -1)

    def read(self, tokens: Int[Tensor, "*shape tokens"]) -> Int[Tensor, "*shape length"]:
        """The states that a sequence of tokens has finished, without the beginning token."""
        digits = tokens[..., 1:]
        whole = digits.shape[-1] // self.digits * self.digits
        powers = self.base ** torch.arange(self.digits - 1, -1, -1)
        return (digits[..., :whole].unflatten(-1, (-1, self.digits)) * powers).sum(-1)

    def walk(self, n: int, length: int, generator: torch.Generator) -> Int[Tensor, "n length"]:
        """Trajectories of so many states, each from a state drawn uniformly."""
        successors = self.transitions.nonzero()[:, 1].view(self.n_states, self.edges)
        states = [torch.randint(self.n_states, (n,), generator=generator)]
        for _ in range(length - 1):
            choice = torch.randint(self.edges, (n,), generator=generator)
            states.append(successors[states[-1], choice])
        return torch.stack(states, 1)

    def next_digit(self) -> Float[Tensor, "states base"]:
        """Probability of the first digit of the state that follows each state."""
        following = self.transitions.double() / self.edges
        return following.unflatten(1, (self.base, -1)).sum(2)

    def contexts(self, tokens: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
        """What a predictor has to know at each token: the last finished state and the digits since.

        Returns:
            A number for each such context: ``state + states * (1 + number of the digits since)``, told apart
            by how many digits there are; -1 before the first state is finished.
        """
        finished = self.read(tokens)
        n, since = tokens.shape[1] - 1, torch.zeros_like(tokens)
        states = torch.full_like(tokens, -1)
        for position in range(1, n + 1):
            done, rest = divmod(position, self.digits)
            if done:
                states[:, position] = finished[:, done - 1]
                part = tokens[:, position - rest + 1 : position + 1]
                value = (part * self.base ** torch.arange(rest - 1, -1, -1)).sum(1)
                since[:, position] = value + sum(self.base**i for i in range(1, rest)) + (rest > 0)
        return torch.where(states < 0, -1, states + self.n_states * since)


def tokfsm(base: int = 10, edges: int = 10, digits: int = 2, seed: int = 0) -> TokFSM:
    """A random machine.

    Args:
        base: of the digits, >= 2.
        edges: successors of each state, 1 to base**digits.
        digits: of a state, >= 2.
        seed: of the successors.

    Returns:
        The machine; the paper's has base 10, two digits and 10 edges.

    Raises:
        DataError: if an argument is out of range.
    """
    if base < 2 or digits < 2:
        raise DataError(f"base is {base} and digits {digits}; both must be at least 2.")
    n = base**digits
    if not 1 <= edges <= n:
        raise DataError(f"edges is {edges}; it must lie in 1..{n}, the number of states.")
    rng = np.random.default_rng(seed)
    transitions = torch.zeros(n, n, dtype=torch.bool)
    for state in range(n):
        transitions[state, torch.from_numpy(rng.choice(n, edges, replace=False))] = True
    return TokFSM(base, digits, edges, transitions)
