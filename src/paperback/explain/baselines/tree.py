"""A decision tree: what each split on the way adds to the class shares, and an exact certificate.

The shares of a leaf are the root's shares plus the changes at each split on the way down; a change belongs to
the column that was asked (Saabas 2014). A leaf is a box; the nearest box of another class is how far away a
different decision is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor

from paperback.explain.baselines.base import Baseline
from paperback.explain.interface import Array, Explanation

ENTRIES = 4_000_000  # rows x leaves x columns of a certificate at once
LEAF = -1


class DecisionTree(Baseline):
    """A classification tree (CART).

    Args:
        max_depth: splits on the longest way; None for as many as it takes.
        min_samples_leaf: training rows of a leaf, at least.
        ccp_alpha: pruning: a split is kept if it lowers the impurity by so much for each leaf.
        image_shape: (height, width) or (height, width, 3) of rows that are images.
        seed: of the order in which columns with equal gain are taken.

    Attributes:
        feature_: column that a node asks for, ``(nodes,)``; -1 for a leaf.
        threshold_: rows with at most this go left, ``(nodes,)``.
        children_: left and right child, ``(nodes, 2)``.
        share_: of each class among the training rows of a node, ``(nodes, classes)``.
        box_: lowest and highest values of a leaf, ``(nodes, 2, features)``.
    """

    feature_: NDArray[np.int64]
    threshold_: Array
    children_: NDArray[np.int64]
    share_: Array
    box_: Array

    def __init__(
        self,
        max_depth: int | None = None,
        *,
        min_samples_leaf: int = 1,
        ccp_alpha: float = 0.0,
        image_shape: tuple[int, ...] | None = None,
        seed: int = 0,
    ) -> None:
        self.max_depth = max_depth
        self.min_samples_leaf = min_samples_leaf
        self.ccp_alpha = ccp_alpha
        self.image_shape = image_shape
        self.seed = seed

    def _fit(self, X: Array, y: NDArray[Any]) -> None:
        model = DecisionTreeClassifier(
            max_depth=self.max_depth,
            min_samples_leaf=self.min_samples_leaf,
            ccp_alpha=self.ccp_alpha,
            random_state=self.seed,
        )
        tree = model.fit(X, y).tree_
        self.feature_ = np.where(tree.children_left < 0, LEAF, tree.feature).astype(np.int64)
        self.threshold_ = tree.threshold.copy()
        self.children_ = np.stack([tree.children_left, tree.children_right], 1).astype(np.int64)
        counts = tree.value[:, 0, :]
        self.share_ = counts / counts.sum(1, keepdims=True)
        self.box_ = np.empty((len(self.feature_), 2, X.shape[1]))
        self.box_[0] = np.array([[-np.inf], [np.inf]])
        for node, column in enumerate(self.feature_):  # parents come before their children
            if column != LEAF:
                left, right = self.children_[node]
                self.box_[left] = self.box_[right] = self.box_[node]
                self.box_[left, 1, column] = self.box_[right, 0, column] = self.threshold_[node]

    def scores(self, X: Tensor) -> Tensor:
        """Shares of the classes in the row's leaf; they have no gradient."""
        leaves, _ = self._descend(X.detach().cpu().numpy())
        return torch.from_numpy(self.share_[leaves]).to(X)

    def explain(self, X: ArrayLike) -> Explanation:
        """What each column's splits added on the way down; the offset is the root."""
        rows = self._rows(X)
        _, contributions = self._descend(rows, explain=True)
        offsets = np.broadcast_to(self.share_[0], contributions.shape[:2])
        return self._explanation(
            rows, contributions, offsets, self._columns(), certificates=self._certificates(rows)
        )

    def counterexamples(self, X: ArrayLike) -> Array:
        """The nearest point to each row that is classified otherwise, ``(rows, features)``.

        It is the certified radius away; the row itself comes back where the tree knows one class only.
        """
        rows = self._rows(X)
        radii, leaf = self._nearest_leaf(rows, self._scores(rows).argmax(1))
        low, high = self.box_[leaf, 0], self.box_[leaf, 1]
        inside = np.minimum(
            np.maximum(rows, np.nextafter(low, np.inf)), high
        )  # the lower end is not in a box
        return np.where(np.isfinite(radii)[:, None], inside, rows)

    def _probabilities(self, scores: Array) -> Array:
        return scores

    def _descend(self, rows: Array, *, explain: bool = False) -> tuple[NDArray[np.int64], Array]:
        """Leaf of each row, and what columns added, ``(rows, classes, features)``, if that is wanted."""
        node = np.zeros(len(rows), dtype=np.int64)
        shape = (len(rows), len(self.classes_), rows.shape[1])
        contributions = np.zeros(shape if explain else (0, 0, 0))
        inner = np.flatnonzero(self.feature_[node] != LEAF)
        while len(inner):
            asked = self.feature_[node[inner]]
            right = rows[inner, asked] > self.threshold_[node[inner]]
            child = self.children_[node[inner], right.astype(np.int64)]
            if explain:
                contributions[inner, :, asked] += self.share_[child] - self.share_[node[inner]]
            node[inner] = child
            inner = inner[self.feature_[child] != LEAF]
        return node, contributions

    def _radii(self, X: Array, y: NDArray[Any]) -> Array:
        """Distance to the nearest leaf that decides for another class: exact; 0 where the own leaf does."""
        return self._nearest_leaf(X, y)[0]

    def _nearest_leaf(self, X: Array, y: NDArray[Any]) -> tuple[Array, NDArray[np.int64]]:
        """Distance to the nearest leaf that decides for another class, inf if none does, and that leaf."""
        leaves = np.flatnonzero(self.feature_ == LEAF)
        low, high = self.box_[leaves, 0], self.box_[leaves, 1]
        other = self.share_[leaves].argmax(1) != y[:, None]
        size = max(1, ENTRIES // max(1, low.size))
        radii, nearest = np.empty(len(X)), np.empty(len(X), dtype=np.int64)
        for i in range(0, len(X), size):
            x, some = X[i : i + size, None, :], slice(i, i + size)
            outside = np.maximum(low - x, 0) + np.maximum(x - high, 0)
            distances = np.where(other[some], np.linalg.norm(outside, axis=2), np.inf)
            radii[some], nearest[some] = distances.min(1), leaves[distances.argmin(1)]
        return radii, nearest
