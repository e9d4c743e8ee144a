"""Successive halving: many trainings begin, the better part of them goes on.

The asynchronous form (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", algorithm 2),
which needs no rounds: a proposal promotes a configuration that is among the best 1/eta of its rung and has
not been promoted, from the highest rung on which there is one; if there is none, a new configuration begins
on the lowest rung.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from paperback.errors import DataError
from paperback.search.interface import Searcher
from paperback.search.parameters import Config

RESOURCE = "steps"


class SuccessiveHalving(Searcher):
    """Asynchronous successive halving.

    A proposal's configuration has one more setting, the resource that evaluate may spend on it. Scores of
    different rungs are never compared with each other; the best trial of the highest rung is the answer.

    Args:
        draw: ``draw(rng) -> config``, a random configuration.
        rungs: growing amounts of the resource, two or more.
        eta: the best 1/eta of a rung go on, > 1.
        name: of the resource in configurations.
        seed: of the draws.

    Raises:
        DataError: if rungs do not grow or eta is out of range.
    """

    def __init__(
        self,
        draw: Callable[[np.random.Generator], Config],
        rungs: Sequence[int],
        eta: float = 2.0,
        *,
        name: str = RESOURCE,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if len(rungs) < 2 or any(a >= b for a, b in pairwise(rungs)) or rungs[0] <= 0:
            raise DataError(f"rungs is {list(rungs)}; give two or more growing amounts, above 0.")
        if not eta > 1:
            raise DataError(f"eta is {eta}; it is greater than 1.")
        self.draw = draw
        self.rungs = tuple(rungs)
        self.eta = eta
        self.name = name
        self._scores: list[list[tuple[float, int, Config]]] = [[] for _ in rungs]
        self._promoted: list[list[Config]] = [[] for _ in rungs]  # to the rung above

    def _settings(self) -> dict[str, Any]:
        return {"rungs": list(self.rungs), "eta": self.eta, "resource": self.name}

    def _propose(self, rng: np.random.Generator) -> tuple[Config, int | None]:
        going_up = list(self._pending.values())
        for rung in reversed(range(len(self.rungs) - 1)):
            scores = sorted(self._scores[rung], key=lambda trial: (-trial[0], trial[1]))
            for score, number, config in scores[: int(len(scores) / self.eta)]:
                above = config | {self.name: self.rungs[rung + 1]}
                if np.isfinite(score) and config not in self._promoted[rung] and above not in going_up:
                    return above, number
        return self.draw(rng) | {self.name: self.rungs[0]}, None

    def _learn(self, number: int, config: Config, score: float | None) -> None:
        rung = self.rungs.index(config[self.name])
        self._scores[rung].append((-np.inf if score is None else score, number, config))
        if rung > 0:
            self._promoted[rung - 1].append(config | {self.name: self.rungs[rung - 1]})
