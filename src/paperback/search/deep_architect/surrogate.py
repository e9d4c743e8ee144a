"""Ridge regression that grows by one row or one feature at a time, with the intercept not penalised.

It minimises ``sum_i (y_i - b - w . x_i)^2 + ridge |w|^2``. The inverse S of X'X + ridge I is kept: a new row
is a rank-one change of it (Sherman and Morrison), a new column a bordering, so that a trial costs O(f^2) for
f features and no refit is needed. With m = X'1, q = X'y the solution is b = (1'y - m'Sq) / (n - m'Sm),
w = S (q - b m).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

import numpy as np

from paperback.errors import DataError

Features = Mapping[Hashable, float]


class RidgeSurrogate:
    """Predicts a score from features, which need not be known beforehand.

    Args:
        ridge: strength of the penalty, > 0.
        least: a feature counts from the row on in which it occurs for the least-th time; earlier rows then
            have it too.

    Attributes:
        columns: feature to column, those in use.
        weights: one per column, as of the last `fit`.
        intercept: as of the last `fit`.

    Raises:
        DataError: if ridge or least is out of range.
    """

    def __init__(self, ridge: float = 1.0, least: int = 1) -> None:
        if not ridge > 0 or least < 1:
            raise DataError(f"ridge is {ridge} and least {least}; ridge is > 0 and least at least 1.")
        self.ridge = ridge
        self.least = least
        self.columns: dict[Hashable, int] = {}
        self.weights = np.zeros(0)
        self.intercept = 0.0
        self._rows: list[Features] = []
        self._targets: list[float] = []
        self._occurs: Counter[Hashable] = Counter()
        self._inverse = np.zeros((0, 0))  # larger than needed, so that it seldom has to be copied
        self._sums = np.zeros(0)  # m
        self._moments = np.zeros(0)  # q

    def add(self, features: Features, target: float) -> None:
        """Add a row; `fit` then makes use of it."""
        # Columns come before the row: each is bordered by its values in the earlier rows.
        for feature in features:
            self._occurs[feature] += 1
            if feature not in self.columns and self._occurs[feature] >= self.least:
                self._add_column(feature)
        places, values = self._placed(features)
        size = len(self.columns)
        inverse = self._inverse[:size, :size]
        shifted = inverse[:, places] @ values  # S x
        inverse -= np.outer(shifted, shifted) / (1.0 + values @ shifted[places])
        self._sums[places] += values
        self._moments[places] += target * values
        self._rows.append(features)
        self._targets.append(target)

    def fit(self) -> None:
        """Solve for the weights and the intercept with all rows added until now."""
        size, n = len(self.columns), len(self._targets)
        inverse, m, q = self._inverse[:size, :size], self._sums[:size], self._moments[:size]
        inverse_m = inverse @ m
        left = float(n - m @ inverse_m)  # > 0 for any ridge > 0, up to rounding
        self.intercept = float(sum(self._targets) - inverse_m @ q) / max(left, 1e-12)
        self.weights = inverse @ q - self.intercept * inverse_m

    def predict(self, features: Features) -> float:
        """The predicted score of one model."""
        columns, weights = self.columns, self.weights
        total = self.intercept
        for feature, value in features.items():
            column = columns.get(feature)
            if column is not None and column < len(weights):
                total += weights[column] * value
        return float(total)

    def _add_column(self, feature: Hashable) -> None:
        """Border the inverse: [[S + v v'/s, -v/s], [-v'/s, 1/s]], u = X'c, v = S u, s = c'c + ridge - u'v."""
        size = len(self.columns)
        if size == len(self._sums):
            self._enlarge(max(64, 2 * size))
        inverse = self._inverse[:size, :size]
        cross, square, total, moment = np.zeros(size), self.ridge, 0.0, 0.0
        if self._occurs[feature] > 1:
            for row, target in zip(self._rows, self._targets, strict=True):
                value = row.get(feature, 0.0)
                if value:
                    places, values = self._placed(row)
                    cross[places] += value * values
                    square, total, moment = square + value**2, total + value, moment + value * target
        shifted = inverse @ cross
        remainder = square - cross @ shifted
        inverse += np.outer(shifted, shifted / remainder)
        self._inverse[:size, size] = self._inverse[size, :size] = -shifted / remainder
        self._inverse[size, size] = 1.0 / remainder
        self._sums[size], self._moments[size] = total, moment
        self.columns[feature] = size

    def _placed(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        """Columns and values of those features that are in use."""
        used = [(self.columns[name], value) for name, value in features.items() if name in self.columns]
        places = np.array([place for place, _ in used], dtype=np.int64)
        return places, np.array([value for _, value in used])

    def _enlarge(self, capacity: int) -> None:
        size = len(self._sums)
        inverse = np.zeros((capacity, capacity))
        inverse[:size, :size] = self._inverse
        self._inverse = inverse
        self._sums = np.concatenate([self._sums, np.zeros(capacity - size)])
        self._moments = np.concatenate([self._moments, np.zeros(capacity - size)])
