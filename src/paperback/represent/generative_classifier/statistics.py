"""Counts, means and scatter of classes, exact under merging: batches in any order give what one pass gives.

For two batches a and b of a class (Chan, Golub and LeVeque 1983), with delta = mu_a - mu_b,

    N = N_a + N_b,   mu = (N_a mu_a + N_b mu_b) / N,   S = S_a + S_b + (N_a N_b / N) delta delta^T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Scatter = Literal["pooled", "class", "full"]

ROWS = 2048  # of a block, so that a copy in float64 stays small


@dataclass
class ClassStatistics:
    """Sufficient statistics of labelled rows.

    Attributes:
        kind: which scatter is kept: "pooled" over classes ``(features,)``, of each "class" ``(classes,
            features)``, or the "full" pooled matrix ``(features, features)``.
        counts: rows of each class ``(classes,)``.
        means: of each class ``(classes, features)``, 0 where there is no row.
        scatter: sum of squared deviations from the class means.
        low: least value of each feature ``(features,)``.
        high: greatest value.
    """

    kind: Scatter
    counts: Array
    means: Array
    scatter: Array
    low: Array
    high: Array

    @classmethod
    def empty(cls, kind: Scatter, classes: int, features: int) -> ClassStatistics:
        """Of no rows."""
        shape = {"pooled": (features,), "class": (classes, features), "full": (features, features)}[kind]
        return cls(
            kind,
            np.zeros(classes),
            np.zeros((classes, features)),
            np.zeros(shape),
            np.full(features, np.inf),
            np.full(features, -np.inf),
        )

    def widened(self, places: NDArray[np.int64], classes: int) -> ClassStatistics:
        """The same with more classes; `places` says where the old ones stand among them."""
        wide = ClassStatistics.empty(self.kind, classes, self.means.shape[1])
        wide.counts[places], wide.means[places] = self.counts, self.means
        if self.kind == "class":
            wide.scatter[places] = self.scatter
        else:
            wide.scatter = self.scatter
        wide.low, wide.high = self.low, self.high
        return wide

    def add(self, x: NDArray[np.floating], codes: NDArray[np.int64]) -> None:
        """Take in rows ``(rows, features)`` with indices of their classes."""
        np.minimum(self.low, x.min(0), out=self.low)
        np.maximum(self.high, x.max(0), out=self.high)
        for start in range(0, len(x), ROWS):
            own = codes[start : start + ROWS]
            order = np.argsort(own, kind="stable")
            self._merge(x[start : start + ROWS][order], own[order])

    def _merge(self, x: NDArray[np.floating], codes: NDArray[np.int64]) -> None:
        """Take in a block whose rows are sorted by class."""
        present, first, counts = np.unique(codes, return_index=True, return_counts=True)
        means = np.empty((len(present), x.shape[1]))
        within = np.zeros((len(present) if self.kind == "class" else 1, *self.scatter.shape[-1:]))
        centred = np.empty(x.shape) if self.kind == "full" else None
        # A loop over classes, not rows; the few rows of one stay in the cache. Sums are in double precision.
        for i, (begin, count) in enumerate(zip(first, counts, strict=True)):
            rows = slice(begin, begin + count)
            means[i] = x[rows].mean(0, dtype=np.float64)
            deviations = x[rows] - means[i]
            if centred is not None:
                centred[rows] = deviations
            else:
                within[i if self.kind == "class" else 0] += np.einsum("ij,ij->j", deviations, deviations)
        before = self.counts[present]
        total = before + counts
        delta = means - self.means[present]
        between = (before * counts / total)[:, None]
        if centred is not None:
            self.scatter += centred.T @ centred + (between * delta).T @ delta
        elif self.kind == "class":
            self.scatter[present] += within + between * delta**2
        else:
            self.scatter += within[0] + (between * delta**2).sum(0)
        self.means[present] += delta * (counts / total)[:, None]
        self.counts[present] = total
