"""How the variances of prior and noise are chosen from a grid: by rows that are held out, in five folds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paperback.errors import DataError

Variance = float | Sequence[float] | None

GRID = (0.1, 1.0, 10.0)  # in units of standardised targets
FOLDS = 5  # each holds a fifth of the rows out
FEWEST_ROWS = 5  # with fewer, nothing is held out
FALLBACK = (1.0, 0.1)  # variances of prior and noise then, or what of the grid is next to them


def variance_grid(name: str, value: Variance) -> tuple[float, ...]:
    """The variances that a parameter of an estimator asks for.

    Args:
        name: of the parameter, for the error.
        value: a number, the numbers to choose from, or None for 0.1, 1 and 10.

    Returns:
        One or more positive numbers.

    Raises:
        DataError: if there is none, or one is not a positive number.
    """
    grid = GRID if value is None else (value,) if isinstance(value, int | float) else tuple(value)
    if not grid or not all(0 < each < math.inf for each in grid):
        raise DataError(f"{name} is {value!r}; give a positive number, a list of them, or None.")
    return tuple(float(each) for each in grid)


def nearest(grid: Sequence[float], value: float) -> float:
    """The number of a grid that is closest to a value, by ratio."""
    return min(grid, key=lambda each: abs(math.log(each / value)))


def folds(rows: int, source: torch.Generator) -> Bool[Tensor, "folds rows"]:
    """Which rows are held out in each fold: every row in one of them, at random.

    One fifth of ten rows is two rows: too few to choose among nine pairs of variances.
    """
    place = torch.randperm(rows, generator=source) % min(FOLDS, rows)
    return place == torch.arange(min(FOLDS, rows))[:, None]


class Cases(NamedTuple):
    """Networks that are fitted side by side, each with variances and rows of its own.

    Attributes:
        p2: prior variances.
        s2: noise variances.
        seen: 1 where a network sees a row, else 0.
    """

    p2: Float[Tensor, " cases"]
    s2: Float[Tensor, " cases"]
    seen: Float[Tensor, "cases rows"]

    def repeat(self, times: int) -> Cases:
        """All cases, so many times over, one whole set after the other."""
        return Cases(self.p2.repeat(times), self.s2.repeat(times), self.seen.repeat(times, 1))
