"""What can be set in a flat search space: numbers and choices, with the range that they stay in.

A space is a dictionary from names to parameters. A configuration is a dictionary from the same names to
values, and is plain JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paperback.errors import DataError

Config = dict[str, Any]


@dataclass(frozen=True)
class Float:
    """A number in [low, high].

    Args:
        low: least value; greater than 0 where `log` is set.
        high: greatest value.
        log: draw the logarithm uniformly, not the number.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_range("Float", self.low, self.high, self.log)

    def sample(self, rng: np.random.Generator) -> float:
        """A draw from the prior: uniform, or log-uniform."""
        if self.log:
            return self.clip(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self.clip(rng.uniform(self.low, self.high))

    def clip(self, value: float) -> float:
        """The nearest value of the range."""
        return float(min(max(value, self.low), self.high))

    def contains(self, value: object) -> bool:
        """Whether this is a value of the range."""
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high
        )


@dataclass(frozen=True)
class Integer:
    """A whole number in low .. high, both ends included.

    Args:
        low: least value; greater than 0 where `log` is set.
        high: greatest value.
        log: draw the logarithm uniformly, not the number.
    """

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        if self.low != int(self.low) or self.high != int(self.high):
            raise DataError(f"Integer({self.low}, {self.high}) has an end that is not whole; use Float.")
        _check_range("Integer", self.low, self.high, self.log)

    def sample(self, rng: np.random.Generator) -> int:
        """A draw from the prior: uniform, or log-uniform and rounded."""
        if self.log:
            # Half a step wider at either end, so that the ends are not drawn half as often.
            return self.clip(math.exp(rng.uniform(math.log(self.low - 0.5), math.log(self.high + 0.5))))
        return int(rng.integers(self.low, self.high, endpoint=True))

    def clip(self, value: float) -> int:
        """The nearest whole number of the range."""
        return int(min(max(round(value), self.low), self.high))

    def contains(self, value: object) -> bool:
        """Whether this is a value of the range."""
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True)
class Choice:
    """One of several values.

    Args:
        values: two or more different ones, each of them text, a number, a boolean or None.
        ordered: whether neighbours in the list are alike, so that a small change is a step in it.
    """

    values: tuple[Any, ...]
    ordered: bool = False

    def __init__(self, values: Sequence[Any], ordered: bool = False) -> None:
        object.__setattr__(self, "values", tuple(values))
        object.__setattr__(self, "ordered", ordered)
        if len(self.values) == 0:
            raise DataError("a Choice has no values; give at least one.")
        for i, value in enumerate(self.values):
            if not isinstance(value, str | int | float | None):
                raise DataError(
                    f"the value {value!r} of a Choice is a {type(value).__name__}; use text, numbers, "
                    "booleans or None, and make objects of them where they are used."
                )
            if any(type(value) is type(other) and value == other for other in self.values[:i]):
                raise DataError(f"the value {value!r} stands twice in a Choice; values must differ.")

    def sample(self, rng: np.random.Generator) -> Any:
        """One of the values, all equally probable."""
        return self.values[int(rng.integers(len(self.values)))]

    def contains(self, value: object) -> bool:
        """Whether this is one of the values."""
        return any(type(value) is type(own) and value == own for own in self.values)


Parameter = Float | Integer | Choice


def check_space(space: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """A flat space, checked.

    Args:
        space: names and parameters, at least one.

    Returns:
        The same as a dictionary.

    Raises:
        DataError: if it is empty, or something in it is not a parameter.
    """
    if not isinstance(space, Mapping) or not space:
        raise DataError(f"the search space is {space!r}; give a dictionary with at least one parameter.")
    for name, parameter in space.items():
        if not isinstance(name, str) or not name:
            raise DataError(f"the search space has the name {name!r}; names are text.")
        if not isinstance(parameter, Float | Integer | Choice):
            raise DataError(
                f"{name!r} in the search space is {parameter!r}; use Float, Integer or Choice of "
                "paperback.search."
            )
    return dict(space)


def sample_config(space: Mapping[str, Parameter], rng: np.random.Generator) -> Config:
    """A configuration drawn from the prior, each parameter by itself."""
    return {name: parameter.sample(rng) for name, parameter in space.items()}


def check_config(config: Mapping[str, Any], space: Mapping[str, Parameter]) -> Config:
    """A configuration that belongs to a space.

    Raises:
        DataError: naming the parameter that is missing, unknown or out of its range.
    """
    for name in config:
        if name not in space:
            raise DataError(
                f"the configuration sets {name!r}, which the space does not have ({', '.join(space)})."
            )
    for name, parameter in space.items():
        if name not in config:
            raise DataError(f"the configuration does not set {name!r}.")
        if not parameter.contains(config[name]):
            raise DataError(f"the configuration sets {name!r} to {config[name]!r}, outside {parameter}.")
    return dict(config)


def _check_range(kind: str, low: float, high: float, log: bool) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise DataError(f"{kind}({low}, {high}) is no range; both ends are finite and the first is less.")
    if log and low <= 0:
        raise DataError(f"{kind}({low}, {high}, log=True) needs a least value greater than 0.")
