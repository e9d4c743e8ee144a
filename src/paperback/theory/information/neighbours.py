"""Mutual information from nearest neighbours: Kraskov, Stoegbauer and Grassberger's first algorithm (KSG).

For each point the distance to its k-th neighbour in the joint space (maximum norm) is counted out in each
marginal:

    I = psi(k) + psi(N) - < psi(n_x + 1) + psi(n_y + 1) >,

with n_x the points strictly nearer than that in x. Where one variable is a class, Ross (2014) takes the
neighbour within the class and counts in all points:

    I = psi(k) + psi(N) - < psi(N_class) + psi(m) >.

Both are for continuous variables. Equal points are parted by noise of 1e-10 of the spread, as npeet does; a
variable that is a function of the other has infinite information, and the estimate then only grows with N.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.special import digamma
from sklearn.neighbors import KDTree

from paperback.errors import DataError

NOISE = 1e-10  # of each column's standard deviation


def ksg(x: Float[np.ndarray, "n dx"], t: Float[np.ndarray, "n dt"], k: int = 3, *, seed: int = 0) -> float:
    """I(x;t) of continuous paired rows, in bits; it may come out slightly negative.

    Args:
        x: ``(n, dx)``.
        t: ``(n, dt)``.
        k: neighbours, 1 <= k < n.
        seed: of the noise that parts equal points.

    Returns:
        Bits.

    Raises:
        DataError: if the rows do not pair up or are too few.

    Source:
        Kraskov, Stoegbauer and Grassberger, Estimating mutual information (2004), equation 8.
    """
    if len(x) != len(t) or not 1 <= k < len(x):
        raise DataError(f"x has {len(x)} rows, t {len(t)}, k is {k}; give equally many rows, more than k.")
    rng = np.random.default_rng(seed)
    first, second = _without_ties(x, rng), _without_ties(t, rng)
    joint = np.hstack([first, second])
    distance = cKDTree(joint).query(joint, k + 1, p=np.inf)[0][:, k]
    inside = [digamma(_count_nearer(points, distance)).mean() for points in (first, second)]
    return float((digamma(k) + digamma(len(joint)) - sum(inside)) / np.log(2))


def ksg_with_labels(
    t: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], k: int = 3, *, seed: int = 0
) -> float:
    """I(t;label) of a continuous and a discrete variable, in bits; it may come out slightly negative.

    Args:
        t: ``(n, d)``.
        labels: ``(n,)`` integers. A class with a single row is left out; one with k rows or fewer uses as
            many neighbours as it has.
        k: neighbours, >= 1.
        seed: of the noise that parts equal points.

    Returns:
        Bits; 0 if every class has a single row.

    Raises:
        DataError: if the rows do not pair up, or k < 1.

    Source:
        Ross, Mutual Information between Discrete and Continuous Data Sets (2014), equation 2.
    """
    if len(t) != len(labels) or k < 1:
        raise DataError(
            f"t has {len(t)} rows, labels {len(labels)}, k is {k}; they must pair up, and k >= 1."
        )
    classes, members, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    kept = sizes[members] > 1
    if not kept.any():
        return 0.0
    points = _without_ties(t, np.random.default_rng(seed))[kept]
    members = members[kept]
    distance = np.empty(len(points))
    for c in range(len(classes)):
        rows = points[members == c]
        if len(rows):
            nearest = min(k, len(rows) - 1)
            distance[members == c] = cKDTree(rows).query(rows, nearest + 1, p=np.inf)[0][:, nearest]
    neighbours = np.minimum(k, sizes[members] - 1)
    information = (
        digamma(neighbours).mean()
        + digamma(len(points))
        - digamma(sizes[members]).mean()
        - digamma(_count_nearer(points, distance)).mean()
    )
    return float(information / np.log(2))


def _without_ties(values: Float[np.ndarray, "n d"], rng: np.random.Generator) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    array = array.reshape(len(array), -1)
    spread = array.std(axis=0)
    return array + NOISE * np.where(spread > 0, spread, 1.0) * rng.random(array.shape)


def _count_nearer(points: NDArray[np.float64], distance: NDArray[np.float64]) -> NDArray[np.int64]:
    """Points strictly nearer than a distance of their own, the point itself included."""
    radius = np.nextafter(distance, 0)
    if points.shape[1] > 1:  # scikit-learn's tree counts faster there, scipy's in one dimension
        return KDTree(points, metric="chebyshev").query_radius(points, radius, count_only=True)
    return np.asarray(cKDTree(points).query_ball_point(points, radius, p=np.inf, return_length=True))
