"""Fourier-Motzkin elimination in exact arithmetic.

Eliminating a column keeps the rows without it and adds, for each row p that bounds it from below and q that
bounds it from above, the row that makes room between the two bounds,

    red(p, q) = p / |w_p| + q / |w_q|.

A point of the other columns satisfies the result exactly when some value of the eliminated column completes
it. Taken from the last column of an order to the first, this gives each column its bounds as functions of
the columns before it, and there is always room between them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from paperback.density.constrained_tabular.inequality import Inequality, number_text, total
from paperback.errors import DataError

WARN_ABOVE = 10_000  # rows of one level


class Contradiction(Exception):
    """A row ``0 >= c`` with c > 0 was derived: no point satisfies all rows.

    Attributes:
        row: the derived row; its origin is the proof.
    """

    def __init__(self, row: Inequality) -> None:
        super().__init__(str(row))
        self.row = row


@dataclass(frozen=True)
class Level:
    """What bounds one column, given the columns before it in the order.

    Attributes:
        column: the column.
        lower: rows with a positive coefficient of it, and no later column.
        upper: rows with a negative coefficient of it, and no later column.
    """

    column: str
    lower: tuple[Inequality, ...]
    upper: tuple[Inequality, ...]


def red(p: Inequality, q: Inequality, column: str) -> Inequality:
    """The row that follows from p (positive coefficient of the column) and q (negative) and is free of it."""
    return total(p.scaled(1 / p.weights[column]), q.scaled(-1 / q.weights[column]))


def simplify(rows: Sequence[Inequality]) -> list[Inequality]:
    """Drop what is always true, and of rows that differ only by a factor or the constant keep the tightest.

    Raises:
        Contradiction: if a row is never true.
    """
    tightest: dict[tuple[tuple[str, Fraction], ...], Inequality] = {}
    for row in rows:
        if not row.weights:
            if row.constant < 0 or (row.strict and row.constant == 0):
                raise Contradiction(row)
            continue
        items = sorted(row.weights.items())
        scale = 1 / abs(items[0][1])
        row = row.scaled(scale)
        key = tuple((name, weight * scale) for name, weight in items)
        other = tightest.get(key)
        if other is None or (row.constant, not row.strict) < (other.constant, not other.strict):
            tightest[key] = row
    return list(tightest.values())


def eliminate(
    rows: Sequence[Inequality], column: str, steps: Mapping[str, Fraction] | None = None
) -> list[Inequality]:
    """The rows that the other columns must satisfy so that a value of this column completes them.

    With steps the rows are sufficient, and no longer always necessary: a multiple of the column's step
    completes whatever satisfies them.
    """
    lower = [row for row in rows if row.weights.get(column, 0) > 0]
    upper = [row for row in rows if row.weights.get(column, 0) < 0]
    result = [row for row in rows if column not in row.weights]
    steps = steps or {}
    for p in lower:
        for q in upper:
            row = red(p, q, column)
            if column in steps and not (_on_grid(p, column, steps) or _on_grid(q, column, steps)):
                row = replace(row, constant=row.constant - steps[column])
            result.append(row)
    return simplify(result)


def _on_grid(row: Inequality, column: str, steps: Mapping[str, Fraction]) -> bool:
    """Whether the bound that a row sets for the column is always a multiple of the column's step."""
    unit = row.weights[column] * steps[column]
    others = [(name, weight) for name, weight in row.weights.items() if name != column]
    return (row.constant / unit).denominator == 1 and all(
        name in steps and (weight * steps[name] / unit).denominator == 1 for name, weight in others
    )


