"""How far generated data are from real data, and what a mixture of the two is from the real ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paperback.errors import DataError

FEWEST = 20  # of each sample, for a two-sample test
FEATURES = 50  # principal components that the test sees of wider data


def real_share(n_real: int, n_generated: int, replicate: float) -> float:
    """beta, the share of real data when each real item counts `replicate` times: r N_r / (r N_r + N_g)."""
    return replicate * n_real / (replicate * n_real + n_generated)


def replication(n_real: int, n_generated: int, beta: float) -> float:
    """How often each real item counts when real data have the share beta; the inverse of `real_share`.

    Args:
        n_real: number of real items, >= 1.
        n_generated: number of generated items, >= 0.
        beta: in (0, 1); 1 only without generated items, where the replication is 1.

    Raises:
        DataError: if beta is out of range.
    """
    if not 0 < beta <= 1:
        raise DataError(f"beta is {beta}; the share of real data must lie in (0, 1].")
    if n_generated == 0:
        return 1.0
    if beta == 1:
        raise DataError("beta is 1 with generated data; no replication reaches it, leave the data out.")
    return beta * n_generated / ((1 - beta) * n_real)


def total_variation(p: ArrayLike, q: ArrayLike) -> float:
    """Total variation of two histograms, half the sum of absolute differences, in 0..1.

    Raises:
        DataError: if they do not have one shape, or are not distributions.
    """
    first, second = np.asarray(p, dtype=float), np.asarray(q, dtype=float)
    if first.shape != second.shape:
        raise DataError(f"the histograms have shapes {first.shape} and {second.shape}; they must be equal.")
    for histogram in (first, second):
        if (histogram < 0).any() or abs(histogram.sum() - 1) > 1e-9:
            raise DataError("a histogram has a negative entry or does not sum to 1.")
    return float(np.abs(first - second).sum() / 2)


def total_variation_mixture(beta: float, tv: float) -> float:
    """TV(beta P_d + (1 - beta) P_g, P_d) = (1 - beta) TV(P_g, P_d), exactly (theorem 3.1).

    Raises:
        DataError: if beta is not in (0, 1] or tv not in [0, 1].
    """
    if not 0 < beta <= 1:
        raise DataError(f"beta is {beta}; the share of real data must lie in (0, 1].")
    if not 0 <= tv <= 1:
        raise DataError(f"tv is {tv}; a total variation lies in 0..1.")
    return (1 - beta) * tv


class Gap(NamedTuple):
    """A two-sample classifier's view of the total variation; it sees at most what there is.

    Attributes:
        estimate: 2 * accuracy - 1 on held-out data, at least 0: an estimate of a lower bound.
        at_least: the total variation is at least this, with 95 % confidence.
    """

    estimate: float
    at_least: float


def classifier_tv(real: Any, generated: Any, seed: int = 0, folds: int = 5) -> Gap:
    """A lower bound on the total variation of real and generated data, by a classifier that tells them apart.

    The best possible accuracy at even odds is (1 + TV) / 2, so that 2 * accuracy - 1 of any classifier, on
    data it was not trained on, is at most TV. The larger sample is cut to the size of the smaller one, so
    that the odds are even. Trees grown at random on principal components see more than single pixels.

    Args:
        real: ``(n, ...)``, array or tensor, n >= 20.
        generated: ``(m, ...)`` of the same shape otherwise.
        seed: of the choice, the folds and the trees.
        folds: of the cross-validation: each item is judged by trees that have not seen it.

    Returns:
        The estimate, and what holds with 95 % confidence (Clopper and Pearson's bound on the accuracy).

    Raises:
        DataError: if the shapes differ, or a sample is too small.
    """
    from scipy.stats import binomtest
    from sklearn.decomposition import PCA
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    first, second = _rows(real), _rows(generated)
    if first.shape[1:] != second.shape[1:]:
        raise DataError(f"real data have {first.shape[1]} numbers each and generated ones {second.shape[1]}.")
    n = min(len(first), len(second))
    if n < FEWEST:
        raise DataError(f"there are {len(first)} real and {len(second)} generated items; give {FEWEST} each.")
    rng = np.random.default_rng(seed)
    both = np.concatenate([x[rng.permutation(len(x))[:n]] for x in (first, second)])
    is_generated = np.repeat([0, 1], n)
    trees = ExtraTreesClassifier(200, min_samples_leaf=3, random_state=seed)
    if both.shape[1] > FEATURES:
        trees = make_pipeline(PCA(min(FEATURES, n), random_state=seed), trees)
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    right = int((cross_val_predict(trees, both, is_generated, cv=split) == is_generated).sum())
    low = binomtest(right, 2 * n).proportion_ci(confidence_level=0.9).low  # one-sided 95 %
    return Gap(max(0.0, right / n - 1), max(0.0, 2 * float(low) - 1))


def _rows(values: Any) -> NDArray[np.float32]:
    array = np.asarray(values, dtype=np.float32)
    return array.reshape(len(array), -1)
