"""How small a model has to become: one number, in one unit."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from paperback.errors import BudgetError

UNITS = {
    "density": "weights of the handled layers that stay, in (0, 1]",
    "bytes": "bytes of the whole model on disk",
    "ratio": "bytes of the whole model on disk over those before, in (0, 1]",
    "parameters": "parameters of the whole model",
    "flops": "floating-point operations of one pass over the example",
    "nm": "(n, m): of m neighbouring weights, n stay",
    "bits": "bits of a weight, its scales not counted",
}


@dataclass(frozen=True)
class Budget:
    """How small a model has to become. Exactly one of these is given.

    Attributes:
        density: share of the weights of the handled layers that stay non-zero, in (0, 1].
        bytes: bytes of the whole model on disk, really written.
        ratio: bytes of the whole model on disk over those before, in (0, 1].
        parameters: parameters of the whole model, shared ones counted once.
        flops: floating-point operations of one pass over the example input.
        nm: (n, m): of each m neighbouring weights of a row, n stay.
        bits: bits of a weight in the handled layers, at least 1; scales come on top.

    Raises:
        BudgetError: if none or several are given, or one is out of range.
    """

    density: float | None = None
    bytes: int | None = None
    ratio: float | None = None
    parameters: int | None = None
    flops: int | None = None
    nm: tuple[int, int] | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            units = ", ".join(UNITS)
            raise BudgetError(
                f"a budget has one unit, this one has {' and '.join(given) or 'none'}; give one of {units}."
            )
        unit, value = given[0], getattr(self, given[0])
        if unit == "nm":
            n, m = value
            if not 0 < n < m:
                raise BudgetError(f"nm is ({n}, {m}); it must be (n, m) with 0 < n < m.")
        elif unit in ("density", "ratio") and not 0 < value <= 1:
            raise BudgetError(f"{unit} is {value}; it must lie in (0, 1].")
        elif value <= 0:
            raise BudgetError(f"{unit} is {value}; it must be positive.")

    @property
    def unit(self) -> str:
        """Which one was given."""
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def value(self) -> Any:
        """The number, or the pair (n, m)."""
        return getattr(self, self.unit)

    def __str__(self) -> str:
        return f"{self.unit} {self.value}"

    def refuse(self, method: str, *units: str) -> BudgetError:
        """The error of a method that has no such unit.

        Args:
            method: who refuses.
            *units: which units it does have.
        """
        return BudgetError(
            f"{method} cannot be told {self.unit}; give it a budget in {' or '.join(units) or 'no unit'}."
        )
