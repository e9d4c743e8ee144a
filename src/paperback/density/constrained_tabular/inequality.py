"""A linear inequality with exact coefficients, and how it is written.

Coefficients are `fractions.Fraction`: elimination adds and scales rows many times, and whether two rows
contradict each other must not depend on rounding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

_PLAIN_NAME = re.compile(r"[^\W\d]\w*")
RESERVED = ("and", "or", "not")


@dataclass(frozen=True)
class Inequality:
    """``sum_k weights[k] * x_k + constant >= 0``, or ``> 0``.

    Attributes:
        weights: column to coefficient; none is zero.
        constant: the constant.
        strict: whether it is ``> 0``.
        origin: which of the rows that were given add up to this one, and how many times each is taken: the
            proof that it follows from them.
    """

    weights: Mapping[str, Fraction]
    constant: Fraction
    strict: bool = False
    origin: Mapping[int, Fraction] = field(default_factory=dict)

    def __str__(self) -> str:
        """The inequality in the grammar that `parse` reads."""
        return f"{linear_text(self.weights, self.constant)} {'>' if self.strict else '>='} 0"

    def scaled(self, factor: Fraction) -> Inequality:
        """The same half-space, all numbers multiplied by a positive factor."""
        return Inequality(
            {name: factor * weight for name, weight in self.weights.items()},
            factor * self.constant,
            self.strict,
            {row: factor * times for row, times in self.origin.items()},
        )


def total(first: Inequality, second: Inequality) -> Inequality:
    """The sum of two inequalities, which follows from them; strict if either is."""
    weights = dict(first.weights)
    for name, weight in second.weights.items():
        weights[name] = weights.get(name, Fraction(0)) + weight
    origin = dict(first.origin)
    for row, times in second.origin.items():
        origin[row] = origin.get(row, Fraction(0)) + times
    return Inequality(
        {name: weight for name, weight in weights.items() if weight},
        first.constant + second.constant,
        first.strict or second.strict,
        origin,
    )


def linear_text(weights: Mapping[str, Fraction], constant: Fraction) -> str:
    """``2*x - 0.5*y + 3``, in the order of the weights."""
    terms = []
    for name, weight in weights.items():
        size = "" if abs(weight) == 1 else f"{number_text(abs(weight))}*"
        terms.append((weight < 0, size + quoted(name)))
    if constant or not terms:
        terms.append((constant < 0, number_text(abs(constant))))
    text = "".join(f" {'-' if negative else '+'} {term}" for negative, term in terms)
    return text[3:] if text.startswith(" + ") else "-" + text[3:]


def number_text(value: Fraction) -> str:
    """A non-negative number exactly: as a decimal where it has one, else as a quotient."""
    twos, fives, rest = 0, 0, value.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    if rest != 1 or places > 30:
        return f"{value.numerator}/{value.denominator}"
    digits = str(value.numerator * 10**places // value.denominator).rjust(places + 1, "0")
    return digits if places == 0 else f"{digits[:-places]}.{digits[-places:]}"


def quoted(name: str) -> str:
    """A column name as the grammar needs it: in backticks unless it is a plain word."""
    return name if _PLAIN_NAME.fullmatch(name) and name not in RESERVED else f"`{name}`"
