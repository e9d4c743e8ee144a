"""Searchers that walk a `Space`: at random, and by regularised evolution.

What they share: a proposal is the configuration of a finished walk, and a searcher knows only what it was
told and what is pending, so that a search can be stopped and gone on with anywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from paperback.errors import DataError
from paperback.search.deep_architect.space import Space, Weight, wander
from paperback.search.interface import Searcher
from paperback.search.parameters import Config

Key = frozenset[tuple[str, Any]]


class SpaceSearcher(Searcher):
    """Proposes finished walks through a space.

    Args:
        space: what is searched.
        seed: of every draw.

    Raises:
        DataError: if the space is no `Space`.
    """

    def __init__(self, space: Space, seed: int = 0) -> None:
        super().__init__(seed)
        if not isinstance(space, Space):
            raise DataError(f"the space is {space!r}; give a Space, or make one by from_dict(...).")
        self.space = space

    def _settings(self) -> dict[str, Any]:
        return {"space": repr(self.space)}

    def _pending_keys(self) -> set[Key]:
        return {key_of(config) for config in self._pending.values()}


class RandomSearch(SpaceSearcher):
    """Independent random models.

    Args:
        space: what is searched.
        weight: "choices" draws every open choice uniformly, as the paper does, which gives much weight to
            models in shallow parts of the space; "leaves" draws all models with equal probability.
        seed: of the draws.
    """

    def __init__(self, space: Space, *, weight: Weight = "choices", seed: int = 0) -> None:
        super().__init__(space, seed)
        if weight not in ("choices", "leaves"):
            raise DataError(f'weight is {weight!r}; it is "choices" or "leaves".')
        self.weight: Weight = weight

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"weight": self.weight}

    def _propose(self, rng: np.random.Generator) -> tuple[Config, None]:
        return self.space.sample(rng, self.weight).config, None


class Evolution(SpaceSearcher):
    """Regularised evolution: mutate the best of a few, and let the oldest die (Real et al. 2019).

    Args:
        space: what is searched.
        population: how many of the last trials live, P.
        tournament: how many of them compete to be the parent, S, <= population.
        seed: of the draws.

    Raises:
        DataError: if population or tournament is out of range.
    """

    def __init__(self, space: Space, population: int = 16, tournament: int = 4, *, seed: int = 0) -> None:
        super().__init__(space, seed)
        if not 1 <= tournament <= population:
            raise DataError(
                f"population is {population} and tournament {tournament}; 1 <= tournament <= population."
            )
        self.population = population
        self.tournament = tournament
        self._living: deque[tuple[float, int, Config]] = deque(maxlen=population)

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"population": self.population, "tournament": self.tournament}

    def _propose(self, rng: np.random.Generator) -> tuple[Config, int | None]:
        if len(self._living) < self.population:
            return self.space.sample(rng).config, None
        rivals = rng.choice(len(self._living), self.tournament, replace=False)
        _, number, parent = max(
            (self._living[int(i)] for i in rivals), key=lambda member: (member[0], -member[1])
        )
        return mutate(self.space, parent, rng), number

    def _learn(self, number: int, config: Config, score: float | None) -> None:
        self._living.append((-np.inf if score is None else score, number, config))


def mutate(space: Space, config: Config, rng: np.random.Generator) -> Config:
    """Change one choice of a configuration, and keep every other that is still asked for and possible.

    Args:
        space: of the configuration.
        config: the parent.
        rng: of the draws.

    Returns:
        Another configuration; choices that the change brings up are drawn at random. A space without choices
        gives the same again.
    """
    if not config:
        return dict(config)
    changed = list(config)[int(rng.integers(len(config)))]
    walk = space.walk()
    while walk.open is not None:
        name, values, _ = walk.open
        if name == changed:
            here = values.index(config[name])
            step = 1 + int(rng.integers(len(values) - 1))
            walk.choose((here + step) % len(values))
        elif name in config and config[name] in values:
            walk.choose(walk.toward(config))
        else:
            walk.choose(int(rng.integers(len(values))))
    return walk.config


def key_of(config: Config) -> Key:
    """A configuration as something hashable, whatever the order of its names."""
    return frozenset(config.items())


def untried(
    space: Space, rng: np.random.Generator, tried: Iterable[Key], n: int, draws: int | None = None
) -> list[Config]:
    """Different random configurations that have not been tried, as many as some draws give.

    Args:
        space: to draw from.
        rng: of the draws.
        tried: what is left out.
        n: most configurations.
        draws: how many times to draw; n if not given.
    """
    seen, found = set(tried), []
    for _ in range(n if draws is None else draws):
        config = wander(space.walk(), rng).config
        key = key_of(config)
        if key not in seen:
            seen.add(key)
            found.append(config)
            if len(found) == n:
                break
    return found
