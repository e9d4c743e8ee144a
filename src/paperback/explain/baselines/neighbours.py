"""k nearest neighbours: the training rows that voted, and a certificate from distances to the others.

With m = floor(k/2) + 1, class y keeps the majority while its m-th nearest training row is nearer than the
(k - m + 1)-th of all others. A move of length eps changes each distance by at most eps, so that

    eps* = (d_others(k - m + 1) - d_y(m)) / 2

is safe. For k = 1 that is half the difference of the two nearest distances.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from paperback.errors import DataError
from paperback.explain.baselines.base import BATCH, Baseline
from paperback.explain.interface import Array, Explanation


class NearestNeighbours(Baseline):
    """A vote of the k nearest training rows in L2; of classes with equally many the first one wins.

    Args:
        n_neighbors: k, at least 1.
        image_shape: (height, width) or (height, width, 3) of rows that are images.

    Attributes:
        rows_: the training rows.
        codes_: their class indices.
    """

    rows_: Array
    codes_: NDArray[np.int64]

    def __init__(self, n_neighbors: int = 5, *, image_shape: tuple[int, ...] | None = None) -> None:
        self.n_neighbors = n_neighbors
        self.image_shape = image_shape

    def _fit(self, X: Array, y: NDArray[Any]) -> None:
        if not 1 <= self.n_neighbors <= len(X):
            raise DataError(
                f"n_neighbors is {self.n_neighbors} and there are {len(X)} training rows; give a number from "
                "1 to that."
            )
        self.rows_, self.codes_ = np.array(X), y.astype(np.int64)

    def scores(self, X: Tensor) -> Tensor:
        """Shares of the votes; they have no gradient."""
        votes = torch.from_numpy(self.codes_).to(X.device)[self._nearest(X.detach())]
        return torch.nn.functional.one_hot(votes, len(self.classes_)).to(X.dtype).mean(1)

    def explain(self, X: ArrayLike) -> Explanation:
        """1/k for the class of each neighbour; parts are the training rows that are any row's."""
        rows = self._rows(X)
        nearest = torch.cat([self._nearest(part) for part in torch.tensor(rows).split(BATCH)]).numpy()
        voters, place = np.unique(nearest, return_inverse=True)
        contributions = np.zeros((len(rows), len(self.classes_), len(voters)))
        row = np.arange(len(rows))[:, None]
        contributions[row, self.codes_[nearest], place.reshape(nearest.shape)] = 1 / self.n_neighbors
        parts = tuple(f"training row {voter} ({self.classes_[self.codes_[voter]]})" for voter in voters)
        offsets = np.zeros(contributions.shape[:2])
        pictures = dict(zip(parts, self.rows_[voters], strict=True))
        return self._explanation(
            rows, contributions, offsets, parts, pictures=pictures, certificates=self._certificates(rows)
        )

    def _probabilities(self, scores: Array) -> Array:
        return scores

    def _nearest(self, X: Tensor) -> Tensor:
        """Indices of the k nearest training rows, ``(rows, k)``."""
        distances = torch.cdist(X, torch.from_numpy(self.rows_).to(X))
        return distances.topk(self.n_neighbors, largest=False).indices

    def _radii(self, X: Array, y: NDArray[Any]) -> Array:
        majority = self.n_neighbors // 2 + 1
        codes, train = torch.from_numpy(self.codes_), torch.from_numpy(self.rows_)
        parts = []
        for i in range(0, len(X), BATCH):
            distances = torch.cdist(torch.tensor(X[i : i + BATCH]), train)
            own = torch.from_numpy(y[i : i + BATCH])[:, None] == codes
            mine = _smallest(distances.masked_fill(~own, torch.inf), majority)
            others = _smallest(distances.masked_fill(own, torch.inf), self.n_neighbors - majority + 1)
            lead = torch.where(mine.isinf(), -torch.inf, others - mine)  # too few rows for a majority
            parts.append((lead / 2).numpy())
        return np.concatenate(parts)


def _smallest(distances: Tensor, rank: int) -> Tensor:
    """The value of a rank, from 1, in each row."""
    return distances.topk(rank, largest=False).values[:, -1]
