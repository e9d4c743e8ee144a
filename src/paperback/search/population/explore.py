"""Exploring: how the settings that a member took over are changed (Jaderberg et al. 2017, section 3).

Every value stays in its range, whatever the strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paperback.errors import DataError
from paperback.search.parameters import Choice, Config, Float, Integer, Parameter, check_config

Explore = Callable[[Config, np.random.Generator], Config]


def perturb(
    config: Config,
    space: Mapping[str, Parameter],
    rng: np.random.Generator,
    factors: Sequence[float] = (0.8, 1.2),
    resample_prob: float = 0.0,
) -> Config:
    """Each setting moves a little, or, with probability `resample_prob`, is drawn afresh from its prior.

    Numbers are multiplied by one of the factors, whole numbers by at least one step. An ordered choice moves
    to a neighbour, an unordered one is drawn afresh, and so is a number that is 0, which no factor moves.

    Args:
        config: the settings.
        space: their ranges.
        rng: of the draws.
        factors: positive, all equally probable.
        resample_prob: in [0, 1], for each setting by itself.

    Returns:
        The changed settings, each in its range.
    """
    return {
        name: parameter.sample(rng)
        if rng.random() < resample_prob
        else _move(parameter, config[name], rng, factors)
        for name, parameter in space.items()
    }


def _move(parameter: Parameter, value: Any, rng: np.random.Generator, factors: Sequence[float]) -> Any:
    if isinstance(parameter, Choice):
        return _neighbour(parameter, value, rng) if parameter.ordered else parameter.sample(rng)
    if value == 0:
        return parameter.sample(rng)
    factor = float(rng.choice(factors))
    if isinstance(parameter, Integer) and round(value * factor) == value and factor != 1:
        outward = 1 if (factor > 1) == (value > 0) else -1
        return parameter.clip(value + outward)
    return parameter.clip(value * factor)


def _neighbour(parameter: Choice, value: Any, rng: np.random.Generator) -> Any:
    """The next value of an ordered choice in either direction; at an end, the one that there is."""
    place = next(i for i, own in enumerate(parameter.values) if type(own) is type(value) and own == value)
    beside = [i for i in (place - 1, place + 1) if 0 <= i < len(parameter.values)]
    return parameter.values[int(rng.choice(beside))] if beside else value


def confine(config: Any, space: Mapping[str, Parameter]) -> Config:
    """What a user's explore function gave, with its numbers moved into their ranges.

    Args:
        config: what the function returned.
        space: the ranges.

    Returns:
        A configuration of the space.

    Raises:
        DataError: if it is no configuration of the space even so.
    """
    if not isinstance(config, Mapping):
        raise DataError(f"explore returned {config!r}; it returns a configuration.")
    inside = {name: _inside(space.get(name), value) for name, value in config.items()}
    return check_config(inside, space)


def _inside(parameter: Parameter | None, value: Any) -> Any:
    """A number moved into its range; anything else, and what is not finite, as it is."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not isinstance(parameter, Float | Integer) or not number or not np.isfinite(value):
        return value
    return parameter.clip(float(value))
