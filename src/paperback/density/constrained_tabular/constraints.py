"""A set of linear constraints over the columns of a table: read, checked for contradictions, and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paperback.density.constrained_tabular.elimination import Contradiction, Level, explain, levels
from paperback.density.constrained_tabular.grammar import parse_constraint
from paperback.density.constrained_tabular.inequality import Inequality
from paperback.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

RTOL = 1e-9  # of the size of a constraint's terms; float64 sums are right to about 1e-15 of it


class LinearConstraints:
    """Linear inequalities that every row of a table must satisfy, in the units of the table.

    Make one with `parse` or `from_arrays`. A set that no row can satisfy is refused, with the constraints
    that contradict each other.

    Args:
        groups: the inequalities of each constraint; an equality or a chain of comparisons has two or more.
        texts: each constraint as it was written.
        columns: order of the columns; those that no constraint names are left out. Order of first
            appearance, if not given.

    Attributes:
        texts: the constraints, as they were written.
        rows: their inequalities.
        columns: the columns that occur in them.

    Raises:
        DataError: if there are no constraints or they contradict each other.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Inequality]],
        texts: Sequence[str],
        columns: Sequence[str] | None = None,
    ) -> None:
        if not groups:
            raise DataError("there are no constraints; give at least one, such as 'high - low >= 0'.")
        self.texts = tuple(texts)
        self.group = tuple(i for i, group in enumerate(groups) for _ in group)
        plain = [row for group in groups for row in group]
        self.rows = tuple(replace(row, origin={i: Fraction(1)}) for i, row in enumerate(plain))
        used = dict.fromkeys(name for row in self.rows for name in row.weights)
        self.columns = tuple(used) if columns is None else tuple(name for name in columns if name in used)
        self._levels = self.levels(self.columns)

    @classmethod
    def parse(cls, texts: str | Sequence[str], columns: Sequence[str] | None = None) -> Self:
        """Read constraints from text.

        Sums of columns with numbers as coefficients are compared with >=, <=, >, < or ==; comparisons can be
        chained. ``"0.275*(x + y) <= z"``, ``"50 <= depth <= 75"``, ``"12*`unit price` == `a dozen`"``.

        Args:
            texts: one constraint each; or one string with a constraint per line, where empty lines and what
                follows a # are left out.
            columns: the columns that there are; any name is taken if not given.

        Returns:
            The constraints.

        Raises:
            DataError: naming the constraint, the character and the remedy; or the constraints that contradict
                each other.
            NotSupportedError: if a constraint is a disjunction.
        """
        if isinstance(texts, str):
            lines = (line.partition("#")[0].strip() for line in texts.splitlines())
            texts = [line for line in lines if line]
        for number, text in enumerate(texts, 1):
            if not isinstance(text, str):
                raise DataError(f"constraint {number} is a {type(text).__name__}; write it as text.")
        groups = [parse_constraint(text, number, columns) for number, text in enumerate(texts, 1)]
        return cls(groups, [text.strip() for text in texts], columns)

    @classmethod
    def from_arrays(
        cls, A: ArrayLike, b: ArrayLike, columns: Sequence[str], strict: ArrayLike | None = None
    ) -> Self:
        """Constraints ``A @ x + b >= 0``.

        Args:
            A: coefficients ``(rows, columns)``, finite; each row has one that is not zero. A float stands for
                the shortest decimal that is read as it: 0.1 is one tenth.
            b: constants ``(rows,)``, finite.
            columns: names of the columns.
            strict: booleans ``(rows,)``, True where the row is ``> 0``; none, if not given.

        Returns:
            The constraints.

        Raises:
            DataError: naming the row, if a number cannot be used; or if the rows contradict each other.
        """
        matrix, constants = np.asarray(A, dtype=np.float64), np.asarray(b, dtype=np.float64)
        names = [str(name) for name in columns]
        if matrix.ndim != 2 or matrix.shape[1] != len(names) or constants.shape != matrix.shape[:1]:
            raise DataError(
                f"A has shape {matrix.shape} and b {constants.shape}; expected (rows, {len(names)}) and "
                "(rows,)."
            )
        flags = np.zeros(len(matrix), bool) if strict is None else np.asarray(strict, dtype=bool)
        if flags.shape != constants.shape:
            raise DataError(f"strict has shape {flags.shape}; expected {constants.shape}.")
        groups = []
        for i, (weights, constant) in enumerate(zip(matrix.tolist(), constants.tolist(), strict=True)):
            if not np.isfinite([*weights, constant]).all():
                raise DataError(f"row {i} of the constraints has a number that is not finite; correct it.")
            exact = {name: Fraction(repr(w)) for name, w in zip(names, weights, strict=True) if w}
            if not exact:
                raise DataError(f"row {i} of the constraints has only zero coefficients; remove it.")
            groups.append([Inequality(exact, Fraction(repr(constant)), bool(flags[i]))])
        return cls(groups, [str(group[0]) for group in groups], names)

    def __str__(self) -> str:
        """The constraints, one per line, as `parse` reads them."""
        return "\n".join(self.texts)

    def __len__(self) -> int:
        """Number of constraints."""
        return len(self.texts)

    # -- elimination ---------------------------------------------------------------------------------------

    def levels(
        self,
        order: Sequence[str],
        margins: Sequence[Fraction] | None = None,
        prune_above: int = 50,
        steps: Mapping[str, Fraction] | None = None,
    ) -> list[Level]:
        """Bounds of each column as functions of the columns before it; see `elimination.levels`.

        Args:
            order: a permutation of `columns`.
            margins: how far inside each strict row has to be; the rows become ``>= margin``. Left out, strict
                rows stay strict.
            prune_above: rows of a level above which redundant ones are looked for.
            steps: columns that take only multiples of a step.

        Returns:
            One level per column of the order.

        Raises:
            DataError: if the order is not such a permutation, or no row satisfies the constraints.
        """
        if sorted(order) != sorted(self.columns):
            raise DataError(
                f"the order is {', '.join(order) or 'empty'}; it must name each of "
                f"{', '.join(self.columns)} once."
            )
        rows = self.rows
        if margins is not None:
            rows = tuple(
                replace(row, constant=row.constant - margin, strict=False) if row.strict else row
                for row, margin in zip(rows, margins, strict=True)
            )
        try:
            return levels(rows, order, prune_above, steps)
        except Contradiction as contradiction:
            several = [self.group.count(group) > 1 for group in self.group]
            texts = [
                str(row) if many else self.texts[g]
                for row, many, g in zip(rows, several, self.group, strict=True)
            ]
            raise explain(contradiction, texts) from None

    def feasible_point(self) -> dict[str, Fraction]:
        """A row that satisfies all constraints, exactly, in the middle of the room that each column has left.

        Returns:
            A value for each of `columns`.
        """
        point: dict[str, Fraction] = {}
        for level in self._levels:
            low = [-rest(row, point) / row.weights[level.column] for row in level.lower]
            high = [-rest(row, point) / row.weights[level.column] for row in level.upper]
            if low and high:
                point[level.column] = (max(low) + min(high)) / 2
            elif low or high:
                point[level.column] = max(low) + 1 if low else min(high) - 1
            else:
                point[level.column] = Fraction(0)
        return point

    # -- measuring a table ---------------------------------------------------------------------------------

    @cached_property
    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """A ``(rows, columns)``, b ``(rows,)`` and strict ``(rows,)`` with A @ x + b >= 0, as float64."""
        A = [[float(row.weights.get(name, 0)) for name in self.columns] for row in self.rows]
        b = [float(row.constant) for row in self.rows]
        return np.array(A), np.array(b), np.array([row.strict for row in self.rows])

    def values(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """The constrained columns of a table, ``(n, columns)``; missing cells are NaN.

        Raises:
            DataError: if a column is missing from the table, is not a column of numbers, or has an infinite
                cell.
        """
        from paperback.data.table_files import is_numeric

        for name in self.columns:
            if name not in frame.columns:
                raise DataError(f"the table has no column {name!r}, which the constraints name; add it.")
            if not is_numeric(frame[name]):
                raise DataError(
                    f"column {name} holds {frame[name].dtype}, but a constraint needs numbers; convert it "
                    "or leave the constraint out."
                )
        values = np.stack(
            [frame[name].to_numpy(dtype=np.float64, na_value=np.nan) for name in self.columns], axis=1
        )
        if np.isinf(values).any():
            row, column = np.argwhere(np.isinf(values))[0]
            raise DataError(
                f"column {self.columns[column]}, row {row} is infinite; replace it or leave it empty."
            )
        return values

    def check(self, frame: pd.DataFrame, rtol: float = RTOL) -> NDArray[np.bool_]:
        """Which rows satisfy which constraints.

        Args:
            frame: a table with the constrained columns.
            rtol: how far a sum may fall short, relative to the sum of its terms' sizes; strict comparisons
                are exact at 0, otherwise taken like the others.

        Returns:
            ``(n, constraints)``. A constraint that names a missing cell counts as satisfied.

        Raises:
            DataError: as `values`.
        """
        kept = self._check_rows(self.values(frame), rtol)
        result = np.ones((len(kept), len(self)), bool)
        for column, group in enumerate(self.group):
            result[:, group] &= kept[:, column]
        return result

    def _check_rows(self, values: NDArray[np.float64], rtol: float) -> NDArray[np.bool_]:
        A, b, strict = self.arrays
        missing = np.isnan(values)
        known = np.where(missing, 0.0, values)
        slack = known @ A.T + b
        size = np.abs(known) @ np.abs(A).T + np.abs(b)
        kept = np.where(strict & (rtol == 0), slack > 0, slack >= -rtol * size)
        return kept | (missing @ (A != 0).T)

    def complies(self, frame: pd.DataFrame, rtol: float = RTOL) -> NDArray[np.bool_]:
        """Which rows satisfy all constraints, ``(n,)``; see `check`."""
        return np.asarray(self.check(frame, rtol).all(axis=1), dtype=bool)

    def violation_rate(self, frame: pd.DataFrame, rtol: float = RTOL) -> float:
        """Share of rows that break any constraint (the paper's CVR)."""
        return float((~self.complies(frame, rtol)).mean())

    def violation_coverage(self, frame: pd.DataFrame, rtol: float = RTOL) -> float:
        """Share of constraints that some row breaks (the paper's CVC)."""
        return float((~self.check(frame, rtol)).any(axis=0).mean())

    def violation_mean(self, frame: pd.DataFrame, rtol: float = RTOL) -> float:
        """Share of all pairs of a row and a constraint that are broken (the paper's sCVC)."""
        return float((~self.check(frame, rtol)).mean())


def rest(row: Inequality, point: Mapping[str, Fraction]) -> Fraction:
    """A row at a point, without the one column that the point does not have."""
    return row.constant + sum(w * point[name] for name, w in row.weights.items() if name in point)