def levels(
    rows: Sequence[Inequality],
    order: Sequence[str],
    prune_above: int = 50,
    steps: Mapping[str, Fraction] | None = None,
) -> list[Level]:
    """Bounds of every column of the order, first to last.

    Args:
        rows: the inequalities; every column of theirs is in the order.
        order: the columns. The first moves least freely, the last is the first to be eliminated.
        prune_above: rows of a level above which rows that follow from others are looked for and left out.
        steps: columns that take only multiples of a step.

    Returns:
        One level per column. Without steps they are equivalent to the rows; with steps, a column has a
        multiple of its step between its bounds wherever the columns before it keep to theirs.

    Raises:
        Contradiction: if no point satisfies all rows.
    """
    result, current = [], simplify(rows)
    for column in reversed(order):
        if len(current) > prune_above:
            current = prune(current)
        if len(current) > WARN_ABOVE:
            warnings.warn(
                f"eliminating {column} starts from {len(current):,} rows, which can square at every column; "
                "give another order or fewer constraints.",
                stacklevel=2,
            )
        lower = tuple(row for row in current if row.weights.get(column, 0) > 0)
        upper = tuple(row for row in current if row.weights.get(column, 0) < 0)
        result.append(Level(column, lower, upper))
        current = eliminate(current, column, steps)
    return result[::-1]


def explain(contradiction: Contradiction, texts: Sequence[str]) -> DataError:
    """The error of a contradiction, with the multiples of the constraints that add up to it."""
    row = contradiction.row
    parts = [
        f"{number_text(times)} x ({texts[index]})" if times != 1 else f"({texts[index]})"
        for index, times in row.origin.items()
        if times
    ]
    bound = "0" if row.constant == 0 else number_text(-row.constant)
    return DataError(
        f"no row can satisfy the constraints: {' plus '.join(parts)} gives 0 {'>' if row.strict else '>='} "
        f"{bound}; correct or remove one of them."
    )


# -- rows that follow from others ----------------------------------------------------------------------------


def prune(rows: Sequence[Inequality]) -> list[Inequality]:
    """Leave out rows that are sums of others and something non-negative.

    Linear programming proposes which multiples of which rows; a row is left out only if they add up in exact
    arithmetic.
    """
    kept = list(rows)
    columns = sorted({name for row in rows for name in row.weights})
    for row in sorted(rows, key=lambda r: (-len(r.weights), -len(r.origin))):  # derived and long ones first
        others = [other for other in kept if other is not row]
        support = _proposal(row, others, columns)
        if support and _follows(row, support):
            kept = others
    return kept


def _proposal(row: Inequality, others: Sequence[Inequality], columns: Sequence[str]) -> list[Inequality]:
    """The rows that a linear program derives the row from: sum_j l_j w_j = w, l >= 0, least sum_j l_j c_j."""
    from scipy.optimize import linprog

    if not others:
        return []
    matrix = np.array([[float(other.weights.get(name, 0)) for other in others] for name in columns])
    target = np.array([float(row.weights.get(name, 0)) for name in columns])
    costs = np.array([float(other.constant) for other in others])
    answer = linprog(costs, A_eq=matrix, b_eq=target, bounds=(0, None), method="highs")
    if answer.status != 0:
        return []
    return [other for other, times in zip(others, answer.x, strict=True) if times > 1e-12]


def _follows(row: Inequality, support: Sequence[Inequality]) -> bool:
    """Whether non-negative multiples of the support add up to the row, or to a tighter one."""
    times = _solve([other.weights for other in support], row.weights)
    if times is None or min(times) < 0:
        return False
    pairs = list(zip(times, support, strict=True))
    room = row.constant - sum(t * other.constant for t, other in pairs)
    return room > 0 or (room == 0 and (not row.strict or any(t and other.strict for t, other in pairs)))


def _solve(
    vectors: Sequence[Mapping[str, Fraction]], target: Mapping[str, Fraction]
) -> list[Fraction] | None:
    """Coefficients with which independent vectors add up to the target; None if they do not."""
    names = sorted({name for vector in [*vectors, target] for name in vector})
    table = [[v.get(n, Fraction(0)) for v in vectors] + [target.get(n, Fraction(0))] for n in names]
    for column in range(len(vectors)):
        pivot = next((i for i in range(column, len(table)) if table[i][column]), None)
        if pivot is None:
            return None
        table[column], table[pivot] = table[pivot], table[column]
        head = table[column] = [value / table[column][column] for value in table[column]]
        for i, line in enumerate(table):
            if i != column and line[column]:
                table[i] = [a - line[column] * b for a, b in zip(line, head, strict=True)]
    if any(line[-1] for line in table[len(vectors) :]):
        return None
    return [table[i][-1] for i in range(len(vectors))]
